import ArgumentParser
import HapteraAPI
import HapteraHost

extension VolumeCommand {
    package struct Salvage: AsyncParsableCommand {
        package static let configuration = CommandConfiguration(
            abstract: "Go on from a replica that is out, when no in-sync one will return.",
            discussion: """
                Without --replica it only shows, for each replica that is out, what choosing it \
                would lose. The copies not chosen keep their bytes until you give them up with \
                'storagectl replica rejoin' or 'storagectl replica delete'.
                """)

        @Argument(help: "The volume's name.", transform: Label.init(typed:))
        package var name: Label

        @Option(help: "The replica to go on from: 16 hexadecimal digits.")
        package var replica: String?

        @Flag(help: "Do not ask.")
        package var yes = false

        @Flag(help: "The node that ran the engine is gone for good: it serves nobody any more.")
        package var engineIsGone = false

        @OptionGroup package var options: GlobalOptions
        package init() {}

        package func run() async throws {
            try await Session.run(options) { session in
                var request = Haptera_V1_SalvageVolumeRequest()
                request.name = name.text
                request.engineIsGone = engineIsGone
                let plan = try await session.volumes.salvageVolume(
                    request, options: session.callOptions)
                guard let replica else {
                    session.say(Presentation.value(plan)) { _ in
                        Presentation.text(plan, name: name.text)
                    }
                    return
                }
                guard plan.objection.isEmpty else {
                    throw CommandFailure(.conflict, plan.objection)
                }
                guard let choice = plan.choices.first(where: { $0.replicaID == replica }) else {
                    throw CommandFailure(
                        .notFound,
                        "replica \(replica) is no choice; see 'storagectl volume salvage "
                            + "\(name.text)'"
                    )
                }
                try session.confirm(
                    "Volume \(name.text) goes on from replica \(replica); lost: "
                        + "\(Presentation.loss(choice)).", "Salvage it?", yes: yes)
                request.replicaID = replica
                request.expectedEpoch = plan.epoch
                let done = try await session.volumes.salvageVolume(
                    request, options: session.callOptions)
                session.say(Presentation.value(done.volume), quiet: name.text) { _ in
                    "volume \(name.text) goes on from replica \(replica)"
                }
            }
        }
    }
}

extension ReplicaCommand {
    package struct Rejoin: AsyncParsableCommand {
        package static let configuration = CommandConfiguration(
            abstract: "Let a replica that was kept after a salvage be filled again.")

        @Argument(help: "The volume's name.", transform: Label.init(typed:))
        package var volume: Label

        @Argument(help: "The replica: 16 hexadecimal digits.")
        package var replica: String

        @Flag(help: "Do not ask.")
        package var yes = false

        @OptionGroup package var options: GlobalOptions
        package init() {}

        package func run() async throws {
            try await Session.run(options) { session in
                try session.confirm(
                    "What only replica \(replica) holds is given up, and it is filled again.",
                    "Give it up?", yes: yes)
                var request = Haptera_V1_ReplicaRequest()
                request.volume = volume.text
                request.replicaID = replica
                let volume = try await session.volumes.rejoinReplica(
                    request, options: session.callOptions)
                session.say(Presentation.value(volume), quiet: replica) { _ in
                    "replica \(replica) will be filled again"
                }
            }
        }
    }
}

extension Presentation {
    static func value(_ plan: Haptera_V1_SalvageVolumeResponse) -> OutputValue {
        .object([
            ("epoch", .number(plan.epoch)),
            ("objection", .optional(plan.objection)),
            ("choices", .list(plan.choices.map(value))),
        ])
    }

    static func text(_ plan: Haptera_V1_SalvageVolumeResponse, name: String) -> String {
        var text =
            plan.choices.isEmpty
            ? "volume \(name): no replica is out" : table(plan.choices).text
        if !plan.objection.isEmpty {
            text += "\n\nnot now: \(plan.objection)"
        } else if !plan.choices.isEmpty {
            text += "\n\nto act: storagectl volume salvage \(name) --replica ID --yes"
        }
        return text
    }

    /// What choosing the replica would lose, as one sentence.
    static func loss(_ choice: Haptera_V1_SalvageChoice) -> String {
        guard choice.problem.isEmpty else { return "cannot be chosen: \(choice.problem)" }
        var parts: [String] = []
        if choice.lostFromEpoch == 0 {
            parts.append("nothing that is known")
        } else {
            let epochs =
                choice.lostFromEpoch == choice.lostToEpoch
                ? "epoch \(choice.lostFromEpoch)"
                : "epochs \(choice.lostFromEpoch) to \(choice.lostToEpoch)"
            parts.append(
                "the writes of \(epochs), in at most \(choice.regionsMax) regions"
                    + (choice.measured ? "" : " (the whole volume: nobody could count them)"))
        }
        if choice.rolledBack { parts.append("its files are older than it had said") }
        if choice.lacksUnflushed {
            parts.append("and, as its host restarted, writes that were never flushed")
        }
        return parts.joined(separator: "; ")
    }
}
