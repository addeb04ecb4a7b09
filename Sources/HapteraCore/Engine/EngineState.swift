// The plain values `EngineCore` keeps its state in: no references, no arrays, so that a step
// allocates nothing.

/// What a volume's engine is told when it starts.
package struct EngineConfiguration: Sendable {
    package var volume: VolumeID
    /// This process's start: random, never zero.
    package var instance: InstanceID
    /// Where clients reach this engine; recorded, not used.
    package var endpoint: String
    /// The attachment this engine serves. The same number as before means: the client survived.
    package var clientGeneration: UInt64
    /// Makes the nonces of the record's changes; any random number.
    package var nonceSeed: UInt64
    /// A member that owes an answer for this long is removed from the in-sync set.
    package var removalDeadlineMilliseconds: UInt64 = 3000
    /// A flush is sent by itself this long after the first write it covers.
    package var flushIntervalMilliseconds: UInt64 = 5000
    /// How long a member's answer, counted from when it was asked, lets the engine serve reads and
    /// acknowledge writes. At most the removal deadline.
    package var leaseMilliseconds: UInt32 = VolumeRecord.leaseMillisecondsDefault
    /// A member that was asked nothing for this long is asked for a sign of life.
    package var renewMilliseconds: UInt64 = 150
    /// A request held for this long is answered with an error; 0: it is held until it can be done.
    package var ioTimeoutMilliseconds: UInt64 = 0
    /// A write of nothing but zeroes is stored as zero state, which takes no space.
    package var detectsZeroes = false
    /// Acknowledge only while so many members are in sync; nil: what the record says.
    package var minInSync: UInt8?
    /// Regions made equal at a time: enough that neither disk nor wire waits for the other. 1 MiB
    /// of buffers each.
    package var jobsMax = 16
    /// An engine known to have ended (its process was waited for): its leases need no waiting out.
    package var endedInstance = InstanceID.none

    package init(
        volume: VolumeID, instance: InstanceID, endpoint: String, clientGeneration: UInt64,
        nonceSeed: UInt64, removalDeadlineMilliseconds: UInt64 = 3000
    ) {
        self.volume = volume
        self.instance = instance
        self.endpoint = endpoint
        self.clientGeneration = clientGeneration
        self.nonceSeed = nonceSeed
        self.removalDeadlineMilliseconds = removalDeadlineMilliseconds
    }
}

/// A set of replica slots, one bit each. Its own type and no `OptionSet`: the generic set algebra
/// is not always specialised, and this is asked several times per operation.
package struct SlotSet: Equatable, BitwiseCopyable, Sendable, ExpressibleByArrayLiteral {
    package var rawValue: UInt8
    package init(rawValue: UInt8) { self.rawValue = rawValue }
    package init(_ slot: ReplicaSlot) { rawValue = 1 << UInt8(slot) }
    package init() { rawValue = 0 }
    package init(arrayLiteral elements: SlotSet...) {
        rawValue = 0
        for element in elements { rawValue |= element.rawValue }
    }
    package var isEmpty: Bool { rawValue == 0 }
    package var count: Int { rawValue.nonzeroBitCount }
    package func contains(_ slot: ReplicaSlot) -> Bool { rawValue & (1 << UInt8(slot)) != 0 }
    package func isSubset(of other: SlotSet) -> Bool { rawValue & ~other.rawValue == 0 }
    package func isDisjoint(with other: SlotSet) -> Bool { rawValue & other.rawValue == 0 }
    package func union(_ other: SlotSet) -> SlotSet { SlotSet(rawValue: rawValue | other.rawValue) }
    package func intersection(_ other: SlotSet) -> SlotSet {
        SlotSet(rawValue: rawValue & other.rawValue)
    }
    package func subtracting(_ other: SlotSet) -> SlotSet {
        SlotSet(rawValue: rawValue & ~other.rawValue)
    }
    package mutating func insert(_ other: SlotSet) { rawValue |= other.rawValue }
    package mutating func formUnion(_ other: SlotSet) { rawValue |= other.rawValue }
    package mutating func remove(_ other: SlotSet) { rawValue &= ~other.rawValue }
    /// The lowest slot in the set.
    package var first: ReplicaSlot? { rawValue == 0 ? nil : rawValue.trailingZeroBitCount }
    /// Takes the lowest slot out: `while let slot = set.popFirst()`.
    package mutating func popFirst() -> ReplicaSlot? {
        guard rawValue != 0 else { return nil }
        let slot = rawValue.trailingZeroBitCount
        rawValue &= rawValue - 1
        return slot
    }
}

/// Where an engine stands with its volume.
///
///     idle -> fetching -> claiming -> installing -> serving <-> (members change, still serving)
///                            ^                         |
///                            +------- stalled <--------+   every member gone: take over again
///     any -> stopped
package enum EnginePhase: UInt8, BitwiseCopyable, Sendable {
    case idle
    /// Reading the record.
    case fetching
    /// Waiting for what the replicas have promised.
    case hearing
    /// Its compare-and-swap as the volume's engine is on the way.
    case claiming
    /// Waiting for every member's promise.
    case installing
    case serving
    /// No member is left to talk to; one must return.
    case stalled
    case stopped
}

/// One replica as the engine sees it.
struct ReplicaState: BitwiseCopyable {
    enum Link: UInt8, BitwiseCopyable {
        case down
        /// Connected; hello sent.
        case connected
        /// Hello answered.
        case greeted
    }
    var isConfigured = false
    var id = ReplicaID(rawValue: 0)
    var link = Link.down
    var incarnation = Incarnation(rawValue: 0)
    var instance = InstanceID.none
    /// Epoch of the last Install sent on this connection; frames behind it carry it.
    var sentEpoch = Epoch.zero
    /// Epoch the replica has promised on this connection.
    var installedEpoch = Epoch.zero
    var isRebooted = false
    /// Its process when this engine began to serve from members that all had rebooted, it among
    /// them: a process that lives has lost nothing since.
    var acceptedInstance = InstanceID.none
    /// What it had flushed when it left, if it was taken back since.
    var flushedBefore = StablePoint.zero
    /// What it said of itself when greeted.
    var promise = Epoch.zero
    /// It has promised or flushed less than it had: its directory is an older copy.
    var isRolledBack = false
    /// Of the record it keeps with that promise; zero: none.
    var promisedNonce: UInt64 = 0
    var size: UInt64 = 0
    /// It failed as a member or joiner and has not been removed, or come back, yet.
    var hasFailed = false
    /// Why it was given up last: what its removal records.
    var failure = VolumeRecord.DepartureReason.unknown
    /// The lowest promise it had before an Install of the takeover under way; nil: none was sent.
    var promiseBefore: Epoch?
    /// Highest point whose flush it has answered, and highest of which its mark is known durable.
    var answered = StablePoint.zero
    var marked = StablePoint.zero
    /// A flush on the way; its reply makes the mark of `probedPoint` durable.
    var probe = SequenceNumber.zero
    var probedPoint = StablePoint.zero
    /// It failed for want of space, and how long to wait then before it is filled again,
    /// milliseconds: longer each time.
    var isFull = false
    var fullBackoff: UInt64 = 0
    static let fullBackoffRange: ClosedRange<UInt64> = 1000...60_000
    /// It can't have another layer before it has merged some: so it said last, and only an Install
    /// makes them more.
    var isLayersFull = false
    /// Requests without an answer, and since when it owes one.
    var outstanding: Int32 = 0
    var owingSince = Instant.zero
    /// Until when it has promised not to serve another engine (L).
    var leaseUntil = Instant.zero
    /// When the Install of `sentEpoch` was first sent.
    var installSentAt = Instant.zero
    /// The ping without an answer, if there is one.
    var isPinging = false
    var pingSentAt = Instant.zero
    /// No new attempt to let it join before this.
    var joinAfter = Instant.zero
    /// Reads on the way, to spread them.
    var reads: Int32 = 0
    var readLatency = Latency()
    var writeLatency = Latency()
    /// Since when it is much slower than the others; zero: it is not.
    var slowSince = Instant.zero
    /// How long it stays away when it is removed for that, milliseconds.
    var slowPause: UInt64 = 0
}

/// What an operation slot is used for.
enum SlotUse: UInt8, BitwiseCopyable {
    case free
    case client
    /// A flush of the engine's own, to move the stable point.
    case flush
    /// A job's exclusive hold on a region.
    case job
    /// A second try of a read, of another member: holds no range of its own.
    case hedge
    /// Members are asked to verify a region: holds no range.
    case scrub
}

enum OperationPhase: UInt8, BitwiseCopyable {
    /// Behind an overlapping operation, an unresolved region, or until the volume is served.
    case waiting
    /// A write of part of a block fetches the rest of it.
    case readingEdges
    /// Sent to replicas (or, for a job, the region is locked).
    case inFlight
}

struct OperationSlot: BitwiseCopyable {
    var use = SlotUse.free
    var phase = OperationPhase.waiting
    var operation = Operation(kind: .flush, userData: 0)
    /// Raised whenever what is on the way for this slot stops mattering.
    var generation: UInt32 = 0
    /// Blocks held, within one region.
    var firstBlock: UInt64 = 0
    var endBlock: UInt64 = 0
    var sequence = SequenceNumber.zero
    /// When it was submitted.
    var since = Instant.zero
    /// The epoch it was sent in.
    var epoch = Epoch.zero
    /// Of what changes data: the head when it was sent. Sent again to one replica, it goes there.
    var layer = LayerID.head
    /// When what is on the way was sent first, for the leases its answers renew.
    var sentAt = Instant.zero
    /// What was asked for is here and may not be answered yet, for want of a lease.
    var isReady = false
    var isHole = false
    /// Of a status that is ready, bytes.
    var readyLength: Int32 = 0
    var sent = SlotSet()
    var replied = SlotSet()
    /// Who has no space for it.
    var full = SlotSet()
    /// No member had: since when, and when it is tried again; zero: not so.
    var fullSince = Instant.zero
    var retryAt = Instant.zero
    /// The slot of the read's hedge; -1: none, -2: it has had one.
    var hedge: Int32 = -1
    /// Of a hedge: the generation of the read it stands in for.
    var hedgedGeneration: UInt32 = 0
    /// Members already asked for a read.
    var tried = SlotSet()
    /// It has waited for its region's repair once.
    var wasRepaired = false
    var source: Int8 = -1
    /// Times a read arrived damaged although the replica had verified it.
    var transitErrors: UInt8 = 0
    static let transitErrorsMax: UInt8 = 3
    /// When it was submitted.
    var submittedAt = Instant.zero
    /// Its client was told of an error: it ends without another answer.
    var isExpired = false
    /// A reference of the core's own to the operation's buffer, which a reply may still arrive in.
    var retainsBuffer = false
    /// Its client is gone: it ends as it may, but does not begin again.
    var isOrphan = false
    /// The client has its answer; the slot is kept until the joiner has answered.
    var isAcknowledged = false
    /// The write's buffer is the core's own (unaligned zeroes), not the frontend's.
    var ownsBuffer = false
    /// Flushes may have passed this write by at some replica.
    var wasPassed = false
    /// Flush: everything was resolved when it was sent, so it may become the stable point.
    var mayStabilise = false
    /// Flush: some replica's reply does not cover all that was sent before.
    var isPartial = false
    var headEdge = BufferID.none
    var tailEdge = BufferID.none
    var edgesMissing: UInt8 = 0
    /// Bucket list, in order of arrival; `next` also links free slots.
    var next: Int32 = -1
    var previous: Int32 = -1

    var isRead: Bool { operation.kind == .read }
    var isFlush: Bool { operation.kind == .flush }
    /// Something that changes data is on the way and not known to be everywhere.
    var isChanging: Bool {
        guard phase == .inFlight, !isAcknowledged || isExpired, endBlock > firstBlock else {
            return false
        }
        return use == .job || use == .client && !isRead
    }
    func overlaps(_ other: OperationSlot) -> Bool {
        firstBlock < other.endBlock && other.firstBlock < endBlock
    }
}

/// A piece of resolution or rebuild: makes one region equal on its participants.
struct Job: BitwiseCopyable {
    enum Stage: UInt8, BitwiseCopyable {
        case free
        /// Waiting for the region's lock, or to start again once the membership is settled.
        case waiting
        case digesting
        case reading
        case writing
        /// A copy of a region that the joiner cannot hold: reading all of it.
        case fetching
        /// A copy: several runs are being read and written.
        case copying
        /// A copy that begins again when its writes on the way are answered.
        case draining
    }
    enum Kind: UInt8, BitwiseCopyable {
        /// Members against each other, after a takeover.
        case resolve
        /// Members against each other, after a read found a damaged block: like resolve, but bytes
        /// that nothing vouches for are never taken for data.
        case repair
        /// The joiner against a member.
        case copy
        /// Members against each other, for a scrub that suspects damage: what no member can be
        /// trusted with is left alone.
        case scrub
    }
    var stage = Stage.free
    var kind = Kind.resolve
    var region: UInt64 = 0
    /// The layer it is at, lowest first; those below are equal. `.head`: it has not begun.
    var layer = LayerID.head
    var slot: Int32 = -1
    var participants = SlotSet()
    /// Whose answers the current stage still needs.
    var awaiting = SlotSet()
    var source: Int8 = -1
    /// Members the layer cannot be copied from (a doubtful block): a copy tries another.
    var unfit = SlotSet()
    /// No member is fit: blocks that are damaged on the source shall be so on the joiner.
    var acceptsDamage = false
    /// Blocks were passed over that are damaged on the source, but perhaps not on the next one.
    var hasSkipped = false
    var nextBlock = 0
    var run = Run()
    var blocksCopied: UInt64 = 0
    /// Copy: frames on the way to the source and to the joiner.
    var readsOut = 0
    var writesOut = 0
    /// Copy: the whole region is in the job's buffer.
    var isFetched = false
    /// Copy: the joiner's birth of the region is too old, and nothing has been written to it yet.
    var isStampDue = false
    /// Scrub: of the layer at hand.
    var blocksBad = 0
    var blocksLost = 0
    /// Scrub: the one that suspects the region. Another may begin meanwhile.
    var scrub: UInt64 = 0
    /// Scrub: times a source could not read what it had just read.
    var retries: UInt8 = 0
    static let retriesMax: UInt8 = 3

    /// Blocks that get the same treatment.
    struct Run: BitwiseCopyable, Equatable {
        enum Action: UInt8, BitwiseCopyable {
            case none
            case copy
            case setState
            /// Every copy is doubtful: keep the bytes of `source`.
            case adopt
            /// No copy may be used.
            case impossible
            /// No member has the block's data: the joiner gets its checksum, and so its damage.
            case mark
        }
        var action = Action.none
        var state = BlockState.absent
        var source: Int8 = -1
        /// Of a `mark`, which is of one block.
        var checksum: UInt32 = 0
        var targets = SlotSet()
        var first = 0
        var count = 0
        var blocks: Range<Int> { first..<first + count }
        func continues(_ other: Run) -> Bool {
            action == other.action && action != .mark && state == other.state
                && source == other.source
                && targets == other.targets
        }
    }
}

/// What a takeover has done: regions compared, blocks that differed, how long it took from its
/// first service on.
package struct LastTakeover: BitwiseCopyable, Sendable {
    package var regions: UInt64 = 0
    package var blocks: UInt64 = 0
    package var milliseconds: UInt64 = 0
}

/// Where the filling of a joiner stands.
enum JoinStage: UInt8, BitwiseCopyable {
    case none
    /// Its record change or its promise is outstanding.
    case installing
    /// Asking which regions may hold anything.
    case mapping
    case copying
    /// Everything is copied: flushing it. From here on its reply is required.
    case flushing
    /// The record change that makes it a member is on the way.
    case promoting
}

/// Why the record is being changed.
enum ChangePurpose: UInt8, BitwiseCopyable {
    case takeover
    case remove
    case join
    case promote
    case detach
    case reinstate
    case snapshot
    case revert
    case deleteSnapshot
    case resize

    var recorded: VolumeRecord.Change {
        switch self {
        case .takeover: .takeover
        case .remove: .removal
        case .join: .join
        case .promote: .promotion
        case .detach: .detach
        case .reinstate: .reinstatement
        case .snapshot, .deleteSnapshot: .snapshot
        case .resize: .resize
        case .revert: .revert
        }
    }
}

/// What a read asked for.
struct BlocksOfLayer: Hashable {
    var layer: LayerID
    var first: UInt64
    var count: UInt64
}
