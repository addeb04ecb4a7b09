import Foundation
import HapteraCore
import HapteraHost

/// What supervision needs of the operating system; a fake in unit tests.
package protocol ProcessHost: Sendable {
    func start(_ executable: String, _ arguments: [String], log: String) throws -> ProcessIdentity
    /// Runs to the end; its exit status.
    func run(_ executable: String, _ arguments: [String], log: String) async throws -> Int32
    /// How it ended; nil while it runs.
    func ending(of process: ProcessIdentity) -> ProcessEnding?
    /// The process that has this number now.
    func identity(of pid: Int32) -> ProcessIdentity?
    func kill(_ process: ProcessIdentity)
    /// One request on a control socket.
    func request(
        _ socket: String, _ line: String, timeoutSeconds: Int
    ) async throws -> [String: String]
    func isPortFree(_ port: Int, at host: String) -> Bool
    func findPort(at host: String, in range: ClosedRange<Int>) throws -> Int
    func directoryExists(_ path: String) -> Bool
    /// Whether a replica's manifest is there and was written: its making ends with that.
    func isManifestWritten(_ path: String) -> Bool
    func removeDirectory(_ path: String) async throws
    /// The end of a log file, for saying why a process ended.
    func lastLine(of log: String) -> String
}

/// What is known of how a process ended.
package enum ProcessEnding: Equatable, Sendable {
    case status(Int32)
    case signal(Int32)
    /// It was not our child: adopted, and reaped by somebody else.
    case unknown

    /// `lastLine`: of its log, where a process that gives up says why.
    package func reason(pid: Int32, lastLine: String) -> String {
        switch self {
        case .signal(let number): "process \(pid) was ended by signal \(number)"
        case .status(0): "process \(pid) ended by itself"
        case .status(let status): "process \(pid) ended with status \(status): \(lastLine)"
        case .unknown: "process \(pid) ended: \(lastLine)"
        }
    }
}

package struct RealProcessHost: ProcessHost {
    /// A log is moved aside at the next start when it is larger.
    static let logSizeMax: UInt64 = 16 << 20

    package init() {}

    package func start(
        _ executable: String, _ arguments: [String], log: String
    ) throws -> ProcessIdentity {
        rotate(log)
        return try ChildProcess.startDetached(executable, arguments, log: log)
    }

    package func run(
        _ executable: String, _ arguments: [String], log: String
    ) async throws -> Int32 {
        rotate(log)
        return try await withCheckedThrowingContinuation { continuation in
            DispatchQueue.global().async {
                continuation.resume(
                    with: Result {
                        try ChildProcess.runToEnd(executable, arguments, log: log)
                    })
            }
        }
    }

    private func rotate(_ log: String) {
        let files = FileManager.default
        guard let size = try? files.attributesOfItem(atPath: log)[.size] as? UInt64,
            size > Self.logSizeMax
        else { return }
        try? files.removeItem(atPath: log + ".1")
        try? files.moveItem(atPath: log, toPath: log + ".1")
    }

    package func ending(of process: ProcessIdentity) -> ProcessEnding? {
        if let status = ChildProcess.reap(process.pid) {
            return status >= 128 ? .signal(status - 128) : .status(status)
        }
        return process.isRunning ? nil : .unknown
    }

    package func identity(of pid: Int32) -> ProcessIdentity? { ProcessIdentity(running: pid) }

    package func kill(_ process: ProcessIdentity) { process.signal(SIGKILL) }

    package func request(
        _ socket: String, _ line: String, timeoutSeconds: Int
    ) async throws -> [String: String] {
        try await ControlSocket.request(socket, line, timeoutSeconds: timeoutSeconds)
    }

    package func isPortFree(_ port: Int, at host: String) -> Bool {
        Ports.isFree(host: host, port: port)
    }
    package func findPort(at host: String, in range: ClosedRange<Int>) throws -> Int {
        try Ports.findFree(host: host, range: range)
    }

    package func directoryExists(_ path: String) -> Bool {
        var isDirectory: ObjCBool = false
        // SAFETY: the out-parameter is a local that outlives the call.
        return unsafe FileManager.default.fileExists(atPath: path, isDirectory: &isDirectory)
            && isDirectory.boolValue
    }

    package func isManifestWritten(_ path: String) -> Bool {
        guard let handle = FileHandle(forReadingAtPath: path) else { return false }
        defer { try? handle.close() }
        // The second one where it once was, and where it is.
        return [0, UInt64(Manifest.slotSizeBefore), UInt64(Manifest.slotSize)].contains { offset in
            guard (try? handle.seek(toOffset: offset)) != nil,
                let magic = try? handle.read(upToCount: 4), magic.count == 4
            else { return false }
            return magic.reversed().reduce(0) { $0 << 8 | UInt32($1) } == Manifest.magic
        }
    }

    /// Renamed first: a crash in the middle leaves nothing that looks like a replica.
    package func removeDirectory(_ path: String) async throws {
        let doomed = path + RemovedReplicas.suffix
        let files = FileManager.default
        if files.fileExists(atPath: path) {
            try? await RemovedReplicas.delete(doomed)
            try files.moveItem(atPath: path, toPath: doomed)
            try HostFiles.syncDirectory(of: path)
        }
        if files.fileExists(atPath: doomed) { try await RemovedReplicas.delete(doomed) }
    }

    package func lastLine(of log: String) -> String {
        guard let handle = FileHandle(forReadingAtPath: log) else { return "" }
        defer { try? handle.close() }
        guard let end = try? handle.seekToEnd() else { return "" }
        try? handle.seek(toOffset: end > 4096 ? end - 4096 : 0)
        let tail = (try? handle.readToEnd()).map { String(decoding: $0, as: UTF8.self) } ?? ""
        return String(tail.split(separator: "\n").last?.prefix(500) ?? "")
    }
}
