import Foundation
import HapteraCLI

exit(await Storagectl.execute(Array(CommandLine.arguments.dropFirst())).rawValue)
