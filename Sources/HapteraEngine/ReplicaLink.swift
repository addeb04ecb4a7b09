import HapteraCore
import HapteraIO

/// Where a replica is reached.
struct ReplicaEndpoint: Equatable {
    var id: ReplicaID
    var address: SocketAddress
}

/// The connection to one replica: made, lost and made again, with back-off, until stopped.
final class ReplicaLink: FrameDelegate, CompletionHandler {
    let id: ReplicaID
    let slot: ReplicaSlot
    /// The shell lets go of its links, never the other way round.
    private let shell: EngineShell
    private var address: SocketAddress
    private var connection: FrameConnection?
    private var connector: Connector?
    private var handler = HandlerID.none
    private var retryTimer = TimerID.none
    private var failures = 0
    private var isStopped = false
    private static let connectTimeoutMilliseconds = 2000
    private static let retryMillisecondsMax = 1000

    init(shell: EngineShell, slot: ReplicaSlot, endpoint: ReplicaEndpoint) {
        self.shell = shell
        self.slot = slot
        id = endpoint.id
        address = endpoint.address
        handler = shell.reactor.register(self)
        connect()
    }

    func stop() {
        isStopped = true
        connector?.cancel()
        shell.reactor.cancel(retryTimer)
        shell.reactor.unregister(handler)
        connection?.close()
    }

    /// The replica is somewhere else now. A connection that works is left alone.
    func move(to address: SocketAddress) {
        guard address != self.address else { return }
        self.address = address
        failures = 0
        guard connection == nil else { return }
        connector?.cancel()
        shell.reactor.cancel(retryTimer)
        connect()
    }

    func disconnect() { connection?.close() }

    func send(_ header: FrameHeader, table: RawMemory?, buffer: BufferID, offset: Int) {
        connection?.send(header, table: table, buffer: buffer, offset: offset)
    }

    func sendControl(_ header: FrameHeader, _ payload: [UInt8]) {
        let block = MemoryBlock(count: max(payload.count, 1))
        block.memory.copy(from: payload)
        connection?.send(header, table: block.memory.slice(0, payload.count))
    }

    private func connect() {
        connector = Connector(
            reactor: shell.reactor, address: address,
            timeoutMilliseconds: Self.connectTimeoutMilliseconds
        ) { [unowned self] outcome in
            connector = nil
            switch outcome {
            case .success(let fd):
                failures = 0
                connection = FrameConnection(reactor: shell.reactor, fd: fd, delegate: self)
                shell.run(.connected(slot))
            case .failure(let error):
                Log.debug("replica not reached", ("replica", id.text), ("error", error.message))
                retryLater()
            }
        }
    }

    private func retryLater() {
        guard !isStopped else { return }
        let delay = min(50 << min(failures, 5), Self.retryMillisecondsMax)
        failures += 1
        retryTimer = shell.reactor.timer(afterMilliseconds: delay, handler: handler, token: 0)
    }

    func completed(token: UInt64, result: Int) { connect() }

    // MARK: - FrameDelegate

    func frameTarget(_ connection: FrameConnection, _ header: FrameHeader) -> FrameTarget {
        if let target = shell.core.readTarget(header, from: slot) {
            return .buffer(target.buffer, offset: target.offset)
        }
        return .allocate
    }

    func received(
        _ connection: FrameConnection, _ header: FrameHeader, table: RawMemory, buffer: BufferID,
        offset: Int
    ) {
        if connection === self.connection {
            shell.run(.frame(slot, header, table: table, data: table.slice(0, 0)))
        }
        if buffer != .none { shell.pool.release(buffer) }
    }

    func frameConnectionClosed(_ connection: FrameConnection, reason: CloseReason) {
        guard connection === self.connection else { return }
        self.connection = nil
        // The core let go of it when it was stopped; the slot may be another replica's by now.
        guard !isStopped else { return }
        Log.debug("connection to replica closed", ("replica", id.text), ("reason", "\(reason)"))
        shell.run(.disconnected(slot))
        retryLater()
    }
}
