import Foundation
import Glibc
import HapteraAPI
import HapteraHost
import Logging
import Testing

@testable import HapteraControl

/// An agent whose clock is moved by the test: back-offs pass at once.
final class NodeAgentBench {
    let directory: TemporaryDirectory
    var agent: NodeAgent
    var now: Int64 = 1_000_000
    var desired = Haptera_V1_DesiredState()
    private let context: NodeContext
    private static let quiet = Logger(label: "test") { _ in SwiftLogNoOpLogHandler() }
    private static let fakes = URL(filePath: #filePath).deletingLastPathComponent()
        .appending(path: "Fakes").path

    init() throws {
        directory = try TemporaryDirectory()
        context = NodeContext(
            host: RealProcessHost(), directory: directory.path, address: "127.0.0.1",
            ports: Ports.defaultRange,
            replicaProgram: Self.fakes + "/haptera-replica",
            engineProgram: Self.fakes + "/haptera-engine")
        agent = try NodeAgent(context, logger: Self.quiet)
        desired.recordService = "127.0.0.1:1"
    }

    /// Whatever a failed test leaves behind.
    deinit {
        for process in Self.files(directory.path) { process.identity.signal(SIGKILL) }
    }

    static func files(_ directory: String) -> [ProcessFile] {
        let names = (try? FileManager.default.contentsOfDirectory(atPath: directory + "/run"))
        return (names ?? []).filter { $0.hasSuffix(".pid") }
            .compactMap { ProcessFile.load("\(directory)/run/\($0)") }
    }

    /// The agent ends; another takes its place.
    func restartAgent() async throws {
        agent = try NodeAgent(context, logger: Self.quiet)
        await agent.resume()
    }

    func want(_ phase: Haptera_V1_DesiredReplica.Phase, id: String = "00000000000000aa") {
        var replica = Haptera_V1_DesiredReplica()
        replica.volumeID = "00000000000000010000000000000002"
        replica.volume = "vol"
        replica.replicaID = id
        replica.incarnation = "0000000000000001"
        replica.sizeBytes = 1 << 20
        replica.phase = phase
        desired.replicas.removeAll { $0.replicaID == id }
        desired.replicas.append(replica)
    }

    func want(
        _ phase: Haptera_V1_DesiredEngine.Phase, addresses: [String], attachment: UInt64,
        _ change: (inout Haptera_V1_DesiredEngine) -> Void = { _ in }
    ) {
        var engine = Haptera_V1_DesiredEngine()
        engine.volumeID = "00000000000000010000000000000002"
        engine.volume = "vol"
        engine.clientGeneration = attachment
        engine.phase = phase
        engine.replicas = addresses.enumerated().map { index, address in
            var replica = Haptera_V1_ReplicaEndpoint()
            replica.replicaID = "00000000000000a\(index)"
            replica.address = address
            return replica
        }
        change(&engine)
        desired.engines = [engine]
    }

    /// One round of every unit, to its end.
    func step() async throws {
        try await agent.want(desired)
        for task in await agent.step(now: now) { await task.value }
        now += 10
    }

    var report: Haptera_V1_NodeReport {
        get async { await agent.report(name: "n", nodeID: "1") }
    }

    /// Goes on in rounds until the condition holds; fails if it takes absurdly long: beside many
    /// other tests on two cores a test may wait half a minute for its first turn.
    func until(
        _ what: String, _ condition: (Haptera_V1_NodeReport) -> Bool
    ) async throws -> Haptera_V1_NodeReport {
        let deadline = ContinuousClock.now + .seconds(120)
        while ContinuousClock.now < deadline {
            try await step()
            let now = await report
            if condition(now) { return now }
            await Task.yield()
        }
        throw HostError("never happened: \(what); \(await report)")
    }

    func untilReplica(
        _ state: Haptera_V1_ReplicaReport.State
    ) async throws -> Haptera_V1_ReplicaReport {
        try await until("replica \(state)") { $0.replicas.first?.state == state }.replicas[0]
    }
    func untilEngine(
        _ state: Haptera_V1_EngineReport.State
    ) async throws -> Haptera_V1_EngineReport {
        try await until("engine \(state)") { $0.engines.first?.state == state }.engines[0]
    }
    var engineArguments: [String] {
        get throws {
            try #require(
                ProcessFile.load(directory.path + "/run/e-0000000000000001.pid")
            ).arguments
        }
    }
    /// What the engine that runs was started with.
    func engineArgument(_ name: String) throws -> String? {
        let file = try #require(
            ProcessFile.load(directory.path + "/run/e-0000000000000001.pid"))
        return file.arguments.firstIndex(of: name).map { file.arguments[$0 + 1] }
    }
    var engineStatus: [String: String] {
        get async throws {
            try await ControlSocket.request(
                directory.path + "/run/e-0000000000000001.sock", "status", timeoutSeconds: 5)
        }
    }
    func untilGone(_ pid: Int32) async throws {
        while ProcessIdentity(running: pid) != nil { await Task.yield() }
    }
}
