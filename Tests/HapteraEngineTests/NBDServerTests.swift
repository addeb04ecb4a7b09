import Glibc
import HapteraCore
import HapteraIO
import Testing

@testable import HapteraEngine

@Suite struct NBDServerTests {
    private let mib = 1 << 20

    @Test func requestsAreCutAtRegions() throws {
        let harness = try NBDServerHarness()
        let end = harness.join(structured: false)
        let offset = UInt64(mib / 2 + 512)
        harness.send(end, NBDBytes.request(.read, offset: offset, length: 2 * mib))
        harness.runUntilHeld(3)
        let pieces = harness.device.held
        #expect(pieces.map(\.offset) == [offset, UInt64(mib), UInt64(2 * mib)])
        #expect(pieces.map(\.length) == [mib / 2 - 512, mib, mib / 2 + 512])
        for (index, piece) in pieces.enumerated() {
            harness.device.pool.memory(piece.buffer)
                .slice(Int(piece.offset % 4096), piece.length).fill(UInt8(index + 1))
        }
        // Whatever the order of completion, a simple reply is in order.
        for _ in 0..<3 { harness.device.complete(harness.device.held.count - 1) }
        #expect(harness.receive(end, 16) == NBDBytes.simple())
        let data = harness.receive(end, 2 * mib)
        #expect(data[mib / 2 - 513] == 1 && data[mib / 2 - 512] == 2 && data[2 * mib - 1] == 3)
        harness.run("buffers leak") { harness.device.pool.inUse == 0 }
    }

    @Test func structuredReadsAnswerPieceByPiece() throws {
        let harness = try NBDServerHarness()
        let end = harness.join()
        harness.send(end, NBDBytes.request(.read, length: 2 * mib))
        harness.runUntilHeld(2)
        harness.device.complete(1, isHole: true)
        let hole = harness.receive(end, 32)
        #expect(hole[4...7] == [0, 0, 0, 2])
        harness.device.complete(0)
        let header = harness.receive(end, 28)
        #expect(header[4...7] == [0, 1, 0, 1])
        _ = harness.receive(end, mib)
        harness.run("buffers leak") { harness.device.pool.inUse == 0 }
    }

    @Test func aFailedPieceFailsTheRead() throws {
        let harness = try NBDServerHarness()
        let simple = harness.join(structured: false)
        harness.send(simple, NBDBytes.request(.read, length: 2 * mib))
        harness.runUntilHeld(2)
        harness.device.complete(1)
        harness.device.complete(0, .ioError)
        #expect(harness.receive(simple, 16) == NBDBytes.simple(.io))
        let structured = harness.join()
        harness.send(structured, NBDBytes.request(.read, length: 2 * mib))
        harness.runUntilHeld(2)
        harness.device.complete(0, .ioError)
        harness.device.complete(0)
        let data = harness.receive(structured, 28)
        #expect(data[4...7] == [0, 0, 0, 1])
        _ = harness.receive(structured, mib)
        #expect(harness.receive(structured, 26)[4...7] == [0, 1, 0x80, 1])
        harness.run("buffers leak") { harness.device.pool.inUse == 0 }
    }

    @Test func resultsBecomeErrors() throws {
        let harness = try NBDServerHarness()
        let end = harness.join(structured: false)
        let results: [(OperationResult, NBDError)] = [
            (.ok, .none), (.ioError, .io), (.noSpace, .noSpace), (.shuttingDown, .shutdown),
        ]
        for (result, error) in results {
            harness.send(end, NBDBytes.request(.flush))
            harness.runUntilHeld(1)
            harness.device.complete(0, result)
            #expect(harness.receive(end, 16) == NBDBytes.simple(error))
        }
    }

    @Test func aWriteIsSubmittedWithItsWholePayload() throws {
        let harness = try NBDServerHarness()
        let end = harness.join(structured: false)
        harness.send(end, NBDBytes.request(.write, length: 2 * mib))
        harness.send(end, [UInt8](repeating: 7, count: 2 * mib - 1))
        harness.settle()
        #expect(harness.device.seen.isEmpty)
        harness.send(end, [8])
        harness.runUntilHeld(2)
        let last = harness.device.held[1]
        #expect(harness.device.pool.memory(last.buffer)[mib - 2] == 7)
        #expect(harness.device.pool.memory(last.buffer)[mib - 1] == 8)
        harness.device.completeAll()
        #expect(harness.receive(end, 16) == NBDBytes.simple())
    }

    @Test func fuaOverSeveralPiecesEndsWithAFlush() throws {
        let harness = try NBDServerHarness()
        let end = harness.join(structured: false)
        harness.send(end, NBDBytes.request(.write, length: 4096, flags: .fua))
        harness.send(end, [UInt8](repeating: 7, count: 4096))
        harness.runUntilHeld(1)
        #expect(harness.device.held[0].flags == .fua)
        harness.device.complete()
        #expect(harness.receive(end, 16) == NBDBytes.simple())
        for command: NBDCommand in [.trim, .writeZeroes] {
            harness.send(end, NBDBytes.request(command, length: 2 * mib, flags: .fua))
            harness.runUntilHeld(2)
            #expect(harness.device.held.allSatisfy { $0.flags.isEmpty })
            harness.device.completeAll()
            harness.runUntilHeld(1)
            #expect(harness.device.held[0].kind == .flush)
            #expect(harness.available(end).isEmpty)
            harness.device.complete()
            #expect(harness.receive(end, 16) == NBDBytes.simple())
        }
    }

    @Test func longTrimsAreAWindowOfPieces() throws {
        let harness = try NBDServerHarness()
        let end = harness.join(structured: false)
        harness.send(end, NBDBytes.request(.trim, offset: 1, length: 3 << 30))
        harness.runUntilHeld(64)
        #expect(harness.device.held[0].offset == 4096)
        harness.device.complete()
        harness.runUntilHeld(64)
        harness.device.complete(5, .noSpace)
        harness.device.completeAll()
        #expect(harness.receive(end, 16) == NBDBytes.simple(.noSpace))
        #expect(harness.device.seen.count == 65)
        // Less than a block: nothing to do.
        harness.send(end, NBDBytes.request(.trim, offset: 1, length: 4096))
        #expect(harness.receive(end, 16) == NBDBytes.simple())
    }

    @Test func aVanishedClientLeavesNothingBehind() throws {
        let harness = try NBDServerHarness()
        harness.device.operationsMax = 2
        let end = harness.join()
        harness.send(end, NBDBytes.request(.read, length: 4 * mib))
        harness.send(end, NBDBytes.request(.write, offset: 0, length: mib))
        harness.runUntilHeld(2)
        harness.disconnect(end)
        // Gone once the device has answered what it had; the rest is dropped.
        harness.device.completeAll()
        harness.run("the client stays") { harness.server.connectionCount == 0 }
        harness.settle()
        harness.device.completeAll()
        #expect(harness.device.seen.count <= 4)
        harness.run("buffers leak") { harness.device.pool.inUse == 0 }
    }

    /// What waited in back-pressure when its peer hung up may have been sent again elsewhere.
    @Test func whatWaitedForAVanishedPeerChangesNothing() throws {
        let harness = try NBDServerHarness()
        let end = harness.join(structured: false)
        for _ in 0..<NBDClient.outstandingMax {
            harness.send(end, NBDBytes.request(.read, length: 512))
        }
        harness.runUntilHeld(NBDClient.outstandingMax)
        harness.send(end, NBDBytes.request(.write, length: 512))
        harness.send(end, [UInt8](repeating: 9, count: 512))
        harness.settle()
        harness.disconnect(end)
        harness.device.completeAll()
        harness.run("the client stays") { harness.server.connectionCount == 0 }
        #expect(!harness.device.seen.contains { $0.kind == .write })
        #expect(harness.device.pool.inUse == 0)
    }

    /// A write that is repeated on a new connection after its own died, and then overtaken by a
    /// newer one of the same client, must not come back: neither from the old connection's unread
    /// bytes nor from what the device still has of it.
    @Test func aNewSessionBeginsAfterDeadOnesAreFencedAndDrained() throws {
        let h = try NBDServerHarness()
        let old = h.join()
        let payload = [UInt8](repeating: 1, count: 4096)
        for index in 0..<NBDClient.outstandingMax + 2 {
            h.send(
                old,
                NBDBytes.request(.write, offset: UInt64(index) * 4096, length: 4096) + payload)
        }
        h.runUntilHeld(NBDClient.outstandingMax)
        let session = h.device.seen[0].session
        h.disconnect(old)
        let new = h.join()
        h.send(new, NBDBytes.request(.write, offset: 0, length: 4096) + payload)
        h.settle()
        #expect(h.device.cancelled == [session])
        #expect(h.device.held.count == NBDClient.outstandingMax, "the new session waits")
        while h.device.held.count > 1 { h.device.complete() }
        h.settle()
        #expect(h.device.held.map(\.session) == [session])
        h.device.complete()
        h.runUntilHeld(1)
        #expect(h.device.seen.count == NBDClient.outstandingMax + 1, "nothing else of the old one")
        #expect(h.device.held[0].session != session)
        h.device.complete()
        #expect(h.receive(new, 16) == NBDBytes.simple())
        #expect(h.device.pool.inUse == 0)
    }

    /// A peer that only closed its side is answered, whoever else is connected.
    @Test func aHalfClosedClientIsAnsweredBesideOthers() throws {
        let h = try NBDServerHarness()
        let idle = h.join()
        h.send(idle, NBDBytes.request(.read, length: 512))
        h.runUntilHeld(1)
        h.device.complete()
        let end = h.join(structured: false)
        let write = NBDBytes.request(.write, length: 512) + [UInt8](repeating: 1, count: 512)
        h.send(end, write + write + write)
        shutdown(end, Int32(SHUT_WR))
        h.runUntilHeld(3)
        h.device.completeAll()
        for _ in 0..<3 { #expect(h.receive(end, 16) == NBDBytes.simple()) }
        h.run("stays") { h.isClosed(end) }
        #expect(h.device.pool.inUse == 0)
    }

    /// A write that was still arriving when others went on, and whose peer then hung up, may have
    /// been repeated and overtaken by them: on connections that had long begun, too.
    @Test(arguments: [false, true])
    func aWriteThatArrivesLateFromADeadPeerIsDropped(isOvertaken: Bool) throws {
        let h = try NBDServerHarness()
        let old = h.join(structured: false)
        let new = h.join(structured: false)
        for end in [old, new] {
            h.send(end, NBDBytes.request(.flush))
            h.runUntilHeld(1)
            h.device.complete()
            #expect(h.receive(end, 16) == NBDBytes.simple())
        }
        h.send(old, NBDBytes.request(.write, length: 4096))
        h.send(old, [UInt8](repeating: 1, count: 4000))
        h.settle()
        if isOvertaken {
            h.send(new, NBDBytes.request(.write, length: 4096))
            h.send(new, [UInt8](repeating: 2, count: 4096))
            h.runUntilHeld(1)
            h.device.complete()
            #expect(h.receive(new, 16) == NBDBytes.simple())
        }
        h.send(old, [UInt8](repeating: 1, count: 96))
        shutdown(old, Int32(SHUT_WR))
        h.settle()
        if isOvertaken {
            #expect(h.device.held.isEmpty)
        } else {
            #expect(h.device.held.count == 1)
            h.device.completeAll()
            #expect(h.receive(old, 16) == NBDBytes.simple())
        }
        h.run("stays") { h.isClosed(old) }
        #expect(h.device.pool.inUse == 0)
    }

    @Test func connectionsThatLiveAreNotFenced() throws {
        let h = try NBDServerHarness()
        let first = h.join()
        h.send(first, NBDBytes.request(.read, length: 4096))
        h.runUntilHeld(1)
        let second = h.join(structured: false)
        h.send(second, NBDBytes.request(.flush))
        h.runUntilHeld(2)
        #expect(h.device.cancelled.isEmpty)
        #expect(h.device.held[0].session != h.device.held[1].session)
        h.disconnect(second)
        h.run("not noticed") { h.device.cancelled == [h.device.held[1].session] }
        h.send(first, NBDBytes.request(.flush))
        h.runUntilHeld(3)
        h.device.completeAll()
        h.settle()
        #expect(h.device.pool.inUse == 0)
    }

    @Test func whatTheDeviceHadNoRoomForIsDroppedWithItsClient() throws {
        let h = try NBDServerHarness()
        h.device.operationsMax = 1
        let end = h.join()
        for offset in 0..<4 {
            h.send(end, NBDBytes.request(.read, offset: UInt64(offset) * 4096, length: 4096))
        }
        h.run("not received") { h.server.counters.reads == 4 }
        h.settle()
        h.disconnect(end)
        h.run("not dropped") { h.device.pool.inUse == 1 }
        h.device.complete()
        h.settle()
        #expect(h.device.seen.count == 1)
        #expect(h.device.pool.inUse == 0)
    }

    @Test func outstandingRequestsAreBounded() throws {
        let harness = try NBDServerHarness()
        let end = harness.join(structured: false)
        for _ in 0..<300 { harness.send(end, NBDBytes.request(.flush)) }
        harness.runUntilHeld(NBDClient.outstandingMax)
        harness.settle()
        #expect(harness.device.held.count == NBDClient.outstandingMax)
        var answered = 0
        harness.run("\(answered) answers") {
            harness.device.completeAll()
            answered += harness.available(end).count / 16
            return answered == 300
        }
    }

    /// Clients that want more buffers than there are get them one after the other.
    @Test func waitingForBuffersNeverDeadlocks() throws {
        let harness = try NBDServerHarness(pool: .init(small: 64, medium: 16, large: 40))
        let ends = (0..<6).map { _ in harness.join(structured: false) }
        for end in ends {
            harness.send(end, NBDBytes.request(.read, length: 20 * mib))
            harness.send(end, NBDBytes.request(.read, offset: 4096, length: 32 * mib))
        }
        var received = Array(repeating: 0, count: ends.count)
        let expected = 52 * mib + 32
        harness.run("\(received)") {
            harness.device.completeAll()
            for (index, end) in ends.enumerated() {
                received[index] += harness.drain(end)
            }
            return received.allSatisfy { $0 == expected }
        }
        harness.run("buffers leak") { harness.device.pool.inUse == 0 }
    }

    @Test func whatNeedsNoBuffersDoesNotWaitForThem() throws {
        let h = try NBDServerHarness(pool: .init(small: 64, medium: 16, large: 40))
        let (first, second, third) = (h.join(), h.join(), h.join(structured: false))
        h.send(first, NBDBytes.request(.read, length: 32 * mib))
        h.runUntilHeld(32)
        h.send(second, NBDBytes.request(.read, length: 32 * mib))
        h.settle()
        h.send(third, NBDBytes.request(.flush))
        h.runUntilHeld(33)
        h.device.complete(32)
        #expect(h.receive(third, 16) == NBDBytes.simple())
    }

    /// A slow reader gives buffers back as it reads, not when it has read everything.
    @Test func buffersComeBackAsRepliesAreRead() throws {
        let h = try NBDServerHarness()
        let end = h.join()
        for _ in 0..<8 { h.send(end, NBDBytes.request(.read, length: mib)) }
        h.runUntilHeld(8)
        h.device.completeAll()
        h.settle()
        #expect(h.device.pool.inUse >= 7)
        _ = h.receive(end, 4 * mib)
        h.run("\(h.device.pool.inUse) in use") { h.device.pool.inUse <= 5 }
        h.disconnect(end)
        h.run("buffers leak") { h.device.pool.inUse == 0 }
    }

    /// Those that hold buffers without moving are hung up on when others wait for them.
    @Test func stalledPayloadsYieldUnderPressure() throws {
        var limits = NBDServer.Limits()
        limits.stallUnderPressureMilliseconds = 100
        let harness = try NBDServerHarness(
            limits: limits, pool: .init(small: 64, medium: 16, large: 40))
        let stalled = harness.join(structured: false)
        harness.send(stalled, NBDBytes.request(.write, length: 32 * mib))
        harness.settle()
        let other = harness.join(structured: false)
        harness.send(other, NBDBytes.request(.read, length: 32 * mib))
        harness.runUntilHeld(32)
        #expect(harness.isClosed(stalled))
        harness.device.completeAll()
        #expect(harness.receive(other, 16) == NBDBytes.simple())
    }

    @Test func timeLimits() throws {
        var limits = NBDServer.Limits()
        limits.negotiationMilliseconds = 100
        limits.stallMilliseconds = 100
        let harness = try NBDServerHarness(limits: limits)
        let idle = harness.join()
        let silent = harness.connect()
        let half = harness.join()
        harness.send(half, [0x25, 0x60, 0x95, 0x13, 0])
        let payload = harness.join()
        harness.send(payload, NBDBytes.request(.write, length: 4096) + [1])
        let deaf = harness.join()
        for _ in 0..<8 { harness.send(deaf, NBDBytes.request(.read, length: mib)) }
        harness.runUntilHeld(8)
        harness.device.completeAll()
        harness.run("only the idle client may stay") { harness.server.connectionCount == 1 }
        for end in [silent, half, payload, deaf] { #expect(harness.isClosed(end)) }
        harness.send(idle, NBDBytes.request(.cache))
        #expect(harness.receive(idle, 16) == NBDBytes.simple())
        #expect(harness.device.pool.inUse == 0)
    }

    @Test func connectionsAreBounded() throws {
        var limits = NBDServer.Limits()
        limits.connectionsMax = 2
        let harness = try NBDServerHarness(limits: limits)
        let first = harness.join()
        _ = harness.join()
        let third = harness.connect()
        harness.run("the third stays") { harness.isClosed(third) }
        #expect(harness.server.connectionsRefused == 1)
        harness.disconnect(first)
        harness.run("the first stays") { harness.server.connectionCount == 1 }
        _ = harness.join()
    }

    /// Promise: a peer that misbehaves costs nobody else anything. Strangers that hold every place
    /// and say nothing give some up.
    @Test func theSilentMakeRoom() throws {
        var limits = NBDServer.Limits()
        limits.connectionsMax = 16
        limits.negotiationUnderPressureMilliseconds = 50
        let harness = try NBDServerHarness(limits: limits)
        let speaking = harness.join(structured: false)
        for _ in 0..<15 { _ = harness.connect() }
        #expect(harness.server.connectionCount == 16)
        harness.run("no room is made") { harness.server.connectionCount <= 13 }
        let late = harness.join(structured: false)
        for end in [speaking, late] {
            harness.send(end, NBDBytes.request(.cache))
            #expect(harness.receive(end, 16) == NBDBytes.simple())
        }
    }

    @Test func stoppingAnswersWhatIsInFlight() throws {
        let harness = try NBDServerHarness()
        let busy = harness.join(structured: false)
        let idle = harness.join(structured: false)
        harness.send(busy, NBDBytes.request(.flush))
        harness.runUntilHeld(1)
        var isStopped = false
        harness.server.stop { isStopped = true }
        harness.run("the idle client stays") { harness.isClosed(idle) }
        #expect(!isStopped)
        harness.device.complete(0, .shuttingDown)
        #expect(harness.receive(busy, 16) == NBDBytes.simple(.shutdown))
        harness.disconnect(busy)
        harness.disconnect(idle)
        harness.run("never stopped") { isStopped }
    }

    /// An engine that stops ends its clients' connections itself, before its loop does: a kernel
    /// may take seconds to.
    @Test func closingWaitsForNobody() throws {
        let harness = try NBDServerHarness()
        let busy = harness.join(structured: false)
        let idle = harness.join(structured: false)
        harness.send(busy, NBDBytes.request(.flush))
        harness.runUntilHeld(1)
        #expect(!harness.isClosed(busy) && !harness.isClosed(idle))
        harness.server.abandon()
        #expect(harness.isClosed(busy) && harness.isClosed(idle))
        harness.device.completeAll()
        harness.settle()
        #expect(harness.server.connectionCount == 0)
        harness.run("buffers leak") { harness.device.pool.inUse == 0 }
    }

    @Test func stoppingDoesNotWaitForTheDeaf() throws {
        var limits = NBDServer.Limits()
        limits.stopMilliseconds = 100
        let h = try NBDServerHarness(limits: limits)
        let deaf = h.join()
        for _ in 0..<4 { h.send(deaf, NBDBytes.request(.read, length: mib)) }
        h.runUntilHeld(4)
        h.device.completeAll()
        let waiting = h.join()
        h.send(waiting, NBDBytes.request(.flush))
        h.runUntilHeld(1)
        var isStopped = false
        h.server.stop { isStopped = true }
        h.run("never stopped") { isStopped }
        h.device.completeAll()
        #expect(h.device.pool.inUse == 0)
    }

    @Test func aVolumeMayGrow() throws {
        let harness = try NBDServerHarness()
        let end = harness.join(structured: false)
        let request = NBDBytes.request(.write, offset: 1 << 40, length: 0)
        harness.send(end, NBDBytes.request(.writeZeroes, offset: 1 << 40, length: 512))
        #expect(harness.receive(end, 16) == NBDBytes.simple(.noSpace))
        harness.device.size += 1 << 20
        harness.server.sizeChanged()
        harness.send(end, NBDBytes.request(.writeZeroes, offset: 1 << 40, length: 512))
        harness.runUntilHeld(1)
        harness.device.complete()
        #expect(harness.receive(end, 16) == NBDBytes.simple())
        harness.send(end, request)
        #expect(harness.receive(end, 16) == NBDBytes.simple())
    }
}
