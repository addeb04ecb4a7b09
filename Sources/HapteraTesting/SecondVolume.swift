import HapteraCore

// In some worlds a clone is a volume of its own: replicas on the same hosts, in directories that
// begin with links, an engine, clients and a store. It is a world beside its source's, in the same
// time. What befalls a host befalls both; all else of the two is drawn separately. Sooner or later
// one of the two is deleted, and the other must be whole without it.

/// What a clone begins as.
struct SimulatedOrigin {
    unowned let source: World
    let snapshot: SimulatedSnapshot
    /// The source's, when the clone was asked for.
    let record: VolumeRecord
    /// A directory for each replica, on the disk of the source's.
    let disks: [SimulatedDisk]
    /// Bytes, at the beginning and at the end.
    let sizeFirst: UInt64
    let size: UInt64
    /// What has been linked, by replica. The others begin empty.
    var linked: [Int: ReplicaCore.CloneSource] = [:]
    /// What each of the source's hot sectors holds, if it is not zero, and the clone's numbers of
    /// that.
    var values: [Int: ValueID] = [:]
    var numbers: [ValueID: ValueID] = [:]

    init(_ source: World, _ snapshot: SimulatedSnapshot, _ layer: LayerID, _ random: RandomSource) {
        self.source = source
        self.snapshot = snapshot
        record = source.store.record
        disks = source.hosts.map { SimulatedDisk(random: random.fork(), beside: $0.disk) }
        let more = random.pick([0, 0, 64, 256]) * Geometry.blockSize
        size = source.workload.sizeBytes + UInt64(more)
        sizeFirst = random.permille(300) ? size : record.size(of: layer)
    }

    /// The clone's first.
    func record(_ volume: VolumeID, _ hosts: [SimulatedReplica]) -> VolumeRecord? {
        guard let snapshot = record.snapshot(named: snapshot.name) else { return nil }
        return VolumeRecord(
            cloning: snapshot, of: record, volume: volume, name: "sim", size: sizeFirst, nonce: 1,
            inSync: hosts.filter { linked[$0.index] != nil }.map(\.member))
    }

    /// What its clients use: all that the source's have.
    var clusters: [Range<UInt64>] {
        let known = source.workload.clusters
        let blocks = Set(source.hotSectors.map { UInt64($0 / Content.sectorsPerBlock) })
        return known
            + blocks.subtracting(known.joined()).sorted().map { $0..<$0 + 1 }
    }

    /// Directories that a power cut took a name from are made empty. False: there is nothing to
    /// begin with.
    mutating func settle() -> Bool {
        for (index, source) in linked {
            let files = source.layers.flatMap { [ReplicaFile.data($0), .table($0)] }
            if files.allSatisfy({ disks[index].file($0) != nil }) { continue }
            linked[index] = nil
            disks[index].clear()
        }
        guard !linked.isEmpty, !source.faults.rot || linked[source.keeper] != nil,
            let values = source.values(of: snapshot)
        else { return false }
        for (sector, value) in zip(source.hotSectors, values) where value != 0 {
            self.values[sector] = value
        }
        for (index, value) in Set(self.values.values).sorted().enumerated() {
            numbers[value] = ValueID(index + 1)
        }
        return true
    }
}

extension SimulatedClones {
    /// A clone is asked for, and replicas of its source are to link their layers.
    struct Making {
        var origin: SimulatedOrigin
        var pending: [Pending]
    }
    struct End {
        /// The source's.
        var step: Int
        var isOfSource: Bool
    }
    /// Rules that nobody misses but who serves the clone.
    static let volumeRules: MutationSet = [
        .sharedIsForgotten, .sharedIsChanged, .stuckIsPunched, .cloneLogAtZero, .sharedForEver,
    ]
}

extension World {
    /// The other of two volumes, while it is there.
    var sibling: World? {
        guard let other = second ?? source, !other.isGone else { return nil }
        return other
    }
    /// It must not suffer anything at present.
    var isSpared: Bool {
        trueHistory != nil || timeline.now < calmUntil
            // Until somebody has noticed: a takeover takes as long as the network (seed 2207736).
            || hosts.contains { $0.isRolledBack && store.record.contains($0) }
    }

    /// Whether the other volume may suffer it, if it would.
    func maySuffer(_ kind: FaultPlan.Kind) -> Bool {
        sibling?.isSpared != true || !FaultPlan.ofHosts.contains(kind)
    }

    /// Whether both volumes can do without the host's memory.
    func mayLosePower(_ host: SimulatedReplica) -> Bool {
        guard let sibling else { return isSpareable(host) }
        return !faults.rot && isSpareable(host) && !sibling.isSpared
            && sibling.isSpareable(sibling.hosts[host.index])
    }
    /// The replica that rot spares is a member.
    var isKeeperThere: Bool {
        [self, sibling].allSatisfy { world in
            world.map { $0.store.record.contains($0.hosts[$0.keeper]) } ?? true
        }
    }
    /// What ends one process of a host often ends another.
    func killBeside(_ host: SimulatedReplica) {
        guard let sibling, !sibling.isSpared, random.permille(500) else { return }
        let other = sibling.hosts[host.index]
        guard other.core != nil else { return }
        sibling.note("\(other.name) is killed with the other volume's")
        sibling.killReplica(other, restartAfter: random.between(1, 3000))
    }

    // MARK: Making it

    /// Nil: it is not known.
    fileprivate func values(of snapshot: SimulatedSnapshot) -> [ValueID]? {
        guard faults.rot else { return snapshot.values.isEmpty ? nil : snapshot.values }
        guard let layer = snapshot.layer,
            let image = ReplicaImage(
                hosts[keeper].disk, isDurable: false, sizeBytes: workload.sizeBytes, from: layer,
                record: trueRecord)
        else { return nil }
        let values = hotSectors.map { image.value(sector: $0, contents) }
        return values.contains(Content.garbage) ? nil : values
    }

    /// Again and again, in both worlds.
    func tendClone() {
        for host in hosts { notice(host) }
        removeDirectories()
        var pauseMax = 700
        if clones.making != nil {
            continueMaking()
            pauseMax = 20
        } else if let end = clones.end {
            if isChaos, sibling != nil, timeline.step >= end.step {
                (end.isOfSource ? self : second)?.deleteVolume()
            }
        } else if mayBeCloned {
            beginMaking()
        }
        guard !isGone else { return }
        timeline.schedule(after: milliseconds(clones.random.between(1, pauseMax)), .clone)
    }

    /// Two volumes at most are on the hosts' disks.
    private var mayBeCloned: Bool {
        guard contents.isClone else { return true }
        return options.clonesClones && contents.generation == 1 && sibling == nil
            && hosts.allSatisfy { $0.disk.neighbour == nil }
    }

    private func beginMaking() {
        let members = hosts.filter {
            store.record.contains($0) && !$0.isRolledBack && $0.core != nil
                && $0.pausedUntil <= timeline.now
        }
        let snapshots = snapshots.filter {
            $0.layer != nil && !$0.isDeleted && (faults.rot || !$0.values.isEmpty)
                && store.record.snapshot(named: $0.name)?.layer == $0.layer
        }
        guard isChaos, trueHistory == nil, !members.isEmpty, !snapshots.isEmpty else { return }
        let snapshot = clones.random.pick(snapshots)
        guard let layer = snapshot.layer else { return }
        let origin = SimulatedOrigin(self, snapshot, layer, clones.random)
        note("a clone of \(snapshot.name) is asked for")
        let epoch = Epoch(origin.record.epoch.rawValue + VolumeRecord.epochsAboveSource)
        // As long as one request waits, or several one after the other.
        let patience = milliseconds(clones.random.pick([3000, 15_000]))
        var pending: [SimulatedClones.Pending] = []
        for host in members {
            do throws(SharingRefusal) {
                guard let layers = try host.core?.beginSharing(layer, epoch: epoch) else {
                    continue
                }
                pending.append(
                    .init(
                        host: host.index, process: host.process, layers: layers,
                        deadline: timeline.now + patience))
            } catch { trace("\(host.name) cannot share \(snapshot.name): \(error)") }
        }
        clones.making = .init(origin: origin, pending: pending)
    }

    private func continueMaking() {
        guard var making = clones.making else { return }
        making.pending.removeAll { pending in
            let host = hosts[pending.host]
            guard host.process == pending.process, let core = host.core else { return true }
            guard host.pausedUntil <= timeline.now else { return false }
            let ready = core.layersToLink(pending.layers)
            guard ready != nil || timeline.now >= pending.deadline else { return false }
            if let ready {
                note("\(host.name) shares layers \(ready.map(\.rawValue)) with a clone")
                making.origin.disks[host.index].link(ready, from: host.disk)
                making.origin.linked[host.index] = .init(
                    layers: ready, size: core.identity.size, logIndex: core.logNextIndex)
            }
            core.endSharing(pending.layers, linked: ready ?? [])
            return true
        }
        clones.making = making
        guard making.pending.isEmpty else { return }
        guard isChaos, trueHistory == nil, making.origin.settle() else { return giveUpMaking() }
        clones.making = nil
        begin(making.origin)
    }
    /// The clone's directory was on the disk that is gone (seed 5500306).
    func loseLinks(_ host: SimulatedReplica) { clones.making?.origin.disks[host.index].clear() }
    func giveUpMaking() {
        guard let making = clones.making else { return }
        clones.making = nil
        note("the clone is given up")
        for pending in making.pending {
            let host = hosts[pending.host]
            guard host.process == pending.process else { continue }
            host.core?.endSharing(pending.layers, linked: [])
        }
        for disk in making.origin.disks { disk.delete() }
    }

    private func begin(_ origin: SimulatedOrigin) {
        coverage.took(contents.isClone ? .third : .second)
        // Soon, and the source, where the clone is to be cloned.
        let isForNext = options.clonesClones && !contents.isClone
        let steps = clones.random.between(500, isForNext ? 3000 : 12_000)
        clones.end = .init(
            step: timeline.step + steps, isOfSource: clones.random.permille(isForNext ? 1000 : 500))
        let clone = World(
            seed: RandomSource.mix(clones.random.next()), options: options, origin: origin)
        clone.source = self
        second = clone
        clone.begin(as: origin)
    }

    /// For clients it is as if the volume had just gone back to the snapshot.
    private func begin(as origin: SimulatedOrigin) {
        note("begins as \(origin.snapshot.name), of layers of \(origin.linked.keys.sorted())")
        for _ in origin.numbers { promises.began(newRevertOperation(.write)) }
        let values = hotSectors.map { sector in
            origin.values[sector].flatMap { origin.numbers[$0] } ?? 0
        }
        promises.reverted(to: values, of: hotSectors, zeroed: newRevertOperation())
        history.append(.reverted(hotSectors, values), step: timeline.step)
        let snapshot = SimulatedSnapshot(
            name: origin.snapshot.name, promised: promises.acknowledged, losses: promises.losses)
        snapshot.layer = origin.snapshot.layer
        if !faults.rot { snapshot.values = values }
        snapshots.append(snapshot)
        setUp(origin: origin)
    }

    /// Makes a replica's files beside those that were linked; its making may be cut short, then it
    /// is made again.
    func createClone(_ host: SimulatedReplica, _ origin: SimulatedOrigin) {
        guard let source = origin.linked[host.index] else {
            host.isLossy = true
            return createReplica(host)
        }
        host.began(store.record.epoch)
        host.rot = origin.source.hosts[host.index].rot == .lost ? .lost : .none
        if faults.cutsDuringOpen { host.disk.callsUntilCut = random.below(24) }
        for _ in 0..<2 {
            do throws(StorageError) {
                try ReplicaCore.createClone(
                    storage: host.disk, member: host.member, record: store.record, source: source,
                    logCapacity: ActivityLog.capacityMin)
                return host.disk.callsUntilCut = nil
            } catch {
                guard host.disk.callsUntilCut != nil else {
                    return fail("\(host.name) cannot be created: \(error.message)")
                }
                note("the making of \(host.name) is cut short")
                host.disk.callsUntilCut = nil
            }
        }
    }

    // MARK: Deleting one of the two

    func deleteVolume() {
        note("the volume is deleted")
        sibling?.coverage.took(sibling === second ? .sourceDeleted : .cloneDeleted)
        for engine in engines { killEngine(engine) }
        for host in hosts { killReplica(host, restartAfter: nil) }
        isGone = true
        timeline.clear()
    }
    /// Of the other one, if it was deleted: a host now, another one later.
    private func removeDirectories() {
        guard let other = second ?? source, other.isGone else { return }
        for host in other.hosts where host.disk.neighbour != nil && clones.random.permille(400) {
            other.note("the directory of \(host.name) is deleted")
            host.disk.delete()
            if let violation = host.disk.violation {
                fail("invariant 35: \(host.name): \(violation)")
            }
        }
    }
    /// Nothing is left of one that was deleted.
    private var isRid: Bool { sibling != nil || hosts.allSatisfy { !$0.disk.isLinked } }

    /// Nothing is left to merge, but for what the other volume shares.
    var areLayersMerged: Bool {
        isRid
            && hosts.allSatisfy { host in
                guard let core = host.core else { return false }
                return core.unmergedLayerCount == 0 || host.disk.isLinked && !core.isMergeDue
            }
    }
}
