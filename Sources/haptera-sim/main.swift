import HapteraTesting

#if canImport(Glibc)
    import Glibc
#else
    import Musl
#endif

let words = Array(CommandLine.arguments.dropFirst())
exit(
    words.first == "fuzz"
        ? FuzzCommand.run(Array(words.dropFirst())) : SimulatorCommand.run(words))
