// Deleted snapshots: what a retired layer holds moves to its heir, region by region, and then the
// layer goes. Every replica does it for itself; to the engine the two have been one layer since the
// Install that retired it.
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
// 6. X's space is given back once its region has drained
// A block goes over as it is, entry and bytes: one that is damaged stays known to be. One that
// cannot be read stays where it is, and its region with it.
//
// A layer of which nothing is left leaves the manifest; then its files are deleted. A crash in
// between leaves files that opening deletes.
//
// Requests for what a layer holds itself (digests, copies) mean both layers: they wait until their
// region is merged. As what waits for room in the log, they are held back from nothing: an Install
// refuses them, flushes pass. Reads through the chain go on; one that a merge or a removal has met
// begins again.

/// The merge of one region.
struct MergeJob: BitwiseCopyable {
    enum Stage: UInt8, BitwiseCopyable {
        case free
        /// For frames, activations, room in the log, a buffer.
        case waiting
        /// Writes to Y's region end.
        case settling
        case copying
        /// What Y has becomes durable.
        case syncing
        /// The covered record does.
        case covering
    }
    var stage = Stage.free
    var heir = LayerID.head
    var layer = LayerID.head
    var region: UInt64 = 0
    /// Of X and Y; pinned.
    var lower: Int32 = -1
    var upper: Int32 = -1
    /// Blocks that Y lacks, and those not yet read.
    var missing = BlockSet()
    var left = BlockSet()
    private var runStart: Int32 = 0
    private var runEnd: Int32 = 0
    /// What is being moved.
    var run: Range<Int> {
        get { Int(runStart)..<Int(runEnd) }
        set { (runStart, runEnd) = (Int32(newValue.lowerBound), Int32(newValue.upperBound)) }
    }
    var reserved = 0
    var buffer = BufferID.none
    var tickets: (UInt64, UInt64) = (0, 0)
    var coverIndex: UInt64 = 0

    static let jobsMax = 8
    /// Regions begun in the background per tick (100 ms): one at a time beside requests, which are
    /// felt by whoever waits for the disk; more when there were fewer than this since the last.
    static let perBusyTick = 1
    static let perIdleTick = 32
    static let idleRequests: UInt64 = 4
    static let retryMilliseconds: UInt64 = 100
}

/// What merging has on its way.
struct MergeState {
    /// Requests for regions that are not merged.
    var waiting = SlotQueue()
    var budget = 0
    var isBusy = false
    /// `nextNumber` at the last tick.
    var lastNumber: UInt64 = 0
    var regionsMerged: UInt64 = 0
    var bytesMoved: UInt64 = 0
    /// Behind the last region whose merge failed: others may need no space.
    var cursor: UInt64 = 0
    /// One waits for room in the log.
    var needsRoom = false
    /// Whether layers are empty is asked once a tick.
    var isRemovalDue = false
    /// A merge failed for want of space: not again in the background before this.
    var notBefore = Instant.zero
    /// By region: counts the layers that were emptied of it.
    let serials = FixedArray<UInt32>(repeating: 0, count: 256)
    var removals: UInt32 = 0
    /// Layers on their way out of the manifest.
    var leaving: [LayerID] = []
    /// Gone from the manifest: deleted when the disk operations of that moment have ended.
    var deletions: [(layer: LayerID, barrier: [UInt64])] = []
    var isDeleting = false
}

extension ReplicaCore {
    // MARK: jobs

    func tickMerges() {
        merge.isBusy = nextNumber - merge.lastNumber > MergeJob.idleRequests
        merge.lastNumber = nextNumber
        merge.budget = merge.isBusy ? MergeJob.perBusyTick : MergeJob.perIdleTick
        merge.isRemovalDue = true
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

    private func isMerging(_ region: UInt64) -> Bool {
        for job in 0..<mergeJobs.count
        where mergeJobs[job].stage != .free && mergeJobs[job].region == region {
            return true
        }
        return false
    }
    private var runningJobs: Int {
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
            begin(job, requests[Int(slot)].header.layer, requests[Int(slot)].region)
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
        guard merge.budget > 0, shutdown == .none, currentInstall < 0, now >= merge.notBefore,
            !isUnderPressure
        else { return }
        while merge.budget > 0, !merge.isBusy || runningJobs == 0, let job = freeJob {
            guard let (heir, region) = nextToMerge() else {
                merge.budget = 0
                return
            }
            merge.budget -= 1
            begin(job, heir, region)
        }
    }
    private func nextToMerge() -> (LayerID, UInt64)? {
        for from in merge.cursor > 0 ? [merge.cursor, 0] : [0] {
            for index in 0..<chain.count where chain.isRetired(index) && !chain.isStuck(index) {
                var start = from
                while start < regionCount, let region = chain.nextUnmerged(index, from: start) {
                    if !isMerging(region), let heir = chain.heir(of: chain.id(index)) {
                        return (heir, region)
                    }
                    start = region + 1
                }
            }
        }
        return nil
    }

    private func begin(_ job: Int, _ heir: LayerID, _ region: UInt64) {
        mergeJobs[job] = MergeJob()
        mergeJobs[job].stage = .waiting
        mergeJobs[job].heir = heir
        mergeJobs[job].region = region
        advance(job)
    }

    private func advance(_ job: Int) {
        switch mergeJobs[job].stage {
        case .free, .copying: break
        case .waiting: prepare(job)
        case .settling:
            if cache.frames[Int(mergeJobs[job].upper)].writes == 0 { plan(job) }
        case .syncing, .covering: becomeDurable(job)
        }
    }

    // MARK: step 1

    /// The nearest layer first: what it holds hides the ones below.
    private func prepare(_ job: Int) {
        guard shutdown == .none, currentInstall < 0 else { return }
        let region = mergeJobs[job].region
        guard let place = chain.index(of: mergeJobs[job].heir), !chain.isRetired(place),
            let below = chain.unmerged(under: place, region), !chain.isStuck(below)
        else { return end(job) }
        if mergeJobs[job].layer != chain.id(below) {
            unpinFrames(job)
            mergeJobs[job].layer = chain.id(below)
        }
        guard let lower = pinned(job, \.lower, mergeJobs[job].layer),
            let upper = pinned(job, \.upper, mergeJobs[job].heir),
            isAtRest(lower), isAtRest(upper)
        else { return }
        let count = heldCount(lower)
        // What became absent is a change, too: who missed it is told by the birth.
        guard count > 0 || cache.frames[Int(lower)].birth > cache.frames[Int(upper)].birth else {
            return emptied(job)
        }
        guard isActive(upper, limit: activeRegionsForCopies), isActive(lower, limit: .max) else {
            return
        }
        lock(job, records: 2 * count)
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
        for path in [\MergeJob.lower, \MergeJob.upper] {
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
        cache.frames[Int(mergeJobs[job].lower)].isMerging = true
        cache.frames[Int(mergeJobs[job].upper)].isMerging = true
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
        let (lower, upper) = (mergeJobs[job].lower, mergeJobs[job].upper)
        var missing = BlockSet()
        var data = BlockSet()
        for block in 0..<Geometry.blocksPerRegion
        where cache.entry(upper, block).state == .absent {
            let state = cache.entry(lower, block).state
            if state != .absent { missing[block] = true }
            if state == .data { data[block] = true }
        }
        mergeJobs[job].missing = missing
        mergeJobs[job].left = data
        mergeJobs[job].stage = .copying
        copyNext(job)
    }

    private func copyNext(_ job: Int) {
        guard let run = mergeJobs[job].left.firstRun() else { return record(job) }
        mergeJobs[job].run = run
        let token = startOperation(.mergeRead, index: Int32(job))
        actions.append(
            .read(
                .data(mergeJobs[job].layer), offset: offset(job, run), length: length(run),
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
        guard result == length(run) else { return fail(job, .ioError) }
        let token = startOperation(.mergeWrite, index: Int32(job))
        actions.append(
            .write(
                .data(mergeJobs[job].heir), offset: offset(job, run), length: length(run),
                buffer: mergeJobs[job].buffer, bufferOffset: 0, token: token))
    }
    func mergeWritten(_ job: Int, _ result: Int) {
        let upper = Int(mergeJobs[job].upper)
        let run = mergeJobs[job].run
        syncs[FileSync.data].written += 1
        chain.dataWritten(mergeJobs[job].heir)
        cache.frames[upper].dataTicket = syncs[FileSync.data].written
        guard result == length(run) else {
            return fail(job, status(ofError: result))
        }
        merge.bytesMoved += UInt64(length(run))
        copied(job, run)
        copyNext(job)
    }
    /// What is there under absent entries gives its space back when the region has drained.
    private func abandonCopies(_ job: Int) {
        let upper = Int(mergeJobs[job].upper)
        for block in 0..<Geometry.blocksPerRegion
        where mergeJobs[job].missing[block]
            && (!mergeJobs[job].left[block] || mergeJobs[job].run.contains(block))
        {
            cache.frames[upper].unneeded[block] = true
        }
        // Nobody else may want this, and the region drains behind it.
        want(FileSync.data, cache.frames[upper].dataTicket)
    }
    private func copied(_ job: Int, _ run: Range<Int>) {
        for block in run { mergeJobs[job].left[block] = false }
    }

    private func record(_ job: Int) {
        let (lower, upper) = (mergeJobs[job].lower, mergeJobs[job].upper)
        for block in 0..<Geometry.blocksPerRegion where mergeJobs[job].missing[block] {
            record(upper, block, cache.entry(lower, block))
            mergeJobs[job].reserved -= 1
        }
        let (from, to) = (Int(lower), Int(upper))
        if !options.mutations.contains(.mergeLosesBirth) {
            cache.frames[to].birth = max(cache.frames[to].birth, cache.frames[from].birth)
        }
        cache.frames[to].lastWrite = max(cache.frames[to].lastWrite, cache.frames[from].lastWrite)
        cache.frames[to].lastUse = now
        cache.move(upper, to: .active)
        unlock(job)
        if options.mutations.contains(.mergeNotDurable) { return clear(job) }
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
        let upper = mergeJobs[job].upper
        guard upper >= 0, cache.frames[Int(upper)].isMerging else { return }
        cache.frames[Int(upper)].isMerging = false
        wake(upper)
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
        clear(job)
    }

    private func clear(_ job: Int) {
        let lower = mergeJobs[job].lower
        let first = mergeJobs[job].region * UInt64(Geometry.blocksPerRegion)
        var held = BlockSet()
        for block in 0..<Geometry.blocksPerRegion {
            let state = cache.entry(lower, block).state
            guard state != .absent else { continue }
            held[block] = true
            cache.setEntry(lower, block, .absent)
            if state != .zero { cache.frames[Int(lower)].unneeded[block] = true }
        }
        while let run = held.firstRun() {
            for block in run { held[block] = false }
            log.appendReserved(
                .entry(
                    layer: mergeJobs[job].layer, block: first + UInt64(run.lowerBound),
                    count: run.count, .absent))
            mergeJobs[job].reserved -= 1
        }
        emptied(job)
    }

    /// Nothing of the region is left in this layer: on to the next one below.
    private func emptied(_ job: Int) {
        let region = mergeJobs[job].region
        chain.markMerged(mergeJobs[job].layer, region)
        merge.regionsMerged += 1
        merge.serials[Int(region % 256)] &+= 1
        letGo(job)
        mergeJobs[job].stage = .waiting
        prepare(job)
    }
    private func letGo(_ job: Int) {
        log.unreserve(mergeJobs[job].reserved)
        mergeJobs[job].reserved = 0
        unlock(job)
        let lower = mergeJobs[job].lower
        if lower >= 0 {
            cache.frames[Int(lower)].isMerging = false
            wake(lower)
        }
        unpinFrames(job)
    }
    private func end(_ job: Int) {
        letGo(job)
        mergeJobs[job].stage = .free
        retryAwaitingMerge()
    }
    private func fail(_ job: Int, _ status: FrameStatus) {
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
