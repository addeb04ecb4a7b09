import ArgumentParser
import HapteraAPI
import HapteraHost

extension VolumeCommand {
    package struct Why: AsyncParsableCommand {
        package static let configuration = CommandConfiguration(
            abstract: "Say why a volume is as it is: its epochs, and who is out since when.",
            discussion: """
                Shows the last changes of the in-sync set, newest last, and those that say why a \
                replica is out. When the volume cannot be served: what it waits for, and what \
                each way on would lose.
                """)

        @Argument(help: "The volume's name.", transform: Label.init(typed:))
        package var name: Label

        @Flag(help: "Show every change there is a note of.")
        package var all = false

        @OptionGroup package var options: GlobalOptions
        package init() {}

        package func run() async throws {
            try await Session.run(options) { session in
                var request = Haptera_V1_ExplainVolumeRequest()
                request.name = name.text
                request.all = all
                let explanation = try await session.volumes.explainVolume(
                    request, options: session.callOptions)
                session.say(Presentation.value(explanation), quiet: explanation.waitsFor) { _ in
                    Presentation.text(explanation)
                }
            }
        }
    }
}

extension Presentation {
    package static func value(_ why: Haptera_V1_VolumeExplanation) -> OutputValue {
        .object([
            ("name", .text(why.name)),
            ("id", .text(why.id)),
            ("epoch", .number(why.epoch)),
            ("changes", .list(why.changes.map(value))),
            ("away", .list(why.away.map(value))),
            ("waitsFor", .optional(why.waitsFor)),
            ("choices", .list(why.choices.map(value))),
            ("advice", .optional(why.advice)),
        ])
    }

    private static func value(_ change: Haptera_V1_VolumeChange) -> OutputValue {
        .object([
            ("epoch", .number(change.epoch)),
            ("time", time(change.timeUnixMilliseconds)),
            ("kind", .text(change.kind)),
            ("text", .text(change.text)),
            ("inSync", .list(change.inSync.map { .text($0) })),
        ])
    }

    private static func value(_ replica: Haptera_V1_ReplicaAway) -> OutputValue {
        .object([
            ("id", .text(replica.replicaID)),
            ("node", .optional(replica.node)),
            ("leftEpoch", epoch(replica.leftEpoch)),
            ("leftTime", time(replica.leftUnixMilliseconds)),
            ("reason", .optional(replica.reason)),
            ("kept", .flag(replica.kept)),
            ("joining", .flag(replica.joining)),
            ("problem", .optional(replica.problem)),
            ("promisedEpoch", epoch(replica.promisedEpoch)),
            ("flushedEpoch", epoch(replica.flushedEpoch)),
        ])
    }

    static func value(_ choice: Haptera_V1_SalvageChoice) -> OutputValue {
        .object([
            ("id", .text(choice.replicaID)),
            ("node", .optional(choice.node)),
            ("lastEpoch", epoch(choice.lastEpoch)),
            ("leftTime", time(choice.leftUnixMilliseconds)),
            ("reason", .optional(choice.reason)),
            ("lostFromEpoch", epoch(choice.lostFromEpoch)),
            ("lostToEpoch", epoch(choice.lostToEpoch)),
            ("regionsMax", choice.problem.isEmpty ? .number(choice.regionsMax) : .null),
            ("measured", .flag(choice.measured)),
            ("lacksUnflushed", .flag(choice.lacksUnflushed)),
            ("rolledBack", .flag(choice.rolledBack)),
            ("problem", .optional(choice.problem)),
        ])
    }

    private static func epoch(_ epoch: UInt64) -> OutputValue {
        epoch == 0 ? .null : .number(epoch)
    }

    static func text(_ why: Haptera_V1_VolumeExplanation) -> String {
        let changes = why.changes.map { change in
            [
                "\(change.epoch)", plainTime(change.timeUnixMilliseconds), change.text,
                change.inSync.map { String($0.prefix(8)) }.joined(separator: " "),
            ]
        }
        var text = "volume \(why.name), epoch \(why.epoch)\n\n"
        text += TextTable(["EPOCH", "TIME", "WHAT", "IN SYNC AFTER IT"], changes).text
        for replica in why.away { text += "\n\n" + Self.text(replica) }
        if !why.waitsFor.isEmpty { text += "\n\nwaits for: \(why.waitsFor)" }
        if !why.choices.isEmpty { text += "\n\n" + table(why.choices).text }
        if !why.advice.isEmpty { text += "\n\n\(why.advice)" }
        return text
    }

    private static func text(_ replica: Haptera_V1_ReplicaAway) -> String {
        var text = "replica \(replica.replicaID)"
        if !replica.node.isEmpty { text += " on \(replica.node)" }
        if replica.leftEpoch > 0 {
            text += ": out since epoch \(replica.leftEpoch)"
            if replica.leftUnixMilliseconds > 0 {
                text += " (\(plainTime(replica.leftUnixMilliseconds)))"
            }
            text += ", because \(replica.reason)"
        }
        if replica.joining { text += "; it is being filled" }
        if replica.kept { text += "; kept after a salvage" }
        if replica.inspected {
            text += "\n    its copy has promised epoch \(replica.promisedEpoch)"
            if replica.flushedEpoch > 0 {
                text += " and flushed writes of epoch \(replica.flushedEpoch)"
            }
        } else {
            text += "\n    nobody could look into its copy: \(replica.problem)"
        }
        return text
    }

    static func table(_ choices: [Haptera_V1_SalvageChoice]) -> TextTable {
        TextTable(
            ["CHOICE", "NODE", "LEFT IN EPOCH", "LEFT AT", "WOULD LOSE AT MOST"],
            choices.map { choice in
                [
                    choice.replicaID, choice.node, "\(choice.lastEpoch + 1)",
                    plainTime(choice.leftUnixMilliseconds), loss(choice),
                ]
            })
    }

    static func plainTime(_ milliseconds: Int64) -> String {
        guard case .text(let text) = time(milliseconds) else { return "" }
        return text
    }
}
