import HapteraCore

/// Connections between engines and replicas: whole frames, in order, as encoded bytes.
///
/// A connection that breaks delivers a random prefix of what was under way, then tells each end on
/// its own time: a replica may still be fed by an old connection while a new one is at work. A
/// blocked link delays; it is the engine that loses patience.
final class SimulatedNetwork {
    enum Parcel {
        /// To the engine: the replica accepted.
        case opened
        case frame([UInt8])
        /// The other end is gone.
        case closed
    }
    fileprivate struct Lane {
        var queue: [Parcel] = []
        var lastDue: UInt64 = 0
        /// False once either end has given the connection up.
        var acceptsFrames = true
        /// The receiver is done with it: nothing is delivered any more.
        var isReceiverGone = false
    }
    final class Connection {
        let id: Int
        let engine: Int
        let slot: ReplicaSlot
        let replica: Int
        /// The replica process that accepted it.
        let process: Int
        /// The replica's number for it.
        let number: Int
        fileprivate var toReplica = Lane()
        fileprivate var toEngine = Lane()

        fileprivate init(
            id: Int, engine: Int, slot: ReplicaSlot, replica: Int, process: Int, number: Int
        ) {
            self.id = id
            self.engine = engine
            self.slot = slot
            self.replica = replica
            self.process = process
            self.number = number
        }
    }
    private struct Block {
        /// Nil: every engine.
        var engine: Int?
        var replica: Int
        var toReplica: Bool
        var until: UInt64
    }

    private let timeline: Timeline
    private let random: RandomSource
    private(set) var connections: [Connection] = []
    private var blocks: [Block] = []
    private let headerBlock = MemoryBlock(count: FrameHeader.size)
    /// Microseconds.
    var latencyMax = 600
    /// Per thousand write frames and read replies: one bit of the data flips under way.
    var corruptionPermille = 0

    init(timeline: Timeline, random: RandomSource) {
        self.timeline = timeline
        self.random = random
    }

    func connection(_ id: Int) -> Connection { connections[id] }

    func open(engine: Int, slot: ReplicaSlot, replica: Int, process: Int, number: Int)
        -> Connection
    {
        let connection = Connection(
            id: connections.count, engine: engine, slot: slot, replica: replica, process: process,
            number: number)
        connections.append(connection)
        push(.opened, connection, toReplica: false)
        return connection
    }

    // MARK: Blocked links

    /// Nothing passes in the direction until `until`.
    func block(engine: Int?, replica: Int, toReplica: Bool, until: UInt64) {
        blocks.removeAll { $0.until <= timeline.now }
        blocks.append(Block(engine: engine, replica: replica, toReplica: toReplica, until: until))
    }
    /// What was held arrives now. (Seed 5052052: each frame came when the next one was sent, and so
    /// the last ones when the link would have been free by itself.)
    func unblockAll() {
        guard !blocks.isEmpty else { return }
        let replicas = Set(blocks.map(\.replica)).sorted()
        blocks = []
        for replica in replicas { deliverHeld(replica: replica) }
    }
    private func deliverHeld(replica: Int) {
        for connection in connections where connection.replica == replica {
            for (lane, toReplica) in [(connection.toReplica, true), (connection.toEngine, false)] {
                for _ in lane.queue {
                    timeline.schedule(
                        at: max(timeline.now, lane.lastDue),
                        .deliver(connection: connection.id, toReplica: toReplica))
                }
            }
        }
    }
    var isUnblocked: Bool { blocks.isEmpty }
    var isBlocked: Bool { blocks.contains { $0.until > timeline.now } }
    func blockedUntil(engine: Int, replica: Int, toReplica: Bool) -> UInt64 {
        var until: UInt64 = 0
        for block in blocks
        where block.replica == replica && block.toReplica == toReplica
            && (block.engine == nil || block.engine == engine)
        {
            until = max(until, block.until)
        }
        return until > timeline.now ? until : 0
    }

    // MARK: Frames

    private func push(_ parcel: Parcel, _ connection: Connection, toReplica: Bool) {
        let delay = random.delay(microseconds: 15, latencyMax)
        var due = timeline.now + delay
        if toReplica {
            due = max(due, connection.toReplica.lastDue)
            connection.toReplica.lastDue = due
            connection.toReplica.queue.append(parcel)
        } else {
            due = max(due, connection.toEngine.lastDue)
            connection.toEngine.lastDue = due
            connection.toEngine.queue.append(parcel)
        }
        timeline.schedule(at: due, .deliver(connection: connection.id, toReplica: toReplica))
    }

    func send(
        _ connection: Connection, toReplica: Bool, header: FrameHeader, table: RawMemory?,
        data: RawMemory?
    ) {
        let lane = toReplica ? connection.toReplica : connection.toEngine
        guard lane.acceptsFrames else { return }
        var header = header
        if let table, header.tableLength > 0 { header.tableChecksum = CRC32C.checksum(table) }
        header.encode(to: headerBlock.memory)
        var bytes = headerBlock.memory.bytes()
        if let table { bytes.append(contentsOf: table.bytes()) }
        if let data {
            bytes.append(contentsOf: data.bytes())
            if data.count > 0 && random.permille(corruptionPermille) {
                bytes[bytes.count - 1 - random.below(data.count)] ^= 1 << UInt8(random.below(8))
            }
        }
        push(.frame(bytes), connection, toReplica: toReplica)
    }

    /// What a `deliver` event brings, or nil if it is late for something (blocked link, cut).
    func take(_ connection: Connection, toReplica: Bool) -> Parcel? {
        let lane = toReplica ? connection.toReplica : connection.toEngine
        guard !lane.isReceiverGone, !lane.queue.isEmpty else { return nil }
        let blocked = blockedUntil(
            engine: connection.engine, replica: connection.replica, toReplica: toReplica)
        if blocked > 0 {
            timeline.schedule(
                at: blocked + random.delay(microseconds: 1, 50),
                .deliver(connection: connection.id, toReplica: toReplica))
            return nil
        }
        return toReplica
            ? connection.toReplica.queue.removeFirst() : connection.toEngine.queue.removeFirst()
    }
    /// The receiver has no buffer for it now: it stays at the head and comes again.
    func putBack(_ parcel: Parcel, _ connection: Connection, toReplica: Bool) {
        if toReplica {
            connection.toReplica.queue.insert(parcel, at: 0)
        } else {
            connection.toEngine.queue.insert(parcel, at: 0)
        }
        timeline.schedule(
            after: 200_000, .deliver(connection: connection.id, toReplica: toReplica))
    }

    // MARK: Ends

    /// The connection breaks on the way: each end gets a prefix, and notices when it notices.
    func cut(_ connection: Connection) {
        if connection.toReplica.acceptsFrames { end(connection, toReplica: true) }
        if connection.toEngine.acceptsFrames { end(connection, toReplica: false) }
    }
    /// The engine closed it, or is gone.
    func closeFromEngine(_ connection: Connection) {
        connection.toEngine.isReceiverGone = true
        connection.toEngine.acceptsFrames = false
        if connection.toReplica.acceptsFrames { end(connection, toReplica: true) }
    }
    func closeFromReplica(_ connection: Connection) {
        connection.toReplica.isReceiverGone = true
        connection.toReplica.acceptsFrames = false
        if connection.toEngine.acceptsFrames { end(connection, toReplica: false) }
    }

    private func end(_ connection: Connection, toReplica: Bool) {
        if toReplica {
            let kept = random.below(connection.toReplica.queue.count + 1)
            connection.toReplica.queue.removeSubrange(kept...)
            connection.toReplica.acceptsFrames = false
            if random.permille(200) {
                connection.toReplica.lastDue += milliseconds(random.below(2000))
            }
        } else {
            let kept = random.below(connection.toEngine.queue.count + 1)
            // What was opened stays opened: the first parcel is not a frame.
            connection.toEngine.queue.removeSubrange(
                max(kept, min(1, connection.toEngine.queue.count))...)
            connection.toEngine.acceptsFrames = false
        }
        push(.closed, connection, toReplica: toReplica)
    }
}
