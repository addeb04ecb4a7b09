/// The reply to `FrameKind.verify`: what a replica found when it read a region of its copy, from
/// the layer asked about downwards.
///
///     offset  size  field
///          0     4  checked      data blocks that were read and checked
///          4     4  suspect      of these, blocks that do not match their entry or cannot be read
///          8     4  next         the layer to ask about to go on; zero: nothing is left below
///         12     4  reserved     zero
///         16    16  fingerprint  of the entries of the layers that were looked at
///
/// Copies that hold the same stop at the same layer, and have the same fingerprint.
package struct RegionVerification: Equatable, BitwiseCopyable, Sendable {
    package static let size = 32
    /// A replica stops below the layer with which it has read so much, or looked at so many layers
    /// that hold anything: an answer that takes long looks like none.
    package static let blocksMax = Geometry.blocksPerRegion
    package static let layersMax = 64

    package var checked: UInt32 = 0
    package var suspect: UInt32 = 0
    package var next = LayerID.head
    package var low: UInt64 = 0
    package var high: UInt64 = 0

    package init() {}

    package func encode(to memory: RawMemory) {
        memory.store(checked, 0)
        memory.store(suspect, 4)
        memory.store(UInt64(next.rawValue), 8)
        memory.store(low, 16)
        memory.store(high, 24)
    }
    /// Nil if a peer sent nonsense.
    package init?(decoding memory: RawMemory) {
        guard memory.count == Self.size, memory.load(UInt32.self, 12) == 0 else { return nil }
        checked = memory.load(UInt32.self, 0)
        suspect = memory.load(UInt32.self, 4)
        next = LayerID(rawValue: memory.load(UInt32.self, 8))
        low = memory.load(UInt64.self, 16)
        high = memory.load(UInt64.self, 24)
        guard suspect <= checked else { return nil }
    }

    /// Adds a layer's entries; layers that hold nothing are left out.
    package mutating func add(_ layer: LayerID, _ hash: (low: UInt64, high: UInt64)) {
        low = (low ^ hash.low ^ UInt64(layer.rawValue)) &* 0x9E37_79B9_7F4A_7C15
        low ^= low >> 31
        high = (high ^ hash.high) &* 0xC2B2_AE3D_27D4_EB4F
        high ^= high >> 29
    }
    package func isSame(as other: RegionVerification) -> Bool {
        low == other.low && high == other.high && next == other.next
    }
}
