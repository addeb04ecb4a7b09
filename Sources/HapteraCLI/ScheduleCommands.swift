import ArgumentParser
import Foundation
import GRPCCore
import HapteraAPI
import HapteraHost

package struct ScheduleCommand: AsyncParsableCommand {
    package static let configuration = CommandConfiguration(
        commandName: "schedule", abstract: "Snapshots and scrubs at certain times.",
        subcommands: [
            Create.self, Update.self, List.self, Show.self, Pause.self, Resume.self, Delete.self,
        ])
    package init() {}
}

package struct CronArgument: Equatable, Sendable {
    package var text: String
    package init(typed: String) throws {
        do {
            text = try CronExpression(typed).text
        } catch {
            throw ValidationError(error.message)
        }
    }
}

extension ScheduleCommand {
    package struct Create: AsyncParsableCommand {
        package static let configuration = CommandConfiguration(
            abstract: "Create a schedule; the same arguments again change nothing.",
            discussion: """
                With --snapshot, each time takes a snapshot of every volume that is attached, and \
                then deletes those the schedule took before, but for the newest. Others are never \
                deleted. Times at which the controller was away are made up for once.
                """)

        @Argument(
            help:
                "The schedule's name: \(Names.labelRule); at most \(ScheduleLimits.nameLengthMax).",
            transform: Label.init(typed:))
        package var name: Label

        @Option(
            parsing: .unconditional, help: "When: \(CronExpression.rule).",
            transform: CronArgument.init(typed:))
        package var cron: CronArgument

        @Option(help: "Whose clocks, as in Europe/Berlin; default UTC.")
        package var timeZone = ZoneClock.utcName

        @Flag(help: "Take snapshots.")
        package var snapshot = false

        @Option(
            parsing: .unconditional,
            help:
                "Snapshots of each volume to keep, 1 to \(ScheduleLimits.retain.upperBound).")
        package var retain: UInt32?

        @Flag(help: "Scrub; volumes that share a node one after the other.")
        package var scrub = false

        @Flag(help: "All volumes, later ones too.")
        package var all = false

        @Option(
            help: "Volumes whose labels match at that time: \(LabelSelector.rule).",
            transform: SelectorArgument.init(typed:))
        package var selector: SelectorArgument?

        @Option(
            name: .long, parsing: .singleValue, help: "A volume; may be repeated.",
            transform: Label.init(typed:))
        package var volume: [Label] = []

        @OptionGroup package var options: GlobalOptions
        package init() {}

        package func validate() throws {
            guard snapshot != scrub else {
                throw ValidationError("say what to do: --snapshot or --scrub")
            }
            if snapshot, !ScheduleLimits.retain.contains(Int(retain ?? 0)) {
                throw ValidationError(
                    "say how many snapshots of each volume to keep: --retain N, 1 to "
                        + "\(ScheduleLimits.retain.upperBound)")
            }
            if scrub, retain != nil { throw ValidationError("--retain goes with --snapshot") }
            let choices = [all, selector != nil, !volume.isEmpty]
            guard choices.count(where: { $0 }) == 1 else {
                throw ValidationError("say which volumes: --all, --selector or --volume")
            }
            if selector?.text.isEmpty == true {
                throw ValidationError("the selector is empty: say --all if that is meant")
            }
        }

        package var specification: Haptera_V1_ScheduleSpecification {
            var specification = Haptera_V1_ScheduleSpecification()
            specification.name = name.text
            specification.cron = cron.text
            specification.timeZone = timeZone
            specification.action = snapshot ? .snapshot : .scrub
            specification.retain = retain ?? 0
            specification.all = all
            specification.selector = selector?.text ?? ""
            specification.volumes = volume.map(\.text)
            return specification
        }

        package func run() async throws {
            try await Session.run(options) { session in
                let schedule = try await session.change {
                    var request = Haptera_V1_CreateScheduleRequest()
                    request.specification = specification
                    return try await session.schedules.createSchedule(
                        request, options: session.callOptions)
                }
                session.say(Presentation.value(schedule), quiet: name.text) { _ in
                    Presentation.created(schedule)
                }
            }
        }
    }

    package struct List: AsyncParsableCommand {
        package static let configuration = CommandConfiguration(abstract: "List all schedules.")

        @Flag(help: "List again whenever something changes.")
        package var watch = false

        @OptionGroup package var options: GlobalOptions
        package init() {}

        package func run() async throws {
            try await Session.run(options) { session in
                try await session.list(watch: watch) {
                    let schedules = try await session.schedules.listSchedules(
                        Haptera_V1_ListSchedulesRequest(), options: session.watchOptions
                    ).schedules
                    return (
                        .list(schedules.map { Presentation.value($0) }),
                        names: schedules.map(\.specification.name).joined(separator: "\n"),
                        Presentation.table(schedules)
                    )
                }
            }
        }
    }

    package struct Show: AsyncParsableCommand {
        package static let configuration = CommandConfiguration(
            abstract: "Show a schedule, and what became of its volumes the last time.")

        @Argument(help: "The schedule's name.", transform: Label.init(typed:))
        package var name: Label

        @OptionGroup package var options: GlobalOptions
        package init() {}

        package func run() async throws {
            try await Session.run(options) { session in
                let schedule = try await session.schedules.getSchedule(
                    Self.request(name), options: session.callOptions)
                session.say(Presentation.value(schedule), quiet: name.text) { _ in
                    Presentation.details(schedule)
                }
            }
        }

        static func request(_ name: Label) -> Haptera_V1_ScheduleRequest {
            var request = Haptera_V1_ScheduleRequest()
            request.name = name.text
            return request
        }
    }

    package struct Pause: AsyncParsableCommand {
        package static let configuration = CommandConfiguration(
            abstract: "Let a schedule rest until it is resumed; a scrub that goes on goes on.")

        @Argument(help: "The schedule's name.", transform: Label.init(typed:))
        package var name: Label

        @OptionGroup package var options: GlobalOptions
        package init() {}

        package func run() async throws {
            try await Session.run(options) { session in
                let schedule = try await session.change {
                    try await session.schedules.pauseSchedule(
                        Show.request(name), options: session.callOptions)
                }
                session.say(Presentation.value(schedule), quiet: name.text) { _ in
                    "schedule \(name.text) is paused"
                }
            }
        }
    }

    package struct Resume: AsyncParsableCommand {
        package static let configuration = CommandConfiguration(
            abstract: "Let a schedule go on with its next time; past ones are not made up for.")

        @Argument(help: "The schedule's name.", transform: Label.init(typed:))
        package var name: Label

        @OptionGroup package var options: GlobalOptions
        package init() {}

        package func run() async throws {
            try await Session.run(options) { session in
                let schedule = try await session.change {
                    try await session.schedules.resumeSchedule(
                        Show.request(name), options: session.callOptions)
                }
                session.say(Presentation.value(schedule), quiet: name.text) { _ in
                    "schedule \(name.text) goes on; next: \(Presentation.next(schedule))"
                }
            }
        }
    }

    package struct Delete: AsyncParsableCommand {
        package static let configuration = CommandConfiguration(
            abstract: "Delete a schedule; the snapshots it took stay.")

        @Argument(help: "The schedule's name.", transform: Label.init(typed:))
        package var name: Label

        @OptionGroup package var options: GlobalOptions
        package init() {}

        package func run() async throws {
            try await Session.run(options) { session in
                var attempts = 0
                do {
                    _ = try await session.change { () -> Haptera_V1_DeleteScheduleResponse in
                        attempts += 1
                        return try await session.schedules.deleteSchedule(
                            Show.request(name), options: session.callOptions)
                    }
                } catch let error as RPCError where error.code == .notFound && attempts > 1 {
                    throw Session.goneMeanwhile(error)
                }
                let value = OutputValue.object([
                    ("name", .text(name.text)), ("deleted", .flag(true)),
                ])
                session.say(value, quiet: name.text) { _ in
                    "schedule \(name.text) deleted; the snapshots it took stay"
                }
            }
        }
    }
}
