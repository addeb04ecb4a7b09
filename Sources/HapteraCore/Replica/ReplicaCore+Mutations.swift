// Write, setState and adopt: what changes a copy.
//
// Order of a write, and what a crash leaves:
// 1. the region's slots in the table are made (first write ever)   -> an empty page or none: absent
// 2. the activation is stored in the log and synced                -> active, nothing changed
// 3. the data is written                                           -> old entry, new, old or torn
//                                                                     data: doubtful, never served
// 4. the entry records are stored in the log                       -> survive the process; perhaps
//                                                                     not a power cut: doubtful
// 5. FUA only: data file and log are synced                        -> data and entries there
// 6. the reply
// A setState is 2, 4, 5 and 6: its space is given back after its region has drained.

extension ReplicaCore {
    /// The region's frame with its entries known, or nil: then the request waits and is resumed.
    func residentFrame(_ slot: Int32, _ layer: LayerID, _ region: UInt64) -> Int32? {
        if let frame = cache.find(layer, region) {
            guard cache.frames[Int(frame)].state == .loading else { return frame }
            wait(slot, on: frame)
            return nil
        }
        guard let frame = bringIn(layer, region) else {
            push(slot, &awaitingResources)
            return nil
        }
        guard cache.frames[Int(frame)].state == .loading else { return frame }
        wait(slot, on: frame)
        return nil
    }

    /// A frame for a region not in memory: loading, or clean if it was never written. Nil: no room.
    func bringIn(_ layer: LayerID, _ region: UInt64) -> Int32? {
        guard let frame = cache.allocate(layer, region) else { return nil }
        guard chain.mayKnow(layer, region) else {
            cache.entries(frame).fill()
            cache.frames[Int(frame)].state = .clean
            shelve(frame)
            return frame
        }
        guard hasOperationForRequests, let buffer = pool.allocate(TablePage.pairSize) else {
            cache.release(frame)
            return nil
        }
        let token = startOperation(.pageLoad, index: frame, buffer: buffer)
        actions.append(
            .read(
                .table(layer), offset: TablePage.pairOffset(region: region),
                length: TablePage.pairSize, buffer: buffer, bufferOffset: 0, token: token))
        return frame
    }

    func pageLoaded(_ frame: Int32, _ buffer: BufferID, _ result: Int) {
        defer { pool.release(buffer) }
        let isWanted =
            !cache.frames[Int(frame)].isAhead || !cache.frames[Int(frame)].waiters.isEmpty
        guard result == TablePage.pairSize else {
            // Whoever wants it, if anybody does, asks again and is told.
            guard isWanted else { return cache.release(frame) }
            if isPageLost(frame) {
                return fail(.tableUnreadable(region: cache.frames[Int(frame)].region))
            }
            var queue = cache.frames[Int(frame)].waiters
            cache.frames[Int(frame)].waiters = SlotQueue()
            let region = cache.frames[Int(frame)].region
            cache.release(frame)
            mergeFailed(region, .ioError)
            while let slot = pop(&queue) {
                requests[Int(slot)].status = .ioError
                if requests[Int(slot)].operationsLeft == 0 { finish(slot, .ioError) }
            }
            return
        }
        guard cache.fill(frame, fromPair: pool.memory(buffer)), !cache.frames[Int(frame)].isTorn
        else {
            guard isWanted else { return cache.release(frame) }
            return fail(.tableUnreadable(region: cache.frames[Int(frame)].region))
        }
        if !unreadablePages.isEmpty {
            let found = cache.frames[Int(frame)]
            unreadablePages[LayerRegion(found.layer, found.region)] = nil
        }
        if cache.frames[Int(frame)].version <= 1 {
            cache.frames[Int(frame)].slotsTicket = failedSlotsTicket
        }
        wake(frame)
    }
    private static let unreadablePagesMax = 64
    private static let pageRetrySeconds: UInt64 = 10
    /// A page that could not be read before, and cannot be now, though the disk did its work in
    /// between, is as good as damaged: the replica would leave for each request about it and be
    /// back at once, for ever. But of the only copy all other regions can be read.
    private func isPageLost(_ frame: Int32) -> Bool {
        let found = cache.frames[Int(frame)]
        let page = LayerRegion(found.layer, found.region)
        guard let first = unreadablePages[page] else {
            if unreadablePages.count < Self.unreadablePagesMax { unreadablePages[page] = now }
            return false
        }
        let others = manifest.installed?.inSync.contains { $0 != identity.member } ?? false
        return others && diskWorkedAt > first
            && now >= first.adding(milliseconds: Self.pageRetrySeconds * 1000)
    }

    func resumeMutation(_ slot: Int32) {
        if awaitsMerge(slot) { return }
        if chain.sharedCount > 0, isAboutShared(slot) { return }
        guard let frame = residentFrame(slot, layer(of: slot), requests[Int(slot)].region) else {
            return
        }
        if cache.frames[Int(frame)].isMerging { return wait(slot, on: frame) }
        switch cache.frames[Int(frame)].state {
        case .clean:
            if changesNothing(slot, frame) { return finishDurably(slot) }
            activate(slot, frame)
        case .active:
            if changesNothing(slot, frame) { return finishDurably(slot) }
            perform(slot, frame)
        case .loading, .activating, .draining, .punching: wait(slot, on: frame)
        case .free: preconditionFailure("a region is found in a free frame")
        }
    }

    /// A setState of blocks that are all so already. Absent blocks of the lowest layer read zero
    /// and hold no space; of any other they show what is below.
    /// A copy is no such thing: it also tells when the region was last written.
    private func changesNothing(_ slot: Int32, _ frame: Int32) -> Bool {
        let header = requests[Int(slot)].header
        guard header.kind == .setState, header.flags & FrameFlags.resync == 0 else { return false }
        for block in requests[Int(slot)].blocks {
            let state = cache.entry(frame, block).state
            let isSame =
                UInt64(state.rawValue) == header.auxiliary
                || state == .absent && cache.frames[Int(frame)].layer == chain.id(0)
                    && header.auxiliary == UInt64(BlockState.zero.rawValue)
            if !isSame { return false }
        }
        return true
    }

    // MARK: activation

    private func activate(_ slot: Int32, _ frame: Int32) {
        let isCopy = requests[Int(slot)].header.flags & FrameFlags.resync != 0
        let limit = isCopy ? activeRegionsForCopies : activeRegionsMax
        guard cache.activeCount + slotsInitCount < limit else { return park(slot) }
        guard log.hasRoom(1 + requests[Int(slot)].blocks.count) else {
            actions.append(.note(.logFull))
            return push(slot, &awaitingLog)
        }
        guard beginActivation(frame) else { return push(slot, &awaitingResources) }
        resumeAfterActivation(slot, frame)
    }
    /// Of a clean region, for whose activation there is room in the log. False: no buffer now.
    func beginActivation(_ frame: Int32) -> Bool {
        guard cache.frames[Int(frame)].state == .clean else { return true }
        guard cache.frames[Int(frame)].hasSlots else { return makeSlots(frame) }
        log.reserve(1)
        appendActivation(frame)
        return true
    }

    private func resumeAfterActivation(_ slot: Int32, _ frame: Int32) {
        if cache.frames[Int(frame)].state == .active {
            perform(slot, frame)
        } else {
            wait(slot, on: frame)
        }
    }

    /// Writes an empty page to both slots of a region that has none, so that draining it needs no
    /// space later. Only their first sectors are not zero: a torn one is all zero, or whole.
    private func makeSlots(_ frame: Int32) -> Bool {
        guard hasOperationForRequests, let buffer = pool.allocate(TablePage.pairSize) else {
            return false
        }
        let (layer, region) = (cache.frames[Int(frame)].layer, cache.frames[Int(frame)].region)
        TablePage.encodeEmptyPair(layer: layer, region: region, to: pool.memory(buffer))
        cache.move(frame, to: .none)
        cache.frames[Int(frame)].state = .activating
        slotsInitCount += 1
        log.reserve(1)
        let token = startOperation(.slotsInit, index: frame, buffer: buffer)
        actions.append(
            .write(
                .table(layer), offset: TablePage.pairOffset(region: region),
                length: TablePage.pairSize, buffer: buffer, bufferOffset: 0, token: token))
        return true
    }

    func slotsInitialised(_ frame: Int32, _ buffer: BufferID, _ result: Int) {
        pool.release(buffer)
        slotsInitCount -= 1
        let layer = cache.frames[Int(frame)].layer
        tableWritten(layer)
        chain.mark(layer, cache.frames[Int(frame)].region)
        guard result == TablePage.pairSize else {
            log.unreserve(1)
            failedSlotsTicket = syncs[FileSync.table].written
            cache.frames[Int(frame)].state = .clean
            var queue = cache.frames[Int(frame)].waiters
            cache.frames[Int(frame)].waiters = SlotQueue()
            while let slot = pop(&queue) { finish(slot, status(ofError: result)) }
            mergeFailed(cache.frames[Int(frame)].region, status(ofError: result))
            return shelve(frame)
        }
        cache.frames[Int(frame)].hasSlots = true
        cache.frames[Int(frame)].version = 1
        cache.frames[Int(frame)].slotsTicket = syncs[FileSync.table].written
        appendActivation(frame)
        if cache.frames[Int(frame)].state == .active { wake(frame) }
    }

    /// Stores the activation, for which a record is reserved, and has the log synced.
    private func appendActivation(_ frame: Int32) {
        let index = log.nextIndex
        log.appendReserved(activation(of: frame))
        cache.enterLog(frame, firstIndex: index)
        cache.frames[Int(frame)].pendingTicket = log.storeCount
        cache.frames[Int(frame)].state = .activating
        cache.move(frame, to: .none)
        if options.mutations.contains(.dataBeforeActivate) { return becomeActive(frame) }
        activations.append(frame)
        want(FileSync.log, log.storeCount)
    }
    private func becomeActive(_ frame: Int32) {
        cache.frames[Int(frame)].state = .active
        cache.frames[Int(frame)].lastUse = now
        cache.move(frame, to: .active)
    }
    /// A sync of the log has ended.
    func releaseActivations() {
        while let frame = activations.first,
            cache.frames[Int(frame)].pendingTicket <= syncs[FileSync.log].durable
        {
            _ = activations.popFirst()
            becomeActive(frame)
            wake(frame)
        }
    }

    // MARK: on an active region

    func perform(_ slot: Int32, _ frame: Int32) {
        let index = Int(slot)
        let header = requests[index].header
        let count = requests[index].blocks.count
        guard log.hasRoom(count) else {
            actions.append(.note(.logFull))
            return push(slot, &awaitingLog)
        }
        if header.kind == .setState {
            touch(frame, header)
            setState(slot, frame)
            return finishDurably(slot)
        }
        if header.kind == .adopt, let checksum = AdoptRequest.checksum(header.auxiliary) {
            touch(frame, header)
            log.reserve(count)
            for block in requests[index].blocks {
                record(frame, block, BlockEntry(state: .data, checksum: checksum))
            }
            return finishDurably(slot)
        }
        guard hasOperationForRequests else { return push(slot, &awaitingResources) }
        let length = Int(header.length)
        if header.kind == .adopt {
            guard reserveTable(slot, count * BlockEntry.size) else { return }
            guard let buffer = pool.allocate(length) else {
                return push(slot, &awaitingResources)
            }
            requests[index].buffer = buffer
        }
        touch(frame, header)
        log.reserve(count)
        pin(slot, frame)
        cache.frames[Int(frame)].writes += 1
        requests[index].operationsLeft = 1
        let buffer = requests[index].buffer
        let kind = header.kind == .write ? DiskOperation.Kind.dataWrite : .dataRead
        let layer = cache.frames[Int(frame)].layer
        let token = startOperation(kind, index: slot, length: length)
        actions.append(
            kind == .dataWrite
                ? .write(
                    .data(layer), offset: header.offset, length: length, buffer: buffer,
                    bufferOffset: 0, token: token)
                : .read(
                    .data(layer), offset: header.offset, length: length, buffer: buffer,
                    bufferOffset: 0, token: token))
    }

    /// The region holds a change of this point from here on, whatever becomes of it.
    private func touch(_ frame: Int32, _ header: FrameHeader) {
        let index = Int(frame)
        var point = StablePoint(epoch: header.epoch, sequence: header.sequence)
        // Parked while a later point became stable: that one does not cover it.
        if point <= stablePoint { point = stablePoint.next }
        cache.frames[index].lastWrite = max(cache.frames[index].lastWrite, point)
        cache.frames[index].birth = max(cache.frames[index].birth, promise)
        cache.frames[index].lastUse = now
        cache.move(frame, to: .active)
    }

    private func setState(_ slot: Int32, _ frame: Int32) {
        let header = requests[Int(slot)].header
        let blocks = requests[Int(slot)].blocks
        guard let state = BlockState(rawValue: UInt8(header.auxiliary)) else { return }
        let entry = BlockEntry(state: state)
        if options.mutations.contains(.punchBeforeDrain) {
            punchAtOnce(cache.frames[Int(frame)].layer, header.offset, header.length)
        }
        let layer = cache.frames[Int(frame)].layer
        chain.willHold(layer, cache.frames[Int(frame)].region)
        entriesChange(layer, cache.frames[Int(frame)].region)
        log.append(
            .entry(
                layer: layer, block: header.offset / UInt64(Geometry.blockSize),
                count: blocks.count, entry))
        // What comes after it, and is torn, may have to give way to it.
        if layer != chain.id(0) { freshEnd = log.nextIndex }
        for block in blocks {
            let old = cache.entry(frame, block).state
            if state == .zeroAllocated {
                cache.frames[Int(frame)].unneeded[block] = false
            } else if old.keepsSpace {
                cache.frames[Int(frame)].unneeded[block] = true
            }
            if old != state { stateChanged(layer, cache.frames[Int(frame)].region, old, state) }
            cache.setEntry(frame, block, entry)
        }
    }

    func dataWritten(_ slot: Int32, _ result: Int) {
        let index = Int(slot)
        let header = requests[index].header
        let frame = requests[index].frame
        let blocks = requests[index].blocks
        syncs[FileSync.data].written += 1
        chain.dataWritten(cache.frames[Int(frame)].layer)
        cache.frames[Int(frame)].dataTicket = syncs[FileSync.data].written
        cache.frames[Int(frame)].writes -= 1
        requests[index].operationsLeft = 0
        guard result == Int(header.length) else {
            // Whatever is there now, the old checksums stand: the blocks are doubtful.
            log.unreserve(blocks.count)
            // It may hold space under entries that need none.
            for block in blocks where !cache.entry(frame, block).state.keepsSpace {
                cache.frames[Int(frame)].unneeded[block] = true
            }
            unpin(slot)
            return finish(slot, status(ofError: result))
        }
        for block in blocks {
            record(
                frame, block,
                BlockEntry(
                    state: .data, checksum: payloadChecksum(slot, block - blocks.lowerBound)))
        }
        unpin(slot)
        finishDurably(slot)
    }

    /// Uses up one reserved record.
    func record(_ frame: Int32, _ block: Int, _ entry: BlockEntry) {
        let (layer, region) = (cache.frames[Int(frame)].layer, cache.frames[Int(frame)].region)
        let old = cache.entry(frame, block).state
        if old != entry.state { stateChanged(layer, region, old, entry.state) }
        if layer != chain.id(0) ? old != .data : old.isZero {
            freshEnd = log.nextIndex + 1
            cache.frames[Int(frame)].freshTicket = cache.frames[Int(frame)].dataTicket
        }
        chain.willHold(layer, region)
        entriesChange(layer, region)
        let first = region * UInt64(Geometry.blocksPerRegion)
        log.appendReserved(
            .entry(layer: layer, block: first + UInt64(block), count: 1, entry))
        if entry.state != .zero {
            cache.frames[Int(frame)].unneeded[block] = false
        } else if old.keepsSpace {
            // Only a merge downwards covers data with something that is none.
            cache.frames[Int(frame)].unneeded[block] = true
        }
        cache.setEntry(frame, block, entry)
    }

    /// The bytes that are there become the data of blocks whose entries they do not match.
    func adoptRead(_ slot: Int32, _ result: Int) {
        let index = Int(slot)
        let frame = requests[index].frame
        let blocks = requests[index].blocks
        cache.frames[Int(frame)].writes -= 1
        requests[index].operationsLeft = 0
        guard result == Int(requests[index].header.length) else {
            log.unreserve(blocks.count)
            unpin(slot)
            return finish(slot, .ioError)
        }
        let memory = pool.memory(requests[index].buffer)
        for block in blocks {
            let bytes = memory.slice(
                (block - blocks.lowerBound) * Geometry.blockSize, Geometry.blockSize)
            let checksum = CRC32C.checksum(bytes)
            let entry = cache.entry(frame, block)
            if entry.state == .data, entry.checksum != checksum {
                record(frame, block, BlockEntry(state: .data, checksum: checksum))
            } else {
                log.unreserve(1)
            }
        }
        answerRead(slot, frame)
    }

    /// What is said of a failed write; that a disk was full is remembered (`merge.fullUntil`).
    func status(ofError result: Int) -> FrameStatus {
        // ENOSPC and EDQUOT: the space may come back; anything else is the device's.
        guard result == -28 || result == -122 else { return .ioError }
        merge.fullUntil = now.adding(milliseconds: MergeState.fullMilliseconds)
        return .noSpace
    }
}
