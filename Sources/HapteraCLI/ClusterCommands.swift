import ArgumentParser
import Foundation
import GRPCCore
import HapteraAPI
import HapteraHost

package struct ClusterCommand: AsyncParsableCommand {
    package static let configuration = CommandConfiguration(
        commandName: "cluster", abstract: "Run a cluster on this host; look at any cluster.",
        subcommands: [Up.self, Down.self, StatusCommand.self])
    package init() {}
}

extension ClusterCommand {
    package struct Up: AsyncParsableCommand {
        package static let configuration = CommandConfiguration(
            abstract: "Start a cluster on this host and make it the current context.",
            discussion: """
                Starts what does not run yet: again it changes nothing. The programs are looked \
                for in $HAPTERA_BIN_DIR (directories separated by colons) and next to this one.
                """)

        @Option(help: "Where everything of the cluster is kept.")
        package var dir: String

        @Option(help: "Node agents to run, 1 to \(LocalCluster.nodesMax).")
        package var nodes = 3

        @OptionGroup package var options: GlobalOptions
        package init() {}

        package func validate() throws {
            guard (1...LocalCluster.nodesMax).contains(nodes) else {
                throw ValidationError("--nodes is 1 to \(LocalCluster.nodesMax), not \(nodes)")
            }
            guard !dir.isEmpty else { throw ValidationError("--dir is empty") }
        }

        package func run() async throws {
            var cluster = try LocalCluster(directory: dir, nodes: nodes)
            // Two at once would start everything twice.
            let lock = try DirectoryLock(cluster.directory)
            defer { withExtendedLifetime(lock) {} }
            try cluster.start()
            let ready = cluster
            let count = try await Self.waitUntilReady(ready, options)
            let name = options.context ?? Contexts.defaultName
            var contexts = try Contexts.load()
            contexts.contexts[name] = .init(server: ready.server, directory: ready.directory)
            contexts.current = name
            try contexts.save()
            Self.report(ready, context: name, nodes: count, options)
        }

        private static func waitUntilReady(
            _ cluster: LocalCluster, _ options: GlobalOptions
        ) async throws -> Int {
            let progress = Progress(options)
            defer { progress.clear() }
            let wanted = Set(cluster.layout.nodes)
            return try await Session.run(options, server: cluster.server) { session in
                while !session.isPastDeadline {
                    try cluster.requireDaemons()
                    var callOptions = session.callOptions
                    callOptions.timeout = .seconds(2)
                    let nodes = try? await session.cluster.listNodes(
                        Haptera_V1_ListNodesRequest(), options: callOptions
                    ).nodes
                    let ready = wanted.intersection((nodes ?? []).filter(\.ready).map(\.name))
                    if ready == wanted { return wanted.count }
                    progress.show("starting: \(ready.count) of \(wanted.count) nodes ready")
                    try await Task.sleep(for: .milliseconds(100))
                }
                throw CommandFailure(
                    .unavailable,
                    "the cluster was not ready after \(options.timeout.seconds) s; "
                        + "see the logs in \(cluster.directory)")
            }
        }

        private static func report(
            _ cluster: LocalCluster, context: String, nodes: Int, _ options: GlobalOptions
        ) {
            let value = OutputValue.object([
                ("server", .text(cluster.server)), ("directory", .text(cluster.directory)),
                ("context", .text(context)), ("nodes", .number(UInt64(nodes))),
            ])
            switch options.output {
            case .json: print(value.json())
            case .yaml: print(value.yaml)
            case .table, .wide:
                print(
                    options.quiet
                        ? cluster.server
                        : "cluster ready at \(cluster.server): \(nodes) nodes, context \(context)")
            }
        }
    }

    package struct Down: AsyncParsableCommand {
        package static let configuration = CommandConfiguration(
            abstract: "Stop a cluster on this host, in order; its data stays.")

        @Option(help: "The cluster's directory; otherwise the context's.")
        package var dir: String?

        @OptionGroup package var options: GlobalOptions
        package init() {}

        package func run() async throws {
            let directory = try self.dir ?? Self.directory(options)
            guard let cluster = try LocalCluster(existing: directory) else {
                throw CommandFailure(
                    .notFound,
                    "there is no cluster in \(directory): 'storagectl cluster up --dir' makes one")
            }
            let lock = try DirectoryLock(cluster.directory)
            defer { withExtendedLifetime(lock) {} }
            let progress = Progress(options)
            await Self.detachAll(cluster, options)
            let killed = await cluster.stop { progress.show($0) }
            progress.clear()
            try Self.forget(cluster)
            let value = OutputValue.object([
                ("directory", .text(cluster.directory)),
                ("killed", .list(killed.map { .text($0) })),
            ])
            switch options.output {
            case .json: print(value.json())
            case .yaml: print(value.yaml)
            case .table, .wide:
                for path in killed where !options.quiet {
                    print("did not stop when asked, and was killed: \(path)")
                }
                if !options.quiet { print("cluster in \(cluster.directory) stopped") }
            }
        }

        private static func directory(_ options: GlobalOptions) throws -> String {
            let context = try Contexts.load().context(named: options.context)?.context
            guard let directory = context?.directory else {
                throw CommandFailure(
                    .usage, "no context names a cluster on this host; say which with --dir DIR")
            }
            return directory
        }

        /// As far as the controller can be reached; what remains is stopped directly.
        private static func detachAll(_ cluster: LocalCluster, _ options: GlobalOptions) async {
            guard cluster.isRunning("controller") else { return }
            try? await Session.run(options, server: cluster.server) { session in
                let volumes = try await session.volumes.listVolumes(
                    Haptera_V1_ListVolumesRequest(), options: session.callOptions
                ).volumes
                await withTaskGroup(of: Void.self) { group in
                    for volume in volumes where volume.hasEngine {
                        group.addTask { _ = try? await session.detach(volume.name) }
                    }
                }
            }
        }

        private static func forget(_ cluster: LocalCluster) throws {
            var contexts = try Contexts.load()
            let names = contexts.contexts.filter { $0.value.directory == cluster.directory }.keys
            guard !names.isEmpty else { return }
            for name in names {
                contexts.contexts[name] = nil
                if contexts.current == name { contexts.current = nil }
            }
            try contexts.save()
        }
    }
}

package struct StatusCommand: AsyncParsableCommand {
    package static let configuration = CommandConfiguration(
        commandName: "status", abstract: "Show the cluster's state in short.")

    @OptionGroup package var options: GlobalOptions
    package init() {}

    package func run() async throws {
        try await Session.run(options) { session in
            let status = try await session.cluster.getClusterStatus(
                Haptera_V1_GetClusterStatusRequest(), options: session.callOptions)
            session.say(Presentation.value(status, server: session.server)) { _ in
                Presentation.details(status, server: session.server)
            }
        }
    }
}
