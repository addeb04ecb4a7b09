import Foundation

/// Times that repeat, in the notation of cron: minute, hour, day of the month, month, day of the
/// week. Pure: what a zone's clocks show is asked of `ZoneClock`.
///
/// As in Vixie's cron: if the days of the month and those of the week are both restricted, a day
/// that is either will do; a field that begins with `*` restricts nothing in that sense.
package struct CronExpression: Equatable, Sendable {
    /// As it was written.
    package let text: String
    let minutes: Set<Int>
    let hours: Set<Int>
    let days: Set<Int>
    let months: Set<Int>
    /// 0: Sunday.
    let weekdays: Set<Int>
    /// Hours begin with `*`: it follows the hours that pass, not those on the clock.
    let followsHours: Bool
    let hasAnyDay: Bool
    let hasAnyWeekday: Bool

    package static let rule =
        "MINUTE HOUR DAY MONTH WEEKDAY, each '*' or numbers, with lists (1,15), ranges (1-5) and "
        + "steps (*/10, 0-30/5), months and weekdays also by name (jan, mon); or @hourly, @daily, "
        + "@weekly, @monthly, @yearly"
    static let textLengthMax = 200

    private static let calendar: Calendar = {
        var calendar = Calendar(identifier: .gregorian)
        calendar.timeZone = .gmt
        return calendar
    }()

    private static let shorthands = [
        "@hourly": "0 * * * *", "@daily": "0 0 * * *", "@midnight": "0 0 * * *",
        "@weekly": "0 0 * * 0", "@monthly": "0 0 1 * *", "@yearly": "0 0 1 1 *",
        "@annually": "0 0 1 1 *",
    ]

    package init(_ text: String) throws(NotationError) {
        guard text.utf8.count <= Self.textLengthMax else {
            throw NotationError("a cron expression has at most \(Self.textLengthMax) characters")
        }
        let written = text.split { $0 == " " || $0 == "\t" }.joined(separator: " ").lowercased()
        let fields = (Self.shorthands[written] ?? written).split(separator: " ").map(String.init)
        guard fields.count == 5 else {
            throw NotationError("'\(text)' is no cron expression: write \(Self.rule)")
        }
        self.text = written
        minutes = try CronField.minute.values(fields[0])
        hours = try CronField.hour.values(fields[1])
        days = try CronField.day.values(fields[2])
        months = try CronField.month.values(fields[3])
        weekdays = Set(try CronField.weekday.values(fields[4]).map { $0 % 7 })
        followsHours = fields[1].hasPrefix("*")
        hasAnyDay = fields[2].hasPrefix("*")
        hasAnyWeekday = fields[4].hasPrefix("*")
        guard next(after: 0, in: .utc) != nil else {
            throw NotationError("'\(text)' never comes: no month of it has such a day")
        }
    }

    /// `day`: days since 1970-01-01.
    func matches(day: Int) -> Bool {
        let date = Date(timeIntervalSince1970: Double(day) * 86_400)
        let parts = Self.calendar.dateComponents([.month, .day, .weekday], from: date)
        guard let month = parts.month, let dayOfMonth = parts.day, let weekday = parts.weekday,
            months.contains(month)
        else { return false }
        let isDay = days.contains(dayOfMonth)
        // The calendar's Sunday is 1.
        let isWeekday = weekdays.contains(weekday - 1)
        return hasAnyDay || hasAnyWeekday ? isDay && isWeekday : isDay || isWeekday
    }
}

/// One of the five fields.
struct CronField {
    let name: String
    let range: ClosedRange<Int>
    var names: [String] = []

    static let minute = CronField(name: "minute", range: 0...59)
    static let hour = CronField(name: "hour", range: 0...23)
    static let day = CronField(name: "day of the month", range: 1...31)
    static let month = CronField(
        name: "month", range: 1...12,
        names: [
            "jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec",
        ])
    /// Sunday is 0 and 7.
    static let weekday = CronField(
        name: "day of the week", range: 0...7,
        names: ["sun", "mon", "tue", "wed", "thu", "fri", "sat"])

    func values(_ text: String) throws(NotationError) -> Set<Int> {
        var values: Set<Int> = []
        for part in text.split(separator: ",", omittingEmptySubsequences: false) {
            values.formUnion(try run(String(part)))
        }
        return values
    }

    /// `*`, a number, or a range; a step behind any but the number.
    private func run(_ part: String) throws(NotationError) -> [Int] {
        let halves = part.split(separator: "/", omittingEmptySubsequences: false)
        var step = 1
        if halves.count > 1 {
            guard halves.count == 2, let number = Self.number(halves[1]),
                (1...range.upperBound).contains(number)
            else { throw objection(part) }
            step = number
        }
        let bounds: ClosedRange<Int>
        if halves[0] == "*" {
            // Not both names of Sunday: a step would count it twice.
            bounds = range.upperBound == 7 ? 0...6 : range
        } else {
            let ends = halves[0].split(separator: "-", omittingEmptySubsequences: false)
            guard ends.count <= 2, ends.count == 2 || halves.count == 1,
                let first = value(ends[0]), var last = value(ends[ends.count - 1])
            else { throw objection(part) }
            // Weeks may end on Sunday.
            if range.upperBound == 7, last == 0, first > 0, ends.count == 2 { last = 7 }
            guard first <= last else { throw objection(part) }
            bounds = first...last
        }
        return Array(stride(from: bounds.lowerBound, through: bounds.upperBound, by: step))
    }

    private func value(_ text: Substring) -> Int? {
        if let index = names.firstIndex(of: String(text)) { return index + range.lowerBound }
        guard let number = Self.number(text), range.contains(number) else { return nil }
        return number
    }

    private static func number(_ text: Substring) -> Int? {
        guard (1...2).contains(text.utf8.count), text.utf8.allSatisfy({ (48...57).contains($0) })
        else { return nil }
        return Int(text)
    }

    private func objection(_ part: String) -> NotationError {
        NotationError(
            "'\(part)' is no \(name): use \(range.lowerBound) to \(range.upperBound), '*', a range "
                + "as \(range.lowerBound)-\(range.lowerBound + 2), or a step of one of these "
                + "as */2")
    }
}

/// What a schedule may be, whoever checks it.
package enum ScheduleLimits {
    /// So that the name of its snapshots, which end in 14 characters that say when, has its place.
    package static let nameLengthMax = 48
    /// Snapshots of each volume to keep.
    package static let retain = 1...1000
}
