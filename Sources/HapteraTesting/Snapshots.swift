import HapteraCore

/// A snapshot somebody asked for.
final class SimulatedSnapshot {
    let name: String
    /// What had been acknowledged when it was asked for; in a group, when the volume was released.
    var promised: [Int]
    /// The invariant that says so.
    var promise = 25
    var losses: Int
    /// Nil: not answered yet, or not taken.
    var layer: LayerID?
    /// Its deletion was asked for: from here on it may be gone.
    var isDeleted = false
    /// What each of the world's hot sectors held when it was answered; none: nothing is known that
    /// must still be so.
    var values: [ValueID] = []
    /// The engine that was asked for it with a hold and has not answered: when it does, it is
    /// frozen and no more.
    var holdingEngine: Int?

    init(name: String, promised: [Int], losses: Int) {
        self.name = name
        self.promised = promised
        self.losses = losses
    }
}

// Snapshots under way with everything else (invariants 25 and 26).
extension World {
    func scheduleSnapshot() {
        let pause = milliseconds(random.between(20, workload.snapshotPauseMilliseconds))
        timeline.schedule(after: pause, .snapshot)
    }

    func requestSnapshot() {
        guard isChaos else { return }
        if reverts.pending != nil { return scheduleSnapshot() }
        if let victim = snapshots.indices.filter({ mayDelete(snapshots[$0]) }).last,
            random.permille(workload.deletionPermille)
        {
            scheduleSnapshot()
            let isNewest = random.permille(500) || depth.isShallow
            return requestDeletion(isNewest ? victim : random.below(victim + 1))
        }
        guard snapshots.count < workload.snapshotsMax + reverts.count else {
            if snapshots.contains(where: mayDelete), workload.deletionPermille > 0 {
                scheduleSnapshot()
            }
            return
        }
        scheduleSnapshot()
        guard let current = currentEngine, engines[current].isRunning,
            engines[current].pausedUntil <= timeline.now, trueHistory == nil
        else { return }
        let snapshot = SimulatedSnapshot(
            name: "\(contents.isClone ? label : "s")\(snapshots.count)",
            promised: promises.acknowledged, losses: promises.losses)
        note("snapshot \(snapshot.name) is asked of \(engines[current].name)")
        snapshots.append(snapshot)
        step(
            engines[current],
            .takeSnapshot(
                token: UInt64(snapshots.count - 1), name: snapshot.name, created: timeline.now,
                hold: beginHold(snapshot, engines[current])))
        deliverDisconnects()
    }

    private func mayDelete(_ snapshot: SimulatedSnapshot) -> Bool {
        snapshot.layer != nil && !snapshot.isDeleted && snapshot !== reverts.pending?.target
            && snapshot !== clones.making?.origin.snapshot
    }
    private func requestDeletion(_ token: Int) {
        let snapshot = snapshots[token]
        guard let current = currentEngine, engines[current].isRunning,
            engines[current].pausedUntil <= timeline.now, trueHistory == nil, mayDelete(snapshot)
        else { return }
        note("deletion of \(snapshot.name) is asked of \(engines[current].name)")
        snapshot.isDeleted = true
        snapshot.values = []
        step(engines[current], .deleteSnapshot(token: UInt64(token), name: snapshot.name))
        deliverDisconnects()
    }
    func snapshotDeleted(_ engine: SimulatedEngine, _ token: UInt64, _ result: DeletionResult) {
        let snapshot = snapshots[Int(token)]
        note("\(engine.name): deletion of \(snapshot.name): \(result)")
        guard result == .ok, trueHistory == nil else { return }
        coverage.took(.deletion)
        check(
            25, store.record.snapshot(named: snapshot.name) == nil,
            "\(snapshot.name) is in the record, though it was deleted")
    }

    /// An engine answers a request for a snapshot.
    func snapshotTaken(
        _ engine: SimulatedEngine, _ token: UInt64, _ layer: LayerID, _ result: SnapshotResult
    ) {
        if token >= SimulatedReverts.firstToken {
            return revertAnswered(engine, token, layer, result)
        }
        let snapshot = snapshots[Int(token)]
        note("\(engine.name): \(snapshot.name), layer \(layer.rawValue): \(result)")
        if result == .tooManyLayers { observeTooManyLayers() }
        if holdAnswered(engine, snapshot, result) { return }
        guard result == .ok || result == .exists, trueHistory == nil else { return }
        coverage.took(.snapshot)
        check(
            25, store.record.snapshot(named: snapshot.name)?.layer == layer,
            "\(snapshot.name) is not in the record")
        snapshot.layer = layer
        judge(snapshot, layer)
        if promises.losses == snapshot.losses { checkCausality(snapshot) }
    }
    /// It is on every member, durably.
    func judge(_ snapshot: SimulatedSnapshot, _ layer: LayerID) {
        for host in hosts
        where store.record.contains(host) && !host.isRolledBack && host.core != nil
            && host.rot == .none
        {
            guard
                let image = ReplicaImage(
                    host.disk, isDurable: true, sizeBytes: workload.sizeBytes, from: layer,
                    record: trueRecord)
            else { return fail("\(host.name): the files do not make sense") }
            guard image.layer(layer) != nil else {
                return fail("invariant 25: \(host.name) has not got layer \(layer.rawValue)")
            }
            look(at: snapshot, host, image)
        }
    }

    /// 25: the same on every member, and everything acknowledged before it was asked for.
    private func look(
        at snapshot: SimulatedSnapshot, _ host: SimulatedReplica, _ image: ReplicaImage
    ) {
        if promises.losses == snapshot.losses {
            compare(host, image, snapshot.promised, snapshot.promise, "\(snapshot.name): lacks")
        }
        guard !faults.rot else { return }
        let values = hotSectors.map { image.value(sector: $0, contents) }
        if snapshot.values.isEmpty { snapshot.values = values }
        coverage.evaluated(25)
        for (index, sector) in hotSectors.enumerated() where values[index] != snapshot.values[index]
        {
            let block = sector / Content.sectorsPerBlock
            // Damage that it was made to share: nobody reads it.
            if host.marked.contains(block), image.isDoubtful(block) { continue }
            return fail(
                "invariant 25: \(host.name), \(snapshot.name) of layer"
                    + " \(snapshot.layer?.rawValue ?? 0): sector \(sector) holds"
                    + " #\(values[index]), was #\(snapshot.values[index])")
        }
    }

    /// 26: with a write, everything that had been acknowledged before it was asked for.
    private func checkCausality(_ snapshot: SimulatedSnapshot) {
        guard !snapshot.values.isEmpty else { return }
        var before = 0
        for value in snapshot.values where value > 0 && value <= UInt64(operations.count) {
            before = max(before, operations[Int(value) - 1].begunAt)
        }
        coverage.evaluated(26)
        // The last write of each sector among those acknowledged by then.
        var last: [Int: ClientOperation] = [:]
        for operation in operations where operation.changesData {
            let at = promises.acknowledgedAt(operation)
            guard at > promises.lossAt, at <= before else { continue }
            for sector in operation.sectors
            where last[sector].map({ promises.acknowledgedAt($0) < at }) ?? true {
                last[sector] = operation
            }
        }
        for (index, sector) in hotSectors.enumerated() {
            guard let operation = last[sector] else { continue }
            guard !isAcceptable(snapshot.values[index], sector, operation.id) else { continue }
            return fail(
                "invariant 26: \(snapshot.name) lacks \(operation.text) at sector \(sector), and"
                    + " has what was asked for after it")
        }
    }

    /// 25, 33: what a snapshot holds never changes, on any member, over any crash.
    func compareSnapshots(_ members: [SimulatedReplica], _ images: [ReplicaImage]) {
        guard images.count == members.count, !faults.rot else { return }
        for snapshot in snapshots where !snapshot.values.isEmpty {
            guard let layer = snapshot.layer else { continue }
            for (host, image) in zip(members, images) {
                look(at: snapshot, host, image.seen(from: layer))
            }
        }
    }
    /// The volume goes on from an old copy: its snapshots are what that copy has.
    func forgetSnapshots() {
        for snapshot in snapshots { snapshot.values = [] }
    }
}
