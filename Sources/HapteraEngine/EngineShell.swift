import HapteraCore
import HapteraIO

/// The shell around `EngineCore`: connections to replicas and to the record service, time, and the
/// way back to the frontend. Feeds events in, performs actions, in order. Single-threaded.
final class EngineShell: BlockDevice, CompletionHandler {
    let reactor: Reactor
    let pool: BufferPool
    let core: EngineCore
    private let options: EngineOptions
    private var links: [ReplicaLink?] = Array(repeating: nil, count: Geometry.replicaSlotsMax)
    private let store: StoreClient
    private var isPerforming = false
    private var tickHandler = HandlerID.none
    /// While reads are on the way, time is told more often.
    private var isHedgeTimerArmed = false
    private static let hedgeMilliseconds = 10
    private(set) var isServing = false
    private(set) var isStoreAvailable = true
    var counters = EngineCounters()
    var damage = DamageLog()
    /// Called when the volume's size is known and it can be served, and when that changes.
    var onServing: (Bool) -> Void = { _ in }
    var onStopped: (StopReason) -> Void = { _ in }
    /// A snapshot asked for with this token was taken, or not.
    var onSnapshot: (UInt64, LayerID, SnapshotResult) -> Void = { _, _, _ in }
    /// A hold was released; false: it had ended before, or there was none.
    var onRelease: (UInt64, Bool) -> Void = { _, _ in }
    /// A snapshot whose deletion was asked for with this token is gone, or not.
    var onDeletion: (UInt64, DeletionResult) -> Void = { _, _ in }
    /// A growth asked for with this token is there, or not: for that replica's sake, if for one's.
    var onResize: (UInt64, ResizeResult, ReplicaID) -> Void = { _, _, _ in }
    weak var frontend: (any BlockDeviceFrontend)?
    var zeroesFastWithoutHole: Bool { true }

    var name: String { options.volumeName }
    var size: UInt64 { core.size }
    var isReadOnly: Bool { options.isReadOnly }
    var snapshots: [VolumeRecord.Snapshot] { core.record?.snapshots ?? [] }
    func size(of snapshot: VolumeRecord.Snapshot) -> UInt64 {
        core.record?.size(of: snapshot.layer) ?? core.size
    }
    var canSubmit: Bool { core.canSubmit }

    init(reactor: Reactor, options: EngineOptions) {
        self.reactor = reactor
        self.options = options
        pool = reactor.pool
        var configuration = EngineConfiguration(
            volume: options.volume, instance: InstanceID(rawValue: randomUInt64() | 1),
            endpoint: options.endpoint, clientGeneration: options.clientGeneration,
            nonceSeed: randomUInt64())
        configuration.removalDeadlineMilliseconds = options.removalDeadlineMilliseconds
        configuration.leaseMilliseconds = options.leaseMilliseconds
        configuration.renewMilliseconds = options.renewMilliseconds
        configuration.ioTimeoutMilliseconds = options.ioTimeoutMilliseconds
        configuration.detectsZeroes = options.detectsZeroes
        configuration.minInSync = options.minInSync
        configuration.endedInstance = options.endedInstance
        core = EngineCore(configuration: configuration, pool: pool)
        store = StoreClient(reactor: reactor, addresses: options.store, volume: options.volume)
    }

    func start() {
        store.onAnswer = { [unowned self] outcome in
            if case .unavailable = outcome {
                isStoreAvailable = false
            } else {
                isStoreAvailable = true
            }
            if case .refused(let reason) = outcome { logRefusal(reason) }
            run(.store(outcome))
        }
        tickHandler = reactor.register(self)
        reactor.timer(
            everyMilliseconds: Self.tickMilliseconds, handler: tickHandler, token: 0)
        configure(options.replicas)
        run(.start)
    }
    private static let tickMilliseconds = 50

    func completed(token: UInt64, result: Int) {
        if token == 1 { isHedgeTimerArmed = false }
        if damage.isWaiting { damage.tick(now: reactor.now) }
        run(.tick)
    }

    /// The complete set of replicas and where they are now.
    func configure(_ replicas: [ReplicaEndpoint]) {
        run(.configure(replicas.map(\.id)))
        for slot in 0..<links.count {
            guard let link = links[slot] else { continue }
            if !replicas.contains(where: { $0.id == link.id }) {
                link.stop()
                links[slot] = nil
            }
        }
        for replica in replicas {
            guard let slot = core.slot(of: replica.id) else {
                Log.warn(
                    "a replica is ignored: the volume has as many as it can", ("volume", name),
                    ("replica", replica.id.text))
                continue
            }
            if let link = links[slot], link.id == replica.id {
                link.move(to: replica.address)
            } else {
                links[slot]?.stop()
                links[slot] = ReplicaLink(shell: self, slot: slot, endpoint: replica)
            }
        }
    }

    /// Actions wait for the end of the turn: completions never come from within this call, and what
    /// a turn submits leaves together.
    func submit(_ operation: Operation) {
        counters.count(operation)
        core.step(.submit(operation), now: reactor.now)
    }
    func cancel(session: UInt32) { core.step(.cancel(session: session), now: reactor.now) }
    func completeReady() -> Bool {
        let before = counters.completed
        perform()
        if !isHedgeTimerArmed, core.mayHedge {
            isHedgeTimerArmed = true
            reactor.timer(
                afterMilliseconds: Self.hedgeMilliseconds, handler: tickHandler, token: 1)
        }
        return counters.completed != before
    }
    func detach() { run(.detach) }

    // MARK: - Events in, actions out

    func run(_ event: EngineEvent) {
        core.step(event, now: reactor.now)
        perform()
    }

    private func perform() {
        // An action may lead straight to another event: its actions wait their turn.
        guard !isPerforming else { return }
        isPerforming = true
        while let action = core.actions.popFirst() { perform(action) }
        isPerforming = false
    }

    private func perform(_ action: EngineAction) {
        switch action {
        case .send(let slot, let header, let tableOf, let buffer, let offset):
            let table = tableOf >= 0 ? core.table(tableOf) : nil
            links[slot]?.send(header, table: table, buffer: buffer, offset: Int(offset))
        case .sendControl(let slot, let header):
            links[slot]?.sendControl(header, core.controlPayload)
        case .disconnect(let slot):
            links[slot]?.disconnect()
        case .complete(let userData, let result, let buffer, let tableLength, let isHole):
            counters.completed &+= 1
            if result != .ok { counters.errors &+= 1 }
            if result == .ioError { noteFailure() }
            frontend?.complete(
                userData: userData, result: result, buffer: buffer, tableLength: tableLength,
                isHole: isHole)
        case .snapshotTaken(let token, let layer, let result):
            onSnapshot(token, layer, result)
        case .released(let token, let wasHeld): onRelease(token, wasHeld)
        case .snapshotDeleted(let token, let result): onDeletion(token, result)
        case .resized(let token, let result, let slot):
            onResize(token, result, core.replicaID(slot))
        case .sizeChanged: frontend?.sizeChanged()
        case .storeGet: store.get()
        case .storeCompareAndSwap(let expected):
            store.compareAndSwap(expected: expected, core.proposedRecord)
        case .note(let note): log(note)
        case .serving(let isServing):
            self.isServing = isServing
            onServing(isServing)
        case .stopped:
            if let reason = core.stopReason { onStopped(reason) }
        }
    }
}
