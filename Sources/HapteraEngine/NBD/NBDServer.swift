import Glibc
import HapteraCore
import HapteraIO

/// Serves one block device to NBD clients, on any number of addresses at once.
package final class NBDServer: TurnHandler, CompletionHandler, BlockDeviceFrontend {
    package struct Limits: Sendable {
        package var connectionsMax = 64
        package var negotiationMilliseconds: UInt64 = 30_000
        /// The same while places run out.
        package var negotiationUnderPressureMilliseconds: UInt64 = 1000
        /// Without progress inside a message, or in reading replies.
        package var stallMilliseconds: UInt64 = 60_000
        /// The same while others wait for buffers.
        package var stallUnderPressureMilliseconds: UInt64 = 5_000
        /// For what is in flight when the server stops; who has not left then is hung up on.
        package var stopMilliseconds: UInt64 = 5_000
        /// Connections to snapshots: those who read copies never keep the volume's client out.
        var readersMax: Int { connectionsMax / 4 * 3 }
        package init() {}
    }
    /// Rounds of submitting and completing in one turn, for devices that never wait.
    private static let roundsMax = 16

    let exports: NBDExports
    /// For replies that are put together and copied at once.
    let scratch = MemoryBlock(count: NBDReply.headerSizeMax)
    private let reactor: Reactor
    let device: any BlockDevice
    private let requests: NBDRequests
    private let limits: Limits
    private var listeners: [Listener] = []
    private var clients: [NBDClient?]
    /// Clients whose request waits for buffers, first come first served.
    private var waiting: [NBDClient] = []
    /// Changes given to the device so far, by all clients.
    var changes: UInt64 = 0
    /// Clients wait for the operations of sessions that have ended.
    var hasFenceWaiters = false
    private var waitingSince: Instant?
    private var isServingWaiting = false
    private var onStopped: (() -> Void)?
    private var stoppingSince: Instant?
    /// When clients' progress was looked at last.
    private var checkedAt = Instant.zero
    /// Of all kinds, those that negotiate included.
    package private(set) var connectionCount = 0
    package private(set) var connectionsRefused: UInt64 = 0
    /// Clients of the volume that came from another host: they outlive this one.
    package private(set) var remoteClients: UInt64 = 0
    /// Connections that read snapshots. They are nobody's client: what they remember is never newer
    /// than the volume.
    package var readerCount: Int { exports.readers }
    /// Clients that read one snapshot, or ask what has changed since it was taken; `.head`: those
    /// of the volume.
    package func userCount(of layer: LayerID) -> Int {
        clients.count { $0?.uses(layer) ?? false }
    }

    /// Without `offersLive` only snapshots are served: nobody can become a client of the volume.
    package init(
        reactor: Reactor, device: any BlockDevice, limits: Limits = Limits(),
        offersLive: Bool = true
    ) {
        self.reactor = reactor
        self.device = device
        self.limits = limits
        exports = NBDExports(
            device: device, readersMax: limits.readersMax, offersLive: offersLive)
        requests = NBDRequests(device: device, clientsMax: limits.connectionsMax)
        clients = Array(repeating: nil, count: limits.connectionsMax)
        device.frontend = self
        reactor.addTurnHook(self)
        let handler = reactor.register(self)
        reactor.timer(everyMilliseconds: 1000, handler: handler, token: 0)
    }

    package var counters: NBDCounters { requests.counters }

    /// Starts to listen; returns the address with the port that was chosen.
    @discardableResult
    package func listen(on address: SocketAddress) throws(IOError) -> SocketAddress {
        let listener = try Listener(reactor: reactor, address: address) { [unowned self] fd in
            accept(fd)
        }
        listeners.append(listener)
        return listener.address
    }

    /// Takes no new connections and requests, answers those in flight, and calls `onStopped` when
    /// the last client has gone.
    package func stop(onStopped: @escaping () -> Void) {
        self.onStopped = onStopped
        stoppingSince = reactor.now
        exports.live.isStopping = true
        closeListeners()
        for client in clients { client?.leave() }
        tellIfStopped()
    }
    /// Ends every connection at once, whatever is unanswered: the process is about to end. Left to
    /// its end, a kernel may keep the sockets for seconds, and clients wait as long to try again.
    package func abandon() {
        closeListeners()
        onStopped = nil
        for client in clients { client?.close() }
    }
    private func closeListeners() {
        for listener in listeners { listener.close() }
        listeners = []
    }
    private func tellIfStopped() {
        guard connectionCount == 0, let callback = onStopped else { return }
        onStopped = nil
        callback()
    }

    // MARK: Clients

    /// Takes over a connected socket.
    package func accept(_ fd: Int32) {
        guard let index = clients.firstIndex(where: { $0 == nil }) else {
            makeRoom()
            connectionsRefused += 1
            Log.warn(
                "refused a client: as many connections as may be are open; some have to end first",
                ("export", device.name), ("connections", String(connectionCount)))
            close(fd)
            return
        }
        connectionCount += 1
        clients[index] = NBDClient(
            server: self, reactor: reactor, requests: requests, index: Int32(index), fd: fd)
    }
    /// The client has chosen its export and may ask for what is in it.
    func entered(_ client: NBDClient, isRemote: Bool) {
        if client.isReader {
            exports.readers += 1
        } else if isRemote {
            remoteClients += 1
        }
    }
    /// Whoever connects and says nothing must not keep others out: while an eighth of the places or
    /// less is free, the silent give theirs up. If none is, so do those who have left, and only
    /// wait for the device.
    private func makeRoom() {
        let present = clients.compactMap { $0 }.filter { !$0.isClosing }
        var free = clients.count - present.count
        if free == 0, let one = present.first(where: \.isLeaving) {
            one.close()
            free += 1
        }
        let limit = limits.negotiationUnderPressureMilliseconds * 1_000_000
        let silent = present.filter { $0.negotiationTime > limit }
            .sorted { $0.negotiationTime > $1.negotiationTime }
        for one in silent where free * 8 <= clients.count {
            one.close()
            free += 1
        }
    }
    /// A new session begins: whatever hung up before it is done with. Live connections of the same
    /// client are left alone, and so are readers of snapshots, who have changed nothing.
    func fenceDeadSessions(for client: NBDClient) {
        guard connectionCount > 1 else { return }
        for other in clients {
            if let other, other !== client, !other.isReader { other.fenceIfHungUp() }
        }
    }
    func remove(_ client: NBDClient) {
        clients[Int(client.index)] = nil
        if client.isReader { exports.readers -= 1 }
        waiting.removeAll { $0 === client }
        connectionCount -= 1
        tellIfStopped()
    }

    /// The client's held request waits for buffers; `goOn` is called when its turn has come.
    func wait(_ client: NBDClient) {
        guard !waiting.contains(where: { $0 === client }) else { return }
        if waiting.isEmpty { waitingSince = reactor.now }
        waiting.append(client)
    }
    /// Nobody overtakes, or a large request would wait for ever behind small ones.
    func isAnybodyWaiting(before client: NBDClient) -> Bool {
        guard let first = waiting.first else { return false }
        return first !== client
    }
    private func serveWaiting() {
        guard !waiting.isEmpty else { return }
        while let client = waiting.first {
            guard client.goOn() else { return }
            if waiting.first === client { waiting.removeFirst() }
            waitingSince = reactor.now
        }
        waitingSince = nil
    }

    // MARK: Turns

    package func turnEnded() {
        for _ in 0..<Self.roundsMax {
            if hasFenceWaiters, requests.fencedOperations == 0 {
                hasFenceWaiters = false
                for client in clients { client?.goOn() }
            }
            serveWaiting()
            requests.submitPending()
            let hasCompleted = device.completeReady()
            if !hasCompleted && !requests.hasPending { return }
        }
        // A long trim of a device that never waits: let others have a turn.
        reactor.post { _ in }
    }

    /// Once a second.
    package func completed(token: UInt64, result: Int) {
        if let stoppingSince,
            reactor.now.nanoseconds(since: stoppingSince) > limits.stopMilliseconds * 1_000_000
        {
            for client in clients { client?.close() }
        }
        let pressure = waitingSince.map { reactor.now.nanoseconds(since: $0) } ?? 0
        let isPressed = pressure > limits.stallUnderPressureMilliseconds * 1_000_000
        let limit =
            isPressed ? limits.stallUnderPressureMilliseconds : limits.stallMilliseconds
        makeRoom()
        // A process that was stopped itself has yet to read what came meanwhile.
        let wasStopped = reactor.now.nanoseconds(since: checkedAt) > 3_000_000_000
        checkedAt = reactor.now
        guard !wasStopped else { return }
        for client in clients {
            client?.checkProgress(
                negotiationLimit: limits.negotiationMilliseconds * 1_000_000,
                limit: limit * 1_000_000, isPressed: isPressed)
        }
    }

    // MARK: The device

    package func complete(
        userData: UInt64, result: OperationResult, buffer: BufferID, tableLength: Int32,
        isHole: Bool
    ) {
        requests.complete(userData: userData, result, buffer, tableLength, isHole)
    }
    package func sizeChanged() { exports.live.size = device.size }
}
