// What is seen through the chain: reads from a layer that has others below it, and what else is
// answered from several layers (ReplicaCore+Sharing).
//
// Layers are asked from the top; the first that holds a block is the one it is read from. What was
// found is kept in the request, so that no page has to stay in memory: the engine lets nothing else
// change these blocks meanwhile, and what is below the head does not change, except by a merge of a
// deleted layer: a read that one has met begins again.

extension ReplicaCore {
    /// While layers are asked, an entry of the reply's table is the block's, with the place of its
    /// layer, counted from one, in bytes 1..<4; zero: not found yet.
    func owner(_ table: RawMemory, _ block: Int) -> Int {
        Int(table.load(UInt32.self, block * BlockEntry.size) >> 8)
    }
    func setOwner(_ table: RawMemory, _ block: Int, _ owner: Int) {
        let word = table.load(UInt32.self, block * BlockEntry.size) & 0xff
        table.store(word | UInt32(owner) << 8, block * BlockEntry.size)
    }

    func resumeChainRead(_ slot: Int32) {
        let index = Int(slot)
        let (header, blocks) = (requests[index].header, requests[index].blocks)
        guard reserveTable(slot, chainTableNeeded(slot)) else { return }
        let table = chainTable(slot)
        let serial = chainSerial(requests[index].region)
        // `extents` is zero until the request has begun.
        if requests[index].extents == 0 || requests[index].serial != serial {
            requests[index].extents = 1
            requests[index].serial = serial
            requests[index].unreadable = BlockSet()
            requests[index].birth = .zero
            table.fill()
            requests[index].layersLeft = Int32((chain.place(named: header.layer) ?? 0) + 1)
        }
        while requests[index].layersLeft > 0 {
            let place = Int(requests[index].layersLeft) - 1
            if takeView(slot, place, into: table) { continue }
            if chain.mayHold(place, requests[index].region) {
                let layer = chain.id(place)
                guard let frame = residentFrame(slot, layer, requests[index].region) else {
                    return loadAhead(slot, below: place)
                }
                let isComplete = take(
                    cache.entries(frame), blocks, owner: place + 1, into: table)
                // What is left of a region that went over leaves with the layer, its birth too.
                if !chain.isAbsorbed(place, requests[index].region) {
                    requests[index].birth = max(
                        requests[index].birth, cache.frames[Int(frame)].birth)
                }
                keepView(slot, place, cache.entries(frame))
                // Nothing is asked again, should the data have to wait for buffers. A digest's
                // birth is the latest of all.
                let isDone = isComplete && header.kind != .digest
                requests[index].layersLeft = isDone ? 0 : placeBelow(slot, place)
            } else {
                keepView(slot, place, nil)
                requests[index].layersLeft = placeBelow(slot, place)
            }
        }
        readOwners(slot, table)
    }

    /// Fills in the blocks not found yet that the entries hold. True: all are found.
    private func take(
        _ entries: RawMemory, _ blocks: Range<Int>, owner: Int, into table: RawMemory
    ) -> Bool {
        var isComplete = true
        for block in blocks where self.owner(table, block - blocks.lowerBound) == 0 {
            let place = block - blocks.lowerBound
            let entry = BlockEntry(decoding: entries, at: block * BlockEntry.size) ?? .absent
            guard entry.state != .absent else {
                isComplete = false
                continue
            }
            entry.encode(to: table, at: place * BlockEntry.size)
            setOwner(table, place, owner)
        }
        return isComplete
    }

    /// Data blocks of one layer that lie side by side.
    func nextRun(_ table: RawMemory, from start: Int, count: Int) -> Range<Int>? {
        var first = start
        while first < count, state(table, first) != BlockState.data.rawValue { first += 1 }
        guard first < count else { return nil }
        var end = first + 1
        while end < count, state(table, end) == BlockState.data.rawValue,
            owner(table, end) == owner(table, first)
        {
            end += 1
        }
        return first..<end
    }

    /// All owners are known: their data is read.
    private func readOwners(_ slot: Int32, _ table: RawMemory) {
        let index = Int(slot)
        let count = requests[index].blocks.count
        if requests[index].isMutation { return compareWithShared(slot, table) }
        guard nextRun(table, from: 0, count: count) != nil else { return answerChainRead(slot) }
        // A verification's, of the layer before (seed 225).
        release(requests[index].buffer)
        requests[index].buffer = .none
        // Enough for the worst case, at once: a request that holds some and waits for more might
        // wait for ever.
        guard freeOperationCount > Self.operationsForUpkeep + count,
            let buffer = pool.allocate(count * Geometry.blockSize)
        else { return push(slot, &awaitingResources) }
        requests[index].buffer = buffer
        requests[index].dataResult = count * Geometry.blockSize
        requests[index].layersLeft = -1
        var next = 0
        while let run = nextRun(table, from: next, count: count) {
            next = run.upperBound
            startDataRead(
                slot, chain.id(owner(table, run.lowerBound) - 1),
                at: run.lowerBound * Geometry.blockSize, length: run.count * Geometry.blockSize)
        }
    }

    func chainDataRead(_ operation: DiskOperation, _ result: Int) {
        let slot = operation.index
        let index = Int(slot)
        if result != operation.length {
            requests[index].dataResult = -1
            let first = Int(operation.region)
            let blocks = first..<first + operation.length / Geometry.blockSize
            // Places are not what they were when a layer has gone: it begins again anyway.
            let isCurrent = requests[index].serial == chainSerial(requests[index].region)
            if requests[index].header.kind == .digest, blocks.count > 1, isCurrent,
                hasOperationForRequests
            {
                readOneByOne(slot, blocks)
            } else {
                for block in blocks { requests[index].unreadable[block] = true }
            }
        }
        requests[index].operationsLeft -= 1
        if requests[index].operationsLeft == 0 { answerChainRead(slot) }
    }

    /// One bad sector must not cost the copy its other blocks.
    private func readOneByOne(_ slot: Int32, _ blocks: Range<Int>) {
        let table = chainTable(slot)
        for block in blocks {
            startDataRead(
                slot, chain.id(owner(table, block) - 1), at: block * Geometry.blockSize,
                length: Geometry.blockSize)
        }
    }

    private func answerChainRead(_ slot: Int32) {
        if requests[Int(slot)].serial != chainSerial(requests[Int(slot)].region) {
            release(requests[Int(slot)].buffer)
            requests[Int(slot)].buffer = .none
            return resumeChainRead(slot)
        }
        let table = chainTable(slot)
        for block in 0..<requests[Int(slot)].blocks.count { setOwner(table, block, 0) }
        switch requests[Int(slot)].header.kind {
        case .digest: answerFoldedDigest(slot)
        case .verify: takeFold(slot, table)
        default: answerFromTable(slot)
        }
    }
}
