import Testing

@testable import HapteraCore

private let one = LayerID(rawValue: 1)

extension EngineHarness {
    fileprivate func take(
        _ token: UInt64, _ name: String, hold: UInt64, milliseconds: UInt64 = 1000
    ) {
        run(
            .takeSnapshot(
                token: token, name: name, created: 1,
                hold: SnapshotHold(token: hold, milliseconds: milliseconds)))
    }
    fileprivate func release(_ token: UInt64 = 77) -> Bool? {
        run(.release(token: token))
        return released[token]
    }
}

/// Rule S, groups: between a freeze and its release nothing behind the freeze is acknowledged.
@Suite struct EngineHoldTests {
    private func block(_ byte: UInt8) -> [UInt8] { [UInt8](repeating: byte, count: 4096) }

    private func started() -> EngineHarness {
        let h = EngineHarness()
        h.start()
        h.write(0, block(1))
        return h
    }

    /// They are done meanwhile, and nobody can see them before.
    @Test func answersToChangesBehindTheFreezeWait() {
        let h = started()
        h.take(5, "a", hold: 77)
        #expect(h.snapshots[5]?.result == .ok)
        let write = h.write(0, block(2))
        let trim = h.submit(.trim, 8192, 4096)
        let zeroes = h.submit(.writeZeroes, 16384, 4096)
        let flush = h.submit(.flush)
        #expect(h.reads[h.read(4096, 4096)] != nil && h.results[flush] == .ok)
        let read = h.read(0, 4096)
        let changes = [write, trim, zeroes]
        #expect(changes.allSatisfy { h.results[$0] == nil } && h.results[read] == nil)
        #expect(h.fakes.allSatisfy { $0.layers[LayerID(rawValue: 2)]?[0]?.data == block(2) })
        #expect(h.release() == true)
        #expect(changes.allSatisfy { h.results[$0] == .ok } && h.reads[read] == block(2))
        #expect(h.fakes.allSatisfy { $0.layers[one]?[0]?.data == block(1) })
        #expect(h.release() == false, "there is none any more")
        #expect(h.results[h.write(0, block(3))] == .ok)
    }

    /// The store's answer is no part of the pause.
    @Test func beforeTheFreezeEverythingGoesOn() {
        let h = started()
        h.isStoreDown = true
        h.take(5, "a", hold: 77)
        #expect(h.results[h.write(0, block(2))] == .ok && h.snapshots[5] == nil)
        h.isStoreDown = false
        h.pass(milliseconds: 300)
        #expect(h.snapshots[5]?.result == .ok)
        #expect(h.results[h.write(0, block(3))] == nil)
        #expect(h.release() == true)
        #expect(h.fakes.allSatisfy { $0.layers[one]?[0]?.data == block(2) })
    }

    /// What was sent before the freeze is in the snapshot, and answered. What had only begun, with
    /// a read of the rest of its block, is neither.
    @Test func whatIsOnTheWayAtTheFreeze() {
        let h = started()
        h.fakes[1].mute = [FrameKind.write.rawValue]
        let sent = h.write(0, block(2))
        for fake in h.fakes { fake.delayMilliseconds = 50 }
        let begun = h.write(4096, [9])
        h.take(5, "a", hold: 77)
        #expect(h.snapshots[5]?.result == .ok && h.results[sent] == nil)
        h.fakes[1].mute = []
        h.answerMuted(h.fakes[1])
        h.pass(milliseconds: 300)
        #expect(h.results[sent] == .ok && h.results[begun] == nil)
        #expect(h.fakes.allSatisfy { $0.layers[one]?[0]?.data == block(2) })
        #expect(h.fakes.allSatisfy { $0.layers[one]?[1] == nil })
        #expect(h.release() == true && h.results[begun] == .ok)
    }

    /// Its requester may release the others: what is frozen need not be durable yet.
    @Test func aSnapshotWithAHoldIsAnsweredWhenTheHeadIsFrozen() {
        let h = started()
        h.fakes[2].mute = [FrameKind.flush.rawValue]
        h.take(5, "a", hold: 77)
        #expect(h.snapshots[5]?.result == .ok && h.stored.snapshots.map(\.name) == ["a"])
        #expect(h.release() == true)
        h.run(.takeSnapshot(token: 6, name: "a", created: 1))
        #expect(h.snapshots[6] == nil)
        h.fakes[2].mute = []
        h.answerMuted(h.fakes[2])
        h.pass(milliseconds: 100)
        #expect(h.snapshots[6]?.result == .exists && h.snapshots.count == 2)
    }

    @Test func aHoldEndsByItselfAndSaysSo() {
        let h = started()
        h.take(5, "a", hold: 77, milliseconds: 200)
        let write = h.write(0, block(2))
        h.pass(milliseconds: 100)
        #expect(h.results[write] == nil)
        h.pass(milliseconds: 200)
        #expect(h.results[write] == .ok && h.release() == false)
        // One that waits for another request until it is over is not taken.
        h.fakes[2].mute = [FrameKind.flush.rawValue]
        h.run(.takeSnapshot(token: 6, name: "b", created: 1))
        h.take(7, "c", hold: 78, milliseconds: 200)
        h.pass(milliseconds: 300)
        h.fakes[2].mute = []
        h.answerMuted(h.fakes[2])
        h.pass(milliseconds: 100)
        #expect(h.snapshots[6]?.result == .ok && h.snapshots[7]?.result == .notHeld)
        #expect(h.stored.snapshots.map(\.name) == ["a", "b"] && h.release(78) == false)
    }

    /// The change of the record may come after the end of the hold: then the release tells.
    @Test func aHoldThatEndsWhileTheRecordChangesIsTold() {
        let h = started()
        h.isStoreDown = true
        h.take(5, "a", hold: 77, milliseconds: 200)
        h.pass(milliseconds: 300)
        h.isStoreDown = false
        h.pass(milliseconds: 300)
        #expect(h.snapshots[5]?.result == .ok)
        #expect(h.results[h.write(0, block(2))] == .ok && h.release() == false)
    }

    @Test func onlyOneAtATime() {
        let h = started()
        h.take(5, "a", hold: 77)
        h.take(6, "b", hold: 78)
        #expect(h.snapshots[6]?.result == .busy && h.stored.snapshots.map(\.name) == ["a"])
        #expect(h.release(78) == false && h.release(77) == true)
        // One that is there was frozen at another time.
        h.take(7, "a", hold: 79)
        #expect(h.snapshots[7]?.result == .exists && h.release(79) == false)
        h.take(8, "b", hold: 80)
        #expect(h.snapshots[8]?.result == .ok)
        h.stored.epoch = Epoch(99)
        h.run(.takeSnapshot(token: 9, name: "c", created: 1))
        h.pass(milliseconds: 100)
        #expect(h.core.phase == .stopped)
        h.take(10, "d", hold: 81)
        #expect(h.snapshots[10]?.result == .notServing && h.release(80) == false)
    }

    /// A member that is lost meanwhile neither ends the hold nor prolongs it.
    @Test func aMemberThatIsLostChangesNothing() {
        let h = started()
        h.take(5, "a", hold: 77)
        let write = h.write(0, block(2))
        h.kill(h.fakes[1])
        h.pass(milliseconds: 100)
        #expect(h.stored.inSync.count == 2 && h.results[write] == nil)
        let later = h.write(4096, block(3))
        #expect(h.results[later] == nil)
        #expect(h.release() == true && h.results[write] == .ok && h.results[later] == .ok)
    }

    /// Two volumes and a client that writes to one when the other has answered: whatever order
    /// things come in, no group has the second without the first.
    @Test(arguments: 0..<12)
    func aGroupHasNoEffectWithoutItsCause(order: Int) {
        let volumes = [started(), started()]
        var acknowledged: [Int] = [0, 0]
        var sent: [(volume: Int, id: UInt64)] = []
        func work() {
            for volume in 0..<2 {
                if let last = sent.last, volumes[last.volume].results[last.id] == nil { return }
                if let last = sent.last { acknowledged[last.volume] += 1 }
                let next = (sent.last?.volume ?? 1) ^ 1
                let id = volumes[next].write(
                    UInt64(4096 * (1 + sent.count)), block(UInt8(sent.count + 10)))
                sent.append((next, id))
                _ = volume
            }
        }
        for _ in 0..<order { work() }
        let frozen = Array(volumes.enumerated())
        for (index, h) in order % 2 == 0 ? frozen : frozen.reversed() {
            h.take(UInt64(10 + index), "group", hold: 77)
            work()
        }
        for h in volumes {
            #expect(h.release() == true)
            work()
        }
        let held = volumes.map { h in
            h.fakes[0].layers[one, default: [:]].keys.filter { $0 > 0 }.map { Int($0) }
        }
        let all = (held[0] + held[1]).sorted()
        #expect(all == Array(1..<all.count + 1), "\(held): each needs those before it")
        #expect(sent.count > all.count)
    }
}
