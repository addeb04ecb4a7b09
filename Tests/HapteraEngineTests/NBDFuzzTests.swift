import HapteraTesting
import Testing

/// A short run of each fuzzer; long ones are for `haptera-sim`.
@Suite struct NBDFuzzTests {
    @Test(arguments: FuzzNBD.Target.allCases)
    func mutatedStreams(_ target: FuzzNBD.Target) throws {
        let report = try FuzzNBD.run(target, seed: 20_26, inputs: 2_000)
        #expect(report.inputs == 2_000)
        // The inputs get somewhere: they are neither all refused nor all cut off at once.
        #expect(report.replies > 1_000 && report.hangUps > 100)
        if target == .requests {
            #expect(report.requests - report.refused > 500 && report.refused > 500)
        }
    }

    @Test func theSameSeedIsTheSameRun() throws {
        let first = try FuzzNBD.run(.requests, seed: 7, inputs: 200)
        #expect(try FuzzNBD.run(.requests, seed: 7, inputs: 200) == first)
        #expect(try FuzzNBD.run(.requests, seed: 8, inputs: 200) != first)
    }
}
