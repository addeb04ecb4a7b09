import Foundation
import HapteraHost

/// When an ended process may be started again: at least 2 s later, doubling up to 30 s while it
/// keeps ending soon, and 2 s again once it has run for a minute. An eager one is started again at
/// once if it has run for 5 s: clients wait for it. Times are milliseconds of a monotonic clock.
package struct RestartBackoff: Equatable, Sendable {
    package static let delayMinimum: Int64 = 2000
    package static let delayMaximum: Int64 = 30_000
    package static let stableAfter: Int64 = 60_000
    package static let eagerDelayMinimum: Int64 = 500
    package static let eagerStableAfter: Int64 = 5000

    private let isEager: Bool
    private var delay: Int64
    private var startedAt: Int64?
    private var notBefore: Int64 = .min
    package private(set) var restarts: UInt32 = 0

    package init(isEager: Bool = false) {
        self.isEager = isEager
        delay = isEager ? 0 : Self.delayMinimum
    }

    package func mayStart(now: Int64) -> Bool { now >= notBefore }

    package mutating func started(now: Int64) {
        if startedAt != nil || notBefore != .min { restarts += 1 }
        startedAt = now
    }

    /// The process was found ended.
    package mutating func ended(now: Int64) {
        let stableAfter = isEager ? Self.eagerStableAfter : Self.stableAfter
        if let startedAt, now - startedAt >= stableAfter {
            delay = isEager ? 0 : Self.delayMinimum
        }
        notBefore = now + delay
        delay = min(max(delay * 2, Self.eagerDelayMinimum), Self.delayMaximum)
    }
}

/// What is kept on disk about a unit (a replica or an engine) beside its process.
package struct UnitSettings: Codable, Equatable, Sendable {
    package var port = 0
    package var clientGeneration: UInt64 = 0
    package var isDetached = false
    /// It lets no client in.
    package var isMaintenance: Bool?
    /// The engine that answered last: what the next one may be told about it.
    package var engine: KnownEngine?
    /// What the running engine was started with, or told since.
    package var limits: EngineLimitsTold?
    package init() {}
}

/// An engine process and the number it has given itself.
package struct KnownEngine: Codable, Equatable, Sendable {
    package var identity: ProcessIdentity
    /// Decimal.
    package var instance: String
}

/// Times in milliseconds.
package struct EngineLimitsTold: Codable, Equatable, Sendable {
    package var lease: UInt64
    package var ioTimeout: UInt64
    package var removalDeadline: UInt64
    /// Nil: not on, as when there was no such thing.
    package var detectsZeroes: Bool?
}

/// The files of a unit, all below the node's `run` directory.
package struct UnitFiles: Sendable {
    package var control: String
    package var process: String
    package var settings: String
    package var log: String
    /// Engines only.
    package var nbdSocket: String

    /// Names are cut to 16 characters of random hexadecimal digits: socket paths are short.
    package init(run: String, prefix: String, id: String) {
        let base = "\(run)/\(prefix)-\(id.prefix(16))"
        control = base + ".sock"
        process = base + ".pid"
        settings = base + ".json"
        log = base + ".log"
        nbdSocket = base + ".nbd"
    }

    func loadSettings() -> UnitSettings {
        FileManager.default.contents(atPath: settings)
            .flatMap { try? JSONDecoder().decode(UnitSettings.self, from: $0) } ?? UnitSettings()
    }
    func save(_ value: UnitSettings) throws {
        try HostFiles.replace(settings, with: try JSONEncoder().encode(value))
    }
    func removeAllButLog() {
        removeSockets()
        for path in [process, settings] { try? FileManager.default.removeItem(atPath: path) }
    }
    /// Of a process that has ended.
    func removeSockets() {
        for path in [control, nbdSocket] { try? FileManager.default.removeItem(atPath: path) }
    }
}

/// One long-lived process: finds it again after our own restart, starts it, notices its end, waits
/// the back-off. Says nothing about why it should run: that is the unit's.
package struct Supervision: Sendable {
    package let files: UnitFiles
    private let isEager: Bool
    package private(set) var process: ProcessIdentity?
    package private(set) var backoff: RestartBackoff
    /// The last answer to `status`; empty if there was none since the process started.
    package private(set) var status: [String: String] = [:]
    /// Why the last process ended, or why the last start failed.
    package private(set) var reason = ""
    /// How the last process ended; stays when the next one answers.
    package private(set) var lastEnding = ""
    private var polledAt: Int64 = .min
    private var hasLooked = false

    package init(files: UnitFiles, isEager: Bool = false) {
        self.files = files
        self.isEager = isEager
        backoff = RestartBackoff(isEager: isEager)
    }

    package var isRunning: Bool { process != nil }

    /// The first look, after our own start: adopts the process our predecessor left. `answer` is
    /// what the control socket said to `status`, which finds a process whose file was not written.
    package mutating func adopt(
        _ host: some ProcessHost, answer: [String: String]?, now: Int64
    ) {
        guard !hasLooked else { return }
        hasLooked = true
        let file = ProcessFile.load(files.process)
        if let file, host.ending(of: file.identity) == nil {
            process = file.identity
        } else if let pid = answer?["pid"].flatMap({ Int32($0) }) {
            process = host.identity(of: pid)
        }
        if process != nil {
            backoff.started(now: now)
            polled(answer, now: now)
        }
    }

    package var mustAdopt: Bool { !hasLooked }

    /// What runs next has nothing to do with what ran before: that is not started again, and holds
    /// nothing up. Precondition: it does not run.
    package mutating func beginAnew() {
        precondition(process == nil)
        backoff = RestartBackoff(isEager: isEager)
        reason = ""
        lastEnding = ""
    }

    /// Notices that the process has ended.
    package mutating func observe(_ host: some ProcessHost, now: Int64) {
        guard let process, let ending = host.ending(of: process) else { return }
        self.process = nil
        status = [:]
        polledAt = .min
        reason = ending.reason(pid: process.pid, lastLine: host.lastLine(of: files.log))
        lastEnding = reason
        backoff.ended(now: now)
    }

    /// Starts it unless it must still wait. Precondition: it does not run.
    package mutating func start(
        _ host: some ProcessHost, _ executable: String, _ arguments: [String], now: Int64
    ) {
        precondition(process == nil)
        guard backoff.mayStart(now: now) else { return }
        do {
            let identity = try host.start(executable, arguments, log: files.log)
            backoff.started(now: now)
            process = identity
            // A crash of ours before this is written leaves a process without a file: its control
            // socket answers for it.
            try ProcessFile(
                identity: identity, executable: executable, arguments: arguments,
                control: files.control
            ).save(files.process)
        } catch {
            reason = "\(error)"
            backoff.ended(now: now)
        }
    }

    /// Asks for the status if it is due: each time while `isSettling`, otherwise every second.
    package func isPollDue(now: Int64, isSettling: Bool) -> Bool {
        process != nil && (isSettling || polledAt == .min || now - polledAt >= 1000)
    }

    package mutating func polled(_ values: [String: String]?, now: Int64) {
        polledAt = now
        guard let values else { return }
        status = values
        reason = ""
    }
}
