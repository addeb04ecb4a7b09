import Glibc
import HapteraCore
import HapteraIO

/// One connection of a client: turns what arrives into requests, as far as its bounds allow.
///
///     receiving <-> held back (own bounds, or waiting for buffers) -> leaving -> gone
///
/// Leaving (DISC, half-close, server stop) takes no more requests, answers those in flight, and
/// ends.
final class NBDClient: ConnectionDelegate, NBDReplyTarget {
    /// Requests taken and not answered.
    static let outstandingMax = 128
    /// Buffers its requests and its unread replies may hold, bytes; one request may exceed it.
    static let reservedMax = 48 << 20
    /// Reading less than this within the limit is no progress while others wait for buffers.
    private static let progressMin = 1 << 20

    private unowned let server: NBDServer
    private let reactor: Reactor
    private let requests: NBDRequests
    let index: Int32
    private let fd: Int32
    private var connection: Connection?
    private var session: NBDSession
    private var format = NBDReplyFormat.simple

    private var outstanding = 0
    private var reserved = 0
    /// The write whose payload is arriving, and the piece it is arriving in.
    private var receiving: Int32 = -1
    private var receivingPiece: Int32 = -1
    /// A request that was taken from the stream and has no buffers yet.
    private var held: NBDRequest?
    private(set) var isLeaving = false
    /// It has entered the export of a snapshot, where nothing can be changed: it fences nobody, and
    /// need not be fenced.
    private(set) var isReader = false
    /// Whether it reads the snapshot of this layer, or asks what has changed since: from the moment
    /// it may. `.head`: whether it is a client of the volume.
    func uses(_ layer: LayerID) -> Bool {
        if layer == .head { return !isReader && !session.isNegotiating }
        return isReader && session.export.layer == layer
            || session.contexts.contains { $0.base == layer }
    }
    /// Its peer hung up before what it asked was taken: all of it may since have been asked again
    /// on another connection, so it changes nothing any more.
    private var isFenced = false
    /// Some of what its peer sent may have been waiting here or in the kernel for a while.
    private var isBehind = false
    /// Changes of its own, and of others before anything of its was left waiting.
    private var ownChanges: UInt64 = 0
    private var othersSeen: UInt64
    private var checkedAt: Instant?
    /// It has asked for something after the negotiation.
    private var hasBegun = false
    /// Its first request waits for what sessions that have ended left at the device.
    private var awaitsFence = false

    private let acceptedAt: Instant
    /// Since when the client owes the rest of a message, and got no part of it done.
    private var owingSince: Instant?
    /// Bytes ever given to the connection, and how many of them were sent at the last look.
    private var handedBytes = 0
    private var sentBytes = 0
    private var sentAt: Instant

    init(server: NBDServer, reactor: Reactor, requests: NBDRequests, index: Int32, fd: Int32) {
        self.server = server
        self.reactor = reactor
        self.requests = requests
        self.index = index
        self.fd = fd
        session = NBDSession(exports: server.exports)
        acceptedAt = reactor.now
        sentAt = reactor.now
        othersSeen = server.changes
        let connection = Connection(reactor: reactor, fd: fd, delegate: self)
        self.connection = connection
        requests.attach(self, client: index)
        var consumed = 0
        // The greeting comes before anything the client says.
        _ = session.next(session.output.slice(0, 0), consumed: &consumed)
        send(copying: session.output)
    }

    // MARK: Receiving

    func connection(_ connection: Connection, received memory: RawMemory) -> Int {
        if isBehind { fenceIfOvertaken() } else { othersSeen = othersChanges }
        var position = 0
        while !isLeaving && receiving < 0 && held == nil {
            guard mayTakeMore(connection) else {
                connection.pauseReceiving()
                break
            }
            var consumed = 0
            let event = session.next(
                memory.slice(position, memory.count - position), consumed: &consumed)
            position += consumed
            if !handle(event, connection) { break }
        }
        // What a client says after it has left is thrown away.
        if isLeaving && receiving < 0 { position = memory.count }
        isBehind =
            receiving >= 0 || connection.isPaused || position < memory.count
            || connection.isReceiveFilled
        let isOwing =
            receiving >= 0 || session.isInsideMessage || held == nil && position < memory.count
        if !isOwing {
            owingSince = nil
        } else if owingSince == nil || position > 0 {
            owingSince = reactor.now
        }
        return position
    }

    private func mayTakeMore(_ connection: Connection) -> Bool {
        outstanding < Self.outstandingMax
            && connection.queuedSendBytes <= Connection.sendQueueHigh
    }

    /// False if nothing more can be taken from what has arrived.
    private func handle(_ event: NBDSession.Event, _ connection: Connection) -> Bool {
        switch event {
        case .needsMore: return false
        case .reply: send(copying: session.output)
        case .transmission:
            send(copying: session.output)
            format = session.agreement.format
            enter()
        case .request(let request): take(request, connection)
        case .disconnect: leave()
        case .hangUp(let reason):
            send(copying: session.output)
            if reason == .aborted {
                leave()
            } else {
                end(reason.rawValue)
            }
            return false
        }
        return true
    }

    private func enter() {
        isReader = session.export.isSnapshot
        requests.enter(
            client: index, layer: session.export.layer, contexts: session.contexts)
        server.entered(self, isRemote: !SocketAddress.isPeerLocal(fd))
    }

    private func take(_ request: NBDRequest, _ connection: Connection) {
        if request.error != .none {
            refuse(request)
        } else if isFenced && request.command.isModification {
            leave()
        } else if !hasBegun && !begin() {
            awaitsFence = true
            server.hasFenceWaiters = true
            held = request
            connection.pauseReceiving()
        } else if !start(request, connection) {
            held = request
            connection.pauseReceiving()
            if !isOverOwnBounds(request, connection) { server.wait(self) }
        }
    }

    /// Before a session's first request: sessions whose peer is gone are fenced, and must have
    /// nothing left at the device. False if the request must wait for that.
    private func begin() -> Bool {
        hasBegun = true
        guard !isReader else { return true }
        server.fenceDeadSessions(for: self)
        return requests.fencedOperations == 0
    }
    /// The peer is gone: nothing it said and we have not heard yet counts, nor what has not begun.
    func fenceIfHungUp() {
        guard let connection, !connection.isClosing, pollHangUp() != 0 else { return }
        isFenced = true
        isLeaving = true
        held = nil
        requests.detach(client: index)
        connection.close()
    }
    /// What is taken only now, after others changed something, may have been repeated by them and
    /// overtaken. A peer that merely closed its side is answered as long as they did not.
    private func fenceIfOvertaken() {
        guard !isFenced, !isReader, isBehind, hasBeenOvertaken, checkedAt != reactor.now else {
            return
        }
        checkedAt = reactor.now
        if pollHangUp() != 0 { isFenced = true }
    }
    private var othersChanges: UInt64 { server.changes - ownChanges }
    private var hasBeenOvertaken: Bool { othersChanges != othersSeen }
    func isOvertaken(since othersChanges: UInt64) -> Bool {
        guard let connection, !connection.isClosing else {
            requests.detach(client: index)
            return true
        }
        // Once a turn is enough: nothing that is repeated in it is answered before its end.
        guard self.othersChanges != othersChanges, isFenced || checkedAt != reactor.now else {
            return false
        }
        checkedAt = reactor.now
        fenceIfHungUp()
        return connection.isClosing
    }

    private func refuse(_ request: NBDRequest) {
        let reply = NBDReply(format: format, cookie: request.cookie, offset: request.offset)
        let space = server.scratch.memory
        send(copying: space.slice(0, reply.status(request.error, request.command, to: space)))
    }

    private func isOverOwnBounds(_ request: NBDRequest, _ connection: Connection) -> Bool {
        guard request.command == .read || request.command == .write else { return false }
        let holding = reserved + connection.queuedSendBytes
        return outstanding > 0 && holding + Int(request.length) > Self.reservedMax
    }

    /// False if the request must wait.
    private func start(_ request: NBDRequest, _ connection: Connection) -> Bool {
        guard !isOverOwnBounds(request, connection),
            !request.needsBuffers || !server.isAnybodyWaiting(before: self),
            let slot = requests.begin(request, client: index, format: format)
        else { return false }
        outstanding += 1
        reserved += requests.slots.requests[Int(slot)].reserved
        guard request.payload > 0 else {
            launch(slot)
            return true
        }
        receiving = slot
        receivingPiece = requests.slots.requests[Int(slot)].firstPiece
        receivePiece(connection)
        return true
    }

    private func receivePiece(_ connection: Connection) {
        let piece = requests.slots.pieces[Int(receivingPiece)]
        let memory = requests.device.pool.memory(piece.buffer)
        connection.receivePayload(into: memory.slice(piece.position, Int(piece.length)))
        owingSince = reactor.now
    }

    func connectionReceivedPayload(_ connection: Connection) {
        receivingPiece = requests.slots.pieces[Int(receivingPiece)].next
        guard receivingPiece < 0 else {
            receivePiece(connection)
            return
        }
        let slot = receiving
        receiving = -1
        owingSince = nil
        fenceIfOvertaken()
        isBehind = connection.isPaused || connection.hasUnread
        guard isFenced else { return launch(slot) }
        outstanding -= 1
        reserved -= requests.slots.requests[Int(slot)].reserved
        requests.cancel(slot)
        if isLeaving { finishIfIdle() } else { leave() }
    }
    private func launch(_ slot: Int32) {
        if requests.slots.requests[Int(slot)].command.isModification {
            ownChanges += 1
            server.changes += 1
        }
        requests.launch(slot, othersChanges: othersChanges)
    }

    // MARK: Held back

    /// What held the client back may have changed. False if it still waits for buffers.
    @discardableResult
    func goOn() -> Bool {
        guard let connection, !connection.isClosing, connection.isPaused, !isLeaving else {
            return true
        }
        if !isFenced && !isReader {
            let events = pollHangUp()
            let isUnread = events & Int16(POLLHUP | POLLERR) != 0
            if isUnread || events != 0 && hasBeenOvertaken { isFenced = true }
        }
        if awaitsFence {
            guard requests.fencedOperations == 0 else { return true }
            awaitsFence = false
        }
        if let request = held {
            if isFenced && request.command.isModification {
                held = nil
                leave()
                return true
            }
            guard !isOverOwnBounds(request, connection) else { return true }
            // Not held while it starts: it may end at once, which comes here again.
            held = nil
            guard start(request, connection) else {
                held = request
                server.wait(self)
                return false
            }
        }
        if mayTakeMore(connection) { connection.resumeReceiving() }
        return true
    }

    /// POLLRDHUP, POLLHUP, POLLERR of the socket: whether the peer's side of it is closed, read or
    /// not, and whether nobody is left to answer. Asked only after a pause, of clients that are
    /// behind, and of all when a session begins.
    private func pollHangUp() -> Int16 {
        // POLLRDHUP is not imported from its header, which wants _GNU_SOURCE.
        var entry = pollfd(fd: fd, events: Int16(0x2000), revents: 0)
        // SAFETY: one entry, on the stack, valid during the call.
        return unsafe poll(&entry, 1, 0) > 0 ? entry.revents : 0
    }

    func connectionCanSend(_ connection: Connection) { goOn() }

    // MARK: Replies

    func send(copying memory: RawMemory) {
        guard memory.count > 0 else { return }
        handedBytes += memory.count
        connection?.send(copying: memory)
    }
    func send(buffer: BufferID, offset: Int, length: Int) {
        handedBytes += length
        connection?.send(buffer: buffer, offset: offset, length: length)
    }
    func requestEnded(reserved: Int) {
        outstanding -= 1
        self.reserved -= reserved
        if isLeaving { finishIfIdle() } else { goOn() }
    }

    // MARK: The end

    /// Takes no more requests; ends when those in flight are answered.
    func leave() {
        guard !isLeaving else { return }
        isLeaving = true
        held = nil
        finishIfIdle()
    }
    private func finishIfIdle() {
        guard let connection, outstanding == 0 || receiving >= 0 && outstanding == 1 else { return }
        // A stopping server does not wait for idle clients to notice.
        if server.exports.live.isStopping && connection.queuedSendBytes == 0 {
            connection.close()
        } else {
            connection.finish()
        }
    }
    func close() { connection?.close() }
    var isClosing: Bool { connection?.isClosing ?? true }
    /// How long it has been negotiating, nanoseconds; 0: that is over.
    var negotiationTime: UInt64 {
        session.isNegotiating ? reactor.now.nanoseconds(since: acceptedAt) : 0
    }

    /// A half-close: what was asked before is answered. A payload cut short is never applied.
    func connectionReceivedEnd(_ connection: Connection) {
        // A Unix socket tells when nobody is left to read an answer.
        if pollHangUp() & Int16(POLLHUP) != 0 { fenceIfHungUp() } else { leave() }
    }

    func connectionClosed(_ connection: Connection, reason: CloseReason) {
        self.connection = nil
        requests.detach(client: index)
        if receiving >= 0 { requests.cancel(receiving) }
        server.remove(self)
    }

    /// Ends clients that stopped moving. `limit`: nanoseconds without progress. `isPressed`: others
    /// wait for buffers.
    func checkProgress(negotiationLimit: UInt64, limit: UInt64, isPressed: Bool) {
        guard let connection, !connection.isClosing else { return }
        let now = reactor.now
        if negotiationTime > negotiationLimit {
            end("negotiation took too long")
        } else if let owingSince, !connection.isPaused,
            now.nanoseconds(since: owingSince) > limit
        {
            end("no progress inside a message")
        }
        let sent = handedBytes - connection.queuedSendBytes
        let step = isPressed ? Self.progressMin : 1
        if sent - sentBytes >= step || connection.queuedSendBytes == 0 {
            sentBytes = sent
            sentAt = now
        } else if now.nanoseconds(since: sentAt) > limit {
            end("replies are not read")
        }
    }
    private func end(_ reason: String) {
        Log.info("hung up on a client", ("export", server.device.name), ("reason", reason))
        close()
    }
}
