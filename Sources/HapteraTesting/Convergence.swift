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
        store.reconnectAll()
        for engine in engines where engine.pausedUntil > 0 { resume(engine) }
        for host in hosts {
            if host.pausedUntil > 0 { resume(host) }
            host.disk.trouble = DiskTrouble()
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
    var isWhole: Bool {
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
            && hosts.allSatisfy { store.record.contains($0) && !$0.isRolledBack }
            && unanswered.isEmpty
            && engine.core.unresolvedCount == 0
            && areLayersMerged
    }

    var why: String {
        guard let current = currentEngine else { return "no engine" }
        return
            "\(engines[current].name) \(engines[current].core.phase), \(names(store.record)),"
            + " \(unanswered.count) unanswered"
            + hosts.compactMap { host in
                host.core.map { core in
                    core.retiredLayerCount == 0 ? "" : ", \(host.name): \(core.mergeText)"
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

    /// Troubles end for both; then one is judged and deleted, and the other judged without it.
    func end() {
        giveUpMaking()
        var volumes = [self, second].compactMap { $0 }.filter { !$0.isGone }
        if volumes.count > 1, clones.random.permille(500) { volumes.reverse() }
        for volume in volumes where failure == nil { volume.heal() }
        for volume in volumes where failure == nil { volume.converge() }
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
