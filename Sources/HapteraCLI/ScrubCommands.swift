import ArgumentParser
import HapteraAPI
import HapteraHost

extension VolumeCommand {
    package struct Scrub: AsyncParsableCommand {
        package static let configuration = CommandConfiguration(
            abstract: "Read and check everything on all replicas; repair what is bad.",
            discussion: """
                With its snapshots, beside clients, to whom it gives way. The volume need not be \
                attached. One that is under way goes on, also when the volume is attached or \
                detached. With --wait the command ends when it has, and fails if there are blocks \
                of which no replica has a good copy.
                """)

        @Argument(help: "The volume's name.", transform: Label.init(typed:))
        package var name: Label

        @Flag(help: "Until it is finished; --timeout says how long at most.")
        package var wait = false

        @OptionGroup package var options: GlobalOptions
        package init() {}

        package func run() async throws {
            try await Session.run(options) { session in
                let name = name.text
                let volume = try await session.scrub(name)
                guard wait else {
                    return session.say(Presentation.scrub(volume), quiet: name) { _ in
                        "scrub of volume \(name) is under way; see 'storagectl volume "
                            + "scrub-status \(name)'"
                    }
                }
                guard let scrub = try await session.followScrub(name) else { return }
                guard scrub.blocksLost == 0, scrub.regionsSkipped == 0 else {
                    throw CommandFailure(.failed, Presentation.scrubFailure(name, scrub))
                }
            }
        }
    }

    package struct Verify: AsyncParsableCommand {
        package static let configuration = CommandConfiguration(
            abstract: "Whether everything on all replicas is intact and equal.",
            discussion: """
                A scrub that is waited for (--timeout says how long at most), or the one that is \
                under way: with its snapshots, beside clients. What is bad is repaired all the \
                same, and the command fails, so that somebody looks.
                """)

        @Argument(help: "The volume's name.", transform: Label.init(typed:))
        package var name: Label

        @OptionGroup package var options: GlobalOptions
        package init() {}

        package func run() async throws {
            try await Session.run(options) { session in
                let name = name.text
                _ = try await session.scrub(name)
                guard let scrub = try await session.followScrub(name) else { return }
                guard scrub.blocksBad == 0, scrub.blocksLost == 0, scrub.regionsSkipped == 0
                else { throw CommandFailure(.failed, Presentation.scrubFailure(name, scrub)) }
            }
        }
    }

    package struct ScrubStatus: AsyncParsableCommand {
        package static let configuration = CommandConfiguration(
            commandName: "scrub-status",
            abstract: "How far a volume's scrub is, and what it has found.")

        @Argument(help: "The volume's name.", transform: Label.init(typed:))
        package var name: Label

        @OptionGroup package var options: GlobalOptions
        package init() {}

        package func run() async throws {
            try await Session.run(options) { session in
                var request = Haptera_V1_GetVolumeRequest()
                request.name = name.text
                let volume = try await session.volumes.getVolume(
                    request, options: session.callOptions)
                let state =
                    volume.hasScrub ? Presentation.word(volume.scrub.state) : ""
                session.say(Presentation.scrub(volume), quiet: state) { _ in
                    Presentation.scrubDetails(volume)
                }
            }
        }
    }
}

extension Session {
    fileprivate func scrub(_ name: String) async throws -> Haptera_V1_Volume {
        var request = Haptera_V1_ScrubVolumeRequest()
        request.name = name
        let wanted = request
        return try await change {
            try await volumes.scrubVolume(wanted, options: callOptions)
        }
    }

    /// What it has found, when it has ended, which is shown. Nil: not in time, which was said.
    fileprivate func followScrub(_ name: String) async throws -> Haptera_V1_Scrub? {
        let last = try await follow(name, "scrubbing") { volume in
            guard let volume else {
                throw CommandFailure(
                    .failed, "volume '\(name)' was deleted before its scrub had ended")
            }
            return volume.scrub.state == .finished
        }
        guard let last else { return nil }
        say(Presentation.scrub(last), quiet: name) { _ in Presentation.scrubDetails(last) }
        return last.scrub
    }
}

/// Scrubs as the CLI shows them.
extension Presentation {
    static func scrubFailure(_ volume: String, _ scrub: Haptera_V1_Scrub) -> String {
        var found: [String] = []
        if scrub.blocksRepaired > 0 { found.append("\(scrub.blocksRepaired) blocks were repaired") }
        if scrub.blocksLost > 0 { found.append("\(scrub.blocksLost) blocks have no good copy") }
        if scrub.regionsSkipped > 0 {
            found.append("\(scrub.regionsSkipped) regions could not be checked")
        }
        return
            "volume '\(volume)': \(found.joined(separator: ", ")); 'storagectl events' says where, "
            + "and the engine's log all of it"
    }

    static func word(_ state: Haptera_V1_Scrub.State) -> String {
        switch state {
        case .running: "running"
        case .waiting: "waiting"
        case .finished: "finished"
        case .unspecified, .UNRECOGNIZED: "unknown"
        }
    }

    package static func scrub(_ volume: Haptera_V1_Volume) -> OutputValue {
        guard volume.hasScrub else {
            return .object([("volume", .text(volume.name)), ("state", .null)])
        }
        let scrub = volume.scrub
        return .object([
            ("volume", .text(volume.name)), ("state", .text(word(scrub.state))),
            ("regionsDone", .number(scrub.regionsDone)),
            ("regionsTotal", .number(scrub.regionsTotal)),
            ("blocksChecked", .number(scrub.blocksChecked)),
            ("blocksBad", .number(scrub.blocksBad)),
            ("blocksRepaired", .number(scrub.blocksRepaired)),
            ("blocksLost", .number(scrub.blocksLost)),
            ("regionsSkipped", .number(scrub.regionsSkipped)),
            ("bytesPerSecond", .number(scrub.bytesPerSecond)),
            ("reason", .optional(scrub.reason)),
        ])
    }

    package static func scrubDetails(_ volume: Haptera_V1_Volume) -> String {
        guard volume.hasScrub else {
            return "volume \(volume.name) was not scrubbed yet"
        }
        let scrub = volume.scrub
        var lines = ["scrub:       \(word(scrub.state))"]
        if scrub.state != .finished {
            lines.append(
                "done:        \(scrub.regionsDone) of \(scrub.regionsTotal) MiB, "
                    + "\(VolumeSize.text(scrub.bytesPerSecond))/s")
        }
        if !scrub.reason.isEmpty { lines.append("waits:       \(scrub.reason)") }
        lines.append("checked:     \(scrub.blocksChecked) blocks on all replicas")
        lines.append(
            "bad:         \(scrub.blocksBad), repaired \(scrub.blocksRepaired), lost "
                + "\(scrub.blocksLost)")
        if scrub.regionsSkipped > 0 {
            lines.append("skipped:     \(scrub.regionsSkipped) regions")
        }
        return lines.joined(separator: "\n")
    }
}
