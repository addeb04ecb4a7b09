import HapteraCore
import Testing

@testable import HapteraTesting

/// Crash images of a busy replica. A failure here is reproduced by
/// `haptera-sim crash-replay --seed N --images M`.
@Suite struct CrashReplayTests {
    @Test(arguments: 0..<14 as Range<UInt64>)
    func everyImageOpensAndHoldsWhatWasPromised(seed: UInt64) {
        var options = CrashReplayOptions()
        options.images = 80
        let outcome = CrashReplay.run(seed: seed, options: options)
        #expect(outcome.failure == nil, "seed \(seed): \(outcome.failure ?? "")")
        #expect(outcome.images == 80)
    }

    @Test func runsAreDeterministic() {
        var options = CrashReplayOptions()
        options.images = 60
        let first = CrashReplay.run(seed: 5, options: options)
        #expect(first == CrashReplay.run(seed: 5, options: options))
        #expect(first != CrashReplay.run(seed: 6, options: options))
    }

    /// The oracle notices a copy that keeps no promise at all.
    @Test func aFlushThatDoesNotSyncIsNoticed() {
        var options = CrashReplayOptions()
        options.images = 500
        options.mutations = .flushWithoutSync
        let failure = CrashReplay.run(seed: 6, options: options).failure
        #expect(failure?.contains("lawful is") == true)
    }
}
