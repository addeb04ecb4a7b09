/// Rules of the protocol that a simulation may switch off, to see that their absence is noticed.
/// Always empty in a real process.
package struct MutationSet: OptionSet, BitwiseCopyable, Sendable {
    package var rawValue: UInt128
    package init(rawValue: UInt128) { self.rawValue = rawValue }
    package init() { rawValue = 0 }
    /// Clients: serve a new session beside what an old one left (a rule of the shell).
    package static let oldSessionNotFenced = MutationSet(rawValue: 1 << 48)
    /// I: take another record of the same epoch on a replica for the engine's own.
    package static let sameEpochIsSameRecord = MutationSet(rawValue: 1 << 50)
    /// F: let a stable point cover what a flush passed by at a replica with a full log, or what a
    /// full member has no space for.
    package static let passedWritesNotLeftOut = MutationSet(rawValue: 1 << 51)
    /// D: acknowledge without a lost member before its removal is recorded.
    package static let ackBeforeCAS = MutationSet(rawValue: 1 << 0)
    /// D: acknowledge when the removal is recorded, before the members have installed it.
    package static let ackBeforeInstall = MutationSet(rawValue: 1 << 1)
    /// W3: a replica takes requests of any epoch.
    package static let noEpochCheck = MutationSet(rawValue: 1 << 2)
    /// I: promise without waiting for the old connection's disk writes.
    package static let installWithoutDrain = MutationSet(rawValue: 1 << 3)
    /// J: acknowledge without the joiner while its promotion is on the way.
    package static let promoteWithoutRequiringJoiner = MutationSet(rawValue: 1 << 4)
    /// J: promote before the joiner has flushed.
    package static let promoteWithoutFlush = MutationSet(rawValue: 1 << 5)
    /// W1: let overlapping operations run together.
    package static let noIntervalLock = MutationSet(rawValue: 1 << 6)
    /// W3: write data before the region's activation is durable.
    package static let dataBeforeActivate = MutationSet(rawValue: 1 << 7)
    /// F: announce a stable point before everything is resolved.
    package static let stableBeforeResolved = MutationSet(rawValue: 1 << 8)
    /// F: drain regions whatever has been flushed and announced as stable.
    package static let drainWithoutFlush = MutationSet(rawValue: 1 << 9)
    /// I: leave the birth of active regions as it is.
    package static let noRestamp = MutationSet(rawValue: 1 << 10)
    /// T: serve without making the members equal.
    package static let skipResolution = MutationSet(rawValue: 1 << 11)
    /// T: take a rebooted member as the source like any other.
    package static let rebootedSource = MutationSet(rawValue: 1 << 12)
    /// F: take a failed sync for a clean one.
    package static let retryFailedSync = MutationSet(rawValue: 1 << 13)
    /// R: read from a joiner.
    package static let readFromJoiner = MutationSet(rawValue: 1 << 14)
    /// J: forget regions that writes were in flight to when the join began.
    package static let inFlightRegionsNotCopied = MutationSet(rawValue: 1 << 15)
    /// F: flush data without the log.
    package static let flushWithoutLog = MutationSet(rawValue: 1 << 16)
    /// D: take an unanswered compare-and-swap for one that did not happen.
    package static let inDoubtCASAssumedLost = MutationSet(rawValue: 1 << 17)
    /// W: do not hold a write's range until the joiner has answered.
    package static let noJoinerLock = MutationSet(rawValue: 1 << 18)
    /// R: return a block without looking at its checksum.
    package static let readWithoutChecksum = MutationSet(rawValue: 1 << 19)
    /// F: answer a flush without syncing.
    package static let flushWithoutSync = MutationSet(rawValue: 1 << 20)
    /// F: answer a client's flush while members are still being made equal.
    package static let flushWhileResolving = MutationSet(rawValue: 1 << 22)
    /// On disk: write a drained region's page although later records may be renumbered.
    package static let drainBeforeLogSync = MutationSet(rawValue: 1 << 23)
    /// L: answer without every member's lease.
    package static let noLeaseCheck = MutationSet(rawValue: 1 << 24)
    /// L: a new engine does not wait for the leases of the one before.
    package static let noLeaseWait = MutationSet(rawValue: 1 << 25)
    /// L: count a lease to its very end, by a clock of another rate.
    package static let noLeaseMargin = MutationSet(rawValue: 1 << 27)
    /// W: round a trim outwards, to all blocks it touches.
    package static let trimRoundedOutwards = MutationSet(rawValue: 1 << 52)
    /// W: the range of a write whose client was told of a time-out is given free at once.
    package static let timedOutWriteUnlocked = MutationSet(rawValue: 1 << 28)
    /// L: a replica that starts reports no lease of its time before.
    package static let restartedReplicaForgetsLease = MutationSet(rawValue: 1 << 26)

    /// T: take a member that was rolled back for one like the others.
    package static let acceptRolledBackMember = MutationSet(rawValue: 1 << 40)
    /// T: take a removed replica back though writes may have been acknowledged without it.
    package static let reinstateUnproven = MutationSet(rawValue: 1 << 41)
    /// J: fill the loser of a salvage like any absent replica.
    package static let joinKept = MutationSet(rawValue: 1 << 42)
    /// D: remove the last member too.
    package static let removeLast = MutationSet(rawValue: 1 << 43)
    /// I: take a replica whose promise is above the record for a failed one.
    package static let recordOlderIgnored = MutationSet(rawValue: 1 << 44)
    /// T: claim before anybody was asked what was promised.
    package static let claimUnheard = MutationSet(rawValue: 1 << 29)
    /// I: promise the same epoch again after a restart.
    package static let equalEpochInstallAfterRestart = MutationSet(rawValue: 1 << 45)
    /// T: think the client of an earlier engine gone.
    package static let clientGenerationIgnored = MutationSet(rawValue: 1 << 46)
    /// W: leave what an errored write left different on the members.
    package static let erroredWriteNotResolved = MutationSet(rawValue: 1 << 47)
    /// J: leave what a member wrote since the joiner left out of the delta.
    package static let deltaIgnoresSourceBirth = MutationSet(rawValue: 1 << 32)
    /// J: copy what a joiner lacks of the head only, not of the layers below it.
    package static let lowerLayersNotCopied = MutationSet(rawValue: 1 << 77)
    /// J: leave what the joiner's activity log names out of the delta.
    package static let deltaIgnoresJoinerLog = MutationSet(rawValue: 1 << 78)
    /// J: leave what the joiner wrote since it left out of the delta.
    package static let deltaIgnoresJoinerBirth = MutationSet(rawValue: 1 << 33)
    /// J: take an older copy of a replica for one that was merely away.
    package static let rolledBackJoinerByDelta = MutationSet(rawValue: 1 << 34)
    /// J: keep it from the record that a joiner was rolled back.
    package static let rollBackNotRecorded = MutationSet(rawValue: 1 << 36)
    /// J: wait for a joiner's answers to what it was sent before it left.
    package static let joinerKeepsRequests = MutationSet(rawValue: 1 << 37)
    /// J: leave the birth of a region found equal as it is on the joiner.
    package static let equalRegionKeepsBirth = MutationSet(rawValue: 1 << 35)

    /// S: writes go to whatever layer is the head when a replica admits them.
    package static let snapshotWritesUnlayered = MutationSet(rawValue: 1 << 30)
    /// S: a replica looks below a layer at the next lower one, whatever was reverted.
    package static let revertIgnored = MutationSet(rawValue: 1 << 21)
    /// S: forget a revert when the layer that the volume went back to is merged.
    package static let revertForgotten = MutationSet(rawValue: 1 << 55)
    /// Scrub: call a region good whatever its members found.
    package static let scrubBelieves = MutationSet(rawValue: 1 << 38)
    /// Scrub: take the first member's copy for the good one.
    package static let scrubTrustsFirst = MutationSet(rawValue: 1 << 39)
    /// S: acknowledge what lies behind the freeze of a group's snapshot before its release.
    package static let heldIsAcknowledged = MutationSet(rawValue: 1 << 67)
    /// S: answer that a snapshot is taken before what it holds is durable.
    package static let snapshotBeforeFlush = MutationSet(rawValue: 1 << 31)

    /// Rules that some seed of the simulator misses.
    package static let named: [(name: String, mutation: MutationSet)] = [
        ("oldSessionNotFenced", .oldSessionNotFenced), ("freshNotCovered", .freshNotCovered),
        ("mergeNotDurable", .mergeNotDurable), ("mergeLosesBirth", .mergeLosesBirth),
        ("unmergedIsAnswered", .unmergedIsAnswered), ("spaceNotRecounted", .spaceNotRecounted),
        ("viewOutlivesChange", .viewOutlivesChange), ("hiddenNotDurable", .hiddenNotDurable),
        ("ackBeforeCAS", .ackBeforeCAS), ("ackBeforeInstall", .ackBeforeInstall),
        ("noEpochCheck", .noEpochCheck), ("installWithoutDrain", .installWithoutDrain),
        ("promoteWithoutRequiringJoiner", .promoteWithoutRequiringJoiner),
        ("promoteWithoutFlush", .promoteWithoutFlush), ("noIntervalLock", .noIntervalLock),
        ("dataBeforeActivate", .dataBeforeActivate),
        ("stableBeforeResolved", .stableBeforeResolved),
        ("drainWithoutFlush", .drainWithoutFlush), ("noRestamp", .noRestamp),
        ("skipResolution", .skipResolution), ("rebootedSource", .rebootedSource),
        ("retryFailedSync", .retryFailedSync), ("readFromJoiner", .readFromJoiner),
        ("inFlightRegionsNotCopied", .inFlightRegionsNotCopied),
        ("flushWithoutLog", .flushWithoutLog),
        ("inDoubtCASAssumedLost", .inDoubtCASAssumedLost), ("noJoinerLock", .noJoinerLock),
        ("readWithoutChecksum", .readWithoutChecksum), ("flushWithoutSync", .flushWithoutSync),
        ("flushWhileResolving", .flushWhileResolving),
        ("drainBeforeLogSync", .drainBeforeLogSync),
        ("noLeaseWait", .noLeaseWait),
        ("trimRoundedOutwards", .trimRoundedOutwards),
        ("timedOutWriteUnlocked", .timedOutWriteUnlocked),
        ("acceptRolledBackMember", .acceptRolledBackMember),
        ("reinstateUnproven", .reinstateUnproven), ("joinKept", .joinKept),
        ("removeLast", .removeLast), ("recordOlderIgnored", .recordOlderIgnored),
        ("equalEpochInstallAfterRestart", .equalEpochInstallAfterRestart),
        ("clientGenerationIgnored", .clientGenerationIgnored), ("claimUnheard", .claimUnheard),
        ("deltaIgnoresSourceBirth", .deltaIgnoresSourceBirth),
        ("lowerLayersNotCopied", .lowerLayersNotCopied),
        ("revertIgnored", .revertIgnored), ("revertForgotten", .revertForgotten),
        ("foldIgnored", .foldIgnored), ("sharedIsMerged", .sharedIsMerged),
        ("sharedBeforeDrained", .sharedBeforeDrained),
        ("sharedIsForgotten", .sharedIsForgotten), ("sharedIsChanged", .sharedIsChanged),
        ("stuckIsPunched", .stuckIsPunched), ("cloneLogAtZero", .cloneLogAtZero),
        ("sharedForEver", .sharedForEver),
        ("heldIsAcknowledged", .heldIsAcknowledged),
        ("scrubBelieves", .scrubBelieves), ("scrubTrustsFirst", .scrubTrustsFirst),
        ("snapshotBeforeFlush", .snapshotBeforeFlush), ("growthNotSynced", .growthNotSynced),
        ("sameEpochIsSameRecord", .sameEpochIsSameRecord),
        ("restartedReplicaForgetsLease", .restartedReplicaForgetsLease),
        ("noLeaseCheck", .noLeaseCheck), ("erroredWriteNotResolved", .erroredWriteNotResolved),
        ("snapshotWritesUnlayered", .snapshotWritesUnlayered),
        ("rolledBackJoinerByDelta", .rolledBackJoinerByDelta),
        ("passedWritesNotLeftOut", .passedWritesNotLeftOut),
        ("joinerKeepsRequests", .joinerKeepsRequests), ("noLeaseMargin", .noLeaseMargin),
        ("equalRegionKeepsBirth", .equalRegionKeepsBirth),
        ("damagedRecordIsGap", .damagedRecordIsGap),
    ]
}

extension MutationSet {
    /// A rule, and the suite of unit tests that misses it. Why seeds do not: docs/simulator.md.
    package typealias JudgedByTests = (name: String, mutation: MutationSet, suite: String)

    package static let judgedByTests: [JudgedByTests] = [
        ("deltaIgnoresJoinerLog", .deltaIgnoresJoinerLog, "EngineDeltaTests"),
        ("deltaIgnoresJoinerBirth", .deltaIgnoresJoinerBirth, "EngineDeltaTests"),
        ("rollBackNotRecorded", .rollBackNotRecorded, "EngineDeltaTests"),
        ("staleIsKept", .staleIsKept, "ReplicaStaleTests"),
        ("coveredRecordIsGap", .coveredRecordIsGap, "ReplicaLogDamageTests"),
        ("leavingIsRestamped", .leavingIsRestamped, "ReplicaBirthTests"),
        ("growthUnprepared", .growthUnprepared, "EngineResizeTests"),
    ]

    /// Every rule that can be switched off, each once, and what misses it; nil: seeds do.
    package static var all: [(name: String, mutation: MutationSet, judge: String?)] {
        let bySeeds = named.map { (name: $0.name, mutation: $0.mutation, judge: String?.none) }
        let byTests = judgedByTests.map {
            (name: $0.name, mutation: $0.mutation, judge: String?.some($0.suite))
        }
        let known = Set((bySeeds + byTests).map(\.name))
        let byReplay = crashReplay.filter { !known.contains($0.name) }.map {
            (name: $0.name, mutation: $0.mutation, judge: String?.some("crash-replay"))
        }
        return bySeeds + byTests + byReplay
    }
}
