import Foundation

/// What the clocks of a time zone show.
package struct ZoneClock: Sendable {
    /// Seconds east of UTC at a time, seconds since 1970.
    let offset: @Sendable (Int) -> Int

    init(offset: @escaping @Sendable (Int) -> Int) { self.offset = offset }

    package static let utc = ZoneClock { _ in 0 }
    package static let utcName = "UTC"

    /// `UTC`, or a place of the tz database as in `Europe/Berlin`. Nil if there is none.
    package init?(named name: String) {
        if name == Self.utcName {
            self = .utc
            return
        }
        // Foundation also takes abbreviations, which name a zone for half of the year.
        guard name.contains("/"), let zone = TimeZone(identifier: name) else { return nil }
        offset = { zone.secondsFromGMT(for: Date(timeIntervalSince1970: Double($0))) }
    }

    /// When clocks show a local time (seconds since 1970, as if it were UTC).
    enum Moment: Equatable {
        case once(Int)
        /// Clocks were put back: it comes twice.
        case twice(Int, Int)
        /// Clocks were put forward over it, at this time.
        case never(Int)
    }

    /// Further away than any offset: nothing changes the offset twice in so short a time.
    private static let margin = 36 * 3600

    func moment(_ local: Int) -> Moment {
        let before = offset(local - Self.margin)
        let after = offset(local + Self.margin)
        let early = local - before
        let late = local - after
        guard before != after else { return .once(early) }
        switch (offset(early) == before, offset(late) == after) {
        case (true, true): return .twice(early, late)
        case (true, false): return .once(early)
        case (false, true): return .once(late)
        case (false, false): return .never(change(after: late, through: early, from: before))
        }
    }

    /// The first second with another offset than `before`.
    private func change(after start: Int, through end: Int, from before: Int) -> Int {
        var (low, high) = (start, end)
        while high - low > 1 {
            let middle = low + (high - low) / 2
            if offset(middle) == before { low = middle } else { high = middle }
        }
        return high
    }

    /// The offset of a whole local day, or nil if it changes.
    func constantOffset(day: Int) -> Int? {
        let first = offset(day * 86_400 - Self.margin)
        return first == offset((day + 1) * 86_400 + Self.margin) ? first : nil
    }
}

extension CronExpression {
    /// Further than any expression that comes at all makes one wait: the first of February is a
    /// given weekday every 12 years at most.
    static let searchDaysMax = 40 * 366

    /// The first time after `time`, both in seconds since 1970. Nil: never.
    ///
    /// A local time that clocks are put forward over comes when they are; one that comes twice
    /// counts once. With hours that begin with `*`, it follows the hours that pass instead.
    package func next(after time: Int, in zone: ZoneClock) -> Int? {
        let start = Self.day(time + zone.offset(time)) - 1
        return days(from: start, by: 1) { day in
            times(on: day, in: zone).first { $0 > time }
        }
    }

    /// The last time not after `time`. Nil: none in the last 40 years.
    package func last(notAfter time: Int, in zone: ZoneClock) -> Int? {
        let start = Self.day(time + zone.offset(time)) + 1
        return days(from: start, by: -1) { day in
            times(on: day, in: zone).last { $0 <= time }
        }
    }

    /// Days since 1970-01-01 of a local time.
    private static func day(_ local: Int) -> Int {
        Int((Double(local) / 86_400).rounded(.down))
    }

    private func days(from start: Int, by step: Int, _ find: (Int) -> Int?) -> Int? {
        for count in 0..<Self.searchDaysMax {
            let day = start + count * step
            if matches(day: day), let time = find(day) { return time }
        }
        return nil
    }

    /// On one local day, in order.
    func times(on day: Int, in zone: ZoneClock) -> [Int] {
        let clock = hours.sorted().flatMap { hour in
            minutes.sorted().map { day * 86_400 + hour * 3600 + $0 * 60 }
        }
        if let offset = zone.constantOffset(day: day) { return clock.map { $0 - offset } }
        var times: Set<Int> = []
        for local in clock {
            switch zone.moment(local) {
            case .once(let time): times.insert(time)
            case .twice(let first, let second):
                times.insert(first)
                if followsHours { times.insert(second) }
            case .never(let change): if !followsHours { times.insert(change) }
            }
        }
        return times.sorted()
    }
}
