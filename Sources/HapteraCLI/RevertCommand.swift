import ArgumentParser
import Foundation
import GRPCCore
import HapteraAPI

extension SnapshotCommand {
    package struct Revert: AsyncParsableCommand {
        package static let configuration = CommandConfiguration(
            abstract: "Bring a volume back to a snapshot; what it holds now is kept.",
            discussion: """
                Nothing is copied, and every snapshot stays. What the volume held becomes a \
                snapshot itself: revert to that to undo it, delete it to have the space back. The \
                volume keeps its size. It is refused while a client is connected, since what that \
                remembers would be wrong: unmount and disconnect it first.
                """)

        @Argument(help: "The volume's name.", transform: Label.init(typed:))
        package var volume: Label

        @Argument(help: "The snapshot to go back to.", transform: SnapshotArgument.init(typed:))
        package var name: SnapshotArgument

        @Option(
            help: "The name of the snapshot that keeps what is there now. One is made up without.",
            transform: SnapshotArgument.init(typed:))
        package var keep: SnapshotArgument?

        @Flag(help: "Do not ask.")
        package var yes = false

        @OptionGroup package var options: GlobalOptions
        package init() {}

        package func run() async throws {
            // Chosen once: a request that is sent again must not revert twice.
            let keep =
                keep ?? SnapshotArgument(generatedAt: .now, random: .random(in: 0 ... .max))
            try await Session.run(options) { session in
                try session.confirm(
                    "Volume \(volume.text) goes back to snapshot \(name.text); what it holds now "
                        + "is kept as snapshot \(keep.text).", "Revert it?", yes: yes)
                let kept = try await session.revert(volume.text, to: name.text, keeping: keep.text)
                session.say(Presentation.value(kept), quiet: kept.name) { _ in
                    Presentation.reverted(volume.text, to: name.text, keeping: kept.name)
                }
            }
        }
    }
}

extension Presentation {
    /// What `snapshot revert` says.
    package static func reverted(_ volume: String, to name: String, keeping kept: String) -> String
    {
        "volume \(volume) is back at snapshot \(name); what it held is snapshot \(kept)"
    }
}

extension Session {
    func revert(
        _ volume: String, to name: String, keeping kept: String
    ) async throws -> Haptera_V1_Snapshot {
        let progress = Progress(options)
        defer { progress.clear() }
        progress.show("reverting \(volume) to \(name)")
        do {
            return try await change {
                var request = Haptera_V1_RevertVolumeRequest()
                request.volume = volume
                request.snapshot = name
                request.keep = kept
                request.timeoutMilliseconds = engineTimeoutMilliseconds
                return try await volumes.revertVolume(request, options: callOptions)
            }
        } catch let error as RPCError where error.code == .deadlineExceeded {
            throw Self.revertDoubt(error, volume, name, kept)
        }
    }

    /// Neither done nor failed: what happened, and how to find out.
    static func revertDoubt(
        _ error: RPCError, _ volume: String, _ name: String, _ kept: String
    ) -> CommandFailure {
        let words =
            error.message.hasPrefix("it is not known")
            ? error.message
            : "it is not known whether volume '\(volume)' was reverted to \(name): no answer came "
                + "in time"
        return CommandFailure(
            .unavailable,
            "\(words); 'storagectl snapshot revert \(volume) \(name) --keep \(kept)' reverts it "
                + "unless that has happened, and returns when it is safe")
    }
}
