import CHaptera
import Glibc
import Synchronization

/// Looks host names up on threads of their own, one for each name: a name server that is silent
/// holds whoever asks it for many seconds, longer than a lease lasts.
///
/// The address a name had last is given at once, while it is looked up anew for the next time. So
/// names that were good once need no name server, and one that has moved is found a little later.
package final class NameResolver: Sendable {
    package typealias Resolve = @Sendable (String) -> Result<String, IOError>
    package typealias Answer = @Sendable (Result<String, IOError>) -> Void
    /// Names looked up at the same time. For more nothing is done: who asks has a time limit.
    static let lookupsMax = 16
    /// Of those who wait for one name.
    static let waitersMax = 64
    /// Names remembered; all are forgotten when there are more.
    static let knownMax = 64
    package static let shared = NameResolver()

    private struct State {
        var known: [String: String] = [:]
        /// Those who wait for each name that is being looked up.
        var waiting: [String: [Answer]] = [:]
    }
    private let state = Mutex(State())
    private let resolve: Resolve

    package init(resolve: @escaping Resolve = NameResolver.system) { self.resolve = resolve }

    /// The address of the host as its name was looked up last, or nil: `answer` is then called
    /// once, from another thread.
    func lookUp(_ host: String, answer: @escaping Answer) -> String? {
        let (known, begins) = state.withLock { state in
            let known = state.known[host]
            let waiting = state.waiting[host]
            if waiting == nil && state.waiting.count >= Self.lookupsMax { return (known, false) }
            var waiters = waiting ?? []
            if known == nil && waiters.count < Self.waitersMax { waiters.append(answer) }
            state.waiting[host] = waiters
            return (known, waiting == nil)
        }
        if begins {
            do throws(IOError) {
                try onThreadOfItsOwn { [self] in finish(host, resolve(host)) }
            } catch {
                finish(host, .failure(error))
            }
        }
        return known
    }

    private func finish(_ host: String, _ found: Result<String, IOError>) {
        let waiters = state.withLock { state in
            if case .success(let address) = found {
                if state.known.count >= Self.knownMax { state.known = [:] }
                state.known[host] = address
            }
            return state.waiting.removeValue(forKey: host) ?? []
        }
        for answer in waiters { answer(found) }
    }

    /// What the system's resolver says. Blocks.
    package static func system(_ host: String) -> Result<String, IOError> {
        var text = [CChar](repeating: 0, count: Int(NI_MAXHOST))
        // SAFETY: the array has the size given; gai_strerror's text is static.
        let result = unsafe haptera_resolve(host, &text, text.count)
        guard result == 0 else {
            let reason = unsafe String(cString: gai_strerror(result))
            return .failure(IOError("cannot resolve '\(host)': \(reason)"))
        }
        let bytes = text.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }
        return .success(String(decoding: bytes, as: UTF8.self))
    }
}
