import GRPCCore
import HapteraAPI
import HapteraCore
import HapteraHost
import Logging
import Synchronization
import Testing

@testable import HapteraControl

/// Snapshots from the request to the record: a controller over a stand-in for the agent of the
/// node that serves, which swaps the record as an engine does.
@Suite struct SnapshotTests {
    /// What the engine of the stand-in does when it is asked.
    enum Engine {
        case obeys
        /// Says so, and does nothing.
        case claims
        case refuses
        /// No answer, though it goes on.
        case obeysInSilence
        /// The same, and somebody else takes a snapshot of that name before anyone has looked.
        case isOvertaken
        case isSilent
        /// A hold of its clients is over before it is released.
        case letsGo
        case cannotHold
    }

    final class World: Sendable {
        let test: TestStore
        let controller: Controller
        let engine = Mutex(Engine.obeys)
        let asked = Mutex<[Haptera_V1_TakeSnapshot]>([])
        let askedToDelete = Mutex<[Haptera_V1_DeleteSnapshot]>([])
        /// What is asked of an engine for a group.
        let steps = Mutex<[String]>([])
        /// By node, as its replica says.
        let layerBytes = Mutex<[String: [UInt32: UInt64]]>([:])
        let exclusiveBytes = Mutex<[String: [UInt32: UInt64]]>([:])
        let askedToRevert = Mutex<[Haptera_V1_RevertToSnapshot]>([])
        let askedToGrow = Mutex<[Haptera_V1_GrowVolume]>([])
        let needsDecision = Mutex(false)
        /// Engines answer later.
        let gate = Gate()
        /// Attachments whose engine has taken over, by its stand-in.
        private let served = Mutex<Set<UInt64>>([])
        /// What the engine says of the scrub that it is told to do.
        let scrub = Mutex<Haptera_V1_ScrubReport?>(nil)
        /// What an engine process says of damage.
        let damage = Mutex<(instance: UInt64, report: Haptera_V1_DamageReport)?>(nil)

        /// Three replicas on nodes a, b, c; the engine on a, unless it is not attached.
        init(attached: Bool = true) async throws {
            test = try TestStore()
            let quiet = Logger(label: "test") { _ in SwiftLogNoOpLogHandler() }
            controller = Controller(store: test.store, recordService: "h:1", logger: quiet)
            _ = try await test.makeVolume()
            if attached { _ = try await test.store.attachVolume("vol", node: "a", ready: ["a"]) }
            try await report()
            for node in ["a", "b", "c"] {
                let tasks = await controller.tasks.watch(node, nodeID: "")
                Task { [weak self] in
                    for await task in tasks { try await self?.perform(task, on: node) }
                }
            }
        }

        /// From here on nodes do what is wanted of them, and tell.
        func live(_ state: Haptera_V1_EngineReport.State = .serving) {
            let changes = controller.changes.watch()
            Task { [weak self] in
                for await _ in changes {
                    try await self?.report(state, obeyingOn: ["a", "b", "c"])
                }
            }
        }

        /// An engine takes over and leaves, as engines do it.
        private func obey(_ wanted: Haptera_V1_DesiredEngine) async throws {
            let attachment = wanted.clientGeneration
            if wanted.phase == .detach {
                guard try await record.isClean == false else { return }
                #expect(try await swap(.detach) { $0.isClean = true } == .swapped)
            } else if served.withLock({ $0.insert(attachment).inserted }) {
                let result = try await swap(.takeover) {
                    $0.isClean = false
                    $0.clientGeneration = attachment
                }
                #expect(result == .swapped)
            }
        }

        /// Every node says that what is wanted of it is so.
        func report(
            _ state: Haptera_V1_EngineReport.State = .serving, obeyingOn nodes: [String]? = nil
        ) async throws {
            for (index, name) in ["a", "b", "c"].enumerated()
            where nodes?.contains(name) != false {
                let id = hexadecimal(UInt64(index + 1))
                let desired = try await controller.desired(for: name, nodeID: id)
                if nodes != nil { for wanted in desired.engines { try await obey(wanted) } }
                var report = Haptera_V1_NodeReport()
                report.name = name
                report.nodeID = id
                report.replicas = desired.replicas.map { wanted in
                    var replica = Haptera_V1_ReplicaReport()
                    replica.replicaID = wanted.replicaID
                    replica.state = .running
                    replica.address = "127.0.0.1:2000\(index)"
                    replica.directory = "/\(name)"
                    replica.layerBytes = layerBytes.withLock { $0[name] ?? [:] }
                    replica.exclusiveBytes = exclusiveBytes.withLock { $0[name] ?? [:] }
                    return replica
                }
                report.engines = desired.engines.map { wanted in
                    var engine = Haptera_V1_EngineReport()
                    engine.volumeID = wanted.volumeID
                    engine.clientGeneration = wanted.clientGeneration
                    let hasLeft = nodes != nil && wanted.phase == .detach
                    engine.state = hasLeft ? .detached : state
                    engine.needsDecision = needsDecision.withLock { $0 } && !hasLeft
                    if let scrub = scrub(wanted) { engine.scrub = scrub }
                    if let damage = damage.withLock({ $0 }) {
                        (engine.instance, engine.damage) = damage
                    }
                    engine.uri = "nbd://h:2/vol"
                    engine.unixUri = "nbd+unix:///vol?socket=/d/e.nbd"
                    engine.replicas = wanted.replicas.map { endpoint in
                        var view = Haptera_V1_EngineReplicaReport()
                        view.replicaID = endpoint.replicaID
                        view.state = "inSync"
                        return view
                    }
                    return engine
                }
                try await controller.report(report)
            }
        }

        private func scrub(_ wanted: Haptera_V1_DesiredEngine) -> Haptera_V1_ScrubReport? {
            guard var report = scrub.withLock({ $0 }),
                var progress = ScrubProgress(text: wanted.scrub)
            else { return nil }
            progress.region = report.regionsDone
            (progress.bad, progress.repaired) = (report.blocksBad, report.blocksRepaired)
            report.progress = progress.text
            return report
        }

        private func perform(_ task: Haptera_V1_AgentTask, on node: String) async throws {
            var answer = Haptera_V1_AgentAnswer()
            answer.name = node
            await gate.pass()
            answer.taskID = task.id
            let engine = engine.withLock { $0 }
            switch task.task {
            case .takeSnapshot(let request):
                asked.withLock { $0.append(request) }
                #expect((request.hold == 0) == (request.holdMilliseconds == 0))
                steps.withLock { $0.append(request.hold == 0 ? "take" : "take and hold") }
                if engine == .cannotHold { answer.error = "another snapshot is being taken" }
                if [.obeys, .obeysInSilence, .letsGo].contains(engine) {
                    try await add(request.name, created: request.createdUnixMilliseconds)
                }
                if engine == .refuses { answer.error = "no space for another layer" }
            case .deleteSnapshot(let request):
                askedToDelete.withLock { $0.append(request) }
                steps.withLock { $0.append("delete") }
                if [.obeys, .obeysInSilence, .isOvertaken, .letsGo].contains(engine) {
                    try await remove(request.name)
                }
                if engine == .isOvertaken { try await add(request.name, created: 1) }
                if engine == .refuses {
                    answer.error = "2 clients read the snapshot; disconnect them first"
                }
            case .releaseChanges:
                steps.withLock { $0.append("release") }
                if engine == .letsGo { answer.error = "its clients went on" }
            case .revertToSnapshot(let request):
                askedToRevert.withLock { $0.append(request) }
                if engine == .obeys || engine == .obeysInSilence { try await goBack(request) }
                if engine == .refuses { answer.error = "1 client is connected" }
            case .growVolume(let request):
                askedToGrow.withLock { $0.append(request) }
                if engine == .obeys || engine == .obeysInSilence {
                    let result = try await swap(.resize) { $0.grow(to: request.sizeBytes) }
                    #expect(result == .swapped)
                }
                if engine == .refuses {
                    answer.error = "replica 1 has no space to grow; the volume keeps its size"
                }
            default: Issue.record("asked for something else: \(task)")
            }
            if [.obeysInSilence, .isOvertaken, .isSilent].contains(engine) {
                answer.error = "no answer"
                answer.inDoubt = true
            }
            await controller.tasks.answered(answer)
        }

        var record: VolumeRecord {
            get async throws {
                try #require(try await test.store.volume(named: "vol").record)
            }
        }

        func swap(
            _ kind: VolumeRecord.Change, _ change: @Sendable (inout VolumeRecord) -> Void
        ) async throws -> SwapResult {
            let record = try await record
            let next = record.next(nonce: .random(in: 1 ... .max)) {
                $0.change = kind
                change(&$0)
            }
            return try await test.store.compareAndSwap(
                record.volume, expected: record.epoch, proposal: next.encoded())
        }

        /// As the engine does it.
        func add(_ name: String, created: UInt64) async throws {
            guard try await record.snapshot(named: name) == nil else { return }
            let result = try await swap(.snapshot) {
                $0.isClean = false
                $0.snapshots.append(.init(layer: $0.head, name: name, created: created))
                $0.layers.append(LayerID(rawValue: $0.head.rawValue + 1))
            }
            #expect(result == .swapped)
        }

        /// As the engine does it.
        func goBack(_ request: Haptera_V1_RevertToSnapshot) async throws {
            let before = try await record
            guard before.snapshot(named: request.keep) == nil else { return }
            let target = try #require(before.snapshot(named: request.snapshot)).layer
            let result = try await swap(.revert) {
                $0.freezeHead(
                    request.keep, created: request.createdUnixMilliseconds, target: target)
            }
            #expect(result == .swapped)
        }

        /// As the engine does it.
        func remove(_ name: String) async throws {
            let result = try await swap(.snapshot) { record in
                record.snapshots.removeAll { $0.name == name }
            }
            #expect(result == .swapped)
        }

        /// `timeout`: milliseconds; 0: as usual.
        func create(
            _ name: String, of volume: String = "vol", timeout: UInt64 = 0
        ) async throws -> Haptera_V1_Snapshot {
            var request = Haptera_V1_CreateSnapshotRequest()
            request.volume = volume
            request.name = name
            request.timeoutMilliseconds = timeout
            return try await controller.createSnapshot(request)
        }

        /// How the request is refused.
        func refusal(
            _ name: String, of volume: String = "vol", timeout: UInt64 = 0
        ) async throws -> ControlError {
            let error = await #expect(throws: ControlError.self) {
                _ = try await self.create(name, of: volume, timeout: timeout)
            }
            return try #require(error)
        }

        /// What an engine that is asked at once may take.
        static func isAsUsual(_ timeouts: [UInt64]) -> Bool {
            let usual = Controller.snapshotTimeoutDefault
            return !timeouts.isEmpty
                && timeouts.allSatisfy { (usual - 10_000...usual).contains($0) }
        }

        var events: [EventRow] {
            get async throws { try await test.store.events(after: 0, limit: 100) }
        }
    }

    @Test func takenByTheEngineAndNamedByTheRecord() async throws {
        let world = try await World()
        world.test.clock.advance(234)
        let caller = Caller(actor: "ann@host", peer: "ipv4:10.0.0.1:5")
        let snapshot = try await Caller.$current.withValue(caller) {
            try await world.create("before-1.0")
        }
        #expect(snapshot.name == "before-1.0")
        #expect(snapshot.volume == "vol")
        #expect(snapshot.layer == 1)
        #expect(snapshot.createdUnixMilliseconds == world.test.clock.now)
        #expect(snapshot.uri == "nbd://h:2/vol@before-1.0")
        #expect(snapshot.unixUri == "nbd+unix:///vol@before-1.0?socket=/d/e.nbd")
        let asked = world.asked.withLock { $0 }
        #expect(asked.map(\.clientGeneration) == [1])
        #expect(World.isAsUsual(asked.map(\.timeoutMilliseconds)))
        #expect(try await world.controller.volume(named: "vol").snapshotCount == 1)
        let requested = try #require(
            try await world.events.first { $0.kind == "SnapshotRequested" })
        #expect(requested.subject == "volume/vol")
        #expect(requested.message == "snapshot before-1.0")
        #expect(requested.actor == "ann@host")
        #expect(requested.peer == "ipv4:10.0.0.1:5")
        let created = try #require(try await world.events.first { $0.kind == "SnapshotCreated" })
        #expect(created.message == "snapshot before-1.0, layer 1, epoch 2")
    }

    /// The engine is asked again, since only it knows that every member has it; the time stays.
    @Test func theSameNameAgainIsTheSameSnapshot() async throws {
        let world = try await World()
        let first = try await world.create("s")
        world.test.clock.advance(1000)
        try await world.report()
        #expect(try await world.create("s") == first)
        #expect(world.asked.withLock { $0.count } == 2)
        #expect(try await world.events.count { $0.kind == "SnapshotRequested" } == 1)
        #expect(try await world.controller.snapshots(of: "vol") == [first])
    }

    /// A name in the record says that it was taken, not that it was flushed.
    @Test func aSnapshotOfADetachedVolumeIsAsSafeAsItsDetach() async throws {
        let world = try await World()
        let first = try await world.create("s")
        _ = try await world.controller.detach("vol")
        try await world.report(.detached)
        // Its engine ended before it said so.
        world.live()
        var again = try await world.create("s")
        #expect(world.asked.withLock { $0.map(\.clientGeneration) } == [1, 2])
        #expect(again.uri.isEmpty && again.unixUri.isEmpty)
        (again.uri, again.unixUri) = (first.uri, first.unixUri)
        #expect(again == first)
        // That one has left in order.
        try await world.untilDetached()
        _ = try await world.create("s")
        #expect(world.asked.withLock { $0.count } == 2)
    }

    @Test(arguments: [
        "", ".s", "-s", "a b", "a/b", "a@b", "a=b", "a\nb", "é", "\u{10}",
        String(repeating: "s", count: 64),
    ])
    func badNamesAreRefused(_ name: String) async throws {
        let world = try await World()
        let error = try await world.refusal(name)
        #expect(error.code == .invalid)
        #expect(error.message.contains("is no snapshot name"))
        #expect(world.asked.withLock { $0.isEmpty })
    }

    @Test(arguments: ["_", "A", "0", "a.b-C_9", String(repeating: "s", count: 63)])
    func otherNamesAreTaken(_ name: String) async throws {
        #expect(try await World().create(name).name == name)
    }

    @Test func aVolumeInBetweenIsWaitedFor() async throws {
        let world = try await World(attached: false)
        world.test.clock.advance(Controller.nodeSilenceMaxMilliseconds + 1)
        try await world.report()
        #expect(try await world.refusal("s", of: "other").code == .notFound)
        _ = try await world.test.store.attachVolume("vol", node: "a", ready: ["a"])
        try await world.report(.starting)
        let attaching = try await world.refusal("s", timeout: 1000)
        #expect(attaching.code == .precondition)
        #expect(attaching.message.contains("still being attached"))

        try await world.report()
        _ = try await world.controller.detach("vol")
        let detaching = try await world.refusal("s", timeout: 1000)
        #expect(detaching.message.contains("being detached"))
        #expect(try await !world.events.contains { $0.kind == "SnapshotRequested" })
    }

    @Test func aNodeThatIsAway() async throws {
        let world = try await World()
        world.test.clock.advance(Controller.nodeSilenceMaxMilliseconds + 1)
        let silent = try await world.refusal("s")
        #expect(silent.code == .precondition)
        #expect(silent.message.contains("node a, which runs the engine"))
        // Its reports come, its tasks do not reach it: whoever asks shall ask again.
        try await world.report()
        await world.controller.tasks.finish()
        #expect(try await world.refusal("s").code == .unavailable)
        #expect(try await !world.events.contains { $0.kind == "SnapshotRequested" })
    }

    @Test func whatTheEngineSaysIsPassedOn() async throws {
        let world = try await World()
        world.engine.withLock { $0 = .refuses }
        let error = try await world.refusal("s")
        #expect(error.code == .precondition)
        #expect(error.message == "node a: no space for another layer")
        #expect(try await world.controller.snapshots(of: "vol").isEmpty)
    }

    @Test func doubtIsSaid() async throws {
        let world = try await World()
        world.engine.withLock { $0 = .isSilent }
        let error = try await world.refusal("s")
        #expect(error.code == .inDoubt)
        #expect(error.rpcErrorCode == .deadlineExceeded)
        #expect(error.message.hasPrefix("it is not known whether snapshot 's' of volume 'vol'"))
        #expect(!error.message.contains("names it"))
        // A record that names it does not end the doubt: its flush may still be to come.
        world.engine.withLock { $0 = .obeysInSilence }
        let named = try await world.refusal("s")
        #expect(named.code == .inDoubt)
        #expect(named.message.contains("the volume names it, but not every replica"))
        world.engine.withLock { $0 = .obeys }
        #expect(try await world.create("s").name == "s")
    }

    @Test func asManyAsTheRecordHolds() async throws {
        let world = try await World()
        let result = try await world.swap(.snapshot) { record in
            for number in 0..<VolumeRecord.snapshotsMax {
                record.snapshots.append(
                    .init(layer: record.head, name: "\(number)", created: 1))
                record.layers.append(LayerID(rawValue: record.head.rawValue + 1))
            }
        }
        #expect(result == .swapped)
        let error = try await world.refusal("s")
        #expect(error.code == .precondition)
        #expect(error.message.contains("has 1024 snapshots"))
        #expect(error.message.hasSuffix("cannot hold another one: delete some"))
        #expect(world.asked.withLock { $0.isEmpty })
    }

    @Test func listedOldestFirst() async throws {
        let world = try await World()
        #expect(try await world.controller.snapshots(of: "vol").isEmpty)
        for name in ["z", "a", "m"] {
            world.test.clock.advance(1000)
            try await world.report()
            _ = try await world.create(name)
        }
        let listed = try await world.controller.snapshots(of: "vol")
        #expect(listed.map(\.name) == ["z", "a", "m"])
        #expect(listed.map(\.layer) == [1, 2, 3])
        #expect(listed.map(\.createdUnixMilliseconds) == [1_001_000, 1_002_000, 1_003_000])
        #expect(try await world.controller.snapshot("a", of: "vol") == listed[1])
        for (name, volume) in [("b", "vol"), ("a", "other")] {
            let error = await #expect(throws: ControlError.self) {
                _ = try await world.controller.snapshot(name, of: volume)
            }
            #expect(error?.code == .notFound)
        }
        await #expect(throws: ControlError.self) {
            _ = try await world.controller.snapshots(of: "other")
        }
    }

    /// Through the file: a store that is opened again.
    @Test func recordsKeepTheirSnapshotsInTheStore() async throws {
        let world = try await World()
        _ = try await world.create("one")
        _ = try await world.create("two")
        let record = try await world.record
        #expect(record.layers.map(\.rawValue) == [1, 2, 3])
        let again = try MetadataStore(path: world.test.directory.path + "/store")
        let stored = try await again.volume(named: "vol")
        #expect(stored.record == record)
        #expect(stored.record?.snapshots.map(\.name) == ["one", "two"])
        let history = try await again.history(of: stored.volume.id, limit: 10)
        #expect(history.map { $0.record.snapshots.count } == [0, 1, 2])
        let words = RecordWords(nodes: [:])
        #expect(
            words.text(history[2].record, after: history[1].record) == "took snapshot two")
    }

    /// An engine's fault does not cost what somebody wanted kept.
    @Test func noOtherChangeGivesUpASnapshot() async throws {
        let world = try await World()
        _ = try await world.create("s")
        for kind in [VolumeRecord.Change.takeover, .removal, .detach] {
            let result = try await world.swap(kind) { $0.snapshots = [] }
            #expect(result == .invalid("the record gives up a snapshot"))
        }
        #expect(try await world.swap(.takeover) { _ in } == .swapped)
        #expect(try await world.record.snapshots.map(\.name) == ["s"])
    }
}
