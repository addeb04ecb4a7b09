// Hedged reads: one that a member is slow to answer is asked of another as well, into a buffer of
// its own. The first good answer is the client's.

extension EngineCore {
    private static let hedgesMax = 8
    /// A read answered in time earns one; a hedge costs `hedgePrice`: about 3 % of the reads.
    private static let hedgeCreditMax = 256
    private static let hedgePrice = 32
    private static let hedgeFloorNanoseconds: UInt64 = 10_000_000

    /// Reads are on the way: the shell should step again within 10 ms.
    package var mayHedge: Bool {
        guard phase == .serving, members.count > 1 else { return false }
        for slot in 0..<replicas.count where replicas[slot].reads > 0 { return true }
        return false
    }

    func hedgeReads() {
        guard hedgeCredit >= Self.hedgePrice, mayHedge else { return }
        // What is usual is what the fastest does.
        var usual = UInt64.max
        var rest = liveMembers
        while let slot = rest.popFirst() {
            usual = min(usual, replicas[slot].readLatency.average)
        }
        let limit = max(Self.hedgeFloorNanoseconds, usual == .max ? 0 : usual * 4)
        for index in 0..<slotsUsed
        where slots[index].use == .client && slots[index].isRead
            && slots[index].phase == .inFlight && slots[index].hedge == -1
            && !slots[index].isReady && !slots[index].isExpired
        {
            guard now.nanoseconds(since: slots[index].sentAt) >= limit else { continue }
            guard hedgesInFlight < Self.hedgesMax, hedgeCredit >= Self.hedgePrice else { return }
            hedge(index)
        }
    }

    private func hedge(_ index: Int) {
        let source = Int(slots[index].source)
        var others = liveMembers.subtracting(slots[index].tried).subtracting(SlotSet(source))
        guard var best = others.popFirst() else { return }
        while let slot = others.popFirst() {
            if readCost(slot) < readCost(best) { best = slot }
        }
        let length = Int(slots[index].endBlock - slots[index].firstBlock) * Geometry.blockSize
        guard pool.available(length) > 4, let buffer = pool.allocate(length) else { return }
        let other = allocateSlot(
            .hedge,
            Operation(
                kind: .read, offset: slots[index].firstBlock * UInt64(Geometry.blockSize),
                length: length, buffer: buffer, userData: UInt64(index)))
        slots[other].phase = .inFlight
        slots[other].ownsBuffer = true
        slots[other].source = Int8(best)
        slots[other].sentAt = now
        slots[other].hedgedGeneration = slots[index].generation
        slots[index].hedge = Int32(other)
        hedgesInFlight += 1
        hedgeCredit -= Self.hedgePrice
        hedgedReads += 1
        var header = FrameHeader(kind: .read)
        header.tag = tag(other)
        header.offset = slots[other].operation.offset
        header.length = UInt32(length)
        header.layer = slots[index].operation.layer
        replicas[best].reads += 1
        send(best, header)
    }

    func earnHedge() { hedgeCredit = min(hedgeCredit + 1, Self.hedgeCreditMax) }

    /// The read it stands in for is still unanswered.
    private func isWanted(_ other: Int) -> Bool {
        let index = Int(slots[other].operation.userData)
        return slots[index].use == .client && slots[index].hedge == Int32(other)
            && slots[index].generation == slots[other].hedgedGeneration
            && slots[index].phase == .inFlight && !slots[index].isReady
            && !slots[index].isExpired
    }

    func receivedHedge(
        _ other: Int, _ slot: ReplicaSlot, _ header: FrameHeader, _ table: RawMemory
    ) {
        if replicas[slot].reads > 0 { replicas[slot].reads -= 1 }
        let length = slots[other].operation.length
        let hasData = header.dataLength > 0
        // Anything wrong with it is left to the read itself to find.
        guard isWanted(other), header.status == .ok, isLeased,
            !hasData || Int(header.dataLength) == length,
            verify(
                pool.memory(slots[other].operation.buffer), table,
                blocks: length / Geometry.blockSize, hasData: hasData) == true
        else { return dropHedge(other) }
        let index = Int(slots[other].operation.userData)
        let source = Int(slots[index].source)
        if replicas[source].reads > 0 { replicas[source].reads -= 1 }
        replicas[source].readLatency.add(
            now.nanoseconds(since: slots[index].sentAt), now: now)
        // The buffers change places. The late reply may be arriving in the client's, which stays
        // until it has come or its connection is gone; the range is free.
        actions.append(
            .complete(
                userData: slots[index].operation.userData, .ok,
                buffer: slots[other].operation.buffer, tableLength: 0, isHole: !hasData))
        slots[other].ownsBuffer = false
        slots[index].ownsBuffer = true
        dropHedge(other)
        slots[index].isAcknowledged = true
        slots[index].isExpired = true
        unlock(index)
    }

    /// It is not needed any more, or will not be answered.
    func dropHedge(_ other: Int) {
        // Once is enough.
        if isWanted(other) { slots[Int(slots[other].operation.userData)].hedge = -2 }
        hedgesInFlight -= 1
        release(other)
    }
    /// Those that a lost replica will not answer; nil: all.
    func dropHedges(of slot: ReplicaSlot?) {
        guard hedgesInFlight > 0 else { return }
        for index in 0..<slotsUsed where slots[index].use == .hedge {
            if slot == nil || Int(slots[index].source) == slot { dropHedge(index) }
        }
    }
}
