// Opening a replica's files: with their making, the only synchronous I/O of the core.

/// What opening finds. The caller holds the lock on the files.
///
/// 1. the manifest: identity, promise, layers
/// 2. the log's header, then its records in order; the table page of each region they name is read.
///    A record whose index is below its page's logIndex is in the page already. A region with an
///    activation that is not is active: its blocks may be doubtful, which reading finds out.
/// 3. active regions get the promise as birth: they may have been written in any epoch up to it
/// 4. active regions whose slots a power cut took get empty ones again     -> an empty page or none
/// 5. if the host has restarted, records of upper layers whose data no flush covered and the disk
///    has not are undone in the log (`dropUnsynced`), and what is missing between records is filled
///    (`fillGaps`); if it has not, or the record was covered, a missing one is damage
///                                                           -> the rest is found to be so again
/// 6. log, table and manifest are synced: activations and pages that a killed process left unsynced
///    are relied upon from here, and the log's tail may pass the records of such pages. The
///    manifest's bytes are written once more: after a failed sync another one would say nothing
/// 7. of regions in the log, blocks that need no space and have some are noted: a crash came before
///    they were punched. Bytes under absent blocks of the lowest layer are zeroed and synced: it
///    kept a write's data and not its record          -> bytes of before, which nobody is shown
/// 8. files of layers that have left the manifest are deleted
/// Nothing else is written, so a crash while opening changes nothing that is read.
package struct OpenedReplica {
    package let manifest: Manifest
    package let log: ActivityLog
    package let cache: TableCache
    private(set) var chain: LayerChain
    private let storage: ReplicaStorage
    private let pair = MemoryBlock(count: TablePage.pairSize)
    /// Records below are durable with their data.
    let covered: UInt64
    private(set) var manifestSlotSize = Manifest.slotSize
    /// Some record that matters is not: the next flush has to say what it covers.
    var hasUncovered: Bool {
        !log.coversLowest || bases.states.values.contains { !$0.isEmpty }
    }
    /// By frame and block: what the last covered record or the page says, if newer records follow.
    /// Of the lowest layer: only where it was zero, and they say data.
    private let bases = OpenedBases()

    package init(storage: ReplicaStorage, options: ReplicaOptions, isReadOnly: Bool = false)
        throws(StorageError)
    {
        self.storage = storage
        switch try ReplicaCore.loadManifest(storage) {
        case .manifest(let found): manifest = found
        case .neverWritten:
            throw StorageError(.notFound, "no replica here: create it first")
        case .damaged:
            throw StorageError(.damaged, "manifest: neither slot is valid")
        }
        let regions = Geometry.regionCount(size: manifest.size)
        var rooms: [UInt64] = []
        for layer in manifest.layers {
            let size = manifest.size(of: layer)
            _ = try Self.expect(storage, .data(layer), size: size)
            let table = try Self.expect(storage, .table(layer), size: ReplicaCore.tableSize(size))
            rooms.append(table / UInt64(TablePage.pairSize))
        }

        let logSize = try storage.size(.log)
        guard logSize >= UInt64(ActivityLog.ringOffset),
            logSize <= ActivityLog.fileSize(capacity: ActivityLog.capacityMax)
        else {
            throw StorageError(.damaged, "activity.log: has \(logSize) bytes")
        }
        log = try ActivityLog(opening: try storage.mapLog(size: Int(logSize)))
        cache = TableCache(
            frameCount: ReplicaCore.frameCount(
                most: options.framesMax, regions: regions, layers: manifest.layers.count),
            most: options.framesMax)
        let tree = manifest.installed?.tree ?? LayerTree()
        let head = manifest.head
        let retired = manifest.retiredLayers.filter { $0 < head }
        chain = LayerChain(
            manifest.layers, regionCount: regions, retired: retired, tree: tree,
            names: manifest.layers.map(manifest.name(of:)), rooms: rooms)
        covered = manifest.layers.count > 1 || log.coversLowest ? log.findCovered() : 0
        for layer in manifest.layers { try markAllocated(layer, regions: regions) }
        try log.replay { (record) throws(StorageError) in try apply(record, regions: regions) }
        let isRebooted = manifest.boot != options.bootID
        try lookForDamage(isRebooted, options.mutations)
        try finish()
        // Which way layers are merged is known when it is known what they hold.
        chain.change(tree, manifest.installed) { _ in }
        guard !isReadOnly else { return }
        // Of before they were made whole.
        for layer in manifest.layers {
            try storage.extend(
                .data(layer), size: ReplicaCore.dataSize(manifest.size(of: layer)))
        }
        try makeSlots()
        if isRebooted { dropUnsynced() }
        if isRebooted || !log.isGapless { log.fillGaps() }
        try storage.sync(.log)
        for layer in manifest.layers { try storage.sync(.table(layer)) }
        try ReplicaCore.makeDurable(manifest, storage)
        try ReplicaCore.widenManifest(manifest, storage)
        manifestSlotSize = Manifest.slotSize(ofFile: try storage.size(.manifest))
        try lookBeneath(options.mutations)
        // Files that a crash has kept of layers that had left the manifest.
        for layer in try storage.layersPresent()
        where layer < manifest.head && chain.index(of: layer) == nil {
            try storage.remove(layer)
        }
    }

    /// Taken for never made, a record would leave a block as it was before: flushed data that the
    /// other copies could lose to this one. What a process stores outlives it, and what a covered
    /// record speaks of was durable.
    private func lookForDamage(_ isRebooted: Bool, _ mutations: MutationSet)
        throws(StorageError)
    {
        let isIgnored = mutations.contains(isRebooted ? .coveredRecordIsGap : .damagedRecordIsGap)
        guard !isIgnored, let record = log.damagedRecords(isRebooted: isRebooted).first else {
            return
        }
        let lost =
            isRebooted
            ? "flushed"
            : "written last; after a restart of this host it may count as if it had never been "
                + "written"
        throw StorageError(
            .damaged, "activity.log: record \(record) is damaged, and with it what was \(lost)")
    }

    /// Returns the size it has.
    private static func expect(_ storage: ReplicaStorage, _ file: ReplicaFile, size: UInt64)
        throws(StorageError) -> UInt64
    {
        let found = try storage.size(file)
        // More: the volume was about to grow.
        guard found >= size else {
            throw StorageError(.damaged, "\(file): has \(found) bytes instead of \(size)")
        }
        return found
    }

    /// A first page torn onto a hole would look like damage: an empty one is whole or nothing.
    private func makeSlots() throws(StorageError) {
        var frame = cache.oldestActive
        while frame >= 0 {
            let region = cache.frames[Int(frame)].region
            if !cache.frames[Int(frame)].hasSlots {
                let layer = cache.frames[Int(frame)].layer
                TablePage.encodeEmptyPair(layer: layer, region: region, to: pair.memory)
                do throws(StorageError) {
                    try storage.write(
                        .table(layer), offset: TablePage.pairOffset(region: region),
                        from: pair.memory)
                } catch {
                    // Draining makes them, if there is space by then.
                    guard error.code == .noSpace else { throw error }
                    return
                }
                cache.frames[Int(frame)].hasSlots = true
                cache.frames[Int(frame)].version = 1
            }
            frame = cache.nextActive(frame)
        }
    }

    /// Regions without space in the table were never written: their pages need not be read.
    private func markAllocated(_ layer: LayerID, regions: UInt64) throws(StorageError) {
        var offset: UInt64 = 0
        while let range = try storage.nextAllocated(.table(layer), from: offset) {
            let first = range.lowerBound / UInt64(TablePage.pairSize)
            let end = min(
                (range.upperBound + UInt64(TablePage.pairSize) - 1) / UInt64(TablePage.pairSize),
                regions)
            for region in first..<max(first, end) { chain.mark(layer, region) }
            guard range.upperBound > offset else { break }
            offset = range.upperBound
        }
    }

    private func apply(_ record: LogRecord, regions: UInt64) throws(StorageError) {
        let region =
            record.kind == .entry
            ? record.position / UInt64(Geometry.blocksPerRegion) : record.position
        // Of a layer that was deleted since: what it held is in its heir.
        if chain.index(of: record.layer) == nil, record.layer < manifest.head { return }
        guard region < regions, chain.index(of: record.layer) != nil else {
            throw StorageError(
                .damaged, "activity.log: record \(record.index) is about no region of this volume")
        }
        let frame = try load(record.layer, region)
        guard record.index >= cache.frames[Int(frame)].logIndex else { return }
        let isActive = cache.frames[Int(frame)].state == .active
        if record.kind == .drained {
            guard !isActive else {
                throw StorageError(
                    .damaged,
                    "table page of region \(region) is older than the log says: pages were lost"
                )
            }
            return
        }
        if !isActive {
            chain.mark(record.layer, region)
            cache.frames[Int(frame)].state = .active
            cache.move(frame, to: .active)
            cache.enterLog(frame, firstIndex: record.index)
        }
        guard record.kind == .entry else { return }
        let first = Int(record.position % UInt64(Geometry.blocksPerRegion))
        let entry = BlockEntry(state: record.state, checksum: record.checksum)
        let isUpper = record.layer != manifest.layers[0]
        for block in first..<first + Int(record.count) {
            let before = cache.entry(frame, block).state
            // Where the lowest layer holds nothing, nothing old is beneath what is torn.
            if isUpper || log.coversLowest && record.state == .data && before.isZero {
                bases.note(frame, block, before: before, isCovered: record.index < covered)
            }
            cache.setEntry(frame, block, entry)
        }
    }

    /// The host has restarted: where a record says data that is not there, and no flush can have
    /// covered the block's first data in its layer, the block is again what it was before. Its
    /// records say so from here on, which takes no room in a log that may be full.
    private func dropUnsynced() {
        var dropped: [Int32: Set<Int>] = [:]
        for (frame, blocks) in bases.states.sorted(by: { $0.key < $1.key })
        where cache.frames[Int(frame)].state == .active {
            for (block, base) in blocks.sorted(by: { $0.key < $1.key }) where base != .data {
                guard cache.entry(frame, block).state == .data, !isDataThere(frame, block) else {
                    continue
                }
                cache.setEntry(frame, block, BlockEntry(state: base))
                dropped[frame, default: []].insert(block)
            }
        }
        guard !dropped.isEmpty else { return }
        let blocksPerRegion = UInt64(Geometry.blocksPerRegion)
        log.replaceEntries { record in
            let block = Int(record.position % blocksPerRegion)
            guard record.state == .data, record.index >= covered,
                let frame = cache.find(record.layer, record.position / blocksPerRegion),
                record.index >= cache.frames[Int(frame)].logIndex,
                dropped[frame]?.contains(block) == true
            else { return nil }
            return cache.entry(frame, block)
        }
    }
    private func isDataThere(_ frame: Int32, _ block: Int) -> Bool {
        let found = cache.frames[Int(frame)]
        let data = pair.memory.slice(0, Geometry.blockSize)
        let number = found.region * UInt64(Geometry.blocksPerRegion) + UInt64(block)
        let count = try? storage.read(
            .data(found.layer), offset: number * UInt64(Geometry.blockSize), into: data)
        return count == Geometry.blockSize
            && CRC32C.checksum(data) == cache.entry(frame, block).checksum
    }

    /// The region's frame, its page read if need be.
    private func load(_ layer: LayerID, _ region: UInt64) throws(StorageError) -> Int32 {
        if let frame = cache.find(layer, region) { return frame }
        guard let frame = cache.allocate(layer, region) else {
            throw StorageError(.damaged, "activity.log: more active regions than there may be")
        }
        let count = try storage.read(
            .table(layer), offset: TablePage.pairOffset(region: region), into: pair.memory)
        guard count == pair.memory.count else {
            throw StorageError(.damaged, "table: ends within the page of region \(region)")
        }
        guard cache.fill(frame, fromPair: pair.memory) else {
            throw StorageError(.damaged, "table page of region \(region): both slots are damaged")
        }
        // A torn one is not evicted: whether the region is active is known at the end of the log.
        if !cache.frames[Int(frame)].isTorn { cache.move(frame, to: .clean) }
        return frame
    }

    private func finish() throws(StorageError) {
        for frame in 0..<cache.frames.count
        where cache.frames[frame].state == .clean && cache.frames[frame].isTorn {
            throw StorageError(
                .damaged,
                "table page of region \(cache.frames[frame].region): one slot is damaged")
        }
        var frame = cache.oldestActive
        // Whatever the earlier engine wrote is stable only by a point of a later epoch.
        let last = StablePoint(
            epoch: manifest.promise, sequence: SequenceNumber(UInt64.max))
        while frame >= 0 {
            cache.frames[Int(frame)].birth = max(
                cache.frames[Int(frame)].birth, manifest.promise)
            cache.frames[Int(frame)].lastWrite = last
            cache.frames[Int(frame)].dataTicket = 1
            cache.frames[Int(frame)].freshTicket = 1
            frame = cache.nextActive(frame)
        }
    }
}

/// What blocks were before the records that no flush is known to have covered.
private final class OpenedBases {
    private(set) var states: [Int32: [Int: BlockState]] = [:]

    func note(_ frame: Int32, _ block: Int, before: BlockState, isCovered: Bool) {
        if isCovered {
            states[frame]?[block] = nil
        } else if states[frame]?[block] == nil {
            states[frame, default: [:]][block] = before
        }
    }
}

extension OpenedReplica {
    /// What is beneath blocks without data, in regions the log still tells of: space that they hold
    /// is noted, and where the lowest layer holds nothing, zeros are beneath from here on. A write
    /// that is torn there shows what it wrote, or zero. (Of upper layers and of zeroed blocks, the
    /// log says what was there before: `dropUnsynced`. Layers that clones share are not written.)
    private func lookBeneath(_ mutations: MutationSet) throws(StorageError) {
        let lowest = manifest.layers[0]
        let isCleared = !storage.isShared(lowest) && !mutations.contains(.staleIsKept)
        var isDirty = false
        for list in [TableCache.List.clean, .active] {
            var frame = cache.first(list)
            while frame >= 0 {
                let next = cache.next(frame)
                try findUnneeded(frame)
                if isCleared, cache.frames[Int(frame)].layer == lowest, clearAbsent(frame) {
                    isDirty = true
                }
                if list == .clean, !cache.frames[Int(frame)].unneeded.isEmpty {
                    cache.move(frame, to: .punch)
                }
                frame = next
            }
        }
        if isDirty { try storage.sync(.data(lowest)) }
    }
    private func findUnneeded(_ frame: Int32) throws(StorageError) {
        let start = cache.frames[Int(frame)].region * UInt64(Geometry.regionSize)
        let end = min(start + UInt64(Geometry.regionSize), manifest.size)
        let blockSize = UInt64(Geometry.blockSize)
        var offset = start
        while offset < end,
            let range = try storage.nextAllocated(
                .data(cache.frames[Int(frame)].layer), from: offset),
            range.lowerBound < end
        {
            let first = Int((max(range.lowerBound, start) - start) / blockSize)
            let last = Int((min(range.upperBound, end) - start + blockSize - 1) / blockSize)
            for block in first..<last {
                let state = cache.entry(frame, block).state
                if state == .absent || state == .zero {
                    cache.frames[Int(frame)].unneeded[block] = true
                }
            }
            offset = max(range.upperBound, offset + 1)
        }
    }
    /// True: something was written.
    private func clearAbsent(_ frame: Int32) -> Bool {
        let file = ReplicaFile.data(cache.frames[Int(frame)].layer)
        let start = cache.frames[Int(frame)].region * UInt64(Geometry.regionSize)
        let bytes = pair.memory.slice(0, Geometry.blockSize)
        var isDirty = false
        for block in 0..<Geometry.blocksPerRegion
        where cache.frames[Int(frame)].unneeded[block]
            && cache.entry(frame, block).state == .absent
        {
            let offset = start + UInt64(block * Geometry.blockSize)
            // A file system that knows no holes calls everything allocated.
            let count = try? storage.read(file, offset: offset, into: bytes)
            if count == bytes.count, bytes.isZero { continue }
            bytes.fill()
            // A sector that takes nothing costs no replica: it is as if never written.
            if (try? storage.write(file, offset: offset, from: bytes)) != nil { isDirty = true }
        }
        return isDirty
    }
}

extension TableCache {
    /// Takes a region's two slots as read into its loading frame, which becomes clean. False: the
    /// page is damaged.
    package func fill(_ frame: Int32, fromPair memory: RawMemory) -> Bool {
        let index = Int(frame)
        let found = frames[index]
        switch TablePage.loadPair(memory, layer: found.layer, region: found.region) {
        case .neverWritten:
            entries(frame).fill()
        case .page(let page, let isWhole):
            let from = Int(page.version % 2) * TablePage.size + TablePage.entriesOffset
            entries(frame).copy(from: memory.slice(from, TablePage.entriesSize))
            frames[index].hasSlots = true
            frames[index].isTorn = !isWhole
            frames[index].version = page.version
            frames[index].birth = page.birth
            frames[index].logIndex = page.logIndex
        case .damaged: return false
        }
        frames[index].state = .clean
        return true
    }
}
