import GRPCCore
import HapteraAPI
import HapteraCore
import HapteraHost
import Synchronization
import Testing

@testable import HapteraControl

extension SnapshotTests.World {
    func resize(_ size: UInt64, of volume: String = "vol") async throws -> Haptera_V1_Volume {
        var request = Haptera_V1_ResizeVolumeRequest()
        request.name = volume
        request.sizeBytes = size
        return try await controller.resizeVolume(request)
    }
    func resizeRefusal(_ size: UInt64, of volume: String = "vol") async throws -> ControlError {
        let error = await #expect(throws: ControlError.self) {
            _ = try await self.resize(size, of: volume)
        }
        return try #require(error)
    }
}

/// A volume grows: by its engine's change of the record, which the store's row follows.
@Suite struct ResizeTests {
    typealias World = SnapshotTests.World
    private static let old: UInt64 = 1 << 30

    @Test func theRowFollowsTheRecord() async throws {
        let world = try await World()
        _ = try await world.create("s")
        let caller = Caller(actor: "ann@host", peer: "ipv4:10.0.0.1:5")
        let volume = try await Caller.$current.withValue(caller) {
            try await world.resize(2 * Self.old)
        }
        #expect(volume.sizeBytes == 2 * Self.old)
        let stored = try await world.test.store.volume(named: "vol")
        #expect(stored.volume.sizeBytes == Int64(2 * Self.old))
        #expect(stored.record?.size == 2 * Self.old)
        // The snapshot keeps the size it was taken at.
        #expect(try await world.controller.snapshot("s", of: "vol").sizeBytes == Self.old)
        let asked = world.askedToGrow.withLock { $0 }
        #expect(asked.map(\.sizeBytes) == [2 * Self.old])
        #expect(asked.map(\.clientGeneration) == [1])
        #expect(World.isAsUsual(asked.map(\.timeoutMilliseconds)))
        // Replicas made from here on are as large.
        let desired = try await world.controller.desired(for: "b", nodeID: hexadecimal(2))
        #expect(desired.replicas.map(\.sizeBytes) == [2 * Self.old])

        let requested = try #require(
            try await world.events.first { $0.kind == "ResizeRequested" })
        #expect(requested.message == "1GiB to 2GiB" && requested.actor == "ann@host")
        let resized = try #require(try await world.events.first { $0.kind == "VolumeResized" })
        #expect(resized.message == "1GiB to 2GiB, epoch 3")
        let history = try await world.test.store.history(of: stored.volume.id, limit: 10)
        #expect(
            RecordWords(nodes: [:]).text(history[2].record, after: history[1].record)
                == "grew from 1GiB to 2GiB")
    }

    @Test func theSameAgainAndLess() async throws {
        let world = try await World()
        #expect(try await world.resize(Self.old).sizeBytes == Self.old)
        let smaller = try await world.resizeRefusal(Self.old / 2)
        #expect(smaller.code == .precondition)
        #expect(
            smaller.message
                == "volume 'vol' has 1GiB and never shrinks: what is beyond 512MiB would be lost; "
                + "copy what you need to a smaller one")
        for size in [0, 4095, Self.old + 1, UInt64.max] {
            #expect(try await world.resizeRefusal(size).code == .invalid)
        }
        #expect(try await world.resizeRefusal(2 * Self.old, of: "other").code == .notFound)
        #expect(world.askedToGrow.withLock { $0.allSatisfy { $0.sizeBytes == Self.old } })
    }

    @Test func oneThatIsThatLargeNeedsNoEngine() async throws {
        let world = try await World(attached: false)
        #expect(try await world.resize(Self.old).sizeBytes == Self.old)
        #expect(world.askedToGrow.withLock { $0.isEmpty })
        #expect(try await !world.events.contains { $0.kind == "MaintenanceBegun" })
    }

    @Test func whatTheEngineRefusesAndWhatIsNotKnown() async throws {
        let world = try await World()
        world.engine.withLock { $0 = .refuses }
        let refused = try await world.resizeRefusal(2 * Self.old)
        #expect(refused.message.contains("replica 1 has no space to grow"))
        world.engine.withLock { $0 = .isSilent }
        let doubt = try await world.resizeRefusal(2 * Self.old)
        #expect(doubt.code == .inDoubt)
        #expect(doubt.message.contains("it is not known whether volume 'vol' has grown"))
        #expect(doubt.message.contains("by its record it has 1GiB"))
        world.engine.withLock { $0 = .obeysInSilence }
        let grown = try await world.resizeRefusal(2 * Self.old)
        #expect(grown.code == .inDoubt && grown.message.contains("by its record it has 2GiB"))
    }

    @Test func otherChangesOfTheSizeAreRefused() async throws {
        let world = try await World()
        for (kind, size) in [
            (VolumeRecord.Change.snapshot, 2 * Self.old), (.resize, Self.old / 2),
        ] {
            let result = try await world.swap(kind) { $0.size = size }
            #expect(result == .invalid("the record changes the volume's size"))
        }
    }
}
