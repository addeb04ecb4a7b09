import Foundation
import GRDB
import HapteraAPI
import HapteraCore
import HapteraHost

/// What a schedule does to each of its volumes.
package enum ScheduleKind: String, Codable, Sendable {
    case snapshot
    case scrub
}

/// A schedule as it was asked for, checked, and how far it is.
package struct ScheduleRow: Codable, Equatable, Sendable, FetchableRecord, PersistableRecord {
    package static let databaseTableName = "schedules"
    package static let volumesMax = 256
    /// Of the snapshots it took, set by the controller: its name.
    package static let label = "\(Labels.reservedPrefix)/schedule"

    package var name: String
    package var cron: String
    package var timeZone: String
    package var action: ScheduleKind
    /// Snapshots of each volume to keep; 0 for a scrub.
    package var retain: Int
    /// Empty, as `volumes`: no choice by labels (or names). Both: all volumes.
    package var selector: String
    /// Names in order, with spaces between.
    package var volumes: String
    package var isPaused = false
    package var createdMilliseconds: Int64
    /// The time it acted for last; 0: none yet.
    package var lastMilliseconds: Int64 = 0
    /// When it acts next. Times at which the controller was away count as one: the last of them.
    package var nextMilliseconds: Int64

    package init(
        name: String, cron: String, timeZone: String = ZoneClock.utcName, action: ScheduleKind,
        retain: Int = 0, selector: String = "", volumes: [String] = [], now: Int64
    ) throws(ControlError) {
        guard Names.isValidLabel(name), name.utf8.count <= ScheduleLimits.nameLengthMax
        else {
            throw ControlError(
                .invalid,
                "'\(name.prefix(100))' is no schedule name: use \(Names.labelRule), and at most "
                    + "\(ScheduleLimits.nameLengthMax) of them")
        }
        self.name = name
        self.cron = cron
        self.timeZone = timeZone
        self.action = action
        self.retain = retain
        self.selector = selector
        self.volumes = Set(volumes).sorted().joined(separator: " ")
        createdMilliseconds = now
        nextMilliseconds = 0
        self.cron = try times.cron.text
        try reckonNext(after: now)
    }

    /// Refuses what is not meant: what a request says is all or nothing.
    package init(
        _ wanted: Haptera_V1_ScheduleSpecification, now: Int64
    ) throws(ControlError) {
        let kind: ScheduleKind
        switch wanted.action {
        case .snapshot: kind = .snapshot
        case .scrub: kind = .scrub
        case .unspecified, .UNRECOGNIZED:
            throw ControlError(.invalid, "a schedule takes snapshots or scrubs: say which")
        }
        let retain = Int(wanted.retain)
        guard kind == .snapshot ? ScheduleLimits.retain.contains(retain) : retain == 0 else {
            throw ControlError(
                .invalid,
                kind == .snapshot
                    ? "a schedule keeps 1 to \(ScheduleLimits.retain.upperBound) snapshots of each "
                        + "volume, not \(retain)"
                    : "a schedule that scrubs has no snapshots to keep")
        }
        let choices = [wanted.all, !wanted.selector.isEmpty, !wanted.volumes.isEmpty]
        guard choices.count(where: { $0 }) == 1 else {
            throw ControlError(
                .invalid, "a schedule is for all volumes, for a selector or for those named: one")
        }
        _ = try Controller.selector(wanted.selector)
        guard wanted.volumes.count <= Self.volumesMax else {
            throw ControlError(
                .invalid, "a schedule names at most \(Self.volumesMax) volumes: use a selector")
        }
        for name in wanted.volumes where !Names.isValidLabel(name) {
            throw ControlError(
                .invalid, "'\(name.prefix(100))' is no volume name: use \(Names.labelRule)")
        }
        try self.init(
            name: wanted.name, cron: wanted.cron,
            timeZone: wanted.timeZone.isEmpty ? ZoneClock.utcName : wanted.timeZone, action: kind,
            retain: retain, selector: wanted.selector, volumes: wanted.volumes, now: now)
    }

    private var times: (cron: CronExpression, zone: ZoneClock) {
        get throws(ControlError) {
            guard let zone = ZoneClock(named: timeZone) else {
                throw ControlError(
                    .invalid,
                    "there is no time zone '\(timeZone.prefix(100))': use UTC, or a place as in "
                        + "Europe/Berlin")
            }
            do {
                return (try CronExpression(cron), zone)
            } catch {
                throw ControlError(.invalid, error.message)
            }
        }
    }

    /// Times up to `now` are past.
    mutating func reckonNext(after now: Int64) throws(ControlError) {
        let (cron, zone) = try times
        guard let next = cron.next(after: Int(now / 1000), in: zone) else {
            throw ControlError(.invalid, "'\(cron.text)' never comes")
        }
        nextMilliseconds = Int64(next) * 1000
    }

    /// The time to act for, if it has come. Of several that have passed, the last.
    func due(now: Int64) -> Int64? {
        guard !isPaused, nextMilliseconds <= now, let (cron, zone) = try? times else { return nil }
        let last = cron.last(notAfter: Int(now / 1000), in: zone).map { Int64($0) * 1000 }
        return max(last ?? nextMilliseconds, nextMilliseconds)
    }

    /// Without how far it is: whether two are the same schedule.
    func isSame(as other: ScheduleRow) -> Bool {
        name == other.name && cron == other.cron && timeZone == other.timeZone
            && action == other.action && retain == other.retain && selector == other.selector
            && volumes == other.volumes
    }

    /// What may be changed, in words; as many of all schedules of one kind.
    var clauses: [String] {
        let chosen =
            volumes.isEmpty
            ? (selector.isEmpty ? "all volumes" : "volumes with \(selector)") : "volumes \(volumes)"
        return (action == .snapshot ? ["\(retain) kept"] : [])
            + ["of \(chosen)", "at '\(cron)' \(timeZone)"]
    }

    func selects(_ volume: String, _ labels: [String: String]) -> Bool {
        if !volumes.isEmpty { return volumeNames.contains(volume) }
        guard let selector = try? LabelSelector(selector) else { return false }
        return selector.matches(labels)
    }

    package var volumeNames: [String] { volumes.split(separator: " ").map(String.init) }

    /// Of the snapshot for one time, so that what is asked for again is the same. With the time in
    /// UTC: `hourly-20261129-0500`.
    package func snapshotName(at milliseconds: Int64) -> String {
        let digits = Date(timeIntervalSince1970: Double(milliseconds / 1000))
            .formatted(.iso8601).filter(\.isNumber)
        return "\(name)-\(digits.prefix(8))-\(digits.dropFirst(8).prefix(4))"
    }

    package var message: Haptera_V1_Schedule {
        var message = Haptera_V1_Schedule()
        message.specification.name = name
        message.specification.cron = cron
        message.specification.timeZone = timeZone
        message.specification.action = action == .snapshot ? .snapshot : .scrub
        message.specification.retain = UInt32(retain)
        message.specification.all = selector.isEmpty && volumes.isEmpty
        message.specification.selector = selector
        message.specification.volumes = volumeNames
        message.paused = isPaused
        message.createdUnixMilliseconds = createdMilliseconds
        message.lastUnixMilliseconds = lastMilliseconds
        message.nextUnixMilliseconds = isPaused ? 0 : nextMilliseconds
        return message
    }
}

/// What became of one volume of a schedule, for the time it acted for last.
///
///     waiting ──▶ taken ──▶ done        snapshots: `taken` while older ones are to be deleted
///     waiting ──▶ running ──▶ done      scrubs; back to `waiting` if their engine forgot them
///        ▲                     │
///        └─────────────────────┘        the next time
package struct ScheduleRunRow: Codable, Equatable, Sendable, FetchableRecord {
    package enum State: String, Codable, Sendable {
        case waiting
        case running
        case taken
        case done
    }
    package var schedule: String
    package var volumeID: String
    /// The volume's name.
    package var volume: String
    package var fireMilliseconds: Int64
    package var state: State
    /// Since when it is in this state.
    package var stateMilliseconds: Int64
    /// What it waits for, or what went wrong; empty if nothing.
    package var message: String
    /// When it was done last, for whichever time; 0: never.
    package var doneMilliseconds: Int64
}

package struct StoredSchedule: Equatable, Sendable {
    package var row: ScheduleRow
    package var runs: [ScheduleRunRow]

    package var message: Haptera_V1_Schedule {
        var message = row.message
        message.runs = runs.map { run in
            var volume = Haptera_V1_ScheduledVolume()
            volume.volume = run.volume
            volume.state =
                switch run.state {
                case .waiting: .waiting
                case .running: .running
                case .taken: .taken
                case .done: .done
                }
            volume.reason = run.message
            volume.doneUnixMilliseconds = run.doneMilliseconds
            return volume
        }
        return message
    }
}
