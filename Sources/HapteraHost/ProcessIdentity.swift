import Foundation
import Glibc

/// Names one process for ever: its number is reused by the kernel, but not together with its start
/// time within one boot.
package struct ProcessIdentity: Codable, Hashable, Sendable {
    package var pid: Int32
    /// Clock ticks after boot, field 22 of /proc/PID/stat.
    package var startTime: UInt64
    package var bootID: String

    package init(pid: Int32, startTime: UInt64, bootID: String) {
        self.pid = pid
        self.startTime = startTime
        self.bootID = bootID
    }

    /// The process that has this number now; nil if none has, or it has ended (a zombie).
    package init?(running pid: Int32) {
        guard pid > 0, let stat = ProcessStat(pid: pid), stat.state != "Z", stat.state != "X" else {
            return nil
        }
        self.init(pid: pid, startTime: stat.startTime, bootID: Self.currentBootID)
    }

    package var isRunning: Bool { Self(running: pid) == self }

    /// Sends the signal unless the process has gone. (It may end between the check and the signal;
    /// its number is not reused that soon.)
    package func signal(_ number: Int32) {
        if isRunning { kill(pid, number) }
    }

    package static let currentBootID: String = {
        let text = try? String(contentsOfFile: "/proc/sys/kernel/random/boot_id", encoding: .utf8)
        return text?.trimmingCharacters(in: .whitespacesAndNewlines) ?? "unknown"
    }()
}

private struct ProcessStat {
    var state: String
    var startTime: UInt64

    init?(pid: Int32) {
        guard let text = try? String(contentsOfFile: "/proc/\(pid)/stat", encoding: .utf8),
            // The command name is in parentheses and may hold anything, parentheses included.
            let end = text.lastIndex(of: ")")
        else { return nil }
        let fields = text[text.index(after: end)...].split(separator: " ")
        guard fields.count > 19, let startTime = UInt64(fields[19]) else { return nil }
        state = String(fields[0])
        self.startTime = startTime
    }
}

/// What is written down about a process that outlives the one who started it.
package struct ProcessFile: Codable, Equatable, Sendable {
    package var identity: ProcessIdentity
    package var executable: String
    package var arguments: [String]
    /// Its control socket, if it has one.
    package var control: String

    package init(
        identity: ProcessIdentity, executable: String, arguments: [String], control: String
    ) {
        self.identity = identity
        self.executable = executable
        self.arguments = arguments
        self.control = control
    }

    package func save(_ path: String) throws {
        let encoder = JSONEncoder()
        encoder.outputFormatting = [.sortedKeys, .prettyPrinted, .withoutEscapingSlashes]
        try HostFiles.replace(path, with: try encoder.encode(self))
    }

    /// Nil if there is none, or it cannot be read (then the process is not ours to touch).
    package static func load(_ path: String) -> ProcessFile? {
        guard let data = FileManager.default.contents(atPath: path) else { return nil }
        return try? JSONDecoder().decode(ProcessFile.self, from: data)
    }
}
