import Glibc
import HapteraHost

/// A blocking connection of one NBD client: one request at a time, simple replies, or the options
/// and replies of `NBDChanges`. For checking and asking, not for speed.
final class NBDSocket: @unchecked Sendable {
    enum Command: UInt16 {
        case read = 0
        case write = 1
        case flush = 3
    }

    private let descriptor: Int32
    /// Of `request`, which is one thread's: the rest is the kernel's to share.
    private var cookie: UInt64 = 0

    /// An answer that takes longer counts as a lost connection: the request may still happen.
    static let answerSecondsMax = 120

    /// Connects to an engine's Unix socket and opens the export.
    init(path: String, export: String) throws {
        descriptor = try Self.connect(path: path)
        limitWaiting()
        try greet(export)
    }
    /// Connects; what is said then is the caller's.
    init(_ address: NBDAddress) throws {
        switch address {
        case .unix(let path): descriptor = try Self.connect(path: path)
        case .tcp(let host, let port): descriptor = try Self.connect(host: host, port: port)
        }
        limitWaiting()
    }
    /// Takes over a connection.
    init(accepted descriptor: Int32) { self.descriptor = descriptor }
    deinit { close(descriptor) }

    /// Whoever waits for it on another thread is told that it is over.
    func hangUp() { shutdown(descriptor, Int32(SHUT_RDWR)) }

    private func limitWaiting() {
        var limit = timeval(tv_sec: Self.answerSecondsMax, tv_usec: 0)
        // SAFETY: the option points to a local of the size given.
        unsafe setsockopt(
            descriptor, SOL_SOCKET, SO_RCVTIMEO, &limit, socklen_t(MemoryLayout<timeval>.size))
    }

    private static func connect(path: String) throws -> Int32 {
        // SAFETY: the address is valid during the call, and as long as said.
        unsafe try open(path) { unsafe Glibc.connect($0, $1, $2) }
    }

    /// A socket that takes connections, for `accept`.
    static func listen(path: String) throws -> Int32 {
        // SAFETY: the address is valid during the call, and as long as said.
        let descriptor = unsafe try open(path) { unsafe Glibc.bind($0, $1, $2) }
        guard Glibc.listen(descriptor, 16) == 0 else {
            let failure = HostFiles.failure("listen on", path)
            close(descriptor)
            throw failure
        }
        return descriptor
    }
    /// Waits for a connection; below 0: there will be none.
    static func accept(_ listener: Int32) -> Int32 {
        while true {
            // Nobody asks for the peer's address.
            let descriptor = Glibc.accept(listener, nil, nil)
            if descriptor >= 0 { _ = fcntl(descriptor, F_SETFD, FD_CLOEXEC) }
            guard descriptor < 0, errno == EINTR || errno == ECONNABORTED else {
                return descriptor
            }
        }
    }

    /// Gives a new socket the address, in the way that `use` does.
    private static func open(
        _ path: String, _ use: (Int32, UnsafePointer<sockaddr>, socklen_t) -> Int32
    ) throws -> Int32 {
        let descriptor = socket(
            AF_UNIX, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue), 0)
        guard descriptor >= 0 else { throw HostFiles.failure("make a socket for", path) }
        var address = sockaddr_un()
        address.sun_family = sa_family_t(AF_UNIX)
        let bytes = Array(path.utf8)
        guard bytes.count < UnixSocketPath.lengthMax else {
            close(descriptor)
            throw HostError("the socket path \(path) is too long")
        }
        // SAFETY: the path and its terminating zero fit `sun_path`, checked above; the address is
        // passed with its own size.
        unsafe withUnsafeMutableBytes(of: &address.sun_path) { unsafe $0.copyBytes(from: bytes) }
        let size = socklen_t(MemoryLayout<sockaddr_un>.size)
        let isDone = unsafe withUnsafePointer(to: &address) { pointer in
            unsafe pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                unsafe use(descriptor, $0, size) == 0
            }
        }
        guard isDone else {
            let failure = HostFiles.failure("reach", path)
            close(descriptor)
            throw failure
        }
        return descriptor
    }

    private static func connect(host: String, port: Int) throws -> Int32 {
        var hints = unsafe addrinfo()
        unsafe hints.ai_socktype = Int32(SOCK_STREAM.rawValue)
        var found: UnsafeMutablePointer<addrinfo>?
        // SAFETY: the strings are valid during the call; the list is freed once, at the end.
        guard unsafe getaddrinfo(host, String(port), &hints, &found) == 0 else {
            throw HostError("the host '\(host)' is not known")
        }
        defer { unsafe freeaddrinfo(found) }
        var failure = HostError("the host '\(host)' has no address")
        var next = unsafe found
        // SAFETY: each entry of the list is valid until it is freed.
        while let entry = unsafe next?.pointee {
            unsafe next = entry.ai_next
            let descriptor = unsafe socket(
                entry.ai_family, entry.ai_socktype | Int32(SOCK_CLOEXEC.rawValue),
                entry.ai_protocol)
            guard descriptor >= 0 else { continue }
            if unsafe Glibc.connect(descriptor, entry.ai_addr, entry.ai_addrlen) == 0 {
                return descriptor
            }
            failure = HostFiles.failure("reach", Names.endpoint(host: host, port: port))
            close(descriptor)
        }
        throw failure
    }

    /// Fixed newstyle handshake, and NBD_OPT_EXPORT_NAME without zeroes.
    private func greet(_ export: String) throws {
        let greeting = try receive(18)
        guard greeting.prefix(16).elementsEqual("NBDMAGICIHAVEOPT".utf8) else {
            throw HostError("what answers where '\(export)' is served is no NBD server")
        }
        let name = Array(export.utf8)
        try send(
            Self.bytes(UInt32(3)) + Array("IHAVEOPT".utf8) + Self.bytes(UInt32(1))
                + Self.bytes(UInt32(name.count)) + name)
        _ = try receive(10)
    }

    /// Sends one request and waits for its reply. Throws if the connection is lost or the server
    /// reports an error.
    func request(
        _ command: Command, offset: UInt64 = 0, length: Int = 0, data: [UInt8] = []
    ) throws -> [UInt8] {
        cookie += 1
        try send(
            Self.bytes(UInt32(0x2560_9513)) + Self.bytes(UInt16(0)) + Self.bytes(command.rawValue)
                + Self.bytes(cookie) + Self.bytes(offset)
                + Self.bytes(UInt32(command == .write ? data.count : length)) + data)
        let header = try receive(16)
        guard Array(header[0..<4]) == Self.bytes(UInt32(0x6744_6698)),
            Array(header[8..<16]) == Self.bytes(cookie)
        else { throw HostError("the server's reply is out of step") }
        let error = header[4..<8].reduce(UInt32(0)) { $0 << 8 | UInt32($1) }
        guard error == 0 else { throw NBDRequestError(number: error) }
        return command == .read ? try receive(length) : []
    }

    static func bytes<Value: FixedWidthInteger>(_ value: Value) -> [UInt8] {
        (0..<Value.bitWidth / 8).reversed().map { UInt8(truncatingIfNeeded: value >> ($0 * 8)) }
    }

    static func number(_ bytes: ArraySlice<UInt8>) -> UInt64 {
        bytes.reduce(0) { $0 << 8 | UInt64($1) }
    }

    func send(_ bytes: [UInt8]) throws {
        var done = 0
        while done < bytes.count {
            // SAFETY: the pointer is valid during the call, for the slice's own length.
            let count = unsafe bytes[done...].withUnsafeBytes {
                unsafe Glibc.send(descriptor, $0.baseAddress, $0.count, Int32(MSG_NOSIGNAL))
            }
            guard count > 0 else { throw HostError("the connection was lost") }
            done += count
        }
    }

    /// Whether there is something to receive, or the connection is over.
    func isReadable(withinMilliseconds time: Int32) -> Bool {
        var entry = pollfd(fd: descriptor, events: Int16(POLLIN), revents: 0)
        // SAFETY: one entry, on the stack, valid during the call.
        return unsafe poll(&entry, 1, time) != 0
    }

    func receive(_ length: Int) throws -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: length)
        var done = 0
        while done < length {
            // SAFETY: the slice is exclusively ours and as long as said.
            let count = unsafe bytes[done...].withUnsafeMutableBytes {
                unsafe recv(descriptor, $0.baseAddress, $0.count, 0)
            }
            guard count > 0 else { throw HostError("the connection was lost") }
            done += count
        }
        return bytes
    }
}

/// Where an engine is reached.
package enum NBDAddress: Equatable, Sendable {
    case unix(String)
    case tcp(host: String, port: Int)

    package var text: String {
        switch self {
        case .unix(let path): path
        case .tcp(let host, let port): Names.endpoint(host: host, port: port)
        }
    }
}

/// An error the server answered with: a client sees it, which no fault here may cause.
struct NBDRequestError: Error {
    var number: UInt32
}
