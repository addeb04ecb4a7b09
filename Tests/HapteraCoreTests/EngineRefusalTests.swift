import Testing

@testable import HapteraCore

/// The metadata store answers that a record must not follow the one that stands. That once counted
/// as no answer: the engine repeated the proposal for ever, changed the record no more, and at the
/// next loss of a member its clients waited for ever.
@Suite struct EngineRefusalTests {
    private let one = [UInt8](repeating: 1, count: 4096)

    /// Whatever was said about a joiner, the members are served and lose who is lost.
    @Test func aRefusedJoinerIsDropped() {
        let h = EngineHarness(members: 2)
        h.refuses = { $0.change == .join }
        h.start()
        h.pass(milliseconds: 1000)
        #expect(h.core.phase == .serving && h.core.joiner == nil && h.stored.joining == nil)
        h.kill(h.fakes[1])
        let id = h.write(0, one)
        h.pass(milliseconds: 1000)
        #expect(h.results[id] == .ok)
        #expect(h.stored.inSync == [h.fakes[0].member])
        h.refuses = { _ in false }
        for _ in 0..<20 {
            for fake in h.fakes where h.core.replicas[h.slot(fake)].link == .down {
                h.connect(fake)
            }
            h.pass(milliseconds: 1000)
        }
        #expect(h.stored.inSync.count == 3, "it is tried again")
    }

    /// What else is refused it cannot do without: another engine begins with what stands.
    @Test(arguments: [VolumeRecord.Change.takeover, .removal, .promotion, .detach, .snapshot])
    func anyOtherRefusalEndsTheEngine(change: VolumeRecord.Change) {
        let h = EngineHarness(members: 2)
        h.refuses = { $0.change == change }
        h.start()
        h.pass(milliseconds: 2000)
        var id: UInt64?
        switch change {
        case .removal:
            h.fakes[1].mute = [FrameKind.write.rawValue]
            id = h.write(0, one)
            h.kill(h.fakes[1])
        case .detach: h.run(.detach)
        case .snapshot: h.run(.takeSnapshot(token: 1, name: "a", created: 1))
        default: break
        }
        h.pass(milliseconds: 1000)
        #expect(h.core.stopReason == .refused)
        #expect(h.stored.change != change && h.stored.inSync.count >= 2)
        #expect(id.map { h.results[$0] == .shuttingDown } ?? true)
        #expect(h.core.stopText.hasSuffix("\(change): as the test wants"))
        #expect(StopReason.standing(in: h.core.stopText, against: h.stored) == nil)
    }

    /// Its first copy was taken, and only the answer was lost: the record says so.
    @Test func aRefusedRepetitionMayStandAlready() {
        let h = EngineHarness(members: 3)
        h.start()
        h.losesStoreReplies = true
        h.kill(h.fakes[1])
        let id = h.write(0, one)
        #expect(h.results[id] == nil && h.stored.inSync.count == 2)
        h.losesStoreReplies = false
        h.refuses = { _ in true }
        h.pass(milliseconds: 1000)
        #expect(h.core.phase == .serving && h.core.epoch == h.stored.epoch)
        #expect(h.results[id] == .ok)
    }

    @Test func aRefusedRepetitionOfARemovalEndsTheEngine() {
        let h = EngineHarness(members: 3)
        h.start()
        h.isStoreDown = true
        h.kill(h.fakes[1])
        let id = h.write(0, one)
        h.pass(milliseconds: 500)
        #expect(h.core.phase == .serving && h.results[id] == nil)
        h.isStoreDown = false
        h.refuses = { _ in true }
        h.pass(milliseconds: 500)
        #expect(h.core.stopReason == .refused && h.results[id] == .shuttingDown)
    }

    /// A joiner given up while its proposal was in doubt: that may land yet. What counts is who the
    /// members are, and both records say the same; the next change meets the other record.
    @Test(arguments: [false, true]) func aRefusedRepetitionOfAJoinIsGivenUp(landsLate: Bool) {
        let h = EngineHarness(members: 2)
        h.fakes[2].isUp = false
        h.start()
        h.pass(milliseconds: 500)
        h.isStoreDown = true
        h.connect(h.fakes[2])
        h.pass(milliseconds: 300)
        let late = h.core.proposedRecord
        #expect(late.change == .join && h.core.joiner != nil)
        h.isStoreDown = false
        h.refuses = { $0.change == .join }
        h.pass(milliseconds: 500)
        #expect(h.core.phase == .serving && h.core.joiner == nil)
        if landsLate { h.stored = late }
        h.kill(h.fakes[1])
        let id = h.write(0, one)
        h.pass(milliseconds: 500)
        if landsLate {
            #expect(h.core.stopReason == .fenced && h.results[id] == .shuttingDown)
            #expect(h.stored == late)
        } else {
            #expect(h.results[id] == .ok && h.stored.inSync == [h.fakes[0].member])
        }
    }
}
