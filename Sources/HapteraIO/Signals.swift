import CHaptera
import Glibc
import HapteraCore

/// Turns signals into calls from the reactor's loop. Make it before any other thread starts, so
/// that all of them inherit the blocked signals.
package final class SignalWatcher: CompletionHandler {
    private unowned let reactor: Reactor
    private let fd: Int32
    private var id = HandlerID.none
    private let onSignal: (Int32) -> Void

    /// Also makes the process ignore SIGPIPE and SIGXFSZ, which say what calls return anyway. The
    /// reactor keeps the watcher for its life.
    package init(
        reactor: Reactor, signals: [Int32] = [SIGTERM, SIGINT], onSignal: @escaping (Int32) -> Void
    ) throws(IOError) {
        self.reactor = reactor
        self.onSignal = onSignal
        haptera_ignore_signals()
        // SAFETY: the array outlives the call.
        fd = unsafe haptera_signalfd(signals, Int32(signals.count))
        guard fd >= 0 else { throw IOError(errno: -fd, "cannot watch signals") }
        id = reactor.register(self)
        arm()
    }
    deinit { close(fd) }

    private func arm() { reactor.poll(fd, events: POLLIN, handler: id, token: 0) }

    package func completed(token: UInt64, result: Int) {
        while true {
            let signal = haptera_signalfd_read(fd)
            if signal <= 0 { break }
            onSignal(signal)
        }
        arm()
    }
}

/// What a process that SIGBUS ends leaves behind: a store into a mapping that the file system
/// refuses ends it so.
package enum BusErrors {
    /// The bytes, at most 64, are written to the file when it happens. False: the path is too long.
    package static func leave(_ bytes: [UInt8], at path: String) -> Bool {
        // SAFETY: string and array outlive the call, which copies them.
        unsafe haptera_note_bus_errors(path, bytes, bytes.count) != 0
    }
}
