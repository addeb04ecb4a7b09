// Rule J: one region from a member to the joiner, under the region's lock.
//
// What the joiner may hold is compared first: a region copied before an engine or the joiner died
// costs two digests. What it cannot hold is fetched whole and written, with no digest at all. Many
// frames are on the way at once, so that neither disk nor wire waits for the other.
//
// All of it layer by layer. A region found equal still counts as written when the member last wrote
// it: with an older birth the joiner, a member by then, would keep the region from a replica that
// left in between.

extension EngineCore {
    private static let copyFramesMax = 16
    /// So often a block that cannot be read keeps a joiner out, for 10 s each time.
    static let unreadableJoinsMax = 3

    /// The joiner holds nothing of the region.
    func fetch(_ job: Int) {
        let source = ReplicaSlot(jobs[job].source)
        jobs[job].stage = .fetching
        jobs[job].awaiting = SlotSet(source)
        jobs[job].run = Job.Run()
        jobs[job].run.count = blockCount(jobs[job].region)
        send(source, jobHeader(job, .read, 0..<jobs[job].run.count))
    }

    func receivedFetch(
        _ job: Int, _ slot: ReplicaSlot, _ header: FrameHeader, _ entries: RawMemory
    ) {
        guard header.status == .ok else {
            // As for a client's read: a block that cannot be read is no member lost.
            if header.status == .checksumMismatch || header.status == .ioError {
                return tryAnotherSource(job)
            }
            return failReplica(slot, .failing(header.status))
        }
        let count = jobs[job].run.count
        let hasData = header.dataLength > 0
        guard !hasData || Int(header.dataLength) == count * Geometry.blockSize,
            let isIntact = verify(
                pool.memory(jobBuffers[job]), entries, blocks: count, hasData: hasData)
        else { return protocolError(slot) }
        guard isIntact, let joiner else { return restart(job) }
        digest(job, joiner).fill()
        let content = digest(job, slot)
        content.fill()
        for block in 0..<count {
            let entry = BlockEntry(decoding: entries, at: block * BlockEntry.size) ?? .absent
            RegionDigest.encode(
                .init(entry: entry, isDoubtful: false, hashLow: 0, hashHigh: 0), index: block,
                to: content)
        }
        settleLowest(job, joiner)
        settleLowest(job, slot)
        jobs[job].isFetched = true
        // One layer's birth is the region's: what the upper ones do not hold takes no space there.
        jobs[job].isStampDue =
            jobs[job].layer == record?.layer(above: .head, reaching: jobs[job].region)
        beginCopy(job)
    }

    /// Both digests are here.
    func compareForCopy(_ job: Int) {
        guard let joiner else { return }
        let births = [ReplicaSlot(jobs[job].source), joiner].map {
            digest(job, $0).load(UInt64.self, 0)
        }
        jobs[job].isFetched = false
        jobs[job].isStampDue =
            births[1] < births[0] && !mutations.contains(.equalRegionKeepsBirth)
        beginCopy(job)
    }

    private func beginCopy(_ job: Int) {
        jobs[job].stage = .copying
        jobs[job].awaiting = jobs[job].participants
        jobs[job].nextBlock = 0
        jobs[job].readsOut = 0
        jobs[job].writesOut = 0
        jobs[job].hasSkipped = false
        continueCopy(job)
    }

    private func continueCopy(_ job: Int) {
        let count = blockCount(jobs[job].region)
        while jobs[job].stage == .copying,
            jobs[job].readsOut + jobs[job].writesOut < Self.copyFramesMax,
            jobs[job].nextBlock < count
        {
            let run = nextDifference(job)
            if run.action != .none { start(job, run) }
        }
        guard jobs[job].stage == .copying, jobs[job].nextBlock >= count,
            jobs[job].readsOut + jobs[job].writesOut == 0
        else { return }
        if jobs[job].hasSkipped {
            jobs[job].unfit.insert(SlotSet(ReplicaSlot(jobs[job].source)))
            return restart(job)
        }
        if jobs[job].isStampDue { return stamp(job) }
        finishLayer(job)
    }

    /// Writes one block that is equal already, for the region's birth.
    private func stamp(_ job: Int) {
        let source = ReplicaSlot(jobs[job].source)
        let place = (0..<blockCount(jobs[job].region)).first {
            content(job, source, $0)?.isDoubtful == false
        }
        guard let block = content(job, source, place ?? 0) else { return restart(job) }
        var run = Job.Run()
        run.first = place ?? 0
        run.count = 1
        run.state = block.entry.state
        run.checksum = block.entry.checksum
        run.action = block.entry.state == .data ? .copy : .setState
        if block.isDoubtful { run.action = .mark }
        start(job, run)
    }

    /// The source's copy of the block is damaged. The joiner's may be what it was: its entry names
    /// the same data. If not, and no member has a better one, the joiner shares the damage, so that
    /// one bad block does not cost the volume its redundancy; whoever has what the entries name
    /// repairs both.
    func planForDamage(_ job: Int, _ block: Int) -> Job.Run {
        var run = Job.Run()
        run.action = .impossible
        guard let joiner,
            let its = content(job, joiner, block),
            let bad = content(job, ReplicaSlot(jobs[job].source), block)
        else { return run }
        if its.entry == bad.entry, !its.isDoubtful { return Job.Run() }
        guard jobs[job].acceptsDamage else { return run }
        // First it gets what each of the others has.
        let others = liveMembers.subtracting(jobs[job].unfit)
        guard others.subtracting(SlotSet(ReplicaSlot(jobs[job].source))).isEmpty else {
            jobs[job].hasSkipped = true
            return Job.Run()
        }
        if its.entry == bad.entry { return Job.Run() }
        // What cannot be read now may be read later.
        let isUnreadable = bad.hashLow == 0 && bad.hashHigh == 0
        guard !isUnreadable || unreadableJoins >= Self.unreadableJoinsMax else { return run }
        run.action = .mark
        run.checksum = bad.entry.checksum
        return run
    }

    private func start(_ job: Int, _ run: Job.Run) {
        guard let joiner else { return }
        let blocks = run.blocks
        switch run.action {
        case .copy where jobs[job].isFetched: sendCopy(job, blocks)
        case .copy:
            jobs[job].readsOut += 1
            send(ReplicaSlot(jobs[job].source), jobHeader(job, .read, blocks))
        case .setState:
            var header = jobHeader(job, .setState, blocks)
            header.auxiliary = UInt64(run.state.rawValue)
            header.sequence = nextSequence()
            jobs[job].blocksCopied += UInt64(run.count)
            willWrite(job)
            send(joiner, header)
        case .mark:
            var header = jobHeader(job, .adopt, blocks)
            header.auxiliary = AdoptRequest.naming(run.checksum)
            header.sequence = nextSequence()
            willWrite(job)
            send(joiner, header)
        case .none, .adopt, .impossible: tryAnotherSource(job)
        }
    }

    /// A frame of a job, about these blocks of its region in its layer.
    func jobHeader(_ job: Int, _ kind: FrameKind, _ blocks: Range<Int>) -> FrameHeader {
        var header = FrameHeader(kind: kind)
        header.flags = FrameFlags.resync
        header.layer = jobs[job].layer
        header.tag = tag(Int(jobs[job].slot))
        header.offset =
            jobs[job].region * UInt64(Geometry.regionSize)
            + UInt64(blocks.lowerBound * Geometry.blockSize)
        header.length = UInt32(blocks.count * Geometry.blockSize)
        return header
    }

    private func willWrite(_ job: Int) {
        jobs[job].writesOut += 1
        jobs[job].isStampDue = false
        wantFlush()
    }

    /// The blocks are in the job's buffer, each in its place, verified.
    private func sendCopy(_ job: Int, _ blocks: Range<Int>) {
        guard let joiner else { return }
        let memory = pool.memory(jobBuffers[job])
        let checksums = table(jobs[job].slot)
        for block in blocks {
            let content = memory.slice(block * Geometry.blockSize, Geometry.blockSize)
            checksums.store(CRC32C.checksum(content), block * 4)
        }
        var header = jobHeader(job, .write, blocks)
        header.sequence = nextSequence()
        header.dataLength = header.length
        header.tableLength = UInt32(blocks.count * 4)
        header.tableChecksum = CRC32C.checksum(
            checksums.slice(blocks.lowerBound * 4, blocks.count * 4))
        jobs[job].blocksCopied += UInt64(blocks.count)
        joinProgress.bytesCopied += UInt64(header.dataLength)
        bytesRebuilt += UInt64(header.dataLength)
        willWrite(job)
        send(
            joiner, header, tableOf: Self.tableIndex(jobs[job].slot, block: blocks.lowerBound),
            buffer: jobBuffers[job], bufferOffset: blocks.lowerBound * Geometry.blockSize)
    }

    // MARK: - Replies

    func receivedForCopy(
        _ job: Int, _ slot: ReplicaSlot, _ header: FrameHeader, _ entries: RawMemory
    ) {
        switch header.kind {
        case .read where jobs[job].readsOut > 0 && slot == ReplicaSlot(jobs[job].source):
            jobs[job].readsOut -= 1
            guard jobs[job].stage == .copying else { return }
            receivedBlocks(job, slot, header, entries)
        case .write, .setState, .adopt:
            guard jobs[job].writesOut > 0, slot == joiner else { return protocolError(slot) }
            jobs[job].writesOut -= 1
            guard header.status == .ok else {
                return failReplica(slot, header.status == .noSpace ? .full : .ioError)
            }
            if jobs[job].stage == .copying { continueCopy(job) } else { endDraining(job) }
        default: protocolError(slot)
        }
    }

    /// The joiner let an Install of this engine pass a write that waited for room in its activity
    /// log, and refused it: the layer is begun again, and the joiner stays. False if it was none.
    func copyRefused(_ slot: ReplicaSlot, _ refused: FrameHeader) -> Bool {
        guard slot == joiner,
            refused.kind == .write || refused.kind == .setState || refused.kind == .adopt,
            let index = slotIndex(ofTag: refused.tag), slots[index].use == .job
        else { return false }
        let job = Int(slots[index].operation.userData)
        guard jobs[job].stage == .copying || jobs[job].stage == .draining,
            jobs[job].writesOut > 0
        else { return false }
        jobs[job].writesOut -= 1
        if jobs[job].stage == .draining { endDraining(job) } else { restart(job) }
        return true
    }

    private func receivedBlocks(
        _ job: Int, _ slot: ReplicaSlot, _ header: FrameHeader, _ entries: RawMemory
    ) {
        guard header.status == .ok else {
            // New digests say which block it is, and so that another member must give it.
            if header.status == .checksumMismatch { return restart(job) }
            if header.status == .ioError { return tryAnotherSource(job) }
            return failReplica(slot, .failing(header.status))
        }
        guard let blocks = copiedBlocks(job, header) else { return protocolError(slot) }
        let memory = pool.memory(jobBuffers[job]).slice(
            blocks.lowerBound * Geometry.blockSize, blocks.count * Geometry.blockSize)
        guard verify(memory, entries, blocks: blocks.count, hasData: true) == true else {
            return restart(job)
        }
        sendCopy(job, blocks)
    }

    /// Which blocks of the job's region a reply carries; nil: none that could have been asked for.
    func copiedBlocks(_ job: Int, _ header: FrameHeader) -> Range<Int>? {
        let start = jobs[job].region * UInt64(Geometry.regionSize)
        let count = Int(header.dataLength) / Geometry.blockSize
        guard header.dataLength == header.length, header.offset >= start, count > 0,
            header.offset % UInt64(Geometry.blockSize) == 0
        else { return nil }
        let first = (header.offset - start) / UInt64(Geometry.blockSize)
        guard first < UInt64(blockCount(jobs[job].region)),
            Int(first) + count <= blockCount(jobs[job].region)
        else { return nil }
        return Int(first)..<Int(first) + count
    }

    /// True: writes are on their way to the joiner, and what is begun again must not meet them.
    func drain(_ job: Int) -> Bool {
        guard jobs[job].kind == .copy, jobs[job].writesOut > 0 else { return false }
        jobs[job].stage = .draining
        return true
    }
    private func endDraining(_ job: Int) {
        guard jobs[job].writesOut == 0 else { return }
        restart(job)
    }

    /// The copy's source holds a doubtful block: another member may not.
    private func tryAnotherSource(_ job: Int) {
        jobs[job].unfit.insert(SlotSet(ReplicaSlot(jobs[job].source)))
        guard liveMembers.subtracting(jobs[job].unfit).isEmpty else { return restart(job) }
        note(
            .checksumMismatch(
                ReplicaSlot(jobs[job].source),
                offset: jobs[job].region * UInt64(Geometry.regionSize)))
        guard !jobs[job].acceptsDamage else {
            unreadableJoins += 1
            return dropJoiner(retryMilliseconds: 10_000)
        }
        jobs[job].acceptsDamage = true
        jobs[job].unfit = []
        restart(job)
    }
}
