import HapteraAPI
import HapteraCore
import HapteraHost
import Testing

@testable import HapteraControl

/// Snapshots that are read, of volumes that are attached or not, over the stand-ins of
/// `SnapshotTests`.
@Suite(.timeLimit(.minutes(5))) struct SnapshotReadingTests {
    typealias World = SnapshotTests.World

    /// With a snapshot `s`.
    private func world(attached: Bool = false) async throws -> World {
        let world = try await World(attached: attached)
        // The stand-in's takeover of an attached volume would meet the snapshot.
        if !attached { world.live() }
        _ = try await world.create("s")
        if !attached { try await world.untilDetached() }
        return world
    }

    private func read(
        _ world: World, _ name: String = "s", by reader: UInt64 = 1, ends: Bool = false
    ) async throws -> Haptera_V1_Snapshot {
        var request = Haptera_V1_ReadSnapshotRequest()
        request.volume = "vol"
        request.name = name
        request.reader = reader
        request.ends = ends
        return try await world.controller.readSnapshot(request)
    }
    private func refusal(
        _ world: World, _ name: String = "s", by reader: UInt64 = 1
    ) async throws -> ControlError {
        let error = await #expect(throws: ControlError.self) {
            _ = try await read(world, name, by: reader)
        }
        return try #require(error)
    }

    /// For as long as the lease is renewed; the volume stays detached.
    @Test func anEngineServesItForAsLongAsItIsRead() async throws {
        let world = try await world()
        let read = try await read(world)
        #expect(read.name == "s" && read.uri == "nbd://h:2/vol@s")
        #expect(read.unixUri == "nbd+unix:///vol@s?socket=/d/e.nbd")
        #expect(try await world.phase(on: "a") == .maintain)
        let volume = try await world.controller.volume(named: "vol")
        #expect(volume.state == .detached && !volume.hasEngine)
        #expect(volume.reason == "a snapshot is being read")
        // Others are shown where, and may do what they want beside.
        #expect(try await world.controller.snapshot("s", of: "vol").uri == read.uri)
        _ = try await world.create("t")
        #expect(
            try await world.controller.snapshots(of: "vol").map(\.uri).last == "nbd://h:2/vol@t")
        for _ in 0..<3 {
            world.test.clock.advance(Int64(SnapshotReaders.leaseDefault) - 1)
            try await world.report(obeyingOn: ["a", "b", "c"])
            _ = try await self.read(world)
            try await world.controller.tendMaintenances()
            #expect(try await world.phase(on: "a") == .maintain)
        }
        let two = try await self.read(world, "t", by: 2)
        #expect(two.uri == "nbd://h:2/vol@t")
        #expect(
            try await world.controller.volume(named: "vol").reason
                == "snapshots are being read, by 2")
        _ = try await self.read(world, "t", by: 2, ends: true)
        try await world.controller.tendMaintenances()
        #expect(try await world.phase(on: "a") == .maintain)
        // Its command has vanished.
        world.test.clock.advance(Int64(SnapshotReaders.leaseDefault))
        try await world.report(obeyingOn: ["a", "b", "c"])
        try await world.controller.tendMaintenances()
        try await world.untilDetached()
        #expect(try await world.controller.snapshot("s", of: "vol").uri.isEmpty)
        #expect(try await world.record.isClean)
        #expect(try await world.count("MaintenanceBegun") == 2)
        #expect(try await world.count("MaintenanceEnded") == 2)
    }

    @Test func whoHasDoneEndsItAtOnce() async throws {
        let world = try await world()
        _ = try await read(world)
        #expect(try await read(world, ends: true).uri.isEmpty)
        try await world.untilDetached()
        // Again does no harm, and begins nothing.
        _ = try await read(world, ends: true)
        #expect(try await world.test.store.volume(named: "vol").volume.clientGeneration == 2)
    }

    /// The attachment waits for nothing; who reads finds the snapshot in its engine, and in the
    /// next one without clients when the volume is detached again.
    @Test func anAttachmentTakesItsPlaceAtOnce() async throws {
        let world = try await world()
        _ = try await read(world)
        #expect(try await world.controller.attach("vol", node: "b").state == .attaching)
        #expect(try await world.phase(on: "a") != .maintain)
        #expect(try await read(world).uri == "nbd://h:2/vol@s")
        let stored = try await world.test.store.volume(named: "vol").volume
        #expect(stored.attachedNode == "b" && !stored.isMaintained)
        // It is the volume's as any: nothing is ended with the reader.
        _ = try await world.controller.detach("vol")
        #expect(try await read(world).uri == "nbd://h:2/vol@s")
        #expect(try await world.test.store.volume(named: "vol").volume.isMaintained)
        _ = try await read(world, ends: true)
        try await world.untilDetached()
    }

    /// A command that runs is waited for all the same.
    @Test func anAttachmentStillWaitsForCommands() async throws {
        let world = try await world()
        _ = try await read(world)
        world.gate.close()
        async let snapshot = world.create("t")
        try await world.until { $0.userCount($1) == 1 }
        _ = try await world.controller.attach("vol", node: "b")
        try await world.controller.tendMaintenances()
        #expect(try await world.phase(on: "a") == .maintain)
        world.gate.open()
        _ = try await snapshot
        try await world.controller.tendMaintenances()
        try await world.until { $0.volume.attachedNode == "b" && !$0.volume.isMaintained }
    }

    /// Nor is it between two engines.
    @Test(arguments: [true, false]) func whatIsReadIsNotDeleted(attached: Bool) async throws {
        let world = try await world(attached: attached)
        _ = try await world.create("t")
        _ = try await read(world)
        let refused = try await world.deletionRefusal("s")
        #expect(refused.code == .precondition)
        #expect(
            refused.message
                == "snapshot 's' of volume 'vol' is being read by 1: wait until that is done, or "
                + "end it")
        try await world.delete("t")
        if !attached {
            let deletion = await #expect(throws: ControlError.self) {
                try await world.controller.delete("vol")
            }
            #expect(
                deletion?.message
                    == "a snapshot of volume 'vol' is being read: wait until that is done, or "
                    + "end it"
            )
        }
        _ = try await read(world, ends: true)
        try await world.delete("s")
    }

    @Test func whatCannotBeReadIsSaid() async throws {
        let world = try await world()
        #expect(try await refusal(world, "t").code == .notFound)
        #expect(try await refusal(world, "-").code == .invalid)
        #expect(try await refusal(world, by: 0).code == .invalid)
        #expect(try await world.test.store.volume(named: "vol").volume.clientGeneration == 1)
        for reader in 1...UInt64(SnapshotReaders.countMax) {
            _ = try await read(world, by: reader)
        }
        let many = try await refusal(world, by: 1000)
        #expect(many.code == .precondition && many.message.contains("64 readers"))
        _ = try await read(world, by: 1)
    }
}
