import GRDB
import HapteraAPI
import HapteraCore
import HapteraHost
import Synchronization
import Testing

@testable import HapteraControl

@Suite struct LabelRuleTests {
    @Test(arguments: [
        "a", "A", "0", "app", "a.b-c_D", "example.com/app", "a.b.c/x",
        String(repeating: "k", count: 63),
    ])
    func keys(_ key: String) {
        #expect(Labels.isValidKey(key))
        #expect(Labels.objection(to: key) == nil)
    }

    @Test(arguments: [
        "", "-a", "a-", ".a", "a.", "_a", "a b", "é", "a/", "/a", "a/b/c", "UP.com/a", "a..b/c",
        "-a.b/c", "a,b", "a=b", "!a", String(repeating: "k", count: 64),
        String(repeating: "a.", count: 127) + "b/c",
    ])
    func noKeys(_ key: String) {
        #expect(!Labels.isValidKey(key))
        #expect(Labels.objection(to: [key: ""]) != nil)
    }

    @Test func values() {
        for value in ["", "1", "a.b-c_D", String(repeating: "v", count: 63)] {
            #expect(Labels.isValidValue(value))
        }
        for value in ["-", "a-", " ", "a b", "a/b", "é", String(repeating: "v", count: 64)] {
            #expect(!Labels.isValidValue(value))
            #expect(
                Labels.objection(to: ["k": value])?.hasPrefix("'\(value)' is no value of") == true)
        }
    }

    @Test func theControllersKeysAreRefused() {
        for key in ["haptera.io/schedule", "haptera.io/x", "sub.haptera.io/x"] {
            #expect(Labels.isValidKey(key) && Labels.isReserved(key))
            #expect(Labels.objection(to: [key: "1"])?.contains("by the controller only") == true)
        }
        #expect(!Labels.isReserved("haptera.io"))
        #expect(!Labels.isReserved("nothaptera.io/x"))
    }

    @Test func notTooMany() {
        let many = Dictionary(uniqueKeysWithValues: (0...64).map { ("k\($0)", "") })
        #expect(Labels.objection(to: many) == "65 labels are too many: at most 64")
        #expect(Labels.objection(to: many.filter { $0.key != "k64" }) == nil)
    }

    @Test func changes() throws {
        #expect(try LabelChange("a=1") == .set("a", "1"))
        #expect(try LabelChange("a=") == .set("a", ""))
        #expect(try LabelChange("a-b-") == .remove("a-b"))
        for text in ["", "a", "-", "=", "=1", "a=b=c", "a=b-", "haptera.io/x-", "haptera.io/x=1"] {
            #expect(throws: NotationError.self) { try LabelChange(text) }
        }
    }
}

@Suite struct LabelTests {
    typealias World = SnapshotTests.World

    private func create(
        _ world: World, _ name: String, _ labels: [String: String] = [:],
        reserved: [String: String] = [:]
    ) async throws -> Haptera_V1_Snapshot {
        var request = Haptera_V1_CreateSnapshotRequest()
        request.volume = "vol"
        request.name = name
        request.labels = labels
        return try await world.controller.createSnapshot(request, reserved: reserved)
    }

    @Test func volumesAreLabelled() async throws {
        let test = try TestStore()
        try await test.addNodes(["a"])
        func wanted(_ labels: [String: String]) throws -> VolumeSpecification {
            try VolumeSpecification(
                name: "v", sizeBytes: 1 << 20, replicas: 1, nodes: [], labels: labels)
        }
        let made = try await test.store.createVolume(
            wanted(["app": "db", "tier": "x"]), candidates: ["a"])
        #expect(made.labels == ["app": "db", "tier": "x"])
        let caller = Caller(actor: "ann@host")
        let now = try await Caller.$current.withValue(caller) {
            try await test.store.labelVolume(
                "v", set: ["app": "web", "new": ""], remove: ["tier", "none"])
        }
        #expect(now.labels == ["app": "web", "new": ""])
        let event = try #require(try await test.store.events(after: 0, limit: 100).last)
        #expect(event.kind == "VolumeLabelled" && event.actor == "ann@host")
        #expect(event.message == "app=web new= tier- none-")
        // The same again is no change.
        _ = try await test.store.labelVolume("v", set: ["app": "web"], remove: ["tier"])
        #expect(try await test.store.events(after: event.id ?? 0, limit: 1).isEmpty)
        // A create that is repeated asks for what there is, or is another.
        _ = try await test.store.createVolume(wanted(["new": ""]), candidates: ["a"])
        await #expect(throws: ControlError.self) {
            _ = try await test.store.createVolume(wanted(["app": "db"]), candidates: ["a"])
        }
        let again = try MetadataStore(path: test.directory.path + "/store")
        #expect(try await again.volume(named: "v").labels == now.labels)
    }

    @Test func whatIsNoLabelIsRefused() async throws {
        let test = try TestStore()
        _ = try await test.makeVolume()
        for (set, remove) in [
            (["-": "1"], []), (["haptera.io/schedule": "x"], []), ([:], ["haptera.io/schedule"]),
            (["a": "b c"], []), (["a": "1"], ["a"]), ([:], [""]),
        ] as [([String: String], [String])] {
            let error = await #expect(throws: ControlError.self) {
                _ = try await test.store.labelVolume("vol", set: set, remove: remove)
            }
            #expect(error?.code == .invalid)
        }
        let some = Dictionary(uniqueKeysWithValues: (0..<40).map { ("a\($0)", "") })
        let more = Dictionary(uniqueKeysWithValues: (0..<40).map { ("b\($0)", "") })
        _ = try await test.store.labelVolume("vol", set: some, remove: [])
        let error = await #expect(throws: ControlError.self) {
            _ = try await test.store.labelVolume("vol", set: more, remove: [])
        }
        #expect(error?.code == .precondition)
        #expect(error?.message == "volume 'vol': 80 labels are too many: at most 64")
        #expect(throws: ControlError.self) {
            _ = try VolumeSpecification(
                name: "v", sizeBytes: 1 << 20, replicas: 1, nodes: [], labels: ["haptera.io/x": ""])
        }
    }

    @Test func snapshotsAreLabelledAsTheyAreTaken() async throws {
        let world = try await World()
        let taken = try await create(
            world, "s", ["app": "db"], reserved: ["haptera.io/schedule": "h"])
        #expect(taken.labels == ["app": "db", "haptera.io/schedule": "h"])
        #expect(try await world.controller.snapshots(of: "vol").map(\.labels) == [taken.labels])
        // Again: beside those it has; who took it is not to be changed any more.
        let again = try await create(world, "s", ["b": "2"], reserved: ["haptera.io/schedule": "x"])
        #expect(again.labels == ["app": "db", "b": "2", "haptera.io/schedule": "h"])
        #expect(try await create(world, "s").labels == again.labels)
        #expect(try await create(world, "plain").labels.isEmpty)
        let error = await #expect(throws: ControlError.self) {
            _ = try await create(world, "t", ["haptera.io/schedule": "h"])
        }
        #expect(error?.code == .invalid)
    }

    /// Another snapshot of that name begins without any.
    @Test func labelsGoWithTheirSnapshot() async throws {
        let world = try await World()
        let id = try await world.test.store.volume(named: "vol").volume.id
        _ = try await create(world, "s", ["app": "db"])
        _ = try await create(world, "t", ["app": "web"])
        try await world.remove("s")
        #expect(try await world.test.store.snapshotLabels(of: id) == ["t": ["app": "web"]])
        #expect(try await create(world, "s").labels.isEmpty)
    }

    /// The engine may take it after its asker gave up, and even after the controller's end.
    @Test func aSnapshotInDoubtGetsItsLabelsWhenItComes() async throws {
        let world = try await World()
        world.engine.withLock { $0 = .isSilent }
        await #expect(throws: ControlError.self) { _ = try await create(world, "s", ["a": "1"]) }
        let id = try await world.test.store.volume(named: "vol").volume.id
        #expect(try await world.test.store.snapshotLabels(of: id).isEmpty)
        try await world.add("other", created: 1)
        try await world.add("s", created: 1)
        #expect(try await world.test.store.snapshotLabels(of: id) == ["s": ["a": "1"]])
    }

    @Test func theLastRequestSaysWhatALateSnapshotIsLabelledWith() async throws {
        let world = try await World()
        let id = try await world.test.store.volume(named: "vol").volume.id
        world.engine.withLock { $0 = .isSilent }
        for labels in [["a": "1"], ["b": "2"]] {
            await #expect(throws: ControlError.self) { _ = try await create(world, "s", labels) }
        }
        // Refused for certain: whoever takes one of that name next did not mean these.
        world.engine.withLock { $0 = .refuses }
        await #expect(throws: ControlError.self) { _ = try await create(world, "r", ["c": "3"]) }
        try await world.add("s", created: 1)
        try await world.add("r", created: 1)
        #expect(try await world.test.store.snapshotLabels(of: id) == ["s": ["b": "2"]])
    }

    private func label(
        _ world: World, _ name: String, set: [String: String] = [:], remove: [String] = [],
        volume: String = "vol"
    ) async throws -> Haptera_V1_Snapshot {
        var request = Haptera_V1_LabelSnapshotRequest()
        request.volume = volume
        request.name = name
        request.set = set
        request.remove = remove
        return try await world.controller.labelSnapshot(request)
    }

    @Test func snapshotsAreLabelledLater() async throws {
        let world = try await World()
        let schedule = ["haptera.io/schedule": "h"]
        _ = try await create(world, "s", ["app": "db", "old": "1"], reserved: schedule)
        _ = try await create(world, "t", ["app": "db"])
        let caller = Caller(actor: "ann@host")
        let now = try await Caller.$current.withValue(caller) {
            try await label(world, "s", set: ["app": "web", "new": ""], remove: ["old", "none"])
        }
        let wanted = ["app": "web", "new": ""].merging(schedule) { $1 }
        #expect(now.name == "s" && now.labels == wanted)
        let event = try #require(try await world.events.last)
        #expect(event.kind == "SnapshotLabelled" && event.subject == "volume/vol")
        #expect(event.actor == "ann@host" && event.message == "snapshot s: app=web new= old- none-")
        // The same again is no change.
        #expect(try await label(world, "s", set: ["app": "web"], remove: ["old"]) == now)
        #expect(try await world.events.last == event)

        let again = try MetadataStore(path: world.test.directory.path + "/store")
        let id = try await again.volume(named: "vol").volume.id
        #expect(try await again.snapshotLabels(of: id) == ["s": wanted, "t": ["app": "db"]])
        for (selector, names) in [
            ("", ["s", "t"]), ("app in (web,x)", ["s"]), ("new notin (x)", ["s", "t"]),
            ("!new", ["t"]), ("haptera.io/schedule=h", ["s"]), ("old", []),
        ] {
            let found = try await world.controller.snapshots(of: "vol", selector: selector)
            #expect(found.map(\.name) == names, "\(selector)")
        }
        let error = await #expect(throws: ControlError.self) {
            _ = try await world.controller.snapshots(of: "vol", selector: "app in")
        }
        #expect(error?.code == .invalid)
        #expect(error?.message == "selector, character 7: it ends where '(' should be")
    }

    /// They are the store's: no engine is asked. And they are of this snapshot, not of its name.
    @Test func labelsSetLaterGoWithTheirSnapshot() async throws {
        let world = try await World()
        _ = try await create(world, "s")
        _ = try await create(world, "t")
        _ = try await label(world, "t", set: ["a": "1"])
        _ = try await label(world, "s", set: ["a": "1"])
        try await world.remove("s")
        let id = try await world.test.store.volume(named: "vol").volume.id
        #expect(try await world.test.store.snapshotLabels(of: id) == ["t": ["a": "1"]])
        #expect(try await create(world, "s").labels.isEmpty)

        let asked = world.asked.withLock { $0.count }
        _ = try await world.controller.detach("vol")
        let stored = try await world.test.store.volume(named: "vol")
        try await world.test.reportEngine(stored, detached: true)
        #expect(try await label(world, "t", set: ["b": "2"]).labels == ["a": "1", "b": "2"])
        #expect(world.asked.withLock { $0.count } == asked)
    }

    @Test func whatIsNoLabelOfASnapshotIsRefused() async throws {
        let world = try await World()
        _ = try await create(world, "s", ["a": "1"], reserved: ["haptera.io/schedule": "h"])
        world.engine.withLock { $0 = .isSilent }
        await #expect(throws: ControlError.self) { _ = try await create(world, "p", ["c": "3"]) }
        let before = try await world.events
        func refused(
            _ name: String, set: [String: String] = [:], remove: [String] = [],
            volume: String = "vol"
        ) async throws -> ControlError? {
            await #expect(throws: ControlError.self) {
                _ = try await label(world, name, set: set, remove: remove, volume: volume)
            }
        }
        for (set, remove) in [
            (["-": "1"], []), (["haptera.io/schedule": "x"], []), ([:], ["haptera.io/schedule"]),
            (["x.haptera.io/a": ""], []), (["a": "b c"], []), (["a": "1"], ["a"]), ([:], [""]),
        ] as [([String: String], [String])] {
            #expect(try await refused("s", set: set, remove: remove)?.code == .invalid)
        }
        #expect(try await refused(".s", set: ["a": "2"])?.code == .invalid)
        let unknown = try await refused("x", set: ["a": "2"])
        #expect(unknown?.code == .notFound)
        #expect(unknown?.message.hasPrefix("volume 'vol' has no snapshot 'x'") == true)
        #expect(try await refused("s", set: ["a": "2"], volume: "none")?.code == .notFound)
        // Asked for, and not there yet: what it is to be labelled with stays.
        #expect(try await refused("p", set: ["c": "4"])?.code == .notFound)
        // The controller's count too.
        let many = Dictionary(uniqueKeysWithValues: (0..<63).map { ("k\($0)", "") })
        let full = try await refused("s", set: many)
        #expect(full?.code == .precondition)
        #expect(full?.message == "snapshot 's': 65 labels are too many: at most 64")

        #expect(try await world.events == before)
        try await world.add("p", created: 1)
        let id = try await world.test.store.volume(named: "vol").volume.id
        #expect(
            try await world.test.store.snapshotLabels(of: id)
                == ["s": ["a": "1", "haptera.io/schedule": "h"], "p": ["c": "3"]])
        // As many as there may be, one in place of another.
        #expect(try await label(world, "s", set: many, remove: ["a"]).labels.count == 64)
    }

    @Test func nothingIsLeftOfADeletedVolume() async throws {
        let world = try await World()
        _ = try await create(world, "s", ["a": "1"])
        _ = try await world.test.store.labelVolume("vol", set: ["a": "1"], remove: [])
        _ = try await world.controller.detach("vol")
        let stored = try await world.test.store.volume(named: "vol")
        try await world.test.reportEngine(stored, detached: true)
        _ = try await world.test.store.deleteVolume("vol")
        for replica in stored.replicas { try await world.test.remove(replica) }
        let left = try await world.test.store.database.read { db in
            try ["volumeLabels", "snapshotLabels", "volumes"].map {
                try Int.fetchOne(db, sql: "SELECT COUNT(*) FROM \($0)")
            }
        }
        #expect(left == [0, 0, 0])
    }
}
