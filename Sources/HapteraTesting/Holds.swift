import HapteraCore

/// A world's snapshots of groups, drawn from a source of their own: the rest of it does not depend
/// on them. There is one volume only, and what makes a group one cut is that all that was
/// acknowledged before the release is in the snapshot.
struct SimulatedHolds {
    /// One under way.
    struct Pending {
        let snapshot: SimulatedSnapshot
        let engine: Int
        let token: UInt64
        let reverts: Int
        var stage = Stage.asked
    }
    enum Stage { case asked, holding }
    var pending: Pending?
    private(set) var count: UInt64 = 0
    let random: RandomSource
    /// Whether this world has any.
    let areThere: Bool

    init(seed: UInt64) {
        random = RandomSource(seed: RandomSource.mix(seed ^ 0x484F_4C44))
        areThere = random.permille(600)
    }

    mutating func begin(
        _ snapshot: SimulatedSnapshot, _ engine: SimulatedEngine, reverts: Int
    ) -> SnapshotHold {
        count += 1
        snapshot.holdingEngine = engine.index
        pending = Pending(
            snapshot: snapshot, engine: engine.index, token: count, reverts: reverts)
        return SnapshotHold(
            token: count, milliseconds: UInt64(random.pick([50, 500, 3000])))
    }
}

// Groups under way with everything else (invariant 26).
extension World {
    /// Nil: this one is none of a group.
    func beginHold(_ snapshot: SimulatedSnapshot, _ engine: SimulatedEngine) -> SnapshotHold? {
        guard holds.areThere, holds.pending == nil, holds.random.permille(700) else { return nil }
        // Whoever asks goes on if no answer comes.
        timeline.schedule(after: milliseconds(3000), .release(holds.count + 1))
        return holds.begin(snapshot, engine, reverts: reverts.count)
    }

    /// The first answer of the engine that was asked, be it late. False: it is not about a hold.
    func holdAnswered(
        _ engine: SimulatedEngine, _ snapshot: SimulatedSnapshot, _ result: SnapshotResult
    ) -> Bool {
        guard snapshot.holdingEngine == engine.index else { return false }
        guard let pending = holds.pending, pending.snapshot === snapshot else {
            // Refused since others wait, it is the second question that was: the first one's
            // answer is still to come.
            if result != .notServing { snapshot.holdingEngine = nil }
            return true
        }
        snapshot.holdingEngine = nil
        guard result == .ok else {
            holds.pending = nil
            return true
        }
        holds.pending?.stage = .holding
        coverage.took(.hold)
        let pause = holds.random.pick([0, 5, 40, 300])
        timeline.schedule(after: milliseconds(pause), .release(pending.token))
        return true
    }

    /// Lets the engine go, and asks for the end of what it began.
    func releaseHold(_ token: UInt64) {
        guard let pending = holds.pending, pending.token == token else { return }
        let engine = engines[pending.engine]
        if pending.stage == .holding, engine.isRunning, engine.pausedUntil <= timeline.now {
            step(engine, .release(token: token))
            deliverDisconnects()
        }
        guard let current = currentEngine, engines[current].isRunning,
            engines[current].pausedUntil <= timeline.now, trueHistory == nil,
            let number = snapshots.firstIndex(where: { $0 === pending.snapshot })
        else {
            holds.pending = nil
            return
        }
        note("\(pending.snapshot.name) is asked of \(engines[current].name) again")
        holds.pending = nil
        step(
            engines[current],
            .takeSnapshot(
                token: UInt64(number), name: pending.snapshot.name, created: timeline.now))
        deliverDisconnects()
    }

    /// What was acknowledged until now was so before any other volume's was let go.
    func released(_ engine: SimulatedEngine, _ token: UInt64, _ wasHeld: Bool) {
        note("\(engine.name): hold \(token) is released, was held: \(wasHeld)")
        guard wasHeld, let pending = holds.pending, pending.token == token,
            pending.snapshot.losses == promises.losses, pending.reverts == reverts.count,
            reverts.pending == nil, trueHistory == nil
        else { return }
        pending.snapshot.promised = promises.acknowledged
        pending.snapshot.promise = 26
        coverage.evaluated(26)
    }
}
