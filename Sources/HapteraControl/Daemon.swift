import ArgumentParser
import Foundation
import HapteraHost
import Logging

/// What the two long-running programs have in common: exit statuses 0 done, 1 failed, 2 usage, and
/// one log line per event on standard error.
package enum Daemon {
    package static func main<Command: AsyncParsableCommand>(_ type: Command.Type) async {
        do {
            let command = try type.parseAsRoot()
            if var command = command as? any AsyncParsableCommand {
                try await command.run()
            } else {
                var command = command
                try command.run()
            }
        } catch {
            let code = type.exitCode(for: error)
            let text = type.fullMessage(for: error)
            if code == .success {
                print(text)
                exit(0)
            }
            FileHandle.standardError.write(Data((text + "\n").utf8))
            exit(code == .validationFailure ? 2 : 1)
        }
    }

    package static func logger(_ name: String, level: Logger.Level) -> Logger {
        var logger = Logger(label: name) { _ in LineLogHandler() }
        logger.logLevel = level
        return logger
    }
}

extension Logger.Level: @retroactive ExpressibleByArgument {}

/// `time level message key=value...`, as the data plane's logs.
struct LineLogHandler: LogHandler {
    var metadata: Logger.Metadata = [:]
    var logLevel = Logger.Level.info

    subscript(metadataKey key: String) -> Logger.Metadata.Value? {
        get { metadata[key] }
        set { metadata[key] = newValue }
    }

    func log(event: LogEvent) {
        let values = metadata.merging(event.metadata ?? [:]) { _, new in new }
        var line = "\(Date().formatted(.iso8601)) \(event.level) \(event.message)"
        for (key, value) in values.sorted(by: { $0.key < $1.key }) {
            line += " \(key)=\(Self.quoted("\(value)"))"
        }
        FileHandle.standardError.write(Data((line + "\n").utf8))
    }

    private static func quoted(_ value: String) -> String {
        let line = value.replacingOccurrences(of: "\n", with: " ")
        guard line.contains(where: { $0 == " " || $0 == "\"" }) || line.isEmpty else { return line }
        return "\"" + line.replacingOccurrences(of: "\"", with: "'") + "\""
    }
}
