import HapteraCore

extension World {
    /// Everything runs, nothing is being changed, nobody has lost anything.
    private var isCalm: Bool {
        guard let current = currentEngine, timeline.now >= calmUntil else { return false }
        return engines[current].isServing && engines[current].isSettled && !network.isBlocked
            && !store.isDown && engines.allSatisfy { $0.pausedUntil == 0 }
            && hosts.allSatisfy {
                $0.core != nil && $0.pausedUntil == 0 && $0.disk.trouble.isNone
                    && (!store.record.contains($0)
                        || !$0.isLossy && $0.installed == store.record.epoch)
            }
    }

    /// Trap 18, of a member: engine and replica are away for a moment, and the replica's directory
    /// comes back as it was some time ago. Its peers know that it had flushed more, or the record
    /// that it had promised more.
    func restoreMember(_ host: SimulatedReplica) {
        guard isCalm, !faults.rot, let backup = host.backup, let current = currentEngine,
            host.disk.operationsInFlight == 0
        else { return }
        let peers = hosts.filter { $0 !== host && store.record.contains($0) }
        let known = peers.compactMap { $0.core?.knownStable }.max() ?? .zero
        // With no other member it would be what there is: a loss that only its owner can accept.
        // Nor would the engine hear of it from a peer that is deaf until it is given up: its disk
        // owes an Install's sync for longer than that (seed 1011444).
        guard !peers.isEmpty, peers.allSatisfy({ $0.disk.operationsInFlight == 0 }),
            host.backupFlushed < known || host.backupPromise < store.record.promised
        else { return }
        note("fault: \(host.name), a member, is put back as it was")
        killReplica(host, restartAfter: 1)
        host.disk.restore(backup)
        host.replaced()
        host.isRolledBack = true
        calmUntil = timeline.now + milliseconds(6000)
        restartEngine(losesClients: false, after: current)
    }
}
