/// How far a scrub has come, and what it found. Whoever keeps this can have another engine go on
/// with it.
package struct ScrubProgress: Equatable, BitwiseCopyable, Sendable {
    /// Chosen by whoever asked for it; zero: none was asked for.
    package var id: UInt64 = 0
    /// Every region below this one has been verified.
    package var region: UInt64 = 0
    /// Data blocks read and checked, on all members together.
    package var checked: UInt64 = 0
    /// Blocks of some member that did not match their checksums, could not be read, or differed.
    package var bad: UInt64 = 0
    /// Blocks rewritten from another member.
    package var repaired: UInt64 = 0
    /// Blocks of which no member has a copy to be trusted: left as they are.
    package var lost: UInt64 = 0
    /// Regions of which a member could not be asked.
    package var skipped: UInt64 = 0

    package init() {}

    /// More than there is to count: what it is added to does not overflow.
    private static let countMax: UInt64 = 1 << 56
    /// The fields in the order of `text`.
    private static var fields: [WritableKeyPath<ScrubProgress, UInt64>] {
        [\.id, \.region, \.checked, \.bad, \.repaired, \.lost, \.skipped]
    }
    /// One word: the numbers with colons between them.
    package var text: String {
        Self.fields.map { String(self[keyPath: $0]) }.joined(separator: ":")
    }
    package init?(text: String) {
        let words = text.split(separator: ":", omittingEmptySubsequences: false)
        guard words.count == Self.fields.count else { return nil }
        for (field, word) in zip(Self.fields, words) {
            guard let value = UInt64(word), field == \.id || value <= Self.countMax else {
                return nil
            }
            self[keyPath: field] = value
        }
        guard id != 0 else { return nil }
    }
}

/// A scrub as the control socket reports it.
package struct ScrubReport: Equatable, Sendable {
    package enum State: String, Sendable {
        case running
        /// Until the volume is whole, and nothing else is being done to it.
        case waiting
        case finished
    }
    package var state: State
    package var progress: ScrubProgress
    package var regionsTotal: UInt64
    /// Bytes checked on all members together.
    package var bytesPerSecond: UInt64
}

/// A region on its way through a scrub.
///
///     due -> asking -> due (the layers below) ... -> free: all members hold the same, and intact
///              |  \--> due: a member was lost, or a layer is gone
///              v
///           suspect -> judged: a job has its lock -> free
struct ScrubRegion: BitwiseCopyable {
    enum Stage: UInt8, BitwiseCopyable {
        case free
        case due
        case asking
        case suspect
        case judged
    }
    var stage = Stage.free
    var region: UInt64 = 0
    /// Where to go on; `.head`: from the top.
    var layer = LayerID.head
    /// Of what is asked.
    var slot: Int32 = -1
    var awaiting = SlotSet()
    var isSuspect = false
    var hasFirst = false
    var first = RegionVerification()
    /// Times a member was lost while it was asked.
    var failures: UInt8 = 0
    static let failuresMax: UInt8 = 3
}

struct ScrubState {
    static let regionsMax = 4
    /// Regions asked about at once: 4 GiB.
    static let mapRegions: UInt64 = 4096

    var progress = ScrubProgress()
    var isRunning = false
    /// The next region to look at.
    var cursor: UInt64 = 0
    /// Regions below this one are in the map.
    var mapEnd: UInt64 = 0
    var mapBegin: UInt64 = 0
    var mapAwaiting = SlotSet()
    var mapAttempt: UInt16 = 0
    // Speed, over a second.
    var bytesPerSecond: UInt64 = 0
    private var sampledAt = Instant.zero
    private var sampledBlocks: UInt64 = 0

    /// What was checked before belongs to nobody's speed here.
    mutating func begin(_ progress: ScrubProgress, at now: Instant) {
        self.progress = progress
        bytesPerSecond = 0
        sampledAt = now
        sampledBlocks = progress.checked
    }

    mutating func sample(_ now: Instant) {
        let elapsed = now.nanoseconds(since: sampledAt)
        guard elapsed >= 1_000_000_000 else { return }
        let blocks = progress.checked - min(sampledBlocks, progress.checked)
        bytesPerSecond = blocks * UInt64(Geometry.blockSize) * 1000 / (elapsed / 1_000_000)
        sampledAt = now
        sampledBlocks = progress.checked
    }
}
