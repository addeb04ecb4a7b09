import Glibc
import HapteraCore
import Testing

@testable import HapteraIO

@Suite(.serialized) struct NameResolverTests {
    private let named = SocketAddress.tcp(host: "replica.example", port: 0)

    private func listen(_ reactor: Reactor) throws -> (Listener, SocketAddress) {
        let listener = try Listener(
            reactor: reactor, address: .tcp(host: "127.0.0.1", port: 0)
        ) { close($0) }
        return (listener, listener.address.at("replica.example"))
    }

    /// The regression: names were looked up by the loop itself, which did nothing else meanwhile.
    @Test(arguments: backends) func aSilentServerDoesNotStopTheLoop(_ backend: Backend) throws {
        try withReactor(backend) { reactor in
            let server = SilentServer()
            let resolver = server.resolver()
            let (listener, address) = try listen(reactor)
            var done: [String] = []
            func connect(_ what: String, _ address: SocketAddress) {
                _ = Connector(
                    reactor: reactor, address: address, timeoutMilliseconds: 20_000,
                    resolver: resolver
                ) { outcome in
                    guard case .success(let fd) = outcome else { return }
                    close(fd)
                    done.append(what)
                }
            }
            connect("name", address)
            connect("address", listener.address)
            reactor.expect("others go on") { done == ["address"] }
            connect("the name again", address)
            server.release()
            reactor.expect("both who waited are told") { done.count == 3 }
            // Known by now: it is not waited for any more.
            connect("the name known", address)
            reactor.expect("at once") { done.last == "the name known" }
            server.release()
            listener.close()
        }
    }

    @Test(arguments: backends) func whoWaitsForANameHasATimeLimit(_ backend: Backend) throws {
        try withReactor(backend) { reactor in
            let server = SilentServer()
            let resolver = server.resolver()
            let (listener, address) = try listen(reactor)
            var (late, cancelled) = ([IOError](), 0)
            _ = Connector(
                reactor: reactor, address: address, timeoutMilliseconds: 20, resolver: resolver
            ) { if case .failure(let error) = $0 { late.append(error) } }
            let gone = Connector(
                reactor: reactor, address: address, timeoutMilliseconds: 20_000,
                resolver: resolver
            ) { _ in cancelled += 1 }
            gone.cancel()
            reactor.expect("limit") { late.map(\.errno) == [ETIMEDOUT] }
            // Its late answer meets nobody, and is remembered.
            server.release()
            var fd: Int32 = -1
            _ = Connector(
                reactor: reactor, address: address, timeoutMilliseconds: 20_000,
                resolver: resolver
            ) { if case .success(let connected) = $0 { fd = connected } }
            reactor.expect("connected") { fd >= 0 }
            close(fd)
            // Whatever was begun anew may end.
            server.release()
            #expect(late.count == 1 && cancelled == 0)
            listener.close()
        }
    }

    @Test(arguments: backends) func aNameThatIsNotFoundFails(_ backend: Backend) throws {
        try withReactor(backend) { reactor in
            let server = SilentServer()
            var outcome: Result<Int32, IOError>?
            _ = Connector(
                reactor: reactor, address: named, timeoutMilliseconds: 20_000,
                resolver: server.resolver(.failure(IOError("no such name")))
            ) { outcome = $0 }
            server.release()
            reactor.expect("told") { outcome != nil }
            #expect(throws: IOError.self) { try outcome?.get() }
        }
    }

    @Test func addressesAreNotLookedUp() throws {
        #expect(SocketAddress(tcp: "127.0.0.1:1")?.hostName == nil)
        #expect(SocketAddress(tcp: "[::1]:1")?.hostName == nil)
        #expect(SocketAddress.unix(path: "/run/socket").hostName == nil)
        #expect(SocketAddress(tcp: "localhost:1")?.hostName == "localhost")
        let local = try #require(SocketAddress(tcp: "localhost:1")).resolved()
        #expect(["127.0.0.1:1", "[::1]:1"].contains(local.text))
    }
}
