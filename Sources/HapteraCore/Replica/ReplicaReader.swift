/// Looks at a replica's files without changing them: for the offline tools, and for tests that ask
/// what a crash has left. The storage must not let writes through to the log's mapping. Beside a
/// process that serves the files the storage must give a copy of the log: pages read later are then
/// never older than the log says; opening may still fail as `damaged` and be tried again.
package final class ReplicaReader {
    package struct Region {
        package let number: UInt64
        /// In the activity log: blocks that do not match are doubtful, not damaged.
        package let isActive: Bool
        package let birth: Epoch
        /// 256 entries; valid until the next region is read.
        package let entries: RawMemory
    }
    package enum BlockVerdict: Equatable, Sendable {
        /// Not in state data: reads zero.
        case zero
        case intact
        case doubtful
        case damaged
    }

    package let manifest: Manifest
    package let log: ActivityLog
    package let activeRegions: [UInt64]
    private let storage: ReplicaStorage
    private let opened: OpenedReplica
    private let pair = MemoryBlock(count: TablePage.pairSize)
    private let none = MemoryBlock(count: TablePage.entriesSize)
    private let data = MemoryBlock(count: Geometry.regionSize)

    package init(opening storage: ReplicaStorage) throws(StorageError) {
        self.storage = storage
        opened = try OpenedReplica(
            storage: storage, options: ReplicaOptions(instance: .none), isReadOnly: true)
        manifest = opened.manifest
        log = opened.log
        var regions: [UInt64] = []
        var frame = opened.cache.oldestActive
        while frame >= 0 {
            regions.append(opened.cache.frames[Int(frame)].region)
            frame = opened.cache.nextActive(frame)
        }
        activeRegions = regions.sorted()
    }

    package var size: UInt64 { manifest.identity.size }
    package var regionCount: UInt64 { Geometry.regionCount(size: size) }
    /// False: nothing was ever written to the region.
    package func mayHold(_ region: UInt64) -> Bool {
        opened.regionMap[Int(region / 64)] >> (region % 64) & 1 != 0
    }

    /// Counts regions by the epoch of their last write; regions never written are left out, and
    /// those of the activity log count as written in the promised epoch.
    package func births() throws(StorageError) -> [Epoch: UInt64] {
        var births: [Epoch: UInt64] = [:]
        for region in activeRegions {
            guard let frame = opened.cache.find(region) else { continue }
            births[opened.cache.frames[Int(frame)].birth, default: 0] += 1
        }
        let active = Set(activeRegions)
        let pairsAtOnce: UInt64 = 128
        let pairs = MemoryBlock(count: Int(pairsAtOnce) * TablePage.pairSize)
        var first: UInt64 = 0
        while first < regionCount {
            defer { first += pairsAtOnce }
            let end = min(first + pairsAtOnce, regionCount)
            guard (first..<end).contains(where: { mayHold($0) }) else { continue }
            let memory = pairs.memory.slice(0, Int(end - first) * TablePage.pairSize)
            let count = try storage.read(
                .table(manifest.head), offset: TablePage.pairOffset(region: first), into: memory)
            guard count == memory.count else {
                throw StorageError(.damaged, "table: ends before region \(end)")
            }
            for region in first..<end where mayHold(region) && !active.contains(region) {
                let pair = memory.slice(
                    Int(region - first) * TablePage.pairSize, TablePage.pairSize)
                switch TablePage.loadPair(pair, layer: manifest.head, region: region) {
                case .neverWritten: break
                // A torn slot: of damage, or of a page being written now. The other one will do.
                case .page(let page, _): births[page.birth, default: 0] += 1
                // Nothing is known of when it was written: it may have been in any epoch.
                case .damaged: births[manifest.promise, default: 0] += 1
                }
            }
        }
        return births
    }

    /// What the table and the log say of a region. Throws `damaged` if its page is not readable.
    package func region(_ number: UInt64) throws(StorageError) -> Region {
        guard mayHold(number) else {
            return Region(number: number, isActive: false, birth: .zero, entries: none.memory)
        }
        if let frame = opened.cache.find(number), opened.cache.frames[Int(frame)].state == .active {
            return Region(
                number: number, isActive: true, birth: opened.cache.frames[Int(frame)].birth,
                entries: opened.cache.entries(frame))
        }
        let count = try storage.read(
            .table(manifest.head), offset: TablePage.pairOffset(region: number),
            into: pair.memory)
        guard count == pair.memory.count else {
            throw StorageError(.damaged, "table: ends within the page of region \(number)")
        }
        switch TablePage.loadPair(pair.memory, layer: manifest.head, region: number) {
        case .neverWritten:
            return Region(number: number, isActive: false, birth: .zero, entries: none.memory)
        case .page(let page, isWhole: true):
            let slot = Int(page.version % 2) * TablePage.size
            return Region(
                number: number, isActive: false, birth: page.birth,
                entries: pair.memory.slice(
                    slot + TablePage.entriesOffset, TablePage.entriesSize))
        case .page(_, isWhole: false), .damaged:
            throw StorageError(.damaged, "table page of region \(number) is damaged")
        }
    }

    package func entry(_ region: Region, _ block: Int) -> BlockEntry {
        // Pages are decoded entry by entry before they are believed.
        BlockEntry(decoding: region.entries, at: block * BlockEntry.size) ?? .absent
    }

    /// Reads the region's data and hands each block within the volume to `body`, data zero-filled
    /// where the block is not in state data.
    package func blocks(
        of region: Region,
        _ body: (Int, BlockEntry, BlockVerdict, RawMemory) throws(StorageError) -> Void
    ) throws(StorageError) {
        let start = region.number * UInt64(Geometry.regionSize)
        let length = Int(min(UInt64(Geometry.regionSize), size - start))
        let count = length / Geometry.blockSize
        let holdsData = (0..<count).contains { entry(region, $0).state == .data }
        if holdsData {
            let got = try storage.read(
                .data(manifest.head), offset: start, into: data.memory.slice(0, length))
            guard got == length else {
                throw StorageError(.damaged, "data: ends within region \(region.number)")
            }
        }
        for block in 0..<count {
            let bytes = data.memory.slice(block * Geometry.blockSize, Geometry.blockSize)
            let entry = entry(region, block)
            guard entry.state == .data else {
                bytes.fill()
                try body(block, entry, .zero, bytes)
                continue
            }
            let isIntact = CRC32C.checksum(bytes) == entry.checksum
            let verdict =
                isIntact ? BlockVerdict.intact : region.isActive ? .doubtful : .damaged
            try body(block, entry, verdict, bytes)
        }
    }
}
