import Foundation
import Glibc
import HapteraHost
import Testing

@testable import HapteraCLI

/// The programs as a user runs them, over stand-ins for the data-plane programs.
@Suite(.serialized) struct ClusterTests {
    @Test func aClusterFromUpToDown() async throws {
        let bench = try Bench()
        defer { bench.stop() }
        let up = try bench.run("cluster up --dir \(bench.cluster) --nodes 3 -o json")
        #expect(up.status == 0, "\(up.error)")
        let server = try #require(up.json["server"] as? String)
        // Again is harmless, and finds the same.
        #expect(
            try bench.run("cluster up --dir \(bench.cluster) -o json").json["server"] as? String
                == server)
        #expect(try bench.run("status -o json").json["nodesReady"] as? Int == 3)

        #expect(try bench.run("volume create vol --size 1GiB").status == 0)
        #expect(try bench.run("volume create vol --size 1GiB").status == 0)
        #expect(try bench.run("volume create vol --size 2GiB").status == 4)
        #expect(try bench.run("volume create wide --size 1GiB --replicas 4").status == 4)
        #expect(try bench.run("volume show other").status == 3)
        #expect(try bench.run("snapshot list other").status == 3)
        #expect(try bench.run("snapshot list vol -o json").output == "[]\n")
        // Not attached, it gets an engine for so long.
        let early = try bench.run("snapshot create vol refused")
        #expect(early.status == 4)
        #expect(early.error.contains("no space for another layer"), "\(early.error)")
        let attached = try bench.run("volume attach vol -o json")
        #expect(attached.status == 0, "\(attached.error)")
        #expect((attached.json["uri"] as? String)?.hasPrefix("nbd://127.0.0.1:") == true)
        #expect(
            (attached.json["unixURI"] as? String)?.hasPrefix("nbd+unix:///vol?socket=/") == true)
        #expect(try bench.run("volume attach vol -o json").output == attached.output)
        #expect(try bench.run("volume delete vol").status == 4)
        // The stand-in has no record to keep a snapshot in.
        for (name, status, words) in [
            ("refused", 4 as Int32, "no space for another layer"),
            ("dropped", 5, "find out with 'storagectl snapshot list vol'"),
            ("unrecorded", 5, "the record does not name it"),
        ] {
            let outcome = try bench.run("snapshot create vol \(name)")
            #expect(outcome.status == status)
            #expect(outcome.error.contains(words), "\(outcome.error)")
        }
        #expect(try bench.run("snapshot show vol refused").status == 3)
        #expect(try bench.run("snapshot delete vol refused --yes").status == 3)
        #expect(try bench.run("snapshot delete other s --yes").status == 3)

        let healthy = try bench.run("volume show vol -o json").json
        #expect(healthy["robustness"] as? String == "healthy")
        let replicas = try #require(healthy["replicas"] as? [[String: Any]])
        #expect(Set(replicas.compactMap { $0["node"] as? String }).count == 3)
        kill(try #require(replicas[1]["pid"] as? Int32), SIGKILL)
        try bench.wait { $0["robustness"] as? String == "degraded" }
        try bench.wait { $0["robustness"] as? String == "healthy" }

        #expect(try bench.run("volume detach vol").status == 0)
        #expect(try bench.run("volume detach vol").status == 0)
        #expect(try bench.run("volume show vol -o json").json["state"] as? String == "detached")
        #expect(try bench.run("volume delete vol").status == 0)
        #expect(try bench.run("volume delete vol").status == 0)
        for replica in replicas {
            let directory = try #require(replica["directory"] as? String)
            #expect(!FileManager.default.fileExists(atPath: directory))
        }
        #expect(try bench.run("cluster down").status == 0)
        #expect(bench.processes.isEmpty)
        // Its context went with it.
        #expect(try bench.run("status").status == 2)
    }

    /// Neither the controller's death nor a node agent's reaches an engine or a replica, and what
    /// was wanted is still known afterwards.
    @Test func theControlPlaneMayDie() async throws {
        let bench = try Bench()
        defer { bench.stop() }
        let up = try bench.run("cluster up --dir \(bench.cluster) --nodes 1")
        #expect(up.status == 0, "\(up.error)")
        #expect(try bench.run("volume create vol --size 1MiB --replicas 1").status == 0)
        #expect(try bench.run("volume attach vol").status == 0)
        let before = try bench.run("volume show vol -o json").json
        for name in ["controller", "node-1"] {
            let file = try #require(ProcessFile.load("\(bench.cluster)/\(name).pid"))
            file.identity.signal(SIGKILL)
            while file.identity.isRunning { await Task.yield() }
        }
        // Looking fails at once; a change waits and says for what.
        let look = try bench.run("volume list")
        #expect(look.status == 5)
        #expect(look.error.contains("cannot be reached"))
        for command in [
            "volume detach vol", "snapshot create vol now", "snapshot create now --group vol",
        ] {
            let change = try bench.run("\(command) --timeout 1")
            #expect(change.status == 5)
            #expect(change.error.contains("waiting for the controller at 127.0.0.1:"))
            #expect(change.error.contains("last error:"))
            #expect(change.error.contains("did not answer for 1 s"), "\(change.error)")
        }
        let waiting = try bench.start("volume create other --size 1MiB --replicas 1 -q")
        #expect(try bench.run("cluster up --dir \(bench.cluster) --nodes 1").status == 0)
        waiting.waitUntilExit()
        #expect(waiting.terminationStatus == 0)
        try bench.wait { $0["robustness"] as? String == "healthy" }
        let after = try bench.run("volume show vol -o json").json
        #expect(try Bench.pids(after) == Bench.pids(before))
        #expect(after["state"] as? String == "attached")
        // Down with the volume attached: everything goes, in order.
        #expect(try bench.run("cluster down").status == 0)
        #expect(bench.processes.isEmpty)
    }
}

/// A place for one cluster and the programs to make it with.
private struct Bench {
    struct Outcome {
        var status: Int32
        var output: String
        var error: String
        var json: [String: Any] {
            let object = try? JSONSerialization.jsonObject(with: Data(output.utf8))
            return object as? [String: Any] ?? [:]
        }
    }

    let directory: String
    private let environment: [String: String]
    var cluster: String { directory + "/c" }

    init() throws {
        directory = "/tmp/haptera-\(UInt32.random(in: .min ... .max))"
        try HostFiles.makeDirectory(directory)
        let tests = URL(filePath: #filePath).deletingLastPathComponent()
            .deletingLastPathComponent()
        environment = ProcessInfo.processInfo.environment.merging([
            "XDG_CONFIG_HOME": directory + "/config",
            "HAPTERA_BIN_DIR": tests.path + "/HapteraControlTests/Fakes",
        ]) { $1 }.filter { $0.key != "HAPTERA_SERVER" }
    }

    /// The build directory: it holds the test bundle and the programs.
    private static let programs: String = {
        let arguments = CommandLine.arguments
        let bundle = arguments.first { $0.contains(".xctest") } ?? arguments[0]
        return (bundle as NSString).deletingLastPathComponent
    }()

    func run(_ line: String) throws -> Outcome {
        let process = Process()
        process.executableURL = URL(filePath: Self.programs + "/storagectl")
        process.arguments = line.split(separator: " ").map(String.init)
        process.environment = environment
        let output = Pipe()
        let error = directory + "/error"
        _ = FileManager.default.createFile(atPath: error, contents: nil)
        process.standardOutput = output
        process.standardError = FileHandle(forWritingAtPath: error)
        try process.run()
        let data = try output.fileHandleForReading.readToEnd() ?? Data()
        process.waitUntilExit()
        return Outcome(
            status: process.terminationStatus, output: String(decoding: data, as: UTF8.self),
            error: (try? String(contentsOfFile: error, encoding: .utf8)) ?? "")
    }

    /// Without waiting; its output is nobody's.
    func start(_ line: String) throws -> Process {
        let process = Process()
        process.executableURL = URL(filePath: Self.programs + "/storagectl")
        process.arguments = line.split(separator: " ").map(String.init)
        process.environment = environment
        process.standardOutput = FileHandle.nullDevice
        process.standardError = FileHandle.nullDevice
        try process.run()
        return process
    }

    /// Until `volume show vol` says so.
    func wait(_ condition: ([String: Any]) -> Bool) throws {
        let deadline = ContinuousClock.now + .seconds(30)
        var last = ""
        while ContinuousClock.now < deadline {
            let outcome = try run("volume show vol -o json")
            if condition(outcome.json) { return }
            last = outcome.output + outcome.error
        }
        throw HostError("never happened; the last was \(last)")
    }

    static func pids(_ volume: [String: Any]) throws -> [Int] {
        let engine = try #require(volume["engine"] as? [String: Any])
        let replicas = try #require(volume["replicas"] as? [[String: Any]])
        return try ([engine] + replicas).map { try #require($0["pid"] as? Int) }
    }

    /// Running processes that have the cluster's directory in their arguments.
    var processes: [String] {
        let all = (try? FileManager.default.contentsOfDirectory(atPath: "/proc")) ?? []
        return all.filter { name in
            guard let pid = Int32(name), ProcessIdentity(running: pid) != nil,
                let data = FileManager.default.contents(atPath: "/proc/\(name)/cmdline")
            else { return false }
            return String(decoding: data, as: UTF8.self).contains(cluster + "/")
        }
    }

    /// Also after a failure in the middle.
    func stop() {
        for name in processes { _ = Int32(name).map { kill($0, SIGKILL) } }
        try? FileManager.default.removeItem(atPath: directory)
    }
}
