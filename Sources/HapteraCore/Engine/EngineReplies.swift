// What replicas answer.

extension EngineCore {
    func received(
        _ slot: ReplicaSlot, _ header: FrameHeader, table: RawMemory, data: RawMemory
    ) {
        guard replicas[slot].link != .down else { return }
        guard header.isReply else { return protocolError(slot) }
        if header.kind == .ping {
            replicas[slot].isPinging = false
        } else {
            if replicas[slot].outstanding > 0 { replicas[slot].outstanding -= 1 }
            replicas[slot].owingSince = now
        }
        if header.flags & FrameFlags.logPressure != 0 { isLogPressed = true }
        replicas[slot].isLayersFull = header.flags & FrameFlags.layersFull != 0
        if header.kind == .flush, header.status == .ok { flushAnswered(slot, header) }
        if header.status == .staleEpoch { return refusedAsStale(slot, header) }
        switch header.kind {
        case .hello, .install: receivedControl(slot, header, table)
        case .ping where header.status == .ok:
            renewLease(slot, sentAt: replicas[slot].pingSentAt)
        case .ping, .stable: break
        case .regionMap:
            if !receivedScrubMap(slot, header, table) { receivedMap(slot, header, table) }
        case .prepareSize: madeRoom(slot, header)
        case .getRecord, .compareAndSwap: protocolError(slot)
        case .write, .setState, .flush, .read, .status, .digest, .adopt, .verify:
            guard let index = slotIndex(ofTag: header.tag) else { return }
            if header.status == .ok { renewLease(slot, sentAt: slots[index].sentAt) }
            if header.kind != .flush, header.auxiliary & MutationReply.wasParked != 0 {
                slots[index].wasPassed = true
                writePassed(header, at: slot)
            }
            if slots[index].use == .client || slots[index].use == .hedge {
                countAnswer(index, slot)
            }
            if slots[index].use == .hedge {
                return receivedHedge(index, slot, header, table)
            }
            if slots[index].use == .scrub {
                receivedVerify(Int(slots[index].operation.userData), slot, header, table)
            } else if slots[index].use == .job {
                receivedForJob(Int(slots[index].operation.userData), slot, header, table, data)
            } else {
                receivedForOperation(index, slot, header, table, data)
            }
        }
    }

    func protocolError(_ slot: ReplicaSlot) {
        note(.protocolError(slot))
        failReplica(slot, .protocolError)
    }

    private func receivedControl(_ slot: ReplicaSlot, _ header: FrameHeader, _ table: RawMemory) {
        guard header.status == .ok else {
            // A new layer's files need space, and a disk that takes them.
            if header.status == .noSpace || header.status == .ioError {
                return failReplica(slot, .failing(header.status))
            }
            return protocolError(slot)
        }
        if header.kind == .hello {
            guard replicas[slot].link == .connected,
                let reply = HelloReply(decoding: table.bytes())
            else { return protocolError(slot) }
            greeted(slot, reply)
        } else {
            guard let reply = InstallReply(decoding: table.bytes()) else {
                return protocolError(slot)
            }
            installed(slot, epoch: header.epoch, reply)
        }
    }

    /// The replica's promise is not this engine's epoch. A higher one is never a failed member:
    /// somebody has taken over, or the store is older than the replica. The same epoch: the replica
    /// restarted after it promised, and needs a new one.
    private func refusedAsStale(_ slot: ReplicaSlot, _ header: FrameHeader) {
        guard let record else { return }
        if header.epoch > record.epoch, !mutations.contains(.recordOlderIgnored) {
            verifyPromise()
            return
        }
        // Refused for the Install behind it, which is this engine's own: it goes behind that. (The
        // refusal names the epoch of that Install, whose own reply is still to come.)
        if header.epoch <= replicas[slot].sentEpoch,
            replicas[slot].installedEpoch < replicas[slot].sentEpoch,
            sendAgain(slot, header) || copyRefused(slot, header) || jobRefused(header)
                || roomRefused(slot, header) || scrubRefused(header) || isForgotten(header)
        {
            return
        }
        failReplica(slot, .disconnected)
        if phase == .installing, members.contains(slot) { mustClaimAgain = true }
    }

    /// Nobody waits for it any more: a job that began again, since the layer it looked at was
    /// deleted by the very change that the refusal is for.
    private func isForgotten(_ header: FrameHeader) -> Bool {
        switch header.kind {
        case .write, .setState, .flush, .read, .status, .digest, .adopt, .verify:
            slotIndex(ofTag: header.tag) == nil
        default: false
        }
    }

    private func receivedForOperation(
        _ index: Int, _ slot: ReplicaSlot, _ header: FrameHeader, _ table: RawMemory,
        _ data: RawMemory
    ) {
        switch header.kind {
        case .write, .setState:
            switch header.status {
            case .ok:
                slots[index].replied.insert(SlotSet(slot))
                settleWrite(index)
            case .noSpace:
                slots[index].full.insert(SlotSet(slot))
                settleWrite(index)
            default: failReplica(slot, .failing(header.status))
            }
        case .flush:
            // A failed sync is never retried as clean.
            guard header.status == .ok else {
                return failReplica(slot, .failing(header.status))
            }
            slots[index].replied.insert(SlotSet(slot))
            if header.auxiliary & FlushReply.isPartial != 0 { flushPassed(index, at: slot) }
            settleFlush(index)
        case .read where slots[index].phase == .readingEdges:
            receivedEdge(index, slot, header, table, data)
        case .read:
            receivedRead(index, slot, header, table, data)
        case .status:
            receivedStatus(index, slot, header, table)
        default: protocolError(slot)
        }
    }

    // MARK: - Reads

    /// R: verifies what was read against its checksums; blocks that are not data are made zero
    /// here, whatever was received. False if anything does not match.
    func verify(_ memory: RawMemory, _ table: RawMemory, blocks: Int, hasData: Bool) -> Bool? {
        guard table.count == blocks * BlockEntry.size else { return nil }
        var isIntact = true
        for block in 0..<blocks {
            guard let entry = BlockEntry(decoding: table, at: block * BlockEntry.size) else {
                return nil
            }
            let content = memory.slice(block * Geometry.blockSize, Geometry.blockSize)
            if entry.state == .data {
                guard hasData else { return nil }
                if CRC32C.checksum(content) != entry.checksum { isIntact = false }
            } else {
                content.fill()
            }
        }
        return isIntact || mutations.contains(.readWithoutChecksum)
    }

    private func receivedRead(
        _ index: Int, _ slot: ReplicaSlot, _ header: FrameHeader, _ table: RawMemory,
        _ data: RawMemory
    ) {
        let blocks = Int(slots[index].endBlock - slots[index].firstBlock)
        // Of one that a hedge has answered it is counted.
        if replicas[slot].reads > 0, blocks > 0 { replicas[slot].reads -= 1 }
        guard !slots[index].isExpired else { return release(index) }
        guard header.status == .ok else {
            readFailed(index, slot, header)
            return
        }
        let hasData = header.dataLength > 0
        guard !hasData || Int(header.dataLength) == blocks * Geometry.blockSize else {
            return protocolError(slot)
        }
        let memory = pool.memory(slots[index].operation.buffer)
        switch verify(memory, table, blocks: blocks, hasData: hasData) {
        case nil: protocolError(slot)
        case false?: readFailed(index, slot, header)
        case true?:
            slots[index].isReady = true
            slots[index].isHole = !hasData
            if mayAnswer() { finishRead(index) }
        }
    }

    func finishRead(_ index: Int) {
        earnHedge()
        completeClient(index, .ok, isHole: slots[index].isHole)
        let wasRetried = !slots[index].tried.isEmpty
        let region = slots[index].firstBlock / UInt64(Geometry.blocksPerRegion)
        release(index)
        if wasRetried { repair(region) }
    }

    private func readFailed(_ index: Int, _ slot: ReplicaSlot, _ header: FrameHeader) {
        switch header.status {
        case .ok where slots[index].transitErrors < OperationSlot.transitErrorsMax:
            // The replica has verified it: damaged on the way, so the copy itself is good.
            slots[index].transitErrors += 1
            retryRead(index)
        case .ok, .checksumMismatch, .ioError:
            note(.checksumMismatch(slot, offset: header.offset))
            slots[index].tried.insert(SlotSet(slot))
            retryRead(index)
        case .unavailable: failReplica(slot, .disconnected)
        default: protocolError(slot)
        }
    }

    private func receivedEdge(
        _ index: Int, _ slot: ReplicaSlot, _ header: FrameHeader, _ table: RawMemory,
        _ data: RawMemory
    ) {
        if slots[index].isExpired {
            slots[index].edgesMissing -= 1
            if slots[index].edgesMissing == 0 { release(index) }
            return
        }
        guard header.status == .ok else {
            readFailed(index, slot, header)
            return
        }
        let block = header.offset / UInt64(Geometry.blockSize)
        let isHead = block == slots[index].firstBlock && slots[index].headEdge != .none
        let edge = isHead ? slots[index].headEdge : slots[index].tailEdge
        guard edge != .none, slots[index].edgesMissing > 0 else { return protocolError(slot) }
        switch verify(pool.memory(edge), table, blocks: 1, hasData: header.dataLength > 0) {
        case nil: protocolError(slot)
        case false?: readFailed(index, slot, header)
        case true?:
            slots[index].edgesMissing -= 1
            slots[index].isReady = slots[index].edgesMissing == 0
            answerReady(index)
        }
    }

    private func receivedStatus(
        _ index: Int, _ slot: ReplicaSlot, _ header: FrameHeader, _ table: RawMemory
    ) {
        // It is about to end: as for a read, no error while there may be another answer.
        if header.status == .unavailable { return failReplica(slot, .disconnected) }
        guard header.status == .ok, table.count >= 16, table.count % 16 == 0 else {
            slots[index].tried.insert(SlotSet(slot))
            retryRead(index)
            return
        }
        let buffer = pool.memory(slots[index].operation.buffer)
        let length = min(table.count, buffer.count / 16 * 16)
        buffer.copy(from: table.slice(0, length))
        slots[index].readyLength = Int32(length)
        slots[index].isReady = true
        answerReady(index)
    }
}
