// Deleted snapshots: a retired layer and its heir become one, region by region, and one of the two
// goes. Every replica does it for itself; to the engine they are one layer since it was retired.
//
// Order for one region of a retired layer X and its heir Y, and what a crash leaves:
// 1. both regions are in the log, with room for what follows   -> nothing has changed
// 2. writes to Y's region wait; blocks of X that Y lacks are read
//    and written to Y's data                                    -> bytes under absent entries
// 3. Y's entries are recorded, with the higher birth; writes go
//    on                                                         -> both hold the blocks, Y is seen
// 4. Y's data and the log are synced, and a covered record is   -> torn data of Y gives way to X's,
//    durable                                                       or Y's is there for good
// 5. X's entries are recorded as absent                         -> as 3, or merged
// 6. X's space is given back once its region has drained, which it does at once: so much space,
//    and no more, is taken twice (`owedBlocksMax`)
// A block goes over as it is, entry and bytes: one that is damaged stays known to be. One that
// cannot be read stays where it is, and its region with it: who asks is answered from both.
//
// Downwards (`LayerChain.isDown`), when Y is the smaller one and nobody writes to it: X and Y
// change places, and all that Y holds is moved, over what it hides of X. A crash in step 2 leaves
// bytes in X that are not what its entries say, under blocks of Y; they are written again. When Y
// is empty, X gets its name. A change of Y in a region of which X holds something has the region
// merged upwards first: each region may go either way at any time. If Y is deleted meanwhile, too,
// it goes on as it is, and the next heir has its turn when Y, which leaves no name, is gone.
//
// Right below the head one layer stays, the largest, if it holds more than the head and all that is
// between them: to delete the only snapshot would else move the whole volume, each time a backup
// takes one, reads it and deletes it. Those below go over to it. Of it only what the head hides
// goes: steps 1, 4, 5 and 6, for the blocks that both hold by then. Which regions these are is
// known from counting (ReplicaCore+MergeOrder). When the head is frozen it is an heir like any
// other, and when it has become the larger one, all the rest goes up to it.
//
// A layer of which nothing is left leaves the manifest; then its files are deleted. A crash in
// between leaves files that opening deletes.
//
// Requests for what a layer holds itself (digests, copies) mean both layers: they wait until their
// region is merged, but for looks at a layer that goes over downwards, or that is stuck: these are
// answered from both (ReplicaCore+Sharing). As what waits for room in the log, they are held back
// from nothing: an Install refuses them, flushes pass. Reads through the chain go on; one that a
// merge or a removal has met begins again.

extension ReplicaCore {
    // MARK: jobs

    func tickMerges() {
        merge.isBusy = nextNumber - merge.lastNumber > MergeJob.idleRequests
        merge.lastNumber = nextNumber
        weighStaying()
        let toMerge = chain.retiredCount - (chain.staying == nil ? 0 : 1)
        let backlog = max(0, toMerge - MergeJob.backlogUnnoticed)
        merge.budget = merge.isBusy ? min(backlog, MergeJob.perIdleTick) : MergeJob.perIdleTick
        countOwed()
        // Tables of many layers may have to be synced for little space: not before it is much, or
        // nothing else is to be done.
        let isMuch = merge.owedBlocks >= merge.owedBlocksMax / 2
        if isMuch || merge.isIdle && !merge.owed.isEmpty { merge.isDrainDue = true }
        // The throttle knows of a merge from the next tick on.
        merge.isIdle = chain.retiredCount == 0
        merge.isHidingIdle = false
        merge.throttle.advance(
            now, isCopying: false, isScrubbing: chain.retiredCount > 0 && isMergeDue)
        merge.isRemovalDue = true
    }
    /// A client's request has been answered.
    func learnLatency(_ slot: Int32) {
        let header = requests[Int(slot)].header
        guard chain.count > 1, header.flags & FrameFlags.resync == 0,
            header.kind == .read || header.kind == .write || header.kind == .setState
        else { return }
        merge.throttle.completed(
            isRead: header.kind == .read,
            nanoseconds: now.nanoseconds(since: requests[Int(slot)].begun))
    }

    /// At the end of every step.
    func pumpMerges() {
        guard chain.retiredCount > 0 || !merge.deletions.isEmpty, !hasFailed else { return }
        merge.needsRoom = false
        for job in 0..<mergeJobs.count where mergeJobs[job].stage != .free { advance(job) }
        beginAwaited()
        beginInBackground()
        removeLayers()
    }

    func isMerging(_ region: UInt64) -> Bool {
        for job in 0..<mergeJobs.count
        where mergeJobs[job].stage != .free && mergeJobs[job].region == region {
            return true
        }
        return false
    }
    var runningJobs: Int {
        var count = 0
        for job in 0..<mergeJobs.count where mergeJobs[job].stage != .free { count += 1 }
        return count
    }
    private var freeJob: Int? {
        for job in 0..<mergeJobs.count where mergeJobs[job].stage == .free { return job }
        return nil
    }

    private func beginAwaited() {
        while let job = freeJob, let slot = nextAwaited() {
            begin(job, MergeTask(layer(of: slot), requests[Int(slot)].region, .awaited))
        }
    }
    private func nextAwaited() -> Int32? {
        var slot = merge.waiting.head
        while slot >= 0 {
            if !isMerging(requests[Int(slot)].region) { return slot }
            slot = requests[Int(slot)].next
        }
        return nil
    }
    /// Data is on its way into an heir: an Install is not answered before it is there.
    var isMergeCopying: Bool {
        for job in 0..<mergeJobs.count
        where mergeJobs[job].stage == .settling || mergeJobs[job].stage == .copying {
            return true
        }
        return false
    }

    private func beginInBackground() {
        guard !merge.isIdle, shutdown == .none, currentInstall < 0, now >= merge.notBefore,
            !isUnderPressure
        else { return }
        while mayBegin(), let job = freeJob {
            guard let task = nextToMerge() else {
                merge.isIdle = true
                return
            }
            if merge.budget > 0 {
                merge.budget -= 1
            } else if merge.isBusy {
                // Only what it has let through: else it would have ever more to make up for.
                merge.throttle.began(bytes: Geometry.regionSize)
            }
            begin(job, task)
        }
    }
    private func begin(_ job: Int, _ task: MergeTask) {
        mergeJobs[job] = MergeJob()
        mergeJobs[job].isDown = task.way == .down
        mergeJobs[job].isHiding = task.way == .hide
        mergeJobs[job].isAwaited = task.way == .awaited
        mergeJobs[job].stage = .waiting
        mergeJobs[job].heir = task.heir
        mergeJobs[job].region = task.region
        advance(job)
    }

    private func advance(_ job: Int) {
        switch mergeJobs[job].stage {
        case .free, .copying: break
        case .waiting: prepare(job)
        case .settling:
            let (source, target) = (Int(mergeJobs[job].source), Int(mergeJobs[job].target))
            if cache.frames[source].writes + cache.frames[target].writes == 0 { plan(job) }
        case .syncing, .covering: becomeDurable(job)
        }
    }

    // MARK: step 1

    /// The nearest layer first: what it holds hides the ones below.
    private func prepare(_ job: Int) {
        guard shutdown == .none, currentInstall < 0, merge.leaving.isEmpty else { return }
        guard let place = chain.index(of: mergeJobs[job].heir),
            mergeJobs[job].isDown || !chain.isRetired(place)
                || mergeJobs[job].heir == chain.staying,
            let below = placeBelow(job, place), !chain.isStuck(below)
        else { return end(job) }
        if mergeJobs[job].layer != chain.id(below) {
            unpinFrames(job)
            mergeJobs[job].layer = chain.id(below)
        }
        guard let source = pinned(job, \.source, mergeJobs[job].from),
            let target = pinned(job, \.target, mergeJobs[job].to),
            isAtRest(source), isAtRest(target),
            // Nobody looks at Y by itself who began before it was merged downwards.
            !mergeJobs[job].isDown || cache.frames[Int(source)].pins == 1
        else { return }
        let count = heldCount(source)
        // What became absent is a change, too: who missed it is told by the birth.
        guard count > 0 || cache.frames[Int(source)].birth > cache.frames[Int(target)].birth else {
            return emptied(job)
        }
        guard isActive(target, limit: activeRegionsForCopies), isActive(source, limit: .max) else {
            return
        }
        lock(job, records: 2 * count)
    }
    private func placeBelow(_ job: Int, _ place: Int) -> Int? {
        guard mergeJobs[job].isDown else {
            guard let below = chain.unmerged(under: place, mergeJobs[job].region) else {
                return nil
            }
            if mergeJobs[job].isAwaited { return below }
            // What stays is only hidden, and what is below it has another way to go.
            return (chain.id(below) == chain.staying) == mergeJobs[job].isHiding ? below : nil
        }
        return place > 0 && chain.isDown(place - 1) ? place - 1 : nil
    }
    private func heldCount(_ frame: Int32) -> Int {
        var count = 0
        for block in 0..<Geometry.blocksPerRegion
        where cache.entry(frame, block).state != .absent { count += 1 }
        return count
    }

    private func pinned(
        _ job: Int, _ path: WritableKeyPath<MergeJob, Int32>, _ layer: LayerID
    ) -> Int32? {
        let known = mergeJobs[job][keyPath: path]
        if known >= 0 { return known }
        let region = mergeJobs[job].region
        guard let frame = cache.find(layer, region) ?? bringIn(layer, region),
            cache.frames[Int(frame)].state != .loading
        else { return nil }
        mergeJobs[job][keyPath: path] = frame
        cache.frames[Int(frame)].pins += 1
        cache.frames[Int(frame)].isHeldForMerge = true
        if cache.list(of: frame) == .clean { cache.move(frame, to: .none) }
        return frame
    }
    private func unpinFrames(_ job: Int) {
        for path in [\MergeJob.source, \MergeJob.target] {
            let frame = mergeJobs[job][keyPath: path]
            guard frame >= 0 else { continue }
            mergeJobs[job][keyPath: path] = -1
            cache.frames[Int(frame)].pins -= 1
            cache.frames[Int(frame)].isHeldForMerge = false
            shelve(frame)
        }
    }
    private func isAtRest(_ frame: Int32) -> Bool {
        let state = cache.frames[Int(frame)].state
        return state == .clean || state == .active
    }
    /// Has the region activated, if it is not. A retired layer's may be beyond all limits: it needs
    /// no stable point to drain, since nobody writes to it.
    private func isActive(_ frame: Int32, limit: Int) -> Bool {
        if cache.frames[Int(frame)].state == .active { return true }
        let most = min(limit, activeRegionsForMerges)
        guard cache.activeCount + slotsInitCount < most, hasRoom(1) else { return false }
        return beginActivation(frame) && cache.frames[Int(frame)].state == .active
    }
    private func hasRoom(_ count: Int) -> Bool {
        if log.hasRoom(count) { return true }
        merge.needsRoom = true
        return false
    }

    /// Everything is there that the rest needs: nothing that waits for it waits for others.
    /// `records`: an entry of Y's and an absent one of X's for each block.
    private func lock(_ job: Int, records: Int) {
        guard hasRoom(records), hasOperationForRequests,
            let buffer = pool.allocate(Geometry.regionSize)
        else { return }
        log.reserve(records)
        mergeJobs[job].reserved = records
        mergeJobs[job].buffer = buffer
        cache.frames[Int(mergeJobs[job].source)].isMerging = true
        cache.frames[Int(mergeJobs[job].target)].isMerging = true
        mergeJobs[job].stage = .settling
        advance(job)
    }

    /// The frame's slots in the table could not be made, or its page not be read.
    func mergeFailed(_ region: UInt64, _ status: FrameStatus) {
        for job in 0..<mergeJobs.count
        where mergeJobs[job].stage == .waiting && mergeJobs[job].region == region {
            fail(job, status)
        }
    }

    // MARK: steps 2 and 3

    private func plan(_ job: Int) {
        let (source, target) = (mergeJobs[job].source, mergeJobs[job].target)
        var missing = BlockSet()
        var data = BlockSet()
        var hidden = BlockSet()
        for block in 0..<Geometry.blocksPerRegion {
            let state = cache.entry(source, block).state
            guard state != .absent else { continue }
            guard mergeJobs[job].isDown || cache.entry(target, block).state == .absent else {
                hidden[block] = true
                continue
            }
            guard !mergeJobs[job].isHiding else { continue }
            missing[block] = true
            if state == .data { data[block] = true }
        }
        mergeJobs[job].missing = missing
        mergeJobs[job].left = data
        mergeJobs[job].hidden = hidden
        // It was counted as hidden, and has gone since.
        if mergeJobs[job].isHiding, hidden.isEmpty { return doneHiding(job) }
        mergeJobs[job].stage = .copying
        copyNext(job)
    }

    private func copyNext(_ job: Int) {
        guard let run = mergeJobs[job].left.firstRun() else { return record(job) }
        mergeJobs[job].run = run
        let token = startOperation(.mergeRead, index: Int32(job))
        actions.append(
            .read(
                .data(mergeJobs[job].from), offset: offset(job, run), length: length(run),
                buffer: mergeJobs[job].buffer, bufferOffset: 0, token: token))
    }
    private func offset(_ job: Int, _ run: Range<Int>) -> UInt64 {
        mergeJobs[job].region * UInt64(Geometry.regionSize)
            + UInt64(run.lowerBound * Geometry.blockSize)
    }
    private func length(_ run: Range<Int>) -> Int { run.count * Geometry.blockSize }

    func mergeRead(_ job: Int, _ result: Int) {
        let run = mergeJobs[job].run
        // What the disk does not give now it may give later: nothing is given up (seed 500543).
        guard result == length(run) else { return readFailed(job) }
        let token = startOperation(.mergeWrite, index: Int32(job))
        actions.append(
            .write(
                .data(mergeJobs[job].to), offset: offset(job, run), length: length(run),
                buffer: mergeJobs[job].buffer, bufferOffset: 0, token: token))
    }
    func mergeWritten(_ job: Int, _ result: Int) {
        let target = Int(mergeJobs[job].target)
        let run = mergeJobs[job].run
        syncs[FileSync.data].written += 1
        chain.dataWritten(mergeJobs[job].to)
        cache.frames[target].dataTicket = syncs[FileSync.data].written
        guard result == length(run) else {
            return fail(job, status(ofError: result))
        }
        merge.bytesMoved += UInt64(length(run))
        copied(job, run)
        copyNext(job)
    }
    /// What is there under absent entries gives its space back when the region has drained.
    private func abandonCopies(_ job: Int) {
        let target = Int(mergeJobs[job].target)
        for block in 0..<Geometry.blocksPerRegion
        where mergeJobs[job].missing[block]
            && (!mergeJobs[job].left[block] || mergeJobs[job].run.contains(block))
            // Merging downwards, what Y hides of X is written over: it counts as before.
            && !cache.entry(Int32(target), block).state.keepsSpace
        {
            cache.frames[target].unneeded[block] = true
        }
        // Nobody else may want this, and the region drains behind it.
        want(FileSync.data, cache.frames[target].dataTicket)
    }
    private func copied(_ job: Int, _ run: Range<Int>) {
        for block in run { mergeJobs[job].left[block] = false }
    }

    private func record(_ job: Int) {
        let (source, target) = (mergeJobs[job].source, mergeJobs[job].target)
        for block in 0..<Geometry.blocksPerRegion where mergeJobs[job].missing[block] {
            record(target, block, cache.entry(source, block))
            mergeJobs[job].reserved -= 1
        }
        let emptied = cache.frames[Int(source)]
        let filled = Int(target)
        if !options.mutations.contains(.mergeLosesBirth) {
            cache.frames[filled].birth = max(cache.frames[filled].birth, emptied.birth)
        }
        cache.frames[filled].lastWrite = max(cache.frames[filled].lastWrite, emptied.lastWrite)
        cache.frames[filled].lastUse = now
        cache.move(target, to: .active)
        unlock(job)
        if options.mutations.contains(.mergeNotDurable) { return clear(job) }
        if mergeJobs[job].isHiding, options.mutations.contains(.hiddenNotDurable) {
            return clear(job)
        }
        mergeJobs[job].stage = .syncing
        mergeJobs[job].tickets = (log.storeCount, syncs[FileSync.data].written)
        mergeJobs[job].coverIndex = log.nextIndex
        want(FileSync.log, mergeJobs[job].tickets.0)
        want(FileSync.data, mergeJobs[job].tickets.1)
        advance(job)
    }
    /// Writes to Y's region go on.
    private func unlock(_ job: Int) {
        release(mergeJobs[job].buffer)
        mergeJobs[job].buffer = .none
        let target = mergeJobs[job].target
        guard target >= 0, cache.frames[Int(target)].isMerging else { return }
        cache.frames[Int(target)].isMerging = false
        wake(target)
    }

    // MARK: steps 4 and 5

    private func becomeDurable(_ job: Int) {
        let (logTicket, dataTicket) = mergeJobs[job].tickets
        guard syncs[FileSync.log].durable >= logTicket, syncs[FileSync.data].durable >= dataTicket
        else { return }
        if mergeJobs[job].stage == .syncing {
            guard let ticket = cover(upTo: mergeJobs[job].coverIndex) else { return }
            mergeJobs[job].stage = .covering
            mergeJobs[job].tickets = (ticket, 0)
            want(FileSync.log, ticket)
            return becomeDurable(job)
        }
        // Whoever looks at Y by itself has begun while it was not to go over: see it through.
        let source = Int(mergeJobs[job].source)
        guard !mergeJobs[job].isDown || cache.frames[source].pins == 1 else { return }
        clear(job)
    }

    private func clear(_ job: Int) {
        let source = mergeJobs[job].source
        let first = mergeJobs[job].region * UInt64(Geometry.blocksPerRegion)
        var held = BlockSet()
        var unneeded: Range<Int>?
        for block in 0..<Geometry.blocksPerRegion {
            let state = cache.entry(source, block).state
            guard state != .absent, !mergeJobs[job].isHiding || mergeJobs[job].hidden[block]
            else { continue }
            held[block] = true
            cache.setEntry(source, block, .absent)
            if state != .zero { unneeded = (unneeded?.lowerBound ?? block)..<block + 1 }
        }
        // Nothing is left between them: one punch gives all of it back.
        for block in unneeded ?? 0..<0 where cache.entry(source, block).state == .absent {
            cache.frames[Int(source)].unneeded[block] = true
        }
        if !held.isEmpty {
            // Zeroes, too: who waits for the layer to leave waits for its regions to drain.
            owe(mergeJobs[job].from, mergeJobs[job].region, unneeded?.count ?? 0)
            statesChanged(mergeJobs[job].from, mergeJobs[job].region)
            entriesChange(mergeJobs[job].from, mergeJobs[job].region)
        }
        while let run = held.firstRun() {
            for block in run { held[block] = false }
            log.appendReserved(
                .entry(
                    layer: mergeJobs[job].from, block: first + UInt64(run.lowerBound),
                    count: run.count, .absent))
            mergeJobs[job].reserved -= 1
        }
        if mergeJobs[job].isHiding { merge.regionsHidden += 1 }
        guard mergeJobs[job].isHiding, heldCount(source) > 0 else { return emptied(job) }
        merge.serials[Int(mergeJobs[job].region % 256)] &+= 1
        doneHiding(job)
    }
    private func doneHiding(_ job: Int) {
        if mergeJobs[job].heir == chain.head {
            space.groups.head?.clearHidden(mergeJobs[job].region)
        }
        end(job)
    }

    /// Nothing of the region is left in this layer: on to the next one below.
    private func emptied(_ job: Int) {
        let region = mergeJobs[job].region
        countMerged(region)
        chain.willHold(mergeJobs[job].to, region)  // if only for its birth
        if mergeJobs[job].isDown {
            chain.markAbsorbed(mergeJobs[job].heir, region)
            return end(job)
        }
        chain.markMerged(mergeJobs[job].layer, region)
        letGo(job)
        mergeJobs[job].stage = .waiting
        prepare(job)
    }
    private func letGo(_ job: Int) {
        log.unreserve(mergeJobs[job].reserved)
        mergeJobs[job].reserved = 0
        unlock(job)
        let source = mergeJobs[job].source
        if source >= 0 {
            cache.frames[Int(source)].isMerging = false
            wake(source)
        }
        unpinFrames(job)
    }
    func end(_ job: Int) {
        letGo(job)
        mergeJobs[job].stage = .free
        retryAwaitingMerge()
    }
    func fail(_ job: Int, _ status: FrameStatus) {
        if mergeJobs[job].stage == .copying { abandonCopies(job) }
        letGo(job)
        mergeJobs[job].stage = .free
        // The same again: it drains meanwhile, and gives back what it took.
        let isAgain = merge.cursor == mergeJobs[job].region + 1
        merge.notBefore = now.adding(milliseconds: MergeJob.retryMilliseconds * (isAgain ? 10 : 1))
        merge.cursor = mergeJobs[job].region + 1
        refuseAwaitingMerge(of: mergeJobs[job].region, status)
    }
}
