import Testing

@testable import HapteraCore

/// Blocks that are damaged on the last member, and replicas that return to it.
@Suite struct EngineDamageTests {
    private func block(_ value: UInt8) -> [UInt8] { [UInt8](repeating: value, count: 4096) }
    private func isDamaged(_ fake: FakeReplica, _ index: UInt64) -> Bool {
        guard let found = fake.blocks[index] else { return false }
        return found.entry.state == .data && found.entry.checksum != checksum(of: found.data)
    }
    private func rot(_ fake: FakeReplica, _ index: UInt64) {
        guard let entry = fake.blocks[index]?.entry else { return }
        fake.blocks[index] = (entry, block(0xEE))
    }
    /// The first replica is the last member; the second has blocks 0 to 2 of before, and returns.
    private func departed(_ configure: (EngineHarness) -> Void) -> EngineHarness {
        let h = EngineHarness(replicas: 2)
        for fake in h.fakes { fake.verifies = true }
        h.start()
        for index in 0..<3 as Range<UInt64> { h.write(index * 4096, block(UInt8(10 + index))) }
        h.kill(h.fakes[1])
        h.pass(milliseconds: 500)
        configure(h)
        h.connect(h.fakes[1])
        h.pass(milliseconds: 4000)
        return h
    }

    /// Seed 1002680: the one that returned had what the member's entry names, and the volume stayed
    /// as it was, without redundancy and without the block.
    @Test func theReturningReplicaHasIt() {
        let h = departed { h in
            h.write(4096, block(20))
            rot(h.fakes[0], 0)
        }
        #expect(h.stored.inSync.count == 2)
        #expect(h.fakes[1].blocks[1]?.data == block(20))
        let read = h.read(0, 3 * 4096)
        h.pass(milliseconds: 2000)
        #expect(h.reads[read] == block(10) + block(20) + block(12))
        // And the member has it again.
        #expect(h.fakes[0].blocks[0]?.data == block(10))
    }

    /// An older copy is not taken for it: the one that returns shares the damage, and all the rest.
    @Test func anOlderOneIsNotIt() {
        let h = departed { h in
            h.write(0, block(19))
            h.write(4096, block(20))
            rot(h.fakes[0], 0)
        }
        #expect(h.stored.inSync.count == 2)
        #expect(isDamaged(h.fakes[0], 0) && isDamaged(h.fakes[1], 0))
        #expect(h.fakes[1].entry(0).checksum == checksum(of: block(19)))
        #expect(h.fakes[1].blocks[1]?.data == block(20))
        let (bad, good) = (h.read(0, 4096), h.read(4096, 8192))
        h.pass(milliseconds: 2000)
        #expect(h.results[bad] != .ok && h.reads[good] == block(20) + block(12))
        let write = h.write(0, block(21))
        #expect(h.results[write] == .ok && h.fakes.allSatisfy { $0.blocks[0]?.data == block(21) })
    }

    /// One that holds nothing is filled with all but that block.
    @Test func aNewReplicaIsFilled() {
        let h = EngineHarness(replicas: 2, members: 1)
        h.fakes[0].verifies = true
        for index in 0..<4 as Range<UInt64> {
            h.fakes[0].put(index, block(UInt8(10 + index)), in: LayerID(rawValue: 1))
        }
        rot(h.fakes[0], 0)
        h.start()
        h.pass(milliseconds: 4000)
        #expect(h.stored.inSync.count == 2)
        #expect(isDamaged(h.fakes[1], 0) && h.fakes[1].entry(0) == h.fakes[0].entry(0))
        #expect((1..<4).allSatisfy { h.fakes[1].blocks[$0]?.data == block(UInt8(10 + $0)) })
    }

    /// What cannot be read now may be read later: it keeps others out for a while.
    @Test(arguments: [false, true])
    func anUnreadableBlockIsTriedAgain(isHealed: Bool) {
        let h = EngineHarness(replicas: 2, members: 1)
        for index in 0..<2 as Range<UInt64> {
            h.fakes[0].put(index, block(UInt8(10 + index)), in: LayerID(rawValue: 1))
        }
        h.fakes[0].unreadable = [0]
        h.start()
        func pass(_ seconds: Int) {
            for _ in 0..<seconds {
                for fake in h.fakes where h.core.replicas[h.slot(fake)].link == .down {
                    h.connect(fake)
                }
                h.pass(milliseconds: 1000)
            }
        }
        pass(9)
        #expect(h.stored.inSync.count == 1)
        if isHealed { h.fakes[0].unreadable = [] }
        pass(40)
        #expect(h.stored.inSync.count == 2 && isDamaged(h.fakes[1], 0) != isHealed)
        #expect(h.fakes[1].blocks[1]?.data == block(11))
    }

    /// Each member has damage where the other is good: neither can answer for all the blocks.
    @Test func membersAreDamagedInDifferentBlocksOfARead() {
        let h = EngineHarness(replicas: 2)
        for fake in h.fakes { fake.verifies = true }
        h.start()
        for index in 0..<4 as Range<UInt64> { h.write(index * 4096, block(UInt8(10 + index))) }
        rot(h.fakes[0], 0)
        rot(h.fakes[1], 1)
        let read = h.read(0, 2 * 4096)
        h.pass(milliseconds: 2000)
        #expect(h.results[read] == .ok && h.reads[read] == block(10) + block(11))
        #expect(h.fakes.allSatisfy { fake in (0..<4).allSatisfy { !isDamaged(fake, $0) } })
        // What completes a block that is written in part.
        rot(h.fakes[0], 2)
        rot(h.fakes[1], 3)
        let write = h.write(2 * 4096 + 512, block(30))
        h.pass(milliseconds: 2000)
        #expect(h.results[write] == .ok)
        let again = h.read(2 * 4096, 2 * 4096)
        h.pass(milliseconds: 2000)
        #expect(
            h.reads[again] == Array(block(12)[..<512]) + block(30) + Array(block(13)[512...]))
        // Nobody has it: an error, without another repair if it is asked for again.
        for fake in h.fakes { rot(fake, 1) }
        func repairs() -> Int {
            h.notes.count { if case .repaired = $0 { true } else { false } }
        }
        let before = repairs()
        for _ in 0..<3 {
            let lost = h.read(0, 2 * 4096)
            h.pass(milliseconds: 2000)
            #expect(h.results[lost] == .ioError)
        }
        #expect(repairs() == before + 1)
        h.pass(milliseconds: 10_000)
        h.read(0, 2 * 4096)
        h.pass(milliseconds: 2000)
        #expect(repairs() == before + 2)
    }

    /// Another member has it: then nobody shares anything.
    @Test func anotherMemberHasIt() {
        let h = EngineHarness(replicas: 3, members: 2)
        for fake in h.fakes.prefix(2) {
            fake.verifies = true
            fake.put(0, block(10), in: LayerID(rawValue: 1))
        }
        rot(h.fakes[0], 0)
        h.start()
        h.pass(milliseconds: 4000)
        #expect(h.stored.inSync.count == 3 && h.fakes[2].blocks[0]?.data == block(10))
    }

    /// The joiner's copy is as damaged as the first member's, and another member has the block.
    @Test func itsOwnDamageIsRepairedFromAnother() {
        let h = EngineHarness(replicas: 3, members: 2)
        for fake in h.fakes {
            fake.verifies = true
            fake.put(0, block(10), in: LayerID(rawValue: 1))
        }
        rot(h.fakes[0], 0)
        rot(h.fakes[2], 0)
        h.start()
        h.pass(milliseconds: 4000)
        #expect(h.stored.inSync.count == 3 && h.fakes[2].blocks[0]?.data == block(10))
    }

    /// Each member has a damaged block in the region, but not the same one: the joiner gets both
    /// from who has them, and only what nobody has is damaged there, too.
    @Test(arguments: [[1, 2], [2, 1], [1, 200], [200, 1]] as [[UInt64]], [false, true])
    func membersAreDamagedInDifferentBlocks(places: [UInt64], isHeld: Bool) {
        let h = EngineHarness(replicas: 3, members: 2)
        for fake in h.fakes.prefix(2) {
            fake.verifies = true
            for index in [0, 1, 2, 3, 200] as [UInt64] {
                fake.put(index, block(UInt8(10 + index % 100)), in: LayerID(rawValue: 1))
            }
            rot(fake, 3)
        }
        if isHeld { h.fakes[2].put(0, block(5), in: LayerID(rawValue: 1)) }
        for (fake, place) in zip(h.fakes, places) { rot(fake, place) }
        h.start()
        h.pass(milliseconds: 4000)
        #expect(h.stored.inSync.count == 3)
        for index in [0, 1, 2, 200] as [UInt64] {
            let isThere = h.fakes[2].blocks[index]?.data == block(UInt8(10 + index % 100))
            #expect(isThere, "block \(index)")
        }
        #expect(isDamaged(h.fakes[2], 3) && h.fakes[2].entry(3) == h.fakes[0].entry(3))
    }

    /// One of several blocks whose bytes are to be kept cannot be read: the others are kept.
    @Test func oneUnreadableBlockCostsNoOther() {
        let h = EngineHarness(replicas: 1)
        h.stored.isClean = false
        for index in 3..<8 as Range<UInt64> {
            let before = BlockEntry(state: .data, checksum: checksum(of: block(8)))
            h.fakes[0].blocks[index] = (before, block(UInt8(20 + index)))
        }
        h.fakes[0].verifies = true
        h.fakes[0].active = [0]
        h.fakes[0].unreadable = [5]
        h.start()
        h.pass(milliseconds: 4000)
        #expect(h.fakes[0].entry(5).checksum == checksum(of: block(8)))
        for index in [3, 4, 6, 7] as [UInt64] {
            let read = h.read(index * 4096, 4096)
            #expect(h.reads[read] == block(UInt8(20 + index)), "block \(index)")
        }
    }

    /// Seed 1403455: what the disk could not read for a moment is there when it can.
    @Test func whatCannotBeReadForAMomentIsNotLost() {
        let h = EngineHarness(replicas: 1)
        h.stored.isClean = false
        h.fakes[0].put(3, block(9), in: LayerID(rawValue: 1))
        h.fakes[0].verifies = true
        h.fakes[0].active = [0]
        h.fakes[0].unreadable = [3]
        h.start()
        h.pass(milliseconds: 1000)
        #expect(h.core.unresolvedCount == 0)
        h.fakes[0].unreadable = []
        let read = h.read(3 * 4096, 4096)
        #expect(h.reads[read] == block(9))
    }

    /// What could not be kept after a crash is what the entry says: somebody may have that.
    @Test(arguments: [8, 7] as [UInt8])
    func whatTheEntrySaysIsTakenFromWhoHasIt(returning: UInt8) {
        let h = EngineHarness(replicas: 2, members: 1)
        h.stored.isClean = false
        let named = checksum(of: block(8))
        h.fakes[0].blocks[3] = (BlockEntry(state: .data, checksum: named), block(9))
        h.fakes[1].put(3, block(returning), in: LayerID(rawValue: 1))
        for fake in h.fakes { fake.verifies = true }
        h.fakes[0].active = [0]
        h.fakes[0].unreadable = [3]
        h.start()
        for _ in 0..<50 {
            for fake in h.fakes where h.core.replicas[h.slot(fake)].link == .down {
                h.connect(fake)
            }
            h.pass(milliseconds: 1000)
        }
        #expect(h.stored.inSync.count == 2 && h.fakes[1].entry(3).checksum == named)
        let read = h.read(3 * 4096, 4096)
        h.pass(milliseconds: 2000)
        if returning == 8 {
            #expect(h.reads[read] == block(8))
        } else {
            #expect(h.results[read] != .ok)
        }
        let write = h.write(3 * 4096, block(5))
        let again = h.read(3 * 4096, 4096)
        #expect(h.results[write] == .ok && h.reads[again] == block(5))
    }

    /// Two members whose entries differ, and neither has what it says.
    @Test func allSayTheSameOfWhatNobodyCanRead() {
        let h = EngineHarness(replicas: 2)
        h.stored.isClean = false
        for (fake, value) in zip(h.fakes, [8, 7] as [UInt8]) {
            let named = BlockEntry(state: .data, checksum: checksum(of: block(value)))
            fake.blocks[3] = (named, block(9))
            fake.verifies = true
            fake.active = [0]
            fake.unreadable = [3]
        }
        h.start()
        h.pass(milliseconds: 1000)
        #expect(h.core.unresolvedCount == 0)
        #expect(h.fakes[0].entry(3) == h.fakes[1].entry(3))
    }
}
