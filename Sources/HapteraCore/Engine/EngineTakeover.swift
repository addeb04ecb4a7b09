// Rule T: a new engine assumes the volume, or this one again after every member was gone.

extension EngineCore {
    /// How long replicas that are not in the set are listened to.
    private static let hearingMilliseconds: UInt64 = 250

    /// First the engine listens. A store restored from an old copy agrees with every claim, and
    /// claims made again and again would pass the epochs that the replicas promised. So nothing is
    /// claimed before all members were heard, or the time is over after which they are removed.
    func hear() {
        phase = .hearing
        hearingBegan = now
        for slot in 0..<replicas.count where replicas[slot].link == .greeted {
            guard phase == .hearing, isAsRecorded(slot) else { return }
        }
        advanceTakeover()
    }
    private func hasHeardEnough() -> Bool {
        guard let began = hearingBegan else { return true }
        var heard: SlotSet = []
        var all = members
        for slot in 0..<replicas.count {
            if replicas[slot].isConfigured { all.insert(SlotSet(slot)) }
            if replicas[slot].link == .greeted { heard.insert(SlotSet(slot)) }
        }
        guard !heard.intersection(members).isEmpty else { return false }
        let isLate = now >= began.adding(milliseconds: Self.hearingMilliseconds)
        return (isLate ? members : all).isSubset(of: heard)
            || now >= began.adding(milliseconds: configuration.removalDeadlineMilliseconds)
    }

    /// No member says anything. An engine still at work may have others by now: what was read when
    /// this one began would have it wait for who is gone (seed 5036363).
    private func readAgain() {
        guard let began = hearingBegan,
            now >= began.adding(milliseconds: configuration.removalDeadlineMilliseconds)
        else { return }
        hearingBegan = now
        isStoreBusy = true
        actions.append(.storeGet)
    }

    /// T1: the record names this engine.
    func claim() {
        guard pendingChange == nil, !isStoreBusy else { return }
        phase = .claiming
        mustClaimAgain = false
        required = []
        propose(.takeover) { next in
            next.engine = configuration.instance
            next.engineEndpoint = configuration.endpoint
            next.clientGeneration = configuration.clientGeneration
            next.leaseMilliseconds = nextLease(after: next)
            if let minInSync = configuration.minInSync { next.minInSync = minInSync }
            next.isClean = false
            next.joining = nil
        }
    }

    /// T2: every member promises.
    func beginInstalling() {
        phase = .installing
        deadline = now.adding(milliseconds: configuration.removalDeadlineMilliseconds)
        for slot in 0..<replicas.count {
            installReplies[slot] = nil
            replicas[slot].hasFailed = false
        }
        if !hasGreetedAgain {
            hasGreetedAgain = !olderMembers.isEmpty
            greetAgain()
        }
        installAll()
    }

    func advanceTakeover() {
        switch phase {
        case .hearing:
            guard pendingChange == nil, !isStoreBusy, !isVerifyingPromise else { return }
            if mutations.contains(.claimUnheard) || hasHeardEnough() { return claim() }
            readAgain()
        case .stalled:
            guard pendingChange == nil, !isStoreBusy else { return }
            var rest = members
            while let slot = rest.popFirst() {
                if replicas[slot].link == .greeted {
                    claim()
                    return
                }
            }
        case .installing:
            guard pendingChange == nil, !isStoreBusy else { return }
            if mustClaimAgain { return claim() }
            guard olderMembers.isEmpty || !handleOlderMembers() else { return }
            let promised = promisedMembers
            guard !promised.isEmpty else { return }
            guard promised == members || now >= deadline || isHeardOut(promised) else { return }
            // Not before everyone was heard: whether a witness was rolled back is told from others.
            if reinstate(promised) { return }
            if promised == members {
                finishInstalling()
            } else {
                removeUnreachable(promised)
            }
        default: break
        }
    }

    /// Who is missing had its time before the claim.
    private func isHeardOut(_ promised: SlotSet) -> Bool {
        guard let began = hearingBegan,
            now >= began.adding(milliseconds: configuration.removalDeadlineMilliseconds)
        else { return false }
        var rest = members.subtracting(promised)
        while let slot = rest.popFirst() {
            if replicas[slot].link != .down { return false }
        }
        return true
    }

    private func removeUnreachable(_ promised: SlotSet) {
        guard mayRemoveOthers(promised) else { return refuse() }
        var rest = members.subtracting(promised)
        while let slot = rest.popFirst() {
            if replicas[slot].link != .greeted { replicas[slot].failure = .unreachable }
        }
        proposeRemoval(members.subtracting(promised))
    }

    /// Goes on as soon as somebody better is there: a member that returns is installed when it is
    /// greeted, one that left in vain is reinstated.
    private func refuse() {
        guard !isRefusing else { return }
        isRefusing = true
        note(.onlyRebootedMembers)
    }
    func acceptLoss() {
        guard isRefusing else { return }
        isRefusing = false
        isLossAccepted = true
        note(.lossAccepted)
    }

    private var promisedMembers: SlotSet {
        var promised: SlotSet = []
        var rest = members
        while let slot = rest.popFirst() {
            if installReplies[slot] != nil, replicas[slot].installedEpoch == record?.epoch {
                promised.insert(SlotSet(slot))
            }
        }
        return promised
    }

    /// The client whose writes were acknowledged still lives, so it would notice a loss.
    private var clientSurvived: Bool {
        guard let recordBefore else { return true }
        if isLossAccepted || mutations.contains(.clientGenerationIgnored) { return false }
        if hasServed { return true }
        // Whoever chose the copy of a salvage was told what it may lack.
        if recordBefore.change == .salvage { return false }
        return recordBefore.clientGeneration == configuration.clientGeneration
    }
    /// The stable point covers all that was acknowledged, also by engines before: it came after
    /// everything was made equal.
    package var isEverythingStable: Bool {
        if hasServed { return stablePoint.sequence > highestAcknowledged }
        return recordBefore?.isClean ?? false
    }
    private func hasSteadyMember(_ set: SlotSet) -> Bool {
        var rest = set
        while let slot = rest.popFirst() {
            if !replicas[slot].isRebooted || isAccepted(slot) { return true }
        }
        return false
    }
    /// Rebooted, but what it may have lost was decided upon when this engine began to serve, and it
    /// has had all that was acknowledged since. (A member that came later may have more.)
    private func isAccepted(_ slot: ReplicaSlot) -> Bool {
        hasServed && members.isSubset(of: acceptedMembers)
            && replicas[slot].acceptedInstance == replicas[slot].instance
    }
    /// Members are about to be served from.
    private func noteAccepted() {
        var rest = members
        var areAllRebooted = true
        while let slot = rest.popFirst() {
            areAllRebooted = areAllRebooted && replicas[slot].isRebooted
            replicas[slot].acceptedInstance = replicas[slot].instance
        }
        acceptedMembers = areAllRebooted ? members : []
    }
    /// Removing the members that are away leaves only rebooted ones: not while a better may return.
    func mayRemoveOthers(_ promised: SlotSet) -> Bool {
        mutations.contains(.rebootedSource) || hasSteadyMember(promised) || !clientSurvived
            || isEverythingStable
    }

    /// T3: what the members' activity logs name may differ; everything else is equal.
    private func finishInstalling() {
        guard let record else { return }
        let isClean = !hasServed && (recordBefore?.isClean ?? false)
        let rolledBack =
            mutations.contains(.acceptRolledBackMember) ? SlotSet() : rolledBackMembers(members)
        // Before anybody is asked: should this engine end, what tells them may not be there again.
        guard rolledBack.isEmpty else { return removeRolledBack(rolledBack) }
        guard mayRemoveOthers(members) else { return refuse() }
        forgetUnresolved()
        if !isClean, !mutations.contains(.skipResolution) { collectUnresolved(record) }
        unresolvedQueue = unresolved.sorted()
        unresolvedPosition = 0
        while urgentRegions.popFirst() != nil {}
        isResolving = !unresolved.isEmpty
        regionsResolved = 0
        blocksResolved = 0
        required = members
        phase = .serving
        noteAccepted()
        hearingBegan = nil
        hasServed = true
        isRefusing = false
        isLossAccepted = false
        for slot in 0..<replicas.count { replicas[slot].promiseBefore = nil }
        resolveBegan = now
        note(.tookOver(record.epoch))
        if !isResolving { noteResolved() }
        // The first stable point lets replicas forget what the engine before left active.
        flushDueAt = now
        actions.append(.serving(true))
        startAll()
    }

    /// Tells what a takeover has done. What is resolved later, after an error, is not its.
    func noteResolved() {
        guard let began = resolveBegan else { return }
        resolveBegan = nil
        lastTakeover = LastTakeover(
            regions: regionsResolved, blocks: blocksResolved,
            milliseconds: now.nanoseconds(since: began) / 1_000_000)
        note(
            .resolved(
                regions: lastTakeover.regions, blocks: lastTakeover.blocks,
                milliseconds: lastTakeover.milliseconds))
    }

    /// Members whose promise is older than the record knows it to be. They are not asked for
    /// another one, which would take the evidence away.
    private var olderMembers: SlotSet {
        var older = SlotSet()
        var rest = members
        while let slot = rest.popFirst() {
            if replicas[slot].link == .greeted, isOlderMember(slot) { older.insert(SlotSet(slot)) }
        }
        return older
    }
    func isOlderMember(_ slot: ReplicaSlot) -> Bool {
        guard let record, !mutations.contains(.acceptRolledBackMember) else { return false }
        return replicas[slot].promise < record.promised
    }
    /// True: there is nothing to go on with yet. Older copies leave, but for the last member: with
    /// that one the volume goes on only if the loss is accepted.
    private func handleOlderMembers() -> Bool {
        let older = olderMembers
        guard older == members else {
            removeRolledBack(older)
            return true
        }
        guard isLossAccepted else {
            if !isRefusing { noteRolledBack(older) }
            refuse()
            return true
        }
        var rest = older
        guard var latest = rest.popFirst() else { return true }
        while let slot = rest.popFirst() {
            if replicas[slot].promise > replicas[latest].promise { latest = slot }
        }
        let others = older.subtracting(SlotSet(latest))
        if others.isEmpty { install(latest) } else { removeRolledBack(others) }
        return true
    }

    private func removeRolledBack(_ gone: SlotSet) {
        noteRolledBack(gone)
        var rest = gone
        while let slot = rest.popFirst() { replicas[slot].failure = .rolledBack }
        proposeRemoval(gone)
    }
    private func noteRolledBack(_ older: SlotSet) {
        var rest = older
        while let slot = rest.popFirst() { note(.replicaRolledBack(slot)) }
    }

    // MARK: - Reinstatement

    /// Takes a replica F back that was removed (at epoch L) in vain. The proof, each part of which
    /// is asked below:
    /// - A member P of the present in-sync set had not promised L or anything later before this
    ///   takeover. Who comes back into the set promises its joining first, so P has been in the set
    ///   in every epoch since L.
    /// - In none of these epochs was anything acknowledged, flushed as stable, or filled: each
    ///   needs every member's promise of the epoch, and P's was never given. This engine has not
    ///   served since it asked P.
    /// - So F holds all that was acknowledged; what else F, or the others, were sent before L is in
    ///   their activity logs, whose union is resolved next.
    /// - F is as it was then: not filled since (its promise is below L), not set aside in a
    ///   salvage, no disk that failed it, and whether it was rolled back is asked as of any member.
    private func reinstate(_ promised: SlotSet) -> Bool {
        guard let record, let departure = record.out.first(where: { mayReinstate($0, promised) })
        else { return false }
        if let slot = slot(of: departure.member.replica) {
            replicas[slot].flushedBefore = departure.stablePoint
        }
        propose(.reinstate) { next in
            next.out.removeAll { $0.member == departure.member }
            next.inSync.append(departure.member)
        }
        return true
    }

    private func mayReinstate(_ departure: VolumeRecord.Departure, _ promised: SlotSet) -> Bool {
        guard let record, departure.isReinstatable, let slot = slot(of: departure.member.replica),
            replicas[slot].isConfigured,
            replicas[slot].link == .greeted, member(slot) == departure.member,
            replicas[slot].size <= record.size
        else { return false }
        if mutations.contains(.reinstateUnproven) { return true }
        // Nor is it a copy from before: it had promised the epoch in which it flushed that point.
        guard replicas[slot].promise < departure.leftEpoch,
            replicas[slot].promise >= departure.stablePoint.epoch
        else { return false }
        var witnesses = promised.subtracting(rolledBackMembers(promised))
        while let witness = witnesses.popFirst() {
            if let before = replicas[witness].promiseBefore, before < departure.leftEpoch {
                return true
            }
        }
        return false
    }

    func noteReinstated(_ slots: SlotSet) {
        var rest = slots
        while let slot = rest.popFirst() {
            replicas[slot].hasFailed = false
            note(.replicaReinstated(slot, proposedRecord.epoch))
        }
    }

    /// Every member is gone. Nothing is removed and nothing is failed: what was on the way waits,
    /// and is sent again, in its old order, after the next takeover.
    func stall() {
        phase = .stalled
        required = []
        resolveBegan = nil
        note(.stalled)
        actions.append(.serving(false))
        if joiner != nil { dropJoiner(retryMilliseconds: 0) }
        interruptScrub()
        abandonJobs()
        forgetUnresolved()
        restartSnapshot()
        for index in 0..<slotsUsed {
            switch slots[index].use {
            case .free, .job, .scrub: break
            case .hedge: dropHedge(index)
            case .flush:
                isFlushInFlight = false
                release(index)
            case .client:
                // Its repair may have been given up.
                slots[index].wasRepaired = false
                guard slots[index].phase != .waiting else { continue }
                if slots[index].isAcknowledged {
                    release(index)
                    continue
                }
                dropEdges(index)
                slots[index].generation &+= 1
                slots[index].phase = .waiting
                slots[index].isReady = false
                slots[index].sent = []
                slots[index].replied = []
                slots[index].full = []
                slots[index].tried = []
                dropOrphan(index)
            }
        }
    }

    // MARK: - Flush and detach

    /// Something was written that none sent before covers.
    func wantFlush() {
        guard flushDueAt == nil else { return }
        flushDueAt = now.adding(milliseconds: configuration.flushIntervalMilliseconds)
    }

    func advanceFlush() {
        // After the release no reply is acted upon: a flush would be on its way for ever.
        guard phase == .serving, !isFlushInFlight, !hasReleased else { return }
        // A log that stays full must be given the time to drain what the last flush covered.
        let isPressed = isLogPressed && now >= pressedFlushAfter
        guard isPressed || (flushDueAt.map { now >= $0 } ?? false) else { return }
        guard !liveMembers.isEmpty else { return }
        isFlushInFlight = true
        sendFlush(allocateSlot(.flush, Operation(kind: .flush, userData: 0)))
    }

    /// Leaves in order: nothing on the way, everything flushed, and the record says so. While the
    /// volume is not served it leaves at once, and the record says what it said.
    func advanceDetach() {
        guard isDetaching else { return }
        switch phase {
        case .idle, .fetching, .hearing, .claiming, .installing, .stalled:
            if pendingChange == nil { stop(record?.isClean == true ? .detached : .left) }
        case .stopped: break
        case .serving:
            if joiner != nil, pendingChange == nil { dropJoiner(retryMilliseconds: 1 << 30) }
            guard isSettled, !isResolving, !isStoreBusy, !isFlushInFlight, now >= serveAfter,
                snapshotRequests.isEmpty, deletionRequests.isEmpty, activeJobs(.scrub) == 0,
                hasReleased || !hasClientOperations
            else { return }
            if record?.isClean == true {
                stop(.detached)
            } else if !isDetachFlushed {
                isDetachFlushed = true
                isFlushInFlight = true
                sendFlush(allocateSlot(.flush, Operation(kind: .flush, userData: 0)))
            } else if highestAcknowledged < stablePoint.sequence {
                hasReleased = true
                propose(.detach) { next in
                    next.engine = .none
                    next.engineEndpoint = ""
                    next.isClean = true
                    next.joining = nil
                }
            } else {
                isDetachFlushed = false
            }
        }
    }
    private var hasClientOperations: Bool {
        (0..<slotsUsed).contains { slots[$0].use == .client }
    }
}
