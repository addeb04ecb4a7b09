// Writes, trims and zeroes on their way to the replicas and back (rule W).

extension EngineCore {
    /// Replicas a request of this moment goes to: members in contact. The joiner is apart.
    var liveMembers: SlotSet {
        var live = SlotSet()
        var rest = members
        while let slot = rest.popFirst() {
            if isLive(slot) { live.insert(SlotSet(slot)) }
        }
        return live
    }
    func isLive(_ slot: ReplicaSlot) -> Bool {
        replicas[slot].link == .greeted && !replicas[slot].hasFailed
            && replicas[slot].sentEpoch != .zero
    }
    /// Members, and the joiner if it already holds the region.
    private func targets(_ region: UInt64) -> SlotSet {
        var targets = liveMembers
        guard let joiner else { return targets }
        switch joinStage {
        case .none: break
        case .installing, .mapping:
            if !mutations.contains(.inFlightRegionsNotCopied) { markNeeded(region) }
        case .copying, .flushing, .promoting:
            if !isNeeded(region), isLive(joiner) { targets.insert(SlotSet(joiner)) }
        }
        return targets
    }

    func startWrite(_ index: Int) {
        let op = slots[index].operation
        let end = op.offset + UInt64(op.length)
        let headPartial = op.offset % UInt64(Geometry.blockSize) != 0
        let tailPartial = end % UInt64(Geometry.blockSize) != 0
        guard headPartial || tailPartial else {
            sendWrite(index)
            return
        }
        // The rest of a partly written block is fetched first, under the same lock.
        let one = slots[index].endBlock - slots[index].firstBlock == 1
        guard edges.count >= 2 else {
            isStarved = true
            return
        }
        if headPartial || one { slots[index].headEdge = edges.removeLast() }
        if tailPartial && !one { slots[index].tailEdge = edges.removeLast() }
        slots[index].phase = .readingEdges
        slots[index].tried = SlotSet()
        readEdges(index)
    }

    func readEdges(_ index: Int) {
        slots[index].edgesMissing = 0
        slots[index].sentAt = now
        guard let source = chooseReader(index) else { return }
        if slots[index].headEdge != .none { readEdge(index, slots[index].firstBlock, source) }
        if slots[index].tailEdge != .none { readEdge(index, slots[index].endBlock - 1, source) }
    }
    private func readEdge(_ index: Int, _ block: UInt64, _ source: ReplicaSlot) {
        var header = FrameHeader(kind: .read)
        header.tag = tag(index)
        header.offset = block * UInt64(Geometry.blockSize)
        header.length = UInt32(Geometry.blockSize)
        slots[index].edgesMissing += 1
        send(source, header)
    }

    func dropEdges(_ index: Int) {
        if slots[index].headEdge != .none { edges.append(slots[index].headEdge) }
        if slots[index].tailEdge != .none { edges.append(slots[index].tailEdge) }
        slots[index].headEdge = .none
        slots[index].tailEdge = .none
    }

    /// All edges are here: completes the buffer and sends the write.
    func mergeEdges(_ index: Int) {
        let op = slots[index].operation
        let blockSize = Geometry.blockSize
        let memory = pool.memory(op.buffer)
        let head = Int(op.offset % UInt64(blockSize))
        let tail = Int((op.offset + UInt64(op.length)) % UInt64(blockSize))
        let end = Int(slots[index].endBlock - slots[index].firstBlock) * blockSize
        let headEdge = slots[index].headEdge
        if headEdge != .none {
            memory.copy(from: pool.memory(headEdge).slice(0, head))
        }
        if tail != 0 {
            let edge = slots[index].tailEdge != .none ? slots[index].tailEdge : headEdge
            memory.copy(
                from: pool.memory(edge).slice(tail, blockSize - tail), at: end - blockSize + tail)
        }
        dropEdges(index)
        sendWrite(index)
    }

    private func sendWrite(_ index: Int) {
        let blocks = Int(slots[index].endBlock - slots[index].firstBlock)
        let memory = pool.memory(slots[index].operation.buffer)
        if configuration.detectsZeroes, memory.slice(0, blocks * Geometry.blockSize).isZero {
            return sendState(index, .zero)
        }
        let table = table(Int32(index))
        for block in 0..<blocks {
            let data = memory.slice(block * Geometry.blockSize, Geometry.blockSize)
            table.store(CRC32C.checksum(data), block * 4)
        }
        var header = FrameHeader(kind: .write)
        header.tableLength = UInt32(blocks * 4)
        header.dataLength = UInt32(blocks * Geometry.blockSize)
        header.tableChecksum = CRC32C.checksum(table.slice(0, blocks * 4))
        dispatch(index, &header, buffer: slots[index].operation.buffer)
    }

    func sendState(_ index: Int, _ state: BlockState) {
        var header = FrameHeader(kind: .setState)
        header.auxiliary = UInt64(state.rawValue)
        dispatch(index, &header, buffer: .none)
    }

    func startZeroes(_ index: Int) {
        let op = slots[index].operation
        let size = UInt64(Geometry.blockSize)
        if op.offset % size == 0 && UInt64(op.length) % size == 0 {
            sendState(index, op.flags.contains(.noHole) ? .zeroAllocated : .zero)
            return
        }
        // Only the first and the last piece of a request can be unaligned: written as data.
        let length = Int(slots[index].endBlock - slots[index].firstBlock) * Geometry.blockSize
        guard edges.count >= 2, let buffer = pool.allocate(length) else {
            isStarved = true
            return
        }
        pool.memory(buffer).slice(0, length).fill()
        slots[index].operation.kind = .write
        slots[index].operation.buffer = buffer
        slots[index].ownsBuffer = true
        startWrite(index)
    }

    /// W2: one sequence number, the same frame to every target, in the same order on each.
    private func dispatch(_ index: Int, _ header: inout FrameHeader, buffer: BufferID) {
        sequence = SequenceNumber(sequence.rawValue + 1)
        let region = slots[index].firstBlock / UInt64(Geometry.blocksPerRegion)
        let targets = targets(region)
        slots[index].phase = .inFlight
        slots[index].sequence = sequence
        slots[index].epoch = epoch
        slots[index].layer = head
        slots[index].sentAt = now
        slots[index].sent = targets
        slots[index].replied = SlotSet()
        slots[index].full = SlotSet()
        header.tag = tag(index)
        header.sequence = sequence
        header.layer = layerToName(index)
        header.offset = slots[index].firstBlock * UInt64(Geometry.blockSize)
        header.length =
            UInt32(slots[index].endBlock - slots[index].firstBlock)
            * UInt32(Geometry.blockSize)
        if slots[index].operation.flags.contains(.fua) { header.flags |= FrameFlags.fua }
        var rest = targets
        while let slot = rest.popFirst() {
            send(slot, header, tableOf: Int32(index), buffer: buffer)
        }
        wantFlush()
    }

    /// W4: answers the client when everyone whose reply counts has replied and the lease holds;
    /// gives the range free when the joiner has too.
    func settleWrite(_ index: Int) {
        if !slots[index].full.isEmpty && !settleFull(index) { return }
        if slots[index].isExpired {
            guard isEverywhere(slots[index].replied) else { return }
            noteAcknowledged(index)  // what may be read is no less to be kept
        } else if slots[index].isOrphan, !slots[index].isAcknowledged,
            isEverywhere(slots[index].replied)
        {
            // Nobody waits for more members (`minInSync`).
            noteAcknowledged(index)
            completeClient(index, .ioError)
            slots[index].isAcknowledged = true
        } else if !slots[index].isAcknowledged {
            guard mayAcknowledge(slots[index].replied), !isHeldBack(index) else { return }
            noteAcknowledged(index)
            completeClient(index, .ok)
            slots[index].isAcknowledged = true
            if slots[index].fullSince != .zero { foundSpace() }
        }
        if let joiner, slots[index].sent.contains(joiner), !slots[index].replied.contains(joiner),
            !mutations.contains(.noJoinerLock)
        {
            return
        }
        release(index)
    }

    /// A stable point of a higher number covers the write, unless the flush it came of may have
    /// passed the write by: then only one sent from here on does.
    private func noteAcknowledged(_ index: Int) {
        guard slots[index].wasPassed, !mutations.contains(.passedWritesNotLeftOut) else {
            highestAcknowledged = max(highestAcknowledged, slots[index].sequence)
            return
        }
        highestAcknowledged = max(highestAcknowledged, sequence)
        wantFlush()
    }

    func mayAcknowledge(_ replied: SlotSet) -> Bool {
        isEverywhere(replied) && members.count >= minInSync && mayAnswer()
    }
    /// Every replica that counts has replied.
    func isEverywhere(_ replied: SlotSet) -> Bool {
        var needed = required
        if mutations.contains(.ackBeforeCAS) {
            var rest = required
            while let slot = rest.popFirst() {
                if replicas[slot].hasFailed { needed.remove(SlotSet(slot)) }
            }
        }
        return !needed.isEmpty && needed.isSubset(of: replied)
    }
}
