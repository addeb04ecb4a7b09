import Dispatch
import Foundation
import Glibc

/// The Unix socket through which engines and replicas are asked and told things.
///
/// Request: one line, `verb key=value ...`. Reply: `ok` or `error MESSAGE`, then `key=value` lines,
/// then an empty line.
package enum ControlSocket {
    package static let replySizeMax = 1 << 20

    /// Asks and waits for the answer on a thread of its own; throws if the process does not answer
    /// in time, answers with an error, or with something else than the protocol's.
    package static func request(
        _ path: String, _ line: String, timeoutSeconds: Int = 5
    ) async throws -> [String: String] {
        try await withCheckedThrowingContinuation { continuation in
            DispatchQueue.global().async {
                continuation.resume(
                    with: Result {
                        try exchange(path, line, timeoutSeconds: timeoutSeconds)
                    })
            }
        }
    }

    /// The request was sent and no answer came: whether it was done is not known.
    package struct NoAnswer: Error, CustomStringConvertible {
        package var description: String
        package init(description: String) { self.description = description }
    }

    /// Nobody listens, or takes all of the request: it is not done.
    package struct NotReached: Error, CustomStringConvertible {
        package var description: String
    }

    /// The same, blocking.
    package static func exchange(
        _ path: String, _ line: String, timeoutSeconds: Int
    ) throws -> [String: String] {
        let descriptor = try connect(path, timeoutSeconds: timeoutSeconds)
        defer { close(descriptor) }
        try send(descriptor, Array((line + "\n").utf8), path)
        return try parse(try receive(descriptor, path), path)
    }

    private static func connect(_ path: String, timeoutSeconds: Int) throws -> Int32 {
        let descriptor = socket(AF_UNIX, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue), 0)
        guard descriptor >= 0 else { throw HostFiles.failure("make a socket for", path) }
        var limit = timeval(tv_sec: timeoutSeconds, tv_usec: 0)
        let limitSize = socklen_t(MemoryLayout<timeval>.size)
        // SAFETY: the options point to a local of the size given.
        unsafe setsockopt(descriptor, SOL_SOCKET, SO_RCVTIMEO, &limit, limitSize)
        unsafe setsockopt(descriptor, SOL_SOCKET, SO_SNDTIMEO, &limit, limitSize)

        var address = sockaddr_un()
        address.sun_family = sa_family_t(AF_UNIX)
        let bytes = Array(path.utf8)
        guard bytes.count < UnixSocketPath.lengthMax else {
            close(descriptor)
            throw HostError("the socket path \(path) is too long")
        }
        // SAFETY: the path and its terminating zero fit `sun_path`, checked above; the address is
        // passed with its own size.
        unsafe withUnsafeMutableBytes(of: &address.sun_path) { target in
            unsafe target.copyBytes(from: bytes)
        }
        let size = socklen_t(MemoryLayout<sockaddr_un>.size)
        let isConnected = unsafe withUnsafePointer(to: &address) { pointer in
            unsafe pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                unsafe Glibc.connect(descriptor, $0, size) == 0
            }
        }
        guard isConnected else {
            let error = HostFiles.failure("reach", path)
            close(descriptor)
            throw NotReached(description: error.description)
        }
        return descriptor
    }

    private static func send(_ descriptor: Int32, _ bytes: [UInt8], _ path: String) throws {
        var done = 0
        while done < bytes.count {
            // SAFETY: the pointer is valid during the call, for the slice's own length.
            let count = unsafe bytes[done...].withUnsafeBytes {
                unsafe Glibc.send(descriptor, $0.baseAddress, $0.count, Int32(MSG_NOSIGNAL))
            }
            guard count > 0 else {
                throw NotReached(description: HostFiles.failure("write to", path).description)
            }
            done += count
        }
    }

    /// Reads up to the empty line that ends a reply.
    private static func receive(_ descriptor: Int32, _ path: String) throws -> [UInt8] {
        var reply: [UInt8] = []
        var part = [UInt8](repeating: 0, count: 4096)
        while !reply.ends(with: [10, 10]) {
            // SAFETY: the buffer is exclusively ours and as long as said.
            let count = unsafe part.withUnsafeMutableBytes {
                unsafe recv(descriptor, $0.baseAddress, $0.count, 0)
            }
            if count == 0 {
                throw NoAnswer(description: "\(path) closed before it had answered")
            }
            guard count > 0 else {
                guard errno != EAGAIN else {
                    throw NoAnswer(description: "\(path) did not answer in time")
                }
                throw NoAnswer(
                    description: HostFiles.failure("read an answer from", path).description)
            }
            reply += part[..<count]
            guard reply.count <= replySizeMax else {
                throw HostError("the answer of \(path) is too long")
            }
        }
        return reply
    }

    static func parse(_ reply: [UInt8], _ path: String) throws -> [String: String] {
        let lines = String(decoding: reply, as: UTF8.self).split(separator: "\n")
        guard let status = lines.first else { throw HostError("\(path) gave an empty answer") }
        if status.hasPrefix("error") { throw HostError(String(status.dropFirst("error ".count))) }
        guard status == "ok" else { throw HostError("\(path) answered '\(status)'") }
        var values: [String: String] = [:]
        for line in lines.dropFirst() {
            guard let equals = line.firstIndex(of: "=") else { continue }
            values[String(line[..<equals])] = String(line[line.index(after: equals)...])
        }
        return values
    }
}

/// Unix socket addresses hold short paths only.
package enum UnixSocketPath {
    /// Bytes, with the terminating zero.
    package static let lengthMax = 108

    /// Throws if sockets named with up to 32 bytes cannot be made below `directory`.
    package static func check(_ directory: String) throws {
        guard directory.utf8.count + 32 < lengthMax else {
            throw HostError(
                "the path \(directory) is too long for Unix sockets (at most "
                    + "\(lengthMax - 33) bytes); choose a shorter --dir")
        }
    }
}

extension [UInt8] {
    fileprivate func ends(with suffix: [UInt8]) -> Bool {
        count >= suffix.count && self[(count - suffix.count)...].elementsEqual(suffix)
    }
}
