import ArgumentParser
import Glibc
import HapteraAPI
import HapteraHost

package struct DurationArgument: Equatable, Sendable {
    package var milliseconds: UInt64
    package init(typed: String) throws {
        guard let milliseconds = Durations.parse(typed) else {
            throw ValidationError("'\(typed)' is no length of time: \(Durations.rule)")
        }
        self.milliseconds = milliseconds
    }
}

package struct SwitchArgument: Equatable, Sendable {
    package var isOn: Bool
    package init(typed: String) throws {
        guard typed == "on" || typed == "off" else {
            throw ValidationError("'\(typed)' is neither on nor off")
        }
        isOn = typed == "on"
    }
}

/// How a volume behaves when something is slow or gone, and what it does about zeroes.
package struct SettingsOptions: ParsableArguments {
    @Option(
        parsing: .unconditional, help: "Writes wait while fewer replicas are in sync; default 1.")
    package var minInSync: UInt32?

    @Option(
        parsing: .unconditional,
        help: "A request not answered for this long gets an error; default 0: it waits.",
        transform: DurationArgument.init(typed:))
    package var ioTimeout: DurationArgument?

    @Option(
        parsing: .unconditional,
        help: "How long a replica's answer lets the engine serve; default 500ms.",
        transform: DurationArgument.init(typed:))
    package var lease: DurationArgument?

    @Option(
        parsing: .unconditional,
        help: "A replica that owes an answer this long leaves the in-sync set; default 3s.",
        transform: DurationArgument.init(typed:))
    package var removalDeadline: DurationArgument?

    @Option(
        parsing: .unconditional,
        help: "A replica away for longer is replaced on another node; default 30m, 0: never.",
        transform: DurationArgument.init(typed:))
    package var staleReplicaTimeout: DurationArgument?

    @Option(
        parsing: .unconditional,
        help: "on: writes of nothing but zeroes take no space; default off.",
        transform: SwitchArgument.init(typed:))
    package var detectZeroes: SwitchArgument?

    package init() {}

    /// What was given, and nothing else.
    package var message: Haptera_V1_VolumeSettings {
        var message = Haptera_V1_VolumeSettings()
        if let minInSync { message.minInSync = minInSync }
        if let ioTimeout { message.ioTimeoutMilliseconds = ioTimeout.milliseconds }
        if let lease { message.leaseMilliseconds = lease.milliseconds }
        if let removalDeadline {
            message.removalDeadlineMilliseconds = removalDeadline.milliseconds
        }
        if let staleReplicaTimeout {
            message.staleReplicaTimeoutMilliseconds = staleReplicaTimeout.milliseconds
        }
        if let detectZeroes { message.detectZeroes = detectZeroes.isOn }
        return message
    }
}

extension VolumeCommand {
    package struct Update: AsyncParsableCommand {
        package static let configuration = CommandConfiguration(
            abstract: "Change a volume's settings.",
            discussion: """
                --io-timeout, --removal-deadline, --stale-replica-timeout and --detect-zeroes \
                apply at once, \
                --lease and --min-in-sync when the engine starts next.
                """)

        @Argument(help: "The volume's name.", transform: Label.init(typed:))
        package var name: Label

        @OptionGroup package var settings: SettingsOptions
        @OptionGroup package var options: GlobalOptions
        package init() {}

        package func validate() throws {
            guard settings.message != Haptera_V1_VolumeSettings() else {
                throw ValidationError("nothing to change: name at least one setting")
            }
        }

        package func run() async throws {
            try await Session.run(options) { session in
                var request = Haptera_V1_UpdateVolumeRequest()
                request.name = name.text
                request.settings = settings.message
                let wanted = request
                let volume = try await session.change {
                    try await session.volumes.updateVolume(wanted, options: session.callOptions)
                }
                let waits = volume.hasEngine && (settings.lease != nil || settings.minInSync != nil)
                session.say(Presentation.value(volume), quiet: volume.name) { _ in
                    "volume \(volume.name) updated: \(Presentation.line(volume.settings))"
                        + (waits
                            ? "\n--lease and --min-in-sync apply when the engine starts next: "
                                + "storagectl volume detach \(volume.name), then attach" : "")
                }
            }
        }
    }

    package struct AcceptLoss: AsyncParsableCommand {
        package static let configuration = CommandConfiguration(
            abstract: "Let a volume go on though acknowledged writes may be missing.",
            discussion: """
                After a power cut, a replica may lack writes that were acknowledged and not \
                flushed. If only such replicas can be reached, and the client lives on, the engine \
                waits for a better one. This command gives that up. It says what may be lost \
                before it acts.
                """)

        @Argument(help: "The volume's name.", transform: Label.init(typed:))
        package var name: Label

        @Flag(help: "Do not ask.")
        package var yes = false

        @OptionGroup package var options: GlobalOptions
        package init() {}

        package func run() async throws {
            let name = name.text
            try await Session.run(options) { session in
                var request = Haptera_V1_GetVolumeRequest()
                request.name = name
                let volume = try await session.volumes.getVolume(
                    request, options: session.callOptions)
                guard volume.decisionInstance != 0 else {
                    throw CommandFailure(
                        .conflict,
                        "volume '\(name)' does not wait for a decision: it is "
                            + Session.describe(volume))
                }
                try session.confirm(
                    Presentation.lossExplanation(volume), "Go on with what is left?", yes: yes)
                var accept = Haptera_V1_AcceptLossRequest()
                accept.name = name
                accept.instance = volume.decisionInstance
                let wanted = accept
                _ = try await session.change {
                    try await session.volumes.acceptLoss(wanted, options: session.callOptions)
                }
                let now = try await session.follow(name, "resuming") { now in
                    guard let now, now.hasEngine else {
                        throw CommandFailure(.conflict, "volume '\(name)' was detached meanwhile")
                    }
                    return now.robustness != .faulted && now.robustness != .stalled
                        && now.state == .attached
                }
                guard let now else { return }
                session.say(Presentation.value(now), quiet: name) { _ in
                    "volume \(name) is served again, from what its replicas hold"
                }
            }
        }
    }
}

extension Session {
    /// Says what is about to happen and asks, unless told not to. Without a terminal to ask on, it
    /// refuses.
    func confirm(_ explanation: String, _ question: String, yes: Bool) throws {
        if yes { return }
        Progress.complain(explanation)
        guard isatty(0) == 1 else {
            throw CommandFailure(.usage, "not done: nobody can be asked here; add --yes")
        }
        Progress.complain("\(question) Type yes: ", newline: false)
        guard readLine()?.lowercased() == "yes" else {
            throw CommandFailure(.failed, "not done")
        }
    }
}
