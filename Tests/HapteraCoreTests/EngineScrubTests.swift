import Testing

@testable import HapteraCore

/// Scrub: what is bad is found on every member and in every layer, and repaired from a good copy.
@Suite struct EngineScrubTests {
    private func block(_ value: UInt8, count: Int = 4096) -> [UInt8] {
        [UInt8](repeating: value, count: count)
    }
    private let lowest = LayerID(rawValue: 1)
    private let middle = LayerID(rawValue: 2)

    /// A block in each of three regions, and one in a frozen layer.
    private func filled(members: Int = 3) -> EngineHarness {
        let h = EngineHarness.layered(members: members)
        for fake in h.fakes.dropFirst(members) { fake.isUp = false }
        h.run(.configure(h.fakes.prefix(members).map(\.member.replica)))
        h.start()
        for region in 0..<3 as Range<UInt64> { h.write(region << 20, block(UInt8(region) + 1)) }
        for fake in h.fakes.prefix(members) { fake.put(300, block(9), in: lowest) }
        h.pass(milliseconds: 6000)
        return h
    }
    private func rot(_ fake: FakeReplica, _ index: UInt64, _ layer: LayerID? = nil) {
        fake.layers[layer ?? fake.head]?[index]?.data = block(77)
    }

    @Test(arguments: [false, true])
    func findsAndRepairsOnEveryMemberAndLayer(isByLayer: Bool) {
        let h = filled()
        for fake in h.fakes { fake.verifiesByLayer = isByLayer }
        rot(h.fakes[0], 0)
        rot(h.fakes[2], 512)
        rot(h.fakes[1], 300, lowest)
        rot(h.fakes[2], 300, lowest)
        h.scrub()
        h.pass(milliseconds: 1000)
        #expect(h.isScrubbed && h.damaged == 0)
        #expect(h.fakes.allSatisfy { $0.layers[lowest]?[300]?.data == block(9) })
        #expect(h.found.bad == 3 && h.found.repaired == 3 && h.found.lost == 0)
        #expect(h.found.checked == 12 && h.found.region == 4)
        let reported = h.notes.compactMap { note in
            if case .scrubFound(let slot, let offset, 1) = note {
                [UInt64(slot), offset]
            } else {
                nil
            }
        }
        #expect(
            Set(reported) == [
                [UInt64(h.slot(h.fakes[0])), 0], [UInt64(h.slot(h.fakes[2])), 512 << 12],
                [UInt64(h.slot(h.fakes[1])), 300 << 12], [UInt64(h.slot(h.fakes[2])), 300 << 12],
            ])
    }

    /// In the lowest layer both read zero (seed 401521: two members, nobody to decide, and a block
    /// called lost that nobody had ever written). Above it they do not.
    @Test func aTrimWhereNothingWasIsNoDamage() {
        let h = filled(members: 2)
        h.fakes[0].layers[lowest]?[310] = (BlockEntry(state: .zero), [])
        h.scrub()
        h.pass(milliseconds: 1000)
        #expect(h.isScrubbed && h.found.bad == 0 && h.found.lost == 0)
        h.fakes[0].layers[middle]?[310] = (BlockEntry(state: .zero), [])
        h.scrub(id: 2)
        h.pass(milliseconds: 1000)
        #expect(h.isScrubbed && h.found.bad == 1 && h.found.lost == 1)
    }

    /// What one found is not counted by the next, which begins while it is being rewritten (seed
    /// 625163).
    @Test func theNextOneCountsOnlyWhatItFinds() {
        let h = filled()
        rot(h.fakes[0], 0)
        h.fakes[0].mute = [FrameKind.write.rawValue]
        h.scrub()
        h.pass(milliseconds: 200)
        #expect(!h.isScrubbed && !h.fakes[0].muted.isEmpty)
        h.scrub(id: 2)
        h.fakes[0].mute = []
        h.answerMuted(h.fakes[0])
        h.pass(milliseconds: 1000)
        #expect(h.isScrubbed && h.damaged == 0)
        #expect(h.found.id == 2 && h.found.bad == 0 && h.found.repaired == 0)
    }

    /// Without its rules it finds nothing, or spreads what is bad.
    @Test(arguments: [.scrubBelieves, .scrubTrustsFirst] as [MutationSet])
    func withoutItsRulesDamageStays(mutation: MutationSet) {
        let h = filled()
        h.core.mutations = mutation
        rot(h.fakes[0], 0)
        h.scrub()
        h.pass(milliseconds: 1000)
        #expect(h.isScrubbed)
        #expect(h.fakes.contains { $0.blocks[0]?.data != block(1) })
    }

    /// Intact copies cost no lock, and nothing is read that no member holds.
    @Test func whatIsGoodIsNotCompared() {
        let h = filled()
        for fake in h.fakes { fake.seen = [] }
        h.scrub()
        h.pass(milliseconds: 1000)
        #expect(h.isScrubbed && h.found.bad == 0)
        for fake in h.fakes {
            #expect(!fake.seen.contains(.digest))
            #expect(fake.seen.count { $0 == .verify } == 3, "the fourth region is empty")
        }
    }

    /// What nobody has is left as it is, and said to be lost.
    @Test func whatNobodyHasIsNotInvented() {
        let h = filled()
        for (value, fake) in h.fakes.enumerated() {
            fake.blocks[0]?.data = block(UInt8(value) + 60)
        }
        h.scrub()
        h.pass(milliseconds: 1000)
        #expect(h.isScrubbed && h.found.lost == 1 && h.found.repaired == 0)
        #expect(h.fakes.enumerated().allSatisfy { $1.blocks[0]?.data == block(UInt8($0) + 60) })
        let isTold = h.notes.contains { note in
            if case .scrubLost(offset: 0, blocks: 1) = note { true } else { false }
        }
        #expect(isTold)
        #expect(h.results[h.read(0, 4096)] == .ioError)
    }

    /// A write that a disk lost together with its entry: the others know better. Two that differ
    /// say nothing about which is right.
    @Test func intactCopiesThatDifferAreDecidedByTheMost() {
        for members in [2, 3] {
            let h = filled(members: members)
            h.fakes[0].put(0, block(50), in: h.fakes[0].head)
            h.scrub()
            h.pass(milliseconds: 1000)
            #expect(h.isScrubbed && h.found.bad == 1)
            #expect(h.found.lost == (members == 2 ? 1 : 0))
            let expected = members == 2 ? block(50) : block(1)
            #expect(h.fakes[0].blocks[0]?.data == expected)
            #expect(h.fakes[1].blocks[0]?.data == block(1))
        }
    }

    /// What differs because a write is on its way is no damage: it is looked at again when the
    /// write is everywhere.
    @Test func aWriteOnItsWayIsNoDamage() {
        let h = filled()
        // The last one neither applies the write nor answers it yet, but verifies what it holds.
        h.fakes[2].isDeaf = true
        let write = h.write(0, block(40))
        let held = h.fakes[2].unheard
        h.fakes[2].unheard = []
        h.fakes[2].isDeaf = false
        for fake in h.fakes { fake.seen = [] }
        h.scrub()
        h.pass(milliseconds: 500)
        #expect(!h.isScrubbed && h.found.bad == 0)
        #expect(!h.fakes[0].seen.contains(.digest), "not while the write has the lock")
        h.fakes[2].unheard = held
        h.hear(h.fakes[2], from: 0)
        h.pass(milliseconds: 1000)
        #expect(h.results[write] == .ok && h.isScrubbed && h.found.bad == 0)
        #expect(h.fakes[0].seen.count { $0 == .digest } == 3, "each of its layers")
        #expect(h.fakes.allSatisfy { $0.blocks[0]?.data == block(40) })
    }

    /// The rest is left to the next engine.
    @Test func goesOnWhereItWas() {
        let h = filled()
        rot(h.fakes[0], 0)
        rot(h.fakes[0], 512)
        for fake in h.fakes { fake.seen = [] }
        var progress = ScrubProgress()
        progress.id = 5
        progress.region = 1
        progress.bad = 7
        #expect(ScrubProgress(text: progress.text) == progress)
        h.run(.scrub(progress))
        h.pass(milliseconds: 1000)
        #expect(h.isScrubbed && h.found.bad == 8 && h.damaged == 1)
        // One that has ended begins again.
        progress.id = 6
        h.run(.scrub(progress))
        h.pass(milliseconds: 1000)
        #expect(h.isScrubbed && h.found.id == 6 && h.found.bad == 7)
    }

    /// Another engine's blocks are not this one's speed, and what cannot have been counted is no
    /// progress: added to, it would end the engine.
    @Test func speedIsOfWhatIsCheckedHere() {
        var progress = ScrubProgress()
        progress.id = 5
        progress.checked = 1 << 40
        var scrub = ScrubState()
        let began = Instant.zero.adding(milliseconds: 500)
        scrub.begin(progress, at: began)
        scrub.progress.checked += 10
        scrub.sample(began.adding(milliseconds: 1000))
        #expect(scrub.bytesPerSecond == 10 * UInt64(Geometry.blockSize))
        progress.checked = .max
        #expect(ScrubProgress(text: progress.text) == nil)
    }

    /// While a member is away, or filled, nothing is begun; then it goes on.
    @Test func waitsUntilTheVolumeIsWhole() {
        let h = filled()
        rot(h.fakes[0], 0)
        h.kill(h.fakes[2])
        h.fakes[2].mute = [FrameKind.regionMap.rawValue]
        h.connect(h.fakes[2])
        h.pass(milliseconds: 1000)
        h.scrub()
        h.pass(milliseconds: 1000)
        #expect(h.core.scrubReport?.state == .waiting && h.core.joiner != nil)
        #expect(h.damaged == 1)
        h.fakes[2].mute = []
        h.kill(h.fakes[2])
        h.connect(h.fakes[2])
        h.pass(milliseconds: 3000)
        #expect(h.isScrubbed && h.damaged == 0 && h.stored.inSync.count == 3)
    }

    /// A member that goes away whenever it is asked about a region is asked three times.
    @Test func aRegionThatCostsMembersIsSkipped() {
        let h = filled()
        h.fakes[1].mute = [FrameKind.verify.rawValue]
        h.scrub()
        var losses = 0
        while h.found.skipped == 0, losses < 8 {
            h.kill(h.fakes[1])
            h.connect(h.fakes[1])
            h.pass(milliseconds: 2000)
            losses += 1
        }
        #expect((3...7).contains(losses))
        h.fakes[1].mute = []
        h.kill(h.fakes[1])
        h.connect(h.fakes[1])
        h.pass(milliseconds: 3000)
        #expect(h.isScrubbed && h.found.skipped == 1 && h.found.region == 4)
    }

    /// The only member cannot read its table there: the volume goes on.
    @Test func theOnlyMemberIsNotGivenUp() {
        let h = filled(members: 1)
        h.fakes[0].errors = [
            FrameKind.verify.rawValue: .ioError, FrameKind.digest.rawValue: .ioError,
        ]
        h.scrub()
        h.pass(milliseconds: 2000)
        #expect(h.isScrubbed && h.found.skipped == 3)
        #expect(h.results[h.write(0, block(3))] == .ok)
    }

    /// A look at a region gives way to what cannot wait, and a detach does not wait for the scrub.
    @Test func aDetachDoesNotWaitForIt() {
        let h = filled()
        h.fakes[1].mute = [FrameKind.verify.rawValue]
        h.scrub()
        h.run(.detach)
        h.pass(milliseconds: 2000)
        #expect(h.stored.isClean)
    }
}
