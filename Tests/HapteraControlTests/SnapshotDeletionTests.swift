import GRPCCore
import HapteraAPI
import HapteraCore
import Synchronization
import Testing

@testable import HapteraControl

extension SnapshotTests.World {
    func delete(_ name: String, of volume: String = "vol", timeout: UInt64 = 0) async throws {
        var request = Haptera_V1_DeleteSnapshotRequest()
        request.volume = volume
        request.name = name
        request.timeoutMilliseconds = timeout
        try await controller.deleteSnapshot(request)
    }

    /// How the request is refused.
    func deletionRefusal(
        _ name: String, of volume: String = "vol", timeout: UInt64 = 0
    ) async throws -> ControlError {
        let error = await #expect(throws: ControlError.self) {
            try await self.delete(name, of: volume, timeout: timeout)
        }
        return try #require(error)
    }

    var names: [String] {
        get async throws { try await controller.snapshots(of: "vol").map(\.name) }
    }
}

/// How snapshots end, over the stand-ins of `SnapshotTests`.
@Suite struct SnapshotDeletionTests {
    typealias World = SnapshotTests.World

    @Test func deletedByTheEngineAndGoneFromTheRecord() async throws {
        let world = try await World()
        for name in ["s", "t"] { _ = try await world.create(name) }
        let caller = Caller(actor: "ann@host", peer: "ipv4:10.0.0.1:5")
        try await Caller.$current.withValue(caller) { try await world.delete("s") }
        #expect(try await world.names == ["t"])
        #expect(try await world.controller.volume(named: "vol").snapshotCount == 1)
        let asked = world.askedToDelete.withLock { $0 }
        #expect(asked.map(\.name) == ["s"])
        #expect(asked.map(\.clientGeneration) == [1])
        #expect(World.isAsUsual(asked.map(\.timeoutMilliseconds)))
        let stored = try await world.test.store.volume(named: "vol")
        #expect(asked.map(\.volumeID) == [stored.volume.id])

        let requested = try #require(
            try await world.events.first { $0.kind == "SnapshotDeletionRequested" })
        #expect(requested.subject == "volume/vol")
        #expect(requested.message == "snapshot s")
        #expect(requested.actor == "ann@host")
        #expect(requested.peer == "ipv4:10.0.0.1:5")
        let deleted = try #require(try await world.events.first { $0.kind == "SnapshotDeleted" })
        #expect(deleted.message == "snapshot s, layer 1, epoch 4")
        let history = try await world.test.store.history(of: stored.volume.id, limit: 10)
        #expect(history.map { $0.record.snapshots.count } == [0, 1, 2, 1])
        #expect(
            RecordWords(nodes: [:]).text(history[3].record, after: history[2].record)
                == "deleted snapshot s")
    }

    @Test func deletedTwice() async throws {
        let world = try await World()
        _ = try await world.create("s")
        try await world.delete("s")
        let again = try await world.deletionRefusal("s")
        #expect(again.code == .notFound)
        #expect(
            again.message
                == "volume 'vol' has no snapshot 's'; see 'storagectl snapshot list vol'")
        #expect(world.askedToDelete.withLock { $0.count } == 1)
        #expect(try await world.events.count { $0.kind == "SnapshotDeletionRequested" } == 1)
        // The name is free, for another one.
        #expect(try await world.create("s").layer == 2)
        try await world.delete("s")
        #expect(try await world.names.isEmpty)
    }

    @Test func unknownOnesAreNotAskedFor() async throws {
        let world = try await World()
        _ = try await world.create("s")
        #expect(try await world.deletionRefusal("t").code == .notFound)
        #expect(try await world.deletionRefusal("s", of: "other").code == .notFound)
        for name in ["", ".s", "a@b", "a b", String(repeating: "s", count: 64)] {
            let error = try await world.deletionRefusal(name)
            #expect(error.code == .invalid)
            #expect(error.message.contains("is no snapshot name"))
        }
        #expect(world.askedToDelete.withLock { $0.isEmpty })
        #expect(try await !world.events.contains { $0.kind == "SnapshotDeletionRequested" })
    }

    @Test func aVolumeInBetweenIsWaitedFor() async throws {
        let world = try await World()
        _ = try await world.create("s")
        _ = try await world.controller.detach("vol")
        let detaching = try await world.deletionRefusal("s", timeout: 1000)
        #expect(detaching.code == .precondition)
        #expect(detaching.message.contains("being detached"))
        try await world.report(.detached)
        #expect(try await world.swap(.detach) { $0.isClean = true } == .swapped)
        _ = try await world.test.store.attachVolume("vol", node: "a", ready: ["a"])
        try await world.report(.starting)
        let attaching = try await world.deletionRefusal("s", timeout: 1000)
        #expect(attaching.code == .precondition)
        #expect(attaching.message.contains("still being attached"))
        #expect(try await !world.events.contains { $0.kind == "SnapshotDeletionRequested" })
        #expect(try await world.names == ["s"])
    }

    @Test func aNodeThatIsAway() async throws {
        let world = try await World()
        _ = try await world.create("s")
        world.test.clock.advance(Controller.nodeSilenceMaxMilliseconds + 1)
        let silent = try await world.deletionRefusal("s")
        #expect(silent.code == .precondition)
        #expect(silent.message.contains("node a, which runs the engine"))
        try await world.report()
        await world.controller.tasks.finish()
        #expect(try await world.deletionRefusal("s").code == .unavailable)
        #expect(try await !world.events.contains { $0.kind == "SnapshotDeletionRequested" })
    }

    @Test func whatTheEngineSaysIsPassedOn() async throws {
        let world = try await World()
        _ = try await world.create("s")
        world.engine.withLock { $0 = .refuses }
        let error = try await world.deletionRefusal("s")
        #expect(error.code == .precondition)
        #expect(error.message == "node a: 2 clients read the snapshot; disconnect them first")
        #expect(try await world.names == ["s"])
    }

    @Test func doubtIsSaid() async throws {
        let world = try await World()
        _ = try await world.create("s")
        let start = "it is not known whether snapshot 's' of volume 'vol' was deleted: "
        world.engine.withLock { $0 = .isSilent }
        let silent = try await world.deletionRefusal("s")
        #expect(silent.code == .inDoubt)
        #expect(silent.rpcErrorCode == .deadlineExceeded)
        #expect(silent.message.hasPrefix(start + "node a: no answer"))
        #expect(silent.message.hasSuffix("; the volume names it still"))
        world.engine.withLock { $0 = .claims }
        let claimed = try await world.deletionRefusal("s")
        #expect(claimed.code == .inDoubt)
        #expect(claimed.message.hasPrefix(start + "its engine says so"))
        #expect(claimed.message.hasSuffix("; the volume names it still"))
        world.engine.withLock { $0 = .obeys }
        try await world.delete("s")
        #expect(try await world.names.isEmpty)
    }

    /// The record knows: no answer is needed.
    @Test func oneThatIsGoneIsDeletedWithoutAnAnswer() async throws {
        let world = try await World()
        _ = try await world.create("s")
        world.engine.withLock { $0 = .obeysInSilence }
        try await world.delete("s")
        #expect(try await world.names.isEmpty)
        // Another one of its name is no reason for doubt.
        world.engine.withLock { $0 = .obeys }
        _ = try await world.create("s")
        world.engine.withLock { $0 = .isOvertaken }
        try await world.delete("s")
        #expect(try await world.controller.snapshots(of: "vol").map(\.layer) == [3])
    }
}

/// As `SnapshotTaskTests`.
@Suite struct SnapshotDeletionTaskTests {
    private static let volumeID = "00000000000000010000000000000002"

    private func deletion(
        _ name: String, generation: UInt64 = 1, timeout: UInt64 = 5000
    ) -> Haptera_V1_AgentTask {
        var task = Haptera_V1_AgentTask()
        task.id = 4
        task.deleteSnapshot.volumeID = Self.volumeID
        task.deleteSnapshot.clientGeneration = generation
        task.deleteSnapshot.name = name
        task.deleteSnapshot.timeoutMilliseconds = timeout
        return task
    }

    private func servingBench() async throws -> NodeAgentBench {
        let bench = try NodeAgentBench()
        bench.want(.create)
        let replica = try await bench.untilReplica(.running)
        bench.want(.attach, addresses: [replica.address], attachment: 1)
        _ = try await bench.untilEngine(.serving)
        return bench
    }

    @Test func theEngineIsToldOnItsControlSocket() async throws {
        let idle = try NodeAgentBench()
        let early = await idle.agent.perform(deletion("s"))
        #expect(early.error == "it runs no engine of volume 00000000000000010000000000000002")
        let bench = try await servingBench()
        for (name, created) in [("kept", 1 as UInt64), ("s", 2)] {
            var task = Haptera_V1_AgentTask()
            task.takeSnapshot.volumeID = Self.volumeID
            task.takeSnapshot.clientGeneration = 1
            task.takeSnapshot.name = name
            task.takeSnapshot.createdUnixMilliseconds = created
            task.takeSnapshot.timeoutMilliseconds = 5000
            let taken = await bench.agent.perform(task)
            #expect(taken.error.isEmpty)
        }
        // Of another attachment, and a name that is more than a word.
        for wrong in [deletion("s", generation: 2), deletion("a b")] {
            let answer = await bench.agent.perform(wrong)
            #expect(!answer.error.isEmpty && !answer.inDoubt)
        }
        #expect(try await bench.engineStatus["snapshots"] == "kept@1,s@2")
        // The second time there is nothing to do.
        for _ in 1...2 {
            let done = await bench.agent.perform(deletion("s"))
            #expect(done.taskID == 4)
            #expect(done.error.isEmpty)
            #expect(try await bench.engineStatus["snapshots"] == "kept@1")
        }
        let refused = await bench.agent.perform(deletion("refused"))
        #expect(refused.error == "2 clients read the snapshot; disconnect them first")
        #expect(!refused.inDoubt)
    }

    @Test func anAnswerThatDoesNotComeLeavesADoubt() async throws {
        let bench = try await servingBench()
        let dropped = await bench.agent.perform(deletion("dropped"))
        #expect(dropped.inDoubt)
        #expect(dropped.error.contains("closed before it had answered"))
        let doubted = await bench.agent.perform(deletion("doubted"))
        #expect(doubted.inDoubt)
        #expect(
            doubted.error
                == "the engine stopped before it knew \(SnapshotResult.deletionDoubtText)")
        let slow = await bench.agent.perform(deletion("slow", timeout: 1000))
        #expect(slow.inDoubt)
        #expect(slow.error.contains("did not answer in time"))
    }
}
