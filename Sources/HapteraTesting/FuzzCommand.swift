#if canImport(Glibc)
    import Glibc
#else
    import Musl
#endif

/// `haptera-sim fuzz`: feeds mutated input to one parser. Crashes and traps end the process; the
/// last seed printed is the one to repeat.
package enum FuzzCommand {
    private static let targets = FuzzNBD.Target.allCases.map(\.rawValue) + ReplicaFuzzer.names
    /// Inputs per seed, so that a failure is repeated in a moment.
    private static let inputsPerSeed = 10_000

    private static var usage: String {
        """
        usage: haptera-sim fuzz TARGET [--seed N] [--inputs N]
          TARGET      \(targets.joined(separator: " | "))
          --seed N    the first seed (1); each runs \(inputsPerSeed) inputs
          --inputs N  inputs in all (100000)
        """
    }

    /// `arguments`: those behind `fuzz`. The exit status: 0 passed, 1 failed, 2 usage.
    package static func run(_ arguments: [String]) -> Int32 {
        var rest = arguments[...]
        var seed: UInt64 = 1
        var inputs = 100_000
        guard let target = rest.popFirst(), targets.contains(target) else {
            print(usage)
            return 2
        }
        while let option = rest.popFirst() {
            guard let value = rest.popFirst().flatMap(UInt64.init), value > 0 else {
                print(usage)
                return 2
            }
            switch option {
            case "--seed": seed = value
            case "--inputs": inputs = Int(clamping: value)
            default:
                print(usage)
                return 2
            }
        }
        return run(target, seed, inputs)
    }

    private static func run(_ target: String, _ first: UInt64, _ inputs: Int) -> Int32 {
        var seed = first
        var done = 0
        while done < inputs {
            let count = min(inputsPerSeed, inputs - done)
            print("\(target) seed \(seed): ", terminator: "")
            // Out before the inputs run: a trap leaves the seed on the screen.
            fflush(nil)
            guard let outcome = run(target, seed: seed, count: count) else { return 1 }
            print(outcome)
            done += count
            seed += 1
        }
        print("\(done) inputs, no failure")
        return 0
    }

    /// What came of `count` inputs; nil if one failed, which has been said then.
    private static func run(_ target: String, seed: UInt64, count: Int) -> String? {
        guard let parser = FuzzNBD.Target(rawValue: target) else {
            return ReplicaFuzzer.run(target, seed: seed, iterations: count).map {
                "\($0.accepted) accepted, \($0.rejected) rejected"
            }
        }
        do throws(FuzzNBD.Failure) {
            let report = try FuzzNBD.run(parser, seed: seed, inputs: count)
            return "\(report.replies) replies, \(report.requests) requests"
                + " (\(report.refused) refused), \(report.hangUps) ended"
        } catch {
            print("FAILED: input \(error.input) gave two answers")
            return nil
        }
    }
}
