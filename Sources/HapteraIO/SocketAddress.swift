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

    package var host: String? {
        if case .tcp(let host, _) = self { host } else { nil }
    }
    /// The host if it is a name, to be looked up before a connection to it can begin.
    var hostName: String? {
        // SAFETY: the string outlives the call.
        host.flatMap { unsafe haptera_host_is_numeric($0) == 0 ? $0 : nil }
    }
    /// The same port of another host.
    package func at(_ host: String) -> SocketAddress {
        if case .tcp(_, let port) = self { .tcp(host: host, port: port) } else { self }
    }
    /// With the host's address for its name, or as it is if there is none to be found. For use
    /// before the loop runs: it may block.
    package func resolved() -> SocketAddress {
        guard let hostName, case .success(let found) = NameResolver.system(hostName) else {
            return self
        }
        return at(found)
    }

    /// A non-blocking socket that listens on, or has begun to connect to, the address. To connect
    /// takes no host name; to listen on one may block while it is resolved.
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
