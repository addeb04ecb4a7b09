import HapteraTesting

#if canImport(Glibc)
    import Glibc
#else
    import Musl
#endif

let words = Array(CommandLine.arguments.dropFirst())
switch words.first {
case "fuzz": exit(FuzzCommand.run(Array(words.dropFirst())))
case "crash-replay": exit(CrashReplayCommand.run(Array(words.dropFirst())))
default: exit(SimulatorCommand.run(words))
}
