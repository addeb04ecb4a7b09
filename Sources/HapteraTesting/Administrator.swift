import HapteraCore

// What an administrator does when a volume cannot help itself: accept a loss, salvage, rebuild the
// metadata store from the replicas.

extension World {
    /// Only members that lost power are reachable, and the engine refuses to guess.
    var isRefusing: Bool {
        guard let current = currentEngine, engines[current].isRunning else { return false }
        return engines[current].core.isRefusing
    }

    func acceptLoss() {
        guard let current = currentEngine, isRefusing else { return }
        note("the administrator accepts a loss")
        step(engines[current], .acceptLoss)
        deliverDisconnects()
    }

    func survey(_ host: SimulatedReplica) -> ReplicaSurvey? {
        guard
            let image = ReplicaImage(
                host.disk, isDurable: false, sizeBytes: workload.sizeBytes,
                record: trueRecord)
        else { return nil }
        var survey = ReplicaSurvey(
            member: .init(replica: host.id, incarnation: host.incarnation),
            promise: image.promise, installed: image.installed)
        survey.stable = host.core?.knownStable ?? .zero
        survey.isRebooted = host.isMarkedRebooted
        survey.activeRegions = UInt64(image.activeRegions.count)
        return survey
    }

    // MARK: The store

    /// The store's host is restored from a backup. The control plane starts again with it, so that
    /// an engine takes the volume over from the old record. The members of the true one are there
    /// to tell: were they not, nobody could know.
    func injectStoreRestore() {
        guard !store.isDown, trueHistory == nil, store.history.count > 2, network.isUnblocked,
            hosts.allSatisfy({
                !store.record.contains($0)
                    || $0.installed == store.record.epoch && $0.core != nil && $0.pausedUntil == 0
            })
        else { return }
        let count = random.between(1, min(4, store.history.count - 2))
        note("fault: the store is restored from an old copy, \(count) changes back")
        for engine in engines { killEngine(engine) }
        trueHistory = store.history
        store.forget(count)
        if options.mutations.contains(.sameEpochIsSameRecord) { changeRestoredStore(count) }
        startEngine(generation: generation)
        attach(to: engines[engines.count - 1])
    }

    /// 19, 29: an engine found a replica that knows more than the store. The record is found again
    /// on the replicas.
    func reconstructStore() {
        guard let history = trueHistory else { return }
        let surveys = hosts.compactMap(survey)
        guard let found = Reconstruction(surveys: surveys, known: hosts.map(\.id)) else {
            return fail("invariant 29: the replicas' records do not fit together")
        }
        var stands = history.count
        if found.verdict == .certain {
            let record = found.record(nonce: random.next())
            check(
                29,
                history.contains(record),
                "the record found on the replicas, e\(record.epoch.rawValue), never stood")
            guard failure == nil else { return }
            note("the store is reconstructed at e\(record.epoch.rawValue)")
            coverage.took(.reconstruction)
            stands = Int(record.epoch.rawValue - history[0].epoch.rawValue) + 1
        } else {
            note("the store cannot be reconstructed; a newer backup is found")
        }
        trueHistory = nil
        for engine in engines { killEngine(engine) }
        store.replaceHistory(Array(history.prefix(stands)))
        // An old record had not named them (seed 5051410).
        if !isChaos { discardLosers() }
        startEngine(generation: generation)
        attach(to: engines[engines.count - 1])
    }

    // MARK: Salvage

    /// The members will not come back in time; an absent replica is there. What it has is what the
    /// volume goes on with, and the losers keep their bytes.
    func injectSalvage() {
        let record = store.record
        guard trueHistory == nil, record.lineage.isEmpty, !store.isDown,
            let survivor = hosts.first(where: { host in
                !record.contains(host) && !host.isLossy && host.core != nil
                    && record.out.contains {
                        $0.member.replica == host.id && $0.member.incarnation == host.incarnation
                    }
            })
        else { return }
        let surveys = hosts.compactMap(survey)
        let plan = SalvagePlan(record: record, surveys: surveys)
        guard let choice = plan.choices.first(where: { $0.member.replica == survivor.id }),
            var next = choice.record
        else { return }
        note("fault: the members are lost; salvage from \(survivor.name)")
        for engine in engines { killEngine(engine) }
        for host in hosts where record.contains(host) {
            killReplica(host, restartAfter: random.between(5000, 9000))
        }
        loseClients()
        observeSalvage(survivor, since: choice.lostSince)
        next.nonce = random.next()
        store.append(next)
        observeRecord(next, before: record)
        history.append(.salvaged, step: timeline.step)
        promises.salvaged()
        reverts.pending?.before?.salvaged()
        forgetSnapshots()
        lastWrites = [:]
        startEngine(generation: generation)
    }

    /// 24: nothing is lost but what the plan said: regions that no member has written since the
    /// histories parted are whole.
    private func observeSalvage(_ survivor: SimulatedReplica, since: Epoch?) {
        guard let since,
            let image = ReplicaImage(
                survivor.disk, isDurable: false, sizeBytes: workload.sizeBytes,
                record: trueRecord)
        else { return }
        // As `inspect` counts them: what was written before and acknowledged since was active, and
        // is re-stamped.
        let members = hosts.filter { store.record.contains($0) }.compactMap {
            ReplicaImage(
                $0.disk, isDurable: false, sizeBytes: workload.sizeBytes,
                record: trueRecord)
        }
        compare(survivor, image, promises.acknowledged, 24, "lacks, beyond what was announced,") {
            let region = UInt64($0 / Geometry.blocksPerRegion)
            return members.allSatisfy { $0.birth(region) < since }
        }
    }

    /// The troubles are over: copies that lost in a salvage are given up.
    func discardLosers() {
        for departure in store.record.out where departure.isKept {
            guard let host = hosts.first(where: { $0.id == departure.member.replica }),
                host.incarnation == departure.member.incarnation
            else { continue }
            note("the administrator gives up the copy of \(host.name)")
            killReplica(host, restartAfter: 10)
            host.disk.replace()
            loseLinks(host)
            host.replaced(incarnation: Incarnation(rawValue: random.next() | 1))
            loseDirectory(host)
            createReplica(host)
        }
    }
}
