// regionMap: which regions may hold anything, and which were written since an epoch (rule J), in
// any layer of the chain.
//
// The second question is answered from births: of regions in memory from their frames, of all
// others from the table, read in long pieces where it holds anything at all. The table changes
// under these reads, so a frame is looked at when the piece is asked for *and* when it has come:
// 1. in memory before the read: the frame's birth counts, whatever the page says
// 2. in memory after it: likewise; it may have been loaded, written or drained meanwhile
// 3. in memory neither time: no page of the region was on its way, what was read is what stands
// A region written between 1 and 2 belongs to a write the engine knows to be in flight: it copies
// that region anyway. A page that cannot be read or believed counts as written: copying a region
// in vain costs time, leaving it out costs data.

extension ReplicaCore {
    /// Regions one request may ask the births of: 32 MiB of the table.
    package static let birthRegionsMax = 4096
    private static let regionsPerRead = BufferPool.sizeMax / TablePage.pairSize
    private static let readsPerRequestMax: Int32 = 4

    func resumeRegionMap(_ slot: Int32) {
        let header = requests[Int(slot)].header
        guard reserveTable(slot, (Int(header.length) + 7) / 8) else { return }
        if header.auxiliary == 0 { answerAllocated(slot) } else { readBirths(slot) }
    }

    private func answerAllocated(_ slot: Int32) {
        let map = emptyMap(slot)
        let first = Geometry.region(ofByte: requests[Int(slot)].header.offset)
        for place in 0..<min(map.count * 8, Int(requests[Int(slot)].header.length)) {
            let region = first + UInt64(place)
            guard region < regionCount else { break }
            if chain.mayHold(region) { mark(place, map) }
        }
        finishMap(slot)
    }

    private func emptyMap(_ slot: Int32) -> RawMemory {
        let map = map(slot)
        map.fill()
        return map
    }
    private func map(_ slot: Int32) -> RawMemory {
        pool.memory(requests[Int(slot)].table).slice(
            0, (Int(requests[Int(slot)].header.length) + 7) / 8)
    }
    private func mark(_ place: Int, _ map: RawMemory) { map[place / 8] |= 1 << UInt8(place % 8) }
    private func finishMap(_ slot: Int32) {
        let length = map(slot).count
        finish(slot, .ok, table: takeTable(slot), tableLength: length)
    }

    // MARK: births

    /// Asks for the next pieces of the table, or answers when all have come.
    private func readBirths(_ slot: Int32) {
        let index = Int(slot)
        let header = requests[index].header
        let first = Geometry.region(ofByte: header.offset)
        let end = min(first + UInt64(header.length), regionCount)
        // `extents` is zero until the request has begun.
        let isNew = requests[index].extents == 0
        if isNew { _ = emptyMap(slot) }
        // From the start again when a layer has gone: its births are its heir's now.
        if isNew || requests[index].serial != UInt64(merge.removals) {
            requests[index].extents = 1
            requests[index].serial = UInt64(merge.removals)
            requests[index].position = first
            requests[index].layersLeft = Int32(chain.count)
        }
        while requests[index].operationsLeft < Self.readsPerRequestMax {
            guard isConnected(slot), requests[index].layersLeft > 0 else { break }
            let layer = Int(requests[index].layersLeft) - 1
            guard let piece = nextPiece(layer, from: requests[index].position, end) else {
                requests[index].position = first
                requests[index].layersLeft -= 1
                continue
            }
            guard hasOperationForRequests,
                let buffer = pool.allocate(piece.count * TablePage.pairSize)
            else {
                if requests[index].operationsLeft == 0 { push(slot, &awaitingResources) }
                return
            }
            requests[index].position = piece.upperBound
            startPiece(slot, chain.id(layer), piece, buffer)
        }
        if requests[index].operationsLeft == 0 { finishMap(slot) }
    }

    /// The next run of regions worth reading: it begins and ends with one that may be in the table.
    private func nextPiece(_ layer: Int, from start: UInt64, _ end: UInt64) -> Range<UInt64>? {
        var first = start
        while first < end, !chain.mayKnow(layer, first) { first += 1 }
        guard first < end else { return nil }
        var last = first
        for region in first..<min(end, first + UInt64(Self.regionsPerRead))
        where chain.mayKnow(layer, region) { last = region }
        return first..<last + 1
    }

    private func startPiece(
        _ slot: Int32, _ layer: LayerID, _ piece: Range<UInt64>, _ buffer: BufferID
    ) {
        let since = Epoch(requests[Int(slot)].header.auxiliary)
        let origin = Geometry.region(ofByte: requests[Int(slot)].header.offset)
        let map = map(slot)
        for region in piece {
            if let birth = birthInMemory(layer, region), birth >= since {
                mark(Int(region - origin), map)
            }
        }
        requests[Int(slot)].operationsLeft += 1
        let length = piece.count * TablePage.pairSize
        let token = startOperation(.birthsRead, index: slot, buffer: buffer, length: length)
        operations[Int(token & 0xffff_ffff)].region = piece.lowerBound
        operations[Int(token & 0xffff_ffff)].layer = layer
        actions.append(
            .read(
                .table(layer), offset: TablePage.pairOffset(region: piece.lowerBound),
                length: length, buffer: buffer, bufferOffset: 0, token: token))
    }

    func birthsRead(_ operation: DiskOperation, _ result: Int) {
        let slot = operation.index
        defer { pool.release(operation.buffer) }
        let since = Epoch(requests[Int(slot)].header.auxiliary)
        let origin = Geometry.region(ofByte: requests[Int(slot)].header.offset)
        let map = map(slot)
        let memory = pool.memory(operation.buffer)
        for place in 0..<operation.length / TablePage.pairSize {
            let region = operation.region + UInt64(place)
            let birth: Epoch?
            if let known = birthInMemory(operation.layer, region) {
                birth = known
            } else if (place + 1) * TablePage.pairSize <= result {
                birth = TablePage.birth(
                    ofPair: memory.slice(place * TablePage.pairSize, TablePage.pairSize),
                    layer: operation.layer, region: region)
            } else {
                birth = nil
            }
            if birth.map({ $0 >= since }) ?? true { mark(Int(region - origin), map) }
        }
        requests[Int(slot)].operationsLeft -= 1
        readBirths(slot)
    }

    /// Nil: the region is not in memory, or is only about to be.
    private func birthInMemory(_ layer: LayerID, _ region: UInt64) -> Epoch? {
        guard let frame = cache.find(layer, region), cache.frames[Int(frame)].state != .loading
        else {
            return nil
        }
        return cache.frames[Int(frame)].birth
    }
}

extension TablePage {
    /// The birth that a region's two slots say, zero if it was never written; nil unless both are
    /// as they must be when no write of a page was cut. Entries are not looked at.
    static func birth(ofPair memory: RawMemory, layer: LayerID, region: UInt64) -> Epoch? {
        // A slot that is all zero says birth zero, too.
        newestSlot(ofPair: memory, layer: layer, region: region).map {
            birth(memory.slice($0 * size, size))
        }
    }
    /// The slot that counts, either if both are zero; nil unless both are as they must be when no
    /// write of a page was cut.
    static func newestSlot(ofPair memory: RawMemory, layer: LayerID, region: UInt64) -> Int? {
        let even = memory.slice(0, size)
        let odd = memory.slice(size, size)
        let isEven = isSound(even, layer, region, slot: 0)
        let isOdd = isSound(odd, layer, region, slot: 1)
        switch (isEven, isOdd) {
        case (true, true):
            let (a, b) = (version(even), version(odd))
            guard max(a, b) - min(a, b) == 1 else { return nil }
            return a > b ? 0 : 1
        case (true, false): return version(even) == 0 && odd.isZero ? 0 : nil
        case (false, true): return version(odd) == 1 && even.isZero ? 1 : nil
        case (false, false): return even.isZero && odd.isZero ? 0 : nil
        }
    }
    private static func version(_ page: RawMemory) -> UInt64 { page.load(UInt64.self, 24) }
    private static func birth(_ page: RawMemory) -> Epoch { Epoch(page.load(UInt64.self, 32)) }
    private static func isSound(
        _ page: RawMemory, _ layer: LayerID, _ region: UInt64, slot: UInt64
    ) -> Bool {
        page.load(UInt32.self, 0) == magic && page.load(UInt32.self, 4) == formatVersion
            && page.load(UInt32.self, 8) == layer.rawValue && page.load(UInt64.self, 16) == region
            && page.load(UInt64.self, 24) % 2 == slot
            && page.load(UInt32.self, 48) == checksum(page)
    }
}
