/// The fixed sizes every part of the system agrees on. They are part of the on-disk format and of
/// the wire protocol: changing one is a new format version.
package enum Geometry {
    /// The unit of checksum, bytes.
    package static let blockSize = 4096
    /// The unit of the activity log and of resync, bytes. One request to a replica never crosses a
    /// region boundary (except `FrameKind.status`).
    package static let regionSize = 1 << 20
    package static let blocksPerRegion = regionSize / blockSize
    /// Members and joiners one engine can hold connections to; fits a bit mask in one byte.
    package static let replicaSlotsMax = 8
    /// Copies of a volume a user may ask for.
    package static let replicasMax = 5
    /// Bytes; a block index is stored in 64 bits, so this is a sanity bound and not a format limit.
    package static let volumeSizeMax: UInt64 = 1 << 50

    /// Index of the region that holds the byte at `offset`.
    @inlinable package static func region(ofByte offset: UInt64) -> UInt64 {
        offset / UInt64(regionSize)
    }
    /// Number of regions of a volume of `size` bytes (the last may be partial).
    @inlinable package static func regionCount(size: UInt64) -> UInt64 {
        (size + UInt64(regionSize) - 1) / UInt64(regionSize)
    }
    /// The blocks a byte range touches, rounded outwards. `length` must not be zero.
    @inlinable package static func blocks(offset: UInt64, length: Int) -> Range<UInt64> {
        offset / UInt64(blockSize)..<(offset + UInt64(length) + UInt64(blockSize) - 1)
            / UInt64(blockSize)
    }
}
