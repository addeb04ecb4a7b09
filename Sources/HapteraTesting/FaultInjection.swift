import HapteraCore

extension World {
    func nextFault() {
        guard isChaos else { return }
        timeline.schedule(
            after: milliseconds(random.between(20, faults.pauseMillisecondsMax)), .fault)
        inject(random.pick(faults.kinds))
    }

    /// Moments that decide: what fails right then finds what nothing else does.
    enum Stage {
        /// A change of the record has been asked for.
        case recordChange
        /// A takeover begins to make the members equal.
        case resolving
        /// The filling of a joiner begins.
        case copying
    }
    func stageChanged(_ stage: Stage) {
        if stage == .copying, options.mutations.contains(.rollBackNotRecorded) {
            // The next engine goes on with the joiner, when some of it has been filled.
            return timeline.schedule(after: milliseconds(random.between(1, 80)), .stageFault)
        }
        guard isChaos, random.permille(faults.stageFaultPermille) else { return }
        // A first write to a region is what a delta begun now must not miss.
        let isWrite = stage == .recordChange && random.permille(500)
        timeline.schedule(
            after: random.delay(microseconds: 1, 8000),
            isWrite ? .freshWrite : .stageFault)
    }
    func stageFault() {
        guard isChaos else { return }
        let isJudged = options.mutations.contains(.rollBackNotRecorded)
        inject(isJudged ? .engineCrash : random.pick(faults.kinds))
    }

    private func inject(_ kind: FaultPlan.Kind) {
        // While the store is wrong nothing else happens: who could tell must be there.
        guard !isSpared, maySuffer(kind) else { return }
        coverage.injected(kind)
        let host = random.pick(hosts)
        let downtime = random.permille(500) ? random.between(1, 400) : random.between(400, 9000)
        switch kind {
        case .killReplica:
            guard host.core != nil, !isKeeper(host) else { return }
            note("fault: kill -9 \(host.name)")
            killReplica(host, restartAfter: downtime)
            killBeside(host)
        case .killAllReplicas:
            note("fault: kill -9 of every replica")
            for host in hosts where host.core != nil && !isKeeper(host) {
                killReplica(host, restartAfter: random.between(1, 3000))
            }
        case .cutPower: injectPowerCut(host, downtime)
        case .cutConnection: injectCut(host)
        case .pauseReplica, .pauseEngine: injectPause(kind, host)
        case .clogLink:
            let toReplica = random.permille(500)
            let until =
                timeline.now + milliseconds(random.between(10, random.pick([600, 6000, 30_000])))
            let engine = random.permille(700) ? currentEngine : nil
            guard !isKeeper(host) else { return }
            note("fault: link \(toReplica ? "to" : "from") \(host.name) is clogged")
            network.block(engine: engine, replica: host.index, toReplica: toReplica, until: until)
        case .isolateReplica:
            guard !isKeeper(host) else { return }
            let until = timeline.now + milliseconds(random.between(100, 9000))
            note("fault: \(host.name) is isolated")
            for toReplica in [false, true] {
                network.block(
                    engine: nil, replica: host.index, toReplica: toReplica, until: until)
            }
        case .flapLink:
            guard !isKeeper(host) else { return }
            note("fault: link of \(host.name) flaps")
            flap(host, left: random.between(3, 20))
        case .slowDisk, .diskOutliers, .badDisk, .fullDisk: injectDiskTrouble(kind, host)
        case .fullDisks:
            note("fault: every disk is full")
            for host in hosts {
                host.disk.trouble.fill(depth.fullness)
                timeline.schedule(
                    after: milliseconds(random.between(20, 4000)),
                    .relief(.disk(replica: host.index)))
            }
        case .lostWrite, .misdirectedWrite:
            guard host.index != keeper, isKeeperThere else { return }
            note("fault: \(kind) at \(host.name)")
            host.disk.trouble.misdoing = kind == .lostWrite ? .lose : .misdirect
        case .replaceReplica: injectReplacement(host, downtime)
        case .restoreReplica: injectRestore(host, downtime)
        case .cutClients: cutClients()
        case .restoreStore: injectStoreRestore()
        case .acceptLoss: acceptLoss()
        case .salvage: injectSalvage()
        case .storePartition: injectStorePartition()
        case .engineCrash, .clientCrash, .takeover: injectEngineTrouble(kind)
        case .storeOutage:
            note("fault: the store is down")
            store.setDown(true)
            timeline.schedule(after: milliseconds(random.between(50, 8000)), .relief(.store))
        case .blackout: injectBlackout()
        case .rot: injectRot()
        case .rotTable, .rotLog, .rotManifest: injectFileRot(kind)
        }
    }

    /// With rot about, one replica is spared, so that every block has a good copy in the set.
    private func isKeeper(_ host: SimulatedReplica) -> Bool { faults.rot && host.index == keeper }

    /// Power may be cut where another member keeps its memory and its disk.
    private func injectPowerCut(_ host: SimulatedReplica, _ downtime: Int) {
        guard mayLosePower(host) else { return }
        note("fault: power cut of \(host.name)")
        let isEngineCut = faults.cutsPowerOfEngines
        killReplica(host, restartAfter: isEngineCut ? random.between(1, 100) : downtime)
        cutPower(host)
        noteLoss()
        if isEngineCut || random.permille(200), let current = currentEngine {
            // The engine, and perhaps its clients, lived on the same host.
            restartEngine(losesClients: !isEngineCut && random.permille(500), after: current)
        }
    }

    /// Whether another member has all its memory and a working disk: then this host may lose both.
    func isSpareable(_ host: SimulatedReplica) -> Bool {
        !store.record.contains(host)
            || hosts.contains {
                $0 !== host && store.record.contains($0) && !$0.isLossy && $0.core != nil
                    && $0.disk.trouble.writeErrors == 0 && $0.disk.trouble.syncErrors == 0
            }
    }

    private func injectPause(_ kind: FaultPlan.Kind, _ host: SimulatedReplica) {
        let until =
            timeline.now + milliseconds(random.between(1, random.pick([100, 1000, 9000])))
        if kind == .pauseReplica {
            guard host.core != nil, host.pausedUntil == 0, !isKeeper(host) else { return }
            note("fault: \(host.name) is stopped")
            host.pause(until: until)
            timeline.schedule(at: until, .relief(.replica(host.index)))
        } else if let engine = currentEngine.map({ engines[$0] }) {
            guard engine.isRunning, engine.pausedUntil == 0 else { return }
            note("fault: \(engine.name) is stopped")
            engine.pausedUntil = until
            timeline.schedule(at: until, .relief(.engine(engine.index)))
        }
    }
    func resume(_ engine: SimulatedEngine) {
        engine.pausedUntil = 0
        submitUnsent(engine)
    }

    private func flap(_ host: SimulatedReplica, left: Int) {
        guard isChaos, left > 0 else { return }
        let engine = random.permille(700) ? currentEngine : nil
        let both = random.permille(400)
        let toReplica = random.permille(500)
        let broken = milliseconds(random.between(5, 600))
        for direction in [false, true] where both || direction == toReplica {
            network.block(
                engine: engine, replica: host.index, toReplica: direction,
                until: timeline.now + broken)
        }
        timeline.schedule(
            after: broken + milliseconds(random.between(1, 600)),
            .relief(.flap(replica: host.index, left: left - 1)))
    }

    private func injectStorePartition() {
        guard let current = currentEngine else { return }
        let direction = random.below(3)
        note("fault: \(engines[current].name) and the store are cut off")
        store.cutOff(
            engine: current, requests: direction != 0, replies: direction != 1,
            until: timeline.now + milliseconds(random.between(50, 8000)))
    }

    /// Whether the record may come to name the copy without another word from it: it is asked for,
    /// or is about to be, or the change is still on its way (seed 610917).
    private func mayBecomeMember(_ host: SimulatedReplica) -> Bool {
        let record = store.record
        return engines.contains { engine in
            if let next = engine.proposal, next.epoch > record.epoch, next.contains(host) {
                return true
            }
            return engine.isAlive && engine.core.mayPromote
                && engine.core.record?.joining?.replica == host.id
        }
    }

    /// The replica's disk is replaced: of a member only while all else is well. Were another one
    /// being removed, the record could come to name the empty disk alone.
    private func injectReplacement(_ host: SimulatedReplica, _ downtime: Int) {
        if store.record.contains(host) {
            let isCalm =
                hosts.count > 1 && !network.isBlocked && engines.allSatisfy { $0.pausedUntil == 0 }
                && hosts.allSatisfy {
                    store.record.contains($0) && !$0.isLossy && $0.core != nil
                        && $0.pausedUntil == 0 && $0.disk.trouble.isNone
                }
                && currentEngine.map { engines[$0].isServing && engines[$0].isSettled } ?? false
            guard isCalm else { return }
            // Until the engine has noticed.
            calmUntil = timeline.now + milliseconds(1000)
        } else if mayBecomeMember(host) {
            return
        }
        note("fault: the disk of \(host.name) is replaced")
        killReplica(host, restartAfter: downtime)
        host.disk.replace()
        loseLinks(host)
        host.replaced(incarnation: Incarnation(rawValue: random.next() | 1))
        loseDirectory(host)
        createReplica(host)
        noteLoss()
    }

    /// A backup is made, or put back. A copy that no flush came after, marked as everybody knows,
    /// is not to be told from one that lost power; and only a replica that every member knows to
    /// have left is treated so.
    private func injectRestore(_ host: SimulatedReplica, _ downtime: Int) {
        guard let backup = host.backup, random.permille(700) else {
            guard host.core != nil, host.disk.operationsInFlight == 0 else { return }
            note("a backup is made of \(host.name)")
            return host.takeBackup()
        }
        let record = store.record
        if record.contains(host) { return restoreMember(host) }
        let departure = record.out.first { $0.member.replica == host.id }
        guard let departure, record.joining?.replica != host.id, !mayBecomeMember(host),
            host.backupFlushed < departure.stablePoint || departure.reason == .rolledBack,
            hosts.allSatisfy({ !record.contains($0) || $0.installed >= departure.leftEpoch }),
            // Before, the takeover under way may take it back.
            acknowledgedEpoch >= departure.leftEpoch
        else { return }
        note("fault: the backup of \(host.name) is put back")
        killReplica(host, restartAfter: downtime)
        host.disk.restore(backup)
        host.replaced()
    }

    private func injectCut(_ host: SimulatedReplica) {
        guard let current = currentEngine, !isKeeper(host) else { return }
        for connection in engines[current].connections {
            if let connection, connection.replica == host.index {
                note("fault: connection to \(host.name) breaks")
                network.cut(connection)
            }
        }
    }

    private func injectDiskTrouble(_ kind: FaultPlan.Kind, _ host: SimulatedReplica) {
        guard !isKeeper(host) else { return }
        var duration = milliseconds(random.between(20, 4000))
        switch kind {
        case .diskOutliers:
            host.disk.trouble.outliers = random.pick([5, 40])
            note("fault: disk of \(host.name) stalls now and then")
        case .slowDisk:
            host.disk.trouble.slowness = random.pick([5, 50, 400])
            // Long enough, at times, for the engine to have had enough of it.
            if random.permille(250) { duration = milliseconds(random.between(6000, 15_000)) }
            note("fault: disk of \(host.name) is slow")
        case .fullDisk:
            // Never on every disk: then the volume is full, and that is no fault.
            guard !hosts.contains(where: { $0.disk.trouble.isFull }) else { return }
            host.disk.trouble.fill(depth.fullness)
            note("fault: disk of \(host.name) is full")
        default:
            guard store.record.contains(host), mayLosePower(host) else { return }
            switch random.below(3) {
            case 0: host.disk.trouble.readErrors = random.pick([20, 500])
            case 1: host.disk.trouble.writeErrors = random.pick([20, 500])
            default: host.disk.trouble.syncErrors = random.pick([200, 1000])
            }
            note("fault: disk of \(host.name) fails")
        }
        timeline.schedule(after: duration, .relief(.disk(replica: host.index)))
    }

    private func injectEngineTrouble(_ kind: FaultPlan.Kind) {
        guard let current = currentEngine else { return }
        switch kind {
        case .engineCrash: restartEngine(losesClients: false, after: current)
        case .clientCrash: restartEngine(losesClients: true, after: current)
        default:
            note("fault: takeover while \(engines[current].name) lives")
            // One that has not claimed the volume yet would do so later, with requests that its
            // clients have taken elsewhere: the node ends it before it starts another.
            if !engines[current].hasServed { killEngine(engines[current]) }
            if !options.mutations.isDisjoint(with: .rulesOfDivision) {
                divide(current)
            } else if random.permille(400) {
                // The old engine keeps one replica for itself for a while.
                let kept = random.pick(hosts)
                for host in hosts where host !== kept && !isKeeper(host) {
                    network.block(
                        engine: current, replica: host.index, toReplica: random.permille(500),
                        until: timeline.now + milliseconds(random.between(100, 6000)))
                }
                if random.permille(500), !isKeeper(kept) {
                    // And the new one cannot reach it: only leases keep the old one from reading.
                    for toReplica in [false, true] {
                        network.block(
                            engine: engines.count, replica: kept.index, toReplica: toReplica,
                            until: timeline.now + milliseconds(random.between(1000, 9000)))
                    }
                    // The others do not know what leases they gave.
                    for host in hosts where host !== kept && host.core != nil && !isKeeper(host) {
                        if random.permille(200) {
                            killReplica(host, restartAfter: random.between(1, 50))
                        }
                    }
                }
            }
            startEngine(generation: generation)
            attach(to: engines[engines.count - 1])
        }
    }

    /// The engine dies; another one starts, for the same clients or for new ones.
    func restartEngine(losesClients: Bool, after current: Int) {
        killEngine(engines[current])
        if losesClients { loseClients() }
        startEngine(generation: generation)
        attach(to: engines[engines.count - 1])
    }

    /// Every host loses power at once.
    private func injectBlackout() {
        note("fault: blackout")
        for host in hosts {
            killReplica(host, restartAfter: random.between(100, 3000))
            cutPower(host)
        }
        beginAnew()
        sibling?.beginAnew()
    }
    /// Engines and clients were struck as well.
    private func beginAnew() {
        noteLoss()
        for engine in engines { killEngine(engine) }
        loseClients()
        startEngine(generation: generation)
    }

    /// One bit of one stored block flips, where another member holds the block intact.
    private func injectRot() {
        let victims = hosts.filter { $0.index != keeper }
        guard !victims.isEmpty else { return }
        let host = random.pick(victims)
        guard store.record.contains(host), isKeeperThere,
            let layer = host.core.map({ random.pick($0.layers) }),
            let file = host.disk.file(.data(layer))
        else { return }
        let cluster = random.pick(workload.clusters)
        let block = Int(cluster.lowerBound) + random.below(cluster.count)
        guard block < file.allocated.count, file.allocated[block] else { return }
        note("fault: block \(block) of \(host.name) rots")
        file.rot(
            byte: block * Geometry.blockSize + random.below(Geometry.blockSize),
            bit: random.below(8))
    }

    func relieve(_ relief: Relief) {
        switch relief {
        case .disk(let index): hosts[index].disk.trouble = DiskTrouble()
        case .store: store.setDown(false)
        case .record: reconstructStore()
        case .clients(let index): reconnectClients(engines[index])
        case .replica(let index): resume(hosts[index])
        case .engine(let index): resume(engines[index])
        case .flap(let index, let left): flap(hosts[index], left: left)
        }
    }
}
