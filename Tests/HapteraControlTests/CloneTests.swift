import GRDB
import HapteraAPI
import HapteraCore
import Synchronization
import Testing

@testable import HapteraControl

/// A volume that begins as a snapshot, from the request to its first record: `vol` has 1 GiB and
/// replicas on a, b and c, and its snapshot `s` is of layer 1; d has none.
@Suite struct CloneTests {
    typealias World = SnapshotTests.World
    private static let size: UInt64 = 1 << 30

    private struct Bench {
        let world: World
        let vol: StoredVolume
        var store: MetadataStore { world.test.store }

        init(attached: Bool = false) async throws {
            world = try await World(attached: attached)
            try await world.test.store.registerNode(
                NodeRow(
                    name: "d", nodeID: hexadecimal(4), address: "127.0.0.1", directory: "/d",
                    version: "1", pid: 1))
            try await world.add("s", created: 5)
            vol = try await world.test.store.volume(named: "vol")
        }

        func specification(
            _ name: String = "new", of volume: String = "vol", at snapshot: String = "s",
            size: UInt64 = 0, replicas: UInt32 = 0, nodes: [String] = [],
            _ change: (inout Haptera_V1_VolumeSettings) -> Void = { _ in }
        ) throws -> VolumeSpecification {
            var settings = Haptera_V1_VolumeSettings()
            change(&settings)
            return try VolumeSpecification(
                name: name, sizeBytes: size, replicas: replicas, nodes: nodes, settings: settings,
                source: CloneSource(volume: volume, snapshot: snapshot))
        }

        /// `running`: all of `vol`'s without it.
        func make(
            _ wanted: VolumeSpecification, ready: [String] = ["a", "b", "c", "d"],
            running: [String]? = nil
        ) async throws -> StoredVolume {
            try await store.createVolume(
                wanted, candidates: ready, running: Set(running ?? vol.replicas.map(\.id)))
        }

        func refusal(
            _ wanted: VolumeSpecification, ready: [String] = ["a", "b", "c", "d"],
            running: [String]? = nil
        ) async throws -> ControlError {
            let error = await #expect(throws: ControlError.self) {
                _ = try await self.make(wanted, ready: ready, running: running)
            }
            return try #require(error)
        }

        func source(on node: String) throws -> String {
            try #require(vol.replicas.first { $0.node == node }).id
        }

        func finish(_ stored: StoredVolume) async throws -> StoredVolume {
            for replica in stored.replicas { try await world.test.run(replica) }
            return try await store.volume(named: stored.volume.name)
        }

        func message(of kind: String) async throws -> String? {
            try await world.events.last { $0.kind == kind }?.message
        }
    }

    private static func places(_ stored: StoredVolume) -> [String] {
        stored.replicas.map {
            $0.node + ($0.source == nil ? " (empty)" : $0.isTemporary ? " (temporary)" : "")
        }
    }

    @Test func beginsAsTheSnapshotOnTheSameNodes() async throws {
        let bench = try await Bench()
        let source = try await bench.world.record
        let made = try await bench.make(bench.specification())
        #expect(made.volume.phase == .creating)
        #expect(made.volume.sizeBytes == Int64(Self.size))
        #expect(made.volume.replicaCount == 3)
        #expect(made.volume.origin?.text == "vol@s")
        #expect(made.volume.originVolumeID == bench.vol.volume.id)
        #expect(made.replicas.map(\.node) == ["a", "b", "c"])
        #expect(try made.replicas.map(\.source) == ["a", "b", "c"].map(bench.source))
        let first = try #require(made.volume.cloneRecord)
        #expect(first.epoch == Epoch(source.epoch.rawValue + 1000))
        #expect(first.volume.text == made.volume.id && first.name == "new")
        #expect(first.layers == [1, 2].map { LayerID(rawValue: $0) })
        #expect(first.snapshots == [.init(layer: LayerID(rawValue: 1), name: "s", created: 5)])
        #expect(first.inSync == made.replicas.compactMap(\.member))
        #expect(
            try await bench.message(of: "VolumeRequested")
                == "1GiB, from vol@s, replicas on a, b, c")

        // No engine finds a member that is not made yet.
        for replica in made.replicas.dropLast() { try await bench.world.test.run(replica) }
        #expect(try await bench.store.volume(named: "new").record == nil)
        let whole = try await bench.finish(made)
        #expect(whole.volume.phase == .ready)
        #expect(whole.volume.firstRecord == nil)
        #expect(whole.volume.origin?.text == "vol@s")
        // As the replicas were made with it, and where an engine goes on.
        #expect(whole.record == first)
        #expect(
            try await bench.store.compareAndSwap(
                first.volume, expected: first.epoch, proposal: first.next(nonce: 7).encoded())
                == .swapped)
        let history = try await bench.store.history(of: whole.volume.id, limit: 9)
        #expect(history.map(\.record.epoch) == [first.epoch, first.epoch.next])
        #expect(
            RecordWords(nodes: [:]).text(history[0].record, after: nil).hasPrefix("created with"))
        // The source does not know of it.
        #expect(try await bench.world.record == source)
    }

    @Test func mayBeLargerThanTheSnapshot() async throws {
        let bench = try await Bench()
        let grown = try await bench.world.swap(.resize) { $0.grow(to: 2 * Self.size) }
        #expect(grown == .swapped)
        let same = try await bench.make(bench.specification())
        #expect(same.volume.sizeBytes == Int64(Self.size))
        #expect(same.volume.cloneRecord?.growths.isEmpty == true)
        let equal = try await bench.make(bench.specification("equal", size: Self.size))
        #expect(equal.volume.cloneRecord?.size == Self.size)
        let larger = try await bench.make(bench.specification("larger", size: 3 * Self.size))
        #expect(larger.volume.sizeBytes == Int64(3 * Self.size))
        let record = try #require(try await bench.finish(larger).record)
        #expect(record.size == 3 * Self.size)
        #expect(record.size(of: LayerID(rawValue: 1)) == Self.size)
        let less = try await bench.refusal(bench.specification("less", size: Self.size - 4096))
        #expect(less.code == .invalid)
        #expect(
            less.message
                == "a volume made from vol@s has at least its 1GiB (1073741824 bytes), not "
                + "1023.9MiB (1073737728 bytes)")
    }

    /// What is not in sync may lack some of the snapshot: only the engine fills another copy.
    @Test func aReplicaOutOfSyncIsNoSource() async throws {
        let bench = try await Bench()
        #expect(try await bench.world.swap(.removal) { $0.inSync.removeLast() } == .swapped)
        let two = try await bench.make(bench.specification())
        #expect(Self.places(two) == ["a", "b"])
        let wanted = try bench.specification("three", replicas: 3) { $0.minInSync = 2 }
        let three = try await bench.make(wanted)
        #expect(Self.places(three) == ["a", "b", "d (empty)"])
        let first = try #require(three.volume.cloneRecord)
        #expect(first.inSync == three.replicas.prefix(2).compactMap(\.member))
        #expect(first.minInSync == 2)
        // It is not the volume's before the empty one runs, too, and that one is to be filled.
        for replica in three.replicas.prefix(2) { try await bench.world.test.run(replica) }
        #expect(try await bench.store.volume(named: "three").volume.phase == .creating)
        let whole = try await bench.finish(three)
        #expect(whole.record == first)
        #expect(whole.replicas.map(whole.isMember) == [true, true, false])
        #expect(whole.volume.replicaCount == 3)
    }

    @Test func onlyReplicasThatRunAreSources() async throws {
        let bench = try await Bench()
        let without = try ["a", "c"].map(bench.source)
        #expect(
            Self.places(try await bench.make(bench.specification("x"), running: without))
                == ["a", "c"])
        #expect(
            Self.places(try await bench.make(bench.specification("y"), ready: ["b", "d"]))
                == ["b"])
        let leaving = try bench.source(on: "b")
        try await bench.store.transaction { db in
            try db.execute(
                sql: "UPDATE replicas SET phase = 'leave' WHERE id = ?", arguments: [leaving])
        }
        #expect(Self.places(try await bench.make(bench.specification("z"))) == ["a", "c"])
        let none = try await bench.refusal(
            bench.specification(), running: [try bench.source(on: "b")])
        #expect(none.code == .precondition)
        #expect(
            none.message
                == "no replica could share the layers of vol@s, which is in sync on a (not "
                + "running), c (not running): use a node where it is in sync and runs; see "
                + "'storagectl volume show vol'")
    }

    @Test func moreReplicasThanSourcesAreMadeEmpty() async throws {
        let bench = try await Bench()
        let four = try await bench.make(bench.specification(replicas: 4))
        #expect(Self.places(four) == ["a", "b", "c", "d (empty)"])
        #expect(four.volume.cloneRecord?.inSync.count == 3)
        let five = try await bench.refusal(bench.specification("five", replicas: 5))
        #expect(five.code == .precondition)
        #expect(five.message.hasPrefix("5 replicas need 5 nodes, and 4 can be used"))
        // Fewer: where the fewest replicas are.
        let one = try await bench.make(bench.specification("one", replicas: 1), ready: ["c", "d"])
        #expect(Self.places(one) == ["c"])
        let two = try await bench.make(bench.specification("two", replicas: 2))
        #expect(Self.places(two) == ["a", "b"])
    }

    @Test func nodesAskedForAreKept() async throws {
        let bench = try await Bench()
        for (name, replicas, nodes, places) in [
            ("a", 0, ["b"], ["b"]), ("b", 0, ["c", "b"], ["c", "b"]), ("c", 0, ["d", "a"], ["a"]),
            ("d", 2, ["d", "a"], ["d (empty)", "a"]), ("e", 2, ["a", "a"], ["a", "a (empty)"]),
            ("f", 1, ["b", "d"], ["b"]),
            ("g", 4, ["a", "b", "c", "d"], ["a", "b", "c", "d (empty)"]),
        ] as [(String, UInt32, [String], [String])] {
            let wanted = try bench.specification(name, replicas: replicas, nodes: nodes)
            let made = try await bench.make(wanted)
            #expect(Self.places(made) == places)
            #expect(try await bench.make(wanted) == made)
        }
        let unknown = try await bench.refusal(bench.specification(nodes: ["x"]))
        #expect(unknown.code == .precondition)
        #expect(unknown.message.contains("node x is not known or not ready"))
    }

    /// Temporary replicas share the layers on nodes of the source, and are the first members.
    @Test func whereNoSourceIsTemporaryOnesShare() async throws {
        let bench = try await Bench()
        for (name, replicas, nodes, lasting) in [
            ("a", 0, ["d"], ["d"]), ("b", 1, ["d"], ["d"]), ("c", 2, ["d", "d"], ["d", "d"]),
            ("e", 0, ["d", "d"], ["d", "d"]),
            ("f", 0, ["d", "d", "d", "d"], ["d", "d", "d", "d"]),
        ] as [(String, UInt32, [String], [String])] {
            let wanted = try bench.specification(name, replicas: replicas, nodes: nodes)
            let made = try await bench.make(wanted)
            #expect(
                Self.places(made)
                    == lasting.map { "\($0) (empty)" } + ["a (temporary)", "b (temporary)"])
            #expect(made.volume.isFilling && made.volume.replicaCount == lasting.count)
            let first = try #require(made.volume.cloneRecord)
            #expect(first.inSync == made.replicas.suffix(2).compactMap(\.member))
            #expect(made.lastingReplicas.map(\.node) == lasting)
            // Again, whoever runs.
            #expect(try await bench.make(wanted, ready: [], running: []) == made)
            #expect(try await bench.store.deleteVolume(name) == false)
            for replica in made.replicas { try await bench.world.test.remove(replica) }
        }
        // With one source on these nodes none is needed.
        let mixed = try await bench.make(
            bench.specification("mixed", replicas: 2, nodes: ["d", "a"]))
        #expect(Self.places(mixed) == ["d (empty)", "a"] && mixed.volume.isFilling)
        let shared = try await bench.make(bench.specification("shared"))
        #expect(!shared.volume.isFilling)
        #expect(
            try await bench.world.events.first {
                $0.kind == "VolumeRequested" && $0.subject == "volume/a"
            }?
            .message == "1GiB, from vol@s, replicas on d, shared on a, b until these are filled")
    }

    @Test func whatIsNotThereIsNoSource() async throws {
        let bench = try await Bench()
        let noVolume = try await bench.refusal(bench.specification(of: "other"))
        #expect(noVolume.code == .notFound && noVolume.message.contains("no volume 'other'"))
        let noSnapshot = try await bench.refusal(bench.specification(at: "t"))
        #expect(noSnapshot.code == .notFound)
        #expect(noSnapshot.message.contains("volume 'vol' has no snapshot 't'"))
        _ = try await bench.make(bench.specification())
        let creating = try await bench.refusal(bench.specification("next", of: "new"))
        #expect(creating.code == .precondition)
        #expect(creating.message == "volume 'new' is still being created")
        #expect(try await bench.store.deleteVolume("new") == false)
        let deleting = try await bench.refusal(bench.specification("next", of: "new"))
        #expect(deleting.code == .precondition)
        #expect(deleting.message == "volume 'new' is being deleted")
        #expect(try await bench.store.volumes(named: "next").isEmpty)
    }

    @Test func aCloneIsASourceToo() async throws {
        let bench = try await Bench()
        let first = try await bench.finish(bench.make(bench.specification()))
        let second = try await bench.make(
            bench.specification("next", of: "new"), running: first.replicas.map(\.id))
        #expect(second.replicas.map(\.source) == first.replicas.map(\.id))
        let epoch = try #require(first.record).epoch.rawValue + 1000
        #expect(second.volume.cloneRecord?.epoch == Epoch(epoch))
    }

    // MARK: Again

    @Test func theSameAgainIsHarmlessThoughTheSourceIsGone() async throws {
        let bench = try await Bench()
        let made = try await bench.make(bench.specification())
        let again = [
            try bench.specification(), try bench.specification(size: Self.size),
            try bench.specification(replicas: 3), try bench.specification(nodes: ["c", "b", "a"]),
        ]
        for wanted in again {
            #expect(try await bench.make(wanted, ready: [], running: []) == made)
        }
        let whole = try await bench.finish(made)
        try await bench.world.remove("s")
        for wanted in again { #expect(try await bench.make(wanted) == whole) }
        #expect(try await bench.store.deleteVolume("vol") == false)
        for replica in bench.vol.replicas { try await bench.world.test.remove(replica) }
        #expect(try await bench.store.volumes().count == 1)
        for wanted in again { #expect(try await bench.make(wanted) == whole) }
    }

    @Test func otherArgumentsAreAConflict() async throws {
        let bench = try await Bench()
        _ = try await bench.make(bench.specification())
        let empty = try VolumeSpecification(
            name: "new", sizeBytes: Self.size, replicas: 3, nodes: [])
        for (wanted, words) in [
            (try bench.specification(at: "t"), "was made from vol@s, not from vol@t"),
            (try bench.specification(of: "other"), "was made from vol@s, not from other@s"),
            (empty, "volume 'new' exists and was made from vol@s, not empty"),
            (
                try bench.specification("vol"),
                "volume 'vol' exists and was made empty, not from vol@s"
            ),
            (try bench.specification(size: 2 * Self.size), "exists with other arguments: 1GiB"),
            (try bench.specification(replicas: 2), "exists with other arguments: 1GiB, 3 replicas"),
            (try bench.specification(nodes: ["a", "b"]), "3 replicas on a, b, c"),
            (try bench.specification { $0.minInSync = 2 }, "exists with other arguments"),
        ] {
            let error = try await bench.refusal(wanted)
            #expect(error.code == .conflict)
            #expect(error.message.contains(words), "\(error)")
        }
    }

    // MARK: Settings

    @Test func settingsAreInTheFirstRecord() async throws {
        let bench = try await Bench()
        let wanted = try bench.specification {
            $0.minInSync = 2
            $0.leaseMilliseconds = 1000
        }
        let made = try await bench.make(wanted)
        #expect(made.volume.cloneRecord?.minInSync == 2)
        #expect(made.volume.cloneRecord?.leaseMilliseconds == 1000)
        // Changed while it is made: the volume begins with the new ones.
        var change = Haptera_V1_VolumeSettings()
        change.minInSync = 3
        _ = try await bench.store.updateVolume("new", change)
        let record = try #require(try await bench.finish(made).record)
        #expect(record.minInSync == 3 && record.leaseMilliseconds == 1000)
        // How many there are is known only when the sources are.
        let tooMany = try await bench.refusal(
            bench.specification("x", nodes: ["a", "b"]) { $0.minInSync = 3 })
        #expect(tooMany.code == .invalid)
        #expect(tooMany.message.contains("--min-in-sync 3 is not possible with 2 replicas"))
    }

    @Test func aSourceIsAVolumeAndASnapshot() throws {
        var request = Haptera_V1_CreateVolumeRequest()
        request.name = "new"
        request.sourceVolume = "vol"
        request.sourceSnapshot = "s"
        let wanted = try VolumeSpecification(request)
        #expect(wanted.source?.text == "vol@s")
        #expect(wanted.sizeBytes == 0 && wanted.replicas == 0)
        for (volume, snapshot) in [
            ("vol", ""), ("", "s"), ("Vol", "s"), ("vol", ".s"), ("vol", "a@b"), ("a/b", "s"),
        ] {
            request.sourceVolume = volume
            request.sourceSnapshot = snapshot
            let error = #expect(throws: ControlError.self) { try VolumeSpecification(request) }
            #expect(error?.code == .invalid)
        }
        request.sourceVolume = ""
        request.sourceSnapshot = ""
        // Without one, a size is needed.
        #expect(throws: ControlError.self) { try VolumeSpecification(request) }
        request.sizeBytes = Self.size
        #expect(try VolumeSpecification(request).replicas == VolumeSpecification.replicasDefault)
    }

    // MARK: Guards

    @Test func whatACloneNeedsStaysUntilItHasIt() async throws {
        let bench = try await Bench(attached: true)
        try await bench.world.add("t", created: 6)
        let made = try await bench.make(bench.specification(replicas: 4))
        let words = "volume 'new' is being made from it; wait until it is, or delete that one"
        func refusal() async throws -> ControlError? {
            do {
                try await bench.world.deleteSnapshot("s")
                return nil
            } catch let error as ControlError {
                return error
            }
        }
        #expect(try await refusal() == ControlError(.precondition, words))
        for replica in made.replicas.prefix(2) { try await bench.world.test.run(replica) }
        #expect(try await refusal() == ControlError(.precondition, words))
        // Another one is nobody's.
        try await bench.world.deleteSnapshot("t")
        #expect(bench.world.askedToDelete.withLock { $0.map(\.name) } == ["t"])
        // What is still to be made empty needs nothing of it.
        try await bench.world.test.run(made.replicas[2])
        #expect(try await bench.store.volume(named: "new").volume.phase == .creating)
        #expect(try await refusal() == nil)
    }

    @Test func aVolumeStaysUntilItsClonesHaveIt() async throws {
        let bench = try await Bench()
        let made = try await bench.make(bench.specification())
        func refusal() async throws -> ControlError? {
            do {
                _ = try await bench.store.deleteVolume("vol")
                return nil
            } catch let error as ControlError {
                return error
            }
        }
        #expect(
            try await refusal()
                == ControlError(
                    .precondition,
                    "volume 'new' is being made from it; wait until it is, or delete that one"))
        #expect(try await bench.store.volume(named: "vol").volume.phase == .ready)
        // One that is given up needs nothing more.
        #expect(try await bench.store.deleteVolume("new") == false)
        #expect(try await refusal() == nil)
        for replica in made.replicas { try await bench.world.test.remove(replica) }
    }

    /// Each can be deleted, and what is left of one is no concern of the other.
    @Test func aWholeCloneBlocksNothing() async throws {
        let bench = try await Bench()
        let whole = try await bench.finish(bench.make(bench.specification()))
        #expect(try await bench.store.deleteVolume("vol") == false)
        for replica in bench.vol.replicas { try await bench.world.test.remove(replica) }
        #expect(try await bench.store.volume(named: "new") == whole)
        #expect(try await bench.store.deleteVolume("new") == false)
        for replica in whole.replicas { try await bench.world.test.remove(replica) }
        #expect(try await bench.store.volumes().isEmpty)
    }
}
