import HapteraAPI
import HapteraCore
import Logging
import Synchronization
import Testing

@testable import HapteraControl

extension SnapshotTests.World {
    func deleteSnapshot(_ name: String) async throws {
        var request = Haptera_V1_DeleteSnapshotRequest()
        request.volume = "vol"
        request.name = name
        try await controller.deleteSnapshot(request)
    }

    func clone(
        _ name: String, of volume: String = "vol", at snapshot: String = "s", replicas: UInt32 = 0
    ) async throws -> Haptera_V1_Volume {
        try await controller.create(
            VolumeSpecification(
                name: name, sizeBytes: 0, replicas: replicas, nodes: [],
                source: CloneSource(volume: volume, snapshot: snapshot)))
    }

    func desired(on node: String) async throws -> [Haptera_V1_DesiredReplica] {
        let id = try #require(["a", "b", "c"].firstIndex(of: node)) + 1
        return try await controller.desired(for: node, nodeID: hexadecimal(UInt64(id))).replicas
    }
}

/// What the controller tells nodes and users of a volume that begins as a snapshot.
@Suite struct CloneControllerTests {
    typealias World = SnapshotTests.World

    /// Its engine may not have had it flushed on every replica when it ended.
    @Test func theSourceIsMadeSureOf() async throws {
        let world = try await World(attached: false)
        try await world.add("s", created: 5)
        world.live()
        #expect(try await world.clone("new").originSnapshot == "s")
        #expect(world.asked.withLock { $0.map(\.name) } == ["s"])
        try await world.untilDetached()
        #expect(try await world.record.isClean)
    }

    @Test(arguments: [true, false])
    func nodesAreToldOfTheSourceUntilItIsMade(isAttached: Bool) async throws {
        let world = try await World(attached: isAttached)
        try await world.add("s", created: 5)
        if !isAttached {
            #expect(try await world.swap(.detach) { $0.isClean = true } == .swapped)
        }
        let volume = try await world.clone("new")
        #expect(volume.state == .creating)
        #expect(volume.originVolume == "vol" && volume.originSnapshot == "s")
        let stored = try await world.test.store.volume(named: "new")
        for row in stored.replicas {
            let replicas = try await world.desired(on: row.node)
            let wanted = try #require(replicas.first { $0.replicaID == row.id })
            #expect(wanted.phase == .clone)
            #expect(wanted.cloneSource.replicaID == row.source)
            #expect(wanted.cloneSource.layer == 1)
            let record = VolumeRecord(decoding: [UInt8](wanted.cloneSource.record))
            #expect(record == stored.volume.cloneRecord && record != nil)
            #expect(replicas.allSatisfy { $0.replicaID == row.id || !$0.hasCloneSource })
        }
        try await world.report()
        let made = try await world.controller.volume(named: "new")
        #expect(made.state == .detached && made.robustness == .healthy)
        #expect(made.originVolume == "vol" && made.originSnapshot == "s")
        #expect(made.snapshotCount == 1)
        #expect(made.epoch == (isAttached ? 1002 : 1003))
        for row in stored.replicas {
            let replicas = try await world.desired(on: row.node)
            #expect(replicas.allSatisfy { $0.phase == .run && !$0.hasCloneSource })
        }
        #expect(try await world.controller.volume(named: "vol").originVolume.isEmpty)
    }

    /// Made empty, and filled by the engine like the replacement of a replica.
    @Test func oneWithoutASourceIsMadeEmpty() async throws {
        let world = try await World()
        try await world.add("s", created: 5)
        #expect(try await world.swap(.removal) { $0.inSync.removeLast() } == .swapped)
        _ = try await world.clone("new", replicas: 3)
        let stored = try await world.test.store.volume(named: "new")
        let empty = try #require(stored.replicas.first { $0.source == nil })
        let wanted = try #require(
            try await world.desired(on: empty.node).first { $0.replicaID == empty.id })
        #expect(wanted.phase == .create && !wanted.hasCloneSource)
        #expect(wanted.sizeBytes == 1 << 30)
        try await world.report()
        let made = try await world.controller.volume(named: "new")
        #expect(made.state == .detached && made.robustness == .degraded)
        #expect(made.replicas.map(\.inSync) == stored.replicas.map { $0.source != nil })
        // Nobody replaces it: it only waits for its turn.
        try await world.controller.upkeep()
        world.test.clock.advance(24 * 3_600_000)
        try await world.report()
        try await world.controller.upkeep()
        #expect(try await world.test.store.volume(named: "new").replicas.count == 3)
        // The engine is given all of them.
        _ = try await world.controller.attach("new", node: "a")
        let engines = try await world.controller.desired(for: "a", nodeID: hexadecimal(1)).engines
        let engine = try #require(engines.first { $0.volume == "new" })
        #expect(engine.replicas.map(\.replicaID) == stored.replicas.map(\.id))
    }

    /// A replica that is reported to be down is none to take layers from.
    @Test func sourcesAreThoseThatAreReported() async throws {
        let world = try await World()
        try await world.add("s", created: 5)
        var report = Haptera_V1_NodeReport()
        report.name = "b"
        report.nodeID = hexadecimal(2)
        try await world.controller.report(report)
        #expect(try await world.clone("new").replicas.map(\.node) == ["a", "c"])
        world.test.clock.advance(Controller.nodeSilenceMaxMilliseconds + 1)
        let error = await #expect(throws: ControlError.self) {
            _ = try await world.clone("next")
        }
        #expect(error?.code == .precondition)
    }

    /// Nodes that are about to report hold replicas to take layers from: a clone that was asked for
    /// just then would have got fewer copies than it should.
    @Test func aYoungControllerWaitsForItsNodes() async throws {
        let world = try await World()
        try await world.add("s", created: 5)
        let quiet = Logger(label: "test") { _ in SwiftLogNoOpLogHandler() }
        let young = Controller(store: world.test.store, recordService: "h:1", logger: quiet)
        for name in ["a", "b"] {
            var report = Haptera_V1_NodeReport()
            report.name = name
            report.nodeID = hexadecimal(name == "a" ? 1 : 2)
            report.replicas = try await world.desired(on: name).map {
                var replica = Haptera_V1_ReplicaReport()
                replica.replicaID = $0.replicaID
                replica.state = .running
                return replica
            }
            try await young.report(report)
        }
        let wanted = try VolumeSpecification(
            name: "new", sizeBytes: 0, replicas: 0, nodes: [],
            source: CloneSource(volume: "vol", snapshot: "s"))
        let error = await #expect(throws: ControlError.self) { _ = try await young.create(wanted) }
        #expect(error?.code == .unavailable)
        // One that is there is told of at once.
        _ = try await world.controller.create(wanted)
        #expect(try await young.create(wanted).replicas.count == 3)
    }
}
