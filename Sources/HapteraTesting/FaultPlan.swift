import HapteraCore

/// Which troubles a seed draws. A few at a time find more than all together (swarm testing): what
/// is switched off here cannot mask what is on.
struct FaultPlan {
    enum Kind: CaseIterable {
        case killReplica
        case killAllReplicas
        case cutPower
        case cutConnection
        case clogLink
        case isolateReplica
        case slowDisk
        case badDisk
        case fullDisk
        case engineCrash
        case clientCrash
        case takeover
        case storeOutage
        case blackout
        case rot
    }
    private(set) var kinds: [Kind] = []
    let pauseMillisecondsMax: Int
    let cutsDuringOpen: Bool
    let corruptsFrames: Bool

    var diskErrors: Bool { kinds.contains(.badDisk) }
    var noSpace: Bool { kinds.contains(.fullDisk) }
    var rot: Bool { kinds.contains(.rot) }

    init(random: RandomSource) {
        for kind in Kind.allCases {
            let chance: Int
            switch kind {
            case .blackout: chance = 150
            case .badDisk, .fullDisk, .rot: chance = 200
            default: chance = 400
            }
            if random.permille(chance) { kinds.append(kind) }
        }
        if kinds.contains(.rot) {
            // Rot needs a second good copy at all times: nothing else may take it away.
            kinds.removeAll { [.cutPower, .blackout, .badDisk, .fullDisk].contains($0) }
        }
        if kinds.isEmpty { kinds = [.killReplica] }
        pauseMillisecondsMax = random.pick([300, 1500, 5000])
        cutsDuringOpen = random.permille(300)
        corruptsFrames = !kinds.contains(.rot) && random.permille(200)
    }
}

extension World {
    func nextFault() {
        guard isChaos else { return }
        timeline.schedule(
            after: milliseconds(random.between(20, faults.pauseMillisecondsMax)), .fault)
        inject(random.pick(faults.kinds))
    }

    private func inject(_ kind: FaultPlan.Kind) {
        let host = random.pick(hosts)
        let downtime = random.permille(500) ? random.between(1, 400) : random.between(400, 9000)
        switch kind {
        case .killReplica:
            guard host.core != nil, !isKeeper(host) else { return }
            note("fault: kill -9 \(host.name)")
            killReplica(host, restartAfter: downtime)
        case .killAllReplicas:
            note("fault: kill -9 of every replica")
            for host in hosts where host.core != nil && !isKeeper(host) {
                killReplica(host, restartAfter: random.between(1, 3000))
            }
        case .cutPower: injectPowerCut(host, downtime)
        case .cutConnection: injectCut(host)
        case .clogLink:
            let toReplica = random.permille(500)
            let until = timeline.now + milliseconds(random.between(10, 6000))
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
        case .slowDisk, .badDisk, .fullDisk: injectDiskTrouble(kind, host)
        case .engineCrash, .clientCrash, .takeover: injectEngineTrouble(kind)
        case .storeOutage:
            note("fault: the store is down")
            store.setDown(true)
            timeline.schedule(after: milliseconds(random.between(50, 8000)), .relief(.store))
        case .blackout: injectBlackout()
        case .rot: injectRot()
        }
    }

    /// With rot about, one replica is spared, so that every block has a good copy in the set.
    private func isKeeper(_ host: SimulatedReplica) -> Bool { faults.rot && host.index == keeper }

    /// Power may be cut where another member keeps its memory and its disk.
    private func injectPowerCut(_ host: SimulatedReplica, _ downtime: Int) {
        let others = hosts.filter {
            $0 !== host && store.record.contains($0.id) && !$0.isLossy && $0.core != nil
        }
        guard !others.isEmpty || !store.record.contains(host.id) else { return }
        note("fault: power cut of \(host.name)")
        killReplica(host, restartAfter: downtime)
        cutPower(host)
        noteLoss()
        if random.permille(200), let current = currentEngine {
            // The engine, and perhaps its clients, lived on the same host.
            restartEngine(losesClients: random.permille(500), after: current)
        }
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
        let duration = milliseconds(random.between(20, 4000))
        switch kind {
        case .slowDisk:
            host.disk.trouble.slowness = random.pick([5, 50, 400])
            note("fault: disk of \(host.name) is slow")
        case .fullDisk:
            // Never on every disk: then the volume is full, and that is no fault.
            guard !hosts.contains(where: { $0.disk.trouble.isFull }) else { return }
            host.disk.trouble.isFull = true
            note("fault: disk of \(host.name) is full")
        default:
            guard
                hosts.contains(where: {
                    $0 !== host && store.record.contains($0.id) && !$0.isLossy && $0.core != nil
                        && $0.disk.trouble.writeErrors == 0 && $0.disk.trouble.syncErrors == 0
                })
            else { return }
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
            if random.permille(400) {
                // The old engine keeps one replica for itself for a while.
                let kept = random.pick(hosts)
                for host in hosts where host !== kept && !isKeeper(host) {
                    network.block(
                        engine: current, replica: host.index, toReplica: random.permille(500),
                        until: timeline.now + milliseconds(random.between(100, 6000)))
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
        guard store.record.contains(host.id), store.record.contains(hosts[keeper].id),
            let file = host.disk.file(.data(LayerID(rawValue: 1)))
        else { return }
        let cluster = random.pick(workload.clusters)
        let block = Int(cluster.lowerBound) + random.below(cluster.count)
        guard file.allocated[block] else { return }
        note("fault: block \(block) of \(host.name) rots")
        file.rot(
            byte: block * Geometry.blockSize + random.below(Geometry.blockSize),
            bit: random.below(8))
    }

    func relieve(_ relief: Relief) {
        switch relief {
        case .disk(let index): hosts[index].disk.trouble = DiskTrouble()
        case .store: store.setDown(false)
        case .clients: break
        }
    }
}
