import CAllocations
import Glibc
import HapteraCore
import HapteraIO
import Testing

@testable import HapteraEngine

/// The server itself allocates nothing per request once it is warm.
@Suite struct NBDAllocationTests {
    @Test func steadyStateAllocatesNothing() throws {
        guard haptera_counts_allocations() != 0 else { return }
        let reactor = try Reactor()
        let device = MemoryDevice(
            name: "vol", size: 1 << 30, isReadOnly: false, pool: reactor.pool)
        let server = NBDServer(reactor: reactor, device: device)
        var pair: [Int32] = [-1, -1]
        // SAFETY: room for two descriptors, as socketpair wants.
        try #require(unsafe socketpair(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0, &pair) == 0)
        defer { close(pair[0]) }
        server.accept(pair[1])
        let client = BatchClient(fd: pair[0])
        client.exchange(reactor, [0, 0, 0, 3] + NBDBytes.option(1), expecting: 28)
        // Unoptimised code allocates for some loops, once a turn: so batches of many requests are
        // compared with batches of one.
        let single = client.allocations(reactor, batch: 1)
        let many = client.allocations(reactor, batch: 16)
        #expect(many < single + BatchClient.rounds, "more than one per 30 requests")
    }
}

/// Sends a batch and waits for its replies without allocating.
private final class BatchClient {
    private let fd: Int32
    private let sink = MemoryBlock(count: 1 << 20)
    init(fd: Int32) {
        self.fd = fd
        _ = fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK)
    }
    static let rounds: UInt64 = 500

    /// What `rounds` exchanges of `batch` writes and as many reads allocate, warm.
    func allocations(_ reactor: Reactor, batch: Int) -> UInt64 {
        let write =
            NBDBytes.request(.write, offset: 8192, length: 4096)
            + [UInt8](repeating: 5, count: 4096)
        let read = NBDBytes.request(.read, offset: 8192, length: 4096)
        let writes = [UInt8](repeatingBatch: write, batch)
        let reads = [UInt8](repeatingBatch: read, batch)
        var before: UInt64 = 0
        for round in 0..<2 * Self.rounds {
            if round == Self.rounds { before = haptera_thread_allocations() }
            exchange(reactor, writes, expecting: batch * 16)
            exchange(reactor, reads, expecting: batch * (16 + 4096))
        }
        return haptera_thread_allocations() - before
    }
    func exchange(_ reactor: Reactor, _ bytes: [UInt8], expecting count: Int) {
        // SAFETY: the array's memory is valid during the call.
        let sent = unsafe send(fd, bytes, bytes.count, Int32(MSG_NOSIGNAL))
        precondition(sent == bytes.count)
        var received = 0
        reactor.run {
            // SAFETY: the block has room for the bytes asked for.
            received += max(0, unsafe recv(fd, sink.memory.base, sink.memory.count, 0))
            return received == count
        }
    }
}

extension [UInt8] {
    fileprivate init(repeatingBatch bytes: [UInt8], _ count: Int) {
        self = (0..<count).flatMap { _ in bytes }
    }
}
