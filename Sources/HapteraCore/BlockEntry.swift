/// What is known of one block of one layer. Raw values are on disk and on the wire.
package enum BlockState: UInt8, BitwiseCopyable, Sendable {
    /// Never written in this layer: the layer below decides, or it reads zero.
    case absent = 0
    /// Holds data whose CRC32C the entry records.
    case data = 1
    /// Reads zero, holds no space (trimmed, or zeroed with holes allowed).
    case zero = 2
    /// Reads zero, its space is kept (zeroed with holes forbidden).
    case zeroAllocated = 3

    package var keepsSpace: Bool { self == .data || self == .zeroAllocated }
    package var isZero: Bool { self == .zero || self == .zeroAllocated }
}

/// One 8-byte entry of a block table.
///
///     offset  size  field
///          0     1  state      raw value of `BlockState`
///          1     3  reserved   zero
///          4     4  checksum   CRC32C of the block's 4096 bytes; zero unless state is data
package struct BlockEntry: Equatable, BitwiseCopyable, Sendable {
    package static let size = 8
    package var state: BlockState
    package var checksum: UInt32

    @inlinable package init(state: BlockState, checksum: UInt32 = 0) {
        self.state = state
        self.checksum = checksum
    }
    package static let absent = BlockEntry(state: .absent)

    @inlinable package func encode(to memory: RawMemory, at offset: Int) {
        memory.store(UInt64(state.rawValue) | UInt64(checksum) << 32, offset)
    }
    /// Nil if the state is unknown, a reserved byte is set, or a checksum stands without data.
    @inlinable package init?(decoding memory: RawMemory, at offset: Int) {
        let raw = memory.load(UInt64.self, offset)
        guard raw & 0xffff_ff00 == 0, let state = BlockState(rawValue: UInt8(raw & 0xff)) else {
            return nil
        }
        self.state = state
        checksum = UInt32(raw >> 32)
        if state != .data && checksum != 0 { return nil }
    }
}

/// The reply to `FrameKind.digest`: for each of the region's 256 blocks what the replica holds.
///
///     offset         size  field
///          0            8  birth       epoch of the region's last write on this replica
///          8 + 32 * i   32  block i:
///              +0        8  entry       as in the block table
///              +8        1  doubtful    1: the data does not match the entry
///              +9        7  reserved    zero
///             +16       16  hash        first 16 bytes of SHA-256; zero unless state is data
///
/// Blocks past the end of the volume are absent. Two blocks are equal if entry state and hash are,
/// and neither is doubtful: CRC32C alone is no proof of equality over millions of blocks.
package enum RegionDigest {
    package static let blockRecordSize = 32
    package static let size = 8 + Geometry.blocksPerRegion * blockRecordSize

    package struct Block: Equatable, Sendable {
        package var entry: BlockEntry
        package var isDoubtful: Bool
        package var hashLow: UInt64
        package var hashHigh: UInt64
        package init(entry: BlockEntry, isDoubtful: Bool, hashLow: UInt64, hashHigh: UInt64) {
            self.entry = entry
            self.isDoubtful = isDoubtful
            self.hashLow = hashLow
            self.hashHigh = hashHigh
        }
    }
    package static func encode(_ block: Block, index: Int, to memory: RawMemory) {
        let at = 8 + index * blockRecordSize
        block.entry.encode(to: memory, at: at)
        memory.store(UInt64(block.isDoubtful ? 1 : 0), at + 8)
        memory.store(block.hashLow, at + 16)
        memory.store(block.hashHigh, at + 24)
    }
    /// Nil if a peer sent nonsense.
    package static func decode(index: Int, from memory: RawMemory) -> Block? {
        let at = 8 + index * blockRecordSize
        let doubt = memory.load(UInt64.self, at + 8)
        guard doubt <= 1, let entry = BlockEntry(decoding: memory, at: at) else { return nil }
        return Block(
            entry: entry, isDoubtful: doubt == 1, hashLow: memory.load(UInt64.self, at + 16),
            hashHigh: memory.load(UInt64.self, at + 24))
    }
}

/// `FrameHeader.auxiliary` of `FrameKind.adopt`.
package enum AdoptRequest {
    /// Take the bytes that are there for the blocks' data.
    package static let keep: UInt64 = 0
    /// No member has the data; the entries are to name this checksum.
    package static func naming(_ checksum: UInt32) -> UInt64 { 1 | UInt64(checksum) << 32 }
    /// Nil: it asks for nothing of the kind.
    package static func checksum(_ auxiliary: UInt64) -> UInt32? {
        auxiliary & 0xffff_ffff == 1 ? UInt32(truncatingIfNeeded: auxiliary >> 32) : nil
    }
}
