import HapteraAPI
import HapteraCore
import Synchronization
import Testing

@testable import HapteraControl

extension SnapshotTests.World {
    func group(_ name: String, _ volumes: [String] = ["vol"]) async throws -> [Haptera_V1_Snapshot]
    {
        var request = Haptera_V1_CreateGroupSnapshotRequest()
        request.volumes = volumes
        request.name = name
        request.labels = ["app": "db"]
        return try await controller.createGroupSnapshot(request)
    }
    func groupRefusal(_ name: String, _ volumes: [String] = ["vol"]) async throws -> ControlError {
        let error = await #expect(throws: ControlError.self) {
            _ = try await self.group(name, volumes)
        }
        return try #require(error)
    }
    func takeSteps() -> [String] {
        steps.withLock { steps in
            defer { steps = [] }
            return steps
        }
    }
}

/// Snapshots of groups, over the stand-ins of `SnapshotTests`. `test_group_snapshots_are_one_cut`
/// has several volumes, and a client of all of them.
@Suite struct GroupSnapshotTests {
    typealias World = SnapshotTests.World

    @Test func frozenReleasedAndThenDurable() async throws {
        let world = try await World()
        let taken = try await world.group("g")
        #expect(taken.map(\.name) == ["g"] && taken[0].labels["app"] == "db")
        #expect(taken[0].labels["haptera.io/group"]?.count == 16)
        #expect(world.takeSteps() == ["take and hold", "release", "take"])
        #expect(try await world.test.store.groups().isEmpty)
        let requested = try #require(
            try await world.events.first { $0.kind == "SnapshotRequested" })
        #expect(requested.message == "snapshot g, of the group vol")
        // Again: it is only made sure of.
        #expect(try await world.group("g").map(\.layer) == taken.map(\.layer))
        #expect(world.takeSteps() == ["take"])
    }

    @Test func oneThatWasNotHeldIsTakenBack() async throws {
        let world = try await World()
        world.engine.withLock { $0 = .letsGo }
        let refused = try await world.groupRefusal("g")
        #expect(refused.message.contains("volume 'vol': node a: its clients went on"))
        #expect(world.takeSteps() == ["take and hold", "release", "delete"])
        #expect(try await world.names.isEmpty)
        world.engine.withLock { $0 = .cannotHold }
        #expect(try await world.groupRefusal("g").message.contains("another snapshot"))
        #expect(world.takeSteps() == ["take and hold", "release"])
        world.engine.withLock { $0 = .obeys }
        #expect(try await world.group("g").count == 1)
    }

    /// Who began it is gone: what there is of it goes, and the note of it once an engine that was
    /// asked cannot come to it any more.
    @Test func whatACrashLeavesIsUndone() async throws {
        let world = try await World()
        let row = GroupRow(
            id: "00000000000000aa", snapshot: "g", volumes: "vol,gone",
            timeMilliseconds: world.test.clock.now)
        try await world.test.store.beginGroup(row)
        let record = try await world.record
        try await world.test.store.labelSnapshot(
            "g", of: record.volume, [:], reserved: [Controller.groupLabel: row.id])
        try await world.add("g", created: 1)
        _ = try await world.create("other")
        let early = try await world.groupRefusal("g")
        #expect(early.message.contains("choose another name"), "it is no group")
        try await world.controller.undoGroups()
        #expect(try await world.names == ["other"])
        #expect(try await world.test.store.groups() == [row])
        world.test.clock.advance(Controller.groupSettledMilliseconds)
        try await world.controller.undoGroups()
        #expect(try await world.test.store.groups().isEmpty)
    }

    @Test func askedForAgainWhileItIsTaken() async throws {
        let world = try await World()
        let row = GroupRow(
            id: "00000000000000aa", snapshot: "g", volumes: "vol",
            timeMilliseconds: world.test.clock.now)
        try await world.test.store.beginGroup(row)
        let record = try await world.record
        try await world.test.store.labelSnapshot(
            "g", of: record.volume, [:], reserved: [Controller.groupLabel: row.id])
        try await world.add("g", created: 1)
        let refused = try await world.groupRefusal("g")
        #expect(refused.code == .unavailable && refused.message.contains("try again"))
        #expect(world.takeSteps().isEmpty)
        // What a failure left is gone: it is taken anew, though the note is still there.
        try await world.controller.undoGroups()
        _ = world.takeSteps()
        #expect(try await world.group("g").count == 1)
    }

    @Test func whatCannotBeIsNotAskedFor() async throws {
        let world = try await World()
        _ = try await world.create("mine")
        _ = world.takeSteps()
        #expect(try await world.groupRefusal("g", []).code == .invalid)
        #expect(try await world.groupRefusal("g", ["vol", "vol"]).code == .invalid)
        #expect(try await world.groupRefusal("g", ["vol", "other"]).code == .notFound)
        #expect(try await world.groupRefusal(".g").code == .invalid)
        let taken = try await world.groupRefusal("mine")
        #expect(taken.code == .precondition && taken.message.contains("not of this group"))
        #expect(world.takeSteps().isEmpty)
        #expect(try await world.test.store.groups().isEmpty)
    }
}
