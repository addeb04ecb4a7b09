import HapteraCore

/// What was asked of a block and when.
struct CrashVersion: Equatable {
    /// Grows over the whole run.
    var id: UInt64
    var state: BlockState
    /// The block's content in state data.
    var value: UInt64
    var epoch: UInt64
    /// Known to be doubtful: not to be served until written again.
    var isDoubtful = false
    /// Answered with an error: it may be there, or some of it.
    var hasFailed = false
}

/// A client's view of one block.
struct CrashBlock {
    /// What a power cut may leave, oldest first; the first is durable.
    var versions = [CrashVersion(id: 0, state: .absent, value: 0, epoch: 0)]
    /// Index of the newest one acknowledged (all members have it), and an identity of its own.
    var current: UInt64 = 0
    /// Covered by a stable point: every member has it durably.
    var stable: UInt64 = 0
    var isBusy = false

    var newest: CrashVersion { versions[versions.count - 1] }
    /// What the replica's entry says.
    var known: CrashVersion { versions.last { !$0.hasFailed } ?? versions[0] }
    var acknowledged: CrashVersion {
        versions.last { $0.id <= current } ?? versions[0]
    }
    mutating func raiseFloor(_ id: UInt64) {
        if let place = versions.firstIndex(where: { $0.id == id }) { versions.removeFirst(place) }
    }
}

/// Which point a flush made durable, and what each block then held.
struct CrashFlush {
    var point: StablePoint
    var versions: [UInt64]
    /// What each block was on its way to hold.
    var newest: [UInt64]
    /// Regions of writes under way when it was sent.
    var outstanding: Set<Int>
}

/// What an image shows of one block.
struct CrashFound {
    var entry: BlockEntry
    var isDoubtful: Bool
    var value: UInt64
}

/// A layer of the chain. Its blocks lie side by side in `CrashOracle.blocks`, `stride` of them.
struct CrashSection {
    static let stride = CrashHost.regions * Geometry.blocksPerRegion
    let layer: LayerID
    /// Deleted: what it held is the next one's.
    var isDeleted = false
}

/// Everything asked of a replica and answered by it: decides whether what a crash has left is
/// lawful.
struct CrashOracle {
    /// Of all layers; a block's place here stands for it. (Behind the volume's end nothing is ever
    /// written.)
    var blocks: [CrashBlock]
    /// Ascending; the last is the head.
    var sections = [CrashSection(layer: CrashHost.firstLayer)]
    /// The layers of each epoch's record, from 1.
    var recorded: [[LayerID]] = []
    var lastID: UInt64 = 0
    /// Highest epoch asked for, and promised.
    var asked: UInt64 = 0
    var promised: UInt64 = 0
    var flushes: [CrashFlush] = []
    /// The directory was made; before, there may be nothing.
    var isCreated = false

    init() {
        blocks = Array(repeating: CrashBlock(), count: CrashSection.stride)
    }
    mutating func newID() -> UInt64 {
        lastID += 1
        return lastID
    }

    /// The version an image shows, or nil if that is unlawful. `isPower`: what no sync covered may
    /// be gone, but for versions from `flushed` on; otherwise only the process ended.
    func match(_ block: Int, _ found: CrashFound, isPower: Bool, flushed: UInt64 = 0)
        -> CrashVersion?
    {
        let history = blocks[block]
        let floor = max(
            flushed, isPower ? history.versions[0].id : history.acknowledged.id)
        let lawful = history.versions.filter { $0.id >= floor }
        if found.isDoubtful {
            let isLawful = lawful.dropFirst().contains { $0.state == .data || $0.isDoubtful }
            guard isLawful || lawful[0].isDoubtful else { return nil }
            return CrashVersion(
                id: history.newest.id, state: .data, value: 0, epoch: history.newest.epoch,
                isDoubtful: true)
        }
        // The oldest that looks so: nothing more is known to have happened.
        return lawful.first {
            !$0.isDoubtful && $0.state == found.entry.state && $0.value == found.value
        }
    }

    func describe(_ block: Int, isPower: Bool) -> String {
        let history = blocks[block]
        let floor = isPower ? history.versions[0].id : history.acknowledged.id
        let text = history.versions.filter { $0.id >= floor }.map { version in
            version.isDoubtful
                ? "doubt" : version.state == .data ? "\(version.id)" : "\(version.state)"
        }
        return text.joined(separator: " ")
    }

    /// The version of a block a flush has made durable when it is answered: the replica waits for
    /// the writes it got before.
    func covered(_ block: Int, by flush: CrashFlush) -> UInt64 {
        let newest = flush.newest[block]
        guard has(block, answered: newest) else { return flush.versions[block] }
        return newest
    }
    private func has(_ block: Int, answered id: UInt64) -> Bool {
        blocks[block].current >= id
            && !blocks[block].versions.contains { $0.id == id && $0.hasFailed }
    }

    /// The region must be in the activity log: another copy may lawfully differ from this one.
    func mustBeActive(_ block: Int, _ found: CrashVersion) -> Bool {
        let history = blocks[block]
        return found.isDoubtful || found.id > history.stable || history.current > history.stable
    }
}
