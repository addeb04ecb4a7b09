// What happens behind the requests: regions leave the activity log, its tail moves, space is given
// back, and at the end everything is put in order.
//
// Order of draining a region, and what a crash leaves:
// 1. S and this copy's own sync cover its last write; no write is let in    -> active
// 2. the log is synced: no later record gets an index below the page's      -> active
// 3. its page, naming the log's next index, goes to the slot not in use     -> active; a torn slot
//                                                                              is written again
// 4. the table is synced                                                    -> not active: the page
//                                                                              has all its records
// 5. the drained record is stored; writes are let in                        -> same
//
// Order of renewing a region that cannot drain, so that the tail can pass it:
// 1. its first slots are durable; a second activation is stored and the log synced
//                                                         -> active from the first one
// 2. its page, naming that activation, is written         -> same
// 3. the table is synced                                  -> active from the second one
//
// Order of moving the tail:
// 1. all regions whose records it passes have drained or been renewed (durable, as above, also
//    those that an earlier process has drained)
// 2. the header goes to the slot not in use               -> old tail or new, both good
// 3. the log is synced                                    -> new tail; only now are slots reused
//
// Space is given back only after step 4 of draining: the entry that makes it unneeded is durable.

struct Upkeep: BitwiseCopyable {
    static let batchMax = 128
    static let idleMilliseconds: UInt64 = 10_000
    static let punchesPerTick = 64
    /// What is not given back by then never is.
    static let punchMillisecondsAtShutdown: UInt64 = 2000

    enum Phase: UInt8, BitwiseCopyable {
        case idle
        case syncingLog
        case writingPages
        case syncingTable
        case syncingHeader
    }
    var phase = Phase.idle
    var count = 0
    var outstanding = 0
    var ticket: UInt64 = 0
    /// The log's next index when the batch was collected; everything before it is synced by the
    /// time a page names it.
    var logIndex: UInt64 = 0
    var tail: UInt64 = 0
    var isTickDue = false
    /// A page could not be written: not again before this.
    var notBefore = Instant.zero
}

extension ReplicaCore {
    func tick() {
        upkeep.isTickDue = true
        if shutdown == .none { punchBudget = Upkeep.punchesPerTick }
        startPunch()
        tickMerges()
        tickSpace()
    }

    private var isLogFilling: Bool { log.used * 2 > log.capacity || merge.needsRoom }
    private var isCrowded: Bool { cache.activeCount * 4 > activeRegionsMax * 3 }
    /// Tells the engine that a flush is due.
    var isUnderPressure: Bool {
        log.used * 4 > log.capacity * 3 || isCrowded || !parked.isEmpty
    }

    func pumpUpkeep() {
        guard !hasFailed else { return }
        while advanceUpkeep() {}
    }

    /// True: something was done, and more may be possible at once.
    private func advanceUpkeep() -> Bool {
        switch upkeep.phase {
        case .idle:
            let isDue = upkeep.isTickDue
            guard isDue || isLogFilling || isCrowded || merge.isDrainDue || shutdown == .draining
            else { return false }
            upkeep.isTickDue = false
            if now >= upkeep.notBefore { collect(isTick: isDue) }
            if upkeep.count == 0 {
                if shutdown == .draining, isPunchingBeforeShutdown() { return false }
                if moveTail() { return true }
                if shutdown == .draining { shutdown = .syncingLog }
                return false
            }
            upkeep.phase = .syncingLog
        case .syncingLog:
            guard syncs[FileSync.log].durable >= upkeep.ticket else { return false }
            upkeep.phase = .writingPages
            writePages()
        case .writingPages:
            guard upkeep.outstanding == 0 else { return false }
            upkeep.ticket = syncs[FileSync.table].written
            if options.mutations.contains(.tailMovedBeforeTableSync) { upkeep.ticket = 0 }
            want(FileSync.table, upkeep.ticket)
            upkeep.phase = .syncingTable
        case .syncingTable:
            guard syncs[FileSync.table].durable >= upkeep.ticket else { return false }
            completeBatch()
            upkeep.phase = .idle
            lookForShared()
            // At the end not before space is given back that the log tells of.
            if shutdown != .draining { _ = moveTail() }
        case .syncingHeader:
            guard syncs[FileSync.log].durable >= upkeep.ticket else { return false }
            log.tailBecameDurable(upkeep.tail)
            upkeep.phase = .idle
            retryCovering()
        }
        return true
    }

    // MARK: draining and renewing

    private func canDrain(_ frame: Int32) -> Bool {
        let found = cache.frames[Int(frame)]
        guard found.state == .active, !found.isRenewing, !found.isMerging, found.writes == 0,
            !found.isHeldForMerge, found.waiters.isEmpty
        else { return false }
        if options.mutations.contains(.drainWithoutFlush) { return true }
        guard areSlotsDurable(frame) else { return false }
        return found.lastWrite <= stablePoint
            && found.dataTicket <= syncs[FileSync.data].durable
    }

    /// A new page beside a slot that a power cut takes would look like damage.
    private func areSlotsDurable(_ frame: Int32) -> Bool {
        cache.frames[Int(frame)].slotsTicket <= syncs[FileSync.table].durable
    }

    /// Opening takes what a page says for durable with its data. (What was written over data since
    /// need not be: torn, it is doubtful either way.)
    private func isRenewable(_ frame: Int32) -> Bool {
        cache.frames[Int(frame)].freshTicket <= syncs[FileSync.data].durable
    }

    private func collect(isTick: Bool) {
        upkeep.count = 0
        upkeep.ticket = 0
        if isLogFilling { collectOldest() }
        if merge.isDrainDue { collectOwed() }
        if isTick, !sharing.isEmpty { collectShared() }
        if isTick || isCrowded || shutdown == .draining { collectIdle() }
        guard upkeep.count > 0 else { return }
        upkeep.logIndex = log.nextIndex
        if options.mutations.contains(.drainBeforeLogSync) { return }
        upkeep.ticket = log.storeCount
        want(FileSync.log, upkeep.ticket)
    }

    /// Regions whose records are the oldest in the log.
    private func collectOldest() {
        let limit = log.durableTail + log.capacity / 8
        var frame = cache.oldestActive
        while frame >= 0, upkeep.count < Upkeep.batchMax,
            cache.frames[Int(frame)].firstIndex < limit
        {
            let next = cache.nextActive(frame)
            if canDrain(frame) {
                startDraining(frame)
            } else if !areSlotsDurable(frame) {
                want(FileSync.table, cache.frames[Int(frame)].slotsTicket)
            } else if !isRenewable(frame) {
                want(FileSync.data, cache.frames[Int(frame)].freshTicket)
            } else if cache.frames[Int(frame)].state == .active,
                !cache.frames[Int(frame)].isMerging, log.hasRoomForUpkeep
            {
                cache.frames[Int(frame)].isRenewing = true
                cache.frames[Int(frame)].pendingIndex = log.append(activation(of: frame))
                addToBatch(frame)
            }
            frame = next
        }
    }

    /// Regions used longest ago, if they have been idle for a while or there are many.
    private func collectIdle() {
        var frame = cache.first(.active)
        var looks = 4 * Upkeep.batchMax
        while frame >= 0, upkeep.count < Upkeep.batchMax, looks > 0 {
            let next = cache.next(frame)
            let idle = now.nanoseconds(since: cache.frames[Int(frame)].lastUse) / 1_000_000
            guard isCrowded || shutdown == .draining || idle >= Upkeep.idleMilliseconds else {
                return
            }
            if canDrain(frame) { startDraining(frame) }
            looks -= 1
            frame = next
        }
    }

    /// More of them may be there to drain, and somebody waits for all.
    func lookForShared() {
        if !sharing.isEmpty { upkeep.isTickDue = true }
    }
    /// Regions of layers that are to be shared, however lately they were used.
    private func collectShared() {
        var frame = cache.first(.active)
        while frame >= 0, upkeep.count < Upkeep.batchMax {
            let next = cache.next(frame)
            if isSharing(cache.frames[Int(frame)].layer), canDrain(frame) {
                startDraining(frame)
            }
            frame = next
        }
    }

    /// Regions that merges have emptied, however lately.
    private func collectOwed() {
        merge.isDrainDue = false
        for owed in merge.owed where upkeep.count < Upkeep.batchMax {
            if let frame = cache.find(owed.layer, owed.region), canDrain(frame) {
                startDraining(frame)
            }
        }
    }

    func activation(of frame: Int32) -> LogRecord {
        let found = cache.frames[Int(frame)]
        return .activate(layer: found.layer, region: found.region)
    }
    private func startDraining(_ frame: Int32) {
        cache.frames[Int(frame)].state = .draining
        addToBatch(frame)
    }
    private func addToBatch(_ frame: Int32) {
        batch[upkeep.count] = frame
        upkeep.count += 1
    }

    private func writePages() {
        for place in 0..<upkeep.count {
            let frame = batch[place]
            guard isRenewable(frame), freeOperationCount > 8,
                let buffer = pool.allocate(TablePage.size)
            else {
                cancel(place)
                continue
            }
            let found = cache.frames[Int(frame)]
            let page = TablePage(
                layer: found.layer, region: found.region, version: found.version + 1,
                birth: found.birth,
                logIndex: found.isRenewing ? found.pendingIndex : upkeep.logIndex)
            page.encode(entries: cache.entries(frame), to: pool.memory(buffer))
            upkeep.outstanding += 1
            let token = startOperation(.pageWrite, index: Int32(place), buffer: buffer)
            actions.append(
                .write(
                    .table(found.layer),
                    offset: TablePage.offset(region: page.region, version: page.version),
                    length: TablePage.size, buffer: buffer, bufferOffset: 0, token: token))
        }
    }

    func pageWritten(_ place: Int32, _ buffer: BufferID, _ result: Int) {
        pool.release(buffer)
        upkeep.outstanding -= 1
        tableWritten(cache.frames[Int(batch[Int(place)])].layer)
        guard result == TablePage.size else { return reactivate(Int(place)) }
        cache.frames[Int(batch[Int(place)])].version += 1
        // Unless a power cut took them while the region was active, they were there before.
        cache.frames[Int(batch[Int(place)])].hasSlots = true
    }

    /// The page's write failed, but it may be on the disk all the same, and then it ends the
    /// region's activation: no write is let in before a new one is durable.
    private func reactivate(_ place: Int) {
        let frame = batch[place]
        guard cache.frames[Int(frame)].state == .draining, log.hasRoomForUpkeep else {
            // A page that renews names an activation behind it.
            return cancel(place)
        }
        cancel(place, to: .activating)
        log.append(activation(of: frame))
        cache.frames[Int(frame)].pendingTicket = log.storeCount
        cache.move(frame, to: .none)
        activations.append(frame)
        want(FileSync.log, log.storeCount)
    }

    /// The region stays as it was. (A second activation in the log does no harm.)
    private func cancel(_ place: Int, to state: FrameState = .active) {
        let frame = batch[place]
        batch[place] = -1
        upkeep.notBefore = now.adding(milliseconds: 1000)
        cache.frames[Int(frame)].isRenewing = false
        guard cache.frames[Int(frame)].state == .draining else { return }
        // An Install may have passed it by, see `isLeavingLog`.
        cache.frames[Int(frame)].birth = max(
            cache.frames[Int(frame)].birth, manifestProposal?.promise ?? promise)
        cache.frames[Int(frame)].state = state
        if state == .active { wake(frame) }
    }

    private func completeBatch() {
        for place in 0..<upkeep.count where batch[place] >= 0 {
            let frame = batch[place]
            cache.frames[Int(frame)].isTorn = false
            if cache.frames[Int(frame)].isRenewing {
                cache.frames[Int(frame)].isRenewing = false
                cache.renewInLog(frame, firstIndex: cache.frames[Int(frame)].pendingIndex)
                continue
            }
            cache.leaveLog(frame)
            cache.move(frame, to: .none)
            cache.frames[Int(frame)].state = .clean
            if log.hasRoom(1) {
                let found = cache.frames[Int(frame)]
                log.append(.drained(layer: found.layer, region: found.region))
            }
            wake(frame)
        }
        upkeep.count = 0
        if !merge.owed.isEmpty { startPunch() }
    }

    // MARK: the tail

    private func moveTail() -> Bool {
        let oldest = cache.oldestActive
        let tail = oldest >= 0 ? cache.frames[Int(oldest)].firstIndex : log.nextIndex
        let gain = tail - log.durableTail
        guard gain >= log.capacity / 16 || (shutdown == .draining && gain > 0) else { return false }
        log.storeHeader(tail: tail, flushed: flushedPoint, stable: knownStable)
        upkeep.tail = tail
        upkeep.ticket = log.storeCount
        upkeep.phase = .syncingHeader
        want(FileSync.log, upkeep.ticket)
        return true
    }

    // MARK: giving space back

    private func startPunch() {
        guard punchingFrame < 0, punchBudget > 0, hasOperationForRequests else { return }
        if let punchUntil, now >= punchUntil { return }
        var frame = cache.first(.punch)
        while frame >= 0, cache.frames[Int(frame)].pins > 0 { frame = cache.next(frame) }
        guard frame >= 0, let run = cache.frames[Int(frame)].unneeded.firstRun() else { return }
        for block in run {
            let state = cache.entry(frame, block).state
            precondition(state == .absent || state == .zero)
        }
        cache.frames[Int(frame)].state = .punching
        punchingFrame = frame
        punchRun = run
        punchBudget -= 1
        let start = cache.frames[Int(frame)].region * UInt64(Geometry.regionSize)
        let token = startOperation(.punch, index: frame)
        actions.append(
            .punch(
                .data(cache.frames[Int(frame)].layer),
                offset: start + UInt64(run.lowerBound * Geometry.blockSize),
                length: UInt64(run.count * Geometry.blockSize), token: token))
    }

    /// Nobody will know of this space again when the log's tail has passed its regions.
    private func isPunchingBeforeShutdown() -> Bool {
        startPunch()
        return punchingFrame >= 0
    }

    /// The mutation `punchBeforeDrain`.
    func punchAtOnce(_ layer: LayerID, _ offset: UInt64, _ length: UInt32) {
        let token = startOperation(.punch, index: -1)
        actions.append(.punch(.data(layer), offset: offset, length: UInt64(length), token: token))
    }

    /// Whether it worked or not: the blocks read zero either way.
    func punched(_ frame: Int32) {
        guard frame >= 0 else { return }
        for block in punchRun ?? 0..<0 { cache.frames[Int(frame)].unneeded[block] = false }
        // The next tick counts anew.
        merge.owedBlocks = max(0, merge.owedBlocks - (punchRun?.count ?? 0))
        punchingFrame = -1
        punchRun = nil
        cache.frames[Int(frame)].state = .clean
        wake(frame)
        startPunch()
    }

    // MARK: shutdown

    /// Ends what is under way, syncs everything, drains what S covers and marks the manifest clean;
    /// `isShutDown` says when. Requests are refused from here on.
    package func beginShutdown(now: Instant) {
        guard shutdown == .none, !hasFailed else { return }
        self.now = now
        shutdown = .finishing
        punchBudget = .max
        punchUntil = now.adding(milliseconds: Upkeep.punchMillisecondsAtShutdown)
        refuseParked(.unavailable)
        refuseAwaitingMerge(.unavailable)
        endWaitingMerges()
        for slot in waitingInstalls { refuse(slot, .unavailable) }
        waitingInstalls = []
        pumpFlushes()
        pumpShutdown()
    }

    func pumpShutdown() {
        if shutdown == .finishing {
            guard startedCount == 0, currentInstall < 0, !isManifestBusy, !isMergeCopying,
                !space.isReading
            else { return }
            for file in 0..<3 { want(file, written(file)) }
            shutdown = .syncing
        }
        if shutdown == .syncing {
            for file in 0..<3 where syncs[file].durable < written(file) {
                want(file, written(file))
                return
            }
            shutdown = .draining
            pumpUpkeep()
        }
        if shutdown == .syncingLog, upkeep.phase == .idle {
            for file in 0..<3 where syncs[file].durable < written(file) {
                want(file, written(file))
                return
            }
            shutdown = .writingManifest
        }
        if shutdown == .writingManifest, !isManifestBusy {
            var proposal = manifest
            proposal.isClean = true
            writeManifest(proposal, .shutdown)
        }
    }
}
