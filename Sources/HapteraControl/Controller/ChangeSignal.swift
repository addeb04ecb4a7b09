import Synchronization

/// Wakes everybody who watches something. It says only *that* there is something new: watchers read
/// the present state themselves, so a slow one skips states and never holds anything up.
package final class ChangeSignal: Sendable {
    private struct State {
        var nextID = 0
        var isFinished = false
        var isDue = false
        var watchers: [Int: AsyncStream<Void>.Continuation] = [:]
    }
    private let state = Mutex(State())

    package init() {}

    /// Wakes once at once, then after each change; ends when the signal is finished.
    package func watch() -> AsyncStream<Void> {
        let (stream, continuation) = AsyncStream.makeStream(
            of: Void.self, bufferingPolicy: .bufferingNewest(1))
        continuation.yield()
        let id = state.withLock { state -> Int? in
            guard !state.isFinished else { return nil }
            state.nextID += 1
            state.watchers[state.nextID] = continuation
            return state.nextID
        }
        guard let id else {
            continuation.finish()
            return stream
        }
        continuation.onTermination = { [weak self] _ in
            self?.state.withLock { _ = $0.watchers.removeValue(forKey: id) }
        }
        return stream
    }

    /// Watches begun so far.
    package var watchCount: Int { state.withLock { $0.nextID } }

    package func notify() {
        for watcher in state.withLock({ Array($0.watchers.values) }) { watcher.yield() }
    }

    /// The same, a little later, and once for all that comes until then: for changes that come in
    /// masses, and just when others are in a hurry.
    package func notifySoon() {
        let isFirst = state.withLock { state in
            defer { state.isDue = true }
            return !state.isDue
        }
        guard isFirst else { return }
        Task {
            try? await Task.sleep(for: Self.soon)
            state.withLock { $0.isDue = false }
            notify()
        }
    }
    package static let soon = Duration.milliseconds(100)

    /// Ends every watch, now and later: the server stops.
    package func finish() {
        let watchers = state.withLock { state in
            state.isFinished = true
            defer { state.watchers = [:] }
            return Array(state.watchers.values)
        }
        for watcher in watchers { watcher.finish() }
    }
}
