// Operations: their slots, the interval lock, submission, completion (rule W1).

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
        slots[index].since = now
        return index
    }

    /// Gives up the slot, its place in the interval lock and the buffers that are the core's own,
    /// then starts what waited for it.
    func release(_ index: Int) {
        dropEdges(index)
        if slots[index].ownsBuffer || slots[index].retainsBuffer {
            pool.release(slots[index].operation.buffer)
        }
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
    /// Gives the range free; the slot stays.
    func unlock(_ index: Int) {
        guard slots[index].endBlock > slots[index].firstBlock else { return }
        let bucket = bucketIndex(slots[index].firstBlock)
        unlink(index, bucket)
        slots[index].endBlock = slots[index].firstBlock
        startWaiting(bucket)
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
        guard !isRechecking else { return }  // all will be
        var cursor = bucketHeads[bucket]
        while cursor >= 0 {
            let index = Int(cursor)
            cursor = slots[index].next
            if slots[index].phase == .waiting, slots[index].use == .client { tryStart(index) }
        }
    }
    /// Whether an operation that came earlier, and is not done, touches the same blocks.
    func isBlocked(_ index: Int) -> Bool {
        if mutations.contains(.noIntervalLock) { return false }
        var cursor = bucketHeads[bucketIndex(slots[index].firstBlock)]
        while cursor >= 0, cursor != Int32(index) {
            let other = Int(cursor)
            if slots[other].overlaps(slots[index]), !(slots[other].isRead && slots[index].isRead) {
                return true
            }
            cursor = slots[other].next
        }
        // A copy that did not wait for what came before it is behind: see `isCopyBlocked`.
        guard joiner != nil else { return false }
        while cursor >= 0 {
            let other = Int(cursor)
            if slots[other].use == .job, slots[other].phase == .inFlight,
                slots[other].overlaps(slots[index])
            {
                return true
            }
            cursor = slots[other].next
        }
        return false
    }
    /// Whether a resolve job must wait: something in its region is on the way. What merely waits,
    /// waits for the job; what only lacks members is done, and may wait for the join that waits for
    /// the job.
    func isRegionBusy(_ index: Int) -> Bool {
        var cursor = bucketHeads[bucketIndex(slots[index].firstBlock)]
        while cursor >= 0 {
            let other = Int(cursor)
            if other != index, slots[other].phase != .waiting,
                slots[other].overlaps(slots[index]), !isWithheld(other)
            {
                return true
            }
            cursor = slots[other].next
        }
        return false
    }
    /// Whether a copy job must wait: it is queued like any operation. But while members are missing
    /// (`minInSync`), writes are withheld that only the end of this copy lets go: it goes past
    /// those that are done on every member, and past what waits for them.
    func isCopyBlocked(_ index: Int) -> Bool {
        guard members.count < minInSync else { return isBlocked(index) }
        var cursor = bucketHeads[bucketIndex(slots[index].firstBlock)]
        while cursor >= 0 {
            let other = Int(cursor)
            if other != index, slots[other].phase != .waiting,
                slots[other].overlaps(slots[index]), !isWithheld(other)
            {
                return true
            }
            cursor = slots[other].next
        }
        return false
    }
    /// A write that every replica it was sent to has done, and that only lacks members.
    private func isWithheld(_ index: Int) -> Bool {
        guard slots[index].use == .client, slots[index].phase == .inFlight, !slots[index].isRead,
            !slots[index].isAcknowledged, slots[index].endBlock > slots[index].firstBlock,
            members.count < minInSync, isEverywhere(slots[index].replied)
        else { return false }
        guard let joiner else { return true }
        return !slots[index].sent.contains(joiner) || slots[index].replied.contains(joiner)
    }
    /// The joiner got what is withheld in the region with the copy.
    func creditWithheld(_ region: UInt64) {
        guard let joiner, members.count < minInSync else { return }
        for index in 0..<slotsUsed
        where slots[index].firstBlock / UInt64(Geometry.blocksPerRegion) == region {
            if isWithheld(index) { slots[index].replied.insert(SlotSet(joiner)) }
        }
    }

    // MARK: - Submission

    func submit(_ operation: Operation) {
        precondition(canSubmit)
        precondition(
            operation.layer == .head || operation.kind == .read || operation.kind == .status)
        var operation = operation
        switch operation.kind {
        case .flush, .status:
            break
        case .trim:
            // Advisory: rounded inwards, so that no byte outside the range changes.
            let size = UInt64(Geometry.blockSize)
            let isOutwards = mutations.contains(.trimRoundedOutwards)
            let (down, up) = isOutwards ? (size - 1, 0) : (0, size - 1)
            let start = (operation.offset + up) / size * size
            let end = (operation.offset + UInt64(operation.length) + down) / size * size
            guard start < end else {
                completeOperation(operation, .ok)
                return
            }
            operation.offset = start
            operation.length = Int(end - start)
        case .read, .write, .writeZeroes:
            precondition(operation.length > 0)
        }
        if isAboutToGo(operation.layer) || isAboutToGo(operation.base) {
            return completeOperation(operation, .ioError)
        }
        let index = allocateSlot(.client, operation)
        slots[index].submittedAt = now
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
        guard phase == .serving, !hasReleased, slots[index].phase == .waiting else { return }
        // But for what the revert waits for: a write that is held for space.
        if isReverting, slots[index].operation.layer == .head, slots[index].fullSince == .zero {
            return
        }
        switch slots[index].operation.kind {
        case .flush:
            // What a member lost with its power is only there again when its region is resolved.
            if unresolved.isEmpty || mutations.contains(.flushWhileResolving) { sendFlush(index) }
            return
        case .status:
            if !isResolving { sendStatus(index) }
            return
        default: break
        }
        guard !isBlocked(index), now >= slots[index].retryAt else { return }
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

    // MARK: - Completion

    func completeClient(
        _ index: Int, _ result: OperationResult, tableLength: Int = 0, isHole: Bool = false
    ) {
        guard slots[index].use == .client, !slots[index].isAcknowledged else { return }
        let operation = slots[index].operation
        if result == .ok, operation.kind == .read || operation.kind == .write,
            !operation.flags.contains(.fua)
        {
            throttle.completed(
                isRead: operation.kind == .read,
                nanoseconds: now.nanoseconds(since: slots[index].since))
        }
        let buffer = slots[index].ownsBuffer ? BufferID.none : slots[index].operation.buffer
        actions.append(
            .complete(
                userData: slots[index].operation.userData, result, buffer: buffer,
                tableLength: Int32(tableLength), isHole: isHole))
    }
    func completeOperation(_ operation: Operation, _ result: OperationResult) {
        actions.append(
            .complete(
                userData: operation.userData, result, buffer: operation.buffer, tableLength: 0,
                isHole: false))
    }

    /// The session's client is gone: what has not begun never happens. In every phase: a volume
    /// that is not served holds nothing for the dead.
    func cancel(_ session: UInt32) {
        guard session != 0 else { return }
        for index in 0..<slotsUsed
        where slots[index].use == .client && slots[index].operation.session == session {
            slots[index].isOrphan = true
            if dropOrphan(index) { continue }
            if slots[index].isFlush, !slots[index].isAcknowledged {
                wantFlush()  // as in `expire`
                completeClient(index, .cancelled)
                release(index)
            } else if slots[index].isChanging {
                settleWrite(index)
            }
        }
    }
    /// An operation that has to begin (again), and nobody waits for it. True if it is gone.
    @discardableResult
    func dropOrphan(_ index: Int) -> Bool {
        guard slots[index].isOrphan, slots[index].phase == .waiting else { return false }
        completeClient(index, .cancelled)
        release(index)
        return true
    }

    // MARK: - Time-out

    /// `--io-timeout`: tells clients of what takes too long.
    func expireOld() {
        let timeout = configuration.ioTimeoutMilliseconds * 1_000_000
        guard timeout > 0, phase != .stopped else { return }
        for index in 0..<slotsUsed
        where slots[index].use == .client && !slots[index].isAcknowledged {
            if now.nanoseconds(since: slots[index].submittedAt) >= timeout { expire(index) }
        }
    }
    /// What has not begun, or only waits for a lease, is over, and so is a flush, which changes
    /// nothing (seed 1302205: they piled up while members were missing). Anything else keeps its
    /// range until nothing of it is under way: a read because its reply may be arriving in its
    /// buffer, a write until every member has it, so that an error never leaves copies that differ
    /// (trap 22). If the volume stalls first, the takeover after that makes them equal.
    private func expire(_ index: Int) {
        let isRead = slots[index].isRead || slots[index].phase == .readingEdges
        let isOver =
            slots[index].phase == .waiting || slots[index].isReady
            || slots[index].operation.kind == .status || slots[index].isFlush
            || !isRead && mutations.contains(.timedOutWriteUnlocked)
        if !isOver, slots[index].isRead {
            pool.retain(slots[index].operation.buffer)
            slots[index].retainsBuffer = true
        }
        completeClient(index, slots[index].fullSince == .zero ? .ioError : .noSpace)
        slots[index].isAcknowledged = true
        slots[index].isExpired = true
        // Others go without, but it had taken the place of the one that was due (seed 2536763).
        if slots[index].isFlush, slots[index].phase == .inFlight { wantFlush() }
        if isOver { return release(index) }
        // Every member may have it, and no more come that it waited for (`minInSync`).
        if slots[index].isChanging { settleWrite(index) }
    }

    // MARK: - Sending

    func send(
        _ slot: ReplicaSlot, _ header: FrameHeader, tableOf: Int32 = -1, buffer: BufferID = .none,
        bufferOffset: Int = 0, expectsReply: Bool = true
    ) {
        var header = header
        header.epoch = replicas[slot].sentEpoch
        if expectsReply { owe(slot) }
        actions.append(
            .send(
                slot, header, tableOf: tableOf, buffer: buffer, bufferOffset: Int32(bufferOffset)))
    }
    func owe(_ slot: ReplicaSlot) {
        if replicas[slot].outstanding == 0 { replicas[slot].owingSince = now }
        replicas[slot].outstanding += 1
    }
}
