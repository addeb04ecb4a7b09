import HapteraCore
import Testing

@testable import HapteraTesting

/// The simulator notices when a rule of the protocol is missing. Each rule is switched off, and one
/// of the seeds beside it must fail; without the mutation they pass (`SimulationTests` runs more).
@Suite struct MutationTests {
    struct Case: CustomTestStringConvertible {
        var name: String
        var seeds: [UInt64]
        var testDescription: String { name }
    }
    static let cases: [Case] = [
        Case(name: "ackBeforeCAS", seeds: [4, 5, 12]),
        Case(name: "ackBeforeInstall", seeds: [4, 5, 9]),
        Case(name: "noEpochCheck", seeds: [1, 6, 9]),
        Case(name: "installWithoutDrain", seeds: [14, 20, 25]),
        Case(name: "promoteWithoutRequiringJoiner", seeds: [19, 22, 24]),
        Case(name: "promoteWithoutFlush", seeds: [5, 8, 9]),
        Case(name: "noIntervalLock", seeds: [2, 4, 5]),
        Case(name: "dataBeforeActivate", seeds: [1, 2, 3]),
        Case(name: "stableBeforeResolved", seeds: [95, 172, 258, 316]),
        Case(name: "drainWithoutFlush", seeds: [5, 9, 12]),
        Case(name: "noRestamp", seeds: [1, 2, 3]),
        Case(name: "skipResolution", seeds: [12, 14, 18]),
        Case(name: "rebootedSource", seeds: [12, 13, 46]),
        Case(name: "retryFailedSync", seeds: [75, 97, 116, 136]),
        Case(name: "readFromJoiner", seeds: [4, 5, 9]),
        Case(name: "inFlightRegionsNotCopied", seeds: [153]),
        Case(name: "flushWithoutLog", seeds: [1, 2, 4]),
        Case(name: "inDoubtCASAssumedLost", seeds: [4, 5, 12]),
        Case(name: "noJoinerLock", seeds: [38, 65]),
        Case(name: "readWithoutChecksum", seeds: [5, 24, 48]),
        Case(name: "flushWithoutSync", seeds: [1, 2, 4]),
        Case(name: "flushWhileResolving", seeds: [46, 56, 160, 316, 400]),
        Case(name: "drainBeforeLogSync", seeds: [45, 50, 69]),
    ]

    @Test(arguments: cases)
    func isCaught(_ entry: Case) throws {
        let named = try #require(MutationSet.named.first { $0.name == entry.name })
        var options = SimulationOptions()
        options.mutations = named.mutation
        let isCaught = entry.seeds.contains {
            simulate(seed: $0, options: options).failure != nil
        }
        #expect(isCaught, "no seed of \(entry.seeds) fails with \(entry.name)")
    }

    /// No rule is left without its seeds, and none of the seeds fails by itself.
    @Test func everyMutationHasSeeds() {
        for (name, _) in MutationSet.named {
            #expect(Self.cases.contains { $0.name == name && !$0.seeds.isEmpty }, "\(name)")
        }
    }
}
