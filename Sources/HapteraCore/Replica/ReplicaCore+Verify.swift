// verify: reads a region of the copy, layer by layer, and checks every data block against its entry
// (scrub). 128 KiB at a time, so that a scrub is no more to the disk than a client that reads.
//
// Nothing keeps writes away meanwhile. One that comes between the read of a block and the look at
// its entry makes a good block suspect, never a bad one good: what is read is judged by the entry
// that stands when it has come. The engine looks at what is suspect again, under the region's lock.

extension ReplicaCore {
    private static let blocksPerPiece = (128 << 10) / Geometry.blockSize

    /// The request's table holds the `RegionVerification` so far; `header.layer` is the layer at
    /// hand, `position` the next block in it, and `layersLeft` 1 when its entries are in the
    /// fingerprint.
    func resumeVerify(_ slot: Int32) {
        let index = Int(slot)
        if requests[index].table == .none {
            guard reserveTable(slot, chainTableNeeded(slot)) else { return }
            RegionVerification().encode(to: pool.memory(requests[index].table))
        }
        while true {
            guard let place = chain.place(named: requests[index].header.layer),
                !chain.isRetired(place)
            else { return finish(slot, .invalid) }
            if awaitsMerge(slot) { return }
            // One that has begun with the layer's own entries goes on with them.
            let isBegun = requests[index].layersLeft != 0
            if requests[index].extents != 0 || !isBegun && isFolded(slot) {
                return resumeChainRead(slot)
            }
            if chain.mayHold(place, requests[index].region) {
                guard
                    let frame = residentFrame(
                        slot, chain.id(place), requests[index].region)
                else { return }
                takeFingerprint(slot, frame)
                if let piece = nextPiece(slot, frame) { return readPiece(slot, frame, piece) }
            }
            guard goBelow(slot, place) else { return answerVerify(slot) }
        }
    }

    private func takeFingerprint(_ slot: Int32, _ frame: Int32) {
        guard requests[Int(slot)].layersLeft == 0 else { return }
        requests[Int(slot)].layersLeft = 1
        let entries = chainTable(slot)
        entries.copy(from: cache.entries(frame).slice(0, entries.count))
        addFingerprint(slot, of: entries)
    }
    private func addFingerprint(_ slot: Int32, of entries: RawMemory) {
        let layer = requests[Int(slot)].header.layer
        // Below the lowest layer everything reads zero: copies differ in which of the two they say.
        if layer == manifest.installed?.layers.first {
            for block in 0..<entries.count / BlockEntry.size
            where state(entries, block) == BlockState.zero.rawValue {
                BlockEntry.absent.encode(to: entries, at: block * BlockEntry.size)
            }
        }
        guard !entries.isZero else { return }
        requests[Int(slot)].loads += 1
        change(slot) { $0.add(layer, options.hash(entries)) }
    }
    private func change(_ slot: Int32, _ body: (inout RegionVerification) -> Void) {
        let table = pool.memory(requests[Int(slot)].table).slice(0, RegionVerification.size)
        guard var verification = RegionVerification(decoding: table) else {
            preconditionFailure("a verification of our own")
        }
        body(&verification)
        verification.encode(to: table)
    }

    /// From the next data block on, as far as the buffer goes, up to the last data block.
    private func nextPiece(_ slot: Int32, _ frame: Int32) -> Range<Int>? {
        var first = Int(requests[Int(slot)].position)
        while first < Geometry.blocksPerRegion, cache.entry(frame, first).state != .data {
            first += 1
        }
        guard first < Geometry.blocksPerRegion else { return nil }
        var end = min(first + Self.blocksPerPiece, Geometry.blocksPerRegion)
        while cache.entry(frame, end - 1).state != .data { end -= 1 }
        return first..<end
    }

    private func readPiece(_ slot: Int32, _ frame: Int32, _ piece: Range<Int>) {
        let index = Int(slot)
        if requests[index].buffer == .none {
            guard let buffer = pool.allocate(Self.blocksPerPiece * Geometry.blockSize) else {
                return push(slot, &awaitingResources)
            }
            requests[index].buffer = buffer
        }
        guard hasOperationForRequests else { return push(slot, &awaitingResources) }
        pin(slot, frame)
        requests[index].position = UInt64(piece.upperBound)
        requests[index].operationsLeft = 1
        let length = piece.count * Geometry.blockSize
        let token = startOperation(.verifyRead, index: slot, length: length)
        operations[Int(token & 0xffff_ffff)].region = UInt64(piece.lowerBound)
        actions.append(
            .read(
                .data(layer(of: slot)),
                offset: requests[index].region * UInt64(Geometry.regionSize)
                    + UInt64(piece.lowerBound * Geometry.blockSize),
                length: length, buffer: requests[index].buffer, bufferOffset: 0, token: token))
    }

    /// A piece that cannot be read at once is suspect as a whole: which of its blocks is bad, the
    /// digest under the lock finds out.
    func verifyRead(_ operation: DiskOperation, _ result: Int) {
        let slot = operation.index
        let index = Int(slot)
        requests[index].operationsLeft = 0
        guard isConnected(slot) else { return finish(slot, .unavailable) }
        let frame = requests[index].frame
        let first = Int(operation.region)
        let data = pool.memory(requests[index].buffer)
        var (checked, suspect) = (UInt32(0), UInt32(0))
        for block in 0..<operation.length / Geometry.blockSize {
            let entry = cache.entry(frame, first + block)
            guard entry.state == .data else { continue }
            checked += 1
            let bytes = data.slice(block * Geometry.blockSize, Geometry.blockSize)
            if result != operation.length || CRC32C.checksum(bytes) != entry.checksum {
                suspect += 1
            }
        }
        change(slot) {
            $0.checked += checked
            $0.suspect += suspect
        }
        unpin(slot)
        resumeVerify(slot)
    }

    /// The layer at hand with what is stuck under it: all of it was read at once.
    func takeFold(_ slot: Int32, _ table: RawMemory) {
        let index = Int(slot)
        var (checked, suspect) = (UInt32(0), UInt32(0))
        for block in 0..<Geometry.blocksPerRegion
        where state(table, block) == BlockState.data.rawValue {
            checked += 1
            let bytes = pool.memory(requests[index].buffer).slice(
                block * Geometry.blockSize, Geometry.blockSize)
            let expected = table.load(UInt32.self, block * BlockEntry.size + 4)
            if requests[index].unreadable[block] || CRC32C.checksum(bytes) != expected {
                suspect += 1
            }
        }
        addFingerprint(slot, of: table)
        change(slot) {
            $0.checked += checked
            $0.suspect += suspect
        }
        release(requests[index].buffer)
        requests[index].buffer = .none
        requests[index].extents = 0
        guard let place = chain.place(named: requests[index].header.layer), goBelow(slot, place)
        else { return answerVerify(slot) }
        resumeVerify(slot)
    }

    /// To the next layer that the record names. False: there is none, or it is enough for one
    /// answer.
    private func goBelow(_ slot: Int32, _ place: Int) -> Bool {
        let index = Int(slot)
        requests[index].position = 0
        requests[index].layersLeft = 0
        var lower = place - 1
        while lower >= 0, chain.isRetired(lower) { lower -= 1 }
        guard lower >= 0 else { return false }
        requests[index].header.layer = chain.name(lower)
        var isEnough = requests[index].loads >= RegionVerification.layersMax
        change(slot) {
            isEnough = isEnough || $0.checked >= RegionVerification.blocksMax
            if isEnough { $0.next = chain.name(lower) }
        }
        return !isEnough
    }

    private func answerVerify(_ slot: Int32) {
        finish(slot, .ok, table: takeTable(slot), tableLength: RegionVerification.size)
    }
}
