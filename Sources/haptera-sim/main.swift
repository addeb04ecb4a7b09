import HapteraTesting

#if canImport(Glibc)
    import Glibc
#else
    import Musl
#endif

exit(SimulatorCommand.run(Array(CommandLine.arguments.dropFirst())))
