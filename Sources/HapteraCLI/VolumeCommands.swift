import ArgumentParser
import Glibc
import HapteraAPI
import HapteraHost

func flushOutput() { fflush(nil) }

package struct VolumeCommand: AsyncParsableCommand {
    package static let configuration = CommandConfiguration(
        commandName: "volume", abstract: "Create, attach, look at and delete volumes.",
        subcommands: [
            Create.self, List.self, Show.self, Why.self, Update.self, Attach.self, Detach.self,
            Resize.self, SetLabels.self, Scrub.self, ScrubStatus.self, Verify.self, AcceptLoss.self,
            Salvage.self, Delete.self,
        ])
    package init() {}
}

/// A volume's or node's name, checked where it is typed.
package struct Label: Equatable, Sendable {
    package var text: String
    package init(typed: String) throws {
        guard Names.isValidLabel(typed) else {
            throw ValidationError("'\(typed)' is no name: use \(Names.labelRule)")
        }
        text = typed
    }
}

package struct SizeArgument: Equatable, Sendable {
    package var bytes: UInt64
    package init(typed: String) throws {
        guard let bytes = VolumeSize.parse(typed), VolumeSize.isValid(bytes) else {
            let why = VolumeSize.objection(to: typed) ?? "it is \(VolumeSize.rule)"
            throw ValidationError("'\(typed)' is no volume size: \(why)")
        }
        self.bytes = bytes
    }
}

/// `VOLUME@SNAPSHOT`, as exports of snapshots are named too.
package struct SnapshotOfVolumeArgument: Equatable, Sendable {
    package var volume: Label
    package var snapshot: SnapshotArgument
    package init(typed: String) throws {
        let parts = typed.split(separator: "@", maxSplits: 1, omittingEmptySubsequences: false)
        guard parts.count == 2 else {
            throw ValidationError("'\(typed)' names no snapshot: write VOLUME@SNAPSHOT")
        }
        volume = try Label(typed: String(parts[0]))
        snapshot = try SnapshotArgument(typed: String(parts[1]))
    }
}

extension VolumeCommand {
    package struct Create: AsyncParsableCommand {
        package static let configuration = CommandConfiguration(
            abstract: "Create a volume; the same arguments again change nothing.",
            discussion: """
                With --from it begins as a snapshot: at once, whatever the size, since its \
                replicas share the snapshot's data on the nodes that have it. Replicas elsewhere \
                are filled, which this waits for; the volume can be attached meanwhile. From then \
                on the two volumes have nothing to do with each other; each can be deleted.
                """)

        @Argument(help: "The volume's name: \(Names.labelRule).", transform: Label.init(typed:))
        package var name: Label

        @Option(
            parsing: .unconditional,
            help: "As in 10GiB: \(VolumeSize.rule). With --from: the snapshot's, or more.",
            transform: SizeArgument.init(typed:))
        package var size: SizeArgument?

        @Option(
            parsing: .unconditional,
            help: ArgumentHelp("The snapshot to begin as.", valueName: "volume@snapshot"),
            transform: SnapshotOfVolumeArgument.init(typed:))
        package var from: SnapshotOfVolumeArgument?

        @Option(
            parsing: .unconditional,
            help: "Copies, 1 to 5; 3, or with --from as many as share the snapshot's data.")
        package var replicas: Int?

        @Option(
            name: .long, parsing: .singleValue,
            help: """
                A node to use; may be repeated. As many as replicas: exactly there, the same node \
                several times if named so.
                """, transform: Label.init(typed:))
        package var node: [Label] = []

        @Flag(help: "For tests only: 'storagectl chaos run' may break it and write over it.")
        package var scratch = false

        @OptionGroup package var labels: LabelOptions
        @OptionGroup package var settings: SettingsOptions
        @OptionGroup package var options: GlobalOptions
        package init() {}

        package func validate() throws {
            if let replicas, !(1...5).contains(replicas) {
                throw ValidationError("a volume has 1 to 5 replicas, not \(replicas)")
            }
            guard size != nil || from != nil else {
                throw ValidationError(
                    "how large? Give --size SIZE, or --from VOLUME@SNAPSHOT to begin as a snapshot")
            }
        }

        package var request: Haptera_V1_CreateVolumeRequest {
            var request = Haptera_V1_CreateVolumeRequest()
            request.name = name.text
            request.sizeBytes = size?.bytes ?? 0
            request.replicas = UInt32(replicas ?? (from == nil ? 3 : 0))
            request.nodes = node.map(\.text)
            request.settings = settings.message
            request.labels = labels.map
            request.scratch = scratch
            request.sourceVolume = from?.volume.text ?? ""
            request.sourceSnapshot = from?.snapshot.text ?? ""
            return request
        }

        package func run() async throws {
            try await Session.run(options) { session in
                let wanted = request
                _ = try await session.change {
                    try await session.volumes.createVolume(wanted, options: session.callOptions)
                }
                let name = name.text
                let volume = try await session.follow(name, "creating") { volume in
                    guard let volume else {
                        throw CommandFailure(.failed, "volume '\(name)' was deleted meanwhile")
                    }
                    guard volume.state == .creating else {
                        // Deleted by somebody else: it will not be filled.
                        return !volume.hasFilling || volume.state == .deleting
                    }
                    guard volume.robustness != .faulted else {
                        throw CommandFailure(
                            .failed,
                            "volume '\(name)' cannot be created: \(volume.reason); remove "
                                + "what there is with: storagectl volume delete \(name)")
                    }
                    return false
                }
                guard let volume, volume.state != .deleting else {
                    throw CommandFailure(.failed, "volume '\(name)' was deleted meanwhile")
                }
                session.say(Presentation.value(volume), quiet: volume.name) { _ in
                    Presentation.creation(volume)
                }
            }
        }
    }

    package struct List: AsyncParsableCommand {
        package static let configuration = CommandConfiguration(abstract: "List all volumes.")

        @Option(
            help: "Only those whose labels match: \(LabelSelector.rule).",
            transform: SelectorArgument.init(typed:))
        package var selector: SelectorArgument?

        @Flag(help: "List again whenever something changes.")
        package var watch = false

        @OptionGroup package var options: GlobalOptions
        package init() {}

        package func run() async throws {
            try await Session.run(options) { session in
                try await session.list(watch: watch) {
                    var request = Haptera_V1_ListVolumesRequest()
                    request.selector = selector?.text ?? ""
                    let volumes = try await session.volumes.listVolumes(
                        request, options: session.watchOptions
                    ).volumes
                    return (
                        .list(volumes.map { Presentation.value($0) }),
                        names: volumes.map(\.name).joined(separator: "\n"),
                        Presentation.table(volumes, wide: options.output == .wide)
                    )
                }
            }
        }
    }

    package struct Show: AsyncParsableCommand {
        package static let configuration = CommandConfiguration(
            abstract: "Show one volume, its engine and its replicas.")

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
                session.say(Presentation.value(volume), quiet: volume.name) {
                    Presentation.details(volume, wide: $0)
                }
            }
        }
    }

    package struct Attach: AsyncParsableCommand {
        package static let configuration = CommandConfiguration(
            abstract: "Start serving a volume; prints where to connect.")

        @Argument(help: "The volume's name.", transform: Label.init(typed:))
        package var name: Label

        @Option(
            help: "The node to serve it on; otherwise one that holds a replica.",
            transform: Label.init(typed:))
        package var node: Label?

        @OptionGroup package var options: GlobalOptions
        package init() {}

        package func run() async throws {
            try await Session.run(options) { session in
                var request = Haptera_V1_AttachVolumeRequest()
                request.name = name.text
                request.node = node?.text ?? ""
                let wanted = request
                _ = try await session.change {
                    try await session.volumes.attachVolume(wanted, options: session.callOptions)
                }
                let name = name.text
                let volume = try await session.follow(name, "attaching") { volume in
                    guard let volume, volume.hasEngine else {
                        throw CommandFailure(.conflict, "volume '\(name)' was detached meanwhile")
                    }
                    guard volume.robustness != .faulted else {
                        throw CommandFailure(
                            .failed, "volume '\(name)' cannot be attached: \(volume.reason)")
                    }
                    return volume.state == .attached && volume.engine.pid > 0
                        && !volume.engine.uri.isEmpty
                }
                guard let volume else { return }
                session.say(Presentation.attachment(volume), quiet: volume.engine.uri) { _ in
                    "volume \(name) attached on node \(volume.engine.node)\n"
                        + "uri:       \(volume.engine.uri)\n"
                        + "unix uri:  \(volume.engine.unixUri)"
                }
            }
        }
    }

    package struct Detach: AsyncParsableCommand {
        package static let configuration = CommandConfiguration(
            abstract: "Stop serving a volume, in order.",
            discussion: """
                With --force: when the node of the engine is not heard of, and will not come back \
                soon. See the documentation for what that means.
                """)

        @Argument(help: "The volume's name.", transform: Label.init(typed:))
        package var name: Label

        @Flag(help: "Give the attachment up without the engine's word; its node must be silent.")
        package var force = false

        @Flag(help: "Do not ask.")
        package var yes = false

        @OptionGroup package var options: GlobalOptions
        package init() {}

        package func run() async throws {
            try await Session.run(options) { session in
                if force {
                    try session.confirm(
                        Self.explanation(name.text), "Give the attachment up?", yes: yes)
                }
                guard let volume = try await session.detach(name.text, isForced: force) else {
                    return
                }
                session.say(Presentation.value(volume), quiet: volume.name) { _ in
                    "volume \(volume.name) detached"
                }
            }
        }

        private static func explanation(_ name: String) -> String {
            """
            The engine of volume \(name) cannot be asked, and may still serve its clients. The \
            next engine of the volume shuts it out by its epoch and waits until its leases have \
            run out: never do both serve.
            What clients of the old engine have not flushed is as after a crash of that node. Be \
            sure that they are dead, or that nobody relies on them: they get errors.
            """
        }
    }

    package struct Delete: AsyncParsableCommand {
        package static let configuration = CommandConfiguration(
            abstract: "Delete a detached volume and all of its data.")

        @Argument(help: "The volume's name.", transform: Label.init(typed:))
        package var name: Label

        @OptionGroup package var options: GlobalOptions
        package init() {}

        package func run() async throws {
            try await Session.run(options) { session in
                var request = Haptera_V1_DeleteVolumeRequest()
                request.name = name.text
                let wanted = request
                _ = try await session.change {
                    try await session.volumes.deleteVolume(wanted, options: session.callOptions)
                }
                _ = try await session.follow(name.text, "deleting") { $0?.state != .deleting }
                let value = OutputValue.object([
                    ("name", .text(name.text)), ("deleted", .flag(true)),
                ])
                session.say(value, quiet: name.text) { _ in "volume \(name.text) deleted" }
            }
        }
    }
}

extension Session {
    /// Asks for the detach and waits until it is done.
    func detach(_ name: String, isForced: Bool = false) async throws -> Haptera_V1_Volume? {
        var request = Haptera_V1_DetachVolumeRequest()
        request.name = name
        request.force = isForced
        let wanted = request
        _ = try await change { try await volumes.detachVolume(wanted, options: callOptions) }
        return try await follow(name, "detaching") { $0?.state != .detaching }
    }
}
