import GRPCCore
import HapteraAPI

extension Session {
    /// Follows a volume until `isDone` says so, and returns what it was given then (nil: the volume
    /// is gone). A controller that restarts meanwhile is asked again. `isDone` may throw.
    func follow(
        _ name: String, _ action: String,
        until isDone: @escaping @Sendable (Haptera_V1_Volume?) throws -> Bool
    ) async throws -> Haptera_V1_Volume? {
        let progress = Progress(options)
        defer { progress.clear() }
        var request = Haptera_V1_ListVolumesRequest()
        request.name = name
        var last: Haptera_V1_Volume?
        while !isPastDeadline {
            do {
                let outcome = try await volumes.watchVolumes(request, options: callOptions) {
                    response -> Outcome in
                    var seen: Haptera_V1_Volume?
                    do {
                        for try await message in response.messages {
                            seen = message.volumes.first
                            progress.show("\(action) \(name): \(Self.describe(seen))")
                            if try isDone(seen) { return Outcome(isDone: true, volume: seen) }
                        }
                    } catch let error as RPCError {
                        return Outcome(isDone: false, volume: seen, error: error)
                    }
                    return Outcome(isDone: false, volume: seen)
                }
                if outcome.isDone { return outcome.volume }
                last = outcome.volume ?? last
                if let error = outcome.error { try Self.requireTransient(error) }
            } catch let error as RPCError {
                try Self.requireTransient(error)
            }
            // The stream ended: the controller restarts, or the deadline has come.
            try await Task.sleep(for: .milliseconds(100))
        }
        throw CommandFailure(
            .unavailable,
            "not done after \(options.timeout.seconds) s: \(action) \(name): "
                + "\(Self.describe(last)); it goes on in the background: see 'storagectl volume "
                + "show \(name)', or allow more with --timeout")
    }

    private struct Outcome: Sendable {
        var isDone: Bool
        var volume: Haptera_V1_Volume?
        var error: RPCError?
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
