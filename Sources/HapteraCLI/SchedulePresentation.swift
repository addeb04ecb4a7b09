import Foundation
import HapteraAPI
import HapteraHost

/// Schedules as the CLI shows them.
extension Presentation {
    package static func value(_ schedule: Haptera_V1_Schedule) -> OutputValue {
        let wanted = schedule.specification
        return .object([
            ("name", .text(wanted.name)),
            ("cron", .text(wanted.cron)),
            ("timeZone", .text(wanted.timeZone)),
            ("action", .text(word(wanted.action))),
            ("retain", wanted.action == .snapshot ? .number(UInt64(wanted.retain)) : .null),
            ("all", .flag(wanted.all)),
            ("selector", .optional(wanted.selector)),
            ("volumes", .list(wanted.volumes.map { .text($0) })),
            ("paused", .flag(schedule.paused)),
            ("created", time(schedule.createdUnixMilliseconds)),
            ("last", time(schedule.lastUnixMilliseconds)),
            ("next", time(schedule.nextUnixMilliseconds)),
            (
                "runs",
                .list(
                    schedule.runs.map { run in
                        .object([
                            ("volume", .text(run.volume)), ("state", .text(word(run.state))),
                            ("reason", .optional(run.reason)),
                            ("done", time(run.doneUnixMilliseconds)),
                        ])
                    })
            ),
        ])
    }

    package static func table(_ schedules: [Haptera_V1_Schedule]) -> TextTable {
        TextTable(
            ["NAME", "CRON", "ZONE", "ACTION", "VOLUMES", "LAST", "NEXT"],
            schedules.map { schedule in
                let wanted = schedule.specification
                return [
                    wanted.name, wanted.cron, wanted.timeZone, action(wanted), volumes(wanted),
                    minute(schedule.lastUnixMilliseconds), next(schedule),
                ]
            })
    }

    package static func details(_ schedule: Haptera_V1_Schedule) -> String {
        let wanted = schedule.specification
        var lines = [
            "name:        \(wanted.name)", "cron:        \(wanted.cron) (\(wanted.timeZone))",
            "action:      \(action(wanted))", "volumes:     \(volumes(wanted))",
        ]
        if schedule.lastUnixMilliseconds > 0 {
            lines.append("last:        \(minute(schedule.lastUnixMilliseconds))")
        }
        lines.append("next:        \(next(schedule))")
        guard !schedule.runs.isEmpty else { return lines.joined(separator: "\n") }
        let runs = TextTable(
            ["VOLUME", "STATE", "DONE", "REASON"],
            schedule.runs.map {
                [$0.volume, word($0.state), minute($0.doneUnixMilliseconds), $0.reason]
            })
        return lines.joined(separator: "\n") + "\n\n" + runs.text
    }

    /// What `schedule create` says.
    package static func created(_ schedule: Haptera_V1_Schedule) -> String {
        let wanted = schedule.specification
        return "schedule \(wanted.name): \(action(wanted)), of \(volumes(wanted)); next: "
            + next(schedule)
    }

    /// In UTC, whatever the schedule's time zone.
    static func next(_ schedule: Haptera_V1_Schedule) -> String {
        schedule.paused ? "paused" : minute(schedule.nextUnixMilliseconds)
    }

    private static func minute(_ milliseconds: Int64) -> String {
        guard milliseconds > 0 else { return "" }
        return Date(timeIntervalSince1970: Double(milliseconds / 1000)).formatted(.iso8601)
    }

    private static func action(_ wanted: Haptera_V1_ScheduleSpecification) -> String {
        wanted.action == .snapshot ? "snapshot, keep \(wanted.retain)" : word(wanted.action)
    }

    private static func volumes(_ wanted: Haptera_V1_ScheduleSpecification) -> String {
        if wanted.all { return "all" }
        return wanted.volumes.isEmpty ? wanted.selector : wanted.volumes.joined(separator: ", ")
    }

    static func word(_ action: Haptera_V1_ScheduleAction) -> String {
        switch action {
        case .snapshot: "snapshot"
        case .scrub: "scrub"
        case .unspecified, .UNRECOGNIZED: "unknown"
        }
    }

    static func word(_ state: Haptera_V1_ScheduledVolume.State) -> String {
        switch state {
        case .waiting: "waiting"
        case .running: "running"
        case .taken: "taken"
        case .done: "done"
        case .unspecified, .UNRECOGNIZED: "unknown"
        }
    }
}
