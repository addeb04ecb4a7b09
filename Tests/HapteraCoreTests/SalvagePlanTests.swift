import Testing

@testable import HapteraCore

private func member(_ number: UInt64) -> VolumeRecord.Member {
    VolumeRecord.Member(
        replica: ReplicaID(rawValue: number), incarnation: Incarnation(rawValue: number + 100))
}
private func point(_ epoch: UInt64, _ sequence: UInt64) -> StablePoint {
    StablePoint(epoch: Epoch(epoch), sequence: SequenceNumber(sequence))
}

/// A volume of 64 regions at epoch 9, in sync on replica 1; 2 left at epoch 6, 3 at epoch 4.
private func makeRecord() -> VolumeRecord {
    var record = VolumeRecord(
        volume: VolumeID(high: 1, low: 2), name: "v", epoch: Epoch(9), nonce: 1,
        size: 64 * UInt64(Geometry.regionSize), inSync: [member(1)])
    record.engine = InstanceID(rawValue: 7)
    record.out = [
        VolumeRecord.Departure(member: member(2), leftEpoch: Epoch(6), stablePoint: point(5, 10)),
        VolumeRecord.Departure(member: member(3), leftEpoch: Epoch(4), stablePoint: point(3, 10)),
    ]
    return record
}
private func survey(_ number: UInt64, promise: UInt64, flushed: StablePoint) -> ReplicaSurvey {
    var survey = ReplicaSurvey(member: member(number), promise: Epoch(promise), installed: nil)
    survey.flushed = flushed
    survey.births = [
        .init(epoch: Epoch(8), regions: 3), .init(epoch: Epoch(6), regions: 4),
        .init(epoch: Epoch(5), regions: 5),
    ]
    survey.olderRegions = 6
    return survey
}

@Suite struct SalvagePlanTests {
    private let record = makeRecord()

    private func choice(_ number: UInt64, _ surveys: [ReplicaSurvey]) throws -> SalvagePlan.Choice {
        let plan = SalvagePlan(record: record, surveys: surveys)
        return try #require(plan.choices.first { $0.member == member(number) })
    }

    @Test func birthsAreCountedFromAnEpochOn() {
        let found = survey(1, promise: 9, flushed: .zero)
        #expect(found.regions(since: Epoch(9)) == 0)
        #expect(found.regions(since: Epoch(6)) == 7)
        #expect(found.regions(since: Epoch(5)) == 12)
        #expect(found.regions(since: Epoch(1)) == 18)
    }

    @Test func theMemberLosesNothing() throws {
        let found = try choice(1, [survey(1, promise: 9, flushed: point(8, 1))])
        #expect(found.isInSync && found.lostSince == nil && found.regionsMax == 0)
    }

    @Test func aRebootedMemberMayLoseItsActiveRegions() throws {
        var rebooted = survey(1, promise: 9, flushed: point(8, 1))
        rebooted.isRebooted = true
        rebooted.activeRegions = 2
        let found = try choice(1, [rebooted])
        #expect(found.lostSince == nil && found.mayLackUnflushed && found.regionsMax == 2)
    }

    @Test func anAbsentOneLosesWhatWasWrittenSinceItParted() throws {
        let second = survey(2, promise: 5, flushed: point(5, 10))
        var found = try choice(2, [second, survey(1, promise: 9, flushed: point(8, 1))])
        #expect(found.lostSince == Epoch(6) && found.regionsMax == 7 && found.isMeasured)
        // Nobody there holds what was written since: anything may be lost.
        found = try choice(2, [second, survey(3, promise: 3, flushed: point(3, 10))])
        #expect(found.regionsMax == 64 && !found.isMeasured)
    }

    @Test func theRecordKeepsTheLosers() throws {
        let next = try #require(
            try choice(2, [survey(2, promise: 5, flushed: point(5, 10))]).record)
        #expect(next.epoch == Epoch(10) && next.change == .salvage && !next.isClean)
        #expect(next.inSync == [member(2)] && next.engine == .none)
        #expect(
            next.lineage == [
                .init(epoch: Epoch(10), survivor: ReplicaID(rawValue: 2), partedEpoch: Epoch(6))
            ])
        let loser = try #require(next.out.first { $0.member == member(1) })
        #expect(loser.isKept && loser.partedEpoch == Epoch(6) && loser.reason == .salvaged)
        // It had left before the survivor, so the survivor has all it has.
        let older = try #require(next.out.first { $0.member == member(3) })
        #expect(!older.isKept && older.partedEpoch == Epoch(4))
        #expect(next.out.count == 2)
        #expect(VolumeRecord(decoding: next.encoded()) == next)
    }

    /// What was frozen after the survivor had left is in the volume, or not known to it at all. But
    /// what a revert kept since is nowhere else.
    @Test(arguments: [false, true])
    func snapshotsTheSurvivorHasNotGot(isReverted: Bool) throws {
        var record = record
        record.freezeHead("a", created: 1)
        var second = survey(2, promise: 5, flushed: point(5, 10))
        second.installed = record
        record.freezeHead("b", created: 2)
        if isReverted {
            record.freezeHead("kept", created: 3, target: LayerID(rawValue: 1))
            record.freezeHead("c", created: 4)
        }
        let plan = SalvagePlan(record: record, surveys: [second])
        let next = try #require(plan.choices.first { $0.member == member(2) }?.record)
        #expect(next.snapshots.map(\.name) == (isReverted ? ["a", "b", "kept"] : ["a"]))
        #expect(VolumeRecord(decoding: next.encoded()) == next)
    }

    @Test func oneThatLeftLaterThanTheSurvivorIsKeptToo() throws {
        let next = try #require(
            try choice(3, [survey(3, promise: 3, flushed: point(3, 10))]).record)
        let later = try #require(next.out.first { $0.member == member(2) })
        #expect(later.isKept && later.partedEpoch == Epoch(4))
    }

    @Test func aRolledBackCopyPartedBeforeItLeft() throws {
        let found = try choice(2, [survey(2, promise: 3, flushed: point(3, 1))])
        #expect(found.isRolledBack && found.lostSince == Epoch(3))
        #expect(found.record?.lineage.last?.partedEpoch == Epoch(3))
    }

    @Test func whatCannotBeChosenSaysWhy() throws {
        #expect(
            try choice(2, [survey(2, promise: 10, flushed: .zero)]).obstacle == .recordIsOlder)
        let stranger = try choice(5, [survey(5, promise: 1, flushed: .zero)])
        #expect(stranger.obstacle == .unknownReplica && stranger.record == nil)
    }
}

@Suite struct ReconstructionTests {
    private func installed(
        _ number: UInt64, epoch: UInt64, inSync: [UInt64], joining: UInt64? = nil
    ) -> ReplicaSurvey {
        var record = makeRecord()
        record.epoch = Epoch(epoch)
        record.nonce = epoch
        record.inSync = inSync.map(member)
        record.joining = joining.map(member)
        return ReplicaSurvey(member: member(number), promise: Epoch(epoch), installed: record)
    }

    @Test func allMembersOfTheNewestAreCertain() throws {
        let found = try #require(
            Reconstruction(surveys: [
                installed(1, epoch: 9, inSync: [1, 2]), installed(2, epoch: 8, inSync: [1, 2, 3]),
            ]))
        #expect(found.verdict == .certain && found.missing == [])
        // As it was: an engine that outlived the store goes on.
        #expect(found.record(nonce: 77) == found.newest && found.newest.epoch == Epoch(9))
    }

    @Test func aMissingMemberOrJoinerMakesItDoubtful() throws {
        for survey in [
            installed(1, epoch: 9, inSync: [1, 2]),
            installed(1, epoch: 9, inSync: [1], joining: 2),
        ] {
            let found = try #require(Reconstruction(surveys: [survey]))
            #expect(found.verdict == .doubtful && found.missing == [ReplicaID(rawValue: 2)])
            let record = found.record(nonce: 77)
            #expect(record.epoch.rawValue > 1000 && record.nonce == 77)
            #expect(record.engine == .none && record.change == .reconstruction)
        }
        let known = Reconstruction(
            surveys: [installed(1, epoch: 9, inSync: [1])], known: [ReplicaID(rawValue: 4)])
        #expect(known?.verdict == .doubtful && known?.missing == [ReplicaID(rawValue: 4)])
    }

    /// Replica 1 took the volume over and promised that; 2 had left in vain. Then 2 may have been
    /// reinstated, and 1 removed: 2 holds, alone, what was acknowledged since.
    @Test(arguments: [VolumeRecord.Change.takeover, .removal, .reinstatement])
    func whoMayHaveBeenReinstatedSinceMakesItDoubtful(change: VolumeRecord.Change) throws {
        var survey = takenOver(change)
        let found = try #require(Reconstruction(surveys: [survey]))
        #expect(found.verdict == .doubtful && found.missing == [ReplicaID(rawValue: 2)])
        // It may hold writes that no other has; 3 cannot, since it had left before.
        let out = found.record(nonce: 77).out
        #expect(out.filter(\.isKept).map(\.member) == [member(2)])

        let second = ReplicaSurvey(member: member(2), promise: Epoch(5), installed: nil)
        #expect(Reconstruction(surveys: [survey, second])?.verdict == .certain)
        // Every member had promised its removal.
        survey.stable = point(6, 1)
        #expect(Reconstruction(surveys: [survey])?.verdict == .certain)
    }

    private func takenOver(
        _ change: VolumeRecord.Change,
        _ edit: (inout VolumeRecord.Departure) -> Void = { _ in }
    ) -> ReplicaSurvey {
        var survey = installed(1, epoch: 9, inSync: [1])
        survey.installed?.change = change
        if var departure = survey.installed?.out[0] {
            edit(&departure)
            survey.installed?.out[0] = departure
        }
        survey.stable = point(5, 1)
        return survey
    }

    @Test func whoCannotHaveBeenReinstatedIsNotMissed() throws {
        // The engine of such a record serves, or none does: another must claim the volume first.
        let reinstating: [VolumeRecord.Change] = [.takeover, .removal, .reinstatement]
        for change in VolumeRecord.Change.allCases where !reinstating.contains(change) {
            #expect(Reconstruction(surveys: [takenOver(change)])?.verdict == .certain)
        }
        let never = [
            takenOver(.takeover) { $0.isKept = true },
            takenOver(.takeover) { $0.reason = .ioError },
            takenOver(.takeover) { $0.partedEpoch = Epoch(4) },
        ]
        for survey in never { #expect(Reconstruction(surveys: [survey])?.verdict == .certain) }
    }

    @Test func anotherMakingOfTheMemberIsNotTheMember() throws {
        var other = installed(1, epoch: 9, inSync: [1])
        other.member.incarnation = Incarnation(rawValue: 5)
        #expect(Reconstruction(surveys: [other])?.verdict == .useless)
    }

    @Test func noRecordOrTwoOfOneEpochIsNothing() {
        #expect(Reconstruction(surveys: []) == nil)
        #expect(
            Reconstruction(surveys: [
                installed(1, epoch: 9, inSync: [1]), installed(2, epoch: 9, inSync: [2]),
            ]) == nil)
    }
}
