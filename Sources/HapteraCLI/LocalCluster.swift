import Foundation
import Glibc
import HapteraAPI
import HapteraHost

/// A cluster on this host alone: a controller and node agents as daemons below one directory.
///
///     cluster.json                      ports and node names
///     controller/, controller.pid, controller.log
///     node-N/, node-N.pid, node-N.log   and the node's engines and replicas below node-N/run
package struct LocalCluster: Sendable {
    package struct Layout: Codable, Equatable, Sendable {
        package var apiPort: Int
        package var recordPort: Int
        package var nodes: [String]
    }

    package static let nodesMax = 64
    static let host = "127.0.0.1"
    let directory: String
    private(set) var layout: Layout

    package var server: String { Names.endpoint(host: Self.host, port: layout.apiPort) }
    private static func layoutPath(_ directory: String) -> String { directory + "/cluster.json" }

    /// The cluster made in the directory before; nil if there is none.
    package init?(existing directory: String) throws {
        self.directory = HostFiles.absolute(directory)
        let path = Self.layoutPath(self.directory)
        guard let data = FileManager.default.contents(atPath: path) else { return nil }
        guard let layout = try? JSONDecoder().decode(Layout.self, from: data) else {
            throw CommandFailure(
                .failed,
                "\(path) does not describe a cluster: restore it, or use another --dir")
        }
        self.layout = layout
    }

    /// The cluster of the directory, made if there is none, with at least so many nodes.
    package init(directory: String, nodes: Int) throws {
        let path = HostFiles.absolute(directory)
        try UnixSocketPath.check(path + "/node-\(nodes)/run")
        if let existing = try Self(existing: path) {
            self = existing
        } else {
            try HostFiles.makeDirectory(path)
            self.directory = path
            let api = try Ports.findFree(host: Self.host)
            layout = Layout(
                apiPort: api, recordPort: try Ports.findFree(host: Self.host, except: [api]),
                nodes: [])
        }
        for number in 1...nodes where !layout.nodes.contains("node-\(number)") {
            layout.nodes.append("node-\(number)")
        }
        try save()
    }

    private func save() throws {
        let encoder = JSONEncoder()
        encoder.outputFormatting = [.prettyPrinted, .sortedKeys]
        try HostFiles.replace(
            Self.layoutPath(directory), with: try encoder.encode(layout))
    }

    // MARK: Up

    /// Starts whatever does not run.
    mutating func start() throws {
        let controller = try Programs.find("haptera-controller")
        let node = try Programs.find("haptera-node")
        for program in ["haptera-engine", "haptera-replica"] { _ = try Programs.find(program) }
        if !isRunning("controller") {
            try choosePortsAgainIfTaken()
            try startDaemon(
                "controller", controller,
                [
                    "--dir", directory + "/controller", "--listen", server, "--records",
                    Names.endpoint(host: Self.host, port: layout.recordPort),
                ])
        }
        for name in layout.nodes {
            let arguments = [
                "--controller", server, "--name", name, "--dir", "\(directory)/\(name)",
            ]
            // A node that looks for the controller at another port is of no use.
            if let file = ProcessFile.load(path(name)), isRunning(name),
                file.arguments != arguments
            {
                Self.stop(file.identity, patience: .seconds(10))
            }
            if !isRunning(name) { try startDaemon(name, node, arguments) }
        }
    }

    private mutating func choosePortsAgainIfTaken() throws {
        let ports = [layout.apiPort, layout.recordPort]
        guard !ports.allSatisfy({ Ports.isFree(host: Self.host, port: $0) }) else { return }
        layout.apiPort = try Ports.findFree(host: Self.host)
        layout.recordPort = try Ports.findFree(host: Self.host, except: [layout.apiPort])
        try save()
    }

    private func startDaemon(_ name: String, _ program: String, _ arguments: [String]) throws {
        let identity = try ChildProcess.startDetached(
            program, arguments, log: "\(directory)/\(name).log")
        try ProcessFile(
            identity: identity, executable: program, arguments: arguments, control: ""
        ).save(path(name))
    }

    private func path(_ name: String) -> String { "\(directory)/\(name).pid" }

    func isRunning(_ name: String) -> Bool {
        guard let file = ProcessFile.load(path(name)) else { return false }
        ChildProcess.reap(file.identity.pid)
        return file.identity.isRunning
    }

    /// Throws when a daemon has ended that should run, with what it said last.
    func requireDaemons() throws {
        for name in ["controller"] + layout.nodes where !isRunning(name) {
            let log = "\(directory)/\(name).log"
            let text = (try? String(contentsOfFile: log, encoding: .utf8)) ?? ""
            let last = text.split(separator: "\n").last.map(String.init) ?? "no message"
            throw CommandFailure(.failed, "\(name) has ended: \(last) (see \(log))")
        }
    }

    // MARK: Down

    /// Stops the nodes, then the engines and replicas they left, then the controller. Returns what
    /// had to be killed.
    func stop(_ say: @Sendable (String) -> Void) async -> [String] {
        for name in layout.nodes {
            say("stopping \(name)")
            stopDaemon(name)
        }
        var killed: [String] = []
        for kind in NodeUnits.allCases {
            let units = layout.nodes.flatMap { kind.running("\(directory)/\($0)") }
            say("stopping \(units.count) \(kind.rawValue)")
            for unit in await kind.end(units) {
                unit.identity.signal(SIGKILL)
                _ = await unit.identity.isGone(within: .seconds(10))
                killed.append(unit.control)
            }
        }
        say("stopping the controller")
        stopDaemon("controller")
        return killed
    }

    private func stopDaemon(_ name: String) {
        if let file = ProcessFile.load(path(name)) {
            Self.stop(file.identity, patience: .seconds(10))
        }
        try? FileManager.default.removeItem(atPath: path(name))
    }

    private static func stop(_ process: ProcessIdentity, patience: Duration) {
        process.signal(SIGTERM)
        let deadline = ContinuousClock.now + patience
        while process.isRunning {
            ChildProcess.reap(process.pid)
            if ContinuousClock.now > deadline { process.signal(SIGKILL) }
            usleep(20_000)
        }
    }
}
