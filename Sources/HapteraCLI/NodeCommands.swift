import ArgumentParser
import HapteraAPI
import HapteraHost

/// How much of a node's capacity may be promised.
package struct OvercommitArgument: Equatable, Sendable {
    /// 0: no limit.
    package var percent: UInt32
    package init(typed: String) throws {
        let digits = typed.hasSuffix("%") ? String(typed.dropLast()) : typed
        if typed == "none" {
            percent = 0
        } else if let number = UInt32(digits), (1...100_000).contains(number) {
            percent = number
        } else {
            throw ValidationError(
                "'\(typed)' is no overcommit: write it as in 200%, from 1% to 100000%, or none")
        }
    }
}

/// A size, or nothing at all.
package struct ReserveArgument: Equatable, Sendable {
    package var bytes: UInt64
    package init(typed: String) throws {
        guard let bytes = VolumeSize.parse(typed), bytes <= VolumeSize.maximum else {
            throw ValidationError(
                "'\(typed)' is no reserve: write it as in 10GiB, at most 1PiB; 0: none")
        }
        self.bytes = bytes
    }
}

package struct NodeCommand: AsyncParsableCommand {
    package static let configuration = CommandConfiguration(
        commandName: "node", abstract: "Look at nodes, and limit what is put on them.",
        subcommands: [List.self, Show.self, Update.self])
    package init() {}

    package struct List: AsyncParsableCommand {
        package static let configuration = CommandConfiguration(abstract: "List all nodes.")

        @Flag(help: "List again whenever something changes.")
        package var watch = false

        @OptionGroup package var options: GlobalOptions
        package init() {}

        package func run() async throws {
            try await Session.run(options) { session in
                try await session.list(watch: watch) {
                    let nodes = try await session.cluster.listNodes(
                        Haptera_V1_ListNodesRequest(), options: session.watchOptions
                    ).nodes
                    return (
                        .list(nodes.map { Presentation.value($0) }),
                        names: nodes.map(\.name).joined(separator: "\n"),
                        Presentation.table(nodes, wide: options.output == .wide)
                    )
                }
            }
        }
    }

    package struct Show: AsyncParsableCommand {
        package static let configuration = CommandConfiguration(abstract: "Show one node.")

        @Argument(help: "The node's name.", transform: Label.init(typed:))
        package var name: Label

        @OptionGroup package var options: GlobalOptions
        package init() {}

        package func run() async throws {
            try await Session.run(options) { session in
                var request = Haptera_V1_GetNodeRequest()
                request.name = name.text
                let node = try await session.cluster.getNode(request, options: session.callOptions)
                session.say(Presentation.value(node), quiet: node.name) { _ in
                    Presentation.details(node)
                }
            }
        }
    }
}

extension NodeCommand {
    package struct Update: AsyncParsableCommand {
        package static let configuration = CommandConfiguration(
            abstract: "Limit what is put on a node.",
            discussion: """
                No replica is put on a node, and no volume grows there, where more of its \
                capacity would be promised than --overcommit allows, or less would stay available \
                than --reserve. What is there already stays.
                """)

        @Argument(help: "The node's name.", transform: Label.init(typed:))
        package var name: Label

        @Option(
            parsing: .unconditional,
            help: ArgumentHelp(
                """
                How much of the capacity may be promised: the sizes of the volumes whose replicas \
                are there, in percent of it; default none: no limit.
                """, valueName: "percent"),
            transform: OvercommitArgument.init(typed:))
        package var overcommit: OvercommitArgument?

        @Option(
            parsing: .unconditional,
            help: ArgumentHelp(
                "How much is to stay available; default 256MiB, at most a sixteenth.",
                valueName: "size"),
            transform: ReserveArgument.init(typed:))
        package var reserve: ReserveArgument?

        @OptionGroup package var options: GlobalOptions
        package init() {}

        package func validate() throws {
            guard overcommit != nil || reserve != nil else {
                throw ValidationError("nothing to change: give --overcommit, --reserve or both")
            }
        }

        package var request: Haptera_V1_UpdateNodeRequest {
            var request = Haptera_V1_UpdateNodeRequest()
            request.name = name.text
            if let overcommit { request.overcommitPercent = overcommit.percent }
            if let reserve { request.reserveBytes = reserve.bytes }
            return request
        }

        package func run() async throws {
            try await Session.run(options) { session in
                let wanted = request
                let node = try await session.change {
                    try await session.cluster.updateNode(wanted, options: session.callOptions)
                }
                session.say(Presentation.value(node), quiet: node.name) { _ in
                    "node \(node.name) updated: \(Presentation.limits(node))"
                }
            }
        }
    }
}
