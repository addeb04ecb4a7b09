import Foundation
import HapteraHost

/// Which clusters this user knows, and which of them commands mean: one JSON file.
package struct Contexts: Codable, Equatable, Sendable {
    package struct Context: Codable, Equatable, Sendable {
        /// HOST:PORT of the gRPC API.
        package var server: String
        /// Of a cluster made by `cluster up`.
        package var directory: String?

        package init(server: String, directory: String? = nil) {
            self.server = server
            self.directory = directory
        }
    }

    package static let defaultName = "local"
    package var current: String?
    package var contexts: [String: Context] = [:]

    package init() {}

    /// $XDG_CONFIG_HOME/haptera/contexts.json, with the directory's default.
    package static func path(
        _ environment: [String: String] = ProcessInfo.processInfo.environment
    ) -> String {
        let configured = environment["XDG_CONFIG_HOME"] ?? ""
        let home = environment["HOME"] ?? NSHomeDirectory()
        let base = configured.hasPrefix("/") ? configured : home + "/.config"
        return base + "/haptera/contexts.json"
    }

    package static func load(_ path: String = path()) throws -> Contexts {
        guard let data = FileManager.default.contents(atPath: path) else { return Contexts() }
        do {
            return try JSONDecoder().decode(Contexts.self, from: data)
        } catch {
            throw CommandFailure(
                .failed, "the context file \(path) cannot be read: remove it, or repair it")
        }
    }

    package func save(_ path: String = path()) throws {
        try HostFiles.makeDirectory((path as NSString).deletingLastPathComponent)
        let encoder = JSONEncoder()
        encoder.outputFormatting = [.prettyPrinted, .sortedKeys, .withoutEscapingSlashes]
        try HostFiles.replace(path, with: try encoder.encode(self))
    }

    /// The context named, or the current one.
    package func context(named name: String?) throws -> (name: String, context: Context)? {
        if let name {
            guard let context = contexts[name] else {
                let known = contexts.keys.sorted().joined(separator: ", ")
                throw CommandFailure(
                    .notFound,
                    "there is no context '\(name)'; known: "
                        + (known.isEmpty ? "none" : known))
            }
            return (name, context)
        }
        guard let current, let context = contexts[current] else { return nil }
        return (current, context)
    }
}

/// The exit statuses, the same for every command.
package enum ExitStatus: Int32, Sendable {
    case done = 0
    case failed = 1
    case usage = 2
    case notFound = 3
    case conflict = 4
    case unavailable = 5
}

/// How a command ends that does not succeed: what happened where, and what to do next.
package struct CommandFailure: Error, Equatable, Sendable {
    package var status: ExitStatus
    package var message: String
    package init(_ status: ExitStatus, _ message: String) {
        self.status = status
        self.message = message
    }
}
