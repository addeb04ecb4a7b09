/// Looks at a replica's files without changing them: for the offline tools, and for tests that ask
/// what a crash has left. The storage must not let writes through to the log's mapping. Beside a
/// process that serves the files the storage must give a copy of the log: pages read later are then
/// never older than the log says; opening may still fail as `damaged` and be tried again.
package final class ReplicaReader {
    /// One region of one layer.
    package struct Region {
        package let layer: LayerID
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
    /// Regions that any layer has in the activity log.
    package let activeRegions: [UInt64]
    private let storage: ReplicaStorage
    private let opened: OpenedReplica
    private let pair = MemoryBlock(count: TablePage.pairSize)
    private let none = MemoryBlock(count: TablePage.entriesSize)
    private let data = MemoryBlock(count: Geometry.regionSize)
    private let seen = MemoryBlock(count: Geometry.regionSize)

    /// `boot`: the host's, if no process serves the files. A record of the activity log that is
    /// damaged is told then, as when the copy is served; otherwise it is taken for never made.
    package init(opening storage: ReplicaStorage, boot: BootID = .none) throws(StorageError) {
        self.storage = storage
        opened = try OpenedReplica(
            storage: storage, options: ReplicaOptions(instance: .none, bootID: boot),
            isReadOnly: true)
        manifest = opened.manifest
        log = opened.log
        var regions: Set<UInt64> = []
        var frame = opened.cache.oldestActive
        while frame >= 0 {
            regions.insert(opened.cache.frames[Int(frame)].region)
            frame = opened.cache.nextActive(frame)
        }
        activeRegions = regions.sorted()
    }

    package var size: UInt64 { manifest.size }
    /// Bytes of the volume while the layer was its head.
    package func size(of layer: LayerID) -> UInt64 { manifest.installed?.size(of: layer) ?? size }
    package var regionCount: UInt64 { Geometry.regionCount(size: size) }
    /// By the numbers of their files.
    package var layers: [LayerID] { opened.chain.ids }
    /// False: nothing was ever written to the region, or to that layer of it.
    package func mayHold(_ region: UInt64) -> Bool { opened.chain.mayHold(region) }
    package func mayHold(_ layer: LayerID, _ region: UInt64) -> Bool {
        opened.chain.mayHold(layer, region)
    }
    /// Nil: no snapshot of that name is in the record installed here.
    package func snapshot(named name: String) -> LayerID? {
        manifest.installed?.snapshot(named: name)?.layer
    }

    /// Counts regions by the epoch of their last write, in whichever layer; regions never written
    /// are left out, and those of the activity log count as written in the promised epoch.
    package func births() throws(StorageError) -> [Epoch: UInt64] {
        var births: [Epoch: UInt64] = [:]
        let pairsAtOnce: UInt64 = 128
        let pairs = MemoryBlock(count: Int(pairsAtOnce) * TablePage.pairSize)
        var first: UInt64 = 0
        while first < regionCount {
            let end = min(first + pairsAtOnce, regionCount)
            var latest: [UInt64: Epoch] = [:]
            for layer in layers where (first..<end).contains(where: { mayHold(layer, $0) }) {
                let memory = pairs.memory.slice(0, Int(end - first) * TablePage.pairSize)
                try readPairs(layer, first, memory)
                for region in first..<end where mayHold(layer, region) {
                    let pair = memory.slice(
                        Int(region - first) * TablePage.pairSize, TablePage.pairSize)
                    guard let birth = birth(layer, region, pair) else { continue }
                    latest[region] = max(latest[region] ?? .zero, birth)
                }
            }
            for birth in latest.values { births[birth, default: 0] += 1 }
            first = end
        }
        return births
    }
    /// What cannot be read becomes what no page is.
    private func readPairs(_ layer: LayerID, _ first: UInt64, _ memory: RawMemory)
        throws(StorageError)
    {
        let offset = TablePage.pairOffset(region: first)
        do throws(StorageError) {
            let count = try storage.read(.table(layer), offset: offset, into: memory)
            // The volume may have grown since: what is behind its end was never written.
            memory.slice(count, memory.count - count).fill()
        } catch {
            guard case .io = error.code else { throw error }
            guard memory.count > TablePage.pairSize else {
                return memory.slice(0, TablePage.pairSize).store(UInt64.max, 0)
            }
            for place in 0..<memory.count / TablePage.pairSize {
                let pair = memory.slice(place * TablePage.pairSize, TablePage.pairSize)
                try readPairs(layer, first + UInt64(place), pair)
            }
        }
    }
    private func birth(_ layer: LayerID, _ region: UInt64, _ pair: RawMemory) -> Epoch? {
        if let frame = opened.cache.find(layer, region),
            opened.cache.frames[Int(frame)].state == .active
        {
            return opened.cache.frames[Int(frame)].birth
        }
        switch TablePage.loadPair(pair, layer: layer, region: region) {
        case .neverWritten: return nil
        // A torn slot: of damage, or of a page being written now. The other one will do.
        case .page(let page, _): return page.birth
        // Nothing is known of when it was written: it may have been in any epoch.
        case .damaged: return manifest.promise
        }
    }

    /// What the table and the log say of a region of the layer. Throws `damaged` if its page is not
    /// readable.
    package func region(_ number: UInt64, layer: LayerID) throws(StorageError) -> Region {
        func region(_ birth: Epoch, _ entries: RawMemory, isActive: Bool = false) -> Region {
            Region(
                layer: layer, number: number, isActive: isActive, birth: birth, entries: entries)
        }
        guard mayHold(layer, number) else { return region(.zero, none.memory) }
        if let frame = opened.cache.find(layer, number),
            opened.cache.frames[Int(frame)].state == .active
        {
            return region(
                opened.cache.frames[Int(frame)].birth, opened.cache.entries(frame), isActive: true)
        }
        try readPage(layer, number)
        switch TablePage.loadPair(pair.memory, layer: layer, region: number) {
        case .neverWritten: return region(.zero, none.memory)
        case .page(let page, isWhole: true):
            let slot = Int(page.version % 2) * TablePage.size
            return region(
                page.birth,
                pair.memory.slice(slot + TablePage.entriesOffset, TablePage.entriesSize))
        case .page(_, isWhole: false), .damaged:
            throw StorageError(.damaged, "table page of region \(number) is damaged")
        }
    }

    private func readPage(_ layer: LayerID, _ number: UInt64) throws(StorageError) {
        let count: Int
        do throws(StorageError) {
            count = try storage.read(
                .table(layer), offset: TablePage.pairOffset(region: number), into: pair.memory)
        } catch {
            guard case .io = error.code else { throw error }
            throw StorageError(.damaged, "table page of region \(number) cannot be read")
        }
        guard count == pair.memory.count else {
            throw StorageError(.damaged, "table: ends within the page of region \(number)")
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
        let unreadable =
            holdsData ? try read(region, start, data.memory.slice(0, length)) : BlockSet()
        for block in 0..<count {
            let bytes = data.memory.slice(block * Geometry.blockSize, Geometry.blockSize)
            let entry = entry(region, block)
            guard entry.state == .data else {
                bytes.fill()
                try body(block, entry, .zero, bytes)
                continue
            }
            let isIntact = !unreadable[block] && CRC32C.checksum(bytes) == entry.checksum
            let verdict =
                isIntact ? BlockVerdict.intact : region.isActive ? .doubtful : .damaged
            try body(block, entry, verdict, bytes)
        }
    }

    /// Returns the blocks that cannot be read: one bad sector costs no other block.
    private func read(_ region: Region, _ start: UInt64, _ memory: RawMemory)
        throws(StorageError) -> BlockSet
    {
        var unreadable = BlockSet()
        do throws(StorageError) {
            let got = try storage.read(.data(region.layer), offset: start, into: memory)
            guard got == memory.count else {
                throw StorageError(.damaged, "data: ends within region \(region.number)")
            }
        } catch {
            guard case .io = error.code else { throw error }
            for block in 0..<memory.count / Geometry.blockSize {
                let bytes = memory.slice(block * Geometry.blockSize, Geometry.blockSize)
                let offset = start + UInt64(block * Geometry.blockSize)
                let count = try? storage.read(.data(region.layer), offset: offset, into: bytes)
                unreadable[block] = count != bytes.count
            }
        }
        return unreadable
    }

    /// Hands each block of the region to `body` as it is seen from the layer: its verdict is that
    /// of the layer that holds it.
    package func view(
        _ number: UInt64, from top: LayerID,
        _ body: (Int, BlockVerdict, RawMemory) throws(StorageError) -> Void
    ) throws(StorageError) {
        var verdicts = [BlockVerdict](repeating: .zero, count: Geometry.blocksPerRegion)
        seen.memory.fill()
        let tree = manifest.installed?.tree ?? LayerTree()
        for layer in layers
        where tree.isSeen(manifest.name(of: layer), from: top) && mayHold(layer, number) {
            let region = try region(number, layer: layer)
            try blocks(of: region) { (block, entry, verdict, bytes) throws(StorageError) in
                guard entry.state != .absent else { return }
                verdicts[block] = verdict
                seen.memory.copy(from: bytes, at: block * Geometry.blockSize)
            }
        }
        let start = number * UInt64(Geometry.regionSize)
        let length = Int(min(UInt64(Geometry.regionSize), size - start))
        for block in 0..<length / Geometry.blockSize {
            let bytes = seen.memory.slice(block * Geometry.blockSize, Geometry.blockSize)
            try body(block, verdicts[block], bytes)
        }
    }
}
