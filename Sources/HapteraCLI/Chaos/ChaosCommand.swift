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

extension ChaosCommand {
    package struct Run: AsyncParsableCommand {
        package static let configuration = CommandConfiguration(
            abstract: "Clients write and read a scratch volume that is broken meanwhile.",
            discussion: """
                The volume is made with 'volume create --scratch', is attached on this host, and \
                loses what it holds. Clients write blocks that say what they are; at the end the \
                history of each block is judged: no acknowledged write lost, no read that goes \
                back, no foreign byte, no error. Ends with status 1 if anything cannot be \
                explained. The same seed gives the same faults in the same order.
                """)

        @Option(help: "The scratch volume.", transform: Label.init(typed:))
        package var volume: Label

        @Option(
            name: .customLong("for"), parsing: .unconditional, help: "How long, up to 1h.",
            transform: Timeout.init(typed:))
        package var time = Timeout(seconds: 60)

        @Option(
            help: "Any of kill, pause, partition, flip, full.", transform: ChaosFaults.init(typed:))
        package var faults = ChaosFaults.all

        @Option(parsing: .unconditional, help: "What all choices come from; random without it.")
        package var seed: UInt64?

        @Option(parsing: .unconditional, help: "Clients, 1 to 32.")
        package var workers = 4

        @OptionGroup package var options: GlobalOptions
        package init() {}

        package func validate() throws {
            guard (1...32).contains(workers) else {
                throw ValidationError("--workers is 1 to 32, not \(workers)")
            }
            guard (1...3600).contains(time.seconds) else {
                throw ValidationError("--for is 1s to 1h")
            }
        }

        package func run() async throws {
            var options = options
            options.timeout = Timeout(seconds: time.seconds + options.timeout.seconds * 3)
            try await Session.run(options) { session in
                let seed = seed ?? UInt64.random(in: 0 ... .max)
                let chaos = Chaos(
                    session: session, name: volume.text, faults: faults.faults, seed: seed)
                let outcome = try await chaos.run(for: .seconds(time.seconds), workers: workers)
                session.say(outcome.value) { _ in outcome.text }
                guard outcome.violations.isEmpty else {
                    throw CommandFailure(
                        .failed,
                        "\(outcome.violations.count) violations on volume '\(volume.text)', seed "
                            + "\(seed): keep the volume, and report them with its "
                            + "'storagectl events' and the logs of its nodes")
                }
            }
        }
    }
}

struct ChaosOutcome: Sendable {
    struct Count: Equatable, Sendable {
        var fault: ChaosFault
        /// `engine`, or a replica with its node.
        var target: String
        var caused = 0
        /// There was nothing to break just then.
        var skipped = 0
    }
    var seed: UInt64
    var seconds: Int
    var operations: Int
    var acknowledged: Int
    var longestPauseMilliseconds: UInt64
    var faults: [Count]
    var violations: [String]

    var value: OutputValue {
        .object([
            ("seed", .text("\(seed)")),
            ("seconds", .number(UInt64(seconds))),
            ("operations", .number(UInt64(operations))),
            ("acknowledged", .number(UInt64(acknowledged))),
            ("longestPauseMilliseconds", .number(longestPauseMilliseconds)),
            (
                "faults",
                .list(
                    faults.map {
                        .object([
                            ("fault", .text($0.fault.rawValue)), ("target", .text($0.target)),
                            ("caused", .number(UInt64($0.caused))),
                            ("skipped", .number(UInt64($0.skipped))),
                        ])
                    })
            ),
            ("violations", .list(violations.map { .text($0) })),
        ])
    }
    var text: String {
        let table = TextTable(
            ["FAULT", "TARGET", "CAUSED", "SKIPPED"],
            faults.map { [$0.fault.rawValue, $0.target, "\($0.caused)", "\($0.skipped)"] })
        let verdict =
            violations.isEmpty
            ? "no violation: the history of every block can be explained"
            : (["VIOLATIONS"] + violations).joined(separator: "\n")
        return """
            \(table.text)

            \(acknowledged) of \(operations) requests answered in \(seconds) s, longest pause \
            \(longestPauseMilliseconds) ms, seed \(seed)
            \(verdict)
            """
    }
}

/// One run: faults one after another, while the workload goes on.
struct Chaos {
    let session: Session
    let name: String
    let faults: [ChaosFault]
    let seed: UInt64

    func run(for time: Duration, workers: Int) async throws -> ChaosOutcome {
        let volume = try await healthy()
        guard let socket = volume.engine.unixUri.split(separator: "=").last.map(String.init),
            FileManager.default.fileExists(atPath: socket)
        else {
            throw CommandFailure(
                .conflict,
                "volume '\(name)' is attached on node \(volume.engine.node), not on this host: "
                    + "run this there")
        }
        let workload = ChaosWorkload(path: socket, export: name, sizeBytes: volume.sizeBytes)
        try workload.fill()
        workload.start(workers: workers, seed: seed)
        let caused: [ChaosOutcome.Count]
        do {
            caused = try await cause(volume, until: ContinuousClock.now + time, workload)
            _ = try await healthy()
        } catch {
            workload.stop()
            throw error
        }
        workload.stop()
        try workload.readAll()
        let counts = workload.history.counts
        return ChaosOutcome(
            seed: seed, seconds: Int(time.components.seconds), operations: counts.operations,
            acknowledged: counts.acknowledged,
            longestPauseMilliseconds: workload.history.longestPauseMilliseconds, faults: caused,
            violations: workload.history.judge())
    }

    private func cause(
        _ volume: Haptera_V1_Volume, until end: ContinuousClock.Instant, _ workload: ChaosWorkload
    ) async throws -> [ChaosOutcome.Count] {
        var counts: [ChaosOutcome.Count] = []
        let progress = Progress(session.options)
        defer { progress.clear() }
        let plan = FaultPlan(seed: seed, faults: faults, replicas: volume.replicas.count)
        while ContinuousClock.now < end {
            let step = plan.next()
            if step.waitsForHealth { _ = try await healthy() }
            let isCaused = try await inject(step, volume.replicas)
            let target =
                step.replica.map { volume.replicas[$0] }.map { "\($0.id) on \($0.node)" }
                ?? "engine"
            let index =
                counts.firstIndex { $0.fault == step.fault && $0.target == target } ?? counts.count
            if index == counts.count { counts.append(.init(fault: step.fault, target: target)) }
            if isCaused { counts[index].caused += 1 } else { counts[index].skipped += 1 }
            progress.show(
                "\(counts.reduce(0) { $0 + $1.caused }) faults, last: \(step.fault.rawValue) "
                    + "\(target); \(workload.history.counts.acknowledged) requests answered")
            let lasting = isCaused ? Int(step.milliseconds) : 0
            try await Task.sleep(for: .milliseconds(lasting + step.pauseMilliseconds))
        }
        return counts.sorted { ($0.fault.rawValue, $0.target) < ($1.fault.rawValue, $1.target) }
    }

    /// False if there was nothing to break just now, or nobody to do it.
    private func inject(_ step: FaultPlan.Step, _ replicas: [Haptera_V1_Replica]) async throws
        -> Bool
    {
        var request = Haptera_V1_InjectVolumeFaultRequest()
        request.volume = name
        request.replicaID = step.replica.map { replicas[$0].id } ?? ""
        request.kind = step.fault.rawValue
        request.random = step.random
        request.milliseconds = step.milliseconds
        do {
            _ = try await session.cluster.injectVolumeFault(request, options: session.callOptions)
            return true
        } catch let error as RPCError
            where [.failedPrecondition, .unavailable, .deadlineExceeded].contains(error.code)
        {
            return false
        }
    }

    private func healthy() async throws -> Haptera_V1_Volume {
        let name = name
        let volume = try await session.follow(
            name, "waiting until all replicas are in sync in",
            advice: "nothing more is broken; see 'storagectl volume why \(name)'"
        ) { volume in
            guard let volume else {
                throw CommandFailure(.notFound, "there is no volume '\(name)'")
            }
            guard volume.scratch else {
                throw CommandFailure(
                    .conflict,
                    "volume '\(name)' is no scratch volume, so nothing of it is broken on purpose; "
                        + "make one: storagectl volume create NAME --size SIZE --scratch")
            }
            guard volume.hasEngine else {
                throw CommandFailure(
                    .conflict,
                    "volume '\(name)' is not attached: storagectl volume attach \(name)")
            }
            return volume.state == .attached && volume.robustness == .healthy
                && volume.engine.pid > 0
        }
        guard let volume else { throw CommandFailure(.notFound, "volume '\(name)' is gone") }
        return volume
    }
}
