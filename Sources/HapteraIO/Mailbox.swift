import CHaptera
import Glibc
import HapteraCore
import Synchronization

/// How other threads reach a reactor: messages run on its thread, in order, soon. One wake-up per
/// burst, not per message.
package final class Mailbox: Sendable {
    package typealias Message = @Sendable (Reactor) -> Void
    private let messages = Mutex<[Message]>([])
    let event: Int32

    init() throws(IOError) {
        event = haptera_eventfd()
        guard event >= 0 else { throw IOError(errno: -event, "cannot make an eventfd") }
    }
    deinit { close(event) }

    /// From any thread. Messages posted after the reactor stopped are never run.
    package func post(_ message: @escaping Message) {
        let isFirst = messages.withLock { list in
            list.append(message)
            return list.count == 1
        }
        if isFirst { haptera_eventfd_signal(event) }
    }

    func take() -> [Message] {
        haptera_drain(event)
        return messages.withLock { list in
            defer { list = [] }
            return list
        }
    }
}
