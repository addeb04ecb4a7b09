import ArgumentParser
import HapteraAPI
import HapteraHost

extension ScheduleCommand {
    package struct Update: AsyncParsableCommand {
        package static let configuration = CommandConfiguration(
            abstract: "Change what is named of a schedule; the rest stays.",
            discussion: """
                A new --cron or --time-zone counts from now on: times that have passed, and what \
                is not begun of one, are given up. With fewer snapshots to --retain, those beyond \
                are deleted when the next one is taken. Whether it takes snapshots or scrubs \
                cannot be changed.
                """)

        @Argument(help: "The schedule's name.", transform: Label.init(typed:))
        package var name: Label

        @Option(
            parsing: .unconditional, help: "When: \(CronExpression.rule).",
            transform: CronArgument.init(typed:))
        package var cron: CronArgument?

        @Option(help: "Whose clocks, as in Europe/Berlin.")
        package var timeZone: String?

        @Option(
            parsing: .unconditional,
            help:
                "Snapshots of each volume to keep, 1 to \(ScheduleLimits.retain.upperBound).")
        package var retain: UInt32?

        @Flag(help: "All volumes, later ones too, instead of those of before.")
        package var all = false

        @Option(
            help: "Volumes whose labels match, instead: \(LabelSelector.rule).",
            transform: SelectorArgument.init(typed:))
        package var selector: SelectorArgument?

        @Option(
            name: .long, parsing: .singleValue, help: "A volume, instead; may be repeated.",
            transform: Label.init(typed:))
        package var volume: [Label] = []

        @Flag(help: "As schedule pause.")
        package var pause = false

        @Flag(help: "As schedule resume.")
        package var resume = false

        @Flag(help: "It takes snapshots; refused if it does not.")
        package var snapshot = false

        @Flag(help: "It scrubs; refused if it does not.")
        package var scrub = false

        @OptionGroup package var options: GlobalOptions
        package init() {}

        package func validate() throws {
            if snapshot, scrub { throw ValidationError("a schedule takes snapshots, or scrubs") }
            if scrub, retain != nil { throw ValidationError("--retain goes with --snapshot") }
            if let retain, !ScheduleLimits.retain.contains(Int(retain)) {
                throw ValidationError(
                    "a schedule keeps 1 to \(ScheduleLimits.retain.upperBound) snapshots of each "
                        + "volume, not \(retain)")
            }
            let choices = [all, selector != nil, !volume.isEmpty].count { $0 }
            guard choices <= 1 else {
                throw ValidationError("say which volumes once: --all, --selector or --volume")
            }
            if selector?.text.isEmpty == true {
                throw ValidationError("the selector is empty: say --all if that is meant")
            }
            if pause, resume { throw ValidationError("--pause or --resume, not both") }
            guard
                choices == 1 || cron != nil || timeZone != nil || retain != nil || pause || resume
                    || snapshot || scrub
            else {
                throw ValidationError(
                    "say what to change: --cron, --time-zone, --retain, --all, --selector, "
                        + "--volume, --pause or --resume")
            }
        }

        package var request: Haptera_V1_UpdateScheduleRequest {
            var request = Haptera_V1_UpdateScheduleRequest()
            request.name = name.text
            if let cron { request.cron = cron.text }
            if let timeZone { request.timeZone = timeZone }
            if let retain { request.retain = retain }
            request.all = all
            if let selector { request.selector = selector.text }
            request.volumes = volume.map(\.text)
            if pause || resume { request.paused = pause }
            if snapshot || scrub { request.action = snapshot ? .snapshot : .scrub }
            return request
        }

        package func run() async throws {
            try await Session.run(options) { session in
                let schedule = try await session.change {
                    try await session.schedules.updateSchedule(
                        request, options: session.callOptions)
                }
                session.say(Presentation.value(schedule), quiet: name.text) { _ in
                    Presentation.created(schedule)
                }
            }
        }
    }
}
