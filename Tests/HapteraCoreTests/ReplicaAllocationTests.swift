import CAllocations
import Testing

@testable import HapteraCore

@Suite struct ReplicaAllocationTests {
    /// A disk that answers at once; every block holds the same bytes.
    private final class Host {
        let pool = BufferPool(limits: .init(small: 64, medium: 16, large: 2))
        let core: ReplicaCore
        let content = MemoryBlock(count: 4096)
        let table = MemoryBlock(count: 4)
        var answered = 0
        var now = Instant(rawValue: 1)

        init(_ disk: ReplicaTestDisk) throws(StorageError) {
            core = try ReplicaCore(opening: disk, options: ReplicaBench.options(), pool: pool)
            for place in 0..<512 { content.memory.store(UInt64(place) &* 77, place * 8) }
            table.memory.store(CRC32C.checksum(content.memory), 0)
        }

        func step(_ event: ReplicaEvent) {
            core.step(event, now: now)
            while let action = core.actions.popFirst() {
                switch action {
                case .read(let file, _, let length, let buffer, let at, let token):
                    let target = pool.memory(buffer).slice(at, length)
                    if case .data = file {
                        target.copy(from: content.memory)
                    } else {
                        target.fill()
                    }
                    step(.disk(token: token, result: length))
                case .write(_, _, let length, _, _, let token):
                    step(.disk(token: token, result: length))
                case .sync(_, let token), .punch(_, _, _, let token):
                    step(.disk(token: token, result: 0))
                case .reply(_, let header, let tableBuffer, let buffer, _):
                    if header.status == .ok { answered += 1 }
                    if tableBuffer != .none { pool.release(tableBuffer) }
                    if buffer != .none { pool.release(buffer) }
                default: break
                }
            }
        }

        func control(_ kind: FrameKind, _ payload: [UInt8]) {
            var header = FrameHeader(kind: kind)
            header.tableLength = UInt32(payload.count)
            let block = MemoryBlock(count: payload.count)
            block.memory.copy(from: payload)
            step(.frame(connection: 0, header, table: block.memory, buffer: .none))
        }

        func request(_ kind: FrameKind, block: UInt64, sequence: UInt64) {
            var header = FrameHeader(kind: kind)
            header.epoch = Epoch(1)
            header.sequence = SequenceNumber(sequence)
            header.offset = block * 4096
            header.length = kind == .flush || kind == .stable ? 0 : 4096
            if kind == .stable { header.auxiliary = 1 }
            var buffer = BufferID.none
            if kind == .write, let own = pool.allocate(4096) {
                buffer = own
                pool.memory(own).copy(from: content.memory)
                header.dataLength = 4096
                header.tableLength = 4
            }
            step(
                .frame(
                    connection: 0, header, table: table.memory.slice(0, Int(header.tableLength)),
                    buffer: buffer))
        }

        /// Writes, reads, flushes, stable points and ticks over all regions.
        func round(_ number: UInt64) {
            let block = number % 8 * 256 + number % 200
            request(.write, block: block, sequence: number * 4)
            request(.read, block: block, sequence: number * 4 + 1)
            guard number % 16 == 0 else { return }
            request(.flush, block: 0, sequence: number * 4 + 2)
            request(.stable, block: 0, sequence: number * 4 + 2)
            now = now.adding(milliseconds: 3000)
            step(.tick)
        }
    }

    /// After warm-up nothing is allocated per request, nor by what goes on behind them.
    @Test func aRequestAllocatesNothing() throws {
        try #require(haptera_counts_allocations() == 1)
        let disk = ReplicaTestDisk()
        try ReplicaCore.create(
            storage: disk, identity: ReplicaBench.identity(), logCapacity: ActivityLog.capacityMin)
        let host = try Host(disk)
        host.step(.connected(connection: 0))
        let engine = InstanceID(rawValue: 1)
        host.control(.hello, HelloRequest(volume: ReplicaBench.volume, engine: engine).encoded())
        let record = VolumeRecord(
            volume: ReplicaBench.volume, name: "vol", epoch: Epoch(1), nonce: 1,
            size: host.core.size, inSync: [host.core.identity.member])
        host.control(.install, InstallRequest(engine: engine, record: record).encoded())
        for number in 1...400 as ClosedRange<UInt64> { host.round(number) }
        let answered = host.answered
        let before = haptera_thread_allocations()
        // Iterating over a range allocates by itself in a debug build.
        var number: UInt64 = 401
        while number <= 2000 {
            host.round(number)
            number += 1
        }
        let allocations = haptera_thread_allocations() - before
        #expect(allocations == 0)
        #expect(host.answered - answered == 3300)
        #expect(host.pool.inUse == 0)
    }
}
