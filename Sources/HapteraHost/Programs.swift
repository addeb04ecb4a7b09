import Foundation

/// Finds our other programs: in the directories of HAPTERA_BIN_DIR (separated by colons), then next
/// to the program that runs. Never through PATH: a stranger's program of the same name must not
/// run.
package enum Programs {
    package static func find(
        _ name: String, environment: [String: String] = ProcessInfo.processInfo.environment,
        ownDirectory: String? = nil
    ) throws -> String {
        var directories = (environment["HAPTERA_BIN_DIR"] ?? "").split(separator: ":")
            .map { HostFiles.absolute(String($0)) }
        directories.append(ownDirectory ?? Self.ownDirectory)
        for directory in directories {
            let path = directory + "/" + name
            if FileManager.default.isExecutableFile(atPath: path) { return path }
        }
        throw HostError(
            "the program \(name) is not in \(directories.joined(separator: ", ")); set "
                + "HAPTERA_BIN_DIR to the directories that hold Haptera's programs")
    }

    private static var ownDirectory: String {
        let path = try? FileManager.default.destinationOfSymbolicLink(atPath: "/proc/self/exe")
        return ((path ?? CommandLine.arguments[0]) as NSString).deletingLastPathComponent
    }
}
