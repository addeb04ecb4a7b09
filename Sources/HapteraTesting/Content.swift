import HapteraCore

/// What a write put into one sector, or zero for a sector that reads zero.
package typealias ValueID = UInt64

/// Self-describing content: every 512-byte sector names the write it came from and where it
/// belongs, so that a misplaced, torn or rotten sector is told from any the volume may legally
/// hold.
package enum Content {
    /// The smallest unit a client writes, and a disk keeps whole, bytes.
    package static let sectorSize = 512
    package static let sectorsPerBlock = Geometry.blockSize / sectorSize
    /// What `value(in:sector:)` says of bytes no write ever made.
    package static let garbage: ValueID = .max

    private static func fillByte(_ value: ValueID, _ sector: UInt64) -> UInt8 {
        UInt8(truncatingIfNeeded: RandomSource.mix(value &* 31 &+ sector) | 1)
    }

    /// Fills one sector. `sector`: its index in the volume.
    package static func fill(_ memory: RawMemory, value: ValueID, sector: UInt64) {
        let memory = memory.slice(0, sectorSize)
        guard value != 0 else { return memory.fill() }
        memory.fill(fillByte(value, sector))
        memory.store(value, 0)
        memory.store(sector, 8)
    }

    private static let zeroSector = MemoryBlock(count: sectorSize)
    private static let zeroChecksum = CRC32C.checksum(zeroSector.memory)

    /// Which write the sector's bytes came from: zero for all zeroes, `garbage` for anything no
    /// write produced. `scratch`: at least one sector, overwritten.
    package static func value(in memory: RawMemory, sector: UInt64, scratch: RawMemory) -> ValueID {
        let value = memory.load(UInt64.self, 0)
        let checksum = CRC32C.checksum(memory.slice(0, sectorSize))
        if value == 0 { return checksum == zeroChecksum ? 0 : garbage }
        guard memory.load(UInt64.self, 8) == sector else { return garbage }
        fill(scratch, value: value, sector: sector)
        let expected = CRC32C.checksum(scratch.slice(0, sectorSize))
        return checksum == expected ? value : garbage
    }
}

/// The contents of one volume, by the numbers of its own operations.
///
/// A clone begins with what its source's operations wrote. On the disk its own are marked, so that
/// bytes of the one volume are never taken for the other's.
package final class Contents {
    private static let mark: ValueID = 1 << 40
    /// For a clone: its own number for what each of its source's operations left it.
    private let inherited: [ValueID: ValueID]
    private let source: Contents?
    /// Of an original 0, of its clone 1, of a clone of that 2.
    package let generation: UInt64
    package var isClone: Bool { source != nil }
    private let scratch = MemoryBlock(count: Content.sectorSize)

    /// Of an original.
    package init() {
        inherited = [:]
        source = nil
        generation = 0
    }
    package init(inherited: [ValueID: ValueID], from source: Contents) {
        self.inherited = inherited
        self.source = source
        generation = source.generation + 1
    }

    /// Of a value on the disk. One that is not this volume's is garbage.
    package func own(_ value: ValueID) -> ValueID {
        guard let source, value != 0, value != Content.garbage else { return value }
        if value / Self.mark == generation { return value % Self.mark }
        return inherited[source.own(value)] ?? Content.garbage
    }
    package func fill(_ memory: RawMemory, value: ValueID, sector: UInt64) {
        let marked = value == 0 ? 0 : value + generation * Self.mark
        Content.fill(memory, value: marked, sector: sector)
    }
    /// Zero for all zeroes, `garbage` for anything that no write of the volume produced.
    package func value(in memory: RawMemory, sector: UInt64) -> ValueID {
        own(Content.value(in: memory, sector: sector, scratch: scratch.memory))
    }
}
