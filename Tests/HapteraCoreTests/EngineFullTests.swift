import Testing

@testable import HapteraCore

/// A full disk is a state of its own; and writes that an Install overtook.
@Suite struct EngineFullTests {
    private func block(_ byte: UInt8) -> [UInt8] { [UInt8](repeating: byte, count: 4096) }
    private let full: [UInt16: FrameStatus] = [FrameKind.write.rawValue: .noSpace]

    @Test func fullOnEveryMemberHoldsTheWriteAndRemovesNobody() {
        let h = EngineHarness()
        h.start()
        for fake in h.fakes { fake.errors = full }
        let first = h.write(0, block(1))
        let second = h.write(0, block(2))
        h.pass(milliseconds: 60_000)
        #expect(h.results[first] == nil && h.results[second] == nil)
        #expect(h.stored.inSync.count == 3 && h.core.isFullEverywhere)
        for fake in h.fakes { fake.errors = [:] }
        h.pass(milliseconds: 1500)
        // In their order.
        #expect(h.results[first] == .ok && h.results[second] == .ok)
        #expect(h.fakes.allSatisfy { $0.blocks[0]?.data == block(2) })
        #expect(!h.core.isFullEverywhere)
    }

    /// Seed 112354: the region waited for a write that was done and lacked a member, which waited
    /// for the join, which waited for the region.
    @Test func aRegionIsMadeEqualUnderWritesThatOnlyLackMembers() {
        let h = EngineHarness(replicas: 2) { $0.minInSync = 2 }
        h.start()
        h.kill(h.fakes[1])
        h.pass(milliseconds: 1000)
        let withheld = h.write(0, block(1))
        h.fakes[0].errors = full
        let held = h.write(4096, block(2))
        h.fakes[0].errors = [:]
        #expect(h.core.isFullEverywhere && h.results[withheld] == nil)
        h.connect(h.fakes[1])
        h.pass(milliseconds: 4000)
        #expect(h.stored.inSync.count == 2)
        #expect(h.results[withheld] == .ok && h.results[held] == .ok)
    }

    @Test(arguments: [[], .erroredWriteNotResolved] as [MutationSet])
    func aTimeoutEndsTheWaitForSpaceAndTheRegionIsMadeEqual(without rule: MutationSet) {
        let h = EngineHarness()
        h.core.mutations = rule
        h.core.set(ioTimeoutMilliseconds: 2000)
        h.start()
        for fake in h.fakes { fake.errors = full }
        // What the attempt leaves on one of them.
        h.fakes[2].blocks[0] = (BlockEntry(state: .zeroAllocated), [])
        let write = h.write(0, block(1))
        h.pass(milliseconds: 1500)
        #expect(h.results[write] == nil)
        h.pass(milliseconds: 700)
        #expect(h.results[write] == .noSpace && h.stored.inSync.count == 3)
        #expect((h.fakes[2].lowestEntry(0) == h.fakes[0].lowestEntry(0)) == rule.isEmpty)
    }

    /// What is damaged everywhere stays so: only what the write may have left half done is kept.
    @Test(arguments: [false, true])
    func aWriteWithoutSpaceMakesNoDamageGoodBesideIt(isEnded: Bool) {
        let h = EngineHarness(replicas: 1)
        if isEnded { h.core.set(ioTimeoutMilliseconds: 2000) }
        let fake = h.fakes[0]
        fake.verifies = true
        h.start()
        for index in 0..<4 as Range<UInt64> { h.write(index * 4096, block(UInt8(10 + index))) }
        fake.errors = full
        // The write covers the first two; of the first it has left something.
        fake.blocks[0] = (fake.entry(0), block(0xEE))
        fake.blocks[3] = (fake.entry(3), block(0xDD))
        let write = h.write(0, block(20) + block(21))
        h.pass(milliseconds: 1500)
        if isEnded { h.pass(milliseconds: 800) }
        fake.errors = [:]
        h.pass(milliseconds: 1500)
        #expect(h.results[write] == (isEnded ? .noSpace : .ok))
        let first = h.read(0, 3 * 4096)
        let others = isEnded ? block(0xEE) + block(11) : block(20) + block(21)
        #expect(h.reads[first] == others + block(12))
        let lost = h.read(3 * 4096, 4096)
        h.pass(milliseconds: 2000)
        #expect(h.results[lost] == .ioError)
        #expect(fake.entry(3).checksum == checksum(of: block(13)))
        #expect(h.core.unresolvedCount == 0)
    }

    /// Nor beneath it, though the region was about to be repaired in every layer.
    @Test func aWriteWithoutSpaceMakesNoDamageGoodBeneathIt() {
        let h = EngineHarness.layered(members: 1)
        let (fake, lower) = (h.fakes[0], LayerID(rawValue: 1))
        fake.verifies = true
        fake.put(0, block(10), in: lower)
        for other in h.fakes.dropFirst() { other.isUp = false }
        h.start()
        h.core.addUnresolved(0, LayerID(rawValue: 3), 0..<1)
        h.core.suspect(0, lower)
        fake.layers[lower]?[0]?.data = block(0xDD)
        h.pass(milliseconds: 1500)
        #expect(h.core.unresolvedCount == 0)
        #expect(fake.layers[lower]?[0]?.entry.checksum == checksum(of: block(10)))
        h.core.addUnresolved(0, lower, 0..<1)
        h.pass(milliseconds: 1500)
        #expect(fake.layers[lower]?[0]?.entry.checksum == checksum(of: block(0xDD)))
    }

    @Test func fullOnOneMemberRemovesItAndFillsItAgainEverMoreRarely() {
        let h = EngineHarness()
        h.start()
        h.fakes[1].errors = full
        #expect(h.results[h.write(0, block(3))] == .ok)
        #expect(h.stored.out.first?.reason == .full)
        let slot = h.slot(h.fakes[1])
        #expect(h.core.standing(slot) == .full)
        func pass(seconds: Int) {
            for _ in 0..<seconds where h.stored.inSync.count < 3 {
                if h.core.replicas[slot].link == .down { h.connect(h.fakes[1]) }
                h.pass(milliseconds: 1000)
            }
        }
        pass(seconds: 60)
        // After 1, 2, 4, 8, 16 and 32 s: each attempt changes the record once.
        #expect(h.stored.inSync.count == 2 && h.stored.epoch.rawValue <= 10)
        h.fakes[1].errors = [:]
        pass(seconds: 120)
        #expect(h.stored.inSync.count == 3 && h.fakes[1].blocks[0]?.data == block(3))
    }

    /// The replica let the write wait for room in its activity log, and an Install of the same
    /// engine pass it.
    @Test func aWriteRefusedForAnInstallOfOursIsSentAgain() {
        let h = EngineHarness()
        h.start()
        h.fakes[1].isDeaf = true
        let write = h.write(0, block(1))
        h.kill(h.fakes[2])
        // The write, then the Install of the record without the third.
        let waiting = h.fakes[1].unheard
        #expect(waiting.map(\.header.kind) == [.write, .install])
        // A replica's refusal names the epoch it is about to promise.
        h.refuse(h.fakes[1], waiting[0].header, .staleEpoch, epoch: waiting[1].header.epoch)
        #expect(h.fakes[1].unheard.map(\.header.kind) == [.write, .install, .write])
        h.hear(h.fakes[1], from: 1)
        #expect(h.results[write] == .ok && h.stored.inSync.count == 2)
        #expect(h.fakes[1].blocks[0]?.data == block(1))
    }

    /// A write that waits for room needs a stable point, and the repair of its region needs the
    /// write: the point does not wait for the repair.
    @Test func aDamagedRegionDoesNotHoldUpTheStablePoint() {
        let h = EngineHarness(replicas: 2) { $0.removalDeadlineMilliseconds = 60_000 }
        h.start()
        h.write(0, block(1))
        for fake in h.fakes { fake.mute = [FrameKind.write.rawValue] }
        let parked = h.write(4096, block(2))
        h.fakes[0].errors = [FrameKind.read.rawValue: .checksumMismatch]
        h.fakes[1].errors = [:]
        for _ in 0..<4 { h.read(0, 4096) }
        #expect(h.core.unresolvedCount == 1 && h.results[parked] == nil)
        let before = h.core.stablePoint
        h.pass(milliseconds: 6000)
        #expect(h.core.stablePoint > before)
        h.fakes[0].errors = [:]
        for fake in h.fakes { fake.mute = [] }
        for fake in h.fakes { h.answerMuted(fake) }
        #expect(h.results[parked] == .ok && h.core.unresolvedCount == 0)
    }

    /// What a flush passed by at a member stays out of the stable point it leads to.
    @Test func aWriteThatAFlushPassedByIsLeftOutOfTheStablePoint() {
        for mutation in [[], .passedWritesNotLeftOut] as [MutationSet] {
            let h = EngineHarness(replicas: 2) { $0.removalDeadlineMilliseconds = 60_000 }
            h.core.mutations = mutation
            h.start()
            for fake in h.fakes {
                fake.mute = [FrameKind.write.rawValue, FrameKind.flush.rawValue]
            }
            let write = h.write(1 << 20, block(1))
            let flush = h.submit(.flush)
            for fake in h.fakes { fake.seen = [] }
            // The second parks the write, and comes to it before it answers the flush.
            for index in h.fakes[1].muted.indices where h.fakes[1].muted[index].kind == .write {
                h.fakes[1].muted[index].auxiliary = MutationReply.wasParked
            }
            for fake in h.fakes { h.answerMuted(fake) }
            #expect(h.results[write] == .ok && h.results[flush] == .ok)
            #expect(h.fakes[0].leftOut == (mutation.isEmpty ? [1] : []))
            guard mutation.isEmpty else { continue }
            // Nothing else is asked of the volume, and it becomes stable (seed 1403677).
            for fake in h.fakes { fake.mute = [] }
            let stable = h.core.stablePoint
            h.pass(milliseconds: h.core.configuration.flushIntervalMilliseconds + 500)
            #expect(h.core.stablePoint > stable)
        }
    }

    /// So does what a member had no space for: it answers the flush behind it, but the record names
    /// it until the store is there again (seed 5604269).
    @Test func aWriteThatAFullMemberLacksIsLeftOutOfTheStablePoint() {
        for mutation in [[], .passedWritesNotLeftOut] as [MutationSet] {
            let h = EngineHarness()
            h.core.mutations = mutation
            h.start()
            h.isStoreDown = true
            h.fakes[2].errors = full
            h.fakes[1].mute = [FrameKind.write.rawValue, FrameKind.flush.rawValue]
            let write = h.write(1 << 20, block(1))
            let flush = h.submit(.flush)
            h.answerMuted(h.fakes[1])
            #expect(h.results[write] == nil && h.results[flush] == .ok)
            #expect(h.fakes[0].leftOut == (mutation.isEmpty ? [1] : []))
        }
    }
}
