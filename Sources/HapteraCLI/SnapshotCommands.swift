import ArgumentParser
import Foundation
import GRPCCore
import HapteraAPI
import HapteraCore
import HapteraHost

package struct SnapshotCommand: AsyncParsableCommand {
    package static let configuration = CommandConfiguration(
        commandName: "snapshot", abstract: "Take, look at, read and delete snapshots of volumes.",
        subcommands: [
            Create.self, List.self, Show.self, SetLabels.self, Compare.self, Export.self,
            Access.self, Serve.self, Revert.self, Delete.self,
        ])
    package init() {}
}

/// A snapshot's name, checked where it is typed.
package struct SnapshotArgument: Equatable, Sendable {
    package var text: String
    package init(typed: String) throws {
        guard VolumeRecord.isValidSnapshotName(typed) else {
            throw ValidationError(
                "'\(typed)' is no snapshot name: use \(VolumeRecord.snapshotNameRule)")
        }
        text = typed
    }

    /// Tells when, in UTC; the random end keeps two of one second apart.
    package init(generatedAt time: Date, random: UInt16) {
        let digits = time.formatted(.iso8601).filter(\.isNumber)
        let end = String(String(Int(random) + 0x10000, radix: 16).dropFirst())
        text = "snap-\(digits.prefix(8))-\(digits.dropFirst(8))-\(end)"
    }
}

extension SnapshotCommand {
    package struct Create: AsyncParsableCommand {
        package static let configuration = CommandConfiguration(
            abstract: "Take a snapshot of a volume; the same name again changes nothing.",
            discussion: """
                It holds everything that was answered before the command began, as a disk does \
                after a power cut: flush file systems and databases first if that is not enough. \
                It returns when every in-sync replica has it. A volume that is not attached stays \
                so.
                """)

        @Argument(help: "The volume's name; with --group the snapshot's.")
        var first: String?

        @Argument(
            help:
                "The snapshot's name: \(VolumeRecord.snapshotNameRule). One is made up without it.")
        var second: String?

        @Option(
            help: ArgumentHelp(
                "Several volumes instead of one: snapshots at one instant, of all or of none.",
                valueName: "a,b,c"))
        var group: String?

        @OptionGroup package var labels: LabelOptions
        @OptionGroup package var options: GlobalOptions
        /// One, or those of a group.
        package private(set) var volumes: [Label] = []
        package private(set) var name: SnapshotArgument?
        package init() {}

        private enum CodingKeys: CodingKey { case first, second, group, labels, options }

        package mutating func validate() throws {
            guard let group else {
                guard let first else { throw ValidationError("which volume?") }
                volumes = [try Label(typed: first)]
                name = try second.map(SnapshotArgument.init(typed:))
                return
            }
            volumes = try group.split(separator: ",", omittingEmptySubsequences: false)
                .map { try Label(typed: String($0)) }
            guard Set(volumes.map(\.text)).count == volumes.count else {
                throw ValidationError("--group names a volume twice")
            }
            guard second == nil else {
                throw ValidationError("with --group there is one name, the snapshots'")
            }
            if let first, volumes.contains(where: { $0.text == first }) {
                throw ValidationError(
                    "'\(first)' is a volume of the group, and stands where the snapshots' name "
                        + "does: name the volumes with --group only")
            }
            name = try first.map(SnapshotArgument.init(typed:))
        }

        package func run() async throws {
            let isMadeUp = name == nil
            // Chosen once: a request that is sent again must not take another one.
            let name =
                name ?? SnapshotArgument(generatedAt: .now, random: .random(in: 0 ... .max))
            try await Session.run(options) { session in
                guard group == nil else {
                    if !isMadeUp { try await session.requireNoVolume(name.text) }
                    return try await runGroup(session, name.text, isMadeUp: isMadeUp)
                }
                let before =
                    isMadeUp ? nil : try await session.snapshotIfThere(volumes[0].text, name.text)
                let snapshot = try await session.createSnapshot(
                    name.text, of: volumes[0].text, labels: labels.map)
                session.say(Presentation.value(snapshot), quiet: snapshot.name) { _ in
                    Presentation.taken(snapshot, before: before)
                }
            }
        }
        private func runGroup(
            _ session: Session, _ name: String, isMadeUp: Bool
        ) async throws {
            // All of them are there, or none.
            let before =
                isMadeUp ? nil : try await session.snapshotIfThere(volumes[0].text, name)
            let snapshots = try await session.createGroupSnapshot(
                name, of: volumes.map(\.text), labels: labels.map)
            session.say(.list(snapshots.map { Presentation.value($0) }), quiet: name) { _ in
                let wasThere = before?.layer == snapshots.first?.layer
                return snapshots.map { Presentation.taken($0, before: wasThere ? $0 : nil) }
                    .joined(separator: "\n")
            }
        }
    }

    package struct List: AsyncParsableCommand {
        package static let configuration = CommandConfiguration(
            abstract: "List the snapshots of a volume, the newest last; after a revert, a tree.")

        @Argument(help: "The volume's name.", transform: Label.init(typed:))
        package var volume: Label

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
                    var request = Haptera_V1_ListSnapshotsRequest()
                    request.volume = volume.text
                    request.selector = selector?.text ?? ""
                    let snapshots = try await session.volumes.listSnapshots(
                        request, options: session.watchOptions
                    ).snapshots
                    return (
                        .list(snapshots.map { Presentation.value($0) }),
                        names: snapshots.map(\.name).joined(separator: "\n"),
                        Presentation.table(
                            snapshots, now: .now, wide: options.output == .wide)
                    )
                }
            }
        }
    }

    package struct Show: AsyncParsableCommand {
        package static let configuration = CommandConfiguration(
            abstract: "Show one snapshot, and where to read it.")

        @Argument(help: "The volume's name.", transform: Label.init(typed:))
        package var volume: Label

        @Argument(help: "The snapshot's name.", transform: SnapshotArgument.init(typed:))
        package var name: SnapshotArgument

        @OptionGroup package var options: GlobalOptions
        package init() {}

        package func run() async throws {
            try await Session.run(options) { session in
                let snapshot = try await session.snapshot(volume.text, name.text)
                session.say(Presentation.value(snapshot), quiet: snapshot.name) { _ in
                    Presentation.details(snapshot, now: .now)
                }
            }
        }
    }

    package struct Delete: AsyncParsableCommand {
        package static let configuration = CommandConfiguration(
            abstract: "Delete a snapshot of a volume; the volume stays as it is.",
            discussion: """
                It returns at once; the space comes back in the background, on every replica. It \
                is refused while a client reads the snapshot, or what has changed since.
                """)

        @Argument(help: "The volume's name.", transform: Label.init(typed:))
        package var volume: Label

        @Argument(help: "The snapshot's name.", transform: SnapshotArgument.init(typed:))
        package var name: SnapshotArgument

        @Flag(help: "Do not ask.")
        package var yes = false

        @OptionGroup package var options: GlobalOptions
        package init() {}

        package func run() async throws {
            try await Session.run(options) { session in
                try session.confirm(
                    "Snapshot \(name.text) of volume \(volume.text) is deleted, with what only it "
                        + "holds.", "Delete it?", yes: yes)
                try await session.deleteSnapshot(name.text, of: volume.text)
                session.say(
                    Presentation.deletion(name.text, of: volume.text), quiet: name.text
                ) { _ in
                    Presentation.deleted(name.text, of: volume.text)
                }
            }
        }
    }
}

extension Session {
    /// Time kept for the answers on their way back, so that the first to give up is the one that
    /// knows most.
    private static let snapshotMargin = Duration.seconds(4)

    func createSnapshot(
        _ name: String, of volume: String, labels: [String: String]
    ) async throws -> Haptera_V1_Snapshot {
        let progress = Progress(options)
        defer { progress.clear() }
        progress.show("taking snapshot \(name) of \(volume)")
        do {
            return try await change {
                var request = Haptera_V1_CreateSnapshotRequest()
                request.volume = volume
                request.name = name
                request.labels = labels
                request.timeoutMilliseconds = engineTimeoutMilliseconds
                return try await volumes.createSnapshot(request, options: callOptions)
            }
        } catch let error as RPCError where error.code == .deadlineExceeded {
            throw Self.snapshotDoubt(error, name, volume)
        }
    }

    /// So that one that was there already is not said to be taken now. It is part of the change: a
    /// controller that restarts meanwhile is waited for.
    func snapshotIfThere(_ volume: String, _ name: String) async throws -> Haptera_V1_Snapshot? {
        do {
            return try await change { try await snapshot(volume, name) }
        } catch let error as RPCError where error.code == .notFound {
            return nil
        }
    }

    /// What stands beside --group is the snapshots' name: whoever means a volume is told.
    func requireNoVolume(_ name: String) async throws {
        guard Names.isValidLabel(name) else { return }
        var request = Haptera_V1_GetVolumeRequest()
        request.name = name
        do {
            _ = try await change { try await volumes.getVolume(request, options: callOptions) }
        } catch let error as RPCError where error.code == .notFound {
            return
        }
        throw CommandFailure(
            .usage,
            "'\(name)' is a volume, and stands where the snapshots' name does: name the volumes "
                + "with --group only, or choose another name")
    }

    func createGroupSnapshot(
        _ name: String, of volumes: [String], labels: [String: String]
    ) async throws -> [Haptera_V1_Snapshot] {
        let progress = Progress(options)
        defer { progress.clear() }
        progress.show("taking snapshot \(name) of \(volumes.joined(separator: ", "))")
        do {
            return try await change {
                var request = Haptera_V1_CreateGroupSnapshotRequest()
                request.volumes = volumes
                request.name = name
                request.labels = labels
                request.timeoutMilliseconds = engineTimeoutMilliseconds
                return try await self.volumes.createGroupSnapshot(request, options: callOptions)
                    .snapshots
            }
        } catch let error as RPCError where error.code == .deadlineExceeded {
            throw CommandFailure(
                .unavailable,
                "it is not known whether snapshot '\(name)' of the group was taken: no answer came "
                    + "in time; the same command with this name takes it unless it was, and "
                    + "returns when it is safe")
        }
    }

    func deleteSnapshot(_ name: String, of volume: String) async throws {
        let progress = Progress(options)
        defer { progress.clear() }
        progress.show("deleting snapshot \(name) of \(volume)")
        var attempts = 0
        do {
            _ = try await change { () -> Haptera_V1_DeleteSnapshotResponse in
                attempts += 1
                var request = Haptera_V1_DeleteSnapshotRequest()
                request.volume = volume
                request.name = name
                request.timeoutMilliseconds = engineTimeoutMilliseconds
                return try await volumes.deleteSnapshot(request, options: callOptions)
            }
        } catch let error as RPCError where error.code == .deadlineExceeded {
            throw Self.deletionDoubt(error, name, volume)
        } catch let error as RPCError where error.code == .notFound && attempts > 1 {
            throw Self.goneMeanwhile(error)
        }
    }

    var engineTimeoutMilliseconds: UInt64 {
        let left = deadline - ContinuousClock.now - Self.snapshotMargin
        return UInt64(max(left.components.seconds, 1)) * 1000
    }

    /// Neither done nor failed: what happened, and how to find out.
    static func snapshotDoubt(
        _ error: RPCError, _ name: String, _ volume: String
    ) -> CommandFailure {
        doubt(
            error, name, volume, was: "taken",
            "'storagectl snapshot create \(volume) \(name)' takes it unless it is there, and "
                + "returns when it is safe")
    }

    static func deletionDoubt(
        _ error: RPCError, _ name: String, _ volume: String
    ) -> CommandFailure {
        doubt(error, name, volume, was: "deleted", "deleting it again is harmless")
    }

    private static func doubt(
        _ error: RPCError, _ name: String, _ volume: String, was done: String, _ advice: String
    ) -> CommandFailure {
        let isTheirs = error.message.hasPrefix("it is not known")
        let words =
            isTheirs
            ? error.message
            : "it is not known whether snapshot '\(name)' of volume '\(volume)' was \(done): no "
                + "answer came in time"
        return CommandFailure(
            .unavailable,
            "\(words); find out with 'storagectl snapshot list \(volume)'; \(advice)")
    }

    /// The answer to an earlier request was lost on its way, and with it whether that was the one.
    static func goneMeanwhile(_ error: RPCError) -> CommandFailure {
        CommandFailure(
            .notFound,
            "\(error.message); this command asked more than once, and may have deleted it before")
    }
}
