import Glibc

/// TCP ports for processes that keep theirs across restarts.
package enum Ports {
    /// Below the range the kernel takes outgoing connections' ports from, so that a port whose
    /// process is being restarted is not given away meanwhile.
    package static let defaultRange = 20000...29999

    /// A port of the range that nobody listens on at `host`; the search starts at a random place,
    /// so that two searchers rarely meet.
    package static func findFree(
        host: String, range: ClosedRange<Int> = defaultRange, except taken: Set<Int> = []
    ) throws -> Int {
        let start = Int.random(in: range)
        for step in 0..<range.count {
            let port = range.lowerBound + (start - range.lowerBound + step) % range.count
            if !taken.contains(port), isFree(host: host, port: port) { return port }
        }
        throw HostError("no free port in \(range.lowerBound)-\(range.upperBound) at \(host)")
    }

    /// True if a listener could be opened now.
    package static func isFree(host: String, port: Int) -> Bool {
        // SAFETY: `hints` is a local. The list found is valid after a zero result until
        // freeaddrinfo, and only its first element is used.
        var hints = unsafe addrinfo()
        unsafe hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV
        unsafe hints.ai_socktype = Int32(SOCK_STREAM.rawValue)
        var found: UnsafeMutablePointer<addrinfo>?
        guard unsafe getaddrinfo(host, String(port), &hints, &found) == 0,
            let info = unsafe found
        else { return false }
        defer { unsafe freeaddrinfo(info) }
        let descriptor = unsafe socket(
            info.pointee.ai_family, info.pointee.ai_socktype | Int32(SOCK_CLOEXEC.rawValue), 0)
        guard descriptor >= 0 else { return false }
        defer { close(descriptor) }
        // As the servers do: connections of a predecessor in TIME_WAIT are no obstacle.
        var yes: Int32 = 1
        unsafe setsockopt(descriptor, SOL_SOCKET, SO_REUSEADDR, &yes, socklen_t(4))
        return unsafe bind(descriptor, info.pointee.ai_addr, info.pointee.ai_addrlen) == 0
    }

    /// "20000-20999", or nil.
    package static func parseRange(_ text: String) -> ClosedRange<Int>? {
        let parts = text.split(separator: "-").compactMap { Int($0) }
        guard parts.count == 2, parts[0] >= 1, parts[1] <= 65535, parts[0] <= parts[1] else {
            return nil
        }
        return parts[0]...parts[1]
    }
}
