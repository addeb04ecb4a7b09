import HapteraCore

/// What of a copy is damaged in a way that it can go on with: pages of block tables, and records of
/// the activity log. Only looks; `DamageAcceptance` acts on it. The storage holds the files' locks.
///
/// What a damaged page said of a block is put together again from what is left, in this order:
/// 1. the newest record of the log about it: nothing can have come later
/// 2. the slot that is still valid. Is every record since in the log, this is all there was; if
///    not, it may be an older page than the one lost, and what it says counts only where the data
///    file agrees: data that matches its checksum, or nothing where it says that nothing is
/// 3. a hole in the data file with nothing in any lower layer: it reads zero, whatever it was
/// All other blocks cannot be told from rot, and are called damaged.
///
/// A slot that cannot be read is damaged, also of an active region: no write of a page was cut
/// there, so it may be the newer one.
package final class DamageSurvey {
    /// What becomes of a block.
    enum Fate: Equatable {
        /// As the log or a page says that nothing can have followed.
        case known
        /// As an older page says: a write, a trim or a zeroing since would be undone.
        case older
        /// Nothing is there, and nothing below: reads zero.
        case zeroes
        /// Reads of it fail until it is written.
        case damaged
    }
    /// A damaged page.
    struct Page {
        var layer: LayerID
        var region: UInt64
        var damage: String
        /// Both slots, as they are.
        var slots: [UInt8]
        /// The newer valid slot's; nil: there is none.
        var valid: TablePage?
        var entries: [BlockEntry]
        /// Of the blocks that the volume has.
        var fates: [Fate]
    }

    let manifest: Manifest
    let storage: DirectoryStorage
    private(set) var pages: [Page] = []
    /// Records of the log that are damaged; of another boot of the host those that no flush has
    /// covered would count as never made.
    private(set) var damagedRecords: [UInt64] = []
    let activityLog: ActivityLog
    /// Index of the next record of the log: all that are there are below.
    var nextIndex: UInt64 { activityLog.nextIndex }
    let log: RawMemory
    var capacity: UInt64 { activityLog.capacity }
    /// None was ever missing between the oldest and the newest (`ActivityLog.isComplete`).
    private var isLogWhole = true
    private var records: [LayerRegion: [LogRecord]] = [:]
    private let pair = MemoryBlock(count: TablePage.pairSize)
    private let lowerPair = MemoryBlock(count: TablePage.pairSize)
    private let block = MemoryBlock(count: Geometry.blockSize)
    private static let pairsAtOnce = 128
    /// Regions with a slot that cannot be read.
    private var unreadable: Set<LayerRegion> = []

    /// `boot`: the host's, as a process that served the copy now would go by it.
    package init(_ storage: DirectoryStorage, boot: BootID) throws(StorageError) {
        self.storage = storage
        switch try ReplicaCore.loadManifest(storage) {
        case .manifest(let found): manifest = found
        case .neverWritten: throw StorageError(.notFound, "no replica here")
        case .damaged: throw Self.hopeless("manifest: neither slot is valid")
        }
        log = try storage.mapLog(size: Int(try storage.size(.log)))
        do throws(StorageError) {
            activityLog = try ActivityLog(opening: log)
        } catch { throw Self.hopeless(error.message) }
        for layer in manifest.layers { try checkSizes(layer) }
        try readLog(boot)
        for layer in manifest.layers { try scan(layer) }
    }

    private static func hopeless(_ damage: String) -> StorageError {
        StorageError(
            .damaged,
            "\(damage); only damaged pages of block tables and records of the activity log can be "
                + "accepted: salvage another copy, or restore a backup")
    }
    private func checkSizes(_ layer: LayerID) throws(StorageError) {
        let regions = Geometry.regionCount(size: manifest.size(of: layer))
        let sizes = [
            (ReplicaFile.data(layer), regions * UInt64(Geometry.regionSize)),
            (.table(layer), regions * UInt64(TablePage.pairSize)),
        ]
        for (file, size) in sizes where try storage.size(file) < size {
            throw Self.hopeless("\(file): has \(try storage.size(file)) bytes instead of \(size)")
        }
    }

    // MARK: the log

    private func readLog(_ boot: BootID) throws(StorageError) {
        let regions = Geometry.regionCount(size: manifest.size)
        try activityLog.replay { (record) throws(StorageError) in
            let region =
                record.kind == .entry
                ? record.position / UInt64(Geometry.blocksPerRegion) : record.position
            guard manifest.layers.contains(record.layer) else {
                // Of a layer that was deleted since.
                guard record.layer < manifest.head else { throw Self.hopeless(Self.stray(record)) }
                return
            }
            guard region < regions else { throw Self.hopeless(Self.stray(record)) }
            records[LayerRegion(record.layer, region), default: []].append(record)
        }
        isLogWhole = activityLog.isComplete
        damagedRecords = activityLog.damagedRecords(isRebooted: manifest.boot != boot)
    }
    private static func stray(_ record: LogRecord) -> String {
        "activity.log: record \(record.index) is about no region of this volume"
    }

    // MARK: pages

    private func scan(_ layer: LayerID) throws(StorageError) {
        let regions = Geometry.regionCount(size: manifest.size)
        let pieces = MemoryBlock(count: Self.pairsAtOnce * TablePage.pairSize)
        var damaged: Set<UInt64> = []
        var offset: UInt64 = 0
        while let range = try storage.nextAllocated(.table(layer), from: offset) {
            let size = UInt64(TablePage.pairSize)
            var first = range.lowerBound / size
            let end = min((range.upperBound + size - 1) / size, regions)
            while first < end {
                let count = Int(min(end - first, UInt64(Self.pairsAtOnce)))
                let memory = pieces.memory.slice(0, count * TablePage.pairSize)
                try readPairs(layer, first, memory)
                for place in 0..<count {
                    let pair = memory.slice(place * TablePage.pairSize, TablePage.pairSize)
                    let region = first + UInt64(place)
                    if damage(layer, region, pair) != nil { damaged.insert(region) }
                }
                first += UInt64(count)
            }
            guard range.upperBound > offset else { break }
            offset = range.upperBound
        }
        // Without any space in the table, and yet the log knows that there was a page.
        for key in records.keys where key.layer == layer && !damaged.contains(key.region) {
            try readPairs(layer, key.region, pair.memory)
            if damage(layer, key.region, pair.memory) != nil { damaged.insert(key.region) }
        }
        for region in damaged.sorted() { try plan(layer, region) }
    }

    /// What is behind the end of the file was never written.
    private func read(_ file: ReplicaFile, _ offset: UInt64, _ memory: RawMemory)
        throws(StorageError)
    {
        let count = try storage.read(file, offset: offset, into: memory)
        memory.slice(count, memory.count - count).fill()
    }

    /// Table pages from that region on. Slots that cannot be read are noted, and filled with what
    /// no page is.
    private func readPairs(_ layer: LayerID, _ first: UInt64, _ memory: RawMemory)
        throws(StorageError)
    {
        let start = TablePage.pairOffset(region: first)
        if try isRead(.table(layer), start, memory) { return }
        for at in stride(from: 0, to: memory.count, by: TablePage.size) {
            let slot = memory.slice(at, TablePage.size)
            if try isRead(.table(layer), start + UInt64(at), slot) { continue }
            for place in 0..<slot.count { slot[place] = 0xff }
            let region = first + UInt64(at / TablePage.pairSize)
            unreadable.insert(LayerRegion(layer, region))
        }
    }
    private func isRead(_ file: ReplicaFile, _ offset: UInt64, _ memory: RawMemory)
        throws(StorageError) -> Bool
    {
        do throws(StorageError) {
            try read(file, offset, memory)
            return true
        } catch {
            guard case .io = error.code else { throw error }
            return false
        }
    }

    /// As opening the copy, or loading the page, would find it; nil: it is as it must be.
    private func damage(_ layer: LayerID, _ region: UInt64, _ pair: RawMemory) -> String? {
        let (valid, isWhole) = Self.valid(layer, region, pair)
        if unreadable.contains(LayerRegion(layer, region)) {
            return valid == nil ? "it cannot be read" : "one slot cannot be read"
        }
        if valid == nil, !isWhole { return "both slots are damaged" }
        var isActive = false
        for record in records[LayerRegion(layer, region)] ?? []
        where record.index >= valid?.logIndex ?? 0 {
            guard record.kind != .drained || !isActive else {
                return valid == nil ? "it is gone" : "the newer slot is damaged or gone"
            }
            isActive = record.kind != .drained
        }
        return isWhole || isActive ? nil : "one slot is damaged"
    }
    private static func valid(
        _ layer: LayerID, _ region: UInt64, _ pair: RawMemory
    ) -> (page: TablePage?, isWhole: Bool) {
        switch TablePage.loadPair(pair, layer: layer, region: region) {
        case .neverWritten: (nil, true)
        case .page(let page, let isWhole): (page, isWhole)
        case .damaged: (nil, false)
        }
    }

    // MARK: blocks

    private func plan(_ layer: LayerID, _ region: UInt64) throws(StorageError) {
        try readPairs(layer, region, pair.memory)
        guard let damage = damage(layer, region, pair.memory) else { return }
        let (valid, _) = Self.valid(layer, region, pair.memory)
        var page = Page(
            layer: layer, region: region, damage: damage, slots: pair.memory.bytes(), valid: valid,
            entries: Array(repeating: .absent, count: Geometry.blocksPerRegion), fates: [])
        let logged = logged(layer, region)
        let older = valid.map { entries(of: $0, pair.memory) }
        // What was before the oldest record is in the page, or nothing was.
        let isExact = isLogWhole && valid?.logIndex ?? 0 >= activityLog.durableTail
        let below = try isHeldBelow(layer, region)
        let holes = try holes(layer, region)
        for block in 0..<blockCount(region) {
            let said = logged[block] ?? older?[block] ?? (isExact ? .absent : nil)
            let isKnown = logged[block] != nil || isExact
            let checksum = try checksum(layer, region, block)
            let (entry, fate) = Self.decide(
                said, isKnown: isKnown, checksum, isHole: holes[block], isBelow: below[block])
            page.entries[block] = entry
            page.fates.append(fate)
        }
        pages.append(page)
    }

    private static let zeroes = MemoryBlock(count: Geometry.blockSize)
    private static let zeroesChecksum = CRC32C.checksum(zeroes.memory)

    /// `checksum`: of the bytes in the data file; nil: they cannot be read.
    private static func decide(
        _ said: BlockEntry?, isKnown: Bool, _ checksum: UInt32?, isHole: Bool, isBelow: Bool
    ) -> (BlockEntry, Fate) {
        // Of no bytes that are there: the format's word for damaged.
        let damaged = BlockEntry(state: .data, checksum: ~(checksum ?? 0))
        guard let said else {
            return isHole && !isBelow ? (.absent, .zeroes) : (damaged, .damaged)
        }
        if said.state == .data {
            return (said, said.checksum != checksum ? .damaged : isKnown ? .known : .older)
        }
        if isKnown { return (said, .known) }
        // Bytes of zero read the same whichever they were, unless something below would be seen.
        let isZero = checksum == zeroesChecksum && (said.state != .absent || !isBelow)
        return isHole || isZero ? (said, .older) : (damaged, .damaged)
    }

    private func blockCount(_ region: UInt64) -> Int {
        let start = region * UInt64(Geometry.regionSize)
        return Int(min(manifest.size - start, UInt64(Geometry.regionSize))) / Geometry.blockSize
    }

    /// The newest entries that the log has.
    private func logged(_ layer: LayerID, _ region: UInt64, from first: UInt64 = 0)
        -> [Int: BlockEntry]
    {
        var logged: [Int: BlockEntry] = [:]
        for record in records[LayerRegion(layer, region)] ?? []
        where record.kind == .entry && record.index >= first {
            let start = Int(record.position % UInt64(Geometry.blocksPerRegion))
            for block in start..<start + Int(record.count) {
                logged[block] = BlockEntry(state: record.state, checksum: record.checksum)
            }
        }
        return logged
    }
    private func entries(of page: TablePage, _ pair: RawMemory) -> [BlockEntry] {
        let slot = Int(page.version % 2) * TablePage.size + TablePage.entriesOffset
        return (0..<Geometry.blocksPerRegion).map {
            BlockEntry(decoding: pair, at: slot + $0 * BlockEntry.size) ?? .absent
        }
    }

    /// Which blocks any lower layer has an entry of, seen through this one or not.
    private func isHeldBelow(_ layer: LayerID, _ region: UInt64) throws(StorageError) -> [Bool] {
        var held = [Bool](repeating: false, count: Geometry.blocksPerRegion)
        for lower in manifest.layers where lower < layer {
            var entries: [BlockEntry]
            if let page = pages.first(where: { $0.layer == lower && $0.region == region }) {
                entries = page.entries
            } else {
                let memory = lowerPair.memory
                try readPairs(lower, region, memory)
                let (valid, _) = Self.valid(lower, region, memory)
                entries =
                    valid.map { self.entries(of: $0, memory) }
                    ?? Array(repeating: .absent, count: Geometry.blocksPerRegion)
                for (block, entry) in logged(lower, region, from: valid?.logIndex ?? 0) {
                    entries[block] = entry
                }
            }
            for block in held.indices where entries[block] != .absent { held[block] = true }
        }
        return held
    }

    private func holes(_ layer: LayerID, _ region: UInt64) throws(StorageError) -> [Bool] {
        var holes = [Bool](repeating: true, count: Geometry.blocksPerRegion)
        let start = region * UInt64(Geometry.regionSize)
        let size = UInt64(Geometry.blockSize)
        var offset = start
        while let range = try storage.nextAllocated(.data(layer), from: offset),
            range.lowerBound < start + UInt64(Geometry.regionSize)
        {
            let first = (max(range.lowerBound, start) - start) / size
            let end = min(
                (range.upperBound - start + size - 1) / size, UInt64(Geometry.blocksPerRegion))
            for block in first..<max(first, end) { holes[Int(block)] = false }
            offset = max(range.upperBound, offset + 1)
        }
        return holes
    }

    private func checksum(_ layer: LayerID, _ region: UInt64, _ number: Int) throws(StorageError)
        -> UInt32?
    {
        let offset = region * UInt64(Geometry.regionSize) + UInt64(number * Geometry.blockSize)
        return try isRead(.data(layer), offset, block.memory)
            ? CRC32C.checksum(block.memory) : nil
    }

    /// Layers with damaged pages that clones' copies have as well: nobody changes them.
    var sharedLayers: [LayerID] {
        Set(pages.map(\.layer)).sorted().filter { storage.isShared($0) }
    }
    package var isDamaged: Bool { !pages.isEmpty || !damagedRecords.isEmpty }
}
