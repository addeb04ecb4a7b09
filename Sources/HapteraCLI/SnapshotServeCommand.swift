import ArgumentParser
import Dispatch
import Foundation
import Glibc
import HapteraAPI
import HapteraHost
import Synchronization

extension SnapshotCommand {
    package struct Serve: AsyncParsableCommand {
        package static let configuration = CommandConfiguration(
            abstract: "Let a snapshot be read with any NBD client, for as long as this runs.",
            discussion: """
                The volume need not be attached; it may be attached and detached meanwhile, which \
                readers at the local address do not notice. Ends when it is interrupted, or when \
                the time is up.
                """)

        @Argument(help: "The volume's name.", transform: Label.init(typed:))
        package var volume: Label

        @Argument(help: "The snapshot's name.", transform: SnapshotArgument.init(typed:))
        package var name: SnapshotArgument

        @Option(
            name: .customLong("for"), parsing: .unconditional,
            help: "For so long at most: 30m, 2h, or seconds.",
            transform: Timeout.init(typed:))
        package var time: Timeout?

        @OptionGroup package var options: GlobalOptions
        package init() {}

        package func run() async throws {
            try await Session.run(options) { session in
                try await session.reading(volume.text, name.text) { source in
                    let interruption = Interruption()
                    let relay = try NBDRelay(source)
                    relay.start()
                    defer { relay.stop() }
                    session.say(
                        Presentation.access(source.snapshot, local: relay.uri), quiet: relay.uri
                    ) { _ in
                        Presentation.accessText(source.snapshot, local: relay.uri)
                            + "\nserved until this is interrupted"
                    }
                    flushOutput()
                    try await wait(source, interruption)
                }
            }
        }

        private func wait(_ source: SnapshotSource, _ interruption: Interruption) async throws {
            let end = time.map { ContinuousClock.now + .seconds($0.seconds) }
            while !interruption.hasCome, end.map({ ContinuousClock.now < $0 }) ?? true {
                if let failure = source.failure { throw failure }
                try await Task.sleep(for: .milliseconds(200))
            }
        }
    }
}

/// SIGINT and SIGTERM, from here on: there is something to put in order first.
final class Interruption: @unchecked Sendable {
    private let flag = Mutex(false)
    private let sources: [any DispatchSourceSignal]
    var hasCome: Bool { flag.withLock { $0 } }

    init() {
        sources = [SIGINT, SIGTERM].map { number in
            signal(number, SIG_IGN)
            return DispatchSource.makeSignalSource(signal: number, queue: .global())
        }
        for source in sources {
            source.setEventHandler { [unowned self] in flag.withLock { $0 = true } }
            source.resume()
        }
    }
}
