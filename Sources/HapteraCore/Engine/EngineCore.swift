/// The engine of one volume: takes it over, replicates its writes, reads it, keeps the in-sync set
/// honest, fills returning replicas.
///
/// Pure: no clock, socket, thread or randomness of its own. `step` consumes one event and appends
/// what is to be done to `actions`. Rules are named as in `docs/replication.md`: W (write),
/// D (degraded acknowledgement), I (install), F (flush), R (read), T (takeover), J (join).
package final class EngineCore {
    package internal(set) var configuration: EngineConfiguration
    package let pool: BufferPool
    package let actions = ValueQueue<EngineAction>(capacity: 1024)
    package internal(set) var phase = EnginePhase.idle
    package internal(set) var stopReason: StopReason?
    /// The record as last known to stand in the store.
    package internal(set) var record: VolumeRecord? {
        didSet {
            epoch = record?.epoch ?? .zero
            head = record?.head ?? .head
            size = record?.size ?? 0
            minInSync = Int(record?.minInSync ?? 1)
            leaseNanoseconds = countedLease(record?.leaseMilliseconds ?? 0)
        }
    }
    /// Of the record, for the data path: copying the record itself costs reference counts.
    package private(set) var epoch = Epoch.zero
    /// Bytes; zero until the record is known.
    package private(set) var size: UInt64 = 0
    /// The layer that writes go to. It changes in the step that sends the record's Install to all
    /// members, and so between the same two writes on each of them.
    private(set) var head = LayerID.head
    private(set) var minInSync = 1
    /// What of a lease this engine relies on.
    private(set) var leaseNanoseconds: UInt64 = 0
    /// What `storeCompareAndSwap` asks for.
    package internal(set) var proposedRecord: VolumeRecord
    /// The table of the last `sendControl`.
    package internal(set) var controlPayload: [UInt8] = []
    package var mutations = MutationSet()

    let replicas = FixedArray(repeating: ReplicaState(), count: Geometry.replicaSlotsMax)
    var now = Instant.zero

    // Operations.
    static let internalSlots = 64
    /// Requests one engine can have under way at a replica.
    package static let outstandingMax = EngineLimits.operationsMax + internalSlots
    static let bucketCount = 1024
    let slots = FixedArray(
        repeating: OperationSlot(), count: EngineLimits.operationsMax + internalSlots)
    let bucketHeads = FixedArray(repeating: Int32(-1), count: bucketCount)
    let bucketTails = FixedArray(repeating: Int32(-1), count: bucketCount)
    let tables = MemoryBlock(
        count: (EngineLimits.operationsMax + internalSlots) * Geometry.blocksPerRegion * 4)
    var freeHead: Int32 = -1
    var freeCount = 0
    /// One past the highest slot ever used: what a scan over all slots must visit.
    var slotsUsed = 0
    var edges: [BufferID] = []
    var sequence = SequenceNumber.zero
    /// Something waits for a buffer of the core's or the pool's.
    var isStarved = false
    /// Writes wait for space on every member.
    package internal(set) var isFullEverywhere = false

    // Membership.
    /// Members by the record that stands.
    var members = SlotSet()
    /// Whose reply an acknowledgement needs: the members of the last record every one of them has
    /// installed, and a joiner about to be promoted.
    var required = SlotSet() { didSet { updateLease() } }
    var joiner: ReplicaSlot?
    var joinStage = JoinStage.none
    /// Somebody may have become ready to join since the last look.
    var mayJoin = true
    var pendingChange: ChangePurpose?
    /// A request to make that change got no answer: it may have been made, or may be yet.
    var isChangeInDoubt = false
    /// Why the store refused it, empty while it has not.
    var refusalReason = ""
    var isStoreBusy = false
    var isRechecking = false
    var storeRetryAt: Instant?
    var nonceState: UInt64
    var deadline = Instant.zero
    /// Since when the engine listened before its claim; nil once it has served.
    var hearingBegan: Instant?
    var isDetaching = false
    /// A flush that covers everything has been sent for the detach.
    var isDetachFlushed = false
    /// Older members were asked once more when the claim was granted.
    var hasGreetedAgain = false
    /// Reading the record again to learn why a replica has promised a later epoch.
    var isVerifyingPromise = false
    /// Only rebooted members and a client that may remember more: waits for a better one, or for an
    /// administrator to decide.
    package internal(set) var isRefusing = false
    /// Joins given up because of a block that no member could read.
    var unreadableJoins = 0
    /// Who was there when this engine began to serve from rebooted members only.
    var acceptedMembers = SlotSet()
    /// An administrator has accepted that: for this takeover.
    var isLossAccepted = false
    /// A member restarted after its promise: the takeover needs a new epoch.
    var mustClaimAgain = false
    /// The record before this takeover: says whether the client survived and the copies were clean.
    var recordBefore: VolumeRecord?
    /// This engine has served before: its client lives, whatever the record says.
    var hasServed = false

    // Leases (L).
    /// Until when every replica in `required` has given this engine its lease.
    var leaseUntil = Instant.zero
    /// When the last lease of an engine before this one has run out.
    var serveAfter = Instant.zero
    /// Hedged reads.
    var hedgeCredit = 0
    var hedgesInFlight = 0
    package internal(set) var hedgedReads: UInt64 = 0
    var latencyWindowAt = Instant.zero
    /// Something is ready and waits for a lease.
    var hasHeld = false
    /// The change that marks the volume clean has been asked for: nothing is served any more.
    var hasReleased = false

    // Takeover.
    var unresolved: Set<UInt64> = []
    var unresolvedQueue: [UInt64] = []
    /// Layers of unresolved regions in which members may differ, ascending. A region that is only
    /// there to be repaired has none: it is looked at in every layer.
    var suspectLayers: [UInt64: [LayerID]] = [:]
    /// Those of `unresolved` that are there to be repaired only.
    var damagedRegions: Set<UInt64> = []
    /// Requests that failed although their region had been repaired; until when the next of the
    /// same blocks is not worth another repair.
    var lostReads: [BlocksOfLayer: Instant] = [:]
    package internal(set) var blocksRepaired: UInt64 = 0
    /// Those of `unresolved` in which a write ended with an error.
    var erroredRegions: [UInt64: ErroredBlocks] = [:]
    /// Regions that requests wait for: resolved first.
    let urgentRegions = ValueQueue<UInt64>(capacity: urgentRegionsMax)
    static let urgentRegionsMax = 4096
    var unresolvedPosition = 0
    var installReplies: [InstallReply?]
    var isResolving = false
    var regionsResolved: UInt64 = 0
    var blocksResolved: UInt64 = 0
    /// When this takeover began to serve; nil: its members are equal.
    var resolveBegan: Instant?
    package internal(set) var lastTakeover = LastTakeover()

    // Stable point.
    package internal(set) var stablePoint = StablePoint.zero
    /// Highest point of which every member is known to hold a durable mark: a copy whose mark is
    /// below it was rolled back. S itself would not do: a power cut may take the mark of the last
    /// flush, though not what it flushed.
    var markedPoint = StablePoint.zero
    /// Highest sequence number ever acknowledged to a client as written, in any epoch.
    var highestAcknowledged = SequenceNumber.zero
    var highestStable = SequenceNumber.zero
    var flushDueAt: Instant?
    var isFlushInFlight = false
    /// What flushes under way do not cover at some replica.
    var passed: [(flush: SequenceNumber, region: LayerRegion)] = []
    var isLogPressed = false
    /// Not before this is a flush sent because a log is filling.
    var pressedFlushAfter = Instant.zero
    static let pressedFlushMilliseconds: UInt64 = 20

    // Jobs.
    let jobsMax: Int
    let jobs: FixedArray<Job>
    let jobBuffers: [BufferID]
    let digests: MemoryBlock

    // Join.
    var needed: [UInt64] = []
    var neededCount = 0
    var neededCursor = 0
    var neededTotal = 0
    /// Regions the joiner may hold anything in, a bit each.
    var held: [UInt64] = []
    /// B of the delta; zero: everything is compared.
    var joinBase = Epoch.zero
    var mapAttempt: UInt16 = 0
    var mapAwaiting: UInt8 = 0
    var mapRegion: UInt64 = 0
    /// The member whose births count.
    package internal(set) var joinSource: ReplicaSlot?
    var isJoinFlushed = false
    package internal(set) var blocksRebuilt: UInt64 = 0
    /// Bytes of data sent to joiners, ever.
    package internal(set) var bytesRebuilt: UInt64 = 0
    var joinProgress = JoinProgress()
    var throttle = CopyThrottle()
    // Scrub.
    var scrub = ScrubState()
    let scrubRegions = FixedArray(repeating: ScrubRegion(), count: ScrubState.regionsMax)
    let scrubMap = FixedArray<UInt64>(repeating: 0, count: Int(ScrubState.mapRegions) / 64)
    // Snapshots.
    /// The first is under way, the others wait.
    var snapshotRequests: [SnapshotRequest] = []
    var snapshotStage = SnapshotStage.waiting
    /// What clients ask of the volume waits.
    var isReverting = false
    /// Answers to changes behind a freeze wait.
    var hold: ClientHold?
    var deletionRequests: [DeletionRequest] = []
    var resizeRequests: [ResizeRequest] = []
    /// Copies that were asked to make room for the first of them, and those that have.
    var roomAsked = SlotSet()
    var roomMade = SlotSet()
    var roomAttempt: UInt64 = 0
    /// Of the deletion that is proposed: nothing reads it any more.
    var deletedLayer = LayerID.head
    /// No slot below this one holds a write to a layer that is frozen now.
    var snapshotCursor = 0
    /// Some status waits for writes below the head.
    var hasWaitingStatus = false
    /// What is frozen up to here is known to be equal and durable on every member.
    var finishedLayer = LayerID.head

    /// Regions (each layer counts) whose digests were compared, by resolution, repair or rebuild.
    package internal(set) var regionsCompared: UInt64 = 0
    package internal(set) var regionsCopied: UInt64 = 0
    package internal(set) var lastRegionCopied: UInt64 = 0

    package init(configuration: EngineConfiguration, pool: BufferPool) {
        self.configuration = configuration
        self.pool = pool
        nonceState = configuration.nonceSeed
        proposedRecord = VolumeRecord(
            volume: configuration.volume, name: "", epoch: .zero, nonce: 0, size: 4096, inSync: [])
        installReplies = Array(repeating: nil, count: Geometry.replicaSlotsMax)
        // The core's own buffers are taken now, so that no client can starve what unblocks clients.
        let jobsMax = configuration.jobsMax
        self.jobsMax = jobsMax
        jobs = FixedArray(repeating: Job(), count: jobsMax)
        digests = MemoryBlock(count: jobsMax * Geometry.replicaSlotsMax * RegionDigest.size)
        jobBuffers = (0..<jobsMax).compactMap { _ in pool.allocate(BufferPool.sizeMax) }
        edges = (0..<32).compactMap { _ in pool.allocate(Geometry.blockSize) }
        precondition(jobBuffers.count == jobsMax && edges.count == 32, "pool too small")
        for index in (0..<slots.count).reversed() {
            slots[index].next = freeHead
            freeHead = Int32(index)
        }
        freeCount = slots.count
    }

    /// Buffers the core holds for itself, for leak checks.
    package var ownBuffers: Int { jobBuffers.count + edges.count }
    /// Whether there is room for another client operation.
    package var canSubmit: Bool { freeCount > Self.internalSlots && phase != .stopped }
    /// Regions still to be compared after a takeover.
    package var unresolvedCount: Int { unresolved.count }
    package var rebuildProgress: (done: Int, total: Int) {
        (max(0, neededTotal - neededCount), neededTotal)
    }

    // For checkers.
    /// The members may differ in these regions: no read may begin there. (A damaged block alone is
    /// no such difference.)
    package var unresolvedRegions: Set<UInt64> {
        damagedRegions.isEmpty ? unresolved : unresolved.subtracting(damagedRegions)
    }
    /// The client's operation that a request with the tag was sent for; nil: for none.
    package func clientUserData(ofTag tag: UInt64) -> UInt64? {
        guard let index = slotIndex(ofTag: tag), slots[index].use == .client else { return nil }
        return slots[index].operation.userData
    }
    /// Whether it was sent to make members equal after a takeover.
    package func isResolution(_ tag: UInt64) -> Bool {
        guard let index = slotIndex(ofTag: tag), slots[index].use == .job else { return false }
        return jobs[Int(slots[index].operation.userData)].kind == .resolve
    }
    package var isCopying: Bool { joinStage == .copying }
    /// The joiner may be made a member without another word from it.
    package var mayPromote: Bool { joinStage == .flushing || joinStage == .promoting }
    package var regionsToCopy: Int { neededCount }
    package func isToBeCopied(_ region: UInt64) -> Bool { isNeeded(region) }
    /// The joiner has been sent a change of the block, and has yet to answer.
    package func isOwedByJoiner(_ block: UInt64) -> Bool {
        guard let joiner else { return false }
        return (0..<slotsUsed).contains { index in
            slots[index].phase == .inFlight && !slots[index].isRead
                && slots[index].firstBlock <= block && block < slots[index].endBlock
                && slots[index].sent.contains(joiner) && !slots[index].replied.contains(joiner)
        }
    }

    /// The checksums (4 bytes per block) that go with a `send` of this slot.
    package func table(_ index: Int32) -> RawMemory {
        let size = Geometry.blocksPerRegion * 4
        let first = Int(index >> 16) * 4
        return tables.memory.slice(Int(index & 0xffff) * size + first, size - first)
    }
    /// Names the part of a slot's table from `block` on.
    static func tableIndex(_ slot: Int32, block: Int) -> Int32 { slot | Int32(block) << 16 }

    // MARK: - Step

    package func step(_ event: EngineEvent, now: Instant) {
        self.now = max(now, self.now)
        guard phase != .stopped else {
            switch event {
            case .submit(let operation): refuse(operation)
            case .takeSnapshot(let token, _, _, _), .revert(let token, _, _, _):
                answerSnapshot(token, .head, .notServing)
            case .deleteSnapshot(let token, _): answerDeletion(token, .notServing)
            case .resize(let token, _): answerResize(token, .notServing)
            case .release(let token): releaseHold(token)
            default: break
            }
            return
        }
        switch event {
        case .start: fetch()
        case .submit(let operation): submit(operation)
        case .configure(let list): configure(list)
        case .connected(let slot): connected(slot)
        case .disconnected(let slot): disconnected(slot)
        case .frame(let slot, let header, let table, let data):
            received(slot, header, table: table, data: data)
        case .store(let outcome): storeAnswered(outcome)
        case .tick:
            mayJoin = true
            joinProgress.sample(self.now)
            scrub.sample(self.now)
            throttle.advance(
                self.now, isCopying: joinStage == .copying, isScrubbing: scrub.isRunning && mayScrub
            )
            tick()
        case .detach: isDetaching = true
        case .takeSnapshot(let token, let name, let created, let hold):
            takeSnapshot(
                SnapshotRequest(
                    token: token, name: name, hold: hold?.token ?? 0, created: created), hold)
        case .release(let token): releaseHold(token)
        case .revert(let token, let target, let kept, let created):
            takeSnapshot(
                SnapshotRequest(token: token, name: kept, target: target, created: created))
        case .deleteSnapshot(let token, let name): deleteSnapshot(token, name: name)
        case .resize(let token, let size): resize(token, to: size)
        case .cancel(let session): cancel(session)
        case .acceptLoss: acceptLoss()
        case .scrub(let progress): beginScrub(progress)
        }
        reconcile()
    }

    /// Where the data of a reply must be received: in the buffer of the operation that asked for
    /// it. Nil: nowhere in particular; the core will not look at it.
    package func readTarget(_ header: FrameHeader, from slot: ReplicaSlot)
        -> (buffer: BufferID, offset: Int)?
    {
        guard header.isReply, header.kind == .read || header.kind == .adopt,
            let index = slotIndex(ofTag: header.tag)
        else { return nil }
        let op = slots[index]
        switch op.use {
        case .client where op.phase == .readingEdges:
            guard header.dataLength == Geometry.blockSize else { return nil }
            let block = header.offset / UInt64(Geometry.blockSize)
            if block == op.firstBlock, op.headEdge != .none { return (op.headEdge, 0) }
            if block == op.endBlock - 1, op.tailEdge != .none { return (op.tailEdge, 0) }
            return nil
        case .client where op.isRead && op.phase == .inFlight:
            // Of the operation and not of the range it holds: a hedge may have given that free.
            let blocks = Geometry.blocks(
                offset: op.operation.offset, length: op.operation.length)
            guard Int(header.dataLength) == blocks.count * Geometry.blockSize,
                Int(op.source) == slot
            else { return nil }
            return (op.operation.buffer, 0)
        case .hedge:
            guard Int(header.dataLength) == op.operation.length, Int(op.source) == slot else {
                return nil
            }
            return (op.operation.buffer, 0)
        case .job:
            let job = Int(op.operation.userData)
            if jobs[job].stage == .draining { return nil }
            if jobs[job].stage == .copying {
                return copiedBlocks(job, header).map {
                    (jobBuffers[job], $0.lowerBound * Geometry.blockSize)
                }
            }
            guard Int(header.dataLength) == jobs[job].run.count * Geometry.blockSize else {
                return nil
            }
            return (jobBuffers[job], 0)
        default:
            return nil
        }
    }

    /// Lets everything that became possible happen: one place, after every event, so that no
    /// event's handler must remember who waits for what.
    private func reconcile() {
        guard phase != .stopped else { return }
        if isStarved, edges.count >= 2 {
            isStarved = false
            startAll()
        }
        advanceTakeover()
        if hasHeld, isLeased { answerHeld() }
        removeFailedMembers()
        if scrub.isRunning { advanceScrub() }
        advanceJobs()
        advanceJoin()
        if hold != nil { advanceHold() }
        if !snapshotRequests.isEmpty { advanceSnapshot() }
        if !deletionRequests.isEmpty { advanceDeletion() }
        if !resizeRequests.isEmpty { advanceResize() }
        if hasWaitingStatus { advanceStatus() }
        advanceFlush()
        advanceDetach()
    }

    func stop(_ reason: StopReason) {
        guard phase != .stopped else { return }
        phase = .stopped
        stopReason = reason
        dropHedges(of: nil)
        for index in 0..<slotsUsed where slots[index].use == .client {
            completeClient(index, .shuttingDown)
            release(index)
        }
        abandonSnapshots()
        abandonDeletions()
        abandonResizes()
        actions.append(.serving(false))
        actions.append(.stopped)
    }

    /// What can be set while it runs; nil: stays as it is.
    package func set(
        removalDeadlineMilliseconds: UInt64? = nil, ioTimeoutMilliseconds: UInt64? = nil,
        detectsZeroes: Bool? = nil
    ) {
        if let detectsZeroes { configuration.detectsZeroes = detectsZeroes }
        if let removalDeadlineMilliseconds {
            configuration.removalDeadlineMilliseconds = removalDeadlineMilliseconds
        }
        if let ioTimeoutMilliseconds { configuration.ioTimeoutMilliseconds = ioTimeoutMilliseconds }
    }

    /// Why it stopped, and which record it judged; empty while it has not.
    package var stopText: String {
        guard let stopReason else { return "" }
        let refused = stopReason == .refused ? ", \(proposedRecord.change): \(refusalReason)" : ""
        return stopReason.text(judging: record) + refused
    }

    func note(_ note: EngineNote) { actions.append(.note(note)) }

    private func refuse(_ operation: Operation) {
        actions.append(
            .complete(
                userData: operation.userData, .shuttingDown, buffer: operation.buffer,
                tableLength: 0, isHole: false))
    }

    /// splitmix64 (Steele, Lea and Flood, 2014): spreads the seed over the nonces.
    func nextNonce() -> UInt64 {
        nonceState &+= 0x9E37_79B9_7F4A_7C15
        var z = nonceState
        z = (z ^ (z >> 30)) &* 0xBF58_476D_1CE4_E5B9
        z = (z ^ (z >> 27)) &* 0x94D0_49BB_1331_11EB
        return (z ^ (z >> 31)) | 1
    }
}
