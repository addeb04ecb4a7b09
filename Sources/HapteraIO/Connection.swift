import CHaptera
import Glibc
import HapteraCore

/// Why a connection is gone.
package enum CloseReason: Equatable, Sendable {
    /// `close` or `finish` was called here.
    case local
    /// The peer closed its side.
    case ended
    case failed(errno: Int32)
    case badFrame(FrameError)
    /// The receiver accepted nothing although the staging buffer is full.
    case stuck
}

/// Called from the reactor's loop only, never from within a call to the connection.
package protocol ConnectionDelegate: AnyObject {
    /// Unconsumed received bytes; returns how many were consumed. Consume all that can be; the rest
    /// is shown again together with what comes next. For a payload of known length call
    /// `receivePayload` and return: what `memory` has after the consumed bytes is copied, the rest
    /// received in place. The bytes are valid during the call.
    func connection(_ connection: Connection, received memory: RawMemory) -> Int
    /// The memory given to `receivePayload` is full.
    func connectionReceivedPayload(_ connection: Connection)
    /// The peer will send no more, but may still read. Default: close. Bytes not consumed, or a
    /// payload begun, stay incomplete for ever.
    func connectionReceivedEnd(_ connection: Connection)
    /// The send queue was above `Connection.sendQueueHigh` and is now below half of it.
    func connectionCanSend(_ connection: Connection)
    /// Once, last. No memory handed in is used by the kernel any more.
    func connectionClosed(_ connection: Connection, reason: CloseReason)
}

extension ConnectionDelegate {
    package func connectionReceivedEnd(_ connection: Connection) { connection.close(.ended) }
    package func connectionCanSend(_ connection: Connection) {}
}

/// A stream socket on a reactor.
///
///     open --close()--> closing --all operations ended--> closed (connectionClosed)
///     open --finish()--> finishing: sends what is queued, then closing
///
/// Receiving: one staging buffer takes many small messages per receive; `receivePayload` brings
/// large payloads straight to their place. Sending: everything sent in one turn goes out together.
package final class Connection: CompletionHandler {
    /// The most `sendSpace` gives at once, and the largest payload that is copied, bytes.
    package static let sendSpaceMax = 8192
    /// Above this many queued bytes a sender should wait for `connectionCanSend`.
    package static let sendQueueHigh = 4 << 20
    static let stagingSize = 128 << 10
    /// A payload with at least this much missing is received by itself, into its place.
    private static let directMin = 32 << 10
    private static let finishMilliseconds = 10_000

    package let reactor: Reactor
    package private(set) var delegate: (any ConnectionDelegate)?
    /// For the delegate's own use.
    package var context: Int = 0
    private let fd: Int32
    private var id = HandlerID.none
    private enum Token { static let receive: UInt64 = 0, send: UInt64 = 1, limit: UInt64 = 2 }

    // Receiving.
    private let staging = MemoryBlock(count: stagingSize)
    private var stagingStart = 0
    private var stagingEnd = 0
    private let receiveVector = IOVector()
    private var receiveOperation = OperationID.none
    private enum ReceiveKind { case staging, direct, both }
    private var receiveKind = ReceiveKind.staging
    private var receiveSize = 0
    /// The last receive brought all it had room for: the kernel may hold more.
    package private(set) var isReceiveFilled = false
    private var payload: RawMemory?
    private var payloadFilled = 0
    package private(set) var isPaused = false
    private var isProcessing = false
    private var hasEnded = false
    private var isEndTold = false

    // Sending.
    private var sendOperation = OperationID.none
    private var sending: SendBatch?
    private var full: [SendBatch] = []
    private var collecting: SendBatch?
    /// Bytes accepted and not yet taken by the kernel.
    package private(set) var queuedSendBytes = 0
    private var isSendQueueHigh = false

    // Ending.
    private var isDirty = false
    private var isFinishing = false
    private var finishTimer = TimerID.none
    /// Bytes that were queued when the timer was set.
    private var finishQueued = 0
    private var closeReason: CloseReason?
    /// No delegate call but `connectionClosed` comes any more, and sends are ignored.
    package var isClosing: Bool { closeReason != nil }

    /// Takes over `fd`, a connected stream socket in blocking mode, and starts to receive in the
    /// next turn. The reactor keeps the connection, and the connection its delegate, until it is
    /// closed.
    package init(reactor: Reactor, fd: Int32, delegate: any ConnectionDelegate) {
        self.reactor = reactor
        self.fd = fd
        self.delegate = delegate
        full.reserveCapacity(16)
        id = reactor.register(self)
        reactor.connectionOpened()
        setSocketOption(fd, Int32(IPPROTO_TCP), TCP_NODELAY, 1)
        setSocketOption(fd, SOL_SOCKET, SO_KEEPALIVE, 1)
        setSocketOption(fd, Int32(IPPROTO_TCP), TCP_KEEPIDLE, 20)
        setSocketOption(fd, Int32(IPPROTO_TCP), TCP_KEEPINTVL, 5)
        setSocketOption(fd, Int32(IPPROTO_TCP), TCP_KEEPCNT, 4)
        reactor.markResumable(self)
    }

    package func completed(token: UInt64, result: Int) {
        switch token {
        case Token.receive:
            receiveOperation = .none
            received(result)
        case Token.send:
            sendOperation = .none
            sent(result)
        default:
            finishTimer = .none
            if queuedSendBytes < finishQueued { return armFinishTimer() }
            close(.failed(errno: ETIMEDOUT))
        }
    }

    // MARK: Receiving

    /// The next `memory.count` bytes after the consumed ones go to `memory`, which stays untouched
    /// by its owner until `connectionReceivedPayload` or `connectionClosed`.
    package func receivePayload(into memory: RawMemory) {
        precondition(payload == nil && memory.count > 0)
        payload = memory
        payloadFilled = 0
    }
    /// No `received` call until `resumeReceiving`: back-pressure reaches the peer.
    package func pauseReceiving() { isPaused = true }
    package func resumeReceiving() {
        guard isPaused else { return }
        isPaused = false
        reactor.markResumable(self)
    }
    /// Pauses, and resumes by itself after a turn, in which buffers may have become free.
    package func pauseUntilPoolChanges() {
        isPaused = true
        reactor.waitForPool(self)
    }

    /// Whether bytes of the peer may wait here or in the kernel.
    package var hasUnread: Bool { stagingEnd > stagingStart || isReceiveFilled }

    func resumeNow() {
        if !isClosing && !isPaused { process() }
    }

    private func received(_ result: Int) {
        if isClosing { return tearDownIfIdle() }
        if result < 0 && result != -Int(EINTR) && result != -Int(EAGAIN) {
            return close(.failed(errno: Int32(-result)))
        }
        if result == 0 { hasEnded = true }
        isReceiveFilled = result == receiveSize
        if isFinishing {
            stagingStart = 0
            stagingEnd = 0
            payload = nil
            return process()
        }
        var count = max(result, 0)
        if receiveKind != .staging, let payload {
            let direct = min(count, payload.count - payloadFilled)
            payloadFilled += direct
            count -= direct
        }
        stagingEnd += count
        process()
    }

    /// Shows the delegate what is there, then receives more.
    private func process() {
        // A delegate that resumes from within a call is served by the loop below.
        if isProcessing { return }
        isProcessing = true
        defer { isProcessing = false }
        while !isClosing && !isPaused {
            if isFinishing {
                // What a receive in flight brings is dropped when it ends.
                if receiveOperation == .none {
                    stagingStart = stagingEnd
                    payload = nil
                }
                break
            }
            if let target = payload {
                takeFromStaging(target)
                guard payloadFilled == target.count else { break }
                payload = nil
                delegate?.connectionReceivedPayload(self)
                continue
            }
            let available = stagingEnd - stagingStart
            guard available > 0, let delegate else { break }
            let consumed = delegate.connection(
                self, received: staging.memory.slice(stagingStart, available))
            precondition(consumed >= 0 && consumed <= available)
            stagingStart += consumed
            if consumed == 0 && payload == nil { break }
        }
        guard !isClosing && !isPaused else { return }
        if hasEnded {
            if !isEndTold {
                isEndTold = true
                if isFinishing { finishIfSent() } else { delegate?.connectionReceivedEnd(self) }
            }
        } else {
            receiveMore()
        }
    }

    private func takeFromStaging(_ target: RawMemory) {
        let count = min(stagingEnd - stagingStart, target.count - payloadFilled)
        guard count > 0 else { return }
        target.copy(from: staging.memory.slice(stagingStart, count), at: payloadFilled)
        stagingStart += count
        payloadFilled += count
    }

    private func receiveMore() {
        guard receiveOperation == .none else { return }
        // What is left is the beginning of one message: short, except for a table.
        if stagingStart > 0 {
            let rest = staging.memory.slice(stagingStart, stagingEnd - stagingStart)
            staging.memory.copy(from: rest)
            stagingEnd -= stagingStart
            stagingStart = 0
        }
        guard stagingEnd < Self.stagingSize else { return close(.stuck) }
        let room = staging.memory.slice(stagingEnd, Self.stagingSize - stagingEnd)
        var operation = haptera_operation()
        // SAFETY: staging, vector and payload outlive the operation: tear-down waits for its end.
        if let payload {
            let rest = payload.slice(payloadFilled, payload.count - payloadFilled)
            if rest.count >= Self.directMin {
                receiveKind = .direct
                receiveSize = rest.count
                operation.kind = HAPTERA_RECEIVE.rawValue
                operation.mode = 1
                operation.address = unsafe UInt(bitPattern: rest.base)
                operation.length = UInt64(rest.count)
            } else {
                receiveKind = .both
                receiveSize = rest.count + room.count
                receiveVector.removeAll()
                receiveVector.append(rest)
                receiveVector.append(room)
                operation.kind = HAPTERA_RECEIVE_VECTOR.rawValue
                operation.address = unsafe UInt(bitPattern: receiveVector.header)
            }
        } else {
            receiveKind = .staging
            receiveSize = room.count
            operation.kind = HAPTERA_RECEIVE.rawValue
            operation.address = unsafe UInt(bitPattern: room.base)
            operation.length = UInt64(room.count)
        }
        receiveOperation = reactor.start(
            &operation, fd: fd, handler: id, token: Token.receive)
    }

    // MARK: Sending

    /// Space for `count` bytes (at most `sendSpaceMax`) at the end of the queue, to be filled in
    /// before anything else is called.
    package func sendSpace(_ count: Int) -> RawMemory {
        precondition(count > 0 && count <= Self.sendSpaceMax)
        guard !isClosing && !isFinishing else {
            return reactor.batches.scratch.memory.slice(0, count)
        }
        addQueued(count)
        if let space = batch().space(count) { return space }
        guard let space = nextBatch().space(count) else {
            preconditionFailure("an empty batch has room")
        }
        return space
    }
    /// Copies `memory` (any length) to the end of the queue.
    package func send(copying memory: RawMemory) {
        var at = 0
        while at < memory.count {
            let count = min(memory.count - at, Self.sendSpaceMax)
            sendSpace(count).copy(from: memory.slice(at, count))
            at += count
        }
    }
    /// Queues a part of a pool buffer: small ones are copied, larger ones are retained until sent
    /// and must not change until then.
    package func send(buffer: BufferID, offset: Int, length: Int) {
        guard length > 0, !isClosing, !isFinishing else { return }
        let memory = reactor.pool.memory(buffer).slice(offset, length)
        if length <= Self.sendSpaceMax { return send(copying: memory) }
        reactor.pool.retain(buffer)
        addQueued(length)
        if !batch().append(buffer, memory) {
            let isTaken = nextBatch().append(buffer, memory)
            precondition(isTaken)
        }
    }

    private func addQueued(_ count: Int) {
        queuedSendBytes += count
        if queuedSendBytes > Self.sendQueueHigh { isSendQueueHigh = true }
        markDirty()
    }
    private func batch() -> SendBatch {
        if let collecting { return collecting }
        let batch = reactor.batches.take()
        collecting = batch
        return batch
    }
    private func nextBatch() -> SendBatch {
        if let collecting { full.append(collecting) }
        collecting = nil
        return batch()
    }
    private func markDirty() {
        if isDirty { return }
        isDirty = true
        reactor.markDirty(self)
    }

    /// The reactor's end of turn: hands the next batch to the kernel, or tears down.
    func flush() {
        isDirty = false
        if isClosing { return tearDownIfIdle() }
        guard sending == nil else { return }
        if !full.isEmpty {
            sending = full.removeFirst()
        } else if let batch = collecting {
            sending = batch
            collecting = nil
        } else {
            return finishIfSent()
        }
        sendRest()
    }
    private func sendRest() {
        guard let sending else { return }
        var operation = haptera_operation()
        // SAFETY: the batch stays in `sending` until the operation has ended.
        if let single = sending.vector.single {
            operation.kind = HAPTERA_SEND.rawValue
            operation.address = unsafe UInt(bitPattern: single.base)
            operation.length = UInt64(single.count)
        } else {
            operation.kind = HAPTERA_SEND_VECTOR.rawValue
            operation.address = unsafe UInt(bitPattern: sending.vector.header)
        }
        sendOperation = reactor.start(&operation, fd: fd, handler: id, token: Token.send)
    }
    private func sent(_ result: Int) {
        if isClosing { return tearDownIfIdle() }
        if result < 0 && result != -Int(EINTR) && result != -Int(EAGAIN) {
            return close(.failed(errno: Int32(-result)))
        }
        guard let batch = sending else { return }
        batch.vector.advance(by: max(result, 0))
        queuedSendBytes -= max(result, 0)
        if batch.vector.length > 0 { return sendRest() }
        sending = nil
        reactor.batches.give(batch, pool: reactor.pool)
        if collecting != nil || !full.isEmpty || isFinishing { markDirty() }
        if isSendQueueHigh && queuedSendBytes < Self.sendQueueHigh / 2 {
            isSendQueueHigh = false
            delegate?.connectionCanSend(self)
        }
    }

    // MARK: Ending

    /// Sends what is queued, tells the peer that nothing more comes, waits (at most 10 s without
    /// progress) until it has read it, and closes. What the peer still sends is dropped.
    package func finish() {
        guard !isClosing, !isFinishing else { return }
        isFinishing = true
        armFinishTimer()
        isPaused = false
        reactor.markResumable(self)
        markDirty()
    }
    private func armFinishTimer() {
        finishQueued = queuedSendBytes
        finishTimer = reactor.timer(
            afterMilliseconds: Self.finishMilliseconds, handler: id, token: Token.limit)
    }
    private func finishIfSent() {
        guard isFinishing, sending == nil, collecting == nil, full.isEmpty else { return }
        if hasEnded { return close(.local) }
        // The peer's end follows; closing earlier could reset the connection under our last bytes.
        shutdown(fd, Int32(SHUT_WR))
    }

    /// Ends the connection at once, dropping what is queued. `connectionClosed` follows from the
    /// loop.
    package func close(_ reason: CloseReason = .local) {
        guard !isClosing else { return }
        closeReason = reason
        // Ends sends and receives that wait in the kernel; their memory is ours again only then.
        shutdown(fd, Int32(SHUT_RDWR))
        if receiveOperation != .none { reactor.cancel(receiveOperation, fd: fd) }
        if sendOperation != .none { reactor.cancel(sendOperation, fd: fd) }
        markDirty()
    }
    private func tearDownIfIdle() {
        guard receiveOperation == .none, sendOperation == .none, let delegate,
            let reason = closeReason
        else { return }
        self.delegate = nil
        payload = nil
        for batch in full { reactor.batches.give(batch, pool: reactor.pool) }
        if let sending { reactor.batches.give(sending, pool: reactor.pool) }
        if let collecting { reactor.batches.give(collecting, pool: reactor.pool) }
        full = []
        sending = nil
        collecting = nil
        queuedSendBytes = 0
        if finishTimer != .none { reactor.cancel(finishTimer) }
        reactor.unregister(id)
        reactor.closeDescriptor(fd)
        reactor.connectionClosed()
        delegate.connectionClosed(self, reason: reason)
    }
}

/// Best effort: what a kind of socket does not know is ignored.
func setSocketOption(_ fd: Int32, _ level: Int32, _ option: Int32, _ value: Int32) {
    var value = value
    // SAFETY: `value` is a local of the size given.
    _ = unsafe setsockopt(fd, level, option, &value, socklen_t(MemoryLayout<Int32>.size))
}
