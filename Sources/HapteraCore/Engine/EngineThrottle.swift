/// How fast a joiner may be filled beside clients' work (rule J).
///
/// The promise: while clients are active the 99th percentile of their latency stays within 1.5
/// times what it was before, or below a small bound. As the worst windows make the percentile of
/// the whole, they must be rare: a window above 1.25 times halves the rate, others raise it by a
/// sixteenth. It never falls below a floor, so that every copy ends, and without clients there is
/// no limit. Pure: it is told the time.
struct CopyThrottle {
    /// Bytes of regions per second. Redundancy comes back in a day and a half for 4 TiB, whatever
    /// clients do.
    static let floor: UInt64 = 32 << 20
    /// From here on there is no limit.
    static let ceiling: UInt64 = 1 << 30
    private static let beginning: UInt64 = 64 << 20
    /// For each of these another region may be under way.
    private static let ratePerRegion: UInt64 = 32 << 20
    /// Nanoseconds.
    private static let windowMin: UInt64 = 500_000_000
    private static let windowMax: UInt64 = 2_000_000_000
    /// What nobody notices, whatever it was before.
    private static let latencyUnnoticed: UInt64 = 1_000_000
    private static let samplesMin = 100
    /// Fewer operations in a window than this are no activity.
    private static let activityMin = 10

    /// The same for a scrub: 4 TiB in six days beside clients, in nine hours without. Other volumes
    /// on the same disks are not seen here.
    static let scrubRange: ClosedRange<UInt64> = (8 << 20)...(128 << 20)

    private(set) var rate = ceiling
    private var range = floor...ceiling
    private var reads = LatencyTrack()
    private var writes = LatencyTrack()
    private var windowStart = Instant.zero
    private var isCopying = false
    private var isActive = false
    /// Bytes that may be begun now; negative after a region was.
    private var credit: Int64 = 0
    private var creditAt = Instant.zero

    mutating func completed(isRead: Bool, nanoseconds: UInt64) {
        if isRead { reads.record(nanoseconds) } else { writes.record(nanoseconds) }
    }

    /// Time has passed; `isCopying`: a joiner is being filled; `isScrubbing`: or would be read.
    mutating func advance(_ now: Instant, isCopying: Bool, isScrubbing: Bool = false) {
        range = isScrubbing && !isCopying ? Self.scrubRange : Self.floor...Self.ceiling
        let isCopying = isCopying || isScrubbing
        if isCopying, !self.isCopying {
            rate = isActive ? min(Self.beginning, range.upperBound / 2) : range.upperBound
        }
        rate = min(rate, range.upperBound)
        self.isCopying = isCopying
        let elapsed = now.nanoseconds(since: windowStart)
        let samples = reads.count + writes.count
        guard elapsed >= Self.windowMax || elapsed >= Self.windowMin && samples >= Self.samplesMin
        else { return }
        windowStart = now
        isActive = samples >= Self.activityMin
        if !isCopying {
            reads.learn()
            writes.learn()
        } else if !isActive {
            rate = range.upperBound
        } else if reads.exceeds(Self.latencyUnnoticed) || writes.exceeds(Self.latencyUnnoticed) {
            rate = max(range.lowerBound, rate / 2)
        } else {
            rate = min(range.upperBound, rate / 16 * 17)
        }
        reads.reset()
        writes.reset()
    }

    /// Whether another region may be begun, `running` being under way.
    mutating func mayBegin(_ now: Instant, running: Int) -> Bool {
        guard rate < Self.ceiling else { return true }
        guard running < max(1, Int(rate / Self.ratePerRegion)) else { return false }
        // Time too short to be worth a byte counts later: however often this is asked, it adds up.
        let elapsed = min(now.nanoseconds(since: creditAt), 1_000_000_000)
        if elapsed >= 1_000_000 {
            creditAt = now
            credit += Int64(rate * (elapsed / 1000) / 1_000_000)
            credit = min(credit, Int64(max(UInt64(Geometry.regionSize), creditMax)))
        }
        return credit > 0
    }
    /// Asked every 50 ms at least; a scrub has little else that would have it asked.
    private var creditMax: UInt64 { range.upperBound < Self.ceiling ? rate / 20 : 0 }
    /// So much of what was begun was not there to be read.
    mutating func refund(bytes: Int) {
        if rate < Self.ceiling { credit = min(credit + Int64(bytes), Int64(Geometry.regionSize)) }
    }
    mutating func began(bytes: Int) {
        if rate < Self.ceiling { credit -= Int64(bytes) }
    }
}

/// Latencies of one kind of operation: of this window, and what was usual before.
private struct LatencyTrack {
    /// Four buckets per doubling, from 1 us on.
    private static let bucketCount = 112
    private let buckets = FixedArray(repeating: UInt32(0), count: bucketCount)
    private(set) var count = 0
    /// Nanoseconds; zero: unknown.
    private var usual: UInt64 = 0

    mutating func record(_ nanoseconds: UInt64) {
        buckets[Self.bucket(nanoseconds / 1000)] += 1
        count += 1
    }
    private static func bucket(_ microseconds: UInt64) -> Int {
        guard microseconds >= 4 else { return Int(microseconds) }
        let power = 63 - microseconds.leadingZeroBitCount
        let quarter = Int(microseconds >> UInt64(power - 2)) & 3
        return min(bucketCount - 1, (power - 1) * 4 + quarter)
    }
    /// The first latency beyond the bucket, nanoseconds.
    private static func end(_ bucket: Int) -> UInt64 {
        guard bucket >= 4 else { return UInt64(bucket + 1) * 1000 }
        let power = UInt64(bucket / 4 + 1)
        return (UInt64(4 + bucket % 4 + 1) << (power - 2)) * 1000
    }

    private var percentile99: UInt64 {
        var left = max(1, count / 100)
        for bucket in (0..<Self.bucketCount).reversed() {
            let here = Int(buckets[bucket])
            if here >= left { return Self.end(bucket) }
            left -= here
        }
        return 0
    }
    /// Too few samples say nothing about a percentile.
    private var isTelling: Bool { count >= 50 }

    /// The window was an ordinary one.
    mutating func learn() {
        guard isTelling else { return }
        usual = usual == 0 ? percentile99 : (3 * usual + percentile99) / 4
    }
    func exceeds(_ least: UInt64) -> Bool {
        isTelling && percentile99 > max(least, usual / 4 * 5)
    }
    mutating func reset() {
        guard count > 0 else { return }
        count = 0
        for bucket in 0..<Self.bucketCount { buckets[bucket] = 0 }
    }
}
