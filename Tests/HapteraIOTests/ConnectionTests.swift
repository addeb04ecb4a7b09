import Glibc
import HapteraCore
import Testing

@testable import HapteraIO

/// Collects what arrives; consumes lines of fixed size, or everything.
private final class Collector: ConnectionDelegate {
    var bytes = 0
    var last: UInt8 = 0
    var ended = false
    var canSend = 0
    var closed: CloseReason?
    var closesOnEnd = true
    /// After this many bytes a payload of `payload.count` is expected.
    var payload: RawMemory?
    var payloadDone = false
    var payloadAfter = Int.max

    func connection(_ connection: Connection, received memory: RawMemory) -> Int {
        if !payloadDone, bytes + memory.count >= payloadAfter, let payload {
            let consumed = payloadAfter - bytes
            bytes = payloadAfter
            payloadDone = true
            connection.receivePayload(into: payload)
            return consumed
        }
        bytes += memory.count
        last = memory[memory.count - 1]
        return memory.count
    }
    var payloadsReceived = 0
    func connectionReceivedPayload(_ connection: Connection) { payloadsReceived += 1 }
    func connectionReceivedEnd(_ connection: Connection) {
        ended = true
        if closesOnEnd { connection.close(.ended) }
    }
    func connectionCanSend(_ connection: Connection) { canSend += 1 }
    func connectionClosed(_ connection: Connection, reason: CloseReason) { closed = reason }
}

private func writeAll(_ fd: Int32, _ count: Int, byte: UInt8 = 7) {
    let bytes = [UInt8](repeating: byte, count: count)
    let written = unsafe send(fd, bytes, count, Int32(MSG_NOSIGNAL))
    precondition(written == count)
}

@Suite(.serialized) struct ConnectionTests {
    /// A peer that never reads: what is queued is counted, and closing frees all of it.
    @Test(arguments: backends) func peerThatNeverReads(_ backend: Backend) throws {
        try withReactor(backend) { reactor in
            let (ours, theirs) = socketPair()
            let collector = Collector()
            let connection = Connection(reactor: reactor, fd: ours, delegate: collector)
            let buffer = try #require(reactor.pool.allocate(1 << 20))
            while connection.queuedSendBytes < Connection.sendQueueHigh + 1 {
                connection.send(buffer: buffer, offset: 0, length: 1 << 20)
            }
            reactor.pool.release(buffer)
            let ticks = Recorder()
            let handler = reactor.register(ticks)
            let timer = reactor.timer(everyMilliseconds: 1, handler: handler, token: 1)
            reactor.expect("turns pass") { ticks.count >= 20 }
            reactor.cancel(timer)
            #expect(connection.queuedSendBytes > Connection.sendQueueHigh / 2)
            #expect(collector.canSend == 0)
            connection.close()
            reactor.expect("closed") { collector.closed == .local }
            #expect(connection.queuedSendBytes == 0)
            close(theirs)
        }
    }

    /// A slow reader gets everything, and the sender hears when it may go on.
    @Test(arguments: backends) func slowReader(_ backend: Backend) throws {
        try withReactor(backend) { reactor in
            let (ours, theirs) = socketPair()
            let sender = Collector()
            let receiver = Collector()
            let out = Connection(reactor: reactor, fd: ours, delegate: sender)
            let total = 6 << 20
            let block = MemoryBlock(count: total)
            out.send(copying: block.memory)
            let receiving = Connection(reactor: reactor, fd: theirs, delegate: receiver)
            reactor.expect("all received") { receiver.bytes == total }
            reactor.expect("may send again") { sender.canSend == 1 }
            receiving.close()
            reactor.expect("closed") { sender.closed != nil && receiver.closed != nil }
        }
    }

    /// The peer shuts its side down and still gets the whole answer.
    @Test(arguments: backends) func halfClose(_ backend: Backend) throws {
        try withReactor(backend) { reactor in
            let (ours, theirs) = socketPair()
            let collector = Collector()
            collector.closesOnEnd = false
            let connection = Connection(reactor: reactor, fd: ours, delegate: collector)
            writeAll(theirs, 10)
            shutdown(theirs, Int32(SHUT_WR))
            reactor.expect("end seen") { collector.ended && collector.bytes == 10 }
            let peer = Collector()
            _ = Connection(reactor: reactor, fd: theirs, delegate: peer)
            let block = MemoryBlock(count: 1 << 20)
            connection.send(copying: block.memory)
            connection.finish()
            reactor.expect("closed") { collector.closed != nil && peer.closed != nil }
            #expect(peer.bytes == 1 << 20)
            #expect(collector.closed == .local)
        }
    }

    /// The peer vanishes inside a payload: the memory is given back exactly once, when it is safe.
    @Test(arguments: backends, [5000, 1 << 20])
    func endInsidePayload(_ backend: Backend, size: Int) throws {
        try withReactor(backend) { reactor in
            let (ours, theirs) = socketPair()
            let collector = Collector()
            let payload = MemoryBlock(count: size)
            collector.payload = payload.memory
            collector.payloadAfter = 16
            _ = Connection(reactor: reactor, fd: ours, delegate: collector)
            writeAll(theirs, 16 + 4000)
            reactor.expect("payload begun") { collector.payloadDone }
            close(theirs)
            reactor.expect("closed") { collector.closed == .ended }
            #expect(collector.payloadsReceived == 0)
        }
    }

    @Test(arguments: backends) func resetInsidePayload(_ backend: Backend) throws {
        try withReactor(backend) { reactor in
            let collector = Collector()
            let payload = MemoryBlock(count: 1 << 20)
            collector.payload = payload.memory
            collector.payloadAfter = 16
            let listener = try Listener(
                reactor: reactor, address: .tcp(host: "127.0.0.1", port: 0)
            ) { fd in
                _ = Connection(reactor: reactor, fd: fd, delegate: collector)
            }
            var peer: Int32 = -1
            _ = Connector(
                reactor: reactor, address: listener.address, timeoutMilliseconds: 5000
            ) { if case .success(let fd) = $0 { peer = fd } }
            reactor.expect("connected") { peer >= 0 }
            writeAll(peer, 16 + 100_000)
            reactor.expect("payload begun") { collector.payloadDone }
            var lingering = linger(l_onoff: 1, l_linger: 0)
            unsafe setsockopt(
                peer, SOL_SOCKET, SO_LINGER, &lingering, socklen_t(MemoryLayout<linger>.size))
            close(peer)
            reactor.expect("closed") { collector.closed != nil }
            #expect(collector.closed == .failed(errno: ECONNRESET))
            listener.close()
        }
    }

    /// A payload split at every kind of boundary arrives whole, and what follows it too.
    @Test(arguments: backends, [100, 4096, 40_000, 300_000])
    func payloadInPieces(_ backend: Backend, size: Int) throws {
        try withReactor(backend) { reactor in
            let (ours, theirs) = socketPair()
            let collector = Collector()
            let payload = MemoryBlock(count: size)
            collector.payload = payload.memory
            collector.payloadAfter = 16
            let connection = Connection(reactor: reactor, fd: ours, delegate: collector)
            var left = 16 + size + 50
            for step in [1, 15, 30, 1000, 7, 20_000, 1 << 30] where left > 0 {
                let part = min(step, left)
                left -= part
                self.feed(reactor, theirs, part)
                let sent = 16 + size + 50 - left
                reactor.expect("\(sent) received") { self.arrived(collector, size, sent) }
            }
            reactor.expect("trailing bytes") { collector.bytes == 66 }
            #expect(collector.payloadsReceived == 1)
            #expect(payload.memory.bytes().allSatisfy { $0 == 9 })
            connection.close()
            reactor.expect("closed") { collector.closed == .local }
            close(theirs)
        }
    }
    /// Writes without blocking: the reader is on the same thread.
    private func feed(_ reactor: Reactor, _ fd: Int32, _ count: Int) {
        let bytes = [UInt8](repeating: 9, count: count)
        var sent = 0
        reactor.expect("written") {
            let flags = Int32(MSG_NOSIGNAL | MSG_DONTWAIT)
            let result = unsafe bytes[sent...].withUnsafeBytes {
                unsafe send(fd, $0.baseAddress, $0.count, flags)
            }
            sent += max(result, 0)
            return sent == count
        }
    }
    /// Everything before the payload is seen at once; the payload itself only when it is complete.
    private func arrived(_ collector: Collector, _ size: Int, _ total: Int) -> Bool {
        if total < 16 { return collector.bytes == total }
        if total < 16 + size { return collector.payloadDone }
        return collector.payloadsReceived == 1
    }

    @Test(arguments: backends) func pauseHoldsThePeerBack(_ backend: Backend) throws {
        try withReactor(backend) { reactor in
            let (ours, theirs) = socketPair()
            let collector = Collector()
            let sender = Collector()
            let connection = Connection(reactor: reactor, fd: ours, delegate: collector)
            connection.pauseReceiving()
            let out = Connection(reactor: reactor, fd: theirs, delegate: sender)
            let total = 5 << 20
            let block = MemoryBlock(count: total)
            out.send(copying: block.memory)
            withExtendedLifetime(block) {}
            var before = -1
            let ticks = Recorder()
            let timer = reactor.timer(
                everyMilliseconds: 2, handler: reactor.register(ticks), token: 0)
            // Until the kernel's buffers are full.
            reactor.expect("stalled") {
                defer { before = out.queuedSendBytes }
                return ticks.count > 5 && before == out.queuedSendBytes
            }
            #expect(collector.bytes == 0)
            #expect(out.queuedSendBytes > 1 << 20)
            connection.resumeReceiving()
            reactor.expect("all received") { collector.bytes == total }
            reactor.cancel(timer)
            connection.close()
            out.close()
            reactor.expect("closed") { collector.closed != nil && sender.closed != nil }
        }
    }

    /// Connections opened and closed in every way leave no descriptor behind.
    @Test(arguments: backends) func noDescriptorLeaks(_ backend: Backend) throws {
        try withReactor(backend) { reactor in
            let directory = TemporaryDirectory()
            let path = directory.file("socket")
            var served: [Collector] = []
            let listener = try Listener(reactor: reactor, address: .unix(path: path)) { fd in
                let collector = Collector()
                served.append(collector)
                _ = Connection(reactor: reactor, fd: fd, delegate: collector)
            }
            func round(_ index: Int) {
                var fd: Int32 = -1
                _ = Connector(
                    reactor: reactor, address: .unix(path: path), timeoutMilliseconds: 5000
                ) { if case .success(let connected) = $0 { fd = connected } }
                reactor.expect("connected") { fd >= 0 && served.count == index + 1 }
                if index % 2 == 0 { writeAll(fd, 100) }
                if index % 3 == 0 { shutdown(fd, Int32(SHUT_RDWR)) }
                close(fd)
                reactor.expect("gone") { served[index].closed != nil }
            }
            round(0)
            let before = openDescriptors()
            for index in 1...60 { round(index) }
            // Other tests of the process may hold some for a moment; a leak would be 60.
            #expect(openDescriptors() - before < 30)
            listener.close()
            #expect(unsafe access(path, F_OK) != 0)
        }
    }

    @Test(arguments: backends) func connectorFails(_ backend: Backend) throws {
        try withReactor(backend) { reactor in
            var outcomes: [IOError] = []
            // A port that was free a moment ago refuses.
            let listener = try Listener(
                reactor: reactor, address: .tcp(host: "127.0.0.1", port: 0)
            ) { close($0) }
            let address = listener.address
            listener.close()
            for target in [address, .unix(path: "/nonexistent/socket")] {
                _ = Connector(reactor: reactor, address: target, timeoutMilliseconds: 2000) {
                    if case .failure(let error) = $0 { outcomes.append(error) }
                }
            }
            reactor.expect("both failed") { outcomes.count == 2 }
            #expect(Set(outcomes.map(\.errno)) == [ECONNREFUSED, ENOENT])
        }
    }
}
