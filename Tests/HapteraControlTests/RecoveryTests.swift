import HapteraAPI
import HapteraCore
import Logging
import Synchronization
import Testing

@testable import HapteraControl

/// A controller over stand-ins for three node agents, whose replicas are what the test says.
final class Bench: Sendable {
    struct Copy: Sendable {
        var node: String
        var json: String
        var isRunning: Bool
    }
    let test: TestStore
    let controller: Controller
    let copies = Mutex<[String: Copy]>([:])
    let engines = Mutex<[Haptera_V1_RunningEngine]>([])
    let ended = Mutex<[String]>([])
    let faults = Mutex<[Haptera_V1_InjectFault]>([])
    private static let quiet = Logger(label: "test") { _ in SwiftLogNoOpLogHandler() }

    init(_ test: TestStore) async throws {
        self.test = test
        controller = Controller(store: test.store, recordService: "h:1", logger: Self.quiet)
        try await test.addNodes(["a", "b", "c"])
        for node in ["a", "b", "c"] {
            let tasks = await controller.tasks.watch(node, nodeID: "")
            Task { [weak self] in
                for await task in tasks {
                    guard let answer = self?.answer(task, node) else { return }
                    await self?.controller.tasks.answered(answer)
                }
            }
        }
    }

    private func answer(_ task: Haptera_V1_AgentTask, _ node: String) -> Haptera_V1_AgentAnswer {
        var answer = Haptera_V1_AgentAnswer()
        answer.name = node
        answer.taskID = task.id
        let mine = copies.withLock { $0.filter { $0.value.node == node } }
        switch task.task {
        case .inspect(let request):
            let ids = request.replicaIds.isEmpty ? mine.keys.sorted() : request.replicaIds
            if request.replicaIds.isEmpty, node == "a" { answer.engines = engines.withLock { $0 } }
            answer.replicas = ids.map { id in
                var replica = Haptera_V1_InspectedReplica()
                replica.replicaID = id
                replica.directory = "/\(node)/\(id)"
                replica.json = mine[id]?.json ?? ""
                if mine[id] == nil { replica.error = "its directory is gone" }
                return replica
            }
        case .fault(let fault): faults.withLock { $0.append(fault) }
        case .endEngine(let request): ended.withLock { $0.append(request.volumeID) }
        default: answer.error = "no"
        }
        return answer
    }

    /// What a replica's directory says, as `inspect --json` prints it.
    func place(
        _ row: ReplicaRow, _ record: VolumeRecord?, promise: UInt64, births: [(Int, Int)] = [],
        running: Bool
    ) {
        let hex = (record?.encoded() ?? []).map { hexadecimal(UInt64($0)).suffix(2) }.joined()
        let counts = births.map { "{\"epoch\":\($0.0),\"regions\":\($0.1)}" }
        let json = """
            {"volume":"\(row.volumeID)","name":"vol","replica":"\(row.id)",\
            "incarnation":"\(row.incarnation)","sizeBytes":1073741824,"promise":\(promise),\
            "record":"\(hex)","flushedEpoch":\(promise),"flushedSequence":5,\
            "births":[\(counts.joined(separator: ","))],"olderRegions":0,"activeRegions":0}
            """
        copies.withLock { $0[row.id] = Copy(node: row.node, json: json, isRunning: running) }
    }

    /// Every node reports its replicas, and node a an engine.
    func report(engine: Haptera_V1_EngineReport? = nil) async throws {
        for (index, node) in ["a", "b", "c"].enumerated() {
            var report = Haptera_V1_NodeReport()
            report.name = node
            report.nodeID = hexadecimal(UInt64(index + 1))
            if node == "a", let engine { report.engines = [engine] }
            report.replicas = copies.withLock { $0.filter { $0.value.node == node } }.map {
                id, copy in
                var replica = Haptera_V1_ReplicaReport()
                replica.replicaID = id
                replica.state = copy.isRunning ? .running : .failed
                replica.address = "127.0.0.1:20000"
                replica.directory = "/\(node)/\(id)"
                return replica
            }
            try await controller.report(report)
        }
    }

    func swap(
        _ record: VolumeRecord, _ change: VolumeRecord.Change,
        _ edit: (inout VolumeRecord) -> Void
    ) async throws -> VolumeRecord {
        let next = record.next(nonce: UInt64.random(in: 1 ... .max)) {
            $0.change = change
            edit(&$0)
        }
        let result = try await test.store.compareAndSwap(
            next.volume, expected: record.epoch, proposal: next.encoded())
        #expect(result == .swapped)
        return next
    }

    /// A volume whose replica on c left in epoch 3, and whose members died later.
    func makeStranded() async throws -> (volume: StoredVolume, record: VolumeRecord) {
        let volume = try await test.makeVolume()
        var record = try #require(volume.record)
        let lost = record.inSync[2]
        record = try await swap(record, .takeover) { $0.engineEndpoint = "h:1" }
        let atDeparture = record
        record = try await swap(record, .removal) {
            $0.inSync.removeLast()
            $0.out = [
                .init(
                    member: lost, leftEpoch: $0.epoch, stablePoint: .zero, reason: .disconnected)
            ]
        }
        for row in volume.replicas {
            let isOut = row.member == lost
            place(
                row, isOut ? atDeparture : record, promise: isOut ? 2 : 3,
                births: isOut ? [(2, 4)] : [(3, 6), (2, 4)], running: isOut)
        }
        try await report()
        return (try await test.store.volume(named: "vol"), record)
    }

    func kinds() async throws -> [String] {
        try await test.store.events(after: 0, limit: 100).map(\.kind)
    }
}

@Suite struct SalvageTests {
    private func request(_ replica: String = "", epoch: UInt64 = 0)
        -> Haptera_V1_SalvageVolumeRequest
    {
        var request = Haptera_V1_SalvageVolumeRequest()
        request.name = "vol"
        request.replicaID = replica
        request.expectedEpoch = epoch
        return request
    }

    @Test func showsWhatWouldBeLostAndGoesOn() async throws {
        let bench = try await Bench(TestStore())
        let (volume, record) = try await bench.makeStranded()
        let survivor = volume.replicas[2]
        let plan = try await bench.controller.salvage(request())
        #expect(plan.objection.isEmpty)
        #expect(plan.choices.map(\.replicaID) == [survivor.id])
        #expect(plan.choices[0].lostFromEpoch == 3)
        #expect(plan.choices[0].regionsMax == 6)
        #expect(plan.choices[0].measured)
        // `why` shows the same, and what it waits for.
        let why = try await bench.controller.explain("vol", all: false)
        #expect(why.choices == plan.choices)
        #expect(why.waitsFor.hasPrefix("one of: replica \(volume.replicas[0].id) on a"))

        // Nothing was done; nor is it for another epoch than the one that was shown.
        #expect(try await bench.test.store.volume(named: "vol").record == record)
        await #expect(throws: ControlError.self) {
            try await bench.controller.salvage(request(survivor.id, epoch: 2))
        }
        await #expect(throws: ControlError.self) {
            try await bench.controller.salvage(request(volume.replicas[0].id, epoch: 3))
        }
        _ = try await bench.controller.salvage(request(survivor.id, epoch: 3))
        let after = try #require(try await bench.test.store.volume(named: "vol").record)
        #expect(after.epoch == Epoch(4))
        #expect(after.inSync.map(\.replica.text) == [survivor.id])
        #expect(after.out.map(\.isKept) == [true, true])
        #expect(after.lineage.map(\.survivor.text) == [survivor.id])
        #expect(try await bench.kinds().contains("VolumeSalvaged"))
        let text = try await bench.controller.explain("vol", all: false).changes.last?.text
        #expect(text?.hasPrefix("salvaged: goes on from replica \(survivor.id) on c") == true)
    }

    @Test func isRefusedWhileAMemberCanBeReached() async throws {
        let bench = try await Bench(TestStore())
        let (volume, record) = try await bench.makeStranded()
        bench.place(volume.replicas[0], record, promise: 3, running: true)
        try await bench.report()
        let plan = try await bench.controller.salvage(request())
        #expect(plan.objection.contains("can be reached"))
        await #expect(throws: ControlError.self) {
            try await bench.controller.salvage(request(volume.replicas[2].id, epoch: 3))
        }
        #expect(try await bench.test.store.volume(named: "vol").record == record)
    }

    /// An engine nobody hears of may go on serving the copies that are given up.
    @Test func anAttachedVolumesEngineIsEndedOrDeclaredGone() async throws {
        let bench = try await Bench(TestStore())
        let (volume, _) = try await bench.makeStranded()
        let attached = try await bench.test.store.attachVolume("vol", node: "a", ready: ["a"])
        bench.test.clock.advance(Controller.nodeSilenceMaxMilliseconds + 1)
        let silent = try await bench.controller.salvage(request())
        #expect(silent.objection.contains("--engine-is-gone"))
        var gone = request()
        gone.engineIsGone = true
        // The survivor's node was silent as well, but could be asked.
        #expect(try await bench.controller.salvage(gone).objection.isEmpty)

        var engine = Haptera_V1_EngineReport()
        engine.volumeID = attached.volume.id
        engine.clientGeneration = 1
        engine.state = .serving
        try await bench.report(engine: engine)
        #expect(try await bench.controller.salvage(request()).objection.contains("being served"))
        engine.state = .stalled
        try await bench.report(engine: engine)
        _ = try await bench.controller.salvage(request(volume.replicas[2].id, epoch: 3))
        #expect(bench.ended.withLock { $0 } == [attached.volume.id])
        #expect(try await bench.test.store.volume(named: "vol").volume.attachedNode == "a")
    }

    @Test func losersStayUntilSomebodyDecides() async throws {
        let bench = try await Bench(TestStore())
        let (volume, record) = try await bench.makeStranded()
        var replica = Haptera_V1_ReplicaRequest()
        replica.volume = "vol"
        replica.replicaID = volume.replicas[2].id
        // Any copy may be needed while no member is there.
        await #expect(throws: ControlError.self) {
            try await bench.controller.deleteReplica(
                replica.replicaID, of: "vol", discardKept: true)
        }
        _ = try await bench.controller.salvage(request(volume.replicas[2].id, epoch: 3))
        bench.place(volume.replicas[0], record, promise: 3, running: true)
        bench.place(volume.replicas[1], record, promise: 3, running: true)
        try await bench.report()
        // Not the survivor.
        await #expect(throws: ControlError.self) { try await bench.controller.rejoin(replica) }
        // No engine takes a loser back.
        let salvaged = try #require(try await bench.test.store.volume(named: "vol").record)
        let stolen = salvaged.next(nonce: 9) {
            $0.change = .join
            $0.joining = record.inSync[0]
        }
        guard
            case .invalid = try await bench.test.store.compareAndSwap(
                stolen.volume, expected: salvaged.epoch, proposal: stolen.encoded())
        else {
            Issue.record("an engine took a kept replica")
            return
        }
        replica.replicaID = volume.replicas[0].id
        _ = try await bench.controller.rejoin(replica)
        let rejoined = try #require(try await bench.test.store.volume(named: "vol").record)
        #expect(rejoined.out.map(\.isKept) == [false, true])
        #expect(rejoined.epoch == salvaged.epoch.next)
        _ = try await bench.swap(rejoined, .join) { $0.joining = record.inSync[0] }

        replica.replicaID = volume.replicas[1].id
        // A deletion does without the bytes only if that is said.
        bench.place(volume.replicas[2], rejoined, promise: 5, running: true)
        try await bench.report()
        await #expect(throws: ControlError.self) {
            try await bench.controller.deleteReplica(
                replica.replicaID, of: "vol", discardKept: false)
        }
        _ = try await bench.controller.deleteReplica(
            replica.replicaID, of: "vol", discardKept: true)
        #expect(try await bench.test.store.volume(named: "vol").replicas.count == 2)
    }
}

@Suite struct RecordRulesTests {
    private let members = (1...3).map {
        VolumeRecord.Member(
            replica: ReplicaID(rawValue: $0), incarnation: Incarnation(rawValue: 1))
    }
    private func record() -> VolumeRecord {
        var record = VolumeRecord(
            volume: VolumeID(high: 1, low: 2), name: "vol", epoch: Epoch(5), nonce: 1,
            size: 1 << 20, inSync: Array(members.prefix(2)))
        record.out = [
            .init(
                member: members[2], leftEpoch: Epoch(4), stablePoint: .zero, reason: .silent)
        ]
        return record
    }
    private func objection(
        _ current: VolumeRecord, by writer: RecordWriter = .engine,
        _ edit: (inout VolumeRecord) -> Void
    ) -> String? {
        RecordRules(after: current, known: Set(members))
            .objection(to: current.next(nonce: 2, edit), by: writer)
    }

    @Test func aReplicaEntersByTheRules() {
        let enter: (inout VolumeRecord) -> Void = {
            $0.inSync.append(members[2])
            $0.out = []
        }
        #expect(
            objection(record()) {
                enter(&$0); $0.change = .promotion
            } != nil)
        #expect(
            objection(record()) {
                enter(&$0); $0.change = .reinstatement
            } == nil)
        var filled = record()
        filled.joining = members[2]
        #expect(
            objection(filled) {
                enter(&$0); $0.joining = nil; $0.change = .promotion
            } == nil)
        var kept = record()
        kept.out[0].isKept = true
        #expect(
            objection(kept) {
                enter(&$0); $0.change = .reinstatement
            } != nil)
        #expect(
            objection(kept) {
                $0.joining = members[2]; $0.change = .join
            } != nil)
        #expect(
            objection(kept) {
                $0.out = []; $0.change = .takeover
            } != nil)
        #expect(objection(kept) { $0.change = .takeover } == nil)
    }

    @Test func onlyAnAdministratorSalvages() throws {
        let plan = SalvagePlan(
            record: record(),
            surveys: [ReplicaSurvey(member: members[2], promise: Epoch(3), installed: nil)])
        let salvaged = try #require(plan.choices.first?.record)
        let rules = RecordRules(after: record(), known: Set(members))
        #expect(rules.objection(to: salvaged, by: .administrator) == nil)
        #expect(rules.objection(to: salvaged, by: .engine) != nil)
        var wrong = salvaged
        wrong.lineage = []
        #expect(rules.objection(to: wrong, by: .administrator) != nil)
        wrong = salvaged
        wrong.out[0].isKept = false
        #expect(rules.objection(to: wrong, by: .administrator) != nil)
        wrong = salvaged
        wrong.inSync = [members[0]]
        #expect(rules.objection(to: wrong, by: .administrator) != nil)
        wrong = salvaged
        wrong.isClean = true
        #expect(rules.objection(to: wrong, by: .administrator) != nil)
    }

    @Test func aDecisionChangesNothingElse() {
        var kept = record()
        kept.out[0].isKept = true
        let change: (inout VolumeRecord) -> Void = { $0.change = .administration }
        #expect(
            objection(kept, by: .administrator) {
                change(&$0); $0.out[0].isKept = false
            } == nil)
        #expect(
            objection(kept, by: .administrator) {
                change(&$0); $0.out = []
            } == nil)
        #expect(
            objection(kept, by: .administrator) {
                change(&$0); $0.inSync.removeLast()
            } != nil)
        #expect(
            objection(kept, by: .administrator) {
                change(&$0); $0.joining = members[2]
            } != nil)
        #expect(
            objection(kept, by: .administrator) {
                change(&$0); $0.out[0].partedEpoch = Epoch(9)
            }
                != nil)
    }
}
