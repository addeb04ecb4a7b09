import Glibc
import HapteraCore
import HapteraIO
import Testing

@testable import HapteraEngine

/// What clients are told of several contexts, and what that holds.
@Suite struct NBDContextServerTests {
    private let monday = LayerID(rawValue: 5)
    private let tuesday = LayerID(rawValue: 8)
    private let queries = [
        "haptera:changed:monday", "base:allocation", "qemu:dirty-bitmap:tuesday",
    ]

    private func makeHarness(pool: BufferPool.Limits = .init()) throws -> NBDServerHarness {
        let h = try NBDServerHarness(pool: pool)
        h.device.snapshots = [
            .init(layer: monday, name: "monday", created: 1),
            .init(layer: tuesday, name: "tuesday", created: 2),
        ]
        return h
    }
    /// A client in transmission with all three contexts.
    private func join(
        _ h: NBDServerHarness, _ export: String = "vol", isExtended: Bool = false
    ) -> Int32 {
        let end = h.connect()
        h.send(end, NBDBytes.option(isExtended ? 11 : 8) + NBDBytes.contexts(export, queries))
        let names = queries.reduce(0) { $0 + 24 + $1.utf8.count }
        // GO, because EXPORT_NAME ends with extended headers.
        h.send(end, NBDBytes.go(export))
        _ = h.receive(end, 18 + 20 + names + 20 + 32 + 20)
        return end
    }
    /// A structured chunk with one extent.
    private func chunk(_ id: UInt8, _ length: UInt8, _ flags: UInt8, isLast: Bool) -> [UInt8] {
        [0x66, 0x8e, 0x33, 0xef, 0, isLast ? 1 : 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 12]
            + [0, 0, 0, id, 0, 0, length, 0, 0, 0, 0, flags]
    }

    @Test(arguments: [[0, 0, 0], [2, 1, 0], [1, 1, 0]])
    func eachContextIsAnsweredInItsOwnChunk(order: [Int]) throws {
        let h = try makeHarness()
        let end = join(h)
        h.send(end, NBDBytes.request(.blockStatus, length: 8192))
        h.runUntilHeld(3)
        #expect(h.device.held.map(\.base) == [monday, .head, tuesday])
        #expect(h.device.held.allSatisfy { $0.kind == .status && $0.layer == .head })
        var expected: [UInt8] = []
        var left = [(1, 1), (2, 3), (3, 1)] as [(UInt8, UInt8)]
        for place in order {
            h.device.complete(place, extents: [(8192, .zero)])
            let (id, flags) = left.remove(at: place)
            expected += chunk(id, 0x20, flags, isLast: left.isEmpty)
        }
        #expect(h.receive(end, 3 * 32) == expected)
        h.run("buffers leak") { h.device.pool.inUse == 0 }
    }

    @Test func withExtendedHeadersToo() throws {
        let h = try makeHarness()
        let end = join(h, "vol@tuesday", isExtended: true)
        let request: [UInt8] =
            [0x21, 0xe4, 0x1c, 0x71, 0, 8, 0, 7] + [UInt8](repeating: 0, count: 16)
            + [0, 0, 0, 0, 0, 0, 0x20, 0]
        h.send(end, request)
        h.runUntilHeld(3)
        #expect(h.device.held.allSatisfy { $0.layer == tuesday })
        while !h.device.held.isEmpty {
            // REQ_ONE: the first extent of each.
            h.device.complete(0, extents: [(4096, .absent), (4096, .data)])
        }
        for (id, flags) in [(1, 0), (2, 3), (3, 0)] as [(UInt8, UInt8)] {
            let chunk = h.receive(end, 32 + 8 + 16)
            #expect(chunk[0...7] == [0x6e, 0x8a, 0x27, 0x8c, 0, id == 3 ? 1 : 0, 0, 6])
            #expect(chunk[32...39] == [0, 0, 0, id, 0, 0, 0, 1])
            #expect(chunk[40...] == [0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, flags])
        }
    }

    /// The snapshot of one is deleted meanwhile: the request fails, with one last chunk.
    @Test func anErrorOfOneIsTheRequests() throws {
        let h = try makeHarness()
        let end = join(h)
        h.send(end, NBDBytes.request(.blockStatus, length: 8192))
        h.runUntilHeld(3)
        h.device.complete(0, extents: [(8192, .absent)])
        h.device.complete(0, .ioError)
        h.device.complete(0, extents: [(8192, .absent)])
        var reply = h.receive(end, 2 * 32)
        #expect(reply == chunk(1, 0x20, 0, isLast: false) + chunk(3, 0x20, 0, isLast: false))
        let text = NBDError.io.message.utf8CodeUnitCount
        reply = h.receive(end, 20 + 6 + text)
        #expect(reply[4...7] == [0, 1, 0x80, 1] && reply[20...23] == [0, 0, 0, 5])
        h.send(end, NBDBytes.request(.cache))
        #expect(h.receive(end, 16) == NBDBytes.simple())
        h.run("buffers leak") { h.device.pool.inUse == 0 }
    }

    /// A request waits until there are buffers for all its contexts, and is answered then.
    @Test func allBuffersOrNone() throws {
        let h = try makeHarness(pool: .init(small: 64, medium: 64, large: 64))
        let end = join(h)
        for _ in 0..<60 { h.send(end, NBDBytes.request(.blockStatus, length: 8192)) }
        h.settle()
        #expect(h.device.held.count % 3 == 0 && h.device.held.count < 60)
        var received = 0
        h.run("only \(received) bytes") {
            while !h.device.held.isEmpty { h.device.complete(0, extents: [(8192, .data)]) }
            received += h.drain(end)
            return received == 60 * 3 * 32
        }
        h.run("buffers leak") { h.device.pool.inUse == 0 }
    }

    /// From the moment it may ask, until it has gone or selected something else.
    @Test func whoComparesWithASnapshotUsesIt() throws {
        let h = try makeHarness()
        let end = h.connect()
        h.send(end, NBDBytes.option(8) + NBDBytes.contexts("", ["haptera:changed:tuesday"]))
        h.run("not counted") { h.server.userCount(of: tuesday) == 1 }
        #expect(h.server.userCount(of: monday) == 0 && h.server.readerCount == 0)
        h.send(end, NBDBytes.contexts("", ["qemu:dirty-bitmap:monday"]))
        h.run("not counted") { h.server.userCount(of: monday) == 1 }
        #expect(h.server.userCount(of: tuesday) == 0)
        let reader = h.join(export: "vol@monday")
        #expect(h.server.userCount(of: monday) == 2)
        h.send(end, NBDBytes.option(1, []))
        h.settle()
        #expect(h.server.userCount(of: monday) == 2 && h.server.readerCount == 1)
        h.disconnect(end)
        h.disconnect(reader)
        h.run("stays") { h.server.connectionCount == 0 }
        #expect(h.server.userCount(of: monday) == 0)
    }

    /// The next client in a place has what it selected itself.
    @Test func aPlaceForgetsItsContexts() throws {
        let h = try makeHarness()
        h.disconnect(join(h))
        h.run("stays") { h.server.connectionCount == 0 }
        let end = h.join()
        h.send(end, NBDBytes.request(.blockStatus, length: 8192))
        #expect(h.receive(end, 26)[4...7] == [0, 1, 0x80, 1])
        #expect(h.device.seen.isEmpty)
    }
}
