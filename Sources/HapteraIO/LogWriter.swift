import Glibc
import HapteraCore
import Synchronization

/// Writes the lines of a log on a thread, for a process whose loop must not wait for the disk the
/// log is on. Lines are rare, so the thread is made when there are some and ends when there are
/// none; while it is held up, what there is no room for is dropped and counted. A process that is
/// killed or traps loses what waits: next to nothing while the disk answers.
final class LogWriter: Sendable {
    /// Of the lines that wait.
    static let bytesMax = 256 << 10

    private struct State {
        var waiting: [UInt8] = []
        var dropped: UInt64 = 0
        var isWriting = false
    }
    private let state = Mutex(State())
    private let write: @Sendable ([UInt8]) -> Void

    /// `write` may block.
    init(write: @escaping @Sendable ([UInt8]) -> Void) { self.write = write }

    /// Returns at once.
    func append(_ line: [UInt8]) {
        let begins = state.withLock { state in
            if state.waiting.count + line.count > Self.bytesMax {
                state.dropped += 1
            } else {
                state.waiting += line
            }
            defer { state.isWriting = true }
            return !state.isWriting
        }
        guard begins else { return }
        do throws(IOError) {
            try onThreadOfItsOwn { [self] in writeAll() }
        } catch {
            writeAll()
        }
    }

    private func writeAll() {
        while let lines = take() { write(lines) }
    }
    /// What waits; nil if that is nothing: who asked is not writing any more.
    private func take() -> [UInt8]? {
        state.withLock { state in
            if state.waiting.isEmpty && state.dropped == 0 {
                state.isWriting = false
                return nil
            }
            var lines = state.waiting
            if state.dropped > 0 {
                lines += Log.line(
                    .warn, "the log could not be written in time; lines are missing here",
                    [("lines", String(state.dropped))])
            }
            state.waiting = []
            state.dropped = 0
            return lines
        }
    }

    /// Waits until everything is written; false: it takes longer than that.
    @discardableResult
    func flush(milliseconds: UInt64) -> Bool {
        let limit = Clock.monotonic().adding(milliseconds: milliseconds)
        while state.withLock({ $0.isWriting }) {
            guard Clock.monotonic() < limit else { return false }
            usleep(1000)
        }
        return true
    }
}
