import Glibc
import Testing

@testable import HapteraCore
@testable import HapteraIO
@testable import HapteraReplica

@Suite struct ReplicaServerTests {
    /// While its descriptors are open, as a kernel may keep them when the process has ended.
    @Test func engineHearsThatItHasStopped() throws {
        let directory = try TestDirectory()
        try ReplicaCore.create(
            storage: DirectoryStorage(directory: directory.path, mode: .serve),
            identity: ReplicaIdentity(
                volume: VolumeID(high: 1, low: 2), name: "volume", replica: ReplicaID(rawValue: 3),
                incarnation: Incarnation(rawValue: 4), size: UInt64(Geometry.regionSize)))
        let reactor = try Reactor()
        let server = try ReplicaServer(
            reactor: reactor, directory: directory.path, listen: .tcp(host: "127.0.0.1", port: 0),
            control: "\(directory.path)/control")
        var engine: Int32 = -1
        let connector = Connector(
            reactor: reactor, address: try #require(server.address), timeoutMilliseconds: 5000
        ) {
            if case .success(let fd) = $0 { engine = fd }
        }
        reactor.run { engine >= 0 && reactor.connectionCount == 1 }
        server.shutdown("test")
        reactor.run()
        var byte: UInt8 = 0
        // SAFETY: the byte outlives the call.
        let count = unsafe recv(engine, &byte, 1, Int32(MSG_DONTWAIT))
        #expect(count == 0, "the end of the connection, and not that nothing has come yet")
        close(engine)
        withExtendedLifetime((server, connector)) {}
    }
}
