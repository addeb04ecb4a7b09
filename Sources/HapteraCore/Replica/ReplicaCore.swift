/// One copy of a volume, as a pure state machine: the shell feeds it `ReplicaEvent`s and performs
/// the `ReplicaAction`s it appended, in order.
///
/// The parts, each an extension in a file of its own: opening and replay; frames in and replies
/// out; install; mutations (write, setState, adopt) with activation; reads; syncs; merges of
/// deleted layers; upkeep (draining, the log's tail, punching) and shutdown. All memory is taken at
/// init: requests, disk operations and regions live in fixed arrays, and what finds no room waits
/// in order.
package final class ReplicaCore {
    package let actions = ValueQueue<ReplicaAction>(capacity: 1024)
    package let identity: ReplicaIdentity
    /// Owns the log's mapping.
    private let storage: ReplicaStorage
    let options: ReplicaOptions
    let pool: BufferPool
    /// Bytes of the volume.
    package internal(set) var size: UInt64
    var regionCount: UInt64
    var chain: LayerChain
    /// Of the status at hand.
    var placesAsked: [Int] = []
    let log: ActivityLog
    let cache: TableCache
    let views: LayerViews

    /// As on disk.
    var manifest: Manifest
    var now = Instant.zero
    /// Dead: a sync failed or the table is damaged. Nothing is answered any more.
    package private(set) var hasFailed = false

    // Requests.
    static let requestsMax = 4096
    let requests = FixedArray(repeating: Request(), count: requestsMax)
    /// Checksums of a write's blocks, 1 KiB per request.
    let checksums = MemoryBlock(count: requestsMax * 1024)
    var freeRequest: Int32 = 0
    var freeRequestCount = requestsMax
    var nextNumber: UInt64 = 1
    /// Admitted and not yet answered, parked ones aside.
    var startedCount = 0
    /// Mutations under way, in order of admission.
    var oldestMutation: Int32 = -1
    var newestMutation: Int32 = -1
    let connections = FixedArray(
        repeating: ConnectionState(), count: ReplicaLimits.connectionsMax)

    // Waiting.
    /// For a buffer, a disk operation or a frame in memory.
    var awaitingResources = SlotQueue()
    /// For room in the log.
    var awaitingLog = SlotQueue()
    /// For another region to leave the activity log, which takes a stable point. An Install or a
    /// flush does not wait for these.
    var parked = SlotQueue()
    /// Counts what was ever parked.
    var parkCount: UInt64 = 0
    /// Flushes waiting for the mutations before them.
    var awaitingMutations = SlotQueue()
    /// For syncs.
    var awaitingSync = SlotQueue()
    /// Synced, and for the log to have room for the record that says so.
    var awaitingRoom = SlotQueue()
    /// Frames whose activation waits for a sync of the log, in order.
    let activations = ValueQueue<Int32>(capacity: 1024)
    /// Frames whose slots in the table are being made.
    var slotsInitCount = 0
    /// What a sync of the table has to cover before those are durable that were written although
    /// the write failed.
    var failedSlotsTicket: UInt64 = 0

    // Disk operations.
    let operations = FixedArray(
        repeating: DiskOperation(), count: ReplicaLimits.diskOperationsMax)
    var freeOperation: Int32 = 0
    var freeOperationCount = ReplicaLimits.diskOperationsMax
    let syncs = FixedArray(repeating: FileSync(), count: 3)

    // Install.
    var decodedInstalls: [Int32: InstallRequest] = [:]
    var waitingInstalls: [Int32] = []
    var currentInstall: Int32 = -1
    /// The highest epoch an Install that was let in asks for; the promise, but for one under way.
    var admittedEpoch = Epoch.zero
    /// The promise was made by this instance, so that its engine may install it again.
    var hasPromisedHere = false
    let manifestSlotSize: Int
    /// What a manifest write on its way to the disk makes true.
    var manifestProposal: Manifest?
    /// The manifest is durable in one slot and has yet to be put into the other.
    var isSecondSlotDue = false
    var isMirroring = false
    var manifestPurpose = ManifestPurpose.install
    var isSettleWanted = false
    /// What was promised before the last Install.
    var promiseBefore = Epoch.zero
    var connectionsMade: UInt64 = 0
    /// What a sync of the log must cover before an Install is answered: its flushed mark. Nil until
    /// nothing is under way that could store another.
    var installTicket: UInt64?
    /// Layers of the Install under way whose files are durable, and operations on one that is not.
    var layersMade: [LayerID] = []
    /// What they were made for, bytes.
    var layersMadeSize: UInt64 = 0
    var growth: GrowthState
    var layerOperations = 0
    /// The host restarted since the copies were last known equal; fixed at open.
    package let isRebooted: Bool

    var leases = GivenLeases()

    // Stability.
    /// S, the highest announced here.
    package internal(set) var stablePoint = StablePoint.zero
    /// The highest point flushed here.
    package internal(set) var flushedPoint: StablePoint
    /// Highest point of which every member is known to hold a durable mark, so that a copy whose
    /// mark is below it was rolled back. Survives a restart; may lag. At most S.
    package internal(set) var knownStable: StablePoint

    // Covered records: see ReplicaCore+Syncs.
    var covered: UInt64 = 0
    /// What a sync of the log has to cover before the last covered record is durable.
    var coverTicket: UInt64 = 0
    /// One past the last record that changed the state of a block of an upper layer, or made data
    /// of a trimmed one of the lowest.
    var freshEnd: UInt64 = 0

    /// Pages that could not be read, and when the first time.
    var unreadablePages: [LayerRegion: Instant] = [:]
    /// When something was read or written last, if there are any.
    var diskWorkedAt = Instant.zero

    // Upkeep.
    var upkeep = Upkeep()
    let batch = FixedArray<Int32>(repeating: -1, count: Upkeep.batchMax)
    var merge = MergeState()
    /// Layers that are about to be linked, and drain: how many wait for each. Those that are not
    /// linked anywhere yet.
    var sharing: [LayerID: Int] = [:]
    var unlinked: Set<LayerID> = []
    var space = SpaceState()
    let mergeJobs = FixedArray(repeating: MergeJob(), count: MergeJob.jobsMax)
    var punchRun: Range<Int>?
    var punchingFrame: Int32 = -1
    var punchBudget = 0
    /// The replica is to end, and gives no more space back from then on.
    var punchUntil: Instant?
    var shutdown = ShutdownPhase.none

    /// Opens the copy in `storage`; see "Opening" for the order. Throws what is wrong with it.
    package init(opening storage: ReplicaStorage, options: ReplicaOptions, pool: BufferPool)
        throws(StorageError)
    {
        precondition(options.tableCachePagesMax >= options.activeRegionsMax + 64)
        precondition(options.activeRegionsMax <= InstallReply.activeRegionsMax)
        let opened = try OpenedReplica(storage: storage, options: options)
        self.storage = storage
        self.options = options
        self.pool = pool
        manifest = opened.manifest
        manifestSlotSize = opened.manifestSlotSize
        identity = opened.manifest.identity
        size = opened.manifest.size
        regionCount = Geometry.regionCount(size: opened.manifest.size)
        growth = GrowthState(prepared: opened.manifest.size(of: opened.manifest.head))
        chain = opened.chain
        covered = opened.covered
        // Of an earlier process: seed 200511.
        freshEnd = opened.hasUncovered ? opened.log.nextIndex : 0
        log = opened.log
        cache = opened.cache
        views = LayerViews(options.viewsMax)
        flushedPoint = opened.log.flushed
        knownStable = opened.log.stable
        admittedEpoch = opened.manifest.promise
        if options.mutations.isDisjoint(with: [.sharedIsMerged, .sharedIsForgotten]) {
            chain.setShared(opened.manifest.layers.filter(storage.isShared), true)
        }
        isRebooted = !opened.manifest.isClean && opened.manifest.settledBoot != options.bootID
        for slot in 0..<Self.requestsMax {
            requests[slot].next = slot + 1 < Self.requestsMax ? Int32(slot + 1) : -1
        }
        for index in 0..<operations.count {
            operations[index].next = index + 1 < operations.count ? Int32(index + 1) : -1
        }
    }

    /// Reads need frames, too.
    private var activeFramesMax: Int { max(1, cache.frames.count - 16) }
    var activeRegionsMax: Int { min(options.activeRegionsMax, activeFramesMax) }
    var activeRegionsForCopies: Int { activeRegionsForMerges - MergeJob.jobsMax }
    var activeRegionsForMerges: Int { min(options.activeRegionsForCopies, activeFramesMax) }

    /// False: the shell stops reading from its connections until a step made it true again.
    package var canAccept: Bool { freeRequestCount > 0 }
    /// Something waits for a buffer that the shell may have released: it should step with a tick.
    package var isShortOfResources: Bool { !awaitingResources.isEmpty }
    package var promise: Epoch { manifest.promise }
    package var installedRecord: VolumeRecord? { manifest.installed }
    package var headLayer: LayerID { chain.head }
    /// The names of the layers, lowest first, and the numbers of their files.
    package var layers: [LayerID] { chain.names }
    package var layerFiles: [LayerID] { chain.ids }
    /// The layer that what this one holds belongs to: itself, its heir if its snapshot was deleted,
    /// nil if it was discarded.
    package func owner(of file: LayerID) -> LayerID? {
        chain.index(of: file).flatMap(chain.heirPlace).map(chain.name)
    }
    /// Layers of deleted snapshots that are still there.
    package var retiredLayerCount: Int { chain.retiredCount }
    /// What merging them has done since the process started.
    package var mergedRegions: UInt64 { merge.regionsMerged }
    package var mergedBytes: UInt64 { merge.bytesMoved }
    package var activeRegionCount: Int { cache.activeCount }
    package var logUsedPercent: Int { Int(log.used * 100 / log.capacity) }
    package var isShutDown: Bool { shutdown == .done }

    package func step(_ event: ReplicaEvent, now: Instant) {
        self.now = now
        guard !hasFailed else {
            if case .frame(_, _, _, let buffer) = event { release(buffer) }
            return
        }
        if !leases.isStarted { startLeases() }
        switch event {
        case .connected(let connection): connected(connection)
        case .disconnected(let connection): disconnected(connection)
        case .frame(let connection, let header, let table, let buffer):
            receive(connection, header, table, buffer)
        case .disk(let token, let result): diskEnded(token, result)
        case .tick: tick()
        }
        retryWaiting()
        pumpFlushes()
        pumpInstall()
        pumpSecondSlot()
        pumpSettle()
        pumpMerges()
        pumpUpkeep()
        if shutdown != .none { pumpShutdown() }
    }

    func fail(_ failure: ReplicaFailure) {
        guard !hasFailed else { return }
        hasFailed = true
        actions.append(.failed(failure))
    }
    func release(_ buffer: BufferID) {
        if buffer != .none { pool.release(buffer) }
    }

    // MARK: queues of request slots

    func push(_ slot: Int32, _ queue: inout SlotQueue) {
        requests[Int(slot)].next = -1
        if queue.tail >= 0 {
            requests[Int(queue.tail)].next = slot
        } else {
            queue.head = slot
        }
        queue.tail = slot
    }
    func pop(_ queue: inout SlotQueue) -> Int32? {
        guard queue.head >= 0 else { return nil }
        let slot = queue.head
        queue.head = requests[Int(slot)].next
        if queue.head < 0 { queue.tail = -1 }
        requests[Int(slot)].next = -1
        return slot
    }

    /// Lets what waits try again, in order, as long as it gets on.
    private func retryWaiting() {
        // Asked here and not in `retry`: nearly always nothing waits.
        if !awaitingLog.isEmpty { retry(\.awaitingLog) }
        if !parked.isEmpty, cache.activeCount < activeRegionsMax { retry(\.parked) }
        if !awaitingResources.isEmpty { retry(\.awaitingResources) }
    }
    private func retry(_ path: ReferenceWritableKeyPath<ReplicaCore, SlotQueue>) {
        var waiting = self[keyPath: path]
        self[keyPath: path] = SlotQueue()
        while let slot = pop(&waiting) {
            resume(slot)
            guard self[keyPath: path].isEmpty else { break }
        }
        // What stopped us is now alone in the queue: the rest goes behind it.
        while let slot = pop(&waiting) { push(slot, &self[keyPath: path]) }
    }
}

/// One request, from its frame to its reply.
struct Request: BitwiseCopyable {
    enum Phase: UInt8, BitwiseCopyable {
        case free
        /// Behind an Install on its connection.
        case held
        /// In `parked`: not started as far as flushes and Installs are concerned.
        case parked
        case started
    }
    var header = FrameHeader(kind: .ping)
    var connection: Int32 = 0
    var connectionGeneration: UInt32 = 0
    var phase = Phase.free
    /// The frame's data, or what a read returns.
    var buffer = BufferID.none
    /// What the reply's table will be in.
    var table = BufferID.none
    /// The frame it keeps in memory.
    var frame: Int32 = -1
    var dataResult = 0
    /// Reads through the chain, status, births: `chainSerial` when it began.
    var serial: UInt64 = 0
    /// Status, births, and a digest read block by block: how far it has come.
    var position: UInt64 = 0
    /// Digest: blocks the disk cannot read.
    var unreadable = BlockSet()
    /// Digest of several layers: the latest of theirs.
    var birth = Epoch.zero
    var extents: Int32 = 0
    var loads: Int32 = 0
    var operationsLeft: Int32 = 0
    /// Read through the chain: layers still to be asked, from the top; status: of this region.
    var layersLeft: Int32 = 0
    var number: UInt64 = 0
    /// When it was admitted.
    var begun = Instant.zero
    var next: Int32 = -1
    var olderMutation: Int32 = -1
    var newerMutation: Int32 = -1
    var isMutation = false
    /// Mutation: flushes may have passed it.
    var wasParked = false
    var status = FrameStatus.ok
    /// Flush: `parkCount` when it was admitted, and whether requests were parked then.
    var parkCount: UInt64 = 0
    var passesParked = false
    /// Flush, FUA: the log's next index when its syncs were asked for.
    var coverIndex: UInt64 = 0
    /// Syncs to wait for: of log, data, table.
    var tickets: (UInt64, UInt64, UInt64) = (0, 0, 0)

    var region: UInt64 { Geometry.region(ofByte: header.offset) }
    /// Within the region: for what is about all of it, all of them.
    var blocks: Range<Int> {
        if header.kind == .digest || header.kind == .verify {
            return 0..<Geometry.blocksPerRegion
        }
        let first = Int(header.offset % UInt64(Geometry.regionSize)) / Geometry.blockSize
        return first..<first + Int(header.length) / Geometry.blockSize
    }
}

struct ConnectionState: BitwiseCopyable {
    var generation: UInt32 = 0
    var isConnected = false
    /// Connections are numbered in the order they were made.
    var number: UInt64 = 0
    var engine = InstanceID.none
    var hasSaidHello = false
    /// The epoch it may act in; zero: none.
    var installedEpoch = Epoch.zero
    /// Behind an Install on the way.
    var isHeld = false
    var held = SlotQueue()
}

struct DiskOperation: BitwiseCopyable {
    enum Kind: UInt8, BitwiseCopyable {
        case free
        case dataWrite
        case dataRead
        case birthsRead
        /// Region: the first block read.
        case verifyRead
        case spaceRead
        case pageLoad
        case slotsInit
        case pageWrite
        case sync
        case punch
        case manifestWrite
        case manifestSync
        case layerCreate
        case layerSync
        case growthExtend
        /// Of the head's files.
        case growthSync
        case layerRemove
        /// Index: the merge's job.
        case mergeRead
        case mergeWrite
        /// Of blocks of a shared layer, as they were.
        case rewrite
    }
    var kind = Kind.free
    /// Request, frame, file or place in the batch, by kind.
    var index: Int32 = 0
    var generation: UInt32 = 0
    var buffer = BufferID.none
    var length = 0
    /// Where a read of births begins, and in which layer; see `Kind.verifyRead`.
    var region: UInt64 = 0
    var layer = LayerID.head
    var next: Int32 = -1
}

enum ManifestPurpose: UInt8, BitwiseCopyable {
    case install
    case settle
    case shutdown
    /// Of an empty layer.
    case removal
}

enum ShutdownPhase: UInt8, BitwiseCopyable {
    case none
    /// Waiting for requests under way.
    case finishing
    case syncing
    case draining
    case syncingLog
    case writingManifest
    case done
}
