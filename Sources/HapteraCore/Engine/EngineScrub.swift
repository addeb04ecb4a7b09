// Scrub: every layer of every member is read and checked in the background.
//
// Region by region, and from the uppermost layer down, all members are asked to verify what they
// hold, without any lock: they read and compare with their entries, and answer a fingerprint of
// these. Intact copies with the same fingerprint are done. Anything else may be damage, or a write
// that was on the way: a job takes the region's lock, compares the members' digests layer by layer
// (see EngineJobs), and what is bad then is bad. It is rewritten from another member where one can
// be trusted, in place and in frozen layers too, and otherwise left alone and reported.
//
// It gives way to everything: nothing is begun while members change, are made equal or filled,
// while a snapshot is taken or deleted, or while writes wait for space. Its speed is
// `CopyThrottle`'s.

extension EngineCore {
    // MARK: - Control

    /// Begins a scrub, or goes on with one from where it was. A second request with the same id
    /// changes nothing.
    func beginScrub(_ progress: ScrubProgress) {
        guard !scrub.isRunning || scrub.progress.id != progress.id else { return }
        interruptScrub()
        for place in 0..<scrubRegions.count { endRegion(place) }
        scrub.begin(progress, at: now)
        scrub.isRunning = true
        scrub.cursor = progress.region
        scrub.mapBegin = progress.region
        scrub.mapEnd = progress.region
        scrub.mapAwaiting = []
        note(.scrubBegun(region: progress.region))
    }

    package var isScrubbing: Bool { scrub.isRunning }
    /// Nil: none was asked for.
    package var scrubReport: ScrubReport? {
        guard scrub.progress.id != 0 else { return nil }
        var progress = scrub.progress
        if scrub.isRunning { progress.region = scrubPosition }
        let state: ScrubReport.State =
            !scrub.isRunning ? .finished : mayScrub ? .running : .waiting
        return ScrubReport(
            state: state, progress: progress, regionsTotal: Geometry.regionCount(size: size),
            bytesPerSecond: state == .running ? scrub.bytesPerSecond : 0)
    }
    /// The lowest region that is not done.
    private var scrubPosition: UInt64 {
        var lowest = scrub.cursor
        for place in 0..<scrubRegions.count where scrubRegions[place].stage != .free {
            lowest = min(lowest, scrubRegions[place].region)
        }
        return lowest
    }

    var mayScrub: Bool {
        phase == .serving && isSettled && !isResolving && joinStage == .none && !isDetaching
            && !isFullEverywhere && !isStoreBusy && members.count >= minInSync
            && snapshotRequests.isEmpty && deletionRequests.isEmpty && isWhole
    }
    /// Every replica is a member, but for a salvage's losers: a scrub that went on without one
    /// would call a volume verified of which a copy was not.
    private var isWhole: Bool {
        for slot in 0..<replicas.count
        where replicas[slot].isConfigured && !members.contains(slot) {
            let id = replicas[slot].id
            let isKept = record?.out.contains { $0.member.replica == id && $0.isKept }
            if isKept != true { return false }
        }
        return true
    }

    // MARK: - Going on

    /// After every event, while a scrub runs.
    func advanceScrub() {
        guard mayScrub else { return giveWay() }
        for place in 0..<scrubRegions.count where scrubRegions[place].stage == .due {
            if mayAsk(place) { ask(place) }
        }
        for place in 0..<scrubRegions.count where scrubRegions[place].stage == .suspect {
            judge(place)
        }
        while let place = freePlace, throttle.mayBegin(now, running: regionsUnderWay),
            let region = nextToScrub()
        {
            scrubRegions[place] = ScrubRegion()
            scrubRegions[place].stage = .due
            scrubRegions[place].region = region
            if mayAsk(place) { ask(place) }
        }
        if scrub.cursor >= Geometry.regionCount(size: size), regionsUnderWay == 0 { finishScrub() }
    }
    private var freePlace: Int? {
        for place in 0..<scrubRegions.count where scrubRegions[place].stage == .free {
            return place
        }
        return nil
    }
    private var regionsUnderWay: Int {
        var count = 0
        for place in 0..<scrubRegions.count where scrubRegions[place].stage != .free { count += 1 }
        return count
    }

    /// What only waits for a region's lock would keep others waiting for as long as the scrub may
    /// not go on.
    private func giveWay() {
        for job in 0..<jobsMax where jobs[job].stage != .free && jobs[job].kind == .scrub {
            dropWaitingScrub(job)
        }
    }
    /// False: it has the lock.
    @discardableResult
    func dropWaitingScrub(_ job: Int) -> Bool {
        guard slots[Int(jobs[job].slot)].phase == .waiting else { return false }
        let region = jobs[job].region
        jobs[job].stage = .free
        release(Int(jobs[job].slot))
        for place in 0..<scrubRegions.count
        where scrubRegions[place].stage == .judged && scrubRegions[place].region == region {
            scrubRegions[place].stage = .suspect
        }
        return true
    }

    /// Of a region with which a member was lost, nothing else is asked meanwhile: it may be what
    /// the member died of, and the others not.
    private func mayAsk(_ place: Int) -> Bool {
        var isCareful = scrubRegions[place].failures > 0
        var isAsking = false
        for other in 0..<scrubRegions.count where scrubRegions[other].stage == .asking {
            isAsking = true
            if scrubRegions[other].failures > 0 { isCareful = true }
        }
        return !isCareful || !isAsking
    }

    private func ask(_ place: Int) {
        let region = scrubRegions[place].region
        throttle.began(bytes: Geometry.regionSize)
        let index = allocateSlot(.scrub, Operation(kind: .read, userData: UInt64(place)))
        slots[index].phase = .inFlight
        slots[index].sentAt = now
        scrubRegions[place].stage = .asking
        scrubRegions[place].slot = Int32(index)
        scrubRegions[place].awaiting = members
        scrubRegions[place].isSuspect = false
        scrubRegions[place].hasFirst = false
        var header = FrameHeader(kind: .verify)
        header.tag = tag(index)
        header.layer = scrubRegions[place].layer
        header.offset = region * UInt64(Geometry.regionSize)
        header.length = UInt32(blockCount(region) * Geometry.blockSize)
        var rest = members
        while let slot = rest.popFirst() { send(slot, header) }
    }

    private func judge(_ place: Int) {
        let region = scrubRegions[place].region
        guard hasFreeJob, !hasJob(region) else { return }
        scrubRegions[place].stage = .judged
        begin(.scrub, region)
    }

    private func endRegion(_ place: Int) { scrubRegions[place].stage = .free }

    private func finishScrub() {
        scrub.isRunning = false
        scrub.progress.region = Geometry.regionCount(size: size)
        note(.scrubFinished)
    }

    // MARK: - Which regions may hold anything

    /// The next region that some member may hold anything of; nil: none is known yet.
    private func nextToScrub() -> UInt64? {
        let count = Geometry.regionCount(size: size)
        while scrub.cursor < count {
            guard scrub.mapAwaiting.isEmpty else { return nil }
            guard scrub.cursor < scrub.mapEnd else {
                requestScrubMap(from: scrub.cursor, count)
                return nil
            }
            let region = scrub.cursor
            scrub.cursor += 1
            let place = region - scrub.mapBegin
            if scrubMap[Int(place / 64)] >> (place % 64) & 1 != 0 { return region }
        }
        return nil
    }
    private func requestScrubMap(from region: UInt64, _ count: UInt64) {
        scrub.mapBegin = region
        scrub.mapEnd = region + min(ScrubState.mapRegions, count - region)
        scrub.mapAwaiting = members
        scrub.mapAttempt &+= 1
        for word in 0..<scrubMap.count { scrubMap[word] = 0 }
        var header = FrameHeader(kind: .regionMap)
        header.tag = scrubMapTag
        header.offset = region * UInt64(Geometry.regionSize)
        header.length = UInt32(scrub.mapEnd - region)
        var rest = members
        while let slot = rest.popFirst() { send(slot, header) }
    }
    /// The two lowest bits tell it from a join's questions.
    private var scrubMapTag: UInt64 { UInt64(scrub.mapAttempt) << 48 | scrub.mapBegin << 2 | 3 }

    /// False: the answer is none to a scrub's question.
    func receivedScrubMap(_ slot: ReplicaSlot, _ header: FrameHeader, _ table: RawMemory) -> Bool {
        guard header.tag & 3 == 3 else { return false }
        guard scrub.isRunning, header.tag == scrubMapTag, scrub.mapAwaiting.contains(slot) else {
            return true
        }
        guard header.status == .ok, UInt64(header.length) == scrub.mapEnd - scrub.mapBegin,
            table.count == (Int(header.length) + 7) / 8
        else {
            protocolError(slot)
            return true
        }
        for byte in 0..<table.count where table[byte] != 0 {
            scrubMap[byte / 8] |= UInt64(table[byte]) << UInt64(byte % 8 * 8)
        }
        scrub.mapAwaiting.remove(SlotSet(slot))
        return true
    }

    // MARK: - Replies

    func receivedVerify(
        _ place: Int, _ slot: ReplicaSlot, _ header: FrameHeader, _ table: RawMemory
    ) {
        guard scrubRegions[place].stage == .asking, scrubRegions[place].awaiting.contains(slot)
        else { return protocolError(slot) }
        switch header.status {
        case .ok:
            guard let found = RegionVerification(decoding: table) else {
                return protocolError(slot)
            }
            take(found, place)
        case .ioError, .checksumMismatch: scrubRegions[place].isSuspect = true
        case .invalid where scrubRegions[place].layer != .head:
            // The layer was deleted meanwhile.
            return askAgain(place)
        default: return failReplica(slot, .failing(header.status))
        }
        scrubRegions[place].awaiting.remove(SlotSet(slot))
        guard scrubRegions[place].awaiting.isEmpty else { return }
        let next = scrubRegions[place].first.next
        stopAsking(place)
        if scrubRegions[place].isSuspect, !mutations.contains(.scrubBelieves) {
            scrubRegions[place].stage = .suspect
        } else if next != .head, next < scrubRegions[place].layer || isFromTop(place) {
            scrubRegions[place].layer = next
            scrubRegions[place].stage = .due
        } else {
            endRegion(place)
        }
    }
    private func isFromTop(_ place: Int) -> Bool { scrubRegions[place].layer == .head }

    private func take(_ found: RegionVerification, _ place: Int) {
        scrub.progress.checked += UInt64(found.checked)
        if found.suspect > 0 { scrubRegions[place].isSuspect = true }
        if !scrubRegions[place].hasFirst {
            scrubRegions[place].hasFirst = true
            scrubRegions[place].first = found
            // What was not read was not the disk's work.
            throttle.refund(bytes: Geometry.regionSize - Int(found.checked) * Geometry.blockSize)
        } else if !found.isSame(as: scrubRegions[place].first) {
            scrubRegions[place].isSuspect = true
        }
    }

    private func stopAsking(_ place: Int) {
        release(Int(scrubRegions[place].slot))
        scrubRegions[place].slot = -1
        scrubRegions[place].awaiting = []
    }
    /// From the top, once the volume is settled.
    private func askAgain(_ place: Int) {
        stopAsking(place)
        scrubRegions[place].layer = .head
        scrubRegions[place].stage = .due
    }

    /// It waited for a merge of the region, and an Install came.
    func scrubRefused(_ refused: FrameHeader) -> Bool {
        guard refused.kind == .verify, let index = slotIndex(ofTag: refused.tag),
            slots[index].use == .scrub
        else { return false }
        askAgain(Int(slots[index].operation.userData))
        return true
    }

    /// What the member was asked it will not answer.
    func restartScrub(awaiting slot: ReplicaSlot) {
        guard scrub.isRunning else { return }
        if scrub.mapAwaiting.contains(slot) { forgetScrubMap() }
        for place in 0..<scrubRegions.count
        where scrubRegions[place].stage == .asking && scrubRegions[place].awaiting.contains(slot) {
            askAgain(place)
            scrubRegions[place].failures += 1
            guard scrubRegions[place].failures >= ScrubRegion.failuresMax else { continue }
            scrub.progress.skipped += 1
            note(.scrubSkipped(slot, region: scrubRegions[place].region))
            endRegion(place)
        }
    }
    private func forgetScrubMap() {
        scrub.mapAwaiting = []
        scrub.mapEnd = scrub.mapBegin
        scrub.cursor = max(scrub.cursor, scrub.mapBegin)
    }

    /// The volume is not served, and jobs are given up: everything that was not done is to be.
    func interruptScrub() {
        if !scrub.mapAwaiting.isEmpty { forgetScrubMap() }
        for place in 0..<scrubRegions.count {
            switch scrubRegions[place].stage {
            case .free, .due: break
            case .asking: askAgain(place)
            case .suspect, .judged:
                scrubRegions[place].layer = .head
                scrubRegions[place].stage = .due
            }
        }
    }

    // MARK: - Under the lock

    /// The members' digests of a layer are here: what is bad is counted and reported.
    func inspect(_ job: Int) {
        jobs[job].blocksBad = 0
        jobs[job].blocksLost = 0
        var firstLost: Int?
        for block in 0..<blockCount(jobs[job].region) {
            let (isBad, source) = verdict(job, block)
            guard isBad else { continue }
            jobs[job].blocksBad += 1
            guard source == nil else { continue }
            jobs[job].blocksLost += 1
            firstLost = firstLost ?? block
        }
        guard jobs[job].blocksBad > 0 else { return }
        let start = jobs[job].region * UInt64(Geometry.regionSize)
        var rest = jobs[job].participants
        while let slot = rest.popFirst() {
            let (first, count) = doubtful(job, slot)
            guard count > 0 else { continue }
            note(
                .scrubFound(
                    slot, offset: start + UInt64(first * Geometry.blockSize),
                    blocks: UInt64(count)))
        }
        guard let firstLost else { return }
        note(
            .scrubLost(
                offset: start + UInt64(firstLost * Geometry.blockSize),
                blocks: UInt64(jobs[job].blocksLost)))
    }
    private func doubtful(_ job: Int, _ slot: ReplicaSlot) -> (first: Int, count: Int) {
        var (first, count) = (0, 0)
        for block in 0..<blockCount(jobs[job].region) {
            let its = content(job, slot, block)
            guard its?.isDoubtful ?? true else { continue }
            if count == 0 { first = block }
            count += 1
        }
        return (first, count)
    }

    /// Whether the members' copies of the block are not all intact and equal, and who has the one
    /// that stands: the only intact one there is, or that which most members' entries name. Nil:
    /// none can be trusted.
    private func verdict(_ job: Int, _ block: Int) -> (isBad: Bool, source: ReplicaSlot?) {
        var best: (slot: ReplicaSlot, votes: Int, block: RegionDigest.Block)?
        var isTied = false
        var isBad = false
        var rest = jobs[job].participants
        while let slot = rest.popFirst() {
            guard let its = content(job, slot, block), !its.isDoubtful else {
                isBad = true
                continue
            }
            if let best, best.block == its { continue }
            let votes = votes(job, block, for: its)
            if best != nil { isBad = true }
            if let best, best.votes >= votes {
                isTied = isTied || best.votes == votes
            } else {
                isTied = false
                best = (slot, votes, its)
            }
        }
        return (isBad, isTied ? nil : best?.slot)
    }
    private func votes(_ job: Int, _ block: Int, for wanted: RegionDigest.Block) -> Int {
        var votes = 0
        var rest = jobs[job].participants
        while let slot = rest.popFirst() {
            guard let its = content(job, slot, block) else { continue }
            if its == wanted || its.isDoubtful && its.entry == wanted.entry { votes += 1 }
        }
        return votes
    }
    func sourceForScrub(_ job: Int, _ block: Int) -> ReplicaSlot? {
        if mutations.contains(.scrubTrustsFirst) {
            let first = ReplicaSlot(jobs[job].source)
            let its = content(job, first, block)
            return its?.isDoubtful == false ? first : nil
        }
        return verdict(job, block).source
    }

    /// The layer's bad blocks are rewritten, or are beyond help. What an earlier scrub found is
    /// none of this one's: it looks at the region itself.
    func layerScrubbed(_ job: Int) {
        if jobs[job].scrub == scrub.progress.id {
            scrub.progress.bad += UInt64(jobs[job].blocksBad)
            scrub.progress.lost += UInt64(jobs[job].blocksLost)
            scrub.progress.repaired += UInt64(jobs[job].blocksBad - jobs[job].blocksLost)
        }
        jobs[job].blocksBad = 0
        jobs[job].blocksLost = 0
    }

    func regionScrubbed(_ region: UInt64, blocks: UInt64) {
        for place in 0..<scrubRegions.count
        where scrubRegions[place].stage == .judged && scrubRegions[place].region == region {
            endRegion(place)
        }
        guard blocks > 0 else { return }
        blocksRepaired += blocks
        note(.repaired(region: region, blocks: blocks))
    }

    /// The only member cannot say what it holds: to give it up would cost the volume.
    func giveUpScrub(_ job: Int, _ slot: ReplicaSlot) {
        if jobs[job].scrub == scrub.progress.id { scrub.progress.skipped += 1 }
        note(.scrubSkipped(slot, region: jobs[job].region))
        finish(job)
    }
}
