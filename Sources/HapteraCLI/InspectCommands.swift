import ArgumentParser
import GRPCCore
import HapteraAPI
import HapteraHost

package struct ReplicaCommand: AsyncParsableCommand {
    package static let configuration = CommandConfiguration(
        commandName: "replica", abstract: "Look at replicas, replace and remove them.",
        subcommands: [List.self, RebuildStatus.self, Replace.self, Rejoin.self, Delete.self])
    package init() {}

    package struct List: AsyncParsableCommand {
        package static let configuration = CommandConfiguration(
            abstract: "List the replicas of one volume, or of all.")

        @Argument(
            help: "The volume's name; all volumes without it.", transform: Label.init(typed:))
        package var volume: Label?

        @Flag(help: "List again whenever something changes.")
        package var watch = false

        @OptionGroup package var options: GlobalOptions
        package init() {}

        package func run() async throws {
            try await Session.run(options) { session in
                var request = Haptera_V1_ListReplicasRequest()
                request.volume = volume?.text ?? ""
                let wanted = request
                try await session.list(watch: watch) {
                    let replicas = try await session.volumes.listReplicas(
                        wanted, options: session.watchOptions
                    ).replicas
                    return (
                        .list(replicas.map { Presentation.value($0, withVolume: true) }),
                        names: replicas.map(\.id).joined(separator: "\n"),
                        Presentation.table(replicas, wide: options.output == .wide)
                    )
                }
            }
        }
    }
}

package struct EventsCommand: AsyncParsableCommand {
    package static let configuration = CommandConfiguration(
        commandName: "events", abstract: "Show what happened, oldest first.",
        discussion: "With --follow and -o json, each event is one line.")

    @Flag(name: .shortAndLong, help: "Go on showing events as they happen.")
    package var follow = false

    @Option(help: "Show at most so many of the newest, up to 1000.")
    package var limit = 100

    @OptionGroup package var options: GlobalOptions
    package init() {}

    package func validate() throws {
        guard (1...1000).contains(limit) else {
            throw ValidationError("--limit is 1 to 1000, not \(limit)")
        }
    }

    package func run() async throws {
        try await Session.run(options) { session in
            var request = Haptera_V1_ListEventsRequest()
            request.limit = UInt32(limit)
            let events = try await session.cluster.listEvents(
                request, options: session.callOptions
            ).events
            guard follow else {
                session.say(.list(events.map { Presentation.value($0) })) { wide in
                    events.map { Presentation.line($0, wide: wide) }.joined(separator: "\n")
                }
                return
            }
            for event in events { show(event) }
            flushOutput()
            request.afterID = events.last?.id ?? 0
            // Without a deadline: it ends when the user ends it.
            try await session.cluster.watchEvents(request) { response in
                for try await event in response.messages {
                    show(event)
                    flushOutput()
                }
            }
            throw CommandFailure(.unavailable, "the controller at \(session.server) has stopped")
        }
    }

    private func show(_ event: Haptera_V1_Event) {
        switch options.output {
        case .json: print(Presentation.value(event).json(pretty: false))
        case .yaml: print("---\n" + Presentation.value(event).yaml)
        case .table, .wide: print(Presentation.line(event, wide: options.output == .wide))
        }
    }
}

package struct VersionCommand: AsyncParsableCommand {
    package static let configuration = CommandConfiguration(
        commandName: "version",
        abstract: "Show this program's version, and the controller's if it answers.")

    @OptionGroup package var options: GlobalOptions
    package init() {}

    package func run() async throws {
        let server = try await serverVersion()
        let value = OutputValue.object([
            ("client", .text(HapteraVersion.text)), ("server", .optional(server)),
        ])
        switch options.output {
        case .json: print(value.json())
        case .yaml: print(value.yaml)
        case .table, .wide:
            print("client  \(HapteraVersion.text)")
            print("server  \(server.isEmpty ? "does not answer" : server)")
        }
    }

    /// Empty if none answers: that is no error here.
    private func serverVersion() async throws -> String {
        do {
            var options = options
            options.timeout = Timeout(seconds: min(options.timeout.seconds, 5))
            return try await Session.run(options) { session in
                try await session.cluster.getVersion(
                    Haptera_V1_GetVersionRequest(), options: session.callOptions
                ).version
            }
        } catch let failure as CommandFailure
            where failure.status == .unavailable || failure.status == .usage
        {
            return ""
        }
    }
}

package struct CompletionCommand: ParsableCommand {
    package enum Shell: String, ExpressibleByArgument, CaseIterable, Sendable {
        case bash
        case zsh
        case fish
    }

    package static let configuration = CommandConfiguration(
        commandName: "completion", abstract: "Print a completion script for a shell.",
        discussion: """
            bash: source <(storagectl completion bash)
            zsh:  storagectl completion zsh > "${fpath[1]}/_storagectl"
            fish: storagectl completion fish > ~/.config/fish/completions/storagectl.fish
            """)

    @Argument(help: "bash, zsh or fish.")
    package var shell: Shell
    package init() {}

    package func run() {
        let script =
            switch shell {
            case .bash: Storagectl.completionScript(for: .bash)
            case .zsh: Storagectl.completionScript(for: .zsh)
            case .fish: Storagectl.completionScript(for: .fish)
            }
        print(script)
    }
}
