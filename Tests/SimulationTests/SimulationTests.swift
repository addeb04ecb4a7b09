import HapteraCore
import Testing

@testable import HapteraTesting

/// Whole worlds from fixed seeds. A failure here is reproduced, with every event, by
/// `haptera-sim --seed N --steps 4000 --trace`.
@Suite struct SimulationTests {
    private static let steps = 4000

    @Test(arguments: 0..<12)
    func worldsKeepEveryInvariant(part: Int) {
        for seed in UInt64(part * 12 + 1)...UInt64(part * 12 + 12) {
            var options = SimulationOptions()
            options.steps = Self.steps
            let outcome = simulate(seed: seed, options: options)
            #expect(
                outcome.failure == nil,
                "seed \(seed), step \(outcome.failure?.step ?? 0): \(outcome.failure?.what ?? "")")
        }
    }

    @Test(arguments: [1, 2, 5])
    func worldsOfOtherSizes(replicas: Int) {
        for seed in 1...6 as ClosedRange<UInt64> {
            var options = SimulationOptions()
            options.steps = Self.steps
            options.replicas = replicas
            let outcome = simulate(seed: seed, options: options)
            #expect(
                outcome.failure == nil,
                "seed \(seed) of \(replicas) replicas: \(outcome.failure?.what ?? "")")
        }
    }

    /// The same seed is the same run, event by event: the trace of one is the trace of the other.
    @Test func runsAreDeterministic() {
        func trace(_ seed: UInt64) -> [String] {
            let lines = Lines()
            var options = SimulationOptions()
            options.steps = 2000
            options.trace = { lines.append($0) }
            _ = simulate(seed: seed, options: options)
            return lines.all
        }
        let first = trace(7)
        #expect(first.count > 1000)
        #expect(first == trace(7))
        #expect(first != trace(8))
    }

    private final class Lines: @unchecked Sendable {
        // Used by one thread: the one that runs the simulation.
        private(set) var all: [String] = []
        func append(_ line: String) { all.append(line) }
    }
}
