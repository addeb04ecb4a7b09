// Read, digest and status: what looks at a copy. None of them activates a region. Here one layer is
// looked at; reads of what is seen through the chain are in ReplicaCore+Chain.

extension ReplicaCore {
    /// Table page and data are fetched in parallel when the region is not in memory.
    func resumeRead(_ slot: Int32) {
        let index = Int(slot)
        let header = requests[index].header
        let region = requests[index].region
        let isOwn = header.flags & FrameFlags.resync != 0
        // One that has begun to ask layers goes on so, though others be removed below.
        guard requests[index].extents == 0, isOwn || header.layer == chain.name(0) else {
            return resumeChainRead(slot)
        }
        if isOwn, requests[index].buffer == .none {
            if awaitsMerge(slot) { return }
            if isFolded(slot) { return resumeChainRead(slot) }
        }
        let layer = layer(of: slot)
        let known = cache.find(layer, region)
        if requests[index].buffer != .none {
            // The page has come; perhaps the data has, too.
            guard let frame = known else { preconditionFailure("woken by a region not in memory") }
            return requests[index].operationsLeft > 0
                ? pin(slot, frame) : answerRead(slot, frame)
        }
        guard reserveTable(slot, requests[index].blocks.count * BlockEntry.size) else { return }
        if let known {
            let isKnown = cache.frames[Int(known)].state != .loading
            if isKnown, !holdsData(known, requests[index].blocks) {
                return answerRead(slot, known)
            }
        } else if !chain.mayHold(layer, region) {
            return answerAbsent(slot)
        }
        guard hasOperationForRequests, let buffer = pool.allocate(Int(header.length)) else {
            return push(slot, &awaitingResources)
        }
        guard let frame = known ?? bringIn(layer, region) else {
            pool.release(buffer)
            return push(slot, &awaitingResources)
        }
        requests[index].buffer = buffer
        startDataRead(slot, length: Int(header.length))
        if cache.frames[Int(frame)].state == .loading {
            wait(slot, on: frame)
        } else {
            pin(slot, frame)
        }
    }

    /// The reply's table, kept from the start so that what was read can always be answered. False:
    /// the request waits.
    func reserveTable(_ slot: Int32, _ length: Int) -> Bool {
        guard requests[Int(slot)].table == .none else { return true }
        guard let table = pool.allocate(length) else {
            push(slot, &awaitingResources)
            return false
        }
        requests[Int(slot)].table = table
        return true
    }
    func takeTable(_ slot: Int32) -> BufferID {
        let table = requests[Int(slot)].table
        requests[Int(slot)].table = .none
        return table
    }

    /// `position`: from the request's offset on, and in its buffer.
    private func startDataRead(_ slot: Int32, at position: Int = 0, length: Int) {
        requests[Int(slot)].operationsLeft = 0
        startDataRead(slot, layer(of: slot), at: position, length: length)
    }
    func startDataRead(_ slot: Int32, _ layer: LayerID, at position: Int, length: Int) {
        requests[Int(slot)].operationsLeft += 1
        let token = startOperation(.dataRead, index: slot, length: length)
        operations[Int(token & 0xffff_ffff)].region = UInt64(position / Geometry.blockSize)
        actions.append(
            .read(
                .data(layer), offset: requests[Int(slot)].header.offset + UInt64(position),
                length: length, buffer: requests[Int(slot)].buffer, bufferOffset: position,
                token: token))
    }

    func dataRead(_ operation: DiskOperation, _ result: Int) {
        let slot = operation.index
        let index = Int(slot)
        if requests[index].layersLeft < 0 { return chainDataRead(operation, result) }
        requests[index].dataResult = result
        let kind = requests[index].header.kind
        if kind == .adopt { return adoptRead(slot, result) }
        requests[index].operationsLeft = 0
        if kind == .digest { return digestRead(slot, result) }
        // The page could not be read.
        guard requests[index].status == .ok else { return finish(slot, requests[index].status) }
        // Not pinned: the page is still on its way.
        if requests[index].frame >= 0 { answerRead(slot, requests[index].frame) }
    }

    private func holdsData(_ frame: Int32, _ blocks: Range<Int>) -> Bool {
        for block in blocks where cache.entry(frame, block).state == .data { return true }
        return false
    }

    private func answerAbsent(_ slot: Int32) {
        let length = requests[Int(slot)].blocks.count * BlockEntry.size
        let table = takeTable(slot)
        pool.memory(table).slice(0, length).fill()
        finish(slot, .ok, table: table, tableLength: length)
    }

    func answerRead(_ slot: Int32, _ frame: Int32) {
        let blocks = requests[Int(slot)].blocks
        let length = blocks.count * BlockEntry.size
        pool.memory(requests[Int(slot)].table).copy(
            from: cache.entries(frame).slice(blocks.lowerBound * BlockEntry.size, length))
        answerFromTable(slot)
    }

    /// The reply's table holds the entries, and the buffer what was read if any of them is data.
    /// Every data block is verified; nothing is sent of a range that holds a bad one.
    func answerFromTable(_ slot: Int32) {
        let index = Int(slot)
        let header = requests[index].header
        let count = requests[index].blocks.count
        let tableLength = count * BlockEntry.size
        let table = pool.memory(requests[index].table)
        guard holdsData(table, count) else {
            return finish(slot, .ok, table: takeTable(slot), tableLength: tableLength)
        }
        if let block = firstDamaged(slot, table) {
            let offset = header.offset + UInt64(block * Geometry.blockSize)
            actions.append(.note(.checksumMismatch(offset: offset)))
            return finish(
                slot, .checksumMismatch, table: takeTable(slot), tableLength: tableLength)
        }
        finish(
            slot, .ok, table: takeTable(slot), tableLength: tableLength,
            dataLength: Int(header.length))
    }
    /// Blocks without data are zeroed on the way.
    private func firstDamaged(_ slot: Int32, _ table: RawMemory) -> Int? {
        // What the disk cannot read is no better than what it reads wrongly: damaged.
        guard requests[Int(slot)].dataResult == Int(requests[Int(slot)].header.length) else {
            return 0
        }
        let data = pool.memory(requests[Int(slot)].buffer)
        for block in 0..<requests[Int(slot)].blocks.count {
            let bytes = data.slice(block * Geometry.blockSize, Geometry.blockSize)
            if state(table, block) != BlockState.data.rawValue {
                bytes.fill()
            } else if CRC32C.checksum(bytes)
                != table.load(UInt32.self, block * BlockEntry.size + 4),
                !options.mutations.contains(.readWithoutChecksum)
            {
                return block
            }
        }
        return nil
    }
    private func holdsData(_ table: RawMemory, _ count: Int) -> Bool {
        for block in 0..<count where state(table, block) == BlockState.data.rawValue { return true }
        return false
    }
    /// In a reply's table.
    func state(_ table: RawMemory, _ block: Int) -> UInt8 { table[block * BlockEntry.size] }

    // MARK: digest

    func resumeDigest(_ slot: Int32) {
        let index = Int(slot)
        let layer = layer(of: slot)
        let region = requests[index].region
        if awaitsMerge(slot) { return }
        if requests[index].extents != 0 || isFolded(slot) { return resumeChainRead(slot) }
        guard let frame = residentFrame(slot, layer, region) else { return }
        // `residentFrame` returns nil having queued the request, and so do these.
        guard reserveTable(slot, RegionDigest.size) else { return }
        guard holdsData(frame, 0..<Geometry.blocksPerRegion) else {
            return answerDigest(slot, frame)
        }
        let start = region * UInt64(Geometry.regionSize)
        let length = Int(min(UInt64(Geometry.regionSize), size - start))
        guard hasOperationForRequests, let buffer = pool.allocate(Geometry.regionSize) else {
            return push(slot, &awaitingResources)
        }
        requests[index].buffer = buffer
        pin(slot, frame)
        startDataRead(slot, length: length)
    }

    /// A region that cannot be read at once is read block by block: one bad sector must not cost
    /// the copy its other blocks, nor the replica its membership.
    private func digestRead(_ slot: Int32, _ result: Int) {
        let index = Int(slot)
        let frame = requests[index].frame
        let start = requests[index].header.offset
        let count = Int(min(UInt64(Geometry.regionSize), size - start)) / Geometry.blockSize
        if requests[index].position > 0 {
            let isRead = result == Geometry.blockSize
            requests[index].unreadable[Int(requests[index].position) - 1] = !isRead
        } else if result == count * Geometry.blockSize {
            return answerDigest(slot, frame)
        }
        var block = Int(requests[index].position)
        while block < count, cache.entry(frame, block).state != .data { block += 1 }
        guard block < count, isConnected(slot) else { return answerDigest(slot, frame) }
        requests[index].position = UInt64(block) + 1
        startDataRead(slot, at: block * Geometry.blockSize, length: Geometry.blockSize)
    }

    private func answerDigest(_ slot: Int32, _ frame: Int32) {
        let index = Int(slot)
        let table = pool.memory(requests[index].table)
        table.store(cache.frames[Int(frame)].birth.rawValue, 0)
        for block in 0..<Geometry.blocksPerRegion {
            RegionDigest.encode(
                digest(slot, block, cache.entry(frame, block)), index: block, to: table)
        }
        finish(slot, .ok, table: takeTable(slot), tableLength: RegionDigest.size)
    }
    /// Of a block with that entry, whose data is in its place in the request's buffer.
    func digest(_ slot: Int32, _ block: Int, _ entry: BlockEntry) -> RegionDigest.Block {
        var digest = RegionDigest.Block(entry: entry, isDoubtful: false, hashLow: 0, hashHigh: 0)
        guard entry.state == .data else { return digest }
        let isRead = !requests[Int(slot)].unreadable[block]
        let bytes = pool.memory(requests[Int(slot)].buffer).slice(
            block * Geometry.blockSize, Geometry.blockSize)
        digest.isDoubtful = !isRead || CRC32C.checksum(bytes) != entry.checksum
        if isRead { (digest.hashLow, digest.hashHigh) = options.hash(bytes) }
        return digest
    }

    // MARK: status

    private static let extentSize = 16
    private static let extentsMax = 4096 / extentSize
    /// Pages one status request may have read.
    private static let statusLoadsMax = 64

    /// The request's buffer holds the entries of the region at hand, as far as they are known.
    func resumeStatus(_ slot: Int32) {
        let index = Int(slot)
        let header = requests[index].header
        guard collectPlaces(header) else { return finish(slot, .invalid) }
        guard reserveTable(slot, 4096) else { return }
        if requests[index].buffer == .none {
            guard let buffer = pool.allocate(4096) else { return push(slot, &awaitingResources) }
            requests[index].buffer = buffer
            requests[index].position = header.offset
        }
        let entries = pool.memory(requests[index].buffer).slice(0, TablePage.entriesSize)
        let end = header.offset + UInt64(header.length)
        while requests[index].position < end {
            let region = Geometry.region(ofByte: requests[index].position)
            let regionEnd = min(end, (region + 1) * UInt64(Geometry.regionSize))
            if requests[index].serial != chainSerial(region) { requests[index].layersLeft = 0 }
            requests[index].serial = chainSerial(region)
            if requests[index].layersLeft == 0 {
                guard let top = placesAsked.first,
                    placesAsked.contains(where: { chain.mayHold($0, region) })
                else {
                    guard extend(slot, .absent, to: regionEnd) else { break }
                    continue
                }
                entries.fill()
                requests[index].layersLeft = Int32(top + 1)
            }
            let left = requests[index].layersLeft
            for place in placesAsked where place < left {
                requests[index].layersLeft = Int32(place + 1)
                if chain.mayHold(place, region) {
                    let layer = chain.id(place)
                    let isKnown = cache.find(layer, region).map {
                        cache.frames[Int($0)].state != .loading
                    }
                    guard isKnown == true || mayLoadForStatus(slot) else {
                        return answerStatus(slot)
                    }
                    guard let frame = residentFrame(slot, layer, region) else { return }
                    overlay(cache.entries(frame), under: entries)
                }
            }
            requests[index].layersLeft = 0
            guard extend(slot, entries, to: regionEnd) else { break }
        }
        answerStatus(slot)
    }
    /// Finds the places of the layers that a status is about, the highest first: those seen from
    /// its own; with a base, those seen from one of the two only. A retired layer is among them if
    /// and only if its heir is. False: the base is no layer, or above the other one.
    private func collectPlaces(_ header: FrameHeader) -> Bool {
        placesAsked.removeAll(keepingCapacity: true)
        guard var upper = chain.place(named: header.layer) else { return false }
        var base = -1
        if header.auxiliary > 0 {
            guard let raw = UInt32(exactly: header.auxiliary),
                let place = chain.place(named: LayerID(rawValue: raw)), place <= upper,
                !chain.isRetired(place)
            else { return false }
            base = place
        }
        while upper != base {
            // What is seen from a layer is lower than it.
            if upper > base {
                placesAsked.append(upper)
                upper = chain.below(upper)
            } else {
                placesAsked.append(base)
                base = chain.below(base)
            }
        }
        return true
    }
    private func overlay(_ lower: RawMemory, under upper: RawMemory) {
        for at in stride(from: 0, to: TablePage.entriesSize, by: BlockEntry.size)
        where upper[at] == BlockState.absent.rawValue {
            upper.store(lower.load(UInt64.self, at), at)
        }
    }

    /// Counts a page to be read; false: what is known is answer enough.
    private func mayLoadForStatus(_ slot: Int32) -> Bool {
        let index = Int(slot)
        if requests[index].extents > 0, requests[index].loads >= Self.statusLoadsMax {
            return false
        }
        requests[index].loads += 1
        return true
    }
    private func answerStatus(_ slot: Int32) {
        finish(
            slot, .ok, table: takeTable(slot),
            tableLength: Int(requests[Int(slot)].extents) * Self.extentSize)
    }

    /// Goes on with what a region's entries say.
    private func extend(_ slot: Int32, _ entries: RawMemory, to end: UInt64) -> Bool {
        while requests[Int(slot)].position < end {
            let position = requests[Int(slot)].position
            let block = Int(position % UInt64(Geometry.regionSize)) / Geometry.blockSize
            let next = position + UInt64(Geometry.blockSize)
            let entry = BlockEntry(decoding: entries, at: block * BlockEntry.size) ?? .absent
            guard extend(slot, entry.state, to: next) else { return false }
        }
        return true
    }
    /// False: the table is full.
    private func extend(_ slot: Int32, _ state: BlockState, to end: UInt64) -> Bool {
        let index = Int(slot)
        let memory = pool.memory(requests[index].table)
        let length = end - requests[index].position
        let count = Int(requests[index].extents)
        let last = (count - 1) * Self.extentSize
        if count > 0, memory.load(UInt32.self, last + 8) == UInt32(state.rawValue) {
            memory.store(memory.load(UInt64.self, last) + length, last)
        } else {
            guard count < Self.extentsMax else { return false }
            memory.store(length, count * Self.extentSize)
            memory.store(UInt64(state.rawValue), count * Self.extentSize + 8)
            requests[index].extents += 1
        }
        requests[index].position = end
        return true
    }
}
