import CAllocations
import Glibc
import HapteraCore
import Testing

@testable import HapteraIO

/// Answers each frame with its own data.
private final class Echo: FrameDelegate {
    var closed: CloseReason?
    var frames = 0
    let reactor: Reactor
    init(_ reactor: Reactor) { self.reactor = reactor }
    func received(
        _ connection: FrameConnection, _ header: FrameHeader, table: RawMemory, buffer: BufferID,
        offset: Int
    ) {
        frames += 1
        var reply = header.reply(.ok, epoch: header.epoch)
        reply.tableLength = header.tableLength
        reply.dataLength = header.dataLength
        connection.send(reply, table: table, buffer: buffer, offset: offset)
        if buffer != .none { reactor.pool.release(buffer) }
    }
    func frameConnectionClosed(_ connection: FrameConnection, reason: CloseReason) {
        closed = reason
    }
}

/// Keeps `depth` frames of one size in flight and checks what comes back.
private final class Client: FrameDelegate {
    let reactor: Reactor
    let size: Int
    let tableSize: Int
    var sent: UInt64 = 0
    var received: UInt64 = 0
    var mismatches = 0
    var closed: CloseReason?
    private let table = MemoryBlock(count: FrameHeader.recordTableLengthMax)
    private let buffer: BufferID
    init(_ reactor: Reactor, size: Int, tableSize: Int = 16) throws {
        self.reactor = reactor
        self.size = size
        self.tableSize = tableSize
        buffer = try #require(reactor.pool.allocate(max(size, 1)))
        fill(reactor.pool.memory(buffer), seed: 42)
    }
    func send(_ connection: FrameConnection) {
        var header = FrameHeader(
            kind: tableSize > FrameHeader.tableLengthMax ? .install : .write)
        header.tag = sent
        header.dataLength = UInt32(size)
        header.tableLength = UInt32(tableSize)
        if tableSize >= 8 { table.memory.store(sent, tableSize - 8) }
        sent += 1
        connection.send(header, table: table.memory, buffer: buffer, offset: 0)
    }
    func received(
        _ connection: FrameConnection, _ header: FrameHeader, table: RawMemory, buffer: BufferID,
        offset: Int
    ) {
        if header.tag != received { mismatches += 1 }
        if tableSize >= 8, table.load(UInt64.self, tableSize - 8) != received { mismatches += 1 }
        if size > 0 {
            // Every frame's checksum would make the test measure CRC32C; each 64th is compared.
            if received % 64 == 0 {
                let data = reactor.pool.memory(buffer).slice(offset, size)
                if !data.equals(reactor.pool.memory(self.buffer).slice(0, size)) { mismatches += 1 }
            }
            reactor.pool.release(buffer)
        }
        received += 1
        if !isStopped { send(connection) }
    }
    var isStopped = false
    func frameConnectionClosed(_ connection: FrameConnection, reason: CloseReason) {
        closed = reason
        reactor.pool.release(buffer)
    }
}

@Suite(.serialized) struct FrameConnectionTests {
    private func pingPong(
        _ backend: Backend, size: Int, tableSize: Int = 16, depth: Int, count: UInt64, tcp: Bool
    ) throws {
        try withReactor(backend) { reactor in
            let echo = Echo(reactor)
            let client = try Client(reactor, size: size, tableSize: tableSize)
            var connection: FrameConnection?
            let address: SocketAddress = .tcp(host: "127.0.0.1", port: 0)
            let listener = try Listener(reactor: reactor, address: address) { fd in
                _ = FrameConnection(reactor: reactor, fd: fd, delegate: echo)
            }
            if tcp {
                _ = Connector(
                    reactor: reactor, address: listener.address, timeoutMilliseconds: 5000
                ) { result in
                    if case .success(let fd) = result {
                        connection = FrameConnection(reactor: reactor, fd: fd, delegate: client)
                    }
                }
                reactor.expect("connected") { connection != nil }
            } else {
                let (a, b) = socketPair()
                _ = FrameConnection(reactor: reactor, fd: a, delegate: echo)
                connection = FrameConnection(reactor: reactor, fd: b, delegate: client)
            }
            let open = try #require(connection)
            for _ in 0..<depth { client.send(open) }
            reactor.expect("echoed \(size)") { client.received >= count }
            client.isStopped = true
            reactor.expect("all echoed") { client.received == client.sent }
            #expect(client.mismatches == 0)
            open.close()
            reactor.expect("closed") { client.closed != nil && echo.closed != nil }
            #expect(client.closed == .local)
            #expect(echo.closed == .ended)
            listener.close()
        }
    }

    @Test(arguments: backends) func hundredThousandSmallFrames(_ backend: Backend) throws {
        try pingPong(backend, size: 0, depth: 64, count: 100_000, tcp: true)
    }
    @Test(arguments: backends, [false, true]) func blocks(_ backend: Backend, tcp: Bool) throws {
        try pingPong(backend, size: 4096, depth: 32, count: 5000, tcp: tcp)
    }
    @Test(arguments: backends, [12 << 10, 128 << 10, 1 << 20])
    func largePayloads(_ backend: Backend, size: Int) throws {
        try pingPong(backend, size: size, depth: 4, count: 100, tcp: true)
    }
    @Test(arguments: backends) func largestTable(_ backend: Backend) throws {
        try pingPong(
            backend, size: 8192, tableSize: FrameHeader.tableLengthMax, depth: 4, count: 200,
            tcp: true)
    }

    /// A frame with the largest record still fits what a connection stages.
    @Test(arguments: backends) func largestRecord(_ backend: Backend) throws {
        try pingPong(
            backend, size: 0, tableSize: FrameHeader.recordTableLengthMax, depth: 4, count: 200,
            tcp: true)
    }

    /// After warm-up 4 KiB frames go to and fro without a single allocation.
    @Test(arguments: backends) func steadyStateAllocatesNothing(_ backend: Backend) throws {
        try #require(haptera_counts_allocations() == 1)
        try withReactor(backend) { reactor in
            let echo = Echo(reactor)
            let client = try Client(reactor, size: 4096)
            let (a, b) = socketPair()
            _ = FrameConnection(reactor: reactor, fd: a, delegate: echo)
            let connection = FrameConnection(reactor: reactor, fd: b, delegate: client)
            for _ in 0..<32 { client.send(connection) }
            reactor.run(until: { client.received >= 5000 })
            let before = haptera_thread_allocations()
            reactor.run(until: { client.received >= 15_000 })
            #expect(haptera_thread_allocations() - before == 0)
            client.isStopped = true
            reactor.expect("all echoed") { client.received == client.sent }
            connection.close()
            reactor.expect("closed") { client.closed != nil && echo.closed != nil }
        }
    }

    /// An empty pool holds the sender back instead of failing, and it goes on by itself.
    @Test(arguments: backends) func emptyPoolPausesReceiving(_ backend: Backend) throws {
        let limits = BufferPool.Limits(small: 2, medium: 1, large: 1)
        try withReactor(backend, limits: limits) { reactor in
            let keeper = Keeper()
            let client = try Client(reactor, size: 4096)
            let (a, b) = socketPair()
            _ = FrameConnection(reactor: reactor, fd: a, delegate: keeper)
            let connection = FrameConnection(reactor: reactor, fd: b, delegate: client)
            client.isStopped = true
            for _ in 0..<10 { client.send(connection) }
            for expected in 1...10 {
                reactor.expect("frame \(expected)") { keeper.kept != .none }
                #expect(keeper.count == expected)
                reactor.pool.release(keeper.kept)
                keeper.kept = .none
            }
            connection.close()
            reactor.expect("closed") { client.closed != nil && keeper.isClosed }
        }
    }

    @Test(arguments: backends) func badFramesHangUp(_ backend: Backend) throws {
        try withReactor(backend) { reactor in
            let block = MemoryBlock(count: FrameHeader.size + 8)
            var header = FrameHeader(kind: .write)
            header.tableLength = 8
            header.tableChecksum = 1
            header.encode(to: block.memory)
            for (error, count) in [(FrameError.tableChecksumMismatch, 80), (.badMagic, 72)] {
                let keeper = Keeper()
                let (a, b) = socketPair()
                _ = FrameConnection(reactor: reactor, fd: a, delegate: keeper)
                let bytes = block.memory.bytes()
                #expect(unsafe write(b, bytes, count) == count)
                reactor.expect("hung up") { keeper.isClosed }
                #expect(keeper.reason == .badFrame(error))
                #expect(keeper.count == 0)
                close(b)
                block.memory[0] = 0
            }
        }
    }
}

/// Keeps the buffer of one frame at a time.
private final class Keeper: FrameDelegate {
    var kept = BufferID.none
    var count = 0
    var reason: CloseReason?
    var isClosed: Bool { reason != nil }
    func received(
        _ connection: FrameConnection, _ header: FrameHeader, table: RawMemory, buffer: BufferID,
        offset: Int
    ) {
        #expect(kept == .none)
        kept = buffer
        count += 1
    }
    func frameConnectionClosed(_ connection: FrameConnection, reason: CloseReason) {
        self.reason = reason
    }
}
