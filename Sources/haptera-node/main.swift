import ArgumentParser
import HapteraControl
import HapteraHost
import Logging

struct NodeCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "haptera-node",
        abstract: "Runs this host's engines and replicas as the controller wants them.",
        discussion: """
            Engines and replicas survive the end of this program; its next start finds them again.
            Before the host goes down, end it, and then them: haptera-node shutdown --dir DIR.
            """,
        version: HapteraVersion.text, subcommands: [RunCommand.self, ShutdownCommand.self],
        defaultSubcommand: RunCommand.self)
}

struct RunCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "run", abstract: "Runs them.")

    @Option(help: "HOST:PORT of the controller's gRPC API.")
    var controller: String

    @Option(help: "The node's name in the cluster: \(Names.labelRule).")
    var name: String

    @Option(help: "Where replicas, logs and sockets are kept.")
    var dir: String

    @Option(help: "Address under which engines and clients reach this node's processes.")
    var address = "127.0.0.1"

    @Option(help: "TCP ports to give to engines and replicas, FIRST-LAST.")
    var ports = "\(Ports.defaultRange.lowerBound)-\(Ports.defaultRange.upperBound)"

    @Option(help: "trace, debug, info, notice, warning or error.")
    var logLevel = Logger.Level.info

    func validate() throws {
        guard Names.hostAndPort(controller) != nil else {
            throw ValidationError("--controller '\(controller)' is not HOST:PORT")
        }
        guard Names.isValidLabel(name) else {
            throw ValidationError("'\(name)' is no node name: use \(Names.labelRule)")
        }
        guard Names.hostAndPort(Names.endpoint(host: address, port: 1)) != nil else {
            throw ValidationError("--address '\(address)' is not a host name or IP address")
        }
        guard Ports.parseRange(ports) != nil else {
            throw ValidationError("--ports '\(ports)' is not FIRST-LAST within 1-65535")
        }
    }

    func run() async throws {
        guard let controller = Names.hostAndPort(controller), let ports = Ports.parseRange(ports)
        else { return }
        try await NodeProcess(
            controller: controller, name: name, directory: dir, address: address, ports: ports
        ).run(logger: Daemon.logger("haptera-node", level: logLevel))
    }
}

struct ShutdownCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "shutdown",
        abstract: "Ends this host's engines in order, then its replicas, before it goes down.",
        discussion: """
            End the node agent first: it would start them again, as its next start does. Status 1: \
            something has not ended; nothing is killed.
            """)

    @Option(help: "The node agent's directory.")
    var dir: String

    func run() async throws {
        let directory = HostFiles.absolute(dir)
        guard RealProcessHost().directoryExists(directory + "/run") else {
            throw HostError("\(directory) is no node agent's directory")
        }
        let lock = try DirectoryLock(directory)
        defer { withExtendedLifetime(lock) {} }
        let logger = Daemon.logger("haptera-node", level: .info)
        for kind in NodeUnits.allCases {
            let units = kind.running(directory)
            // Replicas wait for engines: those that stay can only leave as after a crash.
            let left = await kind.end(units)
            guard left.isEmpty else {
                let pids = left.map { "\($0.identity.pid)" }.joined(separator: ", ")
                throw HostError("\(kind.rawValue) that have not ended: processes \(pids)")
            }
            logger.info("ended", metadata: ["\(kind.rawValue)": "\(units.count)"])
        }
    }
}

await Daemon.main(NodeCommand.self)
