import Testing

@testable import HapteraCore

/// What changes while something else is under way.
@Suite struct EngineMeanwhileTests {
    private func block(_ byte: UInt8) -> [UInt8] { [UInt8](repeating: byte, count: 4096) }
    private let full: [UInt16: FrameStatus] = [FrameKind.write.rawValue: .noSpace]
    private let change = FrameKind.setState.rawValue
    private let flush = FrameKind.flush.rawValue

    /// Clients wait for the revert, and the revert for there to be space: so does the write that
    /// would find it, and is a client's.
    @Test func aRevertOfAFullVolumeEndsWhenThereIsSpace() {
        let h = EngineHarness()
        h.start()
        h.write(0, block(1))
        h.run(.takeSnapshot(token: 1, name: "a", created: 7))
        for fake in h.fakes { fake.errors = full }
        let held = h.write(0, block(2))
        #expect(h.core.isFullEverywhere && h.results[held] == nil)
        h.run(.revert(token: 2, target: "a", kept: "kept", created: 9))
        let read = h.read(4096, 4096)
        for fake in h.fakes { fake.errors = [:] }
        h.pass(milliseconds: 5000)
        #expect(h.results[held] == .ok && h.snapshots[2]?.result == .ok)
        #expect(h.results[read] == .ok)
    }

    /// A change that ends with an error, of which a client is told or nobody any more, is on all
    /// members like any other: a flush sent before does not cover it.
    private func failChange(_ h: EngineHarness, isCancelled: Bool) -> UInt64 {
        h.fakes[1].mute.insert(change)
        let zeroes = h.submit(.writeZeroes, 0, 4096, session: 7)
        if isCancelled { h.run(.cancel(session: 7)) } else { h.pass(milliseconds: 1200) }
        return zeroes
    }
    private func ended(_ timeout: Bool) -> (inout EngineConfiguration) -> Void {
        { $0.ioTimeoutMilliseconds = timeout ? 1000 : 0 }
    }

    @Test(arguments: [true, false])
    func aVolumeIsNotCleanBeforeAFailedChangeIsFlushed(isCancelled: Bool) throws {
        let h = EngineHarness(replicas: 2, configure: ended(!isCancelled))
        h.start()
        h.write(0, block(1))
        for fake in h.fakes { fake.mute = [flush] }
        h.run(.detach)
        #expect(h.fakes.allSatisfy { $0.seen.last == .flush })
        let zeroes = failChange(h, isCancelled: isCancelled)
        for fake in h.fakes { fake.mute = [] }
        h.answerMuted(h.fakes[1])
        #expect(h.results[zeroes] == .ioError)
        h.answerMuted(h.fakes[0])
        h.pass(milliseconds: 500)
        #expect(h.stored.isClean)
        for fake in h.fakes {
            let changed = try #require(fake.seen.lastIndex(of: .setState))
            let flushed = try #require(fake.seen.lastIndex(of: .flush))
            #expect(changed < flushed)
        }
    }

    /// It has been read, and is lost if only rebooted members are gone on with.
    @Test(arguments: [true, false])
    func aFailedChangeIsNotLostUnasked(isCancelled: Bool) {
        let h = EngineHarness(replicas: 2, configure: ended(!isCancelled))
        h.start()
        h.write(0, block(1))
        h.submit(.flush)
        #expect(h.core.isEverythingStable)
        _ = failChange(h, isCancelled: isCancelled)
        h.fakes[1].mute = []
        h.answerMuted(h.fakes[1])
        #expect(h.reads[h.read(0, 4096)] == block(0))
        for fake in h.fakes {
            h.kill(fake)
            fake.put(0, block(1), in: fake.head)
            fake.isRebooted = true
            fake.process = 8
        }
        for fake in h.fakes { h.connect(fake) }
        h.pass(milliseconds: 5000)
        #expect(h.core.isRefusing)
    }

    /// The slot of a joiner that the record may name by now is not free.
    @Test func aReplicaReplacedWhileItIsPromotedIsRemoved() {
        let h = EngineHarness(replicas: 2, members: 1)
        h.fakes[1].mute = [flush]
        h.start()
        h.pass(milliseconds: 500)
        #expect(h.core.joinStage == .flushing)
        h.isStoreDown = true
        h.fakes[1].mute = []
        h.answerMuted(h.fakes[1])
        #expect(h.core.joinStage == .promoting)
        h.kill(h.fakes[1])
        let new = ReplicaID(rawValue: 77)
        h.run(.configure([h.fakes[0].member.replica, new]))
        h.isStoreDown = false
        let write = h.write(0, block(1))
        h.pass(milliseconds: 5000)
        #expect(h.results[write] == .ok)
        #expect(h.stored.inSync == [h.fakes[0].member])
    }

    /// Reads that were there before it end first; those after it do not keep it waiting.
    @Test func aSnapshotThatIsReadAllTheTimeIsDeleted() {
        let h = EngineHarness.layered()
        h.start()
        for fake in h.fakes { fake.delayMilliseconds = 200 }
        let layer = LayerID(rawValue: 1)
        let before = h.read(0, 4096, layer: layer)
        h.run(.deleteSnapshot(token: 1, name: "a"))
        for _ in 0..<100 {
            h.read(0, 4096, layer: layer)
            h.pass(milliseconds: 100)
        }
        #expect(h.results[before] == .ok && h.deletions[1] == .ok)
    }

    /// What it promised on the connection before is nothing it may be asked for on the next.
    @Test func aJoinerGivenUpIsNotDisconnectedWhenItReturns() {
        let h = EngineHarness(replicas: 3, members: 2)
        h.fakes[2].mute = [FrameKind.regionMap.rawValue]
        h.start()
        h.pass(milliseconds: 500)
        #expect(h.core.joinStage == .mapping)
        for fake in h.fakes.prefix(2) { fake.errors = full }
        h.write(0, block(2))
        #expect(h.core.joiner == nil && h.core.isFullEverywhere)
        h.connect(h.fakes[2])
        h.pass(milliseconds: 800)
        #expect(h.core.replicas[h.slot(h.fakes[2])].link == .greeted)
    }
}
