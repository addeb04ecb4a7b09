import HapteraAPI
import HapteraCore
import Logging
import Testing

@testable import HapteraControl

/// A clone that is filled, over stand-ins of nodes and engines: `vol` is on a, b and c, not
/// attached, with a snapshot `s`; d, e and f have nothing of it.
@Suite(.timeLimit(.minutes(5))) struct FillingTests {
    private static let quiet = Logger(label: "test") { _ in SwiftLogNoOpLogHandler() }

    private final class World {
        static let nodes = ["a", "b", "c", "d", "e", "f"]
        let test: TestStore
        var controller: Controller
        var alive = Set(nodes)
        /// Engines leave the record as it is.
        var isHanging = false
        private var streams: [AsyncStream<Haptera_V1_AgentTask>] = []

        init() async throws {
            test = try TestStore()
            controller = Controller(store: test.store, recordService: "h:1", logger: quiet)
            _ = try await test.makeVolume()
            for (index, name) in Self.nodes.enumerated().dropFirst(3) {
                try await test.store.registerNode(
                    NodeRow(
                        name: name, nodeID: hexadecimal(UInt64(index + 1)), address: "127.0.0.1",
                        directory: "/\(name)", version: "1", pid: 1))
            }
            try await swap("vol") {
                $0.change = .snapshot
                $0.snapshots.append(.init(layer: $0.head, name: "s", created: 5))
                $0.layers.append(LayerID(rawValue: $0.head.rawValue + 1))
            }
            try await swap("vol") { $0.isClean = true }
            await connect()
            try await round()
        }

        private func connect() async {
            streams = []
            for node in Self.nodes {
                streams.append(await controller.tasks.watch(node, nodeID: ""))
            }
        }

        /// Another one takes the controller's place.
        func restart() async throws {
            controller = Controller(store: test.store, recordService: "h:1", logger: quiet)
            await connect()
        }

        func clone(_ nodes: [String], replicas: UInt32 = 0) async throws -> Haptera_V1_Volume {
            try await controller.create(
                VolumeSpecification(
                    name: "new", sizeBytes: 0, replicas: replicas, nodes: nodes,
                    source: CloneSource(volume: "vol", snapshot: "s")))
        }

        var stored: StoredVolume { get async throws { try await test.store.volume(named: "new") } }
        var view: Haptera_V1_Volume {
            get async throws { try await controller.volume(named: "new") }
        }
        func row(_ node: String) async throws -> ReplicaRow {
            try #require(try await stored.replicas.first { $0.node == node })
        }
        var nodes: [String] {
            get async throws {
                try await stored.replicas.map { $0.node + ($0.isTemporary ? " (temporary)" : "") }
            }
        }
        func count(_ kind: String) async throws -> Int {
            try await test.store.events(after: 0, limit: 1000).count { $0.kind == kind }
        }
        var engines: [String: Haptera_V1_DesiredEngine.Phase] {
            get async throws {
                var found: [String: Haptera_V1_DesiredEngine.Phase] = [:]
                for (index, name) in Self.nodes.enumerated() {
                    let desired = try await controller.desired(
                        for: name, nodeID: hexadecimal(UInt64(index + 1)))
                    if let engine = desired.engines.first { found[name] = engine.phase }
                }
                return found
            }
        }

        func swap(_ name: String, _ change: (inout VolumeRecord) -> Void) async throws {
            let record = try #require(try await test.store.volume(named: name).record)
            let next = record.next(nonce: UInt64.random(in: 1 ... .max), change)
            let result = try await test.store.compareAndSwap(
                record.volume, expected: record.epoch, proposal: next.encoded())
            #expect(result == .swapped)
        }

        /// The engine takes the replica there up.
        func join(_ node: String) async throws {
            let member = try #require(try await row(node).member)
            try await swap("new") { $0.joining = member }
            try await round()
        }
        func promote(_ node: String) async throws {
            let member = try #require(try await row(node).member)
            try await swap("new") {
                $0.joining = nil
                $0.inSync.append(member)
            }
        }
        func fill(_ node: String) async throws {
            try await join(node)
            try await promote(node)
            try await rounds()
        }
        func rounds(_ count: Int = 4) async throws { for _ in 0..<count { try await round() } }

        /// Everybody who is alive does what is wanted and says so; then the controller looks.
        func round() async throws {
            for (index, name) in Self.nodes.enumerated() where alive.contains(name) {
                let id = hexadecimal(UInt64(index + 1))
                let desired = try await controller.desired(for: name, nodeID: id)
                var report = Haptera_V1_NodeReport()
                report.name = name
                report.nodeID = id
                report.replicas = desired.replicas.map { .init(obeying: $0, on: name, index) }
                for wanted in desired.engines { report.engines.append(try await engine(wanted)) }
                try await controller.report(report)
            }
            try await controller.upkeep()
            try await controller.tendMaintenances()
        }

        private func engine(
            _ wanted: Haptera_V1_DesiredEngine
        ) async throws -> Haptera_V1_EngineReport {
            if !isHanging { try await obey(wanted) }
            let stored = try await test.store.volume(named: wanted.volume)
            var report = Haptera_V1_EngineReport()
            report.volumeID = wanted.volumeID
            report.clientGeneration = wanted.clientGeneration
            let hasLeft = wanted.phase == .detach && stored.record?.isClean == true
            report.state = hasLeft ? .detached : .serving
            report.pid = 7
            for endpoint in wanted.replicas {
                let row = try stored.replica(endpoint.replicaID)
                var view = Haptera_V1_EngineReplicaReport()
                view.replicaID = row.id
                view.state =
                    !alive.contains(row.node)
                    ? "absent"
                    : stored.isMember(row)
                        ? "inSync" : stored.isJoining(row) ? "joining" : "failed"
                report.replicas.append(view)
                guard stored.isJoining(row) else { continue }
                var rebuild = Haptera_V1_RebuildReport()
                rebuild.replicaID = row.id
                rebuild.kind = "rebuild"
                rebuild.phase = "copying"
                rebuild.regionsDone = 30
                rebuild.regionsTotal = 100
                report.rebuilds = [rebuild]
            }
            return report
        }

        /// As engines do: takes over, does without those that are gone or not wanted, leaves.
        private func obey(_ wanted: Haptera_V1_DesiredEngine) async throws {
            let stored = try await test.store.volume(named: wanted.volume)
            let record = try #require(stored.record)
            if wanted.phase == .detach {
                guard !record.isClean else { return }
                return try await swap(wanted.volume) {
                    $0.isClean = true
                    $0.joining = nil
                }
            }
            if record.clientGeneration < wanted.clientGeneration {
                try await swap(wanted.volume) {
                    $0.isClean = false
                    $0.clientGeneration = wanted.clientGeneration
                }
            }
            let told = Set(wanted.replicas.map(\.replicaID))
            let usable = stored.replicas.filter { told.contains($0.id) && alive.contains($0.node) }
            let left = record.inSync.filter(usable.compactMap(\.member).contains)
            if !left.isEmpty, left != record.inSync {
                try await swap(wanted.volume) { $0.inSync = left }
            }
        }
    }

    @Test func elsewhereThanTheSource() async throws {
        let world = try await World()
        #expect(try await world.clone(["d", "e"]).state == .creating)
        try await world.rounds(3)
        #expect(try await world.nodes == ["d", "e", "a (temporary)", "b (temporary)"])
        #expect(try await world.engines == ["a": .maintain])
        var view = try await world.view
        #expect(view.state == .detached && view.robustness == .degraded && !view.hasEngine)
        #expect(view.reason == "its replicas are being filled, 0 of 2 are in sync")
        #expect(view.replicas.map(\.temporary) == [false, false, true, true])
        #expect(view.filling.replicasDone == 0 && view.filling.replicasTotal == 2)
        try await world.join("d")
        view = try await world.view
        let d = try await world.row("d").id
        #expect(
            view.reason
                == "its replicas are being filled, 0 of 2 are in sync, replica \(d) on node d is "
                + "at 30%")
        #expect(view.rebuilds.map(\.replicaID) == [d] && view.filling.regionsDone == 30)
        try await world.promote("d")
        try await world.rounds()
        // Never before all are.
        #expect(try await world.nodes.count == 4)
        #expect(try await world.view.filling.replicasDone == 1)
        try await world.join("e")
        try await world.promote("e")
        try await world.round()
        #expect(try await world.stored.volume.isFilling == false)
        #expect(try await world.view.hasFilling, "the temporary ones are there")
        try await world.rounds()
        #expect(try await world.nodes == ["d", "e"])
        view = try await world.view
        #expect(view.robustness == .healthy && view.state == .detached && view.reason.isEmpty)
        #expect(!view.hasFilling && view.replicaCount == 2)
        #expect(try await world.engines.isEmpty)
        #expect(try await world.stored.record?.isClean == true)
        #expect(try await world.test.store.discardedReplicas().isEmpty)
        #expect(try await world.count("MaintenanceBegun") == 1)
        #expect(try await world.count("MaintenanceEnded") == 1)
        #expect(try await world.count("VolumeFilled") == 1)
        #expect(try await world.count("ReplicaDataRemoved") == 2)
        try await world.rounds()
        #expect(try await world.count("MaintenanceBegun") == 1)
        // The same command finds it done.
        #expect(try await world.clone(["d", "e"]).robustness == .healthy)
    }

    /// One that shares is enough to be there at once; the other is filled all the same.
    @Test func aMixedOneIsFilledToo() async throws {
        let world = try await World()
        _ = try await world.clone(["a", "d"], replicas: 2)
        try await world.rounds()
        #expect(try await world.nodes == ["a", "d"])
        #expect(try await world.engines == ["a": .maintain])
        try await world.fill("d")
        #expect(try await world.engines.isEmpty)
        #expect(try await world.view.robustness == .healthy)
        #expect(try await world.stored.volume.isFilling == false)
    }

    @Test func whoAttachesTakesOver() async throws {
        let world = try await World()
        _ = try await world.clone(["d", "e"])
        try await world.rounds()
        try await world.join("d")
        #expect(try await world.controller.attach("new", node: "d").state == .attaching)
        // Nobody keeps the other engine: it is told to leave at once.
        #expect(try await world.engines == ["a": .detach])
        #expect(await world.controller.maintenances.isEmpty)
        try await world.rounds()
        #expect(try await world.engines == ["d": .attach])
        #expect(try await world.view.state == .attached)
        try await world.fill("e")
        // Detached in the middle: goes on without clients.
        _ = try await world.controller.detach("new")
        try await world.rounds()
        #expect(try await world.engines.values.sorted { $0.rawValue < $1.rawValue } == [.maintain])
        _ = try await world.controller.attach("new", node: "e")
        try await world.rounds()
        try await world.fill("d")
        try await world.rounds()
        // Attached or not: the temporary ones go.
        #expect(try await world.nodes == ["d", "e"])
        #expect(try await world.engines == ["e": .attach])
        #expect(try await world.view.robustness == .healthy)
    }

    @Test func theNextControllerGoesOn() async throws {
        let world = try await World()
        _ = try await world.clone(["d", "e"])
        try await world.rounds()
        try await world.join("d")
        try await world.restart()
        // Its engine's node is heard of before the one that is filled.
        world.alive = ["a"]
        try await world.round()
        world.alive = Set(World.nodes)
        try await world.rounds()
        #expect(try await world.engines == ["a": .maintain])
        #expect(try await world.count("MaintenanceBegun") == 1)
        try await world.promote("d")
        try await world.fill("e")
        try await world.restart()
        try await world.rounds()
        #expect(try await world.nodes == ["d", "e"])
        #expect(try await world.count("MaintenanceBegun") == 1)
        #expect(try await world.count("MaintenanceEnded") == 1)
    }

    /// The node of one that shares dies: the other is there. It is not filled again.
    @Test func aTemporaryOneMayBeLost() async throws {
        let world = try await World()
        _ = try await world.clone(["d", "e"])
        try await world.rounds()
        try await world.fill("d")
        world.alive.remove("a")
        world.test.clock.advance(Controller.nodeSilenceMaxMilliseconds + 1)
        try await world.rounds()
        let lost = try await world.row("a")
        #expect(try await world.stored.isMember(lost) == false)
        // On another node.
        #expect(try await world.engines.filter { $0.value == .maintain }.count == 1)
        world.alive.insert("a")
        try await world.rounds()
        #expect(try await world.stored.isForEngine(lost) == false)
        try await world.fill("e")
        #expect(try await world.nodes == ["d", "e"])
        #expect(try await world.view.robustness == .healthy)
        try await world.rounds()
        #expect(try await world.test.store.discardedReplicas().isEmpty)
    }

    /// All that share are gone, and nothing was filled: it waits for them, and says so.
    @Test func withoutAnyMemberItWaits() async throws {
        let world = try await World()
        _ = try await world.clone(["d", "e"])
        try await world.rounds()
        world.alive = ["c", "d", "e", "f"]
        world.test.clock.advance(Controller.nodeSilenceMaxMilliseconds + 1)
        try await world.rounds()
        let view = try await world.view
        #expect(view.robustness == .stalled)
        #expect(try await world.nodes.count == 4)
        world.alive = Set(World.nodes)
        try await world.rounds()
        try await world.fill("d")
        try await world.fill("e")
        #expect(try await world.nodes == ["d", "e"])
    }

    /// Between the decision and the engine's removal a lasting one is lost.
    @Test func theTemporaryOnesStayIfTheyAreNeeded() async throws {
        let world = try await World()
        _ = try await world.clone(["d", "e"])
        try await world.rounds()
        try await world.fill("d")
        world.isHanging = true
        try await world.join("e")
        try await world.promote("e")
        try await world.round()
        #expect(try await world.row("a").phase == .leave)
        let e = try #require(try await world.row("e").member)
        try await world.swap("new") { $0.inSync.removeAll { $0 == e } }
        try await world.round()
        #expect(try await world.row("a").phase == .run)
        #expect(try await world.stored.volume.isFilling)
        #expect(try await world.count("VolumeFillingResumed") == 1)
        world.isHanging = false
        try await world.fill("e")
        try await world.rounds()
        #expect(try await world.nodes == ["d", "e"])
    }

    /// A node that stays away is done without, though nobody has attached the volume.
    @Test func aLastingOneThatStaysAwayIsReplaced() async throws {
        let world = try await World()
        _ = try await world.clone(["d", "e"])
        try await world.rounds()
        var settings = Haptera_V1_VolumeSettings()
        settings.staleReplicaTimeoutMilliseconds = 60_000
        _ = try await world.controller.update("new", settings)
        try await world.fill("d")
        world.alive.remove("e")
        for _ in 0..<9 {
            world.test.clock.advance(9000)
            try await world.round()
        }
        let new = try #require(try await world.stored.replicas.first { $0.replaces != nil })
        try await world.rounds()
        try await world.fill(new.node)
        try await world.rounds()
        #expect(try await world.nodes == ["d", new.node])
        #expect(try await world.view.robustness == .healthy)
    }

    @Test func oneThatIsDeletedIsNotFilled() async throws {
        let world = try await World()
        _ = try await world.clone(["d", "e"])
        try await world.rounds()
        try await world.join("d")
        let controller = world.controller
        async let deletion: Void = controller.delete("new")
        for _ in 0..<50 where try await world.test.store.volumes().count > 1 {
            try await world.round()
        }
        try await deletion
        try await world.rounds()
        #expect(try await world.test.store.volumes().map(\.volume.name) == ["vol"])
        #expect(await world.controller.maintenances.isEmpty)
    }

    /// The source is nobody's concern once its layers are shared.
    @Test func theSourceMayGo() async throws {
        let world = try await World()
        _ = try await world.clone(["d", "e"])
        await #expect(throws: ControlError.self) { try await world.controller.delete("vol") }
        try await world.rounds()
        try await world.controller.delete("vol")
        try await world.rounds()
        try await world.fill("d")
        try await world.fill("e")
        #expect(try await world.nodes == ["d", "e"])
        #expect(try await world.test.store.volumes().count == 1)
    }

    @Test func whatIsTemporaryIsNotForPeople() async throws {
        let world = try await World()
        _ = try await world.clone(["d", "e"])
        try await world.rounds()
        let row = try await world.row("a")
        let words =
            "replica \(row.id) of volume 'new' is temporary: it goes by itself when 2 others are "
            + "in sync; see 'storagectl volume show new'"
        let replacing = await #expect(throws: ControlError.self) {
            _ = try await world.controller.replace(row.id, of: "new", node: "f")
        }
        #expect(replacing?.message == words)
        let deleting = await #expect(throws: ControlError.self) {
            _ = try await world.controller.deleteReplica(row.id, of: "new", discardKept: false)
        }
        #expect(deleting?.message == words)
        // One that is not a member any more is nobody's loss, and none that is counted.
        let member = try #require(row.member)
        try await world.swap("new") { $0.inSync.removeAll { $0 == member } }
        let now = try await world.controller.deleteReplica(row.id, of: "new", discardKept: false)
        #expect(now.replicaCount == 2)
        #expect(try await world.nodes == ["d", "e", "b (temporary)"])
        // With one less to fill the volume is done.
        let other = try await world.row("e")
        try await world.fill("d")
        _ = try await world.controller.deleteReplica(other.id, of: "new", discardKept: false)
        try await world.rounds()
        #expect(try await world.nodes == ["d"])
    }
}
