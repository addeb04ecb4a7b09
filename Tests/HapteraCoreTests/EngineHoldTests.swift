import Testing

@testable import HapteraCore

private let one = LayerID(rawValue: 1)

extension EngineHarness {
    fileprivate func hold(_ request: UInt64, token: UInt64 = 77, milliseconds: UInt64 = 1000) {
        run(.hold(request: request, token: token, milliseconds: milliseconds))
    }
    fileprivate func take(_ token: UInt64, _ name: String, hold: UInt64) {
        run(.takeSnapshot(token: token, name: name, created: 1, hold: hold))
    }
    fileprivate func release(_ token: UInt64 = 77) -> Bool? {
        run(.release(token: token))
        return released[token]
    }
}

/// Rule S, groups: between a hold and its release no change is acknowledged.
@Suite struct EngineHoldTests {
    private func block(_ byte: UInt8) -> [UInt8] { [UInt8](repeating: byte, count: 4096) }

    private func started() -> EngineHarness {
        let h = EngineHarness()
        h.start()
        h.write(0, block(1))
        return h
    }

    @Test func changesWaitAndReadsGoOn() {
        let h = started()
        h.hold(1)
        #expect(h.holds[1] == .ok)
        let write = h.write(0, block(2))
        let trim = h.submit(.trim, 8192, 4096)
        let flush = h.submit(.flush)
        #expect(h.reads[h.read(4096, 4096)] != nil && h.results[flush] == .ok)
        #expect(h.results[write] == nil && h.results[trim] == nil)
        #expect(h.release() == true)
        #expect(h.results[write] == .ok && h.results[trim] == .ok)
        #expect(h.release() == false, "there is none any more")
    }

    @Test func whatIsOnTheWayEndsFirst() {
        let h = started()
        h.fakes[1].mute = [FrameKind.write.rawValue]
        let write = h.write(0, block(2))
        h.hold(1)
        #expect(h.holds[1] == nil && h.results[write] == nil)
        h.take(5, "early", hold: 77)
        #expect(h.snapshots[5]?.result == .notHeld, "not before it is answered")
        h.fakes[1].mute = []
        h.answerMuted(h.fakes[1])
        #expect(h.results[write] == .ok && h.holds[1] == .ok)
        h.take(6, "a", hold: 77)
        #expect(h.snapshots[6]?.result == .ok)
        #expect(h.fakes.allSatisfy { $0.layers[one]?[0]?.data == block(2) })
    }

    /// Its requester may release the others: what is frozen need not be durable yet.
    @Test func aSnapshotUnderAHoldIsAnsweredWhenTheHeadIsFrozen() {
        let h = started()
        h.hold(1)
        h.fakes[2].mute = [FrameKind.flush.rawValue]
        h.take(5, "a", hold: 77)
        #expect(h.snapshots[5]?.result == .ok && h.stored.snapshots.map(\.name) == ["a"])
        let write = h.write(0, block(2))
        #expect(h.results[write] == nil, "held until it is released")
        #expect(h.release() == true && h.results[write] == .ok)
        #expect(h.fakes[0].layers[one]?[0]?.data == block(1))
        h.run(.takeSnapshot(token: 6, name: "a", created: 1))
        #expect(h.snapshots[6] == nil)
        h.fakes[2].mute = []
        h.answerMuted(h.fakes[2])
        h.pass(milliseconds: 100)
        #expect(h.snapshots[6]?.result == .exists && h.snapshots.count == 2)
    }

    @Test func aHoldEndsByItselfAndSaysSo() {
        let h = started()
        h.hold(1, milliseconds: 200)
        let write = h.write(0, block(2))
        h.pass(milliseconds: 300)
        #expect(h.results[write] == .ok)
        h.take(5, "a", hold: 77)
        #expect(h.snapshots[5]?.result == .notHeld && h.stored.snapshots == [])
        #expect(h.release() == false)
        // One whose changes never end.
        h.fakes[1].mute = [FrameKind.write.rawValue]
        h.write(0, block(3))
        h.hold(2, milliseconds: 200)
        h.pass(milliseconds: 300)
        #expect(h.holds[2] == .expired)
    }

    /// The change of the record may come after the end of the hold: then the release tells.
    @Test func aHoldThatEndsWhileTheRecordChangesIsTold() {
        let h = started()
        h.hold(1, milliseconds: 200)
        h.isStoreDown = true
        h.take(5, "a", hold: 77)
        h.pass(milliseconds: 300)
        h.isStoreDown = false
        h.pass(milliseconds: 300)
        #expect(h.snapshots[5]?.result == .ok && h.release() == false)
    }

    @Test func onlyOneAtATime() {
        let h = started()
        h.hold(1)
        h.hold(2, token: 78)
        #expect(h.holds[2] == .busy)
        h.take(5, "a", hold: 78)
        #expect(h.snapshots[5]?.result == .notHeld)
        #expect(h.release(78) == false && h.release(77) == true)
        h.hold(3, token: 78)
        #expect(h.holds[3] == .ok)
        h.stored.epoch = Epoch(99)
        h.run(.takeSnapshot(token: 6, name: "b", created: 1))
        #expect(h.core.phase == .stopped)
        h.hold(4)
        #expect(h.holds[4] == .notServing && h.release(78) == false)
    }

    /// Two volumes and a client that writes to one when the other has answered: whatever order
    /// things come in, no group has the second without the first.
    @Test(arguments: 0..<6)
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
        for (index, h) in volumes.enumerated() {
            h.hold(UInt64(index))
            work()
        }
        for (index, h) in volumes.enumerated().reversed() {
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
