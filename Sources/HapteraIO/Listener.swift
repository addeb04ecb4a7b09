import CHaptera
import Glibc
import HapteraCore

/// Accepts connections on a TCP address or a Unix socket.
package final class Listener: CompletionHandler {
    package let address: SocketAddress
    private let reactor: Reactor
    private let onAccept: (Int32) -> Void
    private var fd: Int32
    private var id = HandlerID.none
    private var pollOperation = OperationID.none
    private static let retryMilliseconds = 100
    private enum Token { static let ready: UInt64 = 0, retry: UInt64 = 1 }

    /// How long an address may be taken by a process that was killed: the kernel takes its ring
    /// apart, and closes the sockets polled there, a little after the process is gone.
    package static let takenMilliseconds: UInt64 = 3000
    package static let takenRetryMilliseconds = 20

    /// Waits for the address if it is taken; for use before the loop runs.
    package static func waiting(
        reactor: Reactor, address: SocketAddress, onAccept: @escaping (Int32) -> Void
    ) throws(IOError) -> Listener {
        try whileTaken { () throws(IOError) in
            try Listener(reactor: reactor, address: address, onAccept: onAccept)
        }
    }

    /// Tries to listen until it succeeds, as long as all that fails is that the address is taken;
    /// blocks for up to `takenMilliseconds`.
    package static func whileTaken<Result>(
        _ listen: () throws(IOError) -> Result
    ) throws(IOError) -> Result {
        let end = Clock.monotonic().adding(milliseconds: takenMilliseconds)
        while true {
            do throws(IOError) {
                return try listen()
            } catch {
                guard error.errno == EADDRINUSE, Clock.monotonic() < end else { throw error }
            }
            usleep(UInt32(takenRetryMilliseconds * 1000))
        }
    }

    /// Port 0 takes a free one: see `address`. A Unix socket's file that nobody listens on any more
    /// is replaced. `onAccept` gets each connected socket and owns it.
    package init(reactor: Reactor, address: SocketAddress, onAccept: @escaping (Int32) -> Void)
        throws(IOError)
    {
        self.reactor = reactor
        self.onAccept = onAccept
        if case .unix(let path) = address { try Self.removeStale(path) }
        fd = try address.open(listening: true)
        if case .tcp(let host, 0) = address {
            self.address = .tcp(host: host, port: UInt16(haptera_local_port(fd)))
        } else {
            self.address = address
        }
        id = reactor.register(self)
        arm()
    }

    /// Stops accepting; no `onAccept` comes any more. A Unix socket's file is removed.
    package func close() {
        guard fd >= 0 else { return }
        reactor.unregister(id)
        if pollOperation != .none { reactor.cancel(pollOperation, fd: fd) }
        // Before the socket: a closed one's file is stale, and may be another process's by now.
        // SAFETY: the string outlives the call.
        if case .unix(let path) = address { _ = unsafe unlink(path) }
        reactor.closeDescriptor(fd)
        fd = -1
    }

    package func completed(token: UInt64, result: Int) {
        pollOperation = .none
        guard fd >= 0 else { return }
        while true {
            // Those who wait in the kernel's queue are served when others have left.
            guard reactor.connectionCount < Reactor.connectionsMax else { return retryLater() }
            let accepted = haptera_accept(fd)
            if accepted >= 0 {
                onAccept(accepted)
                if fd < 0 { return }
            } else if [EMFILE, ENFILE, ENOBUFS, ENOMEM].contains(-accepted) {
                return retryLater()
            } else if accepted != -EINTR && accepted != -ECONNABORTED {
                return arm()
            }
        }
    }

    private func arm() {
        pollOperation = reactor.poll(fd, events: POLLIN, handler: id, token: Token.ready)
    }
    private func retryLater() {
        reactor.timer(afterMilliseconds: Self.retryMilliseconds, handler: id, token: Token.retry)
    }

    /// A file left by a process that was killed refuses connections; a live one must not be taken.
    private static func removeStale(_ path: String) throws(IOError) {
        // SAFETY: the string outlives the call.
        let probe = unsafe haptera_socket_unix(path, 0)
        if probe >= 0 { Glibc.close(probe) }
        if probe >= 0 || probe == -EAGAIN {
            throw IOError(errno: EADDRINUSE, "somebody else listens on \(path)")
        }
        if probe == -ECONNREFUSED { _ = unsafe unlink(path) }
    }
}

/// Makes one connection without blocking.
package final class Connector: CompletionHandler {
    private let reactor: Reactor
    private let address: SocketAddress
    private var onDone: ((Result<Int32, IOError>) -> Void)?
    private var fd: Int32 = -1
    private var id = HandlerID.none
    private var timer = TimerID.none
    private var pollOperation = OperationID.none
    private enum Token { static let ready: UInt64 = 0, limit: UInt64 = 1, refused: UInt64 = 2 }
    private var refusal: IOError?

    /// `onDone` is called once, from the loop, with the connected socket (the callee's) or what
    /// went wrong; not after `cancel`. Kept alive by the reactor until then. The time includes what
    /// it takes to look the host's name up.
    package init(
        reactor: Reactor, address: SocketAddress, timeoutMilliseconds: Int,
        resolver: NameResolver = .shared, onDone: @escaping (Result<Int32, IOError>) -> Void
    ) {
        self.reactor = reactor
        self.address = address
        self.onDone = onDone
        id = reactor.register(self)
        timer = reactor.timer(
            afterMilliseconds: timeoutMilliseconds, handler: id, token: Token.limit)
        guard let name = address.hostName else {
            begin(address)
            return
        }
        let known = resolver.lookUp(name) { [mailbox = reactor.mailbox, id] found in
            mailbox.post { reactor in (reactor.handler(id) as? Connector)?.lookedUp(found) }
        }
        if let known { begin(address.at(known)) }
    }

    private func lookedUp(_ found: Result<String, IOError>) {
        switch found {
        case .success(let host): begin(address.at(host))
        case .failure(let error): refuse(error)
        }
    }
    private func begin(_ address: SocketAddress) {
        do throws(IOError) {
            fd = try address.open(listening: false)
            pollOperation = reactor.poll(fd, events: POLLOUT, handler: id, token: Token.ready)
        } catch {
            refuse(error)
        }
    }
    private func refuse(_ error: IOError) {
        refusal = error
        reactor.cancel(timer)
        timer = reactor.timer(afterMilliseconds: 0, handler: id, token: Token.refused)
    }

    package func cancel() {
        if onDone != nil { end(nil) }
    }

    package func completed(token: UInt64, result: Int) {
        switch token {
        case Token.ready:
            pollOperation = .none
            let outcome = haptera_socket_error(fd)
            guard outcome == 0 else {
                return end(.failure(IOError(errno: -outcome, "cannot connect to \(address.text)")))
            }
            // Blocking from here on: io_uring waits inside the kernel instead of failing.
            _ = fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_NONBLOCK)
            reactor.driverForget(fd)
            let connected = fd
            fd = -1
            end(.success(connected))
        case Token.limit:
            end(.failure(IOError(errno: ETIMEDOUT, "cannot connect to \(address.text)")))
        default:
            end(refusal.map { .failure($0) })
        }
    }

    private func end(_ outcome: Result<Int32, IOError>?) {
        let callback = onDone
        onDone = nil
        reactor.cancel(timer)
        reactor.unregister(id)
        if fd >= 0 {
            if pollOperation != .none { reactor.cancel(pollOperation, fd: fd) }
            reactor.closeDescriptor(fd)
            fd = -1
        }
        if let outcome { callback?(outcome) }
    }
}
