/// What the replica is doing with a region it has in memory.
///
///     free -> loading -> clean -> activating -> active -> draining -> clean
///                        clean -> punching -> clean
///
/// Requests that a state does not admit wait on the frame and run again when it changes.
package enum FrameState: UInt8, BitwiseCopyable, Sendable {
    case free
    /// The page is being read.
    case loading
    /// Memory and table agree; may be evicted.
    case clean
    /// The activation is on its way to the disk; no data may be written yet.
    case activating
    /// In the activity log: memory may be ahead of the table.
    case active
    /// The page is on its way to the table; no write may start.
    case draining
    /// Space is being given back; no write may start.
    case punching
}

/// Blocks of a region, one bit each.
package struct BlockSet: BitwiseCopyable, Sendable {
    private var words: (UInt64, UInt64, UInt64, UInt64) = (0, 0, 0, 0)
    package init() {}
    package var isEmpty: Bool { words.0 | words.1 | words.2 | words.3 == 0 }
    package subscript(block: Int) -> Bool {
        get { word(block >> 6) >> UInt64(block & 63) & 1 != 0 }
        set {
            let bit: UInt64 = 1 << UInt64(block & 63)
            let value = newValue ? word(block >> 6) | bit : word(block >> 6) & ~bit
            switch block >> 6 {
            case 0: words.0 = value
            case 1: words.1 = value
            case 2: words.2 = value
            default: words.3 = value
            }
        }
    }
    private func word(_ index: Int) -> UInt64 {
        switch index {
        case 0: words.0
        case 1: words.1
        case 2: words.2
        default: words.3
        }
    }
    package var count: Int {
        words.0.nonzeroBitCount + words.1.nonzeroBitCount + words.2.nonzeroBitCount
            + words.3.nonzeroBitCount
    }
    /// The first run of blocks in the set, or nil if it is empty.
    package func firstRun() -> Range<Int>? {
        guard let start = (0..<Geometry.blocksPerRegion).first(where: { self[$0] }) else {
            return nil
        }
        var end = start
        while end < Geometry.blocksPerRegion, self[end] { end += 1 }
        return start..<end
    }
}

/// First-in first-out list of request slots, linked through the slots themselves.
package struct SlotQueue: BitwiseCopyable, Sendable {
    package var head: Int32 = -1
    package var tail: Int32 = -1
    package init() {}
    package var isEmpty: Bool { head < 0 }
}

/// One region of one layer in memory. Its 256 entries are beside it, in `TableCache.entries`.
package struct TableFrame: BitwiseCopyable, Sendable {
    package var region: UInt64 = 0
    package var layer = LayerID.head
    package var state: FrameState = .free
    /// Its slots in the table file exist: draining needs no space.
    package var hasSlots = false
    /// Found with a slot that is not valid: right for a region in the log, damage otherwise.
    package var isTorn = false
    /// Its page was asked for ahead of any need.
    package var isAhead = false
    /// Active, and renewing its activation so that the log's tail can move.
    package var isRenewing = false
    /// What a retired layer holds of the region is moved, from here or to here: no write starts,
    /// and the region stays in the log.
    package var isMerging = false
    /// A merge is about to begin, and both its regions must be in the log at once: it stays there.
    package var isHeldForMerge = false
    package var version: UInt64 = 0
    package var birth: Epoch = .zero
    /// Page's logIndex as loaded: used by replay.
    package var logIndex: UInt64 = 0
    /// First log record the region needs.
    package var firstIndex: UInt64 = 0
    /// Index of an activation on its way to the disk.
    package var pendingIndex: UInt64 = 0
    /// What a sync of the log has to cover before a pending activation is durable.
    package var pendingTicket: UInt64 = 0
    /// Highest point of a write to the region.
    package var lastWrite: StablePoint = .zero
    /// What a sync of the data file has to cover before the region's writes are durable.
    package var dataTicket: UInt64 = 0
    /// The same of its blocks' first data: of what was over nothing, or over a trim.
    package var freshTicket: UInt64 = 0
    /// What a sync of the table has to cover before the region's first slots are durable.
    package var slotsTicket: UInt64 = 0
    package var lastUse: Instant = .zero
    /// Requests with an operation of theirs under way: the frame must stay.
    package var pins: Int32 = 0
    package var writes: Int32 = 0
    package var waiters = SlotQueue()
    /// Blocks that need no space any more.
    package var unneeded = BlockSet()
    fileprivate var list: TableCache.List = .none
    fileprivate var isInLogList = false
    fileprivate var next: Int32 = -1
    fileprivate var previous: Int32 = -1
    fileprivate var logNext: Int32 = -1
    fileprivate var logPrevious: Int32 = -1
}

/// The regions a replica has in memory: a number of frames that only grows, found by layer and
/// region through a hash table, each in at most one list by use and, if active, in the list ordered
/// by first log record.
package final class TableCache {
    package enum List: UInt8, BitwiseCopyable, Sendable {
        case none
        /// Clean, least recently used first: the front is evicted.
        case clean
        /// Active, least recently used first.
        case active
        /// Clean, with space to give back.
        case punch
        /// Unused frames.
        case unused
    }
    private struct Ends: BitwiseCopyable {
        var head: Int32 = -1
        var tail: Int32 = -1
        var count = 0
    }

    package private(set) var frames: FixedArray<TableFrame>
    /// For as many frames as there may ever be: what is not used takes no memory, and growing
    /// copies none of it.
    private let entryMemory: MemoryBlock
    private let lists: FixedArray<Ends>
    private var buckets: FixedArray<Int32>
    /// Regions in the activity log (activating, active and draining).
    package private(set) var activeCount = 0
    package private(set) var oldestActive: Int32 = -1
    private var newestActive: Int32 = -1

    package init(frameCount: Int, most: Int = 0) {
        frames = FixedArray(repeating: TableFrame(), count: frameCount)
        entryMemory = MemoryBlock(count: max(most, frameCount) * TablePage.entriesSize)
        lists = FixedArray(repeating: Ends(), count: 5)
        buckets = Self.emptyBuckets(frameCount: frameCount)
        for frame in 0..<frameCount { move(Int32(frame), to: .unused) }
    }
    private static func emptyBuckets(frameCount: Int) -> FixedArray<Int32> {
        var count = 16
        while count < frameCount * 2 { count *= 2 }
        return FixedArray(repeating: -1, count: count)
    }

    /// More frames; those there are keep their numbers.
    package func grow(frameCount: Int) {
        let old = frames.count
        guard frameCount > old else { return }
        precondition(frameCount * TablePage.entriesSize <= entryMemory.memory.count)
        frames = frames.extended(to: frameCount, with: TableFrame())
        buckets = Self.emptyBuckets(frameCount: frameCount)
        for frame in 0..<old where frames[frame].state != .free { hash(Int32(frame)) }
        for frame in old..<frameCount { move(Int32(frame), to: .unused) }
    }

    package func entries(_ frame: Int32) -> RawMemory {
        entryMemory.memory.slice(Int(frame) * TablePage.entriesSize, TablePage.entriesSize)
    }
    package func entry(_ frame: Int32, _ block: Int) -> BlockEntry {
        guard let entry = BlockEntry(decoding: entries(frame), at: block * BlockEntry.size) else {
            preconditionFailure("an entry in memory is not valid")
        }
        return entry
    }
    package func setEntry(_ frame: Int32, _ block: Int, _ entry: BlockEntry) {
        entry.encode(to: entries(frame), at: block * BlockEntry.size)
    }

    // MARK: finding

    private func bucket(_ layer: LayerID, _ region: UInt64) -> Int {
        let mixed = LayerRegion(layer, region).packed &* 0x9E37_79B9_7F4A_7C15
        return Int(truncatingIfNeeded: mixed >> 32) & (buckets.count - 1)
    }
    package func find(_ layer: LayerID, _ region: UInt64) -> Int32? {
        var at = bucket(layer, region)
        while buckets[at] >= 0 {
            let frame = Int(buckets[at])
            if frames[frame].region == region, frames[frame].layer == layer { return buckets[at] }
            at = (at + 1) & (buckets.count - 1)
        }
        return nil
    }

    /// A frame for a region not in memory, in state `loading` and no list; evicts the clean frame
    /// used longest ago. Nil: all frames are needed.
    package func allocate(_ layer: LayerID, _ region: UInt64) -> Int32? {
        var frame = first(.unused)
        if frame < 0 {
            frame = first(.clean)
            guard frame >= 0 else { return nil }
            release(frame)
        }
        move(frame, to: .none)
        frames[Int(frame)] = TableFrame()
        frames[Int(frame)].region = region
        frames[Int(frame)].layer = layer
        frames[Int(frame)].state = .loading
        hash(frame)
        return frame
    }
    private func hash(_ frame: Int32) {
        var at = bucket(frames[Int(frame)].layer, frames[Int(frame)].region)
        while buckets[at] >= 0 { at = (at + 1) & (buckets.count - 1) }
        buckets[at] = frame
    }

    /// Forgets the region. It must be clean or loading, with nobody waiting.
    package func release(_ frame: Int32) {
        let index = Int(frame)
        precondition(frames[index].pins == 0 && frames[index].waiters.isEmpty)
        precondition(!frames[index].isInLogList)
        unhash(frame)
        move(frame, to: .unused)
        frames[index].state = .free
    }

    private func unhash(_ frame: Int32) {
        var at = bucket(frames[Int(frame)].layer, frames[Int(frame)].region)
        while buckets[at] != frame { at = (at + 1) & (buckets.count - 1) }
        // Close the gap: later entries of the run move up unless they would pass their own bucket.
        var gap = at
        while true {
            at = (at + 1) & (buckets.count - 1)
            guard buckets[at] >= 0 else { break }
            let found = frames[Int(buckets[at])]
            let home = bucket(found.layer, found.region)
            let distance = (at - home) & (buckets.count - 1)
            if distance >= (at - gap) & (buckets.count - 1) {
                buckets[gap] = buckets[at]
                gap = at
            }
        }
        buckets[gap] = -1
    }

    // MARK: lists by use

    package func first(_ list: List) -> Int32 { lists[Int(list.rawValue)].head }
    package func next(_ frame: Int32) -> Int32 { frames[Int(frame)].next }
    package func list(of frame: Int32) -> List { frames[Int(frame)].list }

    /// Takes the frame out of its list and appends it to `list`.
    package func move(_ frame: Int32, to list: List) {
        let index = Int(frame)
        let old = frames[index].list
        if old != .none {
            let previous = frames[index].previous
            let next = frames[index].next
            if previous >= 0 {
                frames[Int(previous)].next = next
            } else {
                lists[Int(old.rawValue)].head = next
            }
            if next >= 0 {
                frames[Int(next)].previous = previous
            } else {
                lists[Int(old.rawValue)].tail = previous
            }
        }
        frames[index].list = list
        frames[index].next = -1
        frames[index].previous = -1
        guard list != .none else { return }
        let tail = lists[Int(list.rawValue)].tail
        frames[index].previous = tail
        if tail >= 0 {
            frames[Int(tail)].next = frame
        } else {
            lists[Int(list.rawValue)].head = frame
        }
        lists[Int(list.rawValue)].tail = frame
    }

    // MARK: the list ordered by first log record

    package func nextActive(_ frame: Int32) -> Int32 { frames[Int(frame)].logNext }

    /// The frame is in the log from record `index` on.
    package func enterLog(_ frame: Int32, firstIndex index: UInt64) {
        precondition(!frames[Int(frame)].isInLogList)
        frames[Int(frame)].isInLogList = true
        frames[Int(frame)].firstIndex = index
        activeCount += 1
        insertByIndex(frame)
    }
    /// A newer activation and page replace the older records.
    package func renewInLog(_ frame: Int32, firstIndex index: UInt64) {
        unlinkFromLog(frame)
        frames[Int(frame)].firstIndex = index
        insertByIndex(frame)
    }
    package func leaveLog(_ frame: Int32) {
        precondition(frames[Int(frame)].isInLogList)
        unlinkFromLog(frame)
        frames[Int(frame)].isInLogList = false
        activeCount -= 1
    }
    private func insertByIndex(_ frame: Int32) {
        // Nearly always the newest; a renewed one passes the few activated since.
        var previous = newestActive
        while previous >= 0, frames[Int(previous)].firstIndex > frames[Int(frame)].firstIndex {
            previous = frames[Int(previous)].logPrevious
        }
        let next = previous >= 0 ? frames[Int(previous)].logNext : oldestActive
        frames[Int(frame)].logPrevious = previous
        frames[Int(frame)].logNext = next
        if previous >= 0 { frames[Int(previous)].logNext = frame } else { oldestActive = frame }
        if next >= 0 { frames[Int(next)].logPrevious = frame } else { newestActive = frame }
    }
    private func unlinkFromLog(_ frame: Int32) {
        let previous = frames[Int(frame)].logPrevious
        let next = frames[Int(frame)].logNext
        if previous >= 0 { frames[Int(previous)].logNext = next } else { oldestActive = next }
        if next >= 0 { frames[Int(next)].logPrevious = previous } else { newestActive = previous }
        frames[Int(frame)].logNext = -1
        frames[Int(frame)].logPrevious = -1
    }
}
