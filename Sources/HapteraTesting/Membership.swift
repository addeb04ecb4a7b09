import HapteraCore

// What the world checks of the record, of joins and takeovers, and of who may decide.

extension World {
    /// 21: while a change of the record is in doubt, what is acknowledged is good under both
    /// outcomes: on all members of the record that stands, and on all of the one that may.
    /// 20: so a joiner counts from the moment its promotion is asked for.
    func observeInDoubt(
        _ operation: ClientOperation, _ engine: SimulatedEngine, _ record: VolumeRecord
    ) {
        guard let proposal = engine.proposal, proposal.epoch == record.epoch.next else { return }
        check(
            proposal.change == .promotion ? 20 : 21, hasApplied(operation, proposal),
            "\(operation.text) acknowledged without a member of \(names(proposal)), asked for")
        check(
            21, hasApplied(operation, record),
            "\(operation.text) acknowledged without a member of \(names(record)), which stands"
                + " while a change is in doubt")
    }

    /// 29: whoever must have applied what was acknowledged knows the record it counts in, or one
    /// of a later epoch.
    func observeReconstructible(_ record: VolumeRecord) {
        for host in hosts where record.contains(host) {
            check(
                29, host.installed >= record.epoch,
                "\(host.name) has not installed e\(record.epoch.rawValue)")
        }
        observeCertainty(record)
    }

    /// 29: without those who know the record, no earlier one is certain, whoever was looked at. But
    /// that a salvage was made only those know who have promised it, and the administrator; and a
    /// copy that was put back as it was tells of its own day (seed 3001754).
    private func observeCertainty(_ record: VolumeRecord) {
        // Once: who does not know it now learns nothing else before.
        guard certaintyEpoch < record.epoch else { return }
        certaintyEpoch = record.epoch
        let surveys = hosts.compactMap { host in
            survey(host).flatMap { $0.promise >= host.installedEver ? $0 : nil }
        }
        for latest in surveys where latest.promise < record.epoch {
            let looked = surveys.filter { $0.promise <= latest.promise }
            guard let found = Reconstruction(surveys: looked),
                found.newest.lineage == record.lineage
            else { continue }
            check(
                29, found.verdict != .certain,
                "e\(found.newest.epoch.rawValue) passes for certain, and there are answers in"
                    + " e\(record.epoch.rawValue)")
        }
    }

    /// 20: the joiner holds all that was acknowledged, and durably all that was flushed.
    private func observePromotion(_ engine: SimulatedEngine, _ next: VolumeRecord) {
        check(20, engine.core.regionsToCopy == 0, "promotion asked for with regions to copy")
        for host in hosts
        where next.contains(host) && !store.record.contains(host) && host.rot == .none {
            guard
                let now = ReplicaImage(
                    host.disk, isDurable: false, sizeBytes: workload.sizeBytes,
                    record: trueRecord),
                let kept = ReplicaImage(
                    host.disk, isDurable: true, sizeBytes: workload.sizeBytes,
                    record: trueRecord)
            else { continue }
            // Whose power has failed since, unknown to the engine: as a member's (seed 5206009).
            if !host.isLossy {
                compare(host, now, promises.acknowledged, 20, "joins without acknowledged")
            }
            compare(host, kept, promises.flushed, 20, "joins without flushed")
        }
    }

    /// An engine asks for a new record.
    func observeProposal(_ engine: SimulatedEngine) {
        let next = engine.core.proposedRecord
        // The same proposal again, because the first is in doubt: nothing new is decided.
        guard next.nonce != engine.proposedNonce else { return }
        engine.proposedNonce = next.nonce
        engine.proposal = next
        // A superseded engine's proposal fails.
        guard next.epoch == store.record.epoch.next, trueHistory == nil else { return }
        if next.change == .promotion { observePromotion(engine, next) }
        stageChanged(.recordChange)
        let rest = hosts.filter { next.contains($0) }
        let gone = hosts.filter { store.record.contains($0) && !next.contains($0) }
        if engine.servesNewClients && rest.allSatisfy(\.isMarkedRebooted) {
            // Nobody is left who would notice.
            note("loss of unflushed writes is allowed here")
            coverage.took(.lossAllowed)
            allowLoss()
            return
        }
        guard rest.allSatisfy(\.isLossy), gone.contains(where: { !$0.isLossy }) else { return }
        // 9, promise 1: a good copy is not given up for copies known to have lost power.
        let knows = rest.allSatisfy { host in
            guard let slot = engine.core.slot(of: host.id), let link = engine.connections[slot]
            else { return true }
            return link.process == host.process && host.startedAt >= host.powerCutAt
        }
        // Unless the engine's own flush covered it all: then they have lost nothing, and if it was
        // wrong the history shows it.
        if knows && promises.acknowledged != promises.flushed && !engine.core.isEverythingStable {
            fail("\(engine.name) removes the last good member; left: \(names(next))")
        }
    }

    /// A record has landed in the store.
    func observeRecord(_ record: VolumeRecord, before: VolumeRecord) {
        observeTurn(record, before)
        checkLayers(record, before: before)
        for host in hosts where !record.contains(host) { host.isRolledBack = false }
        for host in hosts where record.contains(host) && !before.contains(host) {
            let isFork = record.lineage.count > before.lineage.count
            check(
                24,
                record.change == .reinstatement || isFork
                    || record.change == .promotion && before.joining?.replica == host.id,
                "\(host.name) is a member again without promotion, reinstatement or fork")
            // Filled since it joined, unless its power failed meanwhile. Who is reinstated was not:
            // the join that began last is another replica's.
            if record.change == .promotion && host.powerCutAt < joinStartedAt {
                host.isLossy = false
            }
        }
        if record.engine != before.engine,
            let engine = engines.first(where: { $0.instance == record.engine })
        {
            engine.servesNewClients = record.clientGeneration != before.clientGeneration
        }
        if let joining = record.joining {
            check(
                24, !before.out.contains { $0.member == joining && $0.isKept },
                "the loser of a salvage is filled")
        }
        // The same replica may begin anew after it dropped out without a change.
        if record.change == .join { joinStartedAt = timeline.now }
        let reverts = record.reverts.map { "\($0.head.rawValue)>\($0.target.rawValue)" }
        note(
            "record e\(record.epoch.rawValue): \(names(record))\(record.isClean ? " clean" : "")"
                + " layers \(record.layers.map(\.rawValue)) \(reverts.joined(separator: " "))")
        noteLoss()
    }

    private func observeTurn(_ record: VolumeRecord, _ before: VolumeRecord) {
        switch record.change {
        case .takeover: coverage.took(.takeover)
        case .removal: coverage.took(.removal)
        case .join: coverage.took(.join)
        case .promotion:
            coverage.took(.promotion)
            if hosts.contains(where: { before.contains($0) && $0.disk.isLinked }) {
                coverage.took(.sharedFill)
            }
        case .detach: coverage.took(.detach)
        case .salvage: coverage.took(.salvage)
        case .reinstatement: coverage.took(.reinstatement)
        case .creation, .reconstruction, .administration, .snapshot, .resize, .revert: break
        }
    }

    func observeNote(_ engine: SimulatedEngine, _ note: EngineNote) {
        switch note {
        case .resolved:
            coverage.took(.resolution)
            observeResolved(engine)
        case .joinFailed: coverage.took(.joinFailed)
        case .repaired: coverage.took(.repair)
        case .stalled: coverage.took(.stall)
        case .onlyRebootedMembers: coverage.took(.refusal)
        case .doubtfulBytesKept: coverage.took(.doubtfulBytesKept)
        case .replicaSlow: coverage.took(.slowRemoval)
        case .storeUnavailable: coverage.took(.storeUnavailable)
        case .lossAccepted:
            coverage.took(.lossAccepted)
            // The clients were told.
            engine.servesNewClients = true
            isGenerationUnserved = true
        case .tookOver:
            if engine.core.unresolvedCount > 0 { stageChanged(.resolving) }
        default: break
        }
    }

    /// 18, 19: what the engine will not copy is equal already; what it has copied is equal now.
    func observeJoin(_ engine: SimulatedEngine) {
        let core = engine.core
        if core.isCopying != engine.isCopying {
            engine.isCopying = core.isCopying
            if core.isCopying {
                compareJoiner(engine, 18, "left out of the delta") { !core.isToBeCopied($0) }
                stageChanged(.copying)
            }
        }
        if core.regionsCopied != engine.regionsCopied {
            engine.regionsCopied = core.regionsCopied
            let region = core.lastRegionCopied
            compareJoiner(engine, 19, "copied") { $0 == region }
        }
    }

    /// Unflushed writes may be gone, from what a revert under way keeps as well (seed 94, with
    /// clones).
    private func allowLoss() {
        history.append(.lossAllowed, step: timeline.step)
        promises.lost()
        reverts.pending?.before?.lost()
        lastWrites = [:]
    }

    private func compareJoiner(
        _ engine: SimulatedEngine, _ invariant: Int, _ what: String, _ concerns: (UInt64) -> Bool
    ) {
        guard !faults.rot, let record = engine.core.record, record.epoch == store.record.epoch,
            let joiner = hosts.first(where: { $0.id == record.joining?.replica }),
            isReached(joiner, engine),
            let mine = ReplicaImage(
                joiner.disk, isDurable: false, sizeBytes: workload.sizeBytes,
                record: trueRecord)
        else { return }
        coverage.evaluated(invariant)
        for host in hosts where record.contains(host) && isReached(host, engine) && !host.isLossy {
            guard
                let other = ReplicaImage(
                    host.disk, isDurable: false, sizeBytes: workload.sizeBytes,
                    record: trueRecord)
            else { continue }
            compareLayers(invariant, what, (joiner, mine), (host, other)) { block in
                concerns(UInt64(block / Geometry.blocksPerRegion))
                    && !engine.core.isOwedByJoiner(UInt64(block))
            }
            for sector in hotSectors {
                let block = sector / Content.sectorsPerBlock
                let region = UInt64(block / Geometry.blocksPerRegion)
                let isDamageShared = joiner.marked.contains(block) && mine.isDoubtful(block)
                // It may have to be sent again in a new epoch: seed 5704033.
                guard concerns(region), !host.isWriting(block), !joiner.isWriting(block),
                    !engine.core.isOwedByJoiner(UInt64(block)), !isDamageShared
                else { continue }
                let (a, b) = (
                    mine.value(sector: sector, contents),
                    other.value(sector: sector, contents)
                )
                if a != b {
                    return fail(
                        "invariant \(invariant): region \(region), \(what), differs at sector"
                            + " \(sector): \(joiner.name) #\(a), \(host.name) #\(b)")
                }
            }
        }
    }

    /// Frozen layers are compared by themselves: what covers a block hides what is below.
    private func compareLayers(
        _ invariant: Int, _ what: String, _ a: (host: SimulatedReplica, image: ReplicaImage),
        _ b: (host: SimulatedReplica, image: ReplicaImage), _ concerns: (Int) -> Bool
    ) {
        // One may have a deletion's Install still before it, behind a write that the other, and
        // the region's copy, did not wait for (seed 1015522).
        let a = (host: a.host, image: a.image.promising(trueRecord))
        let b = (host: b.host, image: b.image.promising(trueRecord))
        for id in b.image.layers.dropLast().map(\.id) {
            guard let mine = a.image.layer(id), let other = b.image.layer(id) else {
                // It promises the record in which the layer is, or will; or a later one, in which
                // it is not any more (seed 33, with clones).
                if a.image.layer(id) == nil, a.image.promise >= b.image.promise,
                    a.image.installed?.layers.contains(id) ?? true
                {
                    fail("\(a.host.name) lacks layer \(id.rawValue)")
                }
                continue
            }
            for block in Set(hotSectors.map { $0 / Content.sectorsPerBlock }) {
                guard concerns(block),
                    !a.host.isWriting(block), !b.host.isWriting(block),
                    mine.entries[block] != other.entries[block],
                    // Below the lowest layer everything reads zero: of what was trimmed where
                    // nothing was, a copy that has a deleted layer left takes note, and no other
                    // (seed 608836).
                    id != store.record.layers.first
                        || ![mine, other].allSatisfy({
                            [.absent, .zero].contains($0.entries[block].state)
                        })
                else { continue }
                return fail(
                    "invariant \(invariant): layer \(id.rawValue), \(what), differs in block"
                        + " \(block): \(a.host.name) \(mine.entries[block]),"
                        + " \(b.host.name) \(other.entries[block])")
            }
        }
    }

    /// The engine is connected to the very process that holds the copy.
    private func isReached(_ host: SimulatedReplica, _ engine: SimulatedEngine) -> Bool {
        engine.connections.contains {
            $0?.replica == host.index && $0?.process == host.process && host.core != nil
        }
    }

    /// Whether only copies that lost power are left: then, and only then, the volume may refuse.
    func noteLoss() {
        let members = hosts.filter { store.record.contains($0) }
        if members.allSatisfy(\.isMarkedRebooted) && !isLossPossible {
            isLossPossible = true
            note("only members that lost power are left")
        }
    }

    /// An engine begins to serve.
    func engineServes(_ engine: SimulatedEngine) {
        engine.hasServed = true
        guard isGenerationUnserved, engine.generation == generation else { return }
        isGenerationUnserved = false
        let members = hosts.filter { store.record.contains($0) }
        if members.allSatisfy(\.isMarkedRebooted) {
            // Nobody is left who would notice: what was not flushed may be gone.
            note("loss of unflushed writes is allowed here")
            coverage.took(.lossAllowed)
            allowLoss()
            isLossPossible = false
        }
    }

    /// An engine has made its members equal.
    private func observeResolved(_ engine: SimulatedEngine) {
        guard let record = engine.core.record else { return }
        for host in hosts
        where record.contains(host) && host.installed == record.epoch
            && host.powerCutAt < host.installedAt
        {
            host.isLossy = false
        }
    }

    func names(_ record: VolumeRecord) -> String {
        var text = "in sync ["
        text += hosts.filter { record.contains($0) }.map { String($0.index) }.joined(
            separator: " ")
        text += "]"
        if let joining = record.joining, let host = hosts.first(where: { $0.id == joining.replica })
        {
            text += " joining \(host.index)"
        }
        if let engine = engines.first(where: { $0.instance == record.engine }) {
            text += " \(engine.name)"
        }
        return text
    }
}
