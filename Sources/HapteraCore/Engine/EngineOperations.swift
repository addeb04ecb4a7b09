// Client operations: the interval lock, dispatch to replicas, completion (rules W, F and R).

extension EngineCore {
    // MARK: - Slots

    func allocateSlot(_ use: SlotUse, _ operation: Operation) -> Int {
        precondition(freeHead >= 0, "operation slots exhausted")
        let index = Int(freeHead)
        freeHead = slots[index].next
        freeCount -= 1
        slotsUsed = max(slotsUsed, index + 1)
        let generation = slots[index].generation
        slots[index] = OperationSlot()
        slots[index].generation = generation &+ 1
        slots[index].use = use
        slots[index].operation = operation
        return index
    }

    /// Gives up the slot, its place in the interval lock and the buffers that are the core's own,
    /// then starts what waited for it.
    func release(_ index: Int) {
        dropEdges(index)
        if slots[index].ownsBuffer { pool.release(slots[index].operation.buffer) }
        let isLocked = slots[index].endBlock > slots[index].firstBlock
        let bucket = bucketIndex(slots[index].firstBlock)
        if isLocked { unlink(index, bucket) }
        slots[index].use = .free
        slots[index].generation &+= 1
        slots[index].next = freeHead
        freeHead = Int32(index)
        freeCount += 1
        if isLocked { startWaiting(bucket) }
    }

    func tag(_ index: Int) -> UInt64 {
        UInt64(UInt32(index)) | UInt64(slots[index].generation) << 32
    }
    /// The slot a reply belongs to, or nil if that request no longer matters.
    func slotIndex(ofTag tag: UInt64) -> Int? {
        let index = Int(tag & 0xffff_ffff)
        guard index < slots.count, slots[index].use != .free,
            slots[index].generation == UInt32(tag >> 32)
        else { return nil }
        return index
    }

    // MARK: - Interval lock

    func bucketIndex(_ block: UInt64) -> Int {
        Int(block / UInt64(Geometry.blocksPerRegion) % UInt64(Self.bucketCount))
    }
    func append(_ index: Int, _ bucket: Int) {
        let tail = bucketTails[bucket]
        slots[index].previous = tail
        slots[index].next = -1
        if tail >= 0 {
            slots[Int(tail)].next = Int32(index)
        } else {
            bucketHeads[bucket] = Int32(index)
        }
        bucketTails[bucket] = Int32(index)
    }
    private func unlink(_ index: Int, _ bucket: Int) {
        let (previous, next) = (slots[index].previous, slots[index].next)
        if previous >= 0 { slots[Int(previous)].next = next } else { bucketHeads[bucket] = next }
        if next >= 0 {
            slots[Int(next)].previous = previous
        } else {
            bucketTails[bucket] = previous
        }
    }
    private func startWaiting(_ bucket: Int) {
        var cursor = bucketHeads[bucket]
        while cursor >= 0 {
            let index = Int(cursor)
            cursor = slots[index].next
            if slots[index].phase == .waiting, slots[index].use == .client { tryStart(index) }
        }
    }
    /// Whether an operation that came earlier, and is not done, touches the same blocks.
    private func isBlocked(_ index: Int) -> Bool {
        if mutations.contains(.noIntervalLock) { return false }
        var cursor = bucketHeads[bucketIndex(slots[index].firstBlock)]
        while cursor >= 0, cursor != Int32(index) {
            let other = Int(cursor)
            if slots[other].overlaps(slots[index]), !(slots[other].isRead && slots[index].isRead) {
                return true
            }
            cursor = slots[other].next
        }
        return false
    }
    /// Whether a resolve job may take its region: nothing in it may be on the way. What merely
    /// waits, waits for the job.
    func isRegionBusy(_ index: Int) -> Bool {
        var cursor = bucketHeads[bucketIndex(slots[index].firstBlock)]
        while cursor >= 0 {
            let other = Int(cursor)
            if other != index, slots[other].phase != .waiting, slots[other].overlaps(slots[index]) {
                return true
            }
            cursor = slots[other].next
        }
        return false
    }
    /// Whether a copy job, queued like any operation, has reached the front.
    func isCopyBlocked(_ index: Int) -> Bool { isBlocked(index) }

    // MARK: - Submission

    func submit(_ operation: Operation) {
        precondition(canSubmit)
        var operation = operation
        switch operation.kind {
        case .flush, .status:
            break
        case .trim:
            // Advisory: rounded inwards, so that no byte outside the range changes.
            let size = UInt64(Geometry.blockSize)
            let start = (operation.offset + size - 1) / size * size
            let end = (operation.offset + UInt64(operation.length)) / size * size
            guard start < end else {
                completeOperation(operation, .ok)
                return
            }
            operation.offset = start
            operation.length = Int(end - start)
        case .read, .write, .writeZeroes:
            precondition(operation.length > 0)
        }
        let index = allocateSlot(.client, operation)
        if operation.kind != .flush && operation.kind != .status {
            let blocks = Geometry.blocks(offset: operation.offset, length: operation.length)
            let region = blocks.lowerBound / UInt64(Geometry.blocksPerRegion)
            precondition((blocks.upperBound - 1) / UInt64(Geometry.blocksPerRegion) == region)
            slots[index].firstBlock = blocks.lowerBound
            slots[index].endBlock = blocks.upperBound
            append(index, bucketIndex(blocks.lowerBound))
        }
        tryStart(index)
    }

    /// Starts a waiting client operation if nothing stands in its way.
    func tryStart(_ index: Int) {
        guard phase == .serving, slots[index].phase == .waiting else { return }
        switch slots[index].operation.kind {
        case .flush:
            sendFlush(index)
            return
        case .status:
            if !isResolving { sendStatus(index) }
            return
        default: break
        }
        guard !isBlocked(index) else { return }
        let region = slots[index].firstBlock / UInt64(Geometry.blocksPerRegion)
        if !unresolved.isEmpty, unresolved.contains(region) {
            if urgentRegions.count < Self.urgentRegionsMax { urgentRegions.append(region) }
            return
        }
        switch slots[index].operation.kind {
        case .read: sendRead(index)
        case .write: startWrite(index)
        case .trim: sendState(index, .zero)
        case .writeZeroes: startZeroes(index)
        case .flush, .status: break
        }
    }

    /// Tries everything that waits: after the volume began (again) to be served.
    func startAll() {
        for index in 0..<slotsUsed where slots[index].use == .client { tryStart(index) }
    }

    // MARK: - Writes

    /// Replicas a request of this moment goes to: members in contact. The joiner is apart.
    var liveMembers: SlotSet {
        var live: SlotSet = []
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

    private func startWrite(_ index: Int) {
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
        slots[index].tried = []
        readEdges(index)
    }

    func readEdges(_ index: Int) {
        slots[index].edgesMissing = 0
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

    private func sendState(_ index: Int, _ state: BlockState) {
        var header = FrameHeader(kind: .setState)
        header.auxiliary = UInt64(state.rawValue)
        dispatch(index, &header, buffer: .none)
    }

    private func startZeroes(_ index: Int) {
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
        slots[index].epoch = record?.epoch ?? .zero
        slots[index].sent = targets
        slots[index].replied = []
        slots[index].full = []
        header.tag = tag(index)
        header.sequence = sequence
        header.offset = slots[index].firstBlock * UInt64(Geometry.blockSize)
        header.length =
            UInt32(slots[index].endBlock - slots[index].firstBlock)
            * UInt32(Geometry.blockSize)
        if slots[index].operation.flags.contains(.fua) { header.flags |= FrameFlags.fua }
        var rest = targets
        while let slot = rest.popFirst() {
            send(slot, header, tableOf: Int32(index), buffer: buffer)
        }
        if flushDueAt == nil {
            flushDueAt = now.adding(milliseconds: configuration.flushIntervalMilliseconds)
        }
    }

    /// W4: answers the client when everyone whose reply counts has replied; gives the range free when
    /// the joiner has too.
    func settleWrite(_ index: Int) {
        if !slots[index].full.isEmpty && !settleFull(index) { return }
        if !slots[index].isAcknowledged {
            guard mayAcknowledge(slots[index].replied) else { return }
            highestAcknowledged = max(highestAcknowledged, slots[index].sequence)
            completeClient(index, .ok)
            slots[index].isAcknowledged = true
        }
        if let joiner, slots[index].sent.contains(joiner), !slots[index].replied.contains(joiner),
            !mutations.contains(.noJoinerLock)
        {
            return
        }
        release(index)
    }

    func mayAcknowledge(_ replied: SlotSet) -> Bool {
        var needed = required
        if mutations.contains(.ackBeforeCAS) {
            var rest = required
            while let slot = rest.popFirst() {
                if replicas[slot].hasFailed { needed.remove(SlotSet(slot)) }
            }
        }
        return !needed.isEmpty && needed.isSubset(of: replied)
            && members.count >= Int(record?.minInSync ?? 1)
    }

    /// Somebody has no space. On every member: the client is told and the region is made equal again.
    /// On some only: they leave the in-sync set. True if the write goes on without them.
    private func settleFull(_ index: Int) -> Bool {
        let full = slots[index].full
        if let joiner, full.contains(joiner) { failReplica(joiner, isFull: true) }
        guard slots[index].use != .free else { return false }
        let answered = slots[index].replied.union(full)
        guard !slots[index].isAcknowledged, required.isSubset(of: answered) else {
            return full.isDisjoint(with: required)
        }
        if !required.isEmpty, required.isSubset(of: full) {
            dropJoiner(retryMilliseconds: 1000)
            guard slots[index].use != .free else { return false }
            addUnresolved(slots[index].firstBlock / UInt64(Geometry.blocksPerRegion))
            completeClient(index, .noSpace)
            release(index)
            return false
        }
        var rest = full.intersection(members)
        while let slot = rest.popFirst() {
            if !replicas[slot].hasFailed { failReplica(slot, isFull: true) }
        }
        return true
    }

    // MARK: - Reads, flushes, status

    /// A member to read from that this operation has not tried: the one with the fewest reads on the
    /// way. When all were tried in vain, the client gets an error.
    func chooseReader(_ index: Int) -> ReplicaSlot? {
        var candidates = liveMembers.subtracting(slots[index].tried)
        if mutations.contains(.readFromJoiner), let joiner, isLive(joiner), joinStage == .copying {
            candidates = SlotSet(joiner)
        }
        guard var best = candidates.first else {
            // No member in contact at all: wait, the volume is about to stall or to change.
            if slots[index].tried.isEmpty || liveMembers.isEmpty {
                dropEdges(index)
                slots[index].phase = .waiting
                slots[index].tried = []
                return nil
            }
            completeClient(index, .ioError)
            release(index)
            return nil
        }
        while let slot = candidates.popFirst() {
            if replicas[slot].reads < replicas[best].reads { best = slot }
        }
        slots[index].source = Int8(best)
        return best
    }

    func sendRead(_ index: Int) {
        slots[index].phase = .inFlight
        guard let source = chooseReader(index) else { return }
        var header = FrameHeader(kind: .read)
        header.tag = tag(index)
        header.offset = slots[index].firstBlock * UInt64(Geometry.blockSize)
        header.length =
            UInt32(slots[index].endBlock - slots[index].firstBlock)
            * UInt32(Geometry.blockSize)
        replicas[source].reads += 1
        send(source, header)
    }

    func sendStatus(_ index: Int) {
        slots[index].phase = .inFlight
        guard let source = chooseReader(index) else { return }
        var header = FrameHeader(kind: .status)
        header.tag = tag(index)
        header.offset = slots[index].operation.offset
        header.length = UInt32(min(slots[index].operation.length, EngineLimits.statusLengthMax))
        send(source, header)
    }

    /// F: covers every write acknowledged so far; goes to every member and to a joiner.
    func sendFlush(_ index: Int) {
        sequence = SequenceNumber(sequence.rawValue + 1)
        slots[index].phase = .inFlight
        slots[index].sequence = sequence
        slots[index].epoch = record?.epoch ?? .zero
        slots[index].sent = []
        slots[index].replied = []
        slots[index].mayStabilise =
            unresolved.isEmpty || mutations.contains(.stableBeforeResolved)
        flushDueAt = nil
        isLogPressed = false
        var targets = liveMembers
        if let joiner, isLive(joiner), joinStage != .installing, joinStage != .none {
            targets.insert(SlotSet(joiner))
        }
        sendFlush(index, to: targets)
    }
    private func sendFlush(_ index: Int, to targets: SlotSet) {
        var header = FrameHeader(kind: .flush)
        header.tag = tag(index)
        header.sequence = slots[index].sequence
        slots[index].sent.formUnion(targets)
        var rest = targets
        while let slot = rest.popFirst() { send(slot, header) }
    }

    func settleFlush(_ index: Int) {
        if slots[index].use == .flush, slots[index].operation.userData == Self.joinFlush {
            guard slots[index].sent.isSubset(of: slots[index].replied) else { return }
            isJoinFlushed = true
            release(index)
            return
        }
        // Somebody whose reply counts now was not asked yet: a joiner that became required.
        let missing = required.intersection(liveMembers).subtracting(slots[index].sent)
        if !missing.isEmpty { sendFlush(index, to: missing) }
        guard mayAcknowledge(slots[index].replied) else { return }
        if slots[index].mayStabilise {
            let point = StablePoint(epoch: slots[index].epoch, sequence: slots[index].sequence)
            if point > stablePoint { announce(point, to: slots[index].replied) }
        }
        if slots[index].use == .client {
            completeClient(index, .ok)
        } else {
            isFlushInFlight = false
        }
        release(index)
    }

    /// S moved: replicas may forget what it covers. Never relabelled with a later epoch.
    private func announce(_ point: StablePoint, to replied: SlotSet) {
        stablePoint = point
        var header = FrameHeader(kind: .stable)
        header.auxiliary = point.epoch.rawValue
        header.sequence = point.sequence
        var rest = replied
        while let slot = rest.popFirst() {
            guard isLive(slot) else { continue }
            header.flags = members.contains(slot) ? FrameFlags.settled : 0
            send(slot, header, expectsReply: false)
        }
    }

    // MARK: - Completion

    func completeClient(
        _ index: Int, _ result: OperationResult, tableLength: Int = 0, isHole: Bool = false
    ) {
        guard slots[index].use == .client, !slots[index].isAcknowledged else { return }
        let buffer = slots[index].ownsBuffer ? BufferID.none : slots[index].operation.buffer
        actions.append(
            .complete(
                userData: slots[index].operation.userData, result, buffer: buffer,
                tableLength: Int32(tableLength), isHole: isHole))
    }
    private func completeOperation(_ operation: Operation, _ result: OperationResult) {
        actions.append(
            .complete(
                userData: operation.userData, result, buffer: operation.buffer, tableLength: 0,
                isHole: false))
    }

    // MARK: - Sending

    func send(
        _ slot: ReplicaSlot, _ header: FrameHeader, tableOf: Int32 = -1, buffer: BufferID = .none,
        bufferOffset: Int = 0, expectsReply: Bool = true
    ) {
        var header = header
        header.epoch = replicas[slot].sentEpoch
        if expectsReply { owe(slot) }
        replicas[slot].lastSent = now
        actions.append(
            .send(
                slot, header, tableOf: tableOf, buffer: buffer, bufferOffset: Int32(bufferOffset)))
    }
    func owe(_ slot: ReplicaSlot) {
        if replicas[slot].outstanding == 0 { replicas[slot].owingSince = now }
        replicas[slot].outstanding += 1
    }
}
