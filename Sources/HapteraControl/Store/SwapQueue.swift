import HapteraCore
import Synchronization

/// A compare-and-swap of a volume's record, and who waits for its outcome.
struct WaitingSwap: Sendable {
    var volume: VolumeID
    var expected: Epoch
    var proposed: VolumeRecord
    var proposal: [UInt8]
    var continuation: CheckedContinuation<SwapResult, any Error>
}

/// Compare-and-swaps on their way into the store. One at a time takes those that wait, has them
/// decided in one transaction, and answers them when that is durable; what comes meanwhile waits
/// for the next. So whatever many engines want at once (a node has died, snapshots of a group)
/// costs one sync of the disk, not one each.
///
///     waiting -> deciding -> answered
final class SwapQueue: Sendable {
    /// Decided together: other writers of the store wait no longer than for these.
    static let batchMax = 256

    private struct State {
        var waiting: [WaitingSwap] = []
        var deciding: [WaitingSwap] = []
        var isAtWork = false
    }
    private let state = Mutex(State())

    /// True: nobody is at work, and the caller shall be.
    func add(_ swap: WaitingSwap) -> Bool {
        state.withLock { state in
            state.waiting.append(swap)
            guard !state.isAtWork else { return false }
            state.isAtWork = true
            return true
        }
    }

    /// Those to decide now, in the order they came in. Asked for as late as can be: within the
    /// transaction, which may have waited for its turn.
    func take() -> [WaitingSwap] {
        state.withLock { state in
            precondition(state.deciding.isEmpty)
            state.deciding = Array(state.waiting.prefix(Self.batchMax))
            state.waiting.removeFirst(state.deciding.count)
            return state.deciding
        }
    }

    /// Those taken, which are to be answered otherwise.
    func giveUp() -> [WaitingSwap] {
        state.withLock { state in
            defer { state.deciding = [] }
            return state.deciding
        }
    }
    /// No transaction began: nobody's would.
    func fail(_ error: any Error) {
        let failed = state.withLock { state in
            defer { state.waiting = [] }
            return state.waiting
        }
        for swap in failed { swap.continuation.resume(throwing: error) }
    }

    /// Of those taken, in their order, when they are durable.
    func answer(_ results: [SwapResult]) {
        let decided = giveUp()
        precondition(decided.count == results.count)
        for (swap, result) in zip(decided, results) { swap.continuation.resume(returning: result) }
    }

    var waitingCount: Int { state.withLock { $0.waiting.count } }

    /// True: nothing waits, and who comes next begins anew.
    func isDone() -> Bool {
        state.withLock { state in
            state.isAtWork = !state.waiting.isEmpty
            return !state.isAtWork
        }
    }
}
