import Glibc
import HapteraCore
import HapteraIO
import Testing

@testable import HapteraEngine

/// Long changes, given to the device a window at a time, whose client may have repeated them on
/// another connection before all of them was under way.
@Suite struct NBDOvertakenTests {
    enum First { case lives, closesItsSide, closes }

    /// The regression: a kernel that waits too long for a trim shuts its connection down, repeats
    /// the trim on another, is answered, and writes there. What the engine had not begun of the
    /// first trim must not zero that write. A connection that lives is one of several of a client:
    /// it goes on, whatever the others change.
    @Test(arguments: [NBDCommand.trim, .writeZeroes], [First.lives, .closesItsSide, .closes])
    func theRestOfWhatWasRepeatedElsewhereIsDropped(command: NBDCommand, first: First) throws {
        let h = try NBDServerHarness()
        let (crowd, old, new) = (h.join(), h.join(structured: false), h.join(structured: false))
        let start: UInt64 = 1 << 39
        let request = NBDBytes.request(command, offset: start, length: 256 << 20)
        flush(h, new)
        beginWithOnePiece(h, crowd, old, request)
        let session = h.device.held[0].session
        switch first {
        case .lives: break
        case .closesItsSide: shutdown(old, Int32(SHUT_WR))
        case .closes: h.disconnect(old)
        }
        h.settle()

        h.send(new, request)
        completeAllButFirst(h, untilAnswered: new)
        h.send(
            new,
            NBDBytes.request(.write, offset: start + 1 << 20, length: 4096)
                + [UInt8](repeating: 1, count: 4096))
        completeAllButFirst(h, untilAnswered: new)

        h.device.complete()
        h.settle()
        let pieces = h.device.seen.filter { $0.session == session }
        if first == .lives {
            #expect(pieces.count > 1)
            h.run("no answer") {
                h.device.completeAll()
                return h.available(old) == NBDBytes.simple()
            }
        } else {
            #expect(pieces.count == 1)
            h.run("stays") { h.server.connectionCount == 2 }
            #expect(h.device.held.isEmpty)
            if first == .closesItsSide { #expect(h.available(old).isEmpty, "no answer") }
        }
        #expect(h.device.pool.inUse == 0)
    }

    /// Nobody else changed anything: a peer that only closed its side gets all of it done.
    @Test func theRestOfAHalfClosedTrimIsDone() throws {
        let h = try NBDServerHarness()
        let (crowd, old) = (h.join(), h.join(structured: false))
        beginWithOnePiece(
            h, crowd, old, NBDBytes.request(.trim, offset: 1 << 39, length: 256 << 20))
        let session = h.device.held[0].session
        shutdown(old, Int32(SHUT_WR))
        h.settle()
        h.run("no answer") {
            h.device.completeAll()
            return h.available(old) == NBDBytes.simple()
        }
        #expect(h.device.seen.count { $0.session == session } == 256)
    }

    private func flush(_ h: NBDServerHarness, _ end: Int32) {
        h.send(end, NBDBytes.request(.flush))
        h.runUntilHeld(1)
        h.device.complete()
        #expect(h.receive(end, 16) == NBDBytes.simple())
    }

    /// Sends the request on `end` while `crowd` uses up the pieces, so that it gets a single one,
    /// and lets only that be held.
    private func beginWithOnePiece(
        _ h: NBDServerHarness, _ crowd: Int32, _ end: Int32, _ request: [UInt8]
    ) {
        let window = Int(NBDRequests.windowMax)
        let used = NBDSlots.piecesMax * 3 / 4
        for _ in 0..<used / window {
            h.send(crowd, NBDBytes.request(.trim, length: window << 20))
        }
        h.runUntilHeld(used)
        h.send(end, request)
        h.runUntilHeld(used + 1)
        for _ in 0..<used { h.device.complete() }
        h.settle()
        #expect(h.device.held.count == 1)
    }

    private func completeAllButFirst(_ h: NBDServerHarness, untilAnswered end: Int32) {
        h.run("no answer") {
            while h.device.held.count > 1 { h.device.complete(1) }
            return h.available(end) == NBDBytes.simple()
        }
    }
}
