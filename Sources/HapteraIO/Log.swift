import Glibc
import HapteraCore
import Synchronization

/// One line per event on standard error: `time level message key=value ...`. For events an operator
/// wants to know; never per I/O. HAPTERA_LOG=debug|info|warn|error sets the least level (info).
package enum Log {
    package enum Level: Int, Comparable, Sendable {
        case debug, info, warn, error
        package static func < (a: Self, b: Self) -> Bool { a.rawValue < b.rawValue }
        init?(_ text: String) {
            switch text {
            case "debug": self = .debug
            case "info": self = .info
            case "warn": self = .warn
            case "error": self = .error
            default: return nil
            }
        }
    }
    package static let threshold: Level = environment("HAPTERA_LOG").flatMap(Level.init) ?? .info

    package static func debug(_ message: String, _ fields: (String, String)...) {
        write(.debug, message, fields)
    }
    package static func info(_ message: String, _ fields: (String, String)...) {
        write(.info, message, fields)
    }
    package static func warn(_ message: String, _ fields: (String, String)...) {
        write(.warn, message, fields)
    }
    package static func error(_ message: String, _ fields: (String, String)...) {
        write(.error, message, fields)
    }

    private static func write(_ level: Level, _ message: String, _ fields: [(String, String)]) {
        guard level >= threshold else { return }
        let line = line(level, message, fields)
        if isInBackground.load(ordering: .relaxed) { writer.append(line) } else { write(line) }
    }
    /// One write per line or more, so that lines of several processes do not mix.
    private static func write(_ bytes: [UInt8]) {
        // SAFETY: the array's memory is valid during the call.
        unsafe bytes.withUnsafeBytes { _ = unsafe Glibc.write(2, $0.baseAddress, $0.count) }
    }
    static func line(_ level: Level, _ message: String, _ fields: [(String, String)]) -> [UInt8] {
        let time = timestamp(Clock.wallNanoseconds())
        return Array(format(time: time, level: level, message: message, fields: fields).utf8)
    }

    private static let isInBackground = Atomic(false)
    private static let writer = LogWriter { write($0) }
    private static let exitMilliseconds: UInt64 = 1000
    /// From now on lines are written by a thread, which may wait for a disk: a loop that others
    /// wait for goes on. An exit waits for it, but not long.
    package static func writeInBackground() {
        guard !isInBackground.exchange(true, ordering: .relaxed) else { return }
        atexit { Log.writer.flush(milliseconds: Log.exitMilliseconds) }
    }

    static func format(
        time: String, level: Level, message: String, fields: [(String, String)]
    ) -> String {
        var line = "\(time) \(level) \(message)"
        for (key, value) in fields { line += " \(key)=\(quoted(value))" }
        return line.split(whereSeparator: \.isNewline).joined(separator: " ") + "\n"
    }

    private static func quoted(_ value: String) -> String {
        let isPlain = !value.isEmpty && !value.contains { " \"=\\\n".contains($0) }
        if isPlain { return value }
        var text = "\""
        for character in value {
            if character == "\"" || character == "\\" { text.append("\\") }
            text.append(character)
        }
        return text + "\""
    }

    /// ISO 8601, UTC, milliseconds.
    static func timestamp(_ nanoseconds: UInt64) -> String {
        var seconds = time_t(nanoseconds / 1_000_000_000)
        var parts = unsafe tm()
        // SAFETY: both are locals that outlive the call.
        unsafe gmtime_r(&seconds, &parts)
        func pad(_ value: some BinaryInteger, _ width: Int) -> String {
            let digits = String(value)
            return String(repeating: "0", count: max(0, width - digits.count)) + digits
        }
        let date = unsafe (parts.tm_year + 1900, parts.tm_mon + 1, parts.tm_mday)
        let time = unsafe (parts.tm_hour, parts.tm_min, parts.tm_sec)
        return "\(pad(date.0, 4))-\(pad(date.1, 2))-\(pad(date.2, 2))T\(pad(time.0, 2)):"
            + "\(pad(time.1, 2)):\(pad(time.2, 2)).\(pad(nanoseconds / 1_000_000 % 1000, 3))Z"
    }
}
