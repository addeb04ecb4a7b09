import Glibc
import Testing

@testable import HapteraCore
@testable import HapteraEngine
@testable import HapteraIO

@Suite struct ReplicaLinkTests {
    /// The regression: the connection of a replica that was taken off the list closes a little
    /// later than that, when its slot may already be another's, who then counted as gone for as
    /// long as its own connection lived.
    @Test func theLateEndOfAReplacedLinkIsNotItsSuccessors() throws {
        let reactor = try Reactor()
        var accepted: Int32 = -1
        let listener = try Listener(
            reactor: reactor, address: .tcp(host: "127.0.0.1", port: 0)
        ) { accepted = $0 }
        let free = try Listener(
            reactor: reactor, address: .tcp(host: "127.0.0.1", port: 0)
        ) { close($0) }
        free.close()
        let shell = EngineShell(
            reactor: reactor,
            options: try EngineOptions([
                "--volume", "vol", "--volume-id", String(repeating: "1", count: 32),
                "--store", free.address.text, "--replica",
                "0000000000000001=\(listener.address.text)", "--client-generation", "1",
                "--nbd", "127.0.0.1:0",
            ]))
        shell.start()
        func link(_ replica: UInt64) -> ReplicaState.Link? {
            shell.core.slot(of: ReplicaID(rawValue: replica)).map { shell.core.replicas[$0].link }
        }
        reactor.run { accepted >= 0 && link(1) == .connected }
        // Nobody listens there: what is said of the second replica is said here.
        let second = ReplicaEndpoint(id: ReplicaID(rawValue: 2), address: free.address)
        let slot = try #require(shell.core.slot(of: ReplicaID(rawValue: 1)))
        shell.configure([second])
        #expect(shell.core.slot(of: second.id) == slot)
        shell.run(.connected(slot))
        reactor.run { reactor.connectionCount == 0 }
        #expect(link(2) == .connected)
        shell.configure([])
        listener.close()
        close(accepted)
    }
}
