import ArgumentParser
import Foundation
import GRPCCore
import HapteraAPI
import HapteraHost
import HapteraTesting

package struct ChaosCommand: AsyncParsableCommand {
    package static let configuration = CommandConfiguration(
        commandName: "chaos", abstract: "Break a scratch volume on purpose, and check it.",
        subcommands: [Run.self])
    package init() {}
}

/// Faults a node agent can cause without the rights of root.
package enum ChaosFault: String, CaseIterable, Sendable {
    case kill
    case pause
    case flip
}

package struct ChaosFaults: Equatable, Sendable {
    package var faults: [ChaosFault]
    package static let all = ChaosFaults(ChaosFault.allCases)

    private init(_ faults: [ChaosFault]) { self.faults = faults }

    package init(typed: String) throws {
        faults = try typed.split(separator: ",").map { word in
            if let fault = ChaosFault(rawValue: String(word)) { return fault }
            guard word == "partition" || word == "full" else {
                throw ValidationError("'\(word)' is no fault: use kill, pause, flip")
            }
            throw ValidationError("'\(word)' needs root's tools on the nodes, so it is left out")
        }
        guard !faults.isEmpty else { throw ValidationError("--faults is empty") }
    }
}

extension ChaosCommand {
    package struct Run: AsyncParsableCommand {
        package static let configuration = CommandConfiguration(
            abstract: "Clients write and read while processes are killed and bits flip.",
            discussion: """
                The volume is made with 'volume create --scratch', is attached on this host, and \
                loses what it holds. Clients write blocks that say what they are; at the end the \
                history of each block is judged: no acknowledged write lost, no read that goes \
                back, no foreign byte, no error. Ends with status 1 if anything cannot be \
                explained.
                """)

        @Option(help: "The scratch volume.", transform: Label.init(typed:))
        package var volume: Label

        @Option(name: .customLong("for"), help: "How long, up to 1h.")
        package var time = Timeout(seconds: 60)

        @Option(help: "Any of kill, pause, flip.", transform: ChaosFaults.init(typed:))
        package var faults = ChaosFaults.all

        @Option(help: "Where the choices start from; random without it.")
        package var seed: UInt64?

        @Option(help: "Clients, 1 to 32.")
        package var workers = 4

        @OptionGroup package var options: GlobalOptions
        package init() {}

        package func validate() throws {
            guard (1...32).contains(workers) else {
                throw ValidationError("--workers is 1 to 32, not \(workers)")
            }
            guard time.seconds <= 3600 else { throw ValidationError("--for is at most 1h") }
        }

        package func run() async throws {
            var options = options
            options.timeout = Timeout(seconds: time.seconds + options.timeout.seconds * 3)
            try await Session.run(options) { session in
                let seed = seed ?? UInt64.random(in: 0 ... .max)
                let chaos = Chaos(
                    session: session, name: volume.text, faults: faults.faults,
                    random: RandomSource(seed: seed))
                let outcome = try await chaos.run(
                    for: .seconds(time.seconds), workers: workers, seed: seed)
                session.say(outcome.value) { _ in outcome.text }
                guard outcome.violations.isEmpty else {
                    throw CommandFailure(
                        .failed, "\(outcome.violations.count) violations; seed \(seed)")
                }
            }
        }
    }
}

struct ChaosOutcome: Sendable {
    var seed: UInt64
    var operations: Int
    var acknowledged: Int
    var faults: [String: Int]
    var violations: [String]

    var value: OutputValue {
        .object([
            ("seed", .text("\(seed)")),
            ("operations", .number(UInt64(operations))),
            ("acknowledged", .number(UInt64(acknowledged))),
            (
                "faults",
                .object(faults.sorted { $0.key < $1.key }.map { ($0, .number(UInt64($1))) })
            ),
            ("violations", .list(violations.map { .text($0) })),
        ])
    }
    var text: String {
        let causes = faults.sorted { $0.key < $1.key }.map { "\($1) x \($0)" }
        return
            ([
                "\(acknowledged) of \(operations) requests answered; "
                    + (causes.isEmpty ? "no fault" : causes.joined(separator: ", "))
                    + "; seed \(seed)"
            ]
            + (violations.isEmpty ? ["every block's history can be explained"] : violations))
            .joined(separator: "\n")
    }
}

/// One run: faults one after another, while the workload goes on.
struct Chaos {
    let session: Session
    let name: String
    let faults: [ChaosFault]
    let random: RandomSource

    func run(for time: Duration, workers: Int, seed: UInt64) async throws -> ChaosOutcome {
        let volume = try await healthy()
        guard volume.scratch else {
            throw CommandFailure(
                .conflict,
                "'\(name)' is no scratch volume; make one: storagectl volume create "
                    + "NAME --size SIZE --scratch")
        }
        guard let socket = volume.engine.unixUri.split(separator: "=").last.map(String.init),
            FileManager.default.fileExists(atPath: socket)
        else {
            throw CommandFailure(
                .conflict,
                "'\(name)' is not attached on this host; run this on node "
                    + "\(volume.engine.node)")
        }
        let workload = ChaosWorkload(path: socket, export: name, sizeBytes: volume.sizeBytes)
        try workload.fill()
        workload.start(workers: workers, seed: seed)
        var caused: [String: Int] = [:]
        do {
            caused = try await cause(volume, until: ContinuousClock.now + time, workload)
        } catch {
            workload.stop()
            throw error
        }
        workload.stop()
        _ = try await healthy()
        try workload.readAll()
        let counts = workload.history.counts
        return ChaosOutcome(
            seed: seed, operations: counts.operations, acknowledged: counts.acknowledged,
            faults: caused, violations: workload.history.judge())
    }

    /// What a fault did is known to the controller by then, at the latest.
    private static let newsMilliseconds = 2500

    /// Bits flip in one replica only, and then nothing else is broken before all are in sync: one
    /// good copy of everything stays.
    private func cause(
        _ volume: Haptera_V1_Volume, until end: ContinuousClock.Instant, _ workload: ChaosWorkload
    ) async throws -> [String: Int] {
        var caused: [String: Int] = [:]
        let progress = Progress(session.options)
        defer { progress.clear() }
        let rotten = random.pick(volume.replicas).id
        let targets = volume.replicas.map(\.id) + [""]
        while ContinuousClock.now < end {
            let fault = random.pick(faults)
            let target = fault == .flip ? rotten : random.pick(targets)
            if faults.contains(.flip) || random.permille(500) { _ = try await healthy() }
            if try await inject(fault.rawValue, target) {
                let noun = target.isEmpty ? "engine" : "replica"
                caused["\(fault.rawValue) \(noun)", default: 0] += 1
            }
            let pause = random.between(faults.contains(.flip) ? Self.newsMilliseconds : 200, 4000)
            try await Task.sleep(for: .milliseconds(pause))
            if fault == .pause {
                _ = try await inject("resume", target)
                if faults.contains(.flip) {
                    try await Task.sleep(for: .milliseconds(Self.newsMilliseconds))
                }
            }
            progress.show(
                "\(caused.values.reduce(0, +)) faults, "
                    + "\(workload.history.counts.acknowledged) requests answered")
        }
        return caused
    }

    /// False if there was nothing to break just now.
    private func inject(_ kind: String, _ replica: String) async throws -> Bool {
        var request = Haptera_V1_InjectVolumeFaultRequest()
        request.volume = name
        request.replicaID = replica
        request.kind = kind
        request.random = random.next()
        do {
            _ = try await session.cluster.injectVolumeFault(request, options: session.callOptions)
            return true
        } catch let error as RPCError where error.code == .failedPrecondition {
            return false
        }
    }

    private func healthy() async throws -> Haptera_V1_Volume {
        let name = name
        let volume = try await session.follow(name, "waiting for") { volume in
            guard let volume, volume.hasEngine else {
                throw CommandFailure(.conflict, "volume '\(name)' is not attached")
            }
            return volume.state == .attached && volume.robustness == .healthy
                && volume.engine.pid > 0
        }
        guard let volume else { throw CommandFailure(.notFound, "volume '\(name)' is gone") }
        return volume
    }
}
