// Writes that replicas refuse: for want of space, or because an Install came between.

extension EngineCore {
    /// How long a write waits before it is tried again when no member has space, milliseconds.
    private static let fullRetry: UInt64 = 1000

    /// Somebody has no space. One that others have space for leaves the in-sync set, and is filled
    /// again when it has. If no member has, nobody leaves: the write is held and tried again, or
    /// fails when the user's time-out is over. True if it goes on without those that are full.
    func settleFull(_ index: Int) -> Bool {
        let full = slots[index].full
        if let joiner, full.contains(joiner) { failReplica(joiner, .full) }
        guard slots[index].use != .free else { return false }
        let answered = slots[index].replied.union(full)
        guard !slots[index].isAcknowledged || slots[index].isExpired,
            required.isSubset(of: answered)
        else {
            return full.isDisjoint(with: required)
        }
        if !required.isEmpty, required.isSubset(of: full) {
            // First, so that nothing that dropping the joiner lets go begins in the region.
            markUnequal(index)
            dropJoiner(retryMilliseconds: 1000)
            if slots[index].use != .free { holdForSpace(index) }
            return false
        }
        var rest = full.intersection(members)
        while let slot = rest.popFirst() {
            if !replicas[slot].hasFailed { failReplica(slot, .full) }
        }
        return true
    }

    /// A part of the write may have been done, and not the same everywhere: the region is made
    /// equal before anyone, the write itself included, touches it again.
    private func markUnequal(_ index: Int) {
        guard !mutations.contains(.erroredWriteNotResolved) else { return }
        let first = slots[index].firstBlock
        let start = Int(first % UInt64(Geometry.blocksPerRegion))
        addUnresolved(
            first / UInt64(Geometry.blocksPerRegion), slots[index].layer,
            start..<start + Int(slots[index].endBlock - first))
    }
    private func holdForSpace(_ index: Int) {
        if slots[index].fullSince == .zero { slots[index].fullSince = now }
        let limit = configuration.ioTimeoutMilliseconds
        let held = now.nanoseconds(since: slots[index].fullSince) / 1_000_000
        guard limit == 0 || held < limit, !slots[index].isExpired else {
            completeClient(index, .noSpace)
            release(index)
            return
        }
        slots[index].generation &+= 1
        slots[index].phase = .waiting
        slots[index].sent = []
        slots[index].replied = []
        slots[index].full = []
        if dropOrphan(index) { return }
        let pause = limit == 0 ? Self.fullRetry : min(Self.fullRetry, limit - held)
        slots[index].retryAt = now.adding(milliseconds: pause)
        if !isFullEverywhere { note(.fullEverywhere) }
        isFullEverywhere = true
    }

    /// A write that had been held was acknowledged: the others need not wait longer.
    func foundSpace() {
        for index in 0..<slotsUsed where slots[index].retryAt > now { slots[index].retryAt = now }
        startAll()
    }
    /// With every tick, while any write is held.
    func retryFull() {
        guard isFullEverywhere else { return }
        isFullEverywhere = (0..<slotsUsed).contains {
            slots[$0].use == .client && slots[$0].fullSince != .zero
        }
        startAll()
    }

    /// Filled again only after a while, longer each time: an attempt changes the record twice.
    func becameFull(_ slot: ReplicaSlot) {
        let range = ReplicaState.fullBackoffRange
        let next = max(replicas[slot].fullBackoff * 2, range.lowerBound)
        replicas[slot].isFull = true
        replicas[slot].fullBackoff = min(next, range.upperBound)
        replicas[slot].joinAfter = now.adding(milliseconds: replicas[slot].fullBackoff)
    }

    /// Sends a client's write again to the one replica that refused it, which let an Install of
    /// this engine pass before it while it waited for room in the activity log. False if that is
    /// not possible.
    func sendAgain(_ slot: ReplicaSlot, _ refused: FrameHeader) -> Bool {
        guard refused.kind == .write || refused.kind == .setState,
            let index = slotIndex(ofTag: refused.tag), slots[index].use == .client,
            slots[index].phase == .inFlight
        else { return false }
        if slots[index].isExpired {
            // The client has its error, and its data back: this replica goes without.
            guard slot != joiner || joinStage == .promoting else { return false }
            markUnequal(index)
            dropJoiner(retryMilliseconds: 1000)
            guard slotIndex(ofTag: refused.tag) != nil else { return true }
            slots[index].replied.insert(SlotSet(slot))
            settleWrite(index)
            return true
        }
        if slots[index].isAcknowledged { return copyAgain(index, slot) }
        slots[index].wasPassed = true
        writePassed(refused, at: slot)
        var header = FrameHeader(kind: refused.kind)
        header.tag = refused.tag
        header.sequence = slots[index].sequence
        // Where the others have it: the Install may have frozen that layer.
        header.layer = layerToName(index)
        header.offset = refused.offset
        header.length = refused.length
        if slots[index].operation.flags.contains(.fua) { header.flags |= FrameFlags.fua }
        guard refused.kind == .write else {
            let keepsSpace =
                slots[index].operation.kind == .writeZeroes
                && slots[index].operation.flags.contains(.noHole)
            let state = keepsSpace ? BlockState.zeroAllocated : .zero
            header.auxiliary = UInt64(state.rawValue)
            send(slot, header)
            return true
        }
        let blocks = Int(slots[index].endBlock - slots[index].firstBlock)
        header.tableLength = UInt32(blocks * 4)
        header.dataLength = UInt32(blocks * Geometry.blockSize)
        header.tableChecksum = CRC32C.checksum(table(Int32(index)).slice(0, blocks * 4))
        send(slot, header, tableOf: Int32(index), buffer: slots[index].operation.buffer)
        return true
    }

    /// The client has its answer, and its data back; the joiner gets the region with another copy.
    private func copyAgain(_ index: Int, _ slot: ReplicaSlot) -> Bool {
        guard slot == joiner, joinStage == .copying else { return false }
        let region = slots[index].firstBlock / UInt64(Geometry.blocksPerRegion)
        markNeeded(region)
        markHeld(region)
        slots[index].replied.insert(SlotSet(slot))
        settleWrite(index)
        return true
    }
}
