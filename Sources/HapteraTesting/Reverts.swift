import HapteraCore

/// A world's reverts, drawn from a source of their own: the rest of it does not depend on them.
struct SimulatedReverts {
    /// One under way: from here on clients are away.
    struct Pending {
        let target: SimulatedSnapshot
        let kept: SimulatedSnapshot
        /// The engine that was asked last; -1: none yet.
        var engine = -1
        /// Engines that were asked: one that has not answered may still do it.
        var asked = 0
        /// The record says so: what clients were promised is what the target holds.
        var isRecorded: Bool { before != nil }
        /// What they were promised until then.
        var before: Promises?
    }
    var pending: Pending?
    var count = 0
    let random: RandomSource
    /// Whether this world has any.
    let areThere: Bool

    init(seed: UInt64) {
        random = RandomSource(seed: RandomSource.mix(seed ^ 0x5245_5645))
        areThere = random.permille(500)
    }
    static let firstToken: UInt64 = 1 << 32
}

// The volume goes back to its snapshots under everything else, but for clients.
extension World {
    func scheduleRevert() {
        timeline.schedule(after: milliseconds(reverts.random.between(20, 4000)), .revert)
    }

    func requestRevert() {
        guard isChaos else { return }
        // Elsewhere one turn becomes two while it waits, as many as a run's steps allow.
        if reverts.pending != nil, contents.isClone { return continueRevert() }
        scheduleRevert()
        if reverts.pending != nil { return continueRevert() }
        let targets = snapshots.filter { !$0.values.isEmpty && !$0.isDeleted && $0.layer != nil }
        guard !targets.isEmpty, trueHistory == nil, reverts.count < 6 else { return }
        let kept = SimulatedSnapshot(
            name: "\(label)kept\(reverts.count)",
            promised: promises.acknowledged, losses: promises.losses)
        reverts.count += 1
        let target = reverts.random.pick(targets)
        note("the clients leave; the volume is to go back to \(target.name)")
        reverts.pending = .init(target: target, kept: kept)
        timeline.schedule(after: milliseconds(1), .revert)
    }

    /// Asks the current engine, once the clients have no request left, and again when it is
    /// another one.
    func continueRevert() {
        guard let pending = reverts.pending else { return }
        timeline.schedule(after: milliseconds(reverts.random.between(5, 200)), .revert)
        guard let current = currentEngine, trueHistory == nil else { return }
        let engine = engines[current]
        guard engine.isRunning, engine.pausedUntil <= timeline.now, pending.engine != current,
            unanswered.isEmpty, engine.unsent.isEmpty, engine.late.isEmpty, !engine.isSessionDead,
            engine.attempts.allSatisfy({ $0.completions > 0 })
        else { return }
        if pending.target.values.isEmpty || !isChaos && pending.asked == 0 {
            // What it holds is not known any more, or it is too late to begin.
            return giveUpRevert()
        }
        if pending.asked == 0 {
            // What is to be kept is what there is now.
            reverts.pending = .init(
                target: pending.target,
                kept: SimulatedSnapshot(
                    name: pending.kept.name, promised: promises.acknowledged,
                    losses: promises.losses))
        }
        reverts.pending?.engine = current
        reverts.pending?.asked += 1
        note("a revert to \(pending.target.name) is asked of \(engine.name)")
        step(
            engine,
            .revert(
                token: SimulatedReverts.firstToken + UInt64(reverts.count),
                target: pending.target.name, kept: pending.kept.name, created: timeline.now))
        deliverDisconnects()
    }
    private func giveUpRevert() {
        note("the revert is given up")
        reverts.pending = nil
    }

    /// The record was changed: for clients this is the moment.
    func observeRevert(_ record: VolumeRecord, before: VolumeRecord) {
        if !Set(before.layers).isSubset(of: record.layers) {
            // With a layer may go the birth that its writes gave a region.
            lastWrites = [:]
        }
        guard let pending = reverts.pending, !pending.isRecorded, trueHistory == nil,
            let kept = record.snapshot(named: pending.kept.name)
        else { return }
        reverts.pending?.before = promises
        check(
            25,
            record.tree.isSeen(pending.target.layer ?? .head, from: record.head)
                && !record.tree.isSeen(kept.layer, from: record.head),
            "the record does not say what the volume went back to")
        let values = pending.target.values
        guard !values.isEmpty else { return }
        let zeroed = newRevertOperation()
        promises.reverted(to: values, of: hotSectors, zeroed: zeroed)
        history.append(.reverted(hotSectors, values), step: timeline.step)
    }
    /// Stands for the zeroes that a revert brings back. Nobody waits for it.
    func newRevertOperation(_ kind: OperationKind = .flush) -> ClientOperation {
        let operation = ClientOperation(
            id: operations.count + 1, kind: kind, flags: [], offset: 0, length: 0, worker: -1,
            generation: generation)
        operation.isComplete = true
        operations.append(operation)
        return operation
    }

    func revertAnswered(
        _ engine: SimulatedEngine, _ token: UInt64, _ layer: LayerID, _ result: SnapshotResult
    ) {
        note("\(engine.name): revert, layer \(layer.rawValue): \(result)")
        guard let pending = reverts.pending, trueHistory == nil,
            token == SimulatedReverts.firstToken + UInt64(reverts.count)
        else { return }
        // The next time anybody is asked, this one included.
        if pending.engine == engine.index { reverts.pending?.engine = -2 }
        guard result == .ok || result == .exists else {
            if result == .tooManyLayers { observeTooManyLayers() }
            check(
                25,
                [.notServing, .inDoubt, .tooManyLayers].contains(result) || lineageIsForked,
                "the revert to \(pending.target.name) was refused: \(result)")
            // Who says that there is no room for it has seen the newest record: nobody can have
            // done it, or will (seed 3120522).
            let isKnown = pending.asked == 1 && result != .inDoubt || result == .tooManyLayers
            if !pending.isRecorded, isKnown { giveUpRevert() }
            return
        }
        check(25, pending.isRecorded, "a revert that the record does not know")
        coverage.took(.revert)
        pending.kept.layer = layer
        snapshots.append(pending.kept)
        if let before = pending.before {
            // By what was promised then, and never again: what it holds stays.
            let now = promises
            promises = before
            judge(pending.kept, layer)
            promises = now
            pending.kept.losses = -1
        }
        reverts.pending = nil
    }
    private var lineageIsForked: Bool { !store.record.lineage.isEmpty }
}

extension Promises {
    /// The volume is what a snapshot holds: `values`, one for each of `sectors`, durably. What was
    /// acknowledged since it was taken is no answer any more.
    mutating func reverted(to values: [ValueID], of sectors: [Int], zeroed: ClientOperation) {
        began(zeroed)
        restart()
        for value in Set(values) where value != 0 { promoted(Int(value)) }
        promoted(zeroed.id)
        for (sector, value) in zip(sectors, values) {
            acknowledged[sector] = value == 0 ? zeroed.id : Int(value)
            flushed[sector] = acknowledged[sector]
        }
    }
}
