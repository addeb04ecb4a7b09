import HapteraAPI
import HapteraCore
import HapteraHost
import Logging
import Synchronization
import Testing

@testable import HapteraControl

/// What a node has room for, and that everything that puts something there asks.
@Suite struct NodeRoomTests {
    private func room(
        overcommit: Int = 0, reserve: Int64 = 1 << 30, available: UInt64 = 50, promised: UInt64 = 0
    ) -> NodeRoom {
        var limits = NodeLimits(node: "n")
        limits.overcommitPercent = overcommit
        limits.reserveBytes = reserve
        var room = NodeRoom(
            limits: limits,
            space: NodeSpace(
                capacityBytes: 100 * GiB, availableBytes: available * GiB))
        room.promisedBytes = promised * GiB
        return room
    }

    @Test func withoutALimitAnythingMayBePromised() {
        let room = room(promised: 1 << 20)
        #expect(room.promisableBytes == nil)
        #expect(room.objection(to: "x", promise: .max, data: 0) == nil)
    }

    @Test func noMoreThanTheLimitIsPromised() {
        let room = room(overcommit: 150, promised: 100)
        #expect(room.promisableBytes == 150 * GiB)
        #expect(room.objection(to: "x", promise: 50 * GiB, data: 0) == nil)
        #expect(
            room.objection(to: "a disk", promise: 50 * GiB + 1, data: 0)
                == "node n has no room for a disk: 100GiB are promised to its replicas, and at "
                + "most 150GiB may be (150% of 100GiB); use another node, remove replicas there, or "
                + "see 'storagectl node update n --overcommit'")
        #expect(room.objection(to: "x", promise: .max, data: 0) != nil)
        // Beyond what fits a number of bytes there is no limit that could be reached.
        var huge = room
        huge.space?.capacityBytes = .max
        huge.limits.overcommitPercent = NodeLimits.overcommitMax
        #expect(huge.promisableBytes == .max)
    }

    @Test func theReserveStays() {
        var room = room(available: 10)
        #expect(room.objection(to: "x", promise: 0, data: 9 * GiB) == nil)
        #expect(
            room.objection(to: "x", promise: 0, data: 9 * GiB + 1)
                == "node n has no room for x: 10GiB are available (9GiB needed, 1GiB reserved); "
                + "free space there, use another node, or see 'storagectl node update n --reserve'")
        // What others wait for there is theirs.
        room.incomingBytes = 5 * GiB
        #expect(room.objection(to: "x", promise: 0, data: 4 * GiB) == nil)
        let both = room.objection(to: "x", promise: 0, data: 5 * GiB)
        #expect(both?.contains("(5GiB needed, 1GiB reserved, 5GiB on their way)") == true)
        room.space = nil
        #expect(room.objection(to: "x", promise: .max, data: .max) == nil)
    }

    @Test func eachReplicaOfANodeCounts() {
        var room = room(overcommit: 100)
        let need = ReplicaNeed(volume: "v", sizeBytes: 40 * GiB)
        #expect(room.take(need) == nil)
        #expect(room.take(need) == nil)
        #expect(room.take(need)?.contains("a replica of volume 'v' (40GiB)") == true)
        #expect(room.replicas == 2 && room.promisedBytes == 80 * GiB)
    }

    @Test func shortageIsToldOnceUntilItIsClearlyOver() {
        var limits = NodeLimits(node: "n")
        limits.reserveBytes = 800
        func turn(_ available: UInt64) -> Bool? {
            limits.turn(NodeSpace(capacityBytes: 1000, availableBytes: available))
        }
        #expect(turn(800) == nil && turn(799) == true)
        limits.isLow = true
        #expect(turn(799) == nil && turn(899) == nil && turn(900) == false)
        limits.reserveBytes = 0
        #expect(turn(0) == false)
        limits.isLow = false
        #expect(turn(0) == nil)
    }

    /// A disk of 200 MiB can hold replicas, too.
    @Test func whatNobodyChoseIsLittleOfASmallDisk() {
        var room = NodeRoom(
            limits: NodeLimits(node: "n"),
            space: NodeSpace(capacityBytes: 200 << 20, availableBytes: 190 << 20))
        let need = ReplicaNeed(volume: "v", sizeBytes: 1 << 30)
        #expect(room.take(need) == nil)
        room.limits.reserveBytes = 180 << 20
        #expect(room.take(need)?.contains("180MiB reserved") == true)
        let large = NodeSpace(capacityBytes: 100 * GiB, availableBytes: 0)
        #expect(NodeLimits(node: "n").reserve(of: large) == 256 << 20)
    }

    // MARK: Through the controller

    /// Nodes a to e of 100 GiB each, `available` of it; no volumes.
    private final class World: Sendable {
        static let nodes = ["a", "b", "c", "d", "e"]
        let test: TestStore
        let controller: Controller

        init(available: UInt64 = 100) async throws {
            test = try TestStore()
            let quiet = Logger(label: "test") { _ in SwiftLogNoOpLogHandler() }
            controller = Controller(store: test.store, recordService: "h:1", logger: quiet)
            try await test.addNodes(Self.nodes)
            try await report(available: available * GiB)
        }

        func report(available: UInt64, on nodes: [String] = World.nodes) async throws {
            for name in nodes {
                let index = try #require(Self.nodes.firstIndex(of: name))
                let id = hexadecimal(UInt64(index + 1))
                var report = Haptera_V1_NodeReport()
                report.name = name
                report.nodeID = id
                report.capacityBytes = 100 * GiB
                report.availableBytes = available
                let desired = try await controller.desired(for: name, nodeID: id)
                report.replicas = desired.replicas.map {
                    .init(obeying: $0, on: name, index, allocated: 20 << 20)
                }
                try await controller.report(report)
            }
        }

        func limit(
            _ nodes: [String] = World.nodes, overcommit: UInt32? = nil, reserve: UInt64? = nil
        ) async throws {
            for name in nodes {
                var request = Haptera_V1_UpdateNodeRequest()
                request.name = name
                if let overcommit { request.overcommitPercent = overcommit }
                if let reserve { request.reserveBytes = reserve }
                _ = try await controller.updateNode(request)
            }
        }

        @discardableResult
        func create(
            _ name: String, _ size: UInt64, replicas: UInt32 = 3, on nodes: [String] = []
        ) async throws -> Haptera_V1_Volume {
            try await controller.create(
                VolumeSpecification(
                    name: name, sizeBytes: size * GiB, replicas: replicas, nodes: nodes))
        }

        func refusal(_ act: () async throws -> Void) async throws -> String {
            let error = await #expect(throws: ControlError.self) { try await act() }
            #expect(error?.code == .precondition)
            return error?.message ?? ""
        }

        func node(_ name: String) async throws -> Haptera_V1_Node {
            try await controller.node(named: name)
        }
        func events(_ kind: String) async throws -> [String] {
            try await test.store.events(after: 0, limit: 1000).filter { $0.kind == kind }
                .map { "\($0.subject): \($0.message)" }
        }
    }

    @Test func nothingIsLimitedByDefault() async throws {
        let world = try await World(available: 1)
        try await world.create("huge", 1 << 20)
        let node = try await world.node("a")
        #expect(node.promisedBytes == 1 << 50 && node.overcommitPercent == 0)
        #expect(node.reserveBytes == 256 << 20 && node.conditions.isEmpty)
    }

    @Test func aVolumeGoesWhereThereIsRoom() async throws {
        let world = try await World()
        try await world.limit(["a", "b"], overcommit: 50)
        // The emptiest ones, but for those that are too small.
        #expect(try await world.create("x", 60).replicas.map(\.node) == ["c", "d", "e"])
        try await world.create("y", 40, replicas: 2, on: ["a", "a"].dropLast() + ["b"])
        let why = try await world.refusal { try await world.create("z", 20, replicas: 4) }
        #expect(why.hasPrefix("4 replicas need 4 nodes, and 3 can be used; node a has no room for"))
        #expect(why.contains("40GiB are promised to its replicas, and at most 50GiB may be"))
        // Named explicitly, too; two of them on one node count twice.
        let named = try await world.refusal {
            try await world.create("z", 20, replicas: 1, on: ["b"])
        }
        #expect(named.hasPrefix("node b has no room for a replica of volume 'z' (20GiB)"))
        try await world.limit(["c"], overcommit: 130)
        _ = try await world.refusal {
            try await world.create("z", 40, replicas: 2, on: ["c", "c"])
        }
        try await world.create("z", 35, replicas: 2, on: ["c", "c"])
        #expect(try await world.node("c").promisedBytes == 130 * GiB)
    }

    /// What is decided together is counted together.
    @Test func ofManyAtOnceOnlyThoseThatFit() async throws {
        let world = try await World()
        try await world.limit(overcommit: 100)
        let made = await withTaskGroup(of: Bool.self) { group in
            for number in 0..<20 {
                group.addTask { (try? await world.create("v\(number)", 30)) != nil }
            }
            return await group.reduce(into: 0) { $0 += $1 ? 1 : 0 }
        }
        // Three to a node, five nodes, three replicas each.
        #expect(made == 5)
        for name in World.nodes { #expect(try await world.node(name).promisedBytes <= 90 * GiB) }
    }

    @Test func nothingIsPutWhereTheReserveIsNotAvailable() async throws {
        let world = try await World(available: 8)
        try await world.limit(reserve: 8 * GiB)
        let why = try await world.refusal { try await world.create("v", 1) }
        #expect(why.contains("8GiB are available (16MiB needed, 8GiB reserved)"), "\(why)")
        try await world.limit(["a", "b", "d"], reserve: 7 * GiB)
        #expect(try await world.create("v", 1).replicas.map(\.node) == ["a", "b", "d"])
        // Again is no other volume.
        try await world.limit(reserve: 9 * GiB)
        #expect(try await world.create("v", 1).replicas.count == 3)
    }

    @Test func aReplacementNeedsRoomForItsData() async throws {
        let world = try await World(available: 2)
        try await world.create("v", 50, on: ["a", "b", "c"])
        try await world.report(available: 2 * GiB)
        try await world.limit(["d"], overcommit: 49)
        try await world.limit(["e"], reserve: 2 * GiB)
        let old = try #require(try await world.controller.volume(named: "v").replicas.first)
        let why = try await world.refusal {
            _ = try await world.controller.replace(old.id, of: "v", node: nil)
        }
        #expect(why.hasPrefix("no other ready node has room: node d has no room for a replica"))
        #expect(why.contains("node e has no room"))
        for node in ["d", "e"] {
            let named = try await world.refusal {
                _ = try await world.controller.replace(old.id, of: "v", node: node)
            }
            #expect(named.hasPrefix("node \(node) has no room for a replica of volume 'v' (50GiB)"))
        }
        try await world.limit(["d"], overcommit: 50)
        let now = try await world.controller.replace(old.id, of: "v", node: nil)
        #expect(now.replicas.last?.node == "d")
        // What it is to be filled with counts until it is.
        let rooms = try await world.test.store.rooms([
            "d": NodeSpace(capacityBytes: 100 * GiB, availableBytes: 2 * GiB)
        ])
        #expect(rooms["d"]?.incomingBytes == 20 << 20)
    }

    @Test func aShortageIsAnEventAndACondition() async throws {
        let world = try await World(available: 10)
        try await world.limit(["a"], reserve: 8 * GiB)
        #expect(try await world.events("NodeUpdated") == ["node/a: overcommit none, reserve 8GiB"])
        try await world.limit(["a"], reserve: 8 * GiB)
        #expect(try await world.events("NodeUpdated").count == 1)
        for available: UInt64 in [7, 6, 8, 7, 8] {
            try await world.report(available: available * GiB, on: ["a"])
        }
        #expect(
            try await world.events("NodeSpaceLow")
                == [
                    "node/a: 7GiB are available, 8GiB reserved: no replica is put there, and none "
                        + "grows"
                ])
        #expect(try await world.node("a").conditions == [.lowSpace])
        #expect(try await world.node("b").conditions.isEmpty)
        try await world.report(available: 9 * GiB, on: ["a"])
        #expect(try await world.events("NodeSpaceRecovered").count == 1)
        #expect(try await world.node("a").conditions.isEmpty)
        // A limit that is changed is looked at at once.
        try await world.limit(["a"], reserve: 10 * GiB)
        #expect(try await world.node("a").conditions == [.lowSpace])
        #expect(try await world.events("NodeSpaceLow").count == 2)
        // And kept across a registration of the agent.
        try await world.test.store.registerNode(
            NodeRow(
                name: "a", nodeID: hexadecimal(1), address: "127.0.0.1", directory: "/a",
                version: "2", pid: 9))
        #expect(try await world.node("a").reserveBytes == 10 * GiB)
    }

    @Test func badLimitsAreRefused() async throws {
        let world = try await World()
        for (name, overcommit, reserve, code) in [
            ("a", 100_001, 0, ControlError.Code.invalid), ("a", 0, (1 << 50) + 1, .invalid),
            ("x", 1, 0, .notFound),
        ] as [(String, UInt32, UInt64, ControlError.Code)] {
            let error = await #expect(throws: ControlError.self) {
                try await world.limit([name], overcommit: overcommit, reserve: reserve)
            }
            #expect(error?.code == code)
            #expect(error?.message.contains("'\(name)'") == true)
        }
    }

    /// What shares the source's layers needs none; a copy elsewhere does, until it is filled.
    @Test func aCloneElsewhereNeedsRoomForACopy() async throws {
        let world = try await SnapshotTests.World(attached: false)
        try await world.add("s", created: 5)
        let store = world.test.store
        try await store.registerNode(
            NodeRow(
                name: "d", nodeID: hexadecimal(4), address: "127.0.0.1", directory: "/d",
                version: "1", pid: 1))
        let running = Set(try await store.volume(named: "vol").replicas.map(\.id))
        func make(_ name: String, _ node: String, of bytes: UInt64) async throws -> StoredVolume {
            let little = NodeSpace(capacityBytes: 100 * GiB, availableBytes: GiB)
            return try await store.createVolume(
                VolumeSpecification(
                    name: name, sizeBytes: 0, replicas: 1, nodes: [node],
                    source: CloneSource(volume: "vol", snapshot: "s")),
                candidates: ["a", "b", "c", "d"], running: running,
                spaces: ["a": little, "b": little, "d": little], sourceBytes: bytes)
        }
        _ = try await make("shared", "a", of: 2 * GiB)
        let error = await #expect(throws: ControlError.self) {
            _ = try await make("x", "d", of: 2 * GiB)
        }
        #expect(error?.message.hasPrefix("node d has no room for a replica of volume 'x'") == true)
        let made = try await make("x", "d", of: GiB / 2)
        #expect(made.replicas.map(\.expectedBytes) == [Int64(GiB / 2), 0, 0])
        // The first one has not got it yet.
        let second = await #expect(throws: ControlError.self) {
            _ = try await make("y", "d", of: GiB / 2)
        }
        #expect(second?.message.contains("512MiB on their way") == true)
        // A node that shares obeys as well: another one is taken, or none.
        for (nodes, temporary) in [(["a"], ["b", "c"]), (["b", "c"], nil)]
            as [([String], [String]?)]
        {
            for node in nodes {
                var request = Haptera_V1_UpdateNodeRequest()
                request.name = node
                request.overcommitPercent = 1
                request.reserveBytes = 2 * GiB
                try await store.updateNode(request)
            }
            let little = NodeSpace(capacityBytes: GiB, availableBytes: GiB)
            let wanted = try VolumeSpecification(
                name: "z", sizeBytes: 0, replicas: 1, nodes: ["d"],
                source: CloneSource(volume: "vol", snapshot: "s"))
            let spaces = ["a": little, "b": little, "c": little]
            guard let temporary else {
                _ = try await store.deleteVolume("z")
                for replica in try await store.volume(named: "z").replicas {
                    try await world.test.remove(replica)
                }
                let none = await #expect(throws: ControlError.self) {
                    _ = try await store.createVolume(
                        wanted, candidates: ["a", "b", "c", "d"], running: running,
                        spaces: spaces)
                }
                let words = "volume 'z' needs a node that has vol@s until it is filled: node a has"
                #expect(none?.message.hasPrefix(words) == true, "\(none?.message ?? "")")
                continue
            }
            let made = try await store.createVolume(
                wanted, candidates: ["a", "b", "c", "d"], running: running, spaces: spaces)
            #expect(made.replicas.filter(\.isTemporary).map(\.node) == temporary)
        }
    }

    // MARK: Growth

    @Test func growthIsAllOrNone() async throws {
        let world = try await World()
        try await world.create("v", 40, on: ["a", "b", "c"])
        try await world.create("w", 40, on: ["a", "c", "c"])
        try await world.report(available: 50 * GiB)
        try await world.limit(["a"], overcommit: 100)
        try await world.limit(["c"], overcommit: 130)
        let (store, spaces) = (world.test.store, await world.controller.spaces)
        func grow(_ name: String, to size: UInt64) async throws {
            try await store.beginGrowth(name, to: size * GiB, spaces: spaces)
        }
        // a: 80 of 100; c: 120 of 130, of which w has two.
        let why = try await world.refusal { try await grow("w", to: 46) }
        #expect(
            why.hasPrefix(
                "node c has no room for volume 'w' to grow to 46GiB: 120GiB are promised"))
        #expect(why.hasSuffix("; the volume keeps its size"))
        #expect(try await world.node("a").promisedBytes == 80 * GiB)
        try await grow("w", to: 44)
        #expect(try await world.node("a").promisedBytes == 84 * GiB)
        #expect(try await world.node("c").promisedBytes == 128 * GiB)
        // The other one finds that promised.
        _ = try await world.refusal { try await grow("v", to: 43) }
        try await grow("v", to: 42)
        // The same again, and less, are promised already.
        try await grow("w", to: 44)
        try await grow("w", to: 43)
        let id = try await store.volume(named: "w").volume.id
        try await store.endGrowth(id, to: 43 * GiB)
        #expect(try await world.node("c").promisedBytes == 130 * GiB)
        try await store.endGrowth(id, to: 44 * GiB)
        #expect(try await world.node("c").promisedBytes == 122 * GiB)
    }

    /// What an engine may still do counts until it has done it, or cannot any more.
    @Test func aGrowthInDoubtCounts() async throws {
        let world = try await SnapshotTests.World()
        func promised() async throws -> UInt64 {
            try await world.controller.node(named: "a").promisedBytes
        }
        world.engine.withLock { $0 = .isSilent }
        let error = await #expect(throws: ControlError.self) { _ = try await world.resize(2 << 30) }
        #expect(error?.code == .inDoubt)
        #expect(try await promised() == 2 << 30)
        world.engine.withLock { $0 = .refuses }
        await #expect(throws: ControlError.self) { _ = try await world.resize(2 << 30) }
        #expect(try await promised() == 1 << 30)
        world.engine.withLock { $0 = .isSilent }
        await #expect(throws: ControlError.self) { _ = try await world.resize(3 << 30) }
        // It had done it.
        #expect(try await world.swap(.resize) { $0.grow(to: 3 << 30) } == .swapped)
        #expect(try await promised() == 3 << 30)
        await #expect(throws: ControlError.self) { _ = try await world.resize(4 << 30) }
        _ = try await world.controller.detach("vol")
        let stored = try await world.test.store.volume(named: "vol")
        try await world.test.reportEngine(stored, detached: true)
        #expect(try await promised() == 3 << 30)
    }
}

private let GiB: UInt64 = 1 << 30
