import Glibc
import HapteraAPI
import HapteraHost
import Testing

@testable import HapteraControl

/// The agent's part, against the stand-in for the engine.
@Suite struct MaintenanceAgentTests {
    private func replica(_ bench: NodeAgentBench) async throws -> String {
        bench.want(.create)
        return try await bench.untilReplica(.running).address
    }

    @Test func itsEngineLetsNobodyIn() async throws {
        let bench = try NodeAgentBench()
        let address = try await replica(bench)
        bench.want(.maintain, addresses: [address], attachment: 1)
        let engine = try await bench.untilEngine(.serving)
        #expect(engine.clientGeneration == 1)
        // Only readers of snapshots, which are told where.
        #expect(try bench.engineArguments.contains("--maintenance"))
        let place = try #require(try bench.engineArgument("--nbd"))
        #expect(engine.uri == "nbd://\(place)/vol")
        var task = Haptera_V1_AgentTask()
        task.takeSnapshot.volumeID = engine.volumeID
        task.takeSnapshot.clientGeneration = 1
        task.takeSnapshot.name = "s"
        task.takeSnapshot.timeoutMilliseconds = 5000
        #expect(await bench.agent.perform(task).error.isEmpty)
        #expect(try await bench.engineStatus["snapshots"] == "s@0")
        // A store that is rebuilt from the nodes must not take it for one that clients rely on.
        task.inspect.replicaIds = []
        #expect(await bench.agent.perform(task).engines.map(\.maintenance) == [true])

        // Another agent finds it again.
        try await bench.restartAgent()
        #expect(try await bench.untilEngine(.serving).pid == engine.pid)
        bench.want(.detach, addresses: [address], attachment: 1)
        _ = try await bench.untilEngine(.detached)
        try await bench.untilGone(engine.pid)
    }

    /// Nobody's writes are lost with it.
    @Test func oneThatHangsIsKilledInTheEnd() async throws {
        let bench = try NodeAgentBench()
        let address = try await replica(bench)
        bench.want(.maintain, addresses: [address], attachment: 1)
        let engine = try await bench.untilEngine(.serving)
        kill(engine.pid, SIGSTOP)
        bench.want(.detach, addresses: [address], attachment: 1)
        try await bench.step()
        #expect(ProcessIdentity(running: engine.pid) != nil, "it was given no time")
        bench.now += EngineUnit.hangingMilliseconds
        _ = try await bench.untilEngine(.detached)
        #expect(ProcessIdentity(running: engine.pid) == nil)
    }

    /// An attachment may follow before the agent hears that there is none: what ended in order is
    /// no crash that would hold it up, nor are its sockets in the way.
    @Test func oneRightAfterTheOther() async throws {
        let bench = try NodeAgentBench()
        let address = try await replica(bench)
        var uris: [String] = []
        for attachment in 1...5 as ClosedRange<UInt64> {
            let phase: Haptera_V1_DesiredEngine.Phase =
                attachment.isMultiple(of: 2) ? .attach : .maintain
            bench.want(phase, addresses: [address], attachment: attachment)
            let engine = try await bench.until("engine \(attachment)") {
                $0.engines.first?.state == .serving
                    && $0.engines[0].clientGeneration == attachment
            }.engines[0]
            #expect(try bench.engineArguments.contains("--maintenance") == (phase == .maintain))
            uris.append(engine.uri)
            #expect(engine.restarts == 0 && engine.lastEnding.isEmpty)
            bench.want(.detach, addresses: [address], attachment: attachment)
            _ = try await bench.untilEngine(.detached)
        }
        // Readers that a maintenance has had find their snapshots where they were.
        #expect(uris[0] == uris[1] && uris[2] == uris[3])
    }
}
