import Glibc
import HapteraIO

/// The command line of `haptera-engine`.
package enum EngineCommand {
    package static func main() -> Never {
        let arguments = Array(CommandLine.arguments.dropFirst())
        if arguments.contains("--help") || arguments.contains("-h") {
            print(StandaloneOptions.usage)
            exit(0)
        }
        do throws(UsageError) {
            let options = try StandaloneOptions(arguments)
            do throws(IOError) {
                try StandaloneServer.run(options)
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
