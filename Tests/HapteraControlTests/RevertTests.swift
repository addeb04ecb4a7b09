import GRPCCore
import HapteraAPI
import HapteraCore
import Synchronization
import Testing

@testable import HapteraControl

extension SnapshotTests.World {
    func revert(
        _ name: String, keeping kept: String, of volume: String = "vol"
    ) async throws -> Haptera_V1_Snapshot {
        var request = Haptera_V1_RevertVolumeRequest()
        request.volume = volume
        request.snapshot = name
        request.keep = kept
        return try await controller.revertVolume(request)
    }
    /// How the request is refused.
    func revertRefusal(
        _ name: String, keeping kept: String, of volume: String = "vol"
    ) async throws -> ControlError {
        let error = await #expect(throws: ControlError.self) {
            _ = try await self.revert(name, keeping: kept, of: volume)
        }
        return try #require(error)
    }
}

/// How a volume goes back to a snapshot, over the stand-ins of `SnapshotTests`.
@Suite struct RevertTests {
    typealias World = SnapshotTests.World

    @Test func doneByTheEngineAndNamedByTheRecord() async throws {
        let world = try await World()
        for name in ["a", "b"] { _ = try await world.create(name) }
        let caller = Caller(actor: "ann@host", peer: "ipv4:10.0.0.1:5")
        let kept = try await Caller.$current.withValue(caller) {
            try await world.revert("a", keeping: "kept")
        }
        #expect(kept.name == "kept" && kept.layer == 3)
        #expect(kept.createdUnixMilliseconds == world.test.clock.now)
        let asked = world.askedToRevert.withLock { $0 }
        #expect(asked.map(\.snapshot) == ["a"] && asked.map(\.keep) == ["kept"])
        #expect(asked.map(\.clientGeneration) == [1])
        #expect(World.isAsUsual(asked.map(\.timeoutMilliseconds)))
        let list = try await world.controller.snapshots(of: "vol")
        #expect(list.map(\.parent) == ["", "a", "b"])
        #expect(list.map(\.isVolumeParent) == [true, false, false])

        let requested = try #require(try await world.events.first { $0.kind == "RevertRequested" })
        #expect(requested.subject == "volume/vol" && requested.actor == "ann@host")
        #expect(requested.message == "to snapshot a, keeping kept")
        let done = try #require(try await world.events.first { $0.kind == "VolumeReverted" })
        #expect(done.message.hasPrefix("to snapshot a, epoch "))
        let stored = try await world.test.store.volume(named: "vol")
        let history = try await world.test.store.history(of: stored.volume.id, limit: 10)
        let last = history.count - 1
        #expect(
            RecordWords(nodes: [:]).text(history[last].record, after: history[last - 1].record)
                == "went back to snapshot a, kept what was there as kept")
        // Again: its engine says whether it is finished, and nothing happens twice.
        #expect(try await world.revert("a", keeping: "kept") == kept)
        #expect(world.askedToRevert.withLock { $0.count } == 2)
        #expect(try await world.record.reverts.count == 1)
    }

    /// Own: what the layer takes where it takes most. With what it is read through, in its line.
    @Test func sizesFollowTheTree() async throws {
        let world = try await World()
        for name in ["a", "b"] { _ = try await world.create(name) }
        #expect(try await world.controller.snapshots(of: "vol").allSatisfy { !$0.hasOwnBytes })
        _ = try await world.revert("a", keeping: "kept")
        _ = try await world.create("c")
        world.layerBytes.withLock {
            $0 = ["a": [1: 100, 2: 20, 3: 5, 4: 7, 5: 1000], "b": [1: 90, 2: 30, 3: 5, 4: 7]]
        }
        // A replica that shares a layer gets nothing back for it; one has not counted yet.
        world.exclusiveBytes.withLock {
            $0 = ["a": [1: 0, 2: 12, 3: 5], "b": [1: 60, 2: 0, 3: 5], "c": [1: 7]]
        }
        try await world.report()
        let list = try await world.controller.snapshots(of: "vol")
        #expect(list.map(\.exclusiveBytes) == [60, 12, 5, 0])
        #expect(list.map(\.hasExclusiveBytes) == [true, true, true, false])
        #expect(list.map(\.name) == ["a", "b", "kept", "c"])
        #expect(list.map(\.ownBytes) == [100, 30, 5, 7])
        #expect(list.map(\.cumulativeBytes) == [100, 130, 135, 107])
        #expect(ReplicaUnit.layerBytes("1:4096,12:0,x:3,4") == [1: 4096, 12: 0])
        #expect(ReplicaUnit.layerBytes("") == [:])
    }

    /// A group of that name failed a moment ago, and its engine might still come to it: what the
    /// revert keeps is not the group's, which is taken back.
    @Test func whatIsKeptIsNoFailedGroups() async throws {
        let world = try await World()
        _ = try await world.create("a")
        world.engine.withLock { $0 = .cannotHold }
        _ = try await world.groupRefusal("kept")
        world.engine.withLock { $0 = .obeys }
        #expect(try await world.revert("a", keeping: "kept").labels.isEmpty)
        try await world.controller.undoGroups()
        #expect(try await world.names == ["a", "kept"])
    }

    @Test func whatCannotBeIsNotAskedFor() async throws {
        let world = try await World()
        _ = try await world.create("a")
        let unknown = try await world.revertRefusal("b", keeping: "kept")
        #expect(unknown.code == .notFound && unknown.message.contains("has no snapshot 'b'"))
        let taken = try await world.revertRefusal("a", keeping: "a")
        #expect(taken.code == .precondition && taken.message.contains("choose another name"))
        for name in ["", ".s", "a@b"] {
            #expect(try await world.revertRefusal("a", keeping: name).code == .invalid)
            #expect(try await world.revertRefusal(name, keeping: "kept").code == .invalid)
        }
        #expect(world.askedToRevert.withLock { $0.isEmpty })
        #expect(try await !world.events.contains { $0.kind == "RevertRequested" })
    }

    @Test func anEngineThatRefusesOrIsSilent() async throws {
        let world = try await World()
        _ = try await world.create("a")
        world.engine.withLock { $0 = .refuses }
        let refused = try await world.revertRefusal("a", keeping: "kept")
        #expect(refused.message.contains("1 client is connected"))
        world.engine.withLock { $0 = .isSilent }
        let silent = try await world.revertRefusal("a", keeping: "kept")
        #expect(silent.code == .inDoubt)
        #expect(
            silent.message.hasPrefix("it is not known whether volume 'vol' was reverted to a: "))
        #expect(try await world.record.reverts.isEmpty)
        world.engine.withLock { $0 = .obeysInSilence }
        #expect(try await world.revertRefusal("a", keeping: "kept").code == .inDoubt)
        world.engine.withLock { $0 = .obeys }
        #expect(try await world.revert("a", keeping: "kept").layer == 2)
        #expect(try await world.record.reverts.count == 1)
    }
}
