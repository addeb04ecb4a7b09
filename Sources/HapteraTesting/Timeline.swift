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

/// Simulated time and what is to happen in it.
final class Timeline {
    /// Nanoseconds. Starts above zero, as a monotonic clock does.
    private(set) var now: UInt64 = 1_000_000_000
    private(set) var step = 0
    private var queue = EventQueue<WorldEvent>()

    /// By a clock that started at another time.
    func instant(offset: UInt64) -> Instant { Instant(rawValue: now + offset) }

    func schedule(after nanoseconds: UInt64, _ event: WorldEvent) {
        queue.schedule(at: now + nanoseconds, event)
    }
    func schedule(at time: UInt64, _ event: WorldEvent) {
        queue.schedule(at: max(time, now), event)
    }
    func advance() -> WorldEvent? {
        guard let (time, event) = queue.popFirst() else { return nil }
        now = time
        step += 1
        return event
    }
}

func milliseconds(_ count: Int) -> UInt64 { UInt64(count) * 1_000_000 }
