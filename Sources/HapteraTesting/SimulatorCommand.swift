#if canImport(Glibc)
    import Glibc
#else
    import Musl
#endif
import HapteraCore

/// `haptera-sim`: runs seeds and reports which fail.
package enum SimulatorCommand {
    private static let usage = """
        usage: haptera-sim [--seed N | --seeds LIST] [--steps M] [--replicas K]
                           [--mutation NAME] [--rules-kept] [--until-failure] [--trace]
                           [--clones-of-clones] [--coverage]
               haptera-sim --list-mutations
          --seed N         run one seed (default 1)
          --seeds LIST     run all of them: FROM-TO, both ends included, or N, with commas between
          --steps M        events of each run's troubled part (default \
        \(SimulationOptions().steps))
          --replicas K     copies, 1 to \(Geometry.replicasMax) (default: drawn, 1 to 3)
          --mutation NAME  switch one rule off; the run should then fail. --list-mutations names
                           all, and behind a name what else judges the rule, if seeds do not
          --rules-kept     with --mutation: the same worlds with the rule on; none should fail
          --until-failure  stop at the first failing seed
          --trace          print every event
          --clones-of-clones
                           a clone that has outlived its source is cloned itself
          --coverage       print how often each check was made and each fault injected
        mutations: \(MutationSet.all.map(\.name).joined(separator: " "))
        """

    private struct Arguments {
        var seeds: [ClosedRange<UInt64>] = [1...1]
        var options = SimulationOptions()
        var stopsAtFailure = false
        var printsCoverage = false
    }

    /// The exit status: 0 all passed, 1 some failed, 2 usage.
    package static func run(_ arguments: [String]) -> Int32 {
        if arguments == ["--list-mutations"] {
            for (name, _, judge) in MutationSet.all {
                print(judge.map { "\(name) \($0)" } ?? name)
            }
            return 0
        }
        guard let parsed = parse(arguments) else {
            print(usage)
            return arguments.contains("--help") ? 0 : 2
        }
        reportTraps()
        let start = seconds()
        var failed = 0
        var acknowledged = 0
        var runs = 0
        var coverage = Coverage()
        for seed in parsed.seeds.lazy.joined() {
            // SAFETY: see `currentSeed`.
            unsafe currentSeed = seed
            let outcome = simulate(seed: seed, options: parsed.options)
            runs += 1
            coverage.add(outcome.coverage)
            acknowledged += outcome.acknowledged
            guard let failure = outcome.failure else { continue }
            failed += 1
            print("seed \(seed): FAILED at step \(failure.step): \(failure.what)")
            fflush(nil)
            if parsed.stopsAtFailure { break }
        }
        if parsed.printsCoverage {
            for line in coverage.lines { print(line) }
        }
        let elapsed = max(seconds() - start, 0.001)
        print(
            "\(runs) seeds, \(failed) failed, \(acknowledged) requests answered,"
                + " \(Int(Double(runs) * 60 / elapsed)) seeds per minute")
        return failed == 0 ? 0 : 1
    }

    private static func parse(_ arguments: [String]) -> Arguments? {
        var result = Arguments()
        var rest = arguments[...]
        while let option = rest.popFirst() {
            switch option {
            case "--trace": result.options.trace = { print($0) }
            case "--rules-kept": result.options.keepsRules = true
            case "--until-failure": result.stopsAtFailure = true
            case "--clones-of-clones": result.options.clonesClones = true
            case "--coverage": result.printsCoverage = true
            case "--seed":
                guard let seed = rest.popFirst().flatMap({ UInt64($0) }) else { return nil }
                result.seeds = [seed...seed]
            case "--seeds":
                guard let seeds = rest.popFirst().flatMap(ranges) else { return nil }
                result.seeds = seeds
            case "--steps":
                guard let steps = rest.popFirst().flatMap({ Int($0) }), steps > 0 else {
                    return nil
                }
                result.options.steps = steps
            case "--replicas":
                guard let count = rest.popFirst().flatMap({ Int($0) }),
                    (1...Geometry.replicasMax).contains(count)
                else { return nil }
                result.options.replicas = count
            case "--mutation":
                let name = rest.popFirst()
                guard let found = MutationSet.all.first(where: { $0.name == name }) else {
                    return nil
                }
                result.options.mutations.insert(found.mutation)
            default:
                return nil
            }
        }
        return result
    }

    private static func ranges(_ list: String) -> [ClosedRange<UInt64>]? {
        var found: [ClosedRange<UInt64>] = []
        for part in list.split(separator: ",", omittingEmptySubsequences: false) {
            let words = part.split(separator: "-", omittingEmptySubsequences: false)
            let ends = words.compactMap { UInt64($0) }
            guard let first = ends.first, let last = ends.last, ends.count == words.count,
                ends.count <= 2, first <= last
            else { return nil }
            found.append(first...last)
        }
        return found
    }

    private static func seconds() -> Double {
        var time = timespec()
        // SAFETY: `time` is a valid timespec for the call to fill.
        unsafe clock_gettime(CLOCK_MONOTONIC, &time)
        return Double(time.tv_sec) + Double(time.tv_nsec) / 1e9
    }

    // SAFETY: written by the only thread that runs seeds, read by the trap handler on that thread.
    nonisolated(unsafe) private static var currentSeed: UInt64 = 0

    /// A broken precondition ends the process: says in which seed before it does.
    private static func reportTraps() {
        for number in [SIGILL, SIGTRAP, SIGSEGV, SIGABRT] {
            // SAFETY: the handler captures nothing.
            _ = signal(number) { number in
                // SAFETY: see `currentSeed`; the process is past caring about allocation here.
                print("seed \(unsafe SimulatorCommand.currentSeed): FAILED by a trap")
                fflush(nil)
                signal(number, SIG_DFL)
                raise(number)
            }
        }
    }
}
