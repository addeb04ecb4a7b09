import Foundation
import Testing

@testable import HapteraHost

@Suite struct CronTests {
    /// Seconds since 1970 of "2026-11-29 07:05" in UTC.
    private static func time(_ text: String) throws -> Int {
        let numbers = text.split { !$0.isNumber }.compactMap { Int($0) }
        var parts = DateComponents()
        (parts.year, parts.month, parts.day) = (numbers[0], numbers[1], numbers[2])
        (parts.hour, parts.minute) = (numbers[3], numbers[4])
        parts.second = numbers.count > 5 ? numbers[5] : 0
        var calendar = Calendar(identifier: .gregorian)
        calendar.timeZone = try #require(TimeZone(identifier: "UTC"))
        return Int(try #require(calendar.date(from: parts)).timeIntervalSince1970)
    }

    private static func text(_ time: Int?) -> String? {
        time.map { time in
            let text = Date(timeIntervalSince1970: Double(time)).formatted(.iso8601)
            return text.prefix(10) + " " + text.dropFirst(11).prefix(5)
        }
    }

    /// The next times, one after the other, in UTC.
    private func next(
        _ count: Int, _ cron: String, after start: String, in zone: String = "UTC"
    ) throws -> [String] {
        let expression = try CronExpression(cron)
        let clock = try #require(ZoneClock(named: zone))
        var time = try Self.time(start)
        var found: [String] = []
        for _ in 0..<count {
            guard let next = expression.next(after: time, in: clock) else { break }
            #expect(next > time)
            // Backwards it is the same sequence.
            #expect(expression.last(notAfter: next, in: clock) == next)
            if !found.isEmpty { #expect(expression.last(notAfter: next - 1, in: clock) == time) }
            found.append(try #require(Self.text(next)))
            time = next
        }
        return found
    }

    /// All after 2026-11-29 07:05, a Sunday.
    @Test(arguments: [
        ("* * * * *", ["2026-11-29 07:06", "2026-11-29 07:07"]),
        ("0 * * * *", ["2026-11-29 08:00", "2026-11-29 09:00"]),
        ("@hourly", ["2026-11-29 08:00", "2026-11-29 09:00"]),
        ("*/15 * * * *", ["2026-11-29 07:15", "2026-11-29 07:30", "2026-11-29 07:45"]),
        ("5-7,30 7 * * *", ["2026-11-29 07:06", "2026-11-29 07:07", "2026-11-29 07:30"]),
        ("10-40/15 7 * * *", ["2026-11-29 07:10", "2026-11-29 07:25", "2026-11-29 07:40"]),
        ("5 7 * * *", ["2026-11-30 07:05", "2026-12-01 07:05"]),
        ("@daily", ["2026-11-30 00:00", "2026-12-01 00:00"]),
        ("@midnight", ["2026-11-30 00:00"]),
        ("@weekly", ["2026-12-06 00:00", "2026-12-13 00:00"]),
        ("@monthly", ["2026-12-01 00:00", "2027-01-01 00:00"]),
        ("@yearly", ["2027-01-01 00:00"]), ("@ANNUALLY", ["2027-01-01 00:00"]),
        ("0 3 * * 0", ["2026-12-06 03:00"]), ("0 3 * * 7", ["2026-12-06 03:00"]),
        ("0 3 * * SUN", ["2026-12-06 03:00"]),
        ("0 3 * * fri-sun", ["2026-12-04 03:00", "2026-12-05 03:00", "2026-12-06 03:00"]),
        ("0 3 * * mon-fri/2", ["2026-11-30 03:00", "2026-12-02 03:00", "2026-12-04 03:00"]),
        ("0 3 * * */3", ["2026-12-02 03:00", "2026-12-05 03:00", "2026-12-06 03:00"]),
        ("0 0 31 * *", ["2026-12-31 00:00", "2027-01-31 00:00", "2027-03-31 00:00"]),
        ("0 0 29 2 *", ["2028-02-29 00:00", "2032-02-29 00:00"]),
        ("0 0 29 Feb *", ["2028-02-29 00:00"]),
        ("0 0 1 jan,jul *", ["2027-01-01 00:00", "2027-07-01 00:00"]),
        ("0 0 1 */5 *", ["2027-01-01 00:00", "2027-06-01 00:00", "2027-11-01 00:00"]),
        ("59 23 31 12 *", ["2026-12-31 23:59", "2027-12-31 23:59"]),
        ("  0\t12   1 1 *  ", ["2027-01-01 12:00"]),
    ])
    func times(_ cron: String, _ expected: [String]) throws {
        #expect(try next(expected.count, cron, after: "2026-11-29 07:05") == expected)
    }

    /// The 15th or a Monday, unless one of them begins with a star.
    @Test func daysOfTheMonthAndOfTheWeek() throws {
        let start = "2026-12-10 00:00"
        #expect(
            try next(4, "0 0 15 * mon", after: start) == [
                "2026-12-14 00:00", "2026-12-15 00:00", "2026-12-21 00:00", "2026-12-28 00:00",
            ])
        #expect(
            try next(2, "0 0 * * mon", after: start) == ["2026-12-14 00:00", "2026-12-21 00:00"])
        #expect(
            try next(2, "0 0 15 * *", after: start) == ["2026-12-15 00:00", "2027-01-15 00:00"])
        // Every second day, if it is a Monday.
        #expect(
            try next(3, "0 0 */2 * mon", after: start) == [
                "2026-12-21 00:00", "2027-01-11 00:00", "2027-01-25 00:00",
            ])
        // No such day of the month, but Mondays.
        #expect(try next(1, "0 0 30 2 mon", after: start) == ["2027-02-01 00:00"])
    }

    @Test func aHundredYearsWithoutLeapDay() throws {
        #expect(try next(1, "0 0 29 2 *", after: "2096-03-01 00:00") == ["2104-02-29 00:00"])
        // The longest wait there is: a Sunday that is the first of February.
        #expect(try next(1, "0 0 */31 2 0", after: "2093-02-02 00:00") == ["2099-02-01 00:00"])
        #expect(try next(1, "0 0 */31 2 0", after: "2099-02-02 00:00") == ["2105-02-01 00:00"])
    }

    @Test(arguments: [
        "", "* * * *", "* * * * * *", "@often", "@", "60 * * * *", "* 24 * * *", "* * 0 * *",
        "* * 32 * *", "* * * 0 *", "* * * 13 *", "* * * * 8", "-1 * * * *", "5-1 * * * *",
        "1- * * * *", "-5 * * * *", "1-2-3 * * * *", "*/0 * * * *", "*/60 * * * *", "*/ * * * *",
        "*/2/2 * * * *", "5/10 * * * *", "1, * * * *", ",1 * * * *", "a * * * *", "mon * * * *",
        "* * * mon *", "* * * * jan", "* * * * monday", "+1 * * * *", "001 * * * *", "1.5 * * * *",
        "** * * * *", "*1 * * * *", "١ * * * *", "0 0 30 2 *", "0 0 31 4,6,9,11 *", "0 0 31 2 *",
        "* * * * *;", String(repeating: "1,", count: 200) + "1 * * * *",
    ])
    func nonsenseIsRefused(_ cron: String) {
        #expect(throws: NotationError.self) { try CronExpression(cron) }
    }

    @Test func refusalsSayWhy() throws {
        #expect(
            throws: NotationError(
                "'60' is no minute: use 0 to 59, '*', a range as 0-2, or a step of one of these "
                    + "as */2")
        ) { try CronExpression("60 * * * *") }
        #expect(throws: NotationError("'0 0 30 2 *' never comes: no month of it has such a day")) {
            try CronExpression("0 0 30 2 *")
        }
    }

    // MARK: Time zones

    @Test func zones() throws {
        for name in ["UTC", "Europe/Berlin", "America/New_York", "Asia/Kolkata", "Etc/GMT+5"] {
            #expect(ZoneClock(named: name) != nil, "\(name)")
        }
        for name in ["", "EST", "CET", "GMT+5", "Europe/Nowhere", "europe/berlin", "../x", "/"] {
            #expect(ZoneClock(named: name) == nil, "\(name)")
        }
        #expect(
            try next(2, "0 3 * * *", after: "2026-11-29 07:05", in: "Asia/Kolkata")
                == ["2026-11-29 21:30", "2026-11-30 21:30"])
        #expect(
            try next(2, "0 3 * * sun", after: "2026-11-29 07:05", in: "Pacific/Auckland")
                == ["2026-12-05 14:00", "2026-12-12 14:00"])
    }

    /// Berlin, 2026-03-29: 02:00 becomes 03:00, at 01:00 UTC.
    @Test func clocksArePutForward() throws {
        func berlin(_ count: Int, _ cron: String, _ start: String) throws -> [String] {
            try next(count, cron, after: start, in: "Europe/Berlin")
        }
        #expect(
            try berlin(3, "30 2 * * *", "2026-03-27 12:00")
                == ["2026-03-28 01:30", "2026-03-29 01:00", "2026-03-30 00:30"])
        // What was skipped comes once, and not again when its hour is another's too.
        #expect(
            try berlin(3, "*/20 2,3 * * *", "2026-03-28 12:00")
                == ["2026-03-29 01:00", "2026-03-29 01:20", "2026-03-29 01:40"])
        #expect(
            try berlin(3, "0 * * * *", "2026-03-28 23:30")
                == ["2026-03-29 00:00", "2026-03-29 01:00", "2026-03-29 02:00"])
        #expect(
            try berlin(2, "0 3 * * *", "2026-03-28 12:00")
                == ["2026-03-29 01:00", "2026-03-30 01:00"])
        #expect(
            try berlin(3, "*/30 * * * *", "2026-03-29 00:00")
                == ["2026-03-29 00:30", "2026-03-29 01:00", "2026-03-29 01:30"])
    }

    /// Berlin, 2026-10-25: 03:00 becomes 02:00, at 01:00 UTC.
    @Test func clocksArePutBack() throws {
        func berlin(_ count: Int, _ cron: String, _ start: String) throws -> [String] {
            try next(count, cron, after: start, in: "Europe/Berlin")
        }
        #expect(
            try berlin(3, "30 2 * * *", "2026-10-24 12:00")
                == ["2026-10-25 00:30", "2026-10-26 01:30", "2026-10-27 01:30"])
        #expect(
            try berlin(4, "30 * * * *", "2026-10-24 23:45") == [
                "2026-10-25 00:30", "2026-10-25 01:30", "2026-10-25 02:30", "2026-10-25 03:30",
            ])
        #expect(
            try berlin(3, "0 2,3 * * *", "2026-10-24 12:00")
                == ["2026-10-25 00:00", "2026-10-25 02:00", "2026-10-26 01:00"])
    }

    /// Half an hour in Lord Howe; midnight itself in Beirut; a whole day in Samoa in 2011.
    @Test func oddChanges() throws {
        #expect(
            try next(3, "15 2 * * *", after: "2026-10-02 18:00", in: "Australia/Lord_Howe")
                == ["2026-10-03 15:30", "2026-10-04 15:15", "2026-10-05 15:15"])
        #expect(
            try next(3, "0 0 * * *", after: "2026-03-27 23:00", in: "Asia/Beirut")
                == ["2026-03-28 22:00", "2026-03-29 21:00", "2026-03-30 21:00"])
        #expect(
            try next(3, "0 12 * * *", after: "2011-12-29 00:00", in: "Pacific/Apia")
                == ["2011-12-29 22:00", "2011-12-30 10:00", "2011-12-30 22:00"])
    }

    /// Every time of two years, found one by one, backwards too.
    @Test(arguments: ["17 2 * * *", "0 */3 * * *", "30 1 * * 0"])
    func nothingIsLostOrDoubledOverTheYears(_ cron: String) throws {
        let expression = try CronExpression(cron)
        let clock = try #require(ZoneClock(named: "America/New_York"))
        let end = try Self.time("2028-01-01 00:00")
        var time = try Self.time("2026-01-01 00:00")
        var previous: Int?
        while let next = expression.next(after: time, in: clock), next < end {
            if let previous {
                #expect(expression.last(notAfter: next - 1, in: clock) == previous)
            }
            #expect(expression.next(after: next - 1, in: clock) == next)
            previous = next
            time = next
        }
        #expect(previous != nil)
    }
}
