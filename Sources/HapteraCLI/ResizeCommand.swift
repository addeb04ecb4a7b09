import ArgumentParser
import GRPCCore
import HapteraAPI
import HapteraHost

extension VolumeCommand {
    package struct Resize: AsyncParsableCommand {
        package static let configuration = CommandConfiguration(
            abstract: "Let a volume grow; the same size again changes nothing.",
            discussion: """
                An attached one goes on being served. Clients that connect afterwards see the new \
                size; a kernel that is attached has to be told: see docs/operations.md. Snapshots \
                keep the size they were taken at.
                """)

        @Argument(help: "The volume's name.", transform: Label.init(typed:))
        package var name: Label

        @Argument(
            help: "The new size, as 20GiB: not below the present one.",
            transform: SizeArgument.init(typed:))
        package var size: SizeArgument

        @OptionGroup package var options: GlobalOptions
        package init() {}

        package func run() async throws {
            try await Session.run(options) { session in
                let volume = try await session.resize(name.text, to: size.bytes)
                session.say(Presentation.value(volume), quiet: volume.name) { _ in
                    "volume \(volume.name) has \(VolumeSize.text(volume.sizeBytes))"
                }
            }
        }
    }
}

extension Session {
    func resize(_ name: String, to size: UInt64) async throws -> Haptera_V1_Volume {
        let progress = Progress(options)
        defer { progress.clear() }
        progress.show("resizing \(name)")
        do {
            return try await change {
                var request = Haptera_V1_ResizeVolumeRequest()
                request.name = name
                request.sizeBytes = size
                request.timeoutMilliseconds = engineTimeoutMilliseconds
                return try await volumes.resizeVolume(request, options: callOptions)
            }
        } catch let error as RPCError where error.code == .deadlineExceeded {
            throw Self.resizeDoubt(error, name)
        }
    }

    /// Neither done nor failed: what happened, and how to find out.
    static func resizeDoubt(_ error: RPCError, _ name: String) -> CommandFailure {
        let words =
            error.message.hasPrefix("it is not known")
            ? error.message
            : "it is not known whether volume '\(name)' has grown: no answer came in time"
        return CommandFailure(
            .unavailable,
            "\(words); find out with 'storagectl volume show \(name)'; to resize it again is "
                + "harmless")
    }
}
