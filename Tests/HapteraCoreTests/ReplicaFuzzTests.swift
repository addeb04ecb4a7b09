import HapteraTesting
import Testing

/// A short run of each fuzzer; long ones are started by hand.
@Suite struct ReplicaFuzzTests {
    @Test(arguments: [
        ("frame", 20_000), ("manifest", 5000), ("table", 5000), ("log", 300), ("directory", 150),
        ("core", 6000),
    ])
    func mutatedInputIsAnsweredNotTrapped(name: String, iterations: Int) throws {
        let tally = try #require(
            ReplicaFuzzer.run(name, seed: 1, iterations: iterations))
        // Both ways are taken, or the fuzzer tries nothing.
        #expect(tally.accepted > 0)
        #expect(tally.rejected > 0)
        #expect(ReplicaFuzzer.run("nothing", seed: 1, iterations: 1) == nil)
    }
}
