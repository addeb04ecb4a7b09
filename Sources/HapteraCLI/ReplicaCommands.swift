import ArgumentParser
import Glibc
import HapteraAPI
import HapteraHost

/// A replica's id, checked where it is typed.
package struct ReplicaArgument: Equatable, Sendable {
    package var text: String
    package init(typed: String) throws {
        let text = typed.lowercased()
        guard text.utf8.count == 16, UInt64(text, radix: 16) != nil else {
            throw ValidationError(
                "'\(typed)' is no replica: 16 hexadecimal digits, see 'storagectl replica list'")
        }
        self.text = text
    }
}

extension ReplicaCommand {
    package struct RebuildStatus: AsyncParsableCommand {
        package static let configuration = CommandConfiguration(
            abstract: "Show what is being copied or compared, and how far it is.")

        @Argument(
            help: "The volume's name; all volumes without it.", transform: Label.init(typed:))
        package var volume: Label?

        @Flag(help: "Follow it; on a terminal with a bar, until nothing is left.")
        package var watch = false

        @OptionGroup package var options: GlobalOptions
        package init() {}

        package func run() async throws {
            try await Session.run(options) { session in
                if watch, isatty(1) == 1, options.output == .table || options.output == .wide,
                    !options.quiet
                {
                    return try await followWithBars(session)
                }
                try await session.list(watch: watch) {
                    let rows = try await rows(session)
                    return (
                        .list(rows.map { $0.value }),
                        names: rows.map(\.name).joined(separator: "\n"),
                        RebuildRow.table(rows)
                    )
                }
            }
        }

        private func rows(_ session: Session) async throws -> [RebuildRow] {
            var request = Haptera_V1_ListVolumesRequest()
            request.name = volume?.text ?? ""
            let volumes = try await session.volumes.listVolumes(
                request, options: session.watchOptions
            ).volumes
            if let volume, volumes.isEmpty {
                throw CommandFailure(
                    .notFound, "there is no volume '\(volume.text)'; see 'storagectl volume list'")
            }
            return volumes.flatMap { volume in
                volume.rebuilds.map { RebuildRow(volume: volume.name, rebuild: $0) }
            }
        }

        /// One line for each, overwritten in place.
        private func followWithBars(_ session: Session) async throws {
            var lines = 0
            while true {
                let rows = try await rows(session)
                if lines > 0 { print("\u{1b}[\(lines)A\u{1b}[J", terminator: "") }
                for row in rows { print(row.bar(width: 30)) }
                flushOutput()
                lines = rows.count
                if rows.isEmpty {
                    print("nothing is being rebuilt")
                    return
                }
                try await Task.sleep(for: .milliseconds(500))
            }
        }
    }

    package struct Replace: AsyncParsableCommand {
        package static let configuration = CommandConfiguration(
            abstract: "Replace a replica by a new one on another node.",
            discussion: """
                The new replica is filled first; the old one's data goes when the new one is in \
                sync and every other replica too. Returns once the new one is being made; \
                'storagectl replica rebuild-status' shows the rest, --wait waits for it.
                """)

        @Argument(help: "The volume's name.", transform: Label.init(typed:))
        package var volume: Label

        @Argument(help: "The replica's id.", transform: ReplicaArgument.init(typed:))
        package var replica: ReplicaArgument

        @Option(
            help: "Where to put the new one; otherwise a node without a replica of the volume.",
            transform: Label.init(typed:))
        package var node: Label?

        @Flag(help: "Wait until the old replica is out of the volume.")
        package var wait = false

        @OptionGroup package var options: GlobalOptions
        package init() {}

        package func run() async throws {
            try await Session.run(options) { session in
                var request = Haptera_V1_ReplaceReplicaRequest()
                request.volume = volume.text
                request.replicaID = replica.text
                request.node = node?.text ?? ""
                let wanted = request
                var now = try await session.change {
                    try await session.volumes.replaceReplica(wanted, options: session.callOptions)
                }
                let old = replica.text
                let new = now.replicas.first { $0.replaces == old }
                if wait {
                    let followed = try await session.follow(volume.text, "replacing in") { now in
                        now?.replicas.contains { $0.id == old } != true
                    }
                    guard let followed else {
                        throw CommandFailure(.failed, "volume '\(volume.text)' is gone")
                    }
                    now = followed
                }
                let isDone = wait
                session.say(Presentation.value(now), quiet: new?.id ?? "") { _ in
                    let words = isDone ? "was replaced" : "is being replaced"
                    let heir = new.map { " by \($0.id) on node \($0.node)" } ?? ""
                    return "replica \(old) \(words)\(heir)"
                }
            }
        }
    }

    package struct Delete: AsyncParsableCommand {
        package static let configuration = CommandConfiguration(
            abstract: "Remove one replica and its data; the volume is meant to have one less then.",
            discussion: """
                Of a replica that is being filled to take another's place: gives that up. The last \
                replica in sync is never removed.
                """)

        @Argument(help: "The volume's name.", transform: Label.init(typed:))
        package var volume: Label

        @Argument(help: "The replica's id.", transform: ReplicaArgument.init(typed:))
        package var replica: ReplicaArgument

        @Flag(help: "Also a replica whose data a salvage decided against and kept.")
        package var discardKept = false

        @Flag(help: "Do not ask.")
        package var yes = false

        @OptionGroup package var options: GlobalOptions
        package init() {}

        package func run() async throws {
            try await Session.run(options) { session in
                let id = replica.text
                try session.confirm(
                    "Replica \(id) of volume \(volume.text) is removed with its data, and not "
                        + "replaced.", "Remove it?", yes: yes)
                var request = Haptera_V1_DeleteReplicaRequest()
                request.volume = volume.text
                request.replicaID = id
                request.discardKept = discardKept
                let wanted = request
                _ = try await session.change {
                    try await session.volumes.deleteReplica(wanted, options: session.callOptions)
                }
                let now = try await session.follow(volume.text, "removing a replica of") { now in
                    now?.replicas.contains { $0.id == id } != true
                }
                guard let now else { return }
                session.say(Presentation.value(now), quiet: id) { _ in
                    "replica \(id) removed; its data goes as soon as its node is there"
                }
            }
        }
    }
}
