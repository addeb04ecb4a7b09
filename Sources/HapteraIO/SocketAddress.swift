import CHaptera
import Glibc
import HapteraCore

/// Where to listen or connect: `HOST:PORT` (IPv6 in brackets) or a Unix socket's path.
package enum SocketAddress: Equatable, Sendable {
    case tcp(host: String, port: UInt16)
    case unix(path: String)

    /// Parses `HOST:PORT`; the host may be a name, an IPv4 address or `[IPv6]`.
    package init?(tcp text: String) {
        guard let colon = text.lastIndex(of: ":"),
            let port = UInt16(text[text.index(after: colon)...])
        else { return nil }
        var host = text[..<colon]
        if host.hasPrefix("[") && host.hasSuffix("]") {
            host = host.dropFirst().dropLast()
        } else if host.contains(":") {
            return nil
        }
        guard !host.isEmpty else { return nil }
        self = .tcp(host: String(host), port: port)
    }

    package var text: String {
        switch self {
        case .tcp(let host, let port): host.contains(":") ? "[\(host)]:\(port)" : "\(host):\(port)"
        case .unix(let path): path
        }
    }

    /// Whether the connected socket's peer is known to be on this host.
    package static func isPeerLocal(_ fd: Int32) -> Bool { haptera_peer_is_local(fd) != 0 }

    /// A non-blocking socket that listens on, or has begun to connect to, the address. Resolving a
    /// host name (not an address) may block.
    func open(listening: Bool) throws(IOError) -> Int32 {
        let verb = listening ? "listen on" : "connect to"
        let mode: Int32 = listening ? 1 : 0
        var resolution: Int32 = 0
        let fd: Int32
        // SAFETY: the strings and `resolution` outlive the calls; gai_strerror's text is static.
        switch self {
        case .tcp(let host, let port):
            fd = unsafe haptera_socket_tcp(host, String(port), mode, &resolution)
            guard resolution == 0 else {
                let reason = unsafe String(cString: gai_strerror(resolution))
                throw IOError("cannot resolve '\(text)': \(reason)")
            }
        case .unix(let path):
            fd = unsafe haptera_socket_unix(path, mode)
        }
        guard fd >= 0 else { throw IOError(errno: -fd, "cannot \(verb) \(text)") }
        return fd
    }
}
