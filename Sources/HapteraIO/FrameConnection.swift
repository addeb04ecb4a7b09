import Glibc
import HapteraCore

/// Where a frame's data is to be received.
package enum FrameTarget {
    /// To `offset` of a buffer of the receiver's; it is retained meanwhile.
    case buffer(BufferID, offset: Int)
    /// To a buffer the connection allocates; while there is none, receiving pauses.
    case allocate
    /// Not now: asked again after a turn.
    case wait
}

/// Called from the reactor's loop only.
package protocol FrameDelegate: AnyObject {
    /// Asked for each frame with data, once its header and table are verified.
    func frameTarget(_ connection: FrameConnection, _ header: FrameHeader) -> FrameTarget
    /// A complete frame; header and table checksums are right, the data's is not looked at. `table`
    /// is valid during the call. The receiver owns one reference to `buffer`, whichever way it was
    /// chosen, and releases it; it is `.none` without data.
    func received(
        _ connection: FrameConnection, _ header: FrameHeader, table: RawMemory, buffer: BufferID,
        offset: Int)
    /// Sending may go on (see `FrameConnection.queuedSendBytes`).
    func frameConnectionCanSend(_ connection: FrameConnection)
    /// Once, last. No buffer is used any more.
    func frameConnectionClosed(_ connection: FrameConnection, reason: CloseReason)
}

extension FrameDelegate {
    package func frameTarget(_ connection: FrameConnection, _ header: FrameHeader) -> FrameTarget {
        .allocate
    }
    package func frameConnectionCanSend(_ connection: FrameConnection) {}
}

/// A connection that carries frames: `FrameHeader`, table, data.
package final class FrameConnection: ConnectionDelegate {
    /// For the delegate's own use: the replica slot, the connection's number.
    package var context: Int = 0
    private let reactor: Reactor
    private var delegate: (any FrameDelegate)?
    private var connection: Connection?
    /// The frame whose data is on its way.
    private var header = FrameHeader(kind: .ping)
    private let table = MemoryBlock(count: FrameHeader.tableLengthMax)
    private var buffer = BufferID.none
    private var offset = 0

    /// Takes over `fd`, a connected socket. Kept alive by the reactor until it is closed.
    package init(reactor: Reactor, fd: Int32, delegate: any FrameDelegate) {
        self.reactor = reactor
        self.delegate = delegate
        connection = Connection(reactor: reactor, fd: fd, delegate: self)
        // A peer whose host has died acknowledges nothing: without a limit, what it was to be sent
        // would hold its buffers for a quarter of an hour.
        setSocketOption(
            fd, Int32(IPPROTO_TCP), TCP_USER_TIMEOUT, Self.unacknowledgedMilliseconds)
    }
    private static let unacknowledgedMilliseconds: Int32 = 20_000

    package var queuedSendBytes: Int { connection?.queuedSendBytes ?? 0 }
    package var isClosing: Bool { connection?.isClosing ?? true }
    package func close() { connection?.close() }
    /// Sends what is queued, then closes.
    package func finish() { connection?.finish() }
    package func pauseReceiving() { connection?.pauseReceiving() }
    package func resumeReceiving() { connection?.resumeReceiving() }

    /// Queues a frame: the header, the first `header.tableLength` bytes of `table` (copied), and
    /// `header.dataLength` bytes at `offset` of `buffer` (retained until sent if large). The
    /// table's checksum is filled in if the header has none. Ignored once the connection is
    /// closing.
    package func send(
        _ header: FrameHeader, table: RawMemory? = nil, buffer: BufferID = .none, offset: Int = 0
    ) {
        guard let connection, !connection.isClosing else { return }
        var header = header
        let part = table.map { $0.slice(0, Int(header.tableLength)) }
        precondition(part != nil || header.tableLength == 0)
        if let part, part.count > 0, header.tableChecksum == 0 {
            header.tableChecksum = CRC32C.checksum(part)
        }
        header.encode(to: connection.sendSpace(FrameHeader.size))
        if let part, part.count > 0 { connection.send(copying: part) }
        if header.dataLength > 0 {
            connection.send(buffer: buffer, offset: offset, length: Int(header.dataLength))
        }
    }

    package func connection(_ connection: Connection, received memory: RawMemory) -> Int {
        var at = 0
        while memory.count - at >= FrameHeader.size && !connection.isPaused && !connection.isClosing
        {
            do throws(FrameError) {
                let header = try FrameHeader(decoding: memory.slice(at, FrameHeader.size))
                let tableEnd = at + FrameHeader.size + Int(header.tableLength)
                guard memory.count >= tableEnd else { return at }
                let table = memory.slice(at + FrameHeader.size, Int(header.tableLength))
                guard table.count == 0 || CRC32C.checksum(table) == header.tableChecksum else {
                    throw FrameError.tableChecksumMismatch
                }
                if header.dataLength == 0 {
                    at = tableEnd
                    delegate?.received(self, header, table: table, buffer: .none, offset: 0)
                    continue
                }
                guard chooseTarget(header) else {
                    connection.pauseUntilPoolChanges()
                    return at
                }
                at = tableEnd
                let length = Int(header.dataLength)
                let target = reactor.pool.memory(buffer).slice(offset, length)
                if memory.count - at >= length {
                    target.copy(from: memory.slice(at, length))
                    at += length
                    deliver(header, table)
                } else {
                    self.header = header
                    self.table.memory.copy(from: table)
                    connection.receivePayload(into: target)
                    return at
                }
            } catch {
                connection.close(.badFrame(error))
            }
        }
        return at
    }

    private func chooseTarget(_ header: FrameHeader) -> Bool {
        switch delegate?.frameTarget(self, header) ?? .wait {
        case .buffer(let chosen, let position):
            reactor.pool.retain(chosen)
            buffer = chosen
            offset = position
            return true
        case .allocate:
            guard let fresh = reactor.pool.allocate(Int(header.dataLength)) else { return false }
            buffer = fresh
            offset = 0
            return true
        case .wait:
            return false
        }
    }

    private func deliver(_ header: FrameHeader, _ table: RawMemory) {
        let complete = buffer
        buffer = .none
        guard let delegate else { return reactor.pool.release(complete) }
        delegate.received(self, header, table: table, buffer: complete, offset: offset)
    }

    package func connectionReceivedPayload(_ connection: Connection) {
        deliver(header, table.memory.slice(0, Int(header.tableLength)))
    }

    package func connectionCanSend(_ connection: Connection) {
        delegate?.frameConnectionCanSend(self)
    }

    package func connectionClosed(_ connection: Connection, reason: CloseReason) {
        if buffer != .none { reactor.pool.release(buffer) }
        buffer = .none
        self.connection = nil
        let last = delegate
        delegate = nil
        last?.frameConnectionClosed(self, reason: reason)
    }
}
