import ArgumentParser
import Foundation
import HapteraHost

/// The admin's command line: nouns before verbs; commands return when the thing is done.
package struct Storagectl: AsyncParsableCommand {
    package static let configuration = CommandConfiguration(
        commandName: "storagectl",
        abstract: "Manage Haptera: replicated block storage.",
        discussion: """
            Exit status: 0 done, 1 failed, 2 usage, 3 not found, 4 conflict or precondition, \
            5 unavailable or timed out.
            """,
        version: HapteraVersion.text,
        subcommands: [
            ClusterCommand.self, StatusCommand.self, VolumeCommand.self, SnapshotCommand.self,
            ScheduleCommand.self, ReplicaCommand.self, NodeCommand.self, StoreCommand.self,
            ChaosCommand.self,
            EventsCommand.self, VersionCommand.self, CompletionCommand.self,
        ])
    package init() {}

    /// Parses, runs, and says how it ended.
    package static func execute(_ arguments: [String]) async -> ExitStatus {
        do {
            let command = try parseAsRoot(globalsLast(arguments))
            if var command = command as? any AsyncParsableCommand {
                try await command.run()
            } else {
                var command = command
                try command.run()
            }
            return .done
        } catch let failure as CommandFailure {
            complain(failure.message)
            return failure.status
        } catch let error as HostError {
            complain(error.description)
            return .failed
        } catch {
            return end(error)
        }
    }

    /// Help and version requests come as errors, too.
    private static func end(_ error: any Error) -> ExitStatus {
        let code = exitCode(for: error)
        if code == .success {
            print(fullMessage(for: error))
            return .done
        }
        FileHandle.standardError.write(Data((fullMessage(for: error) + "\n").utf8))
        return code == .validationFailure ? .usage : .failed
    }

    private static func complain(_ message: String) {
        FileHandle.standardError.write(Data("storagectl: \(message)\n".utf8))
    }

    /// Global options may stand before the nouns and verbs; the parser knows them behind only.
    package static func globalsLast(_ arguments: [String]) -> [String] {
        let valued: Set = ["-o", "--output", "--server", "--context", "--timeout"]
        let flags: Set = ["-q", "--quiet"]
        var index = 0
        while index < arguments.count {
            let word = arguments[index]
            let name = word.split(separator: "=", maxSplits: 1).first.map(String.init) ?? word
            if valued.contains(word), index + 1 < arguments.count {
                index += 2
            } else if flags.contains(word) || (word.contains("=") && valued.contains(name)) {
                index += 1
            } else {
                break
            }
        }
        guard index > 0, index < arguments.count else { return sizeLast(arguments) }
        return sizeLast(Array(arguments[index...] + arguments[..<index]))
    }

    /// A new size below zero would pass for an option nobody knows: it is to be told what is wrong.
    private static func sizeLast(_ arguments: [String]) -> [String] {
        guard arguments.starts(with: ["volume", "resize"]), !arguments.contains("--"),
            let index = arguments.firstIndex(where: {
                $0.hasPrefix("-") && $0.dropFirst().first?.isNumber == true
            }), !arguments[index - 1].hasPrefix("-")
        else { return arguments }
        var others = arguments
        let size = others.remove(at: index)
        return others + ["--", size]
    }
}
