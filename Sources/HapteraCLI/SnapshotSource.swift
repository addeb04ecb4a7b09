import Foundation
import GRPCCore
import HapteraAPI
import HapteraHost
import Synchronization

/// A snapshot that is being read: the controller is told so again and again, and says where. It is
/// the same snapshot for as long as this lasts, though not the same engine.
final class SnapshotSource: Sendable {
    /// As the controller knows it: so long it keeps an engine for a reader it hears nothing of.
    static let leaseMilliseconds: UInt64 = 10_000
    static let renewal = Duration.milliseconds(2500)
    private static let pauseMicroseconds: UInt32 = 100_000

    private struct State {
        var place: Haptera_V1_Snapshot
        /// Renewals that were asked for, and those of them that were answered.
        var asked: UInt64 = 0
        var confirmed: UInt64 = 0
        /// Why it cannot be read any more, whatever comes.
        var failure: CommandFailure?
        /// The last thing that went wrong.
        var trouble = ""
    }
    private let state: Mutex<State>
    private let patience: Duration
    private let poke: AsyncStream<Void>.Continuation
    let pokes: AsyncStream<Void>

    /// `patience`: how long an interruption may last.
    init(_ snapshot: Haptera_V1_Snapshot, patience: Duration) {
        state = Mutex(State(place: snapshot))
        self.patience = patience
        (pokes, poke) = AsyncStream.makeStream(bufferingPolicy: .bufferingNewest(1))
    }

    var snapshot: Haptera_V1_Snapshot { state.withLock { $0.place } }
    var failure: CommandFailure? { state.withLock { $0.failure } }
    var export: String {
        let now = snapshot
        return "\(now.volume)@\(now.name)"
    }

    // MARK: For the threads that read

    /// Connects to the engine that serves it now.
    func open() throws -> NBDSocket {
        let now = snapshot
        guard let place = NBDPlace.reachable(uri: now.uri, unixURI: now.unixUri) else {
            throw HostError("no engine serves snapshot '\(now.name)' of volume '\(now.volume)'")
        }
        return try NBDSocket(place.address)
    }

    /// Returns when the controller has said, after this was called, that it is the same snapshot.
    func confirm() throws {
        let mine = state.withLock { state in
            state.asked += 1
            return state.asked
        }
        poke.yield()
        let since = ContinuousClock.now
        while state.withLock({ $0.confirmed }) < mine {
            try wait(after: HostError("the controller does not answer"), since: since)
        }
    }

    /// A while, and a look for another engine. Throws when that is no use any more.
    func wait(after error: any Error, since: ContinuousClock.Instant) throws {
        let failure = state.withLock { state in
            let isOver = ContinuousClock.now - since >= patience
            if isOver, state.failure == nil {
                let words = state.trouble.isEmpty ? "\(error)" : state.trouble
                state.failure = CommandFailure(
                    .unavailable,
                    "snapshot '\(state.place.name)' of volume '\(state.place.volume)' could not be "
                        + "read on within \(patience.components.seconds) s: \(words); allow more "
                        + "with --timeout")
            }
            return state.failure
        }
        if let failure { throw failure }
        poke.yield()
        usleep(Self.pauseMicroseconds)
    }

    // MARK: For the task that renews

    /// To be asked at once, and when the time has come.
    func remind() { poke.yield() }
    func begin() -> UInt64 { state.withLock { $0.asked } }
    func answered(_ mine: UInt64, _ snapshot: Haptera_V1_Snapshot) {
        state.withLock { state in
            // Layers are numbered, and no number is given twice.
            guard snapshot.layer == state.place.layer else {
                state.failure =
                    state.failure
                    ?? CommandFailure(
                        .conflict,
                        "snapshot '\(snapshot.name)' of volume '\(snapshot.volume)' was deleted "
                            + "while it was read; another one has its name now")
                return
            }
            state.place = snapshot
            state.confirmed = max(state.confirmed, mine)
            state.trouble = ""
        }
    }
    func failed(_ error: any Error) {
        state.withLock { state in
            if let error = error as? RPCError, error.code == .notFound {
                state.failure = state.failure ?? CommandFailure(.notFound, error.message)
            }
            state.trouble = (error as? RPCError).map(Session.brief) ?? "\(error)"
        }
    }
}

extension Session {
    /// Reads a snapshot, wherever it is served, for as long as `body` lasts.
    func reading<Result: Sendable>(
        _ volume: String, _ name: String, _ body: (SnapshotSource) async throws -> Result
    ) async throws -> Result {
        var request = Haptera_V1_ReadSnapshotRequest()
        request.volume = volume
        request.name = name
        request.reader = UInt64.random(in: 1 ... .max)
        request.leaseMilliseconds = SnapshotSource.leaseMilliseconds
        request.timeoutMilliseconds = engineTimeoutMilliseconds
        let first = request
        let snapshot = try await change {
            try await volumes.readSnapshot(first, options: callOptions)
        }
        request.timeoutMilliseconds = 5000
        let source = SnapshotSource(snapshot, patience: .seconds(options.timeout.seconds))
        let renewing = renew(source, request)
        do {
            let result = try await body(source)
            await end(renewing, request)
            return result
        } catch {
            await end(renewing, request)
            throw source.failure ?? error
        }
    }

    private func renew(
        _ source: SnapshotSource, _ request: Haptera_V1_ReadSnapshotRequest
    ) -> Task<Void, Never> {
        let ticking = Task {
            while !Task.isCancelled {
                try? await Task.sleep(for: SnapshotSource.renewal)
                source.remind()
            }
        }
        return Task {
            for await _ in source.pokes {
                if Task.isCancelled { break }
                let mine = source.begin()
                do {
                    var options = CallOptions.defaults
                    options.timeout = .seconds(7)
                    options.waitForReady = false
                    source.answered(
                        mine, try await volumes.readSnapshot(request, options: options))
                } catch {
                    source.failed(error)
                }
            }
            ticking.cancel()
        }
    }

    /// What is not heard ends by itself.
    private func end(
        _ renewing: Task<Void, Never>, _ request: Haptera_V1_ReadSnapshotRequest
    ) async {
        renewing.cancel()
        await renewing.value
        var request = request
        request.ends = true
        var options = CallOptions.defaults
        options.timeout = .seconds(3)
        options.waitForReady = false
        _ = try? await volumes.readSnapshot(request, options: options)
    }
}
