/// The durable form of one region's entries and birth in one layer: a 4 KiB page in two alternating
/// slots of the layer's table file, slot s of region g at (2 * g + s) * 4096.
///
///     offset  size  field
///          0     4  magic      "HPTB"
///          4     4  format     1
///          8     4  layer      the layer's id
///         12     4  flags      zero
///         16     8  region
///         24     8  version    grows by one per write; version % 2 is the slot
///         32     8  birth      epoch of the region's last write
///         40     8  logIndex   the log's records of this region with a smaller index are in here
///         48     4  checksum   CRC32C of bytes 0..<48, then of 52..<4096
///         52    12  reserved   zero
///         64  2048  entries    256 of 8 bytes (`BlockEntry`)
///       2112  1984  reserved   zero
///
/// An empty page's only bytes that are not zero are in its first sector, so a torn write of one
/// onto a hole leaves it whole or all zero.
package struct TablePage: Equatable, BitwiseCopyable, Sendable {
    package static let size = 4096
    package static let pairSize = 2 * size
    package static let entriesOffset = 64
    package static let entriesSize = Geometry.blocksPerRegion * BlockEntry.size
    package static let magic: UInt32 = 0x4254_5048
    package static let formatVersion: UInt32 = 1

    package var layer: LayerID
    package var region: UInt64
    package var version: UInt64
    package var birth: Epoch
    package var logIndex: UInt64

    package init(
        layer: LayerID, region: UInt64, version: UInt64, birth: Epoch, logIndex: UInt64
    ) {
        self.layer = layer
        self.region = region
        self.version = version
        self.birth = birth
        self.logIndex = logIndex
    }

    package static func pairOffset(region: UInt64) -> UInt64 { region * UInt64(pairSize) }
    package static func offset(region: UInt64, version: UInt64) -> UInt64 {
        pairOffset(region: region) + (version % 2) * UInt64(size)
    }

    /// Writes the whole page; `entries` are 2048 bytes, or nil for all absent.
    package func encode(entries: RawMemory?, to memory: RawMemory) {
        let page = memory.slice(0, Self.size)
        page.fill()
        page.store(Self.magic, 0)
        page.store(Self.formatVersion, 4)
        page.store(layer.rawValue, 8)
        page.store(region, 16)
        page.store(version, 24)
        page.store(birth.rawValue, 32)
        page.store(logIndex, 40)
        if let entries {
            precondition(entries.count == Self.entriesSize)
            page.copy(from: entries, at: Self.entriesOffset)
        }
        page.store(Self.checksum(page), 48)
    }

    /// The first two pages of a region: all absent.
    package static func encodeEmptyPair(layer: LayerID, region: UInt64, to memory: RawMemory) {
        for version in 0..<2 {
            let page = TablePage(
                layer: layer, region: region, version: UInt64(version), birth: .zero, logIndex: 0)
            page.encode(entries: nil, to: memory.slice(version * size, size))
        }
    }

    /// Nil unless this is a whole, valid page of this layer and region in the slot it was found in.
    package init?(decoding memory: RawMemory, layer: LayerID, region: UInt64, slot: Int) {
        let page = memory.slice(0, Self.size)
        guard page.load(UInt32.self, 0) == Self.magic,
            page.load(UInt32.self, 4) == Self.formatVersion,
            page.load(UInt32.self, 48) == Self.checksum(page),
            page.load(UInt32.self, 8) == layer.rawValue, page.load(UInt32.self, 12) == 0,
            page.load(UInt64.self, 16) == region,
            page.load(UInt64.self, 24) % 2 == UInt64(slot),
            // Nothing counts that far: a counter near its end would overflow later.
            page.load(UInt64.self, 24) < 1 << 62, page.load(UInt64.self, 40) < 1 << 62
        else { return nil }
        self.init(
            layer: layer, region: region, version: page.load(UInt64.self, 24),
            birth: Epoch(page.load(UInt64.self, 32)), logIndex: page.load(UInt64.self, 40))
        for block in 0..<Geometry.blocksPerRegion {
            let at = Self.entriesOffset + block * BlockEntry.size
            guard BlockEntry(decoding: page, at: at) != nil else { return nil }
        }
    }

    static func checksum(_ page: RawMemory) -> UInt32 {
        CRC32C.checksum(
            page.slice(52, size - 52), continuing: CRC32C.checksum(page.slice(0, 48)))
    }

    /// What a region's two slots hold together.
    package enum Pair: Equatable {
        /// Both slots are all zero.
        case neverWritten
        /// The newer valid page. `isWhole`: the other slot is as it must be when no write of a page
        /// was cut. A torn slot is what a crash leaves of an active region; of any other region it
        /// is damage, and the page that remains may be an old one.
        case page(TablePage, isWhole: Bool)
        case damaged
    }

    package static func loadPair(_ memory: RawMemory, layer: LayerID, region: UInt64) -> Pair {
        let slot0 = memory.slice(0, size)
        let slot1 = memory.slice(size, size)
        let even = TablePage(decoding: slot0, layer: layer, region: region, slot: 0)
        let odd = TablePage(decoding: slot1, layer: layer, region: region, slot: 1)
        if let even, let odd {
            let newest = even.version > odd.version ? even : odd
            let older = even.version > odd.version ? odd : even
            return .page(newest, isWhole: older.version + 1 == newest.version)
        }
        if let newest = even ?? odd {
            let other = even == nil ? slot0 : slot1
            return .page(newest, isWhole: newest.version <= 1 && other.isZero)
        }
        return slot0.isZero && slot1.isZero ? .neverWritten : .damaged
    }
}
