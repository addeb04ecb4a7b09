import HapteraAPI
import HapteraCore
import HapteraHost
import Testing

@testable import HapteraControl

/// The agent's part, against the stand-in for the engine.
@Suite struct SnapshotTaskTests {
    private func task(
        _ name: String, generation: UInt64 = 1, timeout: UInt64 = 5000
    ) -> Haptera_V1_AgentTask {
        var task = Haptera_V1_AgentTask()
        task.id = 3
        task.takeSnapshot.volumeID = "00000000000000010000000000000002"
        task.takeSnapshot.clientGeneration = generation
        task.takeSnapshot.name = name
        task.takeSnapshot.createdUnixMilliseconds = 1_700_000_000_123
        task.takeSnapshot.timeoutMilliseconds = timeout
        return task
    }

    @Test func theEngineIsToldOnItsControlSocket() async throws {
        let bench = try NodeAgentBench()
        let early = await bench.agent.perform(task("s"))
        #expect(early.error == "it runs no engine of volume 00000000000000010000000000000002")
        bench.want(.create)
        let replica = try await bench.untilReplica(.running)
        bench.want(.attach, addresses: [replica.address], attachment: 1)
        _ = try await bench.untilEngine(.serving)

        let done = await bench.agent.perform(task("before-1.0"))
        #expect(done.taskID == 3)
        #expect(done.error.isEmpty)
        #expect(try await bench.engineStatus["snapshots"] == "before-1.0@1700000000123")
        // Of another attachment, and a name that is more than a word.
        for wrong in [task("s", generation: 2), task("a b")] {
            let answer = await bench.agent.perform(wrong)
            #expect(!answer.error.isEmpty && !answer.inDoubt)
        }
        let refused = await bench.agent.perform(task("refused"))
        #expect(refused.error == "no space for another layer")
        #expect(!refused.inDoubt)
        #expect(try await bench.engineStatus["snapshots"] == "before-1.0@1700000000123")
    }

    @Test func anAnswerThatDoesNotComeLeavesADoubt() async throws {
        let bench = try NodeAgentBench()
        bench.want(.create)
        let replica = try await bench.untilReplica(.running)
        bench.want(.attach, addresses: [replica.address], attachment: 1)
        _ = try await bench.untilEngine(.serving)
        let dropped = await bench.agent.perform(task("dropped"))
        #expect(dropped.inDoubt)
        #expect(dropped.error.contains("closed before it had answered"))
        let doubted = await bench.agent.perform(task("doubted"))
        #expect(doubted.inDoubt)
        #expect(doubted.error.hasPrefix("the engine stopped before it knew"))
        let slow = await bench.agent.perform(task("slow", timeout: 1000))
        #expect(slow.inDoubt)
        #expect(slow.error.contains("did not answer in time"))
    }
}
