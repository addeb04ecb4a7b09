import HapteraCore

/// Everything that can happen in a simulated world, waiting for its time.
enum WorldEvent {
    /// The head of a connection's lane reaches its receiver.
    case deliver(connection: Int, toReplica: Bool)
    /// An engine's shell tries to reach a replica.
    case connect(engine: Int, slot: ReplicaSlot)
    case disk(replica: Int, process: Int, operation: UInt64)
    case storeArrival(request: Int)
    case storeReply(request: Int, isTimeout: Bool)
    case engineTick(Int)
    case replicaTick(replica: Int, process: Int)
    /// A replica's host starts its process (again).
    case startReplica(Int)
    /// A client worker does its next piece of work.
    case work(worker: Int)
    case fault
    /// Somebody wants a snapshot.
    case snapshot
    /// Whoever wanted a group of snapshots lets the volume go.
    case release(UInt64)
    /// Somebody wants the volume to go back to a snapshot, or still waits for it.
    case revert
    /// Somebody wants the volume to grow.
    case growth
    /// A scrub is due, or to be gone on with.
    case scrub
    /// A clone is made or deleted, or the making of one gets on.
    case clone
    /// Trouble at the very moment something changed.
    case stageFault
    /// A client writes where nobody has.
    case freshWrite
    /// What was sent on a broken connection arrives.
    case lateBytes(engine: Int)
    /// A temporary trouble ends.
    case relief(Relief)
}

/// Temporary troubles that end by themselves.
enum Relief {
    case disk(replica: Int)
    case store
    /// The store is rebuilt from the replicas.
    case record
    /// The clients connect again.
    case clients(engine: Int)
    /// A stopped process goes on.
    case replica(Int)
    case engine(Int)
    /// The link breaks for a moment, so many times more.
    case flap(replica: Int, left: Int)
}

/// A host's clock: it started at another time than the world's, and is fast or slow.
struct SimulatedClock {
    /// Parts per million. Leases stand 7800 either way.
    static let driftMax = 5000
    let drift: Int64
    /// Nanoseconds.
    let offset: UInt64

    init(random: RandomSource) {
        let anything = random.below(2 * Self.driftMax + 1) - Self.driftMax
        drift = Int64(random.pick([-Self.driftMax, anything, Self.driftMax]))
        offset = random.next() >> 24
    }
}

/// Simulated time and what is to happen in it.
final class Timeline {
    private final class Clock {
        /// Nanoseconds. Starts above zero, as a monotonic clock does.
        var now: UInt64 = 1_000_000_000
    }
    private let clock: Clock
    private(set) var step = 0
    private var queue = EventQueue<WorldEvent>()

    init() { clock = Clock() }
    /// The same time, in which other things are to happen.
    init(beside other: Timeline) { clock = other.clock }

    var now: UInt64 { clock.now }
    var nextTime: UInt64? { queue.nextTime }
    /// Nothing happens any more.
    func clear() { queue = EventQueue() }

    func instant(_ clock: SimulatedClock) -> Instant {
        let drifted = Int64(now) + Int64(now) * clock.drift / 1_000_000
        return Instant(rawValue: UInt64(drifted) + clock.offset)
    }

    func schedule(after nanoseconds: UInt64, _ event: WorldEvent) {
        queue.schedule(at: now + nanoseconds, event)
    }
    func schedule(at time: UInt64, _ event: WorldEvent) {
        queue.schedule(at: max(time, now), event)
    }
    func advance() -> WorldEvent? {
        guard let (time, event) = queue.popFirst() else { return nil }
        clock.now = time
        step += 1
        return event
    }
}

func milliseconds(_ count: Int) -> UInt64 { UInt64(count) * 1_000_000 }
