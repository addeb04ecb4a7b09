import HapteraCore
import Testing

@testable import HapteraControl

@Suite struct VolumeTableTests {
    private static func specification(
        _ name: String = "vol", size: UInt64 = 1 << 30, replicas: UInt32 = 3, nodes: [String] = []
    ) throws -> VolumeSpecification {
        try VolumeSpecification(name: name, sizeBytes: size, replicas: replicas, nodes: nodes)
    }

    @Test(arguments: [
        "", "-a", "a-", "A", "a_b", "a.b", "ä", "a b", "a/b", "..",
        String(repeating: "a", count: 64),
    ])
    func badNamesAreRefused(_ name: String) {
        #expect(throws: ControlError.self) { try Self.specification(name) }
    }

    @Test(arguments: ["a", "0", "a-b", "vol-1", String(repeating: "a", count: 63)])
    func goodNamesAreTaken(_ name: String) throws {
        #expect(try Self.specification(name).name == name)
    }

    @Test(
        arguments: [
            (0, false), (4096, false), (1 << 20, true), (1 << 20 + 1, false),
            (1 << 20 + 4096, true),
            (1 << 50, true), (1 << 50 + 4096, false), (UInt64.max, false),
        ] as [(UInt64, Bool)])
    func sizesAreChecked(_ size: UInt64, _ isGood: Bool) {
        #expect(((try? Self.specification(size: size)) != nil) == isGood)
    }

    @Test func replicasAreOneToFive() throws {
        #expect(try Self.specification(replicas: 0).replicas == 3)
        #expect(try Self.specification(replicas: 5).replicas == 5)
        #expect(throws: ControlError.self) { try Self.specification(replicas: 6) }
    }

    @Test func creatingAgainIsHarmless() async throws {
        let test = try TestStore()
        let first = try await test.makeVolume()
        let nodes = ["a", "b", "c"]
        let same = try await test.store.createVolume(Self.specification(), candidates: nodes)
        #expect(same == first)
        // Where it is placed may be said again, in any order, or left out.
        let placed = try Self.specification(nodes: ["c", "a", "b"])
        #expect(try await test.store.createVolume(placed, candidates: nodes) == first)
        // Even while no node is ready.
        #expect(try await test.store.createVolume(Self.specification(), candidates: []) == first)
    }

    @Test func otherArgumentsAreAConflict() async throws {
        let test = try TestStore()
        _ = try await test.makeVolume()
        for other in [
            try Self.specification(size: 2 << 30), try Self.specification(replicas: 2),
            try Self.specification(nodes: ["a", "a", "b"]),
        ] {
            let error = await #expect(throws: ControlError.self) {
                try await test.store.createVolume(other, candidates: ["a", "b", "c"])
            }
            #expect(error?.code == .conflict)
        }
    }

    @Test func eachAttachmentIsANewClient() async throws {
        let test = try TestStore()
        _ = try await test.makeVolume()
        let ready: Set = ["a", "b", "c"]
        let first = try await test.store.attachVolume("vol", node: "b", ready: ready)
        #expect(first.volume.attachedNode == "b")
        #expect(first.volume.clientGeneration == 1)
        // Idempotent, also without naming the node, and whether or not nodes are ready.
        for node in ["b", nil] {
            let again = try await test.store.attachVolume("vol", node: node, ready: [])
            #expect(again == first)
        }
        await #expect(throws: ControlError.self) {
            try await test.store.attachVolume("vol", node: "a", ready: ready)
        }
        _ = try await test.store.detachVolume("vol")
        await #expect(throws: ControlError.self) {
            try await test.store.attachVolume("vol", node: "b", ready: ready)
        }
        try await test.reportEngine(first, detached: true)
        #expect(try await test.store.volume(named: "vol").volume.attachedNode == nil)
        let second = try await test.store.attachVolume("vol", node: nil, ready: ready)
        #expect(second.volume.clientGeneration == 2)
        // What an engine of the earlier attachment reports no longer counts.
        try await test.reportEngine(first, served: true, detached: true)
        let now = try await test.store.volume(named: "vol").volume
        #expect(now.attachedNode == second.volume.attachedNode)
        #expect(now.servedGeneration == 0)
    }

    @Test func withoutANodeAHolderIsChosen() async throws {
        let test = try TestStore()
        let volume = try await test.makeVolume()
        let holder = volume.replicas[1].node
        let stored = try await test.store.attachVolume("vol", node: nil, ready: [holder, "zz"])
        #expect(stored.volume.attachedNode == holder)
    }

    @Test func aDetachIsNotAnnouncedBeforeItIsAskedFor() async throws {
        let test = try TestStore()
        _ = try await test.makeVolume()
        let attached = try await test.store.attachVolume("vol", node: "a", ready: ["a"])
        try await test.reportEngine(attached, served: true, detached: true)
        let now = try await test.store.volume(named: "vol").volume
        #expect(now.attachedNode == "a")
        #expect(now.servedGeneration == 1)
        // Detaching a detached volume is done at once.
        _ = try await test.store.detachVolume("vol")
        try await test.reportEngine(attached, detached: true)
        let detached = try await test.store.detachVolume("vol")
        #expect(!detached.volume.isDetaching)
        #expect(detached.volume.attachedNode == nil)
    }

    @Test func deletionEndsWhenEveryDirectoryIsGone() async throws {
        let test = try TestStore()
        let volume = try await test.makeVolume()
        let id = try #require(volume.record?.volume)
        #expect(try await test.store.deleteVolume("vol") == false)
        #expect(try await test.store.record(of: id) == nil)
        let deleting = try await test.store.volume(named: "vol")
        #expect(deleting.volume.phase == .deleting)
        #expect(deleting.replicas.allSatisfy { $0.phase == .remove })
        await #expect(throws: ControlError.self) {
            try await test.store.attachVolume("vol", node: nil, ready: ["a"])
        }
        for replica in volume.replicas.dropLast() { try await test.remove(replica) }
        #expect(try await test.store.volumes().count == 1)
        try await test.remove(volume.replicas[2])
        #expect(try await test.store.volumes().isEmpty)
        // Again: done. A name that never was: not found.
        #expect(try await test.store.deleteVolume("vol") == true)
        let error = await #expect(throws: ControlError.self) {
            try await test.store.deleteVolume("never")
        }
        #expect(error?.code == .notFound)
    }

    @Test func anAttachedVolumeIsNotDeleted() async throws {
        let test = try TestStore()
        _ = try await test.makeVolume()
        _ = try await test.store.attachVolume("vol", node: "a", ready: ["a"])
        let error = await #expect(throws: ControlError.self) {
            try await test.store.deleteVolume("vol")
        }
        #expect(error?.code == .precondition)
        #expect(try await test.store.volume(named: "vol").volume.phase == .ready)
    }
}

@Suite struct PlacementTests {
    private let three = ["a", "b", "c"].map { Placement.Candidate(name: $0, replicas: 0) }

    private func nodes(
        _ replicas: Int, _ candidates: [Placement.Candidate], _ requested: [String] = []
    ) throws -> [String] {
        try Placement.choose(
            replicas: replicas, requested: requested, candidates: candidates,
            need: ReplicaNeed(volume: "v", sizeBytes: 1 << 30)
        )
        .map(\.node)
    }

    @Test func theEmptiestNodesComeFirst() throws {
        let four = [("a", 5), ("b", 1), ("c", 3), ("d", 1)].map {
            Placement.Candidate(name: $0.0, replicas: $0.1)
        }
        #expect(try nodes(3, four) == ["b", "d", "c"])
    }

    @Test func aNodeIsUsedTwiceOnlyIfNamedSo() throws {
        let error = #expect(throws: ControlError.self) { try nodes(4, three) }
        #expect(error?.code == .precondition)
        #expect(try nodes(3, three, ["a", "a", "b"]) == ["a", "a", "b"])
        #expect(throws: ControlError.self) { try nodes(3, three, ["a", "b"]) }
        #expect(try nodes(1, three, ["c", "b"]) == ["b"])
    }

    @Test func anUnknownNodeIsRefused() {
        let error = #expect(throws: ControlError.self) { try nodes(1, three, ["x"]) }
        #expect(error?.code == .precondition)
    }

    /// Each source once; one of every node before a second one of any.
    @Test func sourcesComeFirst() throws {
        let candidates = [("a", 5), ("b", 1), ("c", 0), ("d", 2)].map {
            Placement.Candidate(name: $0.0, replicas: $0.1)
        }
        let sources = [("1", "a"), ("2", "a"), ("3", "b"), ("4", "gone")].map {
            Placement.Source(replica: $0.0, node: $0.1)
        }
        func places(_ replicas: Int, _ requested: [String] = []) throws -> [String] {
            try Placement.choose(
                replicas: replicas, requested: requested, candidates: candidates, sources: sources,
                need: ReplicaNeed(volume: "v", sizeBytes: 1 << 30)
            ).map { "\($0.node)\($0.source ?? "-")" }
        }
        #expect(try places(1) == ["b3"])
        #expect(try places(2) == ["b3", "a1"])
        #expect(try places(3) == ["b3", "a1", "a2"])
        #expect(try places(5) == ["b3", "a1", "a2", "c-", "d-"])
        #expect(throws: ControlError.self) { try places(6) }
        #expect(try places(2, ["a", "c", "d"]) == ["a1", "a2"])
        #expect(try places(3, ["a", "a", "a"]) == ["a1", "a2", "a-"])
        #expect(try places(2, ["c", "b"]) == ["c-", "b3"])
    }
}
