import CHaptera
import Glibc
import HapteraCore

/// Turns signals into calls on the reactor's thread. Make it before other threads start: it blocks
/// the signals, and threads inherit that.
package final class SignalWatcher: CompletionHandler {
    private let reactor: Reactor
    private let onSignal: (Int32) -> Void
    private let fd: Int32
    private var id = HandlerID.none

    /// Kept alive by the reactor, for its life.
    package init(reactor: Reactor, signals: [Int32], onSignal: @escaping (Int32) -> Void)
        throws(IOError)
    {
        self.reactor = reactor
        self.onSignal = onSignal
        // SAFETY: the array outlives the call.
        fd = unsafe haptera_signalfd(signals, Int32(signals.count))
        guard fd >= 0 else { throw IOError(errno: -fd, "cannot watch signals") }
        id = reactor.register(self)
        arm()
    }
    private func arm() { reactor.poll(fd, events: POLLIN, handler: id, token: 0) }

    package func completed(token: UInt64, result: Int) {
        while true {
            let signal = haptera_signalfd_read(fd)
            guard signal > 0 else { break }
            onSignal(signal)
        }
        arm()
    }
}
