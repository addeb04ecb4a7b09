// Making regions equal: the members after a takeover (T4), the joiner while it is filled (J).
//
// A job holds its region's lock and goes through the layers that may differ, lowest first. In each
// it asks every participant for a digest, and treats the blocks that differ run by run: read from
// one source, written to those who differ (a copy: see EngineCopy). Every frame names the layer,
// and means what that layer holds itself. Absent is a content like any other, and not the same as
// zero: it shows the layers below.
//
// Whatever interrupts it - a lost participant, a changed record - it keeps the lock and begins the
// layer again with fresh digests. The layers it has done stay equal under the lock, and those that
// a snapshot adds meanwhile come last.

extension EngineCore {
    func hasJob(_ region: UInt64) -> Bool {
        for job in 0..<jobsMax where jobs[job].stage != .free && jobs[job].region == region {
            return true
        }
        return false
    }
    /// A copy, or a scrub's look, that has not begun gives way.
    func isBeingCopied(_ region: UInt64) -> Bool {
        for job in 0..<jobsMax where jobs[job].stage != .free && jobs[job].region == region {
            if jobs[job].kind == .scrub { return !dropWaitingScrub(job) }
            guard jobs[job].kind == .copy else { return false }
            guard slots[Int(jobs[job].slot)].phase == .waiting else { return true }
            jobs[job].stage = .free
            release(Int(jobs[job].slot))
            return false
        }
        return false
    }
    var hasFreeJob: Bool {
        for job in 0..<jobsMax where jobs[job].stage == .free { return true }
        return false
    }
    func activeJobs(_ kind: Job.Kind) -> Int {
        var count = 0
        for job in 0..<jobsMax where jobs[job].stage != .free && jobs[job].kind == kind {
            count += 1
        }
        return count
    }

    /// Starts jobs while there is work and room, and lets waiting ones go on.
    func advanceJobs() {
        guard phase == .serving, isResolving || joinStage == .copying || anyJob else { return }
        for job in 0..<jobsMax where jobs[job].stage == .waiting { proceed(job) }
        while isResolving, hasFreeJob, let region = nextUnresolved() {
            begin(damagedRegions.contains(region) ? .repair : .resolve, region)
        }
        while joinStage == .copying, !isResolving, hasFreeJob,
            throttle.mayBegin(now, running: activeJobs(.copy)), let region = nextNeeded()
        {
            throttle.began(bytes: Geometry.regionSize)
            begin(.copy, region)
        }
    }
    private var anyJob: Bool {
        for job in 0..<jobsMax where jobs[job].stage != .free { return true }
        return false
    }

    func begin(_ kind: Job.Kind, _ region: UInt64) {
        guard let job = (0..<jobsMax).first(where: { jobs[$0].stage == .free }) else { return }
        let index = allocateSlot(
            .job,
            Operation(
                kind: .write, offset: region * UInt64(Geometry.regionSize),
                length: blockCount(region) * Geometry.blockSize, userData: UInt64(job)))
        slots[index].firstBlock = region * UInt64(Geometry.blocksPerRegion)
        slots[index].endBlock = slots[index].firstBlock + UInt64(blockCount(region))
        append(index, bucketIndex(slots[index].firstBlock))
        jobs[job] = Job()
        jobs[job].stage = .waiting
        jobs[job].kind = kind
        jobs[job].region = region
        jobs[job].slot = Int32(index)
        if kind == .scrub { jobs[job].scrub = scrub.progress.id }
        proceed(job)
    }

    /// Blocks of the region; the volume's last region may be partial.
    func blockCount(_ region: UInt64) -> Int {
        let start = region * UInt64(Geometry.regionSize)
        return Int(min(UInt64(Geometry.regionSize), size - start)) / Geometry.blockSize
    }

    /// Takes the lock if it has not got it, and asks for digests once the membership is settled.
    private func proceed(_ job: Int) {
        let index = Int(jobs[job].slot)
        if slots[index].phase == .waiting {
            if isLocked(job, index) { return }
            slots[index].phase = .inFlight
        }
        guard isSettled, let source = chooseSource(job) else { return }
        if jobs[job].layer == .head {
            guard let lowest = nextLayer(job) else { return finish(job) }
            jobs[job].layer = lowest
        }
        var participants: SlotSet
        switch jobs[job].kind {
        case .resolve, .repair, .scrub: participants = members
        case .copy:
            guard let joiner, isLive(joiner) else { return }
            participants = [SlotSet(source), SlotSet(joiner)]
        }
        slots[index].generation &+= 1
        slots[index].sentAt = now
        jobs[job].participants = participants
        jobs[job].awaiting = participants
        jobs[job].source = Int8(source)
        jobs[job].nextBlock = 0
        if jobs[job].kind == .copy, !jobs[job].acceptsDamage, !isHeldByJoiner(jobs[job].region) {
            return fetch(job)
        }
        jobs[job].stage = .digesting
        var header = FrameHeader(kind: .digest)
        header.layer = jobs[job].layer
        header.tag = tag(index)
        header.offset = jobs[job].region * UInt64(Geometry.regionSize)
        header.length = UInt32(blockCount(jobs[job].region) * Geometry.blockSize)
        while let slot = participants.popFirst() { send(slot, header) }
    }

    private func isLocked(_ job: Int, _ index: Int) -> Bool {
        switch jobs[job].kind {
        case .resolve, .repair: isRegionBusy(index)
        case .copy: isCopyBlocked(index)
        case .scrub: isBlocked(index)
        }
    }

    /// The lowest layer that the job has not done and in which its participants may differ.
    private func nextLayer(_ job: Int) -> LayerID? {
        let (done, region) = (jobs[job].layer, jobs[job].region)
        guard let record else { return nil }
        if jobs[job].kind == .copy, done == .head, mutations.contains(.lowerLayersNotCopied) {
            return record.head
        }
        if jobs[job].kind == .resolve, let suspects = suspectLayers[region] {
            return suspects.first { $0 > done && record.reaches($0, region) }
        }
        return record.layer(above: done, reaching: region)
    }
    /// The participants are equal in this layer.
    func finishLayer(_ job: Int) {
        if jobs[job].kind == .scrub { layerScrubbed(job) }
        guard let next = nextLayer(job) else { return finish(job) }
        jobs[job].layer = next
        jobs[job].unfit = []
        jobs[job].acceptsDamage = false
        jobs[job].stage = .waiting
        proceed(job)
    }

    /// Resolution prefers a member whose host has not restarted: a rebooted one may have lost
    /// writes that were acknowledged.
    private func chooseSource(_ job: Int) -> ReplicaSlot? {
        var candidates = liveMembers.subtracting(jobs[job].unfit)
        if candidates.isEmpty { candidates = liveMembers }
        var rest = candidates
        if jobs[job].kind == .resolve, !mutations.contains(.rebootedSource) {
            while let slot = rest.popFirst() {
                if !replicas[slot].isRebooted { return slot }
            }
        }
        if mutations.contains(.rebootedSource), jobs[job].kind == .resolve {
            while let slot = rest.popFirst() {
                if replicas[slot].isRebooted { return slot }
            }
        }
        return candidates.first
    }

    /// A participant is gone: begin again when the membership is settled, still under the lock.
    func restartJobs(awaiting slot: ReplicaSlot) {
        for job in 0..<jobsMax where jobs[job].stage != .free && jobs[job].stage != .waiting {
            if jobs[job].participants.contains(slot) { restart(job) }
        }
    }
    func restart(_ job: Int) {
        if drain(job) { return }
        jobs[job].stage = .waiting
        slots[Int(jobs[job].slot)].generation &+= 1
    }
    /// What a job asked waited for a merge of the region, and an Install came: it is asked again.
    func jobRefused(_ refused: FrameHeader) -> Bool {
        switch refused.kind {
        case .digest, .read, .adopt, .write, .setState: break
        default: return false
        }
        guard let index = slotIndex(ofTag: refused.tag), slots[index].use == .job else {
            return false
        }
        let job = Int(slots[index].operation.userData)
        let isWrite = refused.kind == .write || refused.kind == .setState
        guard !isWrite || jobs[job].kind == .scrub else { return false }
        if refused.kind == .read, jobs[job].stage == .copying { jobs[job].readsOut -= 1 }
        restart(job)
        return true
    }
    func abandonJobs(_ kind: Job.Kind? = nil) {
        for job in 0..<jobsMax where jobs[job].stage != .free {
            guard kind == nil || jobs[job].kind == kind else { continue }
            jobs[job].stage = .free
            release(Int(jobs[job].slot))
        }
    }

    // MARK: - Replies

    func receivedForJob(
        _ job: Int, _ slot: ReplicaSlot, _ header: FrameHeader, _ table: RawMemory,
        _ data: RawMemory
    ) {
        guard jobs[job].awaiting.contains(slot) else { return protocolError(slot) }
        switch (jobs[job].stage, header.kind) {
        case (.digesting, .digest):
            guard header.status == .ok, table.count == RegionDigest.size else {
                if jobs[job].kind == .scrub, header.status == .ioError, liveMembers.count == 1 {
                    return giveUpScrub(job, slot)
                }
                return failReplica(slot, .failing(header.status))
            }
            digest(job, slot).copy(from: table)
            settleLowest(job, slot)
            answered(job, slot)
        case (.fetching, .read): receivedFetch(job, slot, header, table)
        case (.copying, _), (.draining, _): receivedForCopy(job, slot, header, table)
        case (.reading, .read), (.reading, .adopt):
            guard header.status == .ok else {
                if header.status == .checksumMismatch || mayReadAgain(job, header.status) {
                    restart(job)
                } else if header.status == .ioError, isUnreadable(job) {
                    // Which of them it is, one finds out by asking for one.
                    if jobs[job].run.count > 1 { narrowRun(job) } else { agreeOnEntry(job) }
                } else {
                    failReplica(slot, .failing(header.status))
                }
                return
            }
            guard Int(header.dataLength) == jobs[job].run.count * Geometry.blockSize else {
                return restart(job)
            }
            writeRun(job, table)
        case (.writing, .write), (.writing, .setState):
            guard header.status == .ok else {
                return failReplica(slot, .failing(header.status))
            }
            answered(job, slot)
        // (Entries of a layer that clones share stay as they are, and name what was flushed.)
        case (.writing, .adopt): answered(job, slot)
        default:
            protocolError(slot)
        }
    }

    private func answered(_ job: Int, _ slot: ReplicaSlot) {
        jobs[job].awaiting.remove(SlotSet(slot))
        guard jobs[job].awaiting.isEmpty else { return }
        if jobs[job].stage == .digesting {
            regionsCompared += 1
            if jobs[job].kind == .copy { return compareForCopy(job) }
            if jobs[job].kind == .scrub { inspect(job) }
        }
        nextRun(job)
    }

    /// What a scrub's source cannot read any more, the next digests call bad.
    private func mayReadAgain(_ job: Int, _ status: FrameStatus) -> Bool {
        guard jobs[job].kind == .scrub, status == .ioError, jobs[job].retries < Job.retriesMax
        else { return false }
        jobs[job].retries += 1
        return true
    }

    func digest(_ job: Int, _ slot: ReplicaSlot) -> RawMemory {
        digests.memory.slice(
            (job * Geometry.replicaSlotsMax + slot) * RegionDigest.size, RegionDigest.size)
    }

    /// What the replica holds of the block. Nil: it sent nonsense.
    func content(_ job: Int, _ slot: ReplicaSlot, _ block: Int) -> RegionDigest.Block? {
        RegionDigest.decode(index: block, from: digest(job, slot))
    }

    /// Below the lowest layer everything reads zero: copies differ in which of the two they say
    /// (seed 401521). Nobody is told to hold nothing there: what is written over bytes of before,
    /// and torn, would show them, but zero is known to have been zero.
    func settleLowest(_ job: Int, _ slot: ReplicaSlot) {
        guard jobs[job].layer == record?.layers.first else { return }
        for block in 0..<blockCount(jobs[job].region) {
            guard var its = content(job, slot, block), its.entry.state == .absent else { continue }
            its.entry.state = .zero
            RegionDigest.encode(its, index: block, to: digest(job, slot))
        }
    }

    // MARK: - Runs

    /// The next run of blocks that need the same treatment, from `nextBlock` on, which moves past
    /// it; its action is `none` if there is none left.
    func nextDifference(_ job: Int) -> Job.Run {
        let count = blockCount(jobs[job].region)
        var block = jobs[job].nextBlock
        var run = Job.Run()
        while block < count {
            let next = plan(job, block)
            if run.action == .none {
                run = next
                run.first = block
                run.count = 1
            } else if run.continues(next) {
                run.count += 1
            } else {
                break
            }
            block += 1
        }
        jobs[job].nextBlock = block
        return run
    }

    private func nextRun(_ job: Int) { begin(job, nextDifference(job)) }
    private func narrowRun(_ job: Int) {
        var run = jobs[job].run
        run.count = 1
        jobs[job].nextBlock = run.first + 1
        begin(job, run)
    }
    private func begin(_ job: Int, _ run: Job.Run) {
        jobs[job].run = run
        let index = Int(jobs[job].slot)
        slots[index].generation &+= 1
        slots[index].sentAt = now
        var header = jobHeader(job, .read, run.blocks)
        switch run.action {
        case .none: finishLayer(job)
        case .copy, .adopt:
            if run.action == .adopt {
                header.kind = .adopt
                note(.doubtfulBytesKept(ReplicaSlot(run.source), offset: header.offset))
            }
            jobs[job].stage = .reading
            jobs[job].awaiting = SlotSet(ReplicaSlot(run.source))
            send(ReplicaSlot(run.source), header)
        case .setState:
            header.kind = .setState
            header.auxiliary = UInt64(run.state.rawValue)
            sendRun(job, &header, buffer: .none)
        case .impossible, .mark: preconditionFailure("only a copy gives up")
        }
    }

    /// What the block needs, from the digests.
    func plan(_ job: Int, _ block: Int) -> Job.Run {
        var run = Job.Run()
        let participants = jobs[job].participants
        guard let source = sourceOfBlock(job, block) else {
            // Nobody's copy is intact. Resolution keeps a steady member's bytes; a copy must not.
            if jobs[job].kind == .repair { return Job.Run() }
            if jobs[job].kind == .resolve, let errored = erroredRegions[jobs[job].region],
                !errored.mayBeTorn(jobs[job].layer, block)
            {
                return Job.Run()
            }
            if jobs[job].kind == .scrub, !mutations.contains(.scrubTrustsFirst) {
                return Job.Run()
            }
            if jobs[job].kind == .copy { return planForDamage(job, block) }
            run.action = .adopt
            run.source = jobs[job].source
            run.targets = participants.subtracting(SlotSet(ReplicaSlot(run.source)))
            return run
        }
        guard let good = content(job, source, block) else {
            run.action = .impossible
            return run
        }
        var rest = participants
        while let slot = rest.popFirst() {
            guard slot != source else { continue }
            let other = content(job, slot, block)
            if other != good || other?.isDoubtful == true { run.targets.insert(SlotSet(slot)) }
        }
        guard !run.targets.isEmpty else { return Job.Run() }
        run.source = Int8(source)
        run.state = good.entry.state
        run.action = good.entry.state == .data ? .copy : .setState
        return run
    }

    /// Whose copy of the block stands, in this order: the job's source if intact; another member
    /// that has not rebooted; a rebooted one that holds exactly what a steady member's entry names
    /// (so it is the steady member's copy that rotted); and, if there is no steady member, any.
    private func sourceOfBlock(_ job: Int, _ block: Int) -> ReplicaSlot? {
        let chosen = ReplicaSlot(jobs[job].source)
        guard let preferred = content(job, chosen, block) else { return nil }
        if jobs[job].kind == .scrub { return sourceForScrub(job, block) }
        if !preferred.isDoubtful { return chosen }
        guard jobs[job].kind != .copy else { return nil }
        let steadyExists = !replicas[chosen].isRebooted
        var rebooted: ReplicaSlot?
        var rest = jobs[job].participants
        while let slot = rest.popFirst() {
            guard let other = content(job, slot, block), !other.isDoubtful else { continue }
            if !replicas[slot].isRebooted { return slot }
            if !steadyExists || other.entry == preferred.entry { rebooted = rebooted ?? slot }
        }
        return rebooted
    }

    /// The run has been read into the job's buffer: verifies it and writes it where it is missing.
    private func writeRun(_ job: Int, _ entries: RawMemory) {
        let run = jobs[job].run
        let memory = pool.memory(jobBuffers[job])
        guard verify(memory, entries, blocks: run.count, hasData: true) == true else {
            return restart(job)
        }
        let index = Int(jobs[job].slot)
        let table = table(Int32(index))
        for block in 0..<run.count {
            let content = memory.slice(block * Geometry.blockSize, Geometry.blockSize)
            table.store(CRC32C.checksum(content), block * 4)
        }
        if run.action == .adopt { spareThoseThatHave(job, table) }
        var header = jobHeader(job, .write, run.blocks)
        header.tableLength = UInt32(run.count * 4)
        header.dataLength = header.length
        header.tableChecksum = CRC32C.checksum(table.slice(0, run.count * 4))
        sendRun(job, &header, buffer: jobBuffers[job])
    }

    /// What was kept may be what a rebooted member has intact: it need not be sent that.
    private func spareThoseThatHave(_ job: Int, _ checksums: RawMemory) {
        let run = jobs[job].run
        var rest = run.targets
        while let slot = rest.popFirst() {
            let hasAll = (0..<run.count).allSatisfy { block in
                let kept = BlockEntry(
                    state: .data, checksum: checksums.load(UInt32.self, block * 4))
                let its = content(job, slot, run.first + block)
                return its.map { !$0.isDoubtful && $0.entry == kept } ?? false
            }
            if hasAll { jobs[job].run.targets.remove(SlotSet(slot)) }
        }
    }

    func sendRun(_ job: Int, _ header: inout FrameHeader, buffer: BufferID) {
        header.sequence = nextSequence()
        let targets = jobs[job].run.targets
        jobs[job].stage = .writing
        jobs[job].awaiting = targets
        guard !targets.isEmpty else { return nextRun(job) }
        jobs[job].blocksCopied += UInt64(jobs[job].run.count)
        var rest = targets
        while let slot = rest.popFirst() {
            send(slot, header, tableOf: jobs[job].slot, buffer: buffer)
        }
        wantFlush()
    }

    func nextSequence() -> SequenceNumber {
        sequence = SequenceNumber(sequence.rawValue + 1)
        return sequence
    }

    func finish(_ job: Int) {
        let (kind, region, copied) = (jobs[job].kind, jobs[job].region, jobs[job].blocksCopied)
        jobs[job].stage = .free
        // First the region counts as equal, then its lock goes: what waits for it starts in
        // release.
        switch kind {
        case .resolve:
            regionResolved(region, blocks: copied)
        case .repair:
            regionRepaired(region, blocks: copied)
        case .copy:
            blocksRebuilt += copied
            regionCopied(region)
        case .scrub: regionScrubbed(region, blocks: copied)
        }
        release(Int(jobs[job].slot))
    }
}
