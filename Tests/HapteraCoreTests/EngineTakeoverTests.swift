import Testing

@testable import HapteraCore

private func point(_ epoch: UInt64, _ sequence: UInt64) -> StablePoint {
    StablePoint(epoch: Epoch(epoch), sequence: SequenceNumber(sequence))
}

/// Rule T beyond the plain case: who was rolled back, who left in vain, who must decide.
@Suite struct EngineTakeoverTests {
    private func block(_ byte: UInt8) -> [UInt8] { [UInt8](repeating: byte, count: 4096) }

    /// A volume with a surviving client whose every member's host has restarted.
    private func rebooted(members: Int = 3) -> EngineHarness {
        let h = EngineHarness(members: members, generation: 0)
        h.stored.isClean = false
        for fake in h.fakes.prefix(members) { fake.isRebooted = true }
        return h
    }
    private func departure(
        _ h: EngineHarness, _ index: Int, left: UInt64,
        _ reason: VolumeRecord.DepartureReason = .disconnected
    ) -> VolumeRecord.Departure {
        VolumeRecord.Departure(
            member: h.fakes[index].member, leftEpoch: Epoch(left), stablePoint: .zero,
            reason: reason)
    }

    // MARK: reasons and points

    @Test func theReasonOfARemovalIsRecorded() {
        let cases: [(VolumeRecord.DepartureReason, (EngineHarness) -> Void)] = [
            (.disconnected, { $0.kill($0.fakes[2]) }),
            (.ioError, { $0.fakes[2].errors = [FrameKind.write.rawValue: .ioError] }),
            (.full, { $0.fakes[2].errors = [FrameKind.write.rawValue: .noSpace] }),
            (.protocolError, { $0.fakes[2].errors = [FrameKind.write.rawValue: .invalid] }),
            (.silent, { $0.fakes[2].mute = [FrameKind.write.rawValue] }),
        ]
        for (reason, harm) in cases {
            let h = EngineHarness()
            h.start()
            harm(h)
            let write = h.write(0, block(1))
            // Not so long that it has joined again.
            for _ in 0..<40 where h.stored.out.isEmpty { h.pass(milliseconds: 100) }
            #expect(h.stored.out.first?.reason == reason)
            #expect(h.results[write] == .ok)
        }
        let h = EngineHarness()
        h.fakes[2].isUp = false
        h.start()
        h.pass(milliseconds: 4000)
        #expect(h.stored.out.first?.reason == .unreachable)
    }

    @Test func whatAReplicaMarkedDurablyIsRecordedWhenItLeaves() {
        let h = EngineHarness()
        h.start()
        // The mark of a flush is durable when a later one has been answered.
        for byte in 1...3 as ClosedRange<UInt8> {
            h.write(0, block(byte))
            h.submit(.flush)
        }
        let last = h.fakes[2].flushed
        h.kill(h.fakes[2])
        let bound = h.stored.out.first?.stablePoint ?? .zero
        #expect(bound > .zero && bound < last)
        #expect(h.fakes[0].stable > .zero && h.fakes[0].stable < last)
    }

    // MARK: rolled back

    @Test func aMemberThatLagsBehindItsPeersKnowledgeIsRemoved() {
        let h = EngineHarness()
        h.stored.isClean = false
        for fake in h.fakes { (fake.flushed, fake.stable) = (point(1, 9), point(1, 8)) }
        (h.fakes[1].flushed, h.fakes[1].stable) = (point(1, 3), point(1, 2))
        h.start()
        #expect(!h.stored.contains(h.fakes[1].member.replica))
        let gone = h.stored.out.first
        #expect(gone?.reason == .rolledBack && gone?.stablePoint == point(1, 8))
        #expect(h.core.phase == .serving)
    }

    /// The record knows of promises up to 6, and the replicas have given these.
    private func afterPromises(_ promises: [UInt64], members: Int = 3) -> EngineHarness {
        let h = EngineHarness(members: members)
        h.stored.isClean = false
        h.stored.epoch = Epoch(7)
        h.stored.promised = Epoch(6)
        for (fake, promise) in zip(h.fakes, promises) { fake.promise = Epoch(promise) }
        h.reconnects = true
        return h
    }

    /// Seed 109371: the engine had asked an old copy for its promise, refused to go on with what
    /// the others were, and ended. The next one found the old copy alone, with a new promise.
    @Test func aMemberThatPromisedMoreThanItKnowsIsNotAskedAgain() {
        for others in [true, false] {
            let h = afterPromises([6, 5, 6])
            for fake in h.fakes { fake.isUp = others }
            h.fakes[1].isUp = true
            h.start()
            h.pass(milliseconds: 4000)
            // It is filled again if there is somebody to fill it from.
            let gone = h.stored.out.first { $0.member == h.fakes[1].member }
            #expect(others || gone?.reason == .rolledBack)
            #expect(others || h.fakes[1].promise == Epoch(5))
            #expect((h.core.phase == .serving) == others)
            let isTold = h.notes.contains {
                if case .replicaRolledBack(h.slot(h.fakes[1])) = $0 { true } else { false }
            }
            #expect(isTold)
        }
    }
    /// Seed 5811131: the promise that an engine before had asked for was durable only after the
    /// member had greeted.
    @Test func aPromiseGivenSinceTheGreetingCounts() {
        let h = afterPromises([5, 6], members: 2)
        h.fakes[1].isUp = false
        h.start()
        h.pass(milliseconds: 1000)
        #expect(h.core.phase == .hearing)
        h.fakes[0].promise = Epoch(6)
        h.pass(milliseconds: 8000)
        #expect(!h.notes.contains { if case .replicaRolledBack = $0 { true } else { false } })
        #expect(h.core.phase == .serving)
        #expect(h.stored.inSync.contains(h.fakes[0].member))
    }
    @Test func theLastMemberIsAnOlderCopyOnlyIfTheLossIsAccepted() {
        let h = afterPromises([3], members: 1)
        h.start()
        h.pass(milliseconds: 4000)
        #expect(h.core.isRefusing && h.core.phase == .installing)
        #expect(h.fakes[0].promise == Epoch(3))
        // Told once: from "only rebooted members" alone nobody would know.
        let told = h.notes.count { if case .replicaRolledBack = $0 { true } else { false } }
        #expect(told == 1)
        h.run(.acceptLoss)
        #expect(h.core.phase == .serving && h.fakes[0].promise == h.stored.epoch)
    }
    @Test func whatAllHavePromisedIsRecordedWithTheNextChange() {
        let h = EngineHarness()
        h.start()
        let taken = h.stored.epoch
        h.kill(h.fakes[2])
        h.write(0, block(1))
        #expect(h.stored.epoch == taken.next && h.stored.promised == taken)
    }

    @Test func oneWhoseLastMarkIsMissingIsNot() {
        let h = EngineHarness()
        h.stored.isClean = false
        for fake in h.fakes { (fake.flushed, fake.stable) = (point(1, 9), point(1, 8)) }
        h.fakes[1].flushed = point(1, 8)
        h.start()
        #expect(h.stored.inSync.count == 3 && h.core.phase == .serving)
    }

    /// The older copy leaves before anybody is asked: what tells it from the others may be gone
    /// when the next engine looks.
    @Test func rebootedOnesAreNotPreferredToOneThatWasRolledBackWithoutAsking() {
        let h = rebooted()
        for fake in h.fakes { (fake.flushed, fake.stable) = (point(1, 9), point(1, 8)) }
        h.fakes[1].isRebooted = false
        h.fakes[1].flushed = point(1, 3)
        h.start()
        #expect(h.core.isRefusing && h.stored.inSync.count == 2)
        #expect(h.stored.out.first?.reason == .rolledBack)
        h.run(.acceptLoss)
        #expect(h.core.phase == .serving && !h.stored.contains(h.fakes[1].member.replica))
    }

    // MARK: reinstatement

    /// Two members, the third out since epoch 3; nobody has promised more than 2.
    private func removedInVain() -> EngineHarness {
        let h = EngineHarness(members: 2, generation: 0)
        h.stored.epoch = Epoch(3)
        h.stored.isClean = false
        h.stored.out = [departure(h, 2, left: 3)]
        for fake in h.fakes { fake.promise = Epoch(2) }
        return h
    }

    /// Removed in vain, and an old copy was put in its place meanwhile: told by its promise before
    /// it is taken back (simulator seed 104326), or else by what it has flushed, and filled.
    @Test(arguments: [UInt64(0), 2])
    func anOlderCopyIsNotTakenBack(_ promise: UInt64) {
        let h = removedInVain()
        let point = StablePoint(epoch: Epoch(2), sequence: SequenceNumber(7))
        h.stored.out[0].stablePoint = point
        for fake in h.fakes.prefix(2) { fake.flushed = point }
        h.fakes[2].promise = Epoch(promise)
        h.fakes[2].flushed = StablePoint(epoch: Epoch(2), sequence: SequenceNumber(3))
        h.start()
        h.pass(milliseconds: 200)
        #expect(h.core.phase == .serving)
        let isTakenBack = h.notes.contains {
            if case .replicaReinstated = $0 { true } else { false }
        }
        #expect(isTakenBack == (promise == 2))
        let isNoticed = h.notes.contains {
            if case .replicaRolledBack = $0 { true } else { false }
        }
        #expect(isNoticed == (promise == 2))
        h.pass(milliseconds: 5000)
        #expect(h.fakes[2].seen.contains(.digest) || h.fakes[2].seen.contains(.regionMap))
    }

    @Test func aReplicaRemovedInVainIsTakenBackWithoutAResync() {
        let h = removedInVain()
        h.fakes[2].active = [1]
        h.fakes[2].blocks[300] = (
            BlockEntry(state: .data, checksum: checksum(of: block(7))), block(7)
        )
        // It is greeted before the members have promised.
        h.fakes[0].isUp = false
        h.fakes[1].isUp = false
        h.start()
        h.connect(h.fakes[0])
        h.connect(h.fakes[1])
        #expect(h.core.phase == .serving && h.stored.inSync.count == 3 && h.stored.out.isEmpty)
        #expect(h.notes.contains { if case .replicaReinstated = $0 { true } else { false } })
        #expect(!h.fakes[2].seen.contains(.regionMap))
        // Its activity log took part in the resolution.
        h.pass(milliseconds: 100)
        #expect(h.fakes[0].lowestEntry(300) == h.fakes[2].lowestEntry(300))
    }

    /// The members leave before they hear of it, and it goes on alone: none of them knows what was
    /// acknowledged, and no record that they have is certain.
    @Test func whoWasTakenBackMayGoOnWithoutTheOthers() throws {
        let h = removedInVain()
        for fake in h.fakes.prefix(2) { fake.isUp = false }
        h.start()
        h.connect(h.fakes[1])
        h.fakes[1].isDeaf = true
        h.connect(h.fakes[0])
        let claimed = h.stored
        #expect(h.core.phase == .installing && h.fakes[0].promise == claimed.epoch)
        h.fakes[0].isDeaf = true
        h.pass(milliseconds: 9000)
        #expect(h.stored.inSync == [h.fakes[2].member] && h.core.phase == .serving)
        let write = h.write(0, block(1))
        #expect(h.results[write] == .ok)

        func survey(_ fake: FakeReplica) -> ReplicaSurvey {
            let records = [claimed, h.stored]
            return ReplicaSurvey(
                member: fake.member, promise: fake.promise,
                installed: records.first { $0.epoch == fake.promise })
        }
        let others = try #require(Reconstruction(surveys: h.fakes.prefix(2).map(survey)))
        #expect(others.newest == claimed)
        #expect(others.verdict == .doubtful && others.missing == [h.fakes[2].member.replica])
        let found = Reconstruction(surveys: h.fakes.map(survey))
        #expect(found?.verdict == .certain && found?.newest == h.stored)
    }

    /// An engine that was only stopped goes on beside the next one, takes back a replica, and loses
    /// the member that the next one waits for: whose record is not what it read any more.
    @Test func whoHearsNoMemberReadsTheRecordAgain() {
        let h = EngineHarness(replicas: 2, members: 1)
        h.fakes[0].isUp = false
        h.start()
        h.pass(milliseconds: 7000)
        #expect(h.core.phase == .hearing && h.stored.epoch == Epoch(1))
        h.stored.epoch = Epoch(5)
        h.stored.nonce = 500
        h.stored.inSync = [h.fakes[1].member]
        h.pass(milliseconds: 7000)
        #expect(h.core.phase == .serving && h.stored.inSync == [h.fakes[1].member])
        #expect(h.stored.epoch > Epoch(5) && h.stored.engine == InstanceID(rawValue: 99))
    }

    /// Nobody writes, and a member leaves, or is out when the volume is taken over: soon those that
    /// stay can tell by themselves that it was not taken back, and no flush is sent for ever.
    @Test(arguments: [true, false])
    func whoLeavesAnIdleVolumeIsNotMissedForLong(whileServed: Bool) throws {
        let h = EngineHarness()
        h.fakes[2].isUp = whileServed
        h.start()
        h.pass(milliseconds: 12_000)
        h.kill(h.fakes[2])
        h.pass(milliseconds: 12_000)
        #expect(h.stored.change == .removal && h.stored.out.count == 1)
        let surveys = h.fakes.prefix(2).map { fake in
            var survey = ReplicaSurvey(
                member: fake.member, promise: fake.promise, installed: h.stored)
            survey.stable = fake.stable
            return survey
        }
        #expect(Reconstruction(surveys: surveys)?.verdict == .certain)
        let flushes = h.fakes[0].seen.count { $0 == .flush }
        h.pass(milliseconds: 60_000)
        #expect(h.fakes[0].seen.count { $0 == .flush } == flushes)
    }

    /// The witness answers before the one that shows it to be an old copy (simulator seed 20034).
    @Test func aMemberThatWasRolledBackProvesNothing() {
        let h = removedInVain()
        h.stored.epoch = Epoch(5)
        h.fakes[1].promise = Epoch(5)
        h.fakes[1].installed = h.stored
        (h.fakes[1].flushed, h.fakes[1].stable) = (point(5, 9), point(5, 8))
        for fake in h.fakes.prefix(2) { fake.isUp = false }
        h.start()
        h.connect(h.fakes[1])
        h.fakes[1].isDeaf = true
        h.connect(h.fakes[0])
        #expect(h.core.phase == .installing)
        h.hear(h.fakes[1], from: 0)
        #expect(!h.notes.contains { if case .replicaReinstated = $0 { true } else { false } })
        #expect(h.notes.contains { if case .replicaRolledBack = $0 { true } else { false } })
        #expect(h.core.phase == .serving)
    }

    @Test(arguments: 0..<4) func withoutAProofItIsFilledLikeAnyOther(case number: Int) {
        let h = removedInVain()
        switch number {
        // Both members promised the epoch without it: writes may have been acknowledged.
        case 0:
            for fake in h.fakes.prefix(2) {
                fake.promise = Epoch(3)
                fake.installed = h.stored
            }
        case 1: h.stored.out[0].isKept = true
        case 2: h.stored.out[0].reason = .ioError
        default: h.stored.out[0].partedEpoch = Epoch(2)
        }
        h.fakes[0].isUp = false
        h.fakes[1].isUp = false
        h.start()
        h.connect(h.fakes[0])
        h.connect(h.fakes[1])
        #expect(!h.notes.contains { if case .replicaReinstated = $0 { true } else { false } })
        #expect(h.core.phase == .serving)
    }

    @Test func aRefusingVolumeGoesOnWhenASteadyReplicaIsReinstated() {
        let h = removedInVain()
        for fake in h.fakes.prefix(2) { fake.isRebooted = true }
        h.fakes[2].isUp = false
        h.start()
        h.pass(milliseconds: 1000)
        #expect(h.core.isRefusing)
        h.connect(h.fakes[2])
        #expect(h.core.phase == .serving && !h.core.isRefusing && h.stored.inSync.count == 3)
    }

    // MARK: only rebooted members

    @Test func aBetterMemberThatReturnsEndsTheRefusal() {
        let h = rebooted()
        h.fakes[2].isRebooted = false
        h.fakes[2].isUp = false
        h.start()
        h.pass(milliseconds: 5000)
        #expect(h.core.isRefusing && h.stored.inSync.count == 3)
        h.connect(h.fakes[2])
        #expect(h.core.phase == .serving && !h.core.isRefusing)
        // Refused once, told once.
        #expect(
            h.notes.count { if case .onlyRebootedMembers = $0 { true } else { false } } == 1)
    }

    @Test func anAcceptedLossLetsItGoOnOnce() {
        let h = rebooted()
        h.start()
        let write = h.write(0, block(1))
        h.pass(milliseconds: 1000)
        #expect(h.core.isRefusing && h.results[write] == nil)
        h.run(.acceptLoss)
        #expect(h.core.phase == .serving && h.results[write] == .ok)
        #expect(h.notes.contains { if case .lossAccepted = $0 { true } else { false } })
        #expect(!h.core.isLossAccepted)
    }

    @Test func aNewClientOrASalvageNeedsNoQuestion() {
        var h = rebooted(members: 1)
        h.stored.clientGeneration = 5
        h.start()
        #expect(h.core.phase == .serving)
        h = rebooted(members: 1)
        h.stored.change = .salvage
        h.start()
        #expect(h.core.phase == .serving)
    }

    // MARK: salvage

    @Test func aKeptLoserIsNotFilledUntilItIsLetGo() {
        let h = EngineHarness(members: 1)
        h.stored.out = [departure(h, 1, left: 1, .salvaged)]
        h.stored.out[0].isKept = true
        h.start()
        h.pass(milliseconds: 3000)
        #expect(!h.stored.contains(h.fakes[1].member.replica))
        #expect(!h.fakes[1].seen.contains(.install))
        #expect(h.stored.contains(h.fakes[2].member.replica))
    }

    @Test func whatATakeoverDidIsTold() {
        let h = EngineHarness()
        h.stored.isClean = false
        h.fakes[0].active = [0, 2]
        h.fakes[1].blocks[3] = (
            BlockEntry(state: .data, checksum: checksum(of: block(2))), block(2)
        )
        h.start()
        h.pass(milliseconds: 200)
        #expect(h.core.lastTakeover.regions == 2 && h.core.lastTakeover.blocks == 1)
    }
}
