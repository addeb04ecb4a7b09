import HapteraCore
import HapteraIO

/// The engine's way to the record service: one request at a time, each answered within a time limit
/// or reported as unavailable. It never repeats a request by itself: whether that is right is the
/// core's decision.
final class StoreClient: FrameDelegate, CompletionHandler {
    var onAnswer: (StoreOutcome) -> Void = { _ in }
    private let reactor: Reactor
    private let addresses: [SocketAddress]
    private let volume: VolumeID
    private var next = 0
    private var connection: FrameConnection?
    private var connector: Connector?
    private var handler = HandlerID.none
    private var timer = TimerID.none
    /// The request waiting for an answer: its header and payload.
    private var pending: (header: FrameHeader, payload: [UInt8])?
    private var proposed: VolumeRecord?
    private var tag: UInt64 = 0
    private static let answerMilliseconds = 2000

    init(reactor: Reactor, addresses: [SocketAddress], volume: VolumeID) {
        self.reactor = reactor
        self.addresses = addresses
        self.volume = volume
        handler = reactor.register(self)
    }

    func get() { begin(FrameHeader(kind: .getRecord), volumeBytes, nil) }

    func compareAndSwap(expected: Epoch, _ record: VolumeRecord) {
        var writer = ByteWriter()
        writer.append(raw: volumeBytes)
        writer.append(expected.rawValue)
        writer.append(raw: record.encoded())
        begin(FrameHeader(kind: .compareAndSwap), writer.bytes, record)
    }

    private var volumeBytes: [UInt8] {
        var writer = ByteWriter()
        writer.append(volume.high)
        writer.append(volume.low)
        return writer.bytes
    }

    private func begin(_ header: FrameHeader, _ payload: [UInt8], _ record: VolumeRecord?) {
        precondition(pending == nil)
        tag += 1
        var header = header
        header.tag = tag
        header.tableLength = UInt32(payload.count)
        pending = (header, payload)
        proposed = record
        timer = reactor.timer(
            afterMilliseconds: Self.answerMilliseconds, handler: handler, token: tag)
        if connection == nil { connect() } else { transmit() }
    }

    private func connect() {
        guard connector == nil else { return }
        let address = addresses[next % addresses.count]
        connector = Connector(
            reactor: reactor, address: address, timeoutMilliseconds: Self.answerMilliseconds
        ) { [unowned self] outcome in
            connector = nil
            switch outcome {
            case .success(let fd):
                connection = FrameConnection(reactor: reactor, fd: fd, delegate: self)
                transmit()
            case .failure(let error):
                Log.debug("record service not reached", ("error", error.message))
                next += 1
                finish(.unavailable)
            }
        }
    }

    private func transmit() {
        guard let pending, let connection else { return }
        let block = MemoryBlock(count: pending.payload.count)
        block.memory.copy(from: pending.payload)
        connection.send(pending.header, table: block.memory)
    }

    private func finish(_ outcome: StoreOutcome) {
        guard pending != nil else { return }
        pending = nil
        reactor.cancel(timer)
        onAnswer(outcome)
    }

    /// No answer in time. The connection goes too: a late answer must not meet the next request.
    func completed(token: UInt64, result: Int) {
        guard token == tag, pending != nil else { return }
        connection?.close()
        connection = nil
        connector?.cancel()
        connector = nil
        next += 1
        finish(.unavailable)
    }

    func received(
        _ connection: FrameConnection, _ header: FrameHeader, table: RawMemory, buffer: BufferID,
        offset: Int
    ) {
        if buffer != .none { reactor.pool.release(buffer) }
        guard connection === self.connection, let pending, header.isReply,
            header.tag == pending.header.tag, header.kind == pending.header.kind
        else { return }
        switch header.status {
        case .ok where header.kind == .compareAndSwap && table.count == 0:
            finish(proposed.map { .record($0) } ?? .unavailable)
        case .ok, .conflict:
            guard let record = VolumeRecord(decoding: table.bytes()) else {
                Log.error(
                    "the record service sent a record that cannot be read: damaged, or of another "
                        + "version than this engine's; the volume waits for one that can",
                    ("volumeID", volume.text), ("address", addresses[next % addresses.count].text),
                    ("bytes", String(table.count)))
                return finish(.unavailable)
            }
            finish(header.status == .ok ? .record(record) : .conflict(record))
        case .notFound: finish(.notFound)
        case .invalid where header.kind == .compareAndSwap:
            // An older controller does not say why.
            let reason = String(decoding: table.bytes().prefix(200), as: UTF8.self)
            finish(.refused(reason.isEmpty ? "no reason given" : reason))
        default: finish(.unavailable)
        }
    }

    func frameConnectionClosed(_ connection: FrameConnection, reason: CloseReason) {
        guard connection === self.connection else { return }
        self.connection = nil
        next += 1
        finish(.unavailable)
    }
}
