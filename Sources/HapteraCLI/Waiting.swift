import GRPCCore
import HapteraAPI
import Synchronization

extension Session {
    /// Asks for a change. A controller that does not answer is waited for, and the wait is said:
    /// every change may be asked for twice.
    func change<Result: Sendable>(_ ask: () async throws -> Result) async throws -> Result {
        let progress = Progress(options)
        defer { progress.clear() }
        var hasSaid = false
        while true {
            do {
                return try await ask()
            } catch let error as RPCError where error.code == .unavailable {
                let reason = Self.brief(error)
                guard !isPastDeadline else {
                    let seconds = options.timeout.seconds
                    throw CommandFailure(
                        .unavailable,
                        "the controller at \(server) did not answer for \(seconds) s, "
                            + "and nothing was changed unless it answers late; "
                            + "last error: \(reason)")
                }
                let words = "waiting for the controller at \(server), last error: \(reason)"
                if progress.isOn {
                    progress.show(words)
                } else if !hasSaid, !options.quiet {
                    Progress.complain("storagectl: \(words)")
                }
                hasSaid = true
            }
            let left = deadline - ContinuousClock.now
            try await Task.sleep(for: max(min(left, .milliseconds(250)), .milliseconds(1)))
        }
    }

    /// What went wrong, in a few words.
    static func brief(_ error: RPCError) -> String {
        let text = "\(error)"
        for (cause, words) in [
            ("Connection refused", "connection refused"), ("Connection reset", "connection reset"),
            ("No route to host", "no route to host"), ("timed out", "timed out"),
        ] where text.contains(cause) {
            return words
        }
        return String(error.message.split(separator: "\n").first?.prefix(200) ?? "no answer")
    }

    /// Follows a volume until `isDone` says so, and returns what it was given then (nil: the volume
    /// is gone). A controller that restarts meanwhile is asked again. `isDone` may throw. `advice`:
    /// what to do when the time is up.
    func follow(
        _ name: String, _ action: String, advice: String? = nil,
        until isDone: @escaping @Sendable (Haptera_V1_Volume?) throws -> Bool
    ) async throws -> Haptera_V1_Volume? {
        let progress = Progress(options)
        defer { progress.clear() }
        var request = Haptera_V1_ListVolumesRequest()
        request.name = name
        // The last thing heard: nothing yet, or (inside) that there is no volume.
        let last = Mutex<Haptera_V1_Volume??>(nil)
        while !isPastDeadline {
            do {
                let isOver = try await volumes.watchVolumes(request, options: callOptions) {
                    response in
                    for try await message in response.messages {
                        let volume = message.volumes.first
                        last.withLock { $0 = .some(volume) }
                        progress.show("\(action) \(name): \(Self.describe(volume))")
                        if try isDone(volume) { return true }
                    }
                    return false
                }
                if isOver { return last.withLock { $0 ?? nil } }
            } catch let error as RPCError {
                try Self.requireTransient(error)
            } catch is CancellationError where !Task.isCancelled {
                // How a stream that was cut off may end; it is watched again.
            }
            try await Task.sleep(for: .milliseconds(100))
        }
        let words = last.withLock { $0.map(Self.describe) } ?? "no answer from \(server)"
        throw CommandFailure(
            .unavailable,
            "not done after \(options.timeout.seconds) s: \(action) \(name): "
                + "\(words); "
                + (advice
                    ?? "it goes on in the background: see 'storagectl volume show \(name)', "
                    + "or allow more with --timeout"))
    }

    private static func requireTransient(_ error: RPCError) throws {
        switch error.code {
        case .unavailable, .deadlineExceeded, .cancelled: return
        default: throw error
        }
    }

    static func describe(_ volume: Haptera_V1_Volume?) -> String {
        guard let volume else { return "gone" }
        let words = "\(Presentation.word(volume.state)), \(Presentation.word(volume.robustness))"
        return volume.reason.isEmpty ? words : "\(words) (\(volume.reason))"
    }

    /// Shows a list once, or with `--watch` again whenever it differs from what was shown.
    func list(
        watch: Bool, _ fetch: @Sendable () async throws -> (OutputValue, names: String, TextTable)
    ) async throws {
        var shown: String?
        while true {
            let (value, names, table) = try await fetch()
            if !watch {
                say(value, quiet: names) { _ in table.text }
                return
            }
            let now = value.json(pretty: false)
            if now != shown {
                if options.output == .json {
                    print(now)
                } else {
                    say(value, quiet: names) { _ in table.text + "\n" }
                }
                flushOutput()
                shown = now
            }
            try await Task.sleep(for: .seconds(1))
        }
    }

    /// For the requests of a watch, which goes on for ever.
    var watchOptions: CallOptions {
        var options = callOptions
        options.timeout = .seconds(self.options.timeout.seconds)
        return options
    }
}
