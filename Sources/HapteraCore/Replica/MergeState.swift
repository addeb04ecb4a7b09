// What the merging of retired layers keeps in memory: see ReplicaCore+Merge.

/// The merge of one region.
struct MergeJob: BitwiseCopyable {
    enum Stage: UInt8, BitwiseCopyable {
        case free
        /// For frames, activations, room in the log, a buffer.
        case waiting
        /// Writes to the region end.
        case settling
        case copying
        /// What the filled layer has becomes durable.
        case syncing
        /// The covered record does.
        case covering
    }
    var stage = Stage.free
    /// Y.
    var heir = LayerID.head
    /// X.
    var layer = LayerID.head
    /// What is emptied and what is filled, and the region's frames of the two, pinned.
    var from: LayerID { isDown ? heir : layer }
    var to: LayerID { isDown ? layer : heir }
    var source: Int32 = -1
    var target: Int32 = -1
    var region: UInt64 = 0
    /// Y is the smaller one, and goes over to X.
    var isDown = false
    /// X stays: only the blocks go that Y, the head, hides.
    var isHiding = false
    /// A request waits for all of the region to be in Y, whatever would stay.
    var isAwaited = false
    /// Those of X that are about to become absent.
    var hidden = BlockSet()
    /// Blocks that are to go over, and those not yet read.
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
    /// Regions begun in the background per tick (100 ms) if there were no more requests than these
    /// since the last one. Beside more it is for the throttle to say.
    static let perIdleTick = 32
    static let idleRequests: UInt64 = 4
    /// Of more retired layers than these each has another region begun per tick, whatever clients
    /// feel of it: deletions would come faster than merges end, and layers be ever more.
    static let backlogUnnoticed = 2
    static let retryMilliseconds: UInt64 = 100
}

/// What merging has on its way.
struct MergeState {
    /// Requests for regions that are not merged.
    var waiting = SlotQueue()
    /// Regions that may be begun before the next tick, whatever the throttle says.
    var budget = 0
    var isBusy = false
    /// Nothing was found to begin: not again before the next tick.
    var isIdle = false
    /// By what clients' requests take: with merges, and what they took without.
    var throttle = CopyThrottle()
    /// Emptied, and not yet drained and punched; perhaps some that have been.
    var owed: [LayerRegion] = []
    /// Theirs: right once a tick; meanwhile what else gives space back counts as theirs, too.
    var owedBlocks = 0
    /// No more are begun in the background: so much space is taken twice, that of 32 regions.
    var owedBlocksMax = 32 * Geometry.blocksPerRegion
    /// They drain at once: merges wait for that.
    var isDrainDue = false
    /// `nextNumber` at the last tick.
    var lastNumber: UInt64 = 0
    var regionsMerged: UInt64 = 0
    var bytesMoved: UInt64 = 0
    var regionsHidden: UInt64 = 0
    /// Behind the last region whose merge failed: others may need no space.
    var cursor: UInt64 = 0
    /// Whose turn it is: what is hidden of the layer that stays, or all else.
    var isHideTurn = false
    /// Nothing hidden was found that could be begun: not again before the next tick.
    var isHidingIdle = false
    /// A write has failed for want of space not long ago.
    var fullUntil = Instant.zero
    static let fullMilliseconds: UInt64 = 60_000
    /// One waits for room in the log.
    var needsRoom = false
    /// Whether layers are empty is asked once a tick.
    var isRemovalDue = false
    /// Regions of which something could not be read: until that can be, or is written over, they
    /// are answered for as if they were stuck.
    var unreadable: Set<UInt64> = []
    static let unreadableMax = 1024
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
