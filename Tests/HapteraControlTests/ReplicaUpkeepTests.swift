import HapteraAPI
import HapteraCore
import Logging
import Testing

@testable import HapteraControl

/// Replicas that stay away, on a clock that the test moves: three replicas on nodes a, b, c, the
/// engine on a, and nodes d and e to go to.
@Suite struct ReplicaUpkeepTests {
    private static let quiet = Logger(label: "test") { _ in SwiftLogNoOpLogHandler() }
    static let timeout: Int64 = 60_000

    final class World {
        let test: TestStore
        let controller: Controller
        /// Nodes that report.
        var alive: Set<String> = ["a", "b", "c", "d", "e"]
        var available: UInt64 = 100 << 30
        /// Replicas that say why they do not run, by id.
        var broken: [String: (state: Haptera_V1_ReplicaReport.State, reason: String)] = [:]
        /// Of the engine's view, what is not plain.
        var words: [String: String] = [:]
        /// The engine that reports, which the record names, too.
        static let engine = InstanceID(rawValue: 77)
        var instance = engine
        /// What the engine fills, as it says.
        var rebuilding: String?

        init() async throws {
            test = try TestStore()
            controller = Controller(store: test.store, recordService: "h:1", logger: quiet)
            _ = try await test.makeVolume()
            var settings = Haptera_V1_VolumeSettings()
            settings.staleReplicaTimeoutMilliseconds = UInt64(timeout)
            _ = try await test.store.updateVolume("vol", settings)
            for (index, name) in ["d", "e"].enumerated() {
                try await test.store.registerNode(
                    NodeRow(
                        name: name, nodeID: hexadecimal(UInt64(index + 4)), address: "127.0.0.1",
                        directory: "/\(name)", version: "1", pid: 1))
            }
            _ = try await test.store.attachVolume("vol", node: "a", ready: ["a"])
            try await swap { $0.engine = Self.engine }
            try await round()
        }

        var stored: StoredVolume {
            get async throws { try await test.store.volume(named: "vol") }
        }
        func replica(on node: String) async throws -> ReplicaRow {
            try #require(try await stored.replicas.first { $0.node == node })
        }
        var nodes: [String] {
            get async throws { try await stored.replicas.map(\.node) }
        }
        var kinds: [String] {
            get async throws { try await test.store.events(after: 0, limit: 1000).map(\.kind) }
        }

        /// Everybody who is alive does what is wanted and says so; then the controller looks.
        func round() async throws {
            for (index, name) in ["a", "b", "c", "d", "e"].enumerated() where alive.contains(name) {
                let id = hexadecimal(UInt64(index + 1))
                var report = Haptera_V1_NodeReport()
                report.name = name
                report.nodeID = id
                report.capacityBytes = 200 << 30
                report.availableBytes = available
                let desired = try await controller.desired(for: name, nodeID: id)
                report.replicas = desired.replicas.map {
                    var replica = Haptera_V1_ReplicaReport(
                        obeying: $0, on: name, index, allocated: 1 << 30)
                    guard let broken = broken[$0.replicaID] else { return replica }
                    (replica.state, replica.reason, replica.pid) = (broken.state, broken.reason, 0)
                    return replica
                }
                report.engines = try await desired.engines.asyncMap(engine)
                try await controller.report(report)
            }
            try await controller.upkeep()
        }

        private func engine(
            _ wanted: Haptera_V1_DesiredEngine
        ) async throws -> Haptera_V1_EngineReport {
            let stored = try await stored
            var report = Haptera_V1_EngineReport()
            report.volumeID = wanted.volumeID
            report.clientGeneration = wanted.clientGeneration
            report.state = .serving
            report.pid = 7
            report.instance = instance.rawValue
            report.epoch = stored.record?.epoch.rawValue ?? 0
            if let rebuilding {
                var rebuild = Haptera_V1_RebuildReport()
                rebuild.replicaID = rebuilding
                report.rebuilds = [rebuild]
            }
            for endpoint in wanted.replicas {
                let row = try stored.replica(endpoint.replicaID)
                var view = Haptera_V1_EngineReplicaReport()
                view.replicaID = row.id
                view.state =
                    words[row.node]
                    ?? (!alive.contains(row.node)
                        ? "absent"
                        : stored.isMember(row)
                            ? "inSync" : stored.isJoining(row) ? "joining" : "failed")
                report.replicas.append(view)
            }
            return report
        }

        /// In rounds of nine seconds.
        func pass(_ milliseconds: Int64) async throws {
            var left = milliseconds
            while left > 0 {
                test.clock.advance(min(left, 9000))
                left -= 9000
                try await round()
            }
        }

        /// The engine swaps the record.
        func swap(_ change: (inout VolumeRecord) -> Void) async throws {
            let record = try #require(try await stored.record)
            let next = record.next(nonce: UInt64.random(in: 1 ... .max), change)
            let result = try await test.store.compareAndSwap(
                record.volume, expected: record.epoch, proposal: next.encoded())
            #expect(result == .swapped)
        }

        /// The node falls silent and its replica is taken out.
        func lose(_ node: String) async throws {
            alive.remove(node)
            let member = try #require(try await replica(on: node).member)
            try await swap { $0.inSync.removeAll { $0 == member } }
            try await round()
        }
        /// The node is there, but the replica does not run.
        func breakDown(
            _ node: String, _ state: Haptera_V1_ReplicaReport.State, _ reason: String
        ) async throws {
            let row = try await replica(on: node)
            broken[row.id] = (state, reason)
            words[node] = "absent"
            try await swap { record in record.inSync.removeAll { $0 == row.member } }
            try await round()
        }
        /// It begins to be filled, and its node dies before that is done: no record tells.
        func loseWhileJoining(_ node: String) async throws {
            try await beginJoin(node)
            alive.remove(node)
            try await round()
        }
        func beginJoin(_ node: String) async throws {
            let member = try #require(try await replica(on: node).member)
            try await swap { $0.joining = member }
            try await round()
        }
        func join(_ node: String) async throws {
            let member = try #require(try await replica(on: node).member)
            try await swap { $0.joining = member }
            try await swap {
                $0.joining = nil
                $0.inSync.append(member)
            }
        }
    }

    @Test func aReplicaThatStaysAwayIsReplaced() async throws {
        let world = try await World()
        let lost = try await world.replica(on: "c")
        try await world.lose("c")
        try await world.pass(Self.timeout)
        #expect(try await world.nodes == ["a", "b", "c"])
        try await world.pass(9000)
        #expect(try await world.nodes == ["a", "b", "c", "d"])
        try await world.round()
        let new = try await world.replica(on: "d")
        #expect(new.phase == .run)
        #expect(new.replaces == lost.id)
        #expect(new.id != lost.id && new.incarnation != lost.incarnation)
        // The engine is told; the stale one is still of the volume until the new one is in sync.
        let desired = try await world.controller.desired(for: "a", nodeID: hexadecimal(1))
        #expect(desired.engines[0].replicas.map(\.replicaID).contains(new.id))
        try await world.pass(2 * Self.timeout)
        #expect(try await world.nodes == ["a", "b", "c", "d"])
        #expect(try await world.controller.volume(named: "vol").robustness == .degraded)
        try await world.join("d")
        try await world.round()
        try await world.round()
        #expect(try await world.nodes == ["a", "b", "d"])
        #expect(try await world.replica(on: "d").replaces == nil)
        #expect(try await world.controller.volume(named: "vol").robustness == .healthy)
        #expect(try await world.test.store.discardedReplicas(on: "c").map(\.id) == [lost.id])
        // Its node comes back, and is told to remove the data.
        world.alive.insert("c")
        let back = try await world.controller.desired(for: "c", nodeID: hexadecimal(3))
        #expect(back.replicas.map(\.phase) == [.remove])
        try await world.round()
        #expect(try await world.test.store.discardedReplicas().isEmpty)
        let kinds = try await world.kinds
        for kind in ["ReplicaReplacementStarted", "ReplicaReplaced", "ReplicaDataRemoved"] {
            #expect(kinds.count { $0 == kind } == 1, "\(kind)")
        }
    }

    @Test func oneThatComesBackInTimeIsNot() async throws {
        let world = try await World()
        try await world.lose("c")
        try await world.pass(Self.timeout - 20_000)
        world.alive.insert("c")
        try await world.round()
        // It waits for its turn to be filled, however long that takes.
        try await world.pass(2 * Self.timeout)
        #expect(try await world.nodes == ["a", "b", "c"])
        // Away again: counted anew.
        world.alive.remove("c")
        try await world.pass(Self.timeout - 20_000)
        #expect(try await world.nodes == ["a", "b", "c"])
    }

    /// A member is never replaced, however long its node says nothing: the engine decides first.
    @Test func aMemberIsNotReplaced() async throws {
        let world = try await World()
        world.alive.remove("c")
        world.words["c"] = "inSync"
        try await world.pass(2 * Self.timeout)
        #expect(try await world.nodes == ["a", "b", "c"])
    }

    @Test func zeroMeansNever() async throws {
        let world = try await World()
        var never = Haptera_V1_VolumeSettings()
        never.staleReplicaTimeoutMilliseconds = 0
        _ = try await world.controller.update("vol", never)
        try await world.lose("c")
        try await world.pass(10 * Self.timeout)
        #expect(try await world.nodes == ["a", "b", "c"])
    }

    @Test func oneAtATime() async throws {
        let world = try await World()
        try await world.lose("b")
        try await world.lose("c")
        try await world.pass(2 * Self.timeout)
        #expect(try await world.nodes == ["a", "b", "c", "d"])
        #expect(try await world.replica(on: "d").replaces == world.replica(on: "b").id)
        // Not all in sync yet: the first stale one stays until the volume needs it no more.
        try await world.join("d")
        try await world.pass(9000)
        #expect(try await world.nodes == ["a", "b", "c", "d"])
    }

    @Test func withoutASuitableNodeItSaysWhy() async throws {
        let world = try await World()
        world.available = 1 << 30
        try await world.lose("c")
        try await world.pass(Self.timeout + 20_000)
        #expect(try await world.nodes == ["a", "b", "c"])
        let reason = try await world.controller.volume(named: "vol").reason
        #expect(
            reason.contains(
                "no other ready node has room: node d has no room for a replica of volume 'vol' "
                    + "(1GiB): 1GiB are available (1GiB needed, 256MiB reserved)"), "\(reason)")
        #expect(try await world.kinds.count { $0 == "ReplicaNotReplaced" } == 1)
        world.alive = ["a", "b"]
        try await world.pass(20_000)
        let other = try await world.controller.volume(named: "vol").reason
        #expect(other.contains("every ready node holds a replica"), "\(other)")
        world.alive = ["a", "b", "d"]
        world.available = 100 << 30
        try await world.pass(9000)
        #expect(try await world.nodes == ["a", "b", "c", "d"])
        #expect(
            try await !world.controller.volume(named: "vol").reason.contains("cannot be replaced"))
    }

    /// All nodes have a replica, and one copy is damaged: it is made anew where it is. Not one of
    /// which the directory is not there: its disk may be back any moment.
    @Test func aDamagedCopyIsMadeAnewOnItsNode() async throws {
        let world = try await World()
        world.alive = ["a", "b", "c"]
        let lost = try await world.replica(on: "c")
        try await world.breakDown("c", .failed, "its directory /c is gone")
        try await world.pass(Self.timeout + 20_000)
        #expect(try await world.nodes == ["a", "b", "c"])
        let refusal = try await world.controller.volume(named: "vol").reason
        #expect(refusal.contains("is failed (its directory /c is gone)"), "\(refusal)")
        #expect(refusal.contains("replica replace vol \(lost.id) --node NODE"), "\(refusal)")
        world.broken[lost.id] = (.waiting, "process 5 ended with status 1: a page is damaged")
        try await world.pass(9000)
        #expect(try await world.nodes == ["a", "b", "c", "c"])
        let new = try #require(try await world.stored.replicas.first { $0.replaces == lost.id })
        world.words["c"] = nil
        try await world.swap { $0.joining = new.member }
        try await world.swap {
            $0.joining = nil
            if let member = new.member { $0.inSync.append(member) }
        }
        for _ in 0..<3 { try await world.round() }
        #expect(try await world.stored.replicas.map(\.id).contains(lost.id) == false)
        #expect(try await world.controller.volume(named: "vol").robustness == .healthy)
    }
    /// Where there is another node, that has it: the disk may be what is bad.
    @Test func aDamagedCopyIsRatherMadeElsewhere() async throws {
        let world = try await World()
        try await world.breakDown("c", .waiting, "process 5 ended with status 1: a page is damaged")
        try await world.pass(Self.timeout + 20_000)
        #expect(try await world.nodes == ["a", "b", "c", "d"])
    }

    /// The one that was away is in sync before its replacement: that is not needed any more.
    @Test func aReplacementIsGivenUpWhenTheOtherReturns() async throws {
        let world = try await World()
        try await world.lose("c")
        try await world.pass(Self.timeout + 20_000)
        let new = try await world.replica(on: "d")
        world.alive.insert("c")
        try await world.join("c")
        try await world.pass(9000)
        #expect(try await world.nodes == ["a", "b", "c"])
        #expect(try await world.controller.volume(named: "vol").robustness == .healthy)
        try await world.round()
        #expect(try await world.test.store.discardedReplicas().isEmpty)
        #expect(try await world.kinds.contains("ReplicaDiscarded"))
        #expect(try await world.stored.replicas.allSatisfy { $0.id != new.id })
    }

    @Test func aReplacementWhoseNodeGoesIsGivenUpToo() async throws {
        let world = try await World()
        try await world.lose("c")
        try await world.pass(Self.timeout + 20_000)
        world.alive.remove("d")
        try await world.pass(Self.timeout + 30_000)
        #expect(try await world.nodes == ["a", "b", "c", "e"])
    }

    /// While the controller did not look, it could not hear of anybody's return.
    @Test func aGapOfTheControllersDoesNotCount() async throws {
        let world = try await World()
        try await world.lose("c")
        try await world.pass(9000)
        world.test.clock.advance(10 * Self.timeout)
        try await world.pass(9000)
        #expect(try await world.nodes == ["a", "b", "c"])
    }

    @Test func aLoserOfASalvageIsKept() async throws {
        let world = try await World()
        let lost = try await world.replica(on: "c")
        try await world.lose("c")
        let member = try #require(lost.member)
        try await world.swap {
            $0.out.append(
                .init(
                    member: member, leftEpoch: $0.epoch, stablePoint: .zero, reason: .salvaged,
                    isKept: true))
        }
        try await world.pass(2 * Self.timeout)
        #expect(try await world.nodes == ["a", "b", "c"])
        for attempt in [
            { _ = try await world.controller.replace(lost.id, of: "vol", node: "d") },
            {
                _ = try await world.controller.deleteReplica(lost.id, of: "vol", discardKept: false)
            },
        ] as [() async throws -> Void] {
            await #expect(throws: ControlError.self) { try await attempt() }
        }
        _ = try await world.controller.deleteReplica(lost.id, of: "vol", discardKept: true)
        #expect(try await world.nodes == ["a", "b"])
    }

    // MARK: On request

    /// A replica in sync moves: the new one is in sync before the old one leaves, and the engine
    /// lets it go before its data does.
    @Test func aMoveOfAReplicaInSync() async throws {
        let world = try await World()
        let old = try await world.replica(on: "b")
        let volume = try await world.controller.replace(old.id, of: "vol", node: "e")
        #expect(volume.replicas.last?.replaces == old.id)
        // Again is harmless; another one has to wait.
        _ = try await world.controller.replace(old.id, of: "vol", node: nil)
        let other = try await world.replica(on: "c")
        await #expect(throws: ControlError.self) {
            try await world.controller.replace(other.id, of: "vol", node: nil)
        }
        try await world.pass(2 * Self.timeout)
        #expect(try await world.nodes == ["a", "b", "c", "e"])
        try await world.join("e")
        try await world.pass(9000)
        let leaving = try await world.replica(on: "b")
        #expect(leaving.phase == .leave)
        let engine = try await world.controller.desired(for: "a", nodeID: hexadecimal(1)).engines[0]
        #expect(!engine.replicas.map(\.replicaID).contains(old.id))
        let node = try await world.controller.desired(for: "b", nodeID: hexadecimal(2))
        #expect(node.replicas.map(\.phase) == [.run])
        let member = try #require(old.member)
        try await world.swap { $0.inSync.removeAll { $0 == member } }
        try await world.pass(18_000)
        #expect(try await world.nodes == ["a", "c", "e"])
        #expect(try await world.test.store.discardedReplicas().isEmpty)
    }

    @Test func aDeletedReplicaIsNotReplaced() async throws {
        let world = try await World()
        try await world.lose("c")
        let lost = try await world.replica(on: "c")
        let volume = try await world.controller.deleteReplica(
            lost.id, of: "vol", discardKept: false)
        #expect(volume.replicaCount == 2)
        #expect(volume.robustness == .healthy)
        try await world.pass(2 * Self.timeout)
        #expect(try await world.nodes == ["a", "b"])
        // What minInSync asks for stays.
        var two = Haptera_V1_VolumeSettings()
        two.minInSync = 2
        _ = try await world.controller.update("vol", two)
        let another = try await world.replica(on: "b")
        let error = await #expect(throws: ControlError.self) {
            try await world.controller.deleteReplica(another.id, of: "vol", discardKept: false)
        }
        #expect(error?.message.contains("would have 1 in sync, and needs 2") == true)
    }

    @Test func onlyAQuestionCanBeAnswered() async throws {
        let world = try await World()
        let error = await #expect(throws: ControlError.self) {
            try await world.controller.acceptLoss("vol", instance: 5)
        }
        #expect(error?.code == .precondition)
    }
}

extension Sequence {
    fileprivate func asyncMap<Result>(
        _ transform: (Element) async throws -> Result
    ) async rethrows -> [Result] {
        var results: [Result] = []
        for element in self { results.append(try await transform(element)) }
        return results
    }
}
