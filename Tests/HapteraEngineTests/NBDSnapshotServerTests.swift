import Glibc
import HapteraCore
import HapteraIO
import Testing

@testable import HapteraEngine

/// Connections to snapshots beside those to the live volume.
@Suite struct NBDSnapshotServerTests {
    private let monday = LayerID(rawValue: 5)
    private let tuesday = LayerID(rawValue: 8)
    private let block = [UInt8](repeating: 7, count: 4096)

    private func makeHarness(limits: NBDServer.Limits = .init()) throws -> NBDServerHarness {
        let h = try NBDServerHarness(limits: limits)
        h.device.snapshots = [
            .init(layer: monday, name: "monday", created: 1),
            .init(layer: tuesday, name: "tuesday", created: 2),
        ]
        return h
    }
    /// A server without its volume: those who read are nobody's client, and nobody else gets in.
    @Test func onlyReadersGetInWithoutTheVolume() throws {
        let h = try NBDServerHarness(offersLive: false)
        h.device.snapshots = [.init(layer: monday, name: "monday", created: 1)]
        let stranger = h.connect()
        h.send(stranger, NBDBytes.option(1, Array("vol".utf8)))
        h.run("stays") { h.server.connectionCount == 0 }
        let reader = h.join(structured: false, export: "vol@monday")
        h.send(reader, NBDBytes.request(.read, length: 4096))
        h.runUntilHeld(1)
        #expect(h.device.held[0].layer == monday)
        #expect(h.server.readerCount == 1 && h.server.userCount(of: monday) == 1)
        #expect(h.server.userCount(of: .head) == 0 && h.server.remoteClients == 0)
        h.device.complete()
        #expect(h.receive(reader, 16) == NBDBytes.simple())
    }

    private func expectNothingIsHeld(_ h: NBDServerHarness) {
        h.run("buffers leak") { h.device.pool.inUse == 0 && h.device.held.isEmpty }
    }

    @Test func readsCarryTheLayerOfTheirExport() throws {
        let h = try makeHarness()
        let names = ["vol", "vol@monday", "vol@tuesday", ""]
        let layers = [LayerID.head, monday, tuesday, .head]
        let ends = names.map { h.join(structured: false, export: $0) }
        for (index, end) in ends.enumerated() {
            h.send(end, NBDBytes.request(.read, offset: 1 << 20, length: 4096))
            h.runUntilHeld(index + 1)
        }
        #expect(h.device.held.map(\.layer) == layers)
        #expect(h.device.held.allSatisfy { $0.kind == .read && $0.offset == 1 << 20 })
        for operation in h.device.held {
            h.device.pool.memory(operation.buffer).fill(UInt8(operation.layer.rawValue))
        }
        h.device.completeAll()
        for (end, layer) in zip(ends, layers) {
            #expect(h.receive(end, 16) == NBDBytes.simple())
            #expect(
                h.receive(end, 4096) == [UInt8](repeating: UInt8(layer.rawValue), count: 4096))
        }
        // A read of several regions is about one layer.
        h.send(ends[1], NBDBytes.request(.read, offset: 4096, length: 2 << 20))
        h.runUntilHeld(3)
        #expect(h.device.held.allSatisfy { $0.layer == monday })
        h.device.completeAll()
        #expect(h.receive(ends[1], 16) == NBDBytes.simple())
        _ = h.receive(ends[1], 2 << 20)
        expectNothingIsHeld(h)
    }

    /// A place that a reader leaves says nothing about who takes it next.
    @Test func aPlaceIsLiveAgainAfterAReader() throws {
        let h = try makeHarness()
        let reader = h.join(export: "vol@monday")
        h.disconnect(reader)
        h.run("stays") { h.server.connectionCount == 0 }
        #expect(h.server.readerCount == 0)
        let live = h.join(structured: false)
        h.send(live, NBDBytes.request(.write, length: 4096) + block)
        h.runUntilHeld(1)
        #expect(h.device.held[0].layer == .head)
        h.device.complete()
        #expect(h.receive(live, 16) == NBDBytes.simple())
    }

    @Test func blockStatusIsTheSnapshots() throws {
        let h = try makeHarness()
        let end = h.connect()
        h.send(end, NBDBytes.option(8) + NBDBytes.allocationContext("vol@monday"))
        h.send(end, NBDBytes.option(1, Array("vol@monday".utf8)))
        _ = h.receive(end, 18 + 20 + (20 + 19) + 20 + 10)
        h.send(end, NBDBytes.request(.blockStatus, length: 8192))
        h.runUntilHeld(1)
        #expect(h.device.held[0].kind == .status && h.device.held[0].layer == monday)
        h.device.complete(0, extents: [(4096, .data), (4096, .zero)])
        let reply = h.receive(end, 20 + 4 + 16)
        #expect(reply[4...7] == [0, 1, 0, 5])
        #expect(reply.suffix(16) == [0, 0, 0x10, 0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 3])
        expectNothingIsHeld(h)
    }

    @Test func changesAreRefusedAndTheConnectionGoesOn() throws {
        let h = try makeHarness()
        let end = h.join(structured: false, export: "vol@monday")
        let size = 8 << 20
        h.send(end, NBDBytes.request(.write, length: size, cookie: 2))
        h.send(end, [UInt8](repeating: 0x25, count: size))
        #expect(h.receive(end, 16) == NBDBytes.simple(.notPermitted, cookie: 2))
        for command: NBDCommand in [.trim, .writeZeroes] {
            h.send(end, NBDBytes.request(command, length: 4096, flags: .fua, cookie: 3))
            #expect(h.receive(end, 16) == NBDBytes.simple(.notPermitted, cookie: 3))
        }
        // There is nothing to flush: the device, whose disks may be full, is not asked.
        for command: NBDCommand in [.flush, .cache] {
            h.send(end, NBDBytes.request(command, cookie: 4))
            #expect(h.receive(end, 16) == NBDBytes.simple(cookie: 4))
        }
        #expect(h.device.seen.isEmpty)
        h.send(end, NBDBytes.request(.read, length: 4096, cookie: 5))
        h.runUntilHeld(1)
        h.device.complete()
        #expect(h.receive(end, 16) == NBDBytes.simple(cookie: 5))
        _ = h.receive(end, 4096)
        expectNothingIsHeld(h)
    }

    @Test func snapshotsComeAndGoWhileItServes() throws {
        let h = try makeHarness()
        let reader = h.join(structured: false, export: "vol@monday")
        h.send(reader, NBDBytes.request(.read, length: 4096))
        h.runUntilHeld(1)
        h.device.snapshots = [.init(layer: LayerID(rawValue: 9), name: "friday", created: 3)]
        // What was being read is gone: the engine says so, and the connection lives.
        for (result, error): (OperationResult, NBDError) in [
            (.ioError, .io), (.shuttingDown, .shutdown), (.ioError, .io),
        ] {
            h.runUntilHeld(1)
            #expect(h.device.held[0].layer == monday)
            h.device.complete(0, result)
            #expect(h.receive(reader, 16) == NBDBytes.simple(error))
            h.send(reader, NBDBytes.request(.read, length: 4096))
        }
        h.runUntilHeld(1)
        h.device.complete(0, .ioError)
        let late = h.connect()
        h.send(late, NBDBytes.option(1, Array("vol@monday".utf8)))
        h.run("a snapshot that is gone") { h.isClosed(late) }
        let friday = h.join(export: "vol@friday")
        h.send(friday, NBDBytes.request(.read, length: 4096))
        h.runUntilHeld(1)
        #expect(h.device.held[0].layer == LayerID(rawValue: 9))
        h.device.completeAll()
    }

    /// Many clients that ask for the longest list and do not read it: each gets all of it.
    @Test func longListsArriveWhole() throws {
        let h = try makeHarness()
        h.device.snapshots = (1...VolumeRecord.snapshotsMax).map {
            .init(layer: LayerID(rawValue: UInt32($0)), name: "snapshot-\($0 + 10_000)", created: 0)
        }
        let size = 24 + 3 + VolumeRecord.snapshotsMax * (24 + 3 + 1 + 14) + 20
        let ends = (0..<4).map { _ in h.connect() }
        for end in ends { for _ in 0..<200 { h.send(end, NBDBytes.option(3)) } }
        h.settle()
        for end in ends {
            var received = 0
            h.run("\(received) bytes") {
                received += h.drain(end)
                return received == 18 + 200 * size
            }
        }
    }

    // MARK: Fencing

    /// A session that begins at a snapshot does not ask who has hung up, and waits for nobody.
    @Test func aReaderFencesNobody() throws {
        let h = try makeHarness()
        let live = h.join(structured: false)
        for _ in 0..<NBDClient.outstandingMax + 1 {
            h.send(live, NBDBytes.request(.write, length: 4096) + block)
        }
        h.runUntilHeld(NBDClient.outstandingMax)
        // Its peer has gone while it is held back: the next session of the volume would see that.
        h.disconnect(live)
        let reader = h.join(structured: false, export: "vol@monday")
        h.send(reader, NBDBytes.request(.read, length: 4096))
        h.runUntilHeld(NBDClient.outstandingMax + 1)
        #expect(h.device.cancelled.isEmpty)
        #expect(h.server.connectionCount == 2)
        h.device.complete(NBDClient.outstandingMax)
        #expect(h.receive(reader, 16) == NBDBytes.simple())
        _ = h.receive(reader, 4096)
        let next = h.join(structured: false)
        h.send(next, NBDBytes.request(.flush))
        h.run("not fenced") { h.device.cancelled.count == 1 }
        h.device.completeAll()
        h.runUntilHeld(1)
        h.device.completeAll()
        #expect(h.receive(next, 16) == NBDBytes.simple())
        #expect(!h.isClosed(reader))
        expectNothingIsHeld(h)
    }

    /// A reader that is held back and has closed its side is answered in full, whatever sessions
    /// of the volume begin and change meanwhile.
    @Test func aReaderIsNotFenced() throws {
        let h = try makeHarness()
        let reader = h.join(structured: false, export: "vol@monday")
        let count = NBDClient.outstandingMax + 20
        for _ in 0..<count { h.send(reader, NBDBytes.request(.read, length: 512)) }
        shutdown(reader, Int32(SHUT_WR))
        h.runUntilHeld(NBDClient.outstandingMax)
        let live = h.join(structured: false)
        for _ in 0..<3 {
            h.send(live, NBDBytes.request(.write, length: 4096) + block)
            h.run("waits for a reader") { h.device.held.last?.kind == .write }
            h.device.complete(h.device.held.count - 1)
            #expect(h.receive(live, 16) == NBDBytes.simple())
        }
        #expect(h.device.cancelled.isEmpty)
        var received = 0
        h.run("\(received) bytes") {
            h.device.completeAll()
            received += h.drain(reader)
            return received == count * (16 + 512)
        }
        #expect(h.device.seen.filter { $0.layer == monday }.count == count)
        expectNothingIsHeld(h)
    }

    /// What the device still has of a reader that vanished is nothing a client has to wait for.
    @Test func nobodyWaitsForWhatAVanishedReaderLeft() throws {
        let h = try makeHarness()
        let reader = h.join(export: "vol@monday")
        for _ in 0..<10 { h.send(reader, NBDBytes.request(.read, length: 4096)) }
        h.runUntilHeld(10)
        h.disconnect(reader)
        h.run("not noticed") { h.server.connectionCount == 0 }
        #expect(h.device.cancelled == [h.device.held[0].session])
        let live = h.join(structured: false)
        h.send(live, NBDBytes.request(.write, length: 4096) + block)
        h.runUntilHeld(11)
        #expect(h.device.held[10].kind == .write)
        h.device.complete(10)
        #expect(h.receive(live, 16) == NBDBytes.simple())
        while !h.device.held.isEmpty { h.device.complete(0, .cancelled) }
        expectNothingIsHeld(h)
    }

    // MARK: Counts and places

    @Test func readersAreCountedApart() throws {
        let h = try makeHarness()
        let reader = h.join(export: "vol@monday")
        let live = h.join()
        let undecided = h.connect()
        h.settle()
        #expect(h.server.connectionCount == 3 && h.server.readerCount == 1)
        for end in [live, undecided] { h.disconnect(end) }
        h.run("stay") { h.server.connectionCount == 1 }
        #expect(h.server.readerCount == 1)
        h.disconnect(reader)
        h.run("stays") { h.server.connectionCount == 0 }
        #expect(h.server.readerCount == 0)
    }

    /// Readers leave a quarter of the places to the volume's own client.
    @Test func readersDoNotKeepTheClientOut() throws {
        var limits = NBDServer.Limits()
        limits.connectionsMax = 8
        let h = try makeHarness(limits: limits)
        let readers = (0..<6).map { _ in h.join(export: "vol@monday") }
        let refused = h.connect()
        h.send(refused, NBDBytes.option(1, Array("vol@tuesday".utf8)))
        h.run("a seventh reads") { h.isClosed(refused) }
        let live = h.join(structured: false)
        h.send(live, NBDBytes.request(.cache))
        #expect(h.receive(live, 16) == NBDBytes.simple())
        h.disconnect(readers[0])
        h.run("stays") { h.server.readerCount == 5 }
        _ = h.join(export: "vol@tuesday")
        #expect(h.server.readerCount == 6)
    }

    @Test func aServerThatStopsAnswersReaders() throws {
        let h = try makeHarness()
        let reader = h.join(structured: false, export: "vol@monday")
        let idle = h.join(export: "vol@tuesday")
        h.send(reader, NBDBytes.request(.read, length: 4096))
        h.runUntilHeld(1)
        var isStopped = false
        h.server.stop { isStopped = true }
        h.run("the idle reader stays") { h.isClosed(idle) }
        #expect(!isStopped)
        h.device.complete()
        #expect(h.receive(reader, 16) == NBDBytes.simple())
        _ = h.receive(reader, 4096)
        h.disconnect(reader)
        h.run("never stopped") { isStopped }
    }

    @Test func aMemoryHasNoSnapshots() throws {
        let reactor = try Reactor()
        let device = MemoryDevice(name: "vol", size: 4096, isReadOnly: false, pool: reactor.pool)
        #expect(device.snapshots.isEmpty)
    }
}
