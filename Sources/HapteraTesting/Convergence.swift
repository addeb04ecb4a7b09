import HapteraCore

// The end of every run: troubles stop, and everything must come right in bounded time.

extension World {
    /// Simulated seconds within which a healed volume must be whole again (invariant 31).
    static let convergenceSeconds = 120
    /// Simulated seconds within which the last requests are answered without the store (28).
    static let storelessSeconds = 30

    func converge() {
        coverage.evaluated(31)
        if run(seconds: Self.convergenceSeconds, until: { isWhole }) { return }
        guard failure == nil else { return }
        if isLossPossible {
            // Only copies that lost power are left, and the clients might notice: the engine is
            // right to refuse until somebody decides. Here the clients give up.
            if random.permille(500) {
                // What one acceptance started may end in another refusal: a member that comes
                // late can be one more that lost power.
                for _ in 0..<3 {
                    acceptLoss()
                    if run(seconds: Self.convergenceSeconds, until: { isWhole }) { return }
                    guard failure == nil, isRefusing else { break }
                }
            } else {
                note("the volume refuses; the clients are replaced")
                for engine in engines { killEngine(engine) }
                loseClients()
                startEngine(generation: generation)
            }
            if run(seconds: Self.convergenceSeconds, until: { isWhole }) { return }
        }
        guard failure == nil else { return }
        fail("invariant 31: not whole \(Self.convergenceSeconds) s after the last trouble: \(why)")
    }

    func heal() {
        note("troubles end")
        network.unblockAll()
        network.corruptionPermille = 0
        store.setDown(false)
        store.requestLoss = 0
        store.replyLoss = 0
        store.lateArrival = 0
        store.duplicates = 0
        store.refusals = nil
        store.reconnectAll()
        for engine in engines where engine.pausedUntil > 0 { resume(engine) }
        for host in hosts {
            if host.pausedUntil > 0 { resume(host) }
            host.disk.trouble = DiskTrouble()
            // Else one that began to stall before goes on beyond a removal deadline, and a volume's
            // only replica is gone while the client detaches (seed 5903512).
            for id in host.disk.idsInFlight {
                timeline.schedule(
                    after: milliseconds(1),
                    .disk(replica: host.index, process: host.process, operation: id))
            }
            if host.core == nil {
                timeline.schedule(after: milliseconds(1), .startReplica(host.index))
            }
        }
        discardLosers()
        if currentEngine.map({ !engines[$0].isRunning }) ?? true {
            startEngine(generation: generation)
            attach(to: engines[engines.count - 1])
        }
    }

    /// The current engine serves, every replica is in sync, nothing is unanswered.
    var isWhole: Bool { isWhole(without: nil) && areLayersMerged }

    /// The same of all replicas but one, which has left.
    private func isWhole(without absent: Int?) -> Bool {
        guard let current = currentEngine else { return false }
        let engine = engines[current]
        if !engine.isRunning {
            // Until the store is right again nobody starts one.
            if trueHistory != nil {
                if engine.core.stopReason == .recordOlderThanReplica { reconstructStore() }
                return false
            }
            // The node starts an engine that stopped again.
            startEngine(generation: generation)
            attach(to: engines[engines.count - 1])
            return false
        }
        if reverts.pending != nil { return false }
        if store.record.size < workload.sizeBytes {
            grow(engine)
            return false
        }
        return engine.isServing && engine.isSettled && store.record.engine == engine.instance
            && hosts.allSatisfy {
                $0.index == absent
                    ? !store.record.contains($0) : store.record.contains($0) && !$0.isRolledBack
            }
            && unanswered.isEmpty
            && engine.core.unresolvedCount == 0
    }

    var why: String {
        guard let current = currentEngine else { return "no engine" }
        return
            "\(engines[current].name) \(engines[current].core.phase), \(names(store.record)),"
            + " \(unanswered.count) unanswered"
            + hosts.compactMap { host in
                host.core.map { core in
                    core.unmergedLayerCount == 0 ? "" : ", \(host.name): \(core.mergeText)"
                }
            }.joined()
    }

    /// Reads everything that was ever used, flushes, detaches in order, and looks at the disks.
    func finish() {
        guard let current = currentEngine else { return }
        let engine = engines[current]
        if hosts.contains(where: { $0.core.map { $0.layers != $0.layerFiles } ?? false }) {
            coverage.took(.mergeDown)
        }
        if hosts.contains(where: { $0.core?.isLayerStaying ?? false }) {
            coverage.took(.layerStays)
        }
        if hosts.contains(where: { $0.core?.hiddenRegions ?? 0 > 0 }) { coverage.took(.hidden) }
        scrubAtEnd(engine)
        guard failure == nil else { return }
        note("the store is down")
        store.setDown(true)
        for sector in hotSectors where sector % Content.sectorsPerBlock == 0 {
            let offset = UInt64(sector * Content.sectorSize)
            submit(newOperation((.read, [], offset, Geometry.blockSize), worker: 0), to: engine)
        }
        submit(newOperation((.flush, [], 0, 0), worker: 0), to: engine)
        // 28: nothing that clients do needs the store, unless a member fails after all.
        let epoch = engine.core.epoch
        for left in (0...40).reversed() {
            let isDone = run(seconds: Self.storelessSeconds) {
                unanswered.isEmpty || engine.proposal.map { $0.epoch > epoch } ?? false
            }
            check(28, isDone, "requests wait for the store: \(why)")
            guard isDone, unanswered.isEmpty, left > 0 else { break }
            submit(newOperation(workload.draw(random), worker: 0), to: engine)
        }
        store.setDown(false)
        guard run(seconds: Self.convergenceSeconds, until: { unanswered.isEmpty && isWhole }) else {
            return fail("invariant 31: the last requests are not answered: \(why)")
        }
        guard failure == nil else { return }
        step(engine, .detach)
        guard run(seconds: 60, until: { engine.core.phase == .stopped }) else {
            return fail("invariant 31: the volume does not detach: \(why)")
        }
        guard engine.core.stopReason == .detached else {
            return fail("detach ended with: \(engine.core.stopReason?.rawValue ?? "nothing")")
        }
        if !store.record.isClean { fail("detached, but the record is not clean") }
        auditAtRest()
        guard failure == nil else { return }
        checkSizes()
        for engine in engines where engine.isAlive && engine.core.phase == .stopped {
            check(
                32, engine.attempts.allSatisfy { $0.completions == 1 },
                "\(engine.name) has left requests unanswered")
        }
        if engine.pool.inUse != engine.core.ownBuffers {
            fail("\(engine.name) keeps \(engine.pool.inUse - engine.core.ownBuffers) buffers")
        }
    }

    // MARK: All but one

    /// In half of the worlds a host is dead, or cut off, for a while longer. A volume that has a
    /// good copy elsewhere must not wait for it.
    private func serveWithoutOne(_ volumes: [World]) {
        let draw = RandomSource(seed: RandomSource.mix(seed ^ 0x4845_414C))
        let index = draw.below(hosts.count)
        guard draw.permille(500), volumes.allSatisfy({ $0.canDoWithout(index) }) else { return }
        let isCutOff = draw.permille(400)
        for volume in volumes { volume.leaveOut(index, isCutOff: isCutOff) }
        for volume in volumes where failure == nil { volume.convergeWithout(index) }
        for volume in volumes { volume.takeBack(index) }
    }

    /// Another member, that has everything, is enough to serve, and no change under way may take
    /// it away.
    private func canDoWithout(_ index: Int) -> Bool {
        trueHistory == nil && !isSpared && !isLossPossible && !(faults.rot && index == keeper)
            && isServable(without: index) && engines.allSatisfy { !$0.isAlive || $0.isSettled }
    }
    private func isServable(without index: Int) -> Bool {
        let others = hosts.filter { $0.index != index && store.record.contains($0) }
        // One that was made equal may not have been told so before it restarted (seed 5011157).
        return others.count >= leases.minInSync
            && others.contains { !$0.isLossy && !$0.isMarkedRebooted }
    }

    private func leaveOut(_ index: Int, isCutOff: Bool) {
        let host = hosts[index]
        note("\(host.name) is still \(isCutOff ? "cut off" : "dead")")
        guard !isCutOff else {
            let until = timeline.now + 2 * UInt64(Self.convergenceSeconds) * 1_000_000_000
            for toReplica in [false, true] {
                network.block(engine: nil, replica: index, toReplica: toReplica, until: until)
            }
            return
        }
        host.isAbsent = true
        killReplica(host, restartAfter: nil)
    }

    private func convergeWithout(_ index: Int) {
        coverage.evaluated(31)
        if run(seconds: Self.convergenceSeconds, until: { isWhole(without: index) }) {
            return coverage.took(.servedWithoutOne)
        }
        guard failure == nil, isServable(without: index), !isLossPossible else { return }
        fail(
            "invariant 31: not served without \(hosts[index].name)"
                + " \(Self.convergenceSeconds) s after the last trouble of the others: \(why)")
    }

    private func takeBack(_ index: Int) {
        note("\(hosts[index].name) comes back")
        network.unblockAll()
        hosts[index].isAbsent = false
        if hosts[index].core == nil {
            timeline.schedule(after: milliseconds(1), .startReplica(index))
        }
    }

    /// Troubles end for both; then one is judged and deleted, and the other judged without it.
    func end() {
        for volume in volumes { volume.giveUpMaking() }
        var volumes = volumes.filter { !$0.isGone }
        if volumes.count > 1, clones.random.permille(500) { volumes.reverse() }
        for volume in volumes where failure == nil { volume.heal() }
        if failure == nil { serveWithoutOne(volumes) }
        for volume in volumes where failure == nil { volume.converge() }
        for engine in volumes.flatMap(\.engines) where engine.core.hedgedReads > 0 {
            coverage.took(.hedgedRead)
        }
        for (index, volume) in volumes.enumerated() where failure == nil {
            if index > 0 {
                volumes[0].deleteVolume()
                guard volume.run(seconds: Self.convergenceSeconds, until: { volume.isWhole })
                else {
                    return volume.fail("invariant 31: not whole without the other: \(volume.why)")
                }
            }
            volume.finish()
        }
    }
}
