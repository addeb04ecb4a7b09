import Glibc
import HapteraIO

/// The command line of `haptera-engine`.
package enum EngineCommand {
    package static func main() -> Never {
        let arguments = Array(CommandLine.arguments.dropFirst())
        if arguments.contains("--help") || arguments.contains("-h") {
            print(EngineOptions.usage + "\n\n" + StandaloneOptions.usage)
            exit(0)
        }
        let isReplicated = arguments.contains { $0 == "--volume" || $0.hasPrefix("--volume=") }
        do throws(UsageError) {
            let replicated = isReplicated ? try EngineOptions(arguments) : nil
            let standalone = isReplicated ? nil : try StandaloneOptions(arguments)
            do throws(IOError) {
                if let replicated { exit(try EngineProcess.run(replicated)) }
                if let standalone { try StandaloneServer.run(standalone) }
            } catch {
                Log.error("failed", ("reason", error.message))
                exit(1)
            }
        } catch {
            Log.error("usage", ("reason", error.message))
            exit(2)
        }
        exit(0)
    }
}
