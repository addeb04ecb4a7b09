import Testing

@testable import HapteraCore

/// Which regions a returning replica is given. Rules are judged here, with and
/// without them: random seeds seldom come to where they matter.
@Suite struct EngineDeltaTests {
    private func block(_ value: UInt8) -> [UInt8] { [UInt8](repeating: value, count: 4096) }
    private func put(_ value: UInt8, _ fake: FakeReplica, _ index: UInt64) {
        fake.blocks[index] = (
            BlockEntry(state: .data, checksum: checksum(of: block(value))), block(value)
        )
    }
    /// Two replicas that hold three regions; the second has left since.
    private func departed(_ mutation: MutationSet, flushed: UInt64 = 0) -> EngineHarness {
        let h = EngineHarness(replicas: 2)
        h.core.mutations = mutation
        for fake in h.fakes {
            fake.flushed = StablePoint(epoch: Epoch(1), sequence: SequenceNumber(flushed))
        }
        h.start()
        for region in 0..<3 as Range<UInt64> { h.write(region << 20, block(1)) }
        h.kill(h.fakes[1])
        h.pass(milliseconds: 500)
        for fake in h.fakes { fake.births = [0: 1, 1: 1, 2: 1] }
        h.fakes[1].seen = []
        return h
    }
    private func returns(_ h: EngineHarness) {
        h.connect(h.fakes[1])
        h.pass(milliseconds: 2000)
        #expect(h.stored.inSync.count == 2)
    }
    private func areEqual(_ h: EngineHarness, _ index: UInt64) -> Bool {
        h.fakes[0].entry(index) == h.fakes[1].entry(index)
    }

    /// Seeds 110367 and 110362: the repair was forgotten, and with it the join.
    @Test func aDamagedRegionIsRepairedThoughItIsBeingCopied() {
        for isBegun in [true, false] {
            let h = EngineHarness()
            h.start()
            h.write(0, block(1))
            h.kill(h.fakes[2])
            h.write(0, block(2))
            h.fakes[2].mute = [FrameKind.write.rawValue]
            // The copy waits for a write that a member has not answered.
            h.fakes[1].mute = isBegun ? [] : [FrameKind.write.rawValue]
            if !isBegun { h.write(4096, block(3)) }
            h.connect(h.fakes[2])
            h.pass(milliseconds: 500)
            h.fakes[0].errors = [FrameKind.read.rawValue: .checksumMismatch]
            let read = h.read(0, 4096)
            h.fakes[0].errors = [:]
            let behind = h.write(8192, block(4))
            for fake in h.fakes { fake.mute = [] }
            for fake in h.fakes { h.answerMuted(fake) }
            h.pass(milliseconds: 2000)
            #expect(h.results[read] == .ok && h.results[behind] == .ok)
            #expect(h.stored.inSync.count == 3)
            #expect(areEqual(h, 2) && !h.core.isResolving)
        }
    }

    @Test func deltaIsWhatEitherSideWroteSince() {
        for mutation in [[], .deltaIgnoresSourceBirth, .deltaIgnoresJoinerBirth] as [MutationSet] {
            let h = departed(mutation)
            put(2, h.fakes[0], 256)
            h.fakes[0].births[1] = 100
            put(3, h.fakes[1], 512)
            h.fakes[1].births[2] = 100
            returns(h)
            #expect(areEqual(h, 256) == !mutation.contains(.deltaIgnoresSourceBirth))
            #expect(areEqual(h, 512) == !mutation.contains(.deltaIgnoresJoinerBirth))
            let digests = h.fakes[1].seen.filter { $0 == .digest }.count
            #expect(digests == (mutation.isEmpty ? 2 : 1))
        }
    }

    /// Births tell the same, since its Install raises those of what its log names; the log is what
    /// the promise is about.
    @Test func whatTheJoinersLogNamesIsInTheDelta() {
        for mutation in [[], .deltaIgnoresJoinerLog] as [MutationSet] {
            let h = departed(mutation)
            put(3, h.fakes[1], 512)
            h.fakes[1].active = [2]
            returns(h)
            #expect(areEqual(h, 512) == mutation.isEmpty)
        }
    }

    /// A directory restored from an older copy misses more than its departure explains.
    @Test func rolledBackJoinerIsComparedInFull() {
        for mutation in [[], .rolledBackJoinerByDelta] as [MutationSet] {
            let h = departed(mutation, flushed: 50)
            h.fakes[1].flushed = StablePoint(epoch: Epoch(1), sequence: SequenceNumber(10))
            put(9, h.fakes[1], 0)
            returns(h)
            #expect(areEqual(h, 0) == mutation.isEmpty)
        }
    }

    /// The joiner's first flush takes the evidence away: another engine must find it in the record.
    @Test func rollBackOfAJoinerIsRecordedBeforeItIsFlushed() {
        for mutation in [[], .rollBackNotRecorded] as [MutationSet] {
            let h = departed(mutation, flushed: 50)
            h.fakes[1].flushed = StablePoint(epoch: Epoch(1), sequence: SequenceNumber(10))
            h.fakes[1].mute = [FrameKind.regionMap.rawValue]
            h.connect(h.fakes[1])
            h.pass(milliseconds: 1000)
            #expect(h.stored.joining == h.fakes[1].member)
            #expect((h.stored.out.first?.reason == .rolledBack) == mutation.isEmpty)
        }
    }

    /// A write that a replica was sent before it left does not wait for it when it comes back.
    @Test func joinerDoesNotOweWhatItWasSentBefore() {
        for mutation in [[], .joinerKeepsRequests] as [MutationSet] {
            let h = EngineHarness(replicas: 2) { $0.removalDeadlineMilliseconds = 60_000 }
            h.core.mutations = mutation
            h.start()
            for fake in h.fakes { fake.mute = [FrameKind.write.rawValue] }
            let write = h.write(0, block(1))
            h.kill(h.fakes[1])
            h.pass(milliseconds: 500)
            h.connect(h.fakes[1])
            h.pass(milliseconds: 1000)
            #expect(h.stored.joining == h.fakes[1].member)
            for fake in h.fakes { fake.mute = [] }
            h.answerMuted(h.fakes[0])
            #expect(h.results[write] == .ok)
            h.pass(milliseconds: 2000)
            #expect((h.stored.inSync.count == 2) == mutation.isEmpty)
        }
    }

    /// A region found equal, but written later at the member, is written once at the joiner: else
    /// it would later be thought unchanged since before, and be kept from another returning
    /// replica.
    @Test func equalRegionGetsTheBirthItsBytesDeserve() {
        for mutation in [[], .equalRegionKeepsBirth] as [MutationSet] {
            let h = departed(mutation)
            h.fakes[0].births = [0: 100, 1: 100, 2: 1]
            h.fakes[1].births = [0: 99, 1: 100, 2: 1]
            returns(h)
            #expect(h.fakes[1].seen.filter { $0 == .digest }.count == 2)
            #expect(h.fakes[1].seen.filter { $0 == .write }.count == (mutation.isEmpty ? 1 : 0))
        }
    }

    /// It answers a flush that an Install has overtaken in the later epoch, and has marked it in
    /// the earlier one: that is no roll back, after which all of it would be compared.
    @Test func aFlushAnsweredInALaterEpochIsNoRollBack() throws {
        let h = EngineHarness()
        h.start()
        h.write(0, [UInt8](repeating: 1, count: 4096))
        let late = h.fakes[2]
        late.mute = [FrameKind.flush.rawValue]
        h.submit(.flush)
        let flush = try #require(late.heard.last { $0.kind == .flush })
        h.run(.takeSnapshot(token: 1, name: "a", created: 1))
        #expect(late.promise > flush.epoch)
        late.flushed = StablePoint(epoch: flush.epoch, sequence: flush.sequence)
        h.refuse(late, flush, .ok, epoch: late.promise)
        h.kill(h.fakes[1])
        h.pass(milliseconds: 300)
        #expect(h.stored.inSync.count == 2)
        // From here on it marks what it answers.
        late.flushed = StablePoint(epoch: late.promise, sequence: SequenceNumber(1 << 40))
        late.mute = []
        h.answerMuted(late)
        h.connect(h.fakes[1])
        h.pass(milliseconds: 5000)
        h.kill(late)
        h.pass(milliseconds: 300)
        h.connect(late)
        h.pass(milliseconds: 5000)
        let isRolledBack = h.notes.contains {
            if case .joinerRolledBack = $0 { true } else { false }
        }
        #expect(!isRolledBack && h.stored.inSync.count == 3)
    }
}
