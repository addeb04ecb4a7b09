import HapteraCore

/// `haptera-sim crash-replay`: crash images by the thousand, opened by the real core.
package enum CrashReplayCommand {
    private static let usage = """
        usage: haptera-sim crash-replay [--seed N | --seeds FROM-TO] [--images M] [--mutation NAME]
                                    [--until-failure]
               haptera-sim crash-replay --list-mutations
          --seed N         run one seed (default 1); its remainder by 7 says what it does most
          --seeds FROM-TO  run all of them, both ends included
          --images M       crash images of each seed (default \(CrashReplayOptions().images))
          --mutation NAME  switch one rule off; the run should then fail
          --until-failure  stop at the first failing seed
        mutations: \(MutationSet.crashReplay.map(\.name).joined(separator: " "))
        """

    /// The exit status: 0 all passed, 1 some failed, 2 usage.
    package static func run(_ arguments: [String]) -> Int32 {
        if arguments == ["--list-mutations"] {
            for (name, _) in MutationSet.crashReplay { print(name) }
            return 0
        }
        var seeds: ClosedRange<UInt64> = 1...1
        var options = CrashReplayOptions()
        var stopsAtFailure = false
        var rest = arguments[...]
        while let option = rest.popFirst() {
            if option == "--until-failure" {
                stopsAtFailure = true
                continue
            }
            let numbers =
                rest.popFirst().map { [$0] + $0.split(separator: "-").map(String.init) } ?? []
            switch (option, numbers.dropFirst().compactMap { UInt64($0) }) {
            case ("--seed", let found) where found.count == 1: seeds = found[0]...found[0]
            case ("--seeds", let found) where found.count == 2 && found[0] <= found[1]:
                seeds = found[0]...found[1]
            case ("--images", let found) where found.count == 1 && found[0] < 1 << 32:
                options.images = Int(found[0])
            case ("--mutation", _):
                let found = MutationSet.all.first { $0.name == numbers.first }
                guard let found else {
                    print(usage)
                    return 2
                }
                options.mutations.insert(found.mutation)
            default:
                print(usage)
                return option == "--help" ? 0 : 2
            }
        }
        var total = CrashReplayOutcome()
        var (failed, runs) = (0, 0)
        for seed in seeds {
            runs += 1
            let outcome = CrashReplay.run(seed: seed, options: options)
            total.images += outcome.images
            total.events += outcome.events
            total.crashes += outcome.crashes
            guard let failure = outcome.failure else { continue }
            failed += 1
            print("seed \(seed): FAILED at \(failure)")
            if stopsAtFailure { break }
        }
        print(
            "\(runs) seeds, \(failed) failed, \(total.images) images of \(total.events)"
                + " events, \(total.crashes) crashes gone on from")
        return failed == 0 ? 0 : 1
    }
}
