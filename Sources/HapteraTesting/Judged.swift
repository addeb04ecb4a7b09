import HapteraCore

// What worlds have in which a rule is off that nobody would miss otherwise, besides the faults of
// `FaultPlan.needs`. Worlds that keep every rule do not depend on any of it.

extension MutationSet {
    /// Missed only while an engine that was superseded does not know.
    static let rulesOfDivision: MutationSet = [
        .noLeaseCheck, .noLeaseMargin, .restartedReplicaForgetsLease,
    ]
    /// Missed only where some regions are written while others are not.
    static let rulesOfManyRegions: MutationSet = [
        .passedWritesNotLeftOut, .snapshotWritesUnlayered, .rolledBackJoinerByDelta,
        .rollBackNotRecorded, .deltaIgnoresJoinerBirth, .equalRegionKeepsBirth,
    ]
    /// Missed only while some regions are made equal, or filled, and others are not yet.
    static let rulesOfSlowFilling: MutationSet = [.stableBeforeResolved, .rollBackNotRecorded]
    static let rulesOfGrowth: MutationSet = [.growthNotSynced, .growthUnprepared]
}

extension Workload {
    mutating func suit(_ mutations: MutationSet) {
        if !mutations.isDisjoint(with: [.passedWritesNotLeftOut, .snapshotWritesUnlayered]) {
            // More regions at once than the log holds, and flushes beside them.
            (workers, depth, readPermille, flushPermille) = (4, 2, 200, 100)
        }
        if mutations.contains(.rollBackNotRecorded) { flushPermille = 200 }
        if mutations.contains(.erroredWriteNotResolved) { trimPermille = 300 }
        if mutations.contains(.equalRegionKeepsBirth) {
            // What is written is zero again when somebody comes back.
            (trimPermille, readPermille) = (600, 200)
        }
        if mutations.contains(.snapshotWritesUnlayered) {
            (snapshotsMax, snapshotPauseMilliseconds, deletionPermille) = (30, 200, 400)
        }
        if mutations.contains(.snapshotBeforeFlush) { snapshotsMax = 5 }
    }
}

extension World {
    /// A takeover that nothing but leases makes safe: the engine before keeps one replica, which
    /// the next cannot reach, and hears neither of the others nor of the store.
    func divide(_ old: Int) {
        let kept = random.pick(hosts)
        let until = timeline.now + milliseconds(random.between(4000, 9000))
        store.cutOff(engine: old, requests: true, replies: true, until: until)
        for host in hosts {
            for toReplica in [false, true] {
                network.block(
                    engine: host === kept ? engines.count : old, replica: host.index,
                    toReplica: toReplica, until: until)
            }
            // The others do not know what leases they gave.
            if options.mutations.contains(.restartedReplicaForgetsLease), host !== kept {
                killReplica(host, restartAfter: random.between(1, 50))
            }
        }
    }

    /// The store that was put back was changed before anybody asked it, as often as it had been
    /// before: it has come to the epoch that the replicas know, by another record.
    func changeRestoredStore(_ count: Int) {
        for _ in 0..<count {
            var next = store.record
            next.epoch = next.epoch.next
            next.nonce = random.next()
            next.change = .administration
            store.append(next)
        }
    }
}
