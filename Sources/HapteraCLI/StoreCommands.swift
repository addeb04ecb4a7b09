import ArgumentParser
import HapteraAPI
import HapteraHost

package struct StoreCommand: AsyncParsableCommand {
    package static let configuration = CommandConfiguration(
        commandName: "store", abstract: "Care for the metadata store.",
        subcommands: [Reconstruct.self])
    package init() {}

    package struct Reconstruct: AsyncParsableCommand {
        package static let configuration = CommandConfiguration(
            abstract: "Rebuild what the store knows of volumes from the replicas on the nodes.",
            discussion: """
                For a lost store (start a controller on an empty directory, let the nodes \
                register, then --from-nodes), or one restored from an old backup (--volume). \
                Shows what was found; acts with --yes. Settings that replicas do not know, such \
                as the number of copies asked for, are guessed from what there is.
                """)

        @Flag(help: "Every volume any node holds a replica of.")
        package var fromNodes = false

        @Option(help: "This volume only.", transform: Label.init(typed:))
        package var volume: Label?

        @Flag(help: "Also where replicas of the record were not found: they are gone for good.")
        package var force = false

        @Flag(help: "Do it.")
        package var yes = false

        @OptionGroup package var options: GlobalOptions
        package init() {}

        package func validate() throws {
            guard fromNodes != (volume != nil) else {
                throw ValidationError("give --from-nodes, or one volume with --volume")
            }
        }

        package func run() async throws {
            try await Session.run(options) { session in
                var request = Haptera_V1_ReconstructStoreRequest()
                request.volume = volume?.text ?? ""
                request.force = force
                request.act = yes
                let found = try await session.cluster.reconstructStore(
                    request, options: session.callOptions)
                session.say(
                    Presentation.value(found),
                    quiet: found.volumes.map(\.name).joined(separator: "\n")
                ) { _ in Presentation.text(found, acted: yes) }
                let refused = found.volumes.filter { !$0.current && !$0.objection.isEmpty }
                guard refused.isEmpty else {
                    throw CommandFailure(
                        .conflict,
                        "not reconstructed: \(refused.map(\.name).joined(separator: ", "))")
                }
            }
        }
    }
}

extension Presentation {
    static func value(_ found: Haptera_V1_ReconstructStoreResponse) -> OutputValue {
        .object([
            ("volumes", .list(found.volumes.map(value))),
            ("problems", .list(found.problems.map { .text($0) })),
        ])
    }

    private static func value(_ volume: Haptera_V1_ReconstructedVolume) -> OutputValue {
        .object([
            ("name", .text(volume.name)),
            ("id", .text(volume.id)),
            ("sizeBytes", .number(volume.sizeBytes)),
            ("epoch", .number(volume.epoch)),
            ("storedEpoch", .number(volume.storedEpoch)),
            ("newestOn", .list(volume.newestOn.map { .text($0) })),
            ("found", .list(volume.found.map { .text($0) })),
            ("missing", .list(volume.missing.map { .text($0) })),
            ("current", .flag(volume.current)),
            ("safe", .flag(volume.safe)),
            ("objection", .optional(volume.objection)),
            ("newEpoch", volume.newEpoch == 0 ? .null : .number(volume.newEpoch)),
        ])
    }

    static func text(_ found: Haptera_V1_ReconstructStoreResponse, acted: Bool) -> String {
        var lines = found.volumes.flatMap { volume in
            [
                "volume \(volume.name): \(verdict(volume))",
                "    newest record: epoch \(volume.epoch), on "
                    + (volume.newestOn.isEmpty ? "none" : volume.newestOn.joined(separator: ", ")),
                "    found:         \(volume.found.joined(separator: ", "))",
            ]
                + (volume.missing.isEmpty
                    ? [] : ["    not found:     \(volume.missing.joined(separator: ", "))"])
        }
        if found.volumes.isEmpty { lines.append("the nodes hold no replicas") }
        lines += found.problems.map { "problem: \($0)" }
        let isPossible = found.volumes.contains { !$0.current && $0.objection.isEmpty }
        if !acted, isPossible {
            lines += ["", "nothing was done yet; to act: the same with --yes"]
        }
        return lines.joined(separator: "\n")
    }

    private static func verdict(_ volume: Haptera_V1_ReconstructedVolume) -> String {
        if volume.current { return "the store is as new as its replicas" }
        if !volume.objection.isEmpty { return volume.objection }
        if volume.newEpoch > 0 { return "reconstructed, epoch \(volume.newEpoch)" }
        return volume.safe
            ? "can be reconstructed" : "can be reconstructed without what was not found"
    }
}
