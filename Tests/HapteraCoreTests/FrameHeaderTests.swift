import Testing

@testable import HapteraCore

@Suite struct FrameHeaderTests {
    private func sample() -> FrameHeader {
        var header = FrameHeader(kind: .write)
        header.flags = FrameFlags.fua
        header.epoch = Epoch(7)
        header.tag = 0x1122_3344_5566_7788
        header.sequence = SequenceNumber(9)
        header.offset = 8192
        header.length = 4096
        header.tableLength = 4
        header.dataLength = 4096
        header.auxiliary = 3
        header.tableChecksum = 0xdead_beef
        return header
    }

    @Test func roundTrip() throws {
        let block = MemoryBlock(count: FrameHeader.size)
        sample().encode(to: block.memory)
        #expect(try FrameHeader(decoding: block.memory) == sample())
    }

    /// Any single flipped bit is noticed: a header is never half believed.
    @Test func everyBitFlipIsRejected() {
        let block = MemoryBlock(count: FrameHeader.size)
        for bit in 0..<FrameHeader.size * 8 {
            sample().encode(to: block.memory)
            block.memory[bit / 8] ^= 1 << UInt8(bit % 8)
            #expect(throws: FrameError.self) { try FrameHeader(decoding: block.memory) }
        }
    }
}

@Suite struct VolumeRecordTests {
    private func sample() -> VolumeRecord {
        let member = VolumeRecord.Member(
            replica: ReplicaID(rawValue: 5), incarnation: Incarnation(rawValue: 6))
        var record = VolumeRecord(
            volume: VolumeID(high: 1, low: 2), name: "vol", epoch: Epoch(3), nonce: 4,
            size: 1 << 30, inSync: [member])
        record.joining = VolumeRecord.Member(
            replica: ReplicaID(rawValue: 7), incarnation: Incarnation(rawValue: 8))
        record.out = [
            VolumeRecord.Departure(
                member: member, leftEpoch: Epoch(2),
                stablePoint: StablePoint(epoch: Epoch(1), sequence: SequenceNumber(77)),
                partedEpoch: Epoch(1), reason: .silent, isKept: true)
        ]
        record.lineage = [
            VolumeRecord.Fork(
                epoch: Epoch(1), survivor: ReplicaID(rawValue: 5), partedEpoch: Epoch(1))
        ]
        record.change = .salvage
        record.engineEndpoint = "127.0.0.1:1"
        return record
    }

    @Test func roundTrip() {
        #expect(VolumeRecord(decoding: sample().encoded()) == sample())
    }

    @Test func everyBitFlipAndTruncationIsRejected() {
        let bytes = sample().encoded()
        for bit in 0..<bytes.count * 8 {
            var flipped = bytes
            flipped[bit / 8] ^= 1 << UInt8(bit % 8)
            #expect(VolumeRecord(decoding: flipped) == nil)
        }
        for count in 0..<bytes.count {
            #expect(VolumeRecord(decoding: [UInt8](bytes.prefix(count))) == nil)
        }
    }
}

@Suite struct BufferPoolTests {
    @Test func classesRunOutAndComeBack() throws {
        let pool = BufferPool(limits: .init(small: 2, medium: 1, large: 1))
        let a = try #require(pool.allocate(1))
        let b = try #require(pool.allocate(4096))
        #expect(pool.allocate(4096) == nil)
        let large = try #require(pool.allocate(1 << 20))
        #expect(pool.memory(large).count == 1 << 20)
        pool.retain(a)
        pool.release(a)
        #expect(pool.allocate(1) == nil)
        pool.release(a)
        #expect(pool.allocate(1) == a)
        pool.release(a)
        pool.release(b)
        pool.release(large)
        #expect(pool.inUse == 0)
    }
}
