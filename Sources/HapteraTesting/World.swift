import HapteraCore

/// What a run of the simulator is asked to do.
package struct SimulationOptions: Sendable {
    /// Copies of the volume; nil: drawn by the seed.
    package var replicas: Int?
    /// Events of the troubled part of a run; what follows heals and must converge.
    package var steps = 12_000
    package var mutations = MutationSet()
    /// The worlds in which `mutations` are judged, but with every rule kept: nothing may fail.
    package var keepsRules = false
    var rulesOff: MutationSet { keepsRules ? [] : mutations }
    /// Receives every line of the trace.
    /// Clones are cloned, once their sources are gone.
    package var clonesClones = false
    package var trace: (@Sendable (String) -> Void)?
    package init() {}
}

/// How a seed ended.
package struct SimulationOutcome: Sendable {
    package var seed: UInt64
    package var steps: Int
    /// What is wrong, if anything is.
    package var failure: (step: Int, what: String)?
    package var acknowledged: Int
    package var epochs: Int
    package var coverage: Coverage
}

/// A whole installation in one thread: the real cores, and everything around them made up from one
/// seed. The same seed gives the same run on every machine.
package final class World {
    let options: SimulationOptions
    let random: RandomSource
    let timeline: Timeline
    let network: SimulatedNetwork
    let store: SimulatedStore
    let volume: VolumeID
    var workload: Workload
    var growth: SimulatedGrowth
    var reverts: SimulatedReverts
    var holds: SimulatedHolds
    var clones: SimulatedClones
    let faults: FaultPlan
    let leases: SimulatedLeases
    /// Clients zero by writing too, and engines look for that.
    let detectsZeroes: Bool
    let hosts: [SimulatedReplica]
    var engines: [SimulatedEngine] = []
    var currentEngine: Int?
    var history = History()
    var coverage = Coverage()
    var operations: [ClientOperation] = []
    var promises: Promises
    /// The sectors clients use, ascending.
    let hotSectors: [Int]
    /// Requests of live clients without an answer, in the order they were made.
    var unanswered: [ClientOperation] = []
    var generation: UInt64 = 1
    /// The highest epoch in which anything was answered.
    var acknowledgedEpoch = Epoch.zero
    /// A new generation of clients has not been served yet.
    var isGenerationUnserved = true
    /// Only members that lost power are left: the volume may refuse to be served.
    var isLossPossible = false
    var joinStartedAt: UInt64 = 0
    /// By region: the epoch in which every member had applied its last acknowledged write.
    var lastWrites: [UInt64: Epoch] = [:]
    /// The store was put back: what it held before.
    var trueHistory: [VolumeRecord]?
    /// The latest epoch that `observeCertainty` has looked at.
    var certaintyEpoch = Epoch.zero
    var isChaos = true
    /// No fault before this, nanoseconds.
    var calmUntil: UInt64 = 0
    var snapshots: [SimulatedSnapshot] = []
    let scrubRandom: RandomSource
    /// Whether this world has scrubs.
    let scrubs: Bool
    /// As the control plane has it: the last one asked for.
    var scrub = ScrubProgress()
    var isScrubFinished = true
    /// The replica that rot and the faults that go with it spare.
    let keeper: Int
    var pendingDisconnects: [(SimulatedEngine, ReplicaSlot)] = []
    var pendingReplicaCloses: [(SimulatedReplica, Int, Int)] = []
    let frameBlock = MemoryBlock(
        count: FrameHeader.size + FrameHeader.recordTableLengthMax + FrameHeader.dataLengthMax)
    let contents: Contents
    let depth: SimulatedDepth
    private(set) var failure: (step: Int, what: String)?
    let seed: UInt64
    /// Of this volume, if it is a clone; and the one that was made of it.
    weak var source: World?
    var second: World?
    /// The volume was deleted.
    var isGone = false

    package convenience init(seed: UInt64, options: SimulationOptions) {
        self.init(seed: seed, options: options, origin: nil)
    }

    /// `origin`: what the volume begins as; nil: empty, on hosts of its own.
    init(seed: UInt64, options: SimulationOptions, origin: SimulatedOrigin?) {
        self.seed = seed
        contents =
            origin.map { Contents(inherited: $0.numbers, from: $0.source.contents) } ?? Contents()
        timeline = origin.map { Timeline(beside: $0.source.timeline) } ?? Timeline()
        self.options = options
        random = RandomSource(seed: RandomSource.mix(seed))
        scrubRandom = RandomSource(seed: RandomSource.mix(seed ^ 0x5C2B))
        let isScrubJudged = !options.mutations.isDisjoint(with: FaultPlan.scrubRules)
        scrubs = scrubRandom.permille(400) || isScrubJudged
        // Of the seed, not drawn: every world without it is the one it was before.
        detectsZeroes = seed % 4 == 1
        // Mostly three copies: that is where the protocol has the most to decide.
        let replicas =
            origin?.source.hosts.count
            ?? options.replicas ?? random.pick([1, 2, 2, 3, 3, 3, 3, 3, 3, 3])
        let size = origin?.size ?? Self.drawSize(random, options.mutations)
        volume = VolumeID(high: random.next(), low: random.next())
        depth = SimulatedDepth(seed: seed, mutations: options.mutations)
        var workload = Workload(random: random.fork(), sizeBytes: size, origin: origin)
        workload.deepen(depth)
        workload.suit(options.mutations)
        if options.clonesClones { workload.snapshotsMax = max(workload.snapshotsMax, 2) }
        self.workload = workload
        reverts = SimulatedReverts(seed: seed)
        holds = SimulatedHolds(seed: seed)
        clones = SimulatedClones(seed: seed, options: options, isClone: origin != nil)
        growth = SimulatedGrowth(
            seed: seed, size: size, first: origin?.sizeFirst, mutations: options.mutations)
        hotSectors = workload.hotSectors
        promises = Promises(sectorCount: Int(size) / Content.sectorSize)
        var faults = FaultPlan(
            random: random.fork(), mutations: options.mutations, beside: origin?.source.faults)
        if options.mutations.isEmpty {
            faults.addFileRot(RandomSource(seed: RandomSource.mix(seed ^ 0x4649_4C45)))
        }
        self.faults = faults
        leases = SimulatedLeases(
            random: random.fork(), replicas: replicas, sparesPausedMembers: faults.rot,
            mutations: options.mutations)
        keeper = origin?.source.keeper ?? random.below(replicas)
        network = SimulatedNetwork(timeline: timeline, random: random.fork())
        let hostsRandom = random.fork()
        let hosts = (0..<replicas).map {
            SimulatedReplica(
                index: $0, random: hostsRandom, blockCount: Int(size) / Geometry.blockSize,
                disk: origin?.disks[$0])
        }
        self.hosts = hosts
        let record =
            origin?.record(volume, hosts)
            ?? VolumeRecord(
                volume: volume, name: "sim", epoch: Epoch(1), nonce: 1, size: growth.first,
                inSync: hosts.map(\.member))
        store = SimulatedStore(record: record, timeline: timeline, random: random.fork())
        network.latencyMax = random.pick([100, 600, 20_000])
        if faults.corruptsFrames { network.corruptionPermille = 2 }
        if faults.kinds.contains(.storeOutage) {
            store.requestLoss = 50
            store.replyLoss = 100
            store.lateArrival = 100
            store.duplicates = 100
        }
        // From a source of their own, as reverts. A rule that is off is judged without them.
        let refusals = RandomSource(seed: RandomSource.mix(seed ^ 0x5245_4655))
        if options.mutations.isEmpty, refusals.permille(300) { store.refusals = refusals }
    }

    private static func drawSize(_ random: RandomSource, _ mutations: MutationSet) -> UInt64 {
        let drawn = random.pick([1, 2, 3, 16])
        let regions = mutations.isDisjoint(with: .rulesOfManyRegions) ? drawn : 16
        return UInt64(regions * Geometry.regionSize - random.pick([0, 64]) * 4096)
    }

    /// What the store says, or said before it was put back.
    var trueRecord: VolumeRecord { trueHistory?.last ?? store.record }

    // MARK: Telling

    /// Something an operator would want to know.
    func note(_ text: @autoclosure () -> String) { trace("-- " + text()) }

    func trace(_ text: @autoclosure () -> String) {
        guard let sink = options.trace else { return }
        let time = (timeline.now - 1_000_000_000) / 1000
        let fraction = String(time % 1000 + 1000).dropFirst()
        sink("\(timeline.step) \(time / 1000).\(fraction)ms \(prefix)\(text())")
    }
    func traceDisk(_ host: SimulatedReplica, _ action: ReplicaAction) {
        trace("\(host.name) \(describe(action))")
    }
    private func describe(_ action: ReplicaAction) -> String {
        switch action {
        case .read(let file, let offset, let length, _, _, _):
            "reads \(file) \(offset)+\(length)"
        case .write(let file, let offset, let length, _, _, _):
            "writes \(file) \(offset)+\(length)"
        case .sync(let file, _): "syncs \(file)"
        case .create(let layer, _, _): "makes layer \(layer.rawValue)"
        case .extend(_, let size, _): "makes room for \(size) bytes"
        case .remove(let layer, _): "deletes layer \(layer.rawValue)"
        case .punch(let file, let offset, let length, _): "punches \(file) \(offset)+\(length)"
        default: ""
        }
    }

    /// Which of the volumes it is about: nothing, `c` for a clone, `cc` for a clone of that.
    var label: String { String(repeating: "c", count: Int(contents.generation)) }
    private var prefix: String {
        String(repeating: "clone: ", count: Int(contents.generation))
    }

    /// The first thing that is wrong ends the run.
    func fail(_ what: String) { fail(atStep: timeline.step, what) }
    func fail(atStep step: Int, _ what: String) {
        guard failure == nil else { return }
        failure = (step, what)
        note("FAILED: \(what)")
        for other in [second, source] { other?.fail(atStep: step, prefix + what) }
    }

    /// Judges an invariant of `docs/replication.md`, by its number, and counts that it did.
    func check(_ invariant: Int, _ holds: Bool, _ otherwise: @autoclosure () -> String) {
        coverage.evaluated(invariant)
        if !holds { fail("invariant \(invariant): \(otherwise())") }
    }

    // MARK: Running

    package func run() -> SimulationOutcome {
        setUp()
        runChaos()
        end()
        judgeHistory()
        for clone in volumes.dropFirst() {
            clone.judgeHistory()
            coverage.add(clone.coverage)
        }
        return SimulationOutcome(
            seed: seed, steps: volumes.reduce(0) { $0 + $1.timeline.step }, failure: failure,
            acknowledged: volumes.reduce(0) { $0 + $1.acknowledgedCount },
            epochs: store.history.count, coverage: coverage)
    }
    /// This one, its clone, and that one's.
    var volumes: [World] { [self] + (second?.volumes ?? []) }
    private var acknowledgedCount: Int { operations.count(where: \.isComplete) }

    private func judgeHistory() {
        coverage.evaluated(9)
        coverage.evaluated(33)
        if let wrong = history.check(sectorCount: Int(workload.sizeBytes) / Content.sectorSize) {
            fail(atStep: wrong.step, wrong.what)
        }
    }

    func setUp(origin: SimulatedOrigin? = nil) {
        let kinds = faults.kinds.map { "\($0)" }.joined(separator: " ")
        note("\(hosts.count) replicas, \(workload.sizeBytes) bytes; faults: \(kinds)")
        for host in hosts {
            if let origin { createClone(host, origin) } else { createReplica(host) }
            startReplica(host)
        }
        startEngine(generation: generation)
        for worker in 0..<workload.workers {
            timeline.schedule(after: milliseconds(random.below(50)), .work(worker: worker))
        }
        timeline.schedule(after: milliseconds(random.between(100, 2000)), .fault)
        if workload.snapshotsMax > 0 { scheduleSnapshot() }
        if workload.snapshotsMax > 0, reverts.areThere { scheduleRevert() }
        if workload.snapshotsMax > 0 && clones.areThere || origin != nil { scheduleClone() }
        if !growth.sizes.isEmpty { timeline.schedule(after: growth.pause(), .growth) }
        if scrubs { scheduleScrub() }
    }

    /// The troubled part, of both volumes if there are two.
    private func runChaos() {
        while failure == nil, !isGone, timeline.step < options.steps {
            let step = timeline.step
            guard advance() else { break }
            if timeline.step != step, timeline.step % 400 == 0 { audit() }
        }
        // The clone has outlived its source.
        let stepsMin = options.clonesClones ? options.steps : options.steps / 2
        while failure == nil, isGone, let left = volumes.first(where: { !$0.isGone }),
            left.timeline.step < stepsMin
        {
            guard left.advance() else { break }
        }
        for volume in volumes { volume.isChaos = false }
    }

    /// Lets time pass until `condition` holds; false if it does not within `seconds`.
    func run(seconds: Int, until condition: () -> Bool) -> Bool {
        let deadline = timeline.now + UInt64(seconds) * 1_000_000_000
        while failure == nil, timeline.now < deadline {
            if condition() { return true }
            guard advance() else { return condition() }
        }
        return failure == nil && condition()
    }

    /// The next event of either volume.
    private func advance() -> Bool {
        if let sibling, sibling.timeline.nextTime ?? .max < timeline.nextTime ?? .max {
            return sibling.advanceOwn()
        }
        return advanceOwn()
    }
    private func advanceOwn() -> Bool {
        guard let event = timeline.advance() else { return false }
        handle(event)
        if contents.isClone, isChaos {
            if timeline.step % 400 == 0 { audit() }
            // One that was made early has had its share before its source has.
            if timeline.step >= options.steps { isChaos = false }
        }
        return true
    }

    private func handle(_ event: WorldEvent) {
        switch event {
        case .deliver(let id, let toReplica): deliver(network.connection(id), toReplica)
        case .connect(let engine, let slot):
            guard !postpone(event, engines[engine].pausedUntil) else { return }
            connect(engines[engine], slot)
        case .disk(let replica, let process, let operation):
            diskCompleted(hosts[replica], process: process, operation: operation)
        case .storeArrival(let request): storeArrived(request)
        case .storeReply(let request, let isTimeout):
            if let engine = store.asker(request), postpone(event, engines[engine].pausedUntil) {
                return
            }
            guard let answer = store.answer(request, isTimeout: isTimeout) else { return }
            if case .refused = answer.outcome {
                coverage.took(.changeRefused)
                engines[answer.engine].proposal = nil
            }
            step(engines[answer.engine], .store(answer.outcome))
            deliverDisconnects()
        case .engineTick(let index):
            let engine = engines[index]
            guard engine.isRunning, !postpone(event, engine.pausedUntil) else { return }
            step(engine, .tick)
            deliverDisconnects()
            timeline.schedule(after: milliseconds(random.between(20, 100)), event)
        case .replicaTick(let index, let process):
            guard hosts[index].process == process, hosts[index].core != nil,
                !postpone(event, hosts[index].pausedUntil)
            else { return }
            step(hosts[index], .tick)
            deliverReplicaCloses()
            timeline.schedule(after: milliseconds(random.between(20, 100)), event)
        case .startReplica(let index): startReplica(hosts[index])
        case .work(let worker): work(worker)
        case .fault: nextFault()
        case .snapshot: requestSnapshot()
        case .release(let token): releaseHold(token)
        case .growth: requestGrowth()
        case .revert: if isChaos { requestRevert() } else { continueRevert() }
        case .scrub: requestScrub()
        case .clone: clones.isVolume ? tendClone() : cloneOrNot()
        case .stageFault: stageFault()
        case .freshWrite: writeFreshBlock()
        case .lateBytes(let index): deliverLate(engines[index])
        case .relief(let relief): relieve(relief)
        }
    }

    private func storeArrived(_ request: Int) {
        let before = store.record
        if let violation = store.arrived(request) { return fail(violation) }
        guard store.record.epoch != before.epoch else { return }
        coverage.evaluated(1)
        coverage.evaluated(2)
        observeRecord(store.record, before: before)
        observeRevert(store.record, before: before)
        audit()
    }

    /// What reaches a stopped process waits until it goes on.
    private func postpone(_ event: WorldEvent, _ pausedUntil: UInt64) -> Bool {
        guard pausedUntil > timeline.now else { return false }
        timeline.schedule(at: pausedUntil + random.delay(microseconds: 1, 20), event)
        return true
    }

    private func deliver(_ connection: SimulatedNetwork.Connection, _ toReplica: Bool) {
        let event = WorldEvent.deliver(connection: connection.id, toReplica: toReplica)
        let pausedUntil =
            toReplica
            ? hosts[connection.replica].pausedUntil : engines[connection.engine].pausedUntil
        guard !postpone(event, pausedUntil) else { return }
        guard let parcel = network.take(connection, toReplica: toReplica) else { return }
        if toReplica {
            deliver(parcel, to: hosts[connection.replica], connection)
        } else {
            deliver(parcel, to: engines[connection.engine], connection)
        }
    }
}
