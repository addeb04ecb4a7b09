// Connections, the volume record and its changes: rules D and I.

extension EngineCore {
    // MARK: - Replica slots

    package func slot(of id: ReplicaID) -> ReplicaSlot? {
        (0..<replicas.count).first { replicas[$0].id == id && id.rawValue != 0 }
    }
    package func replicaID(_ slot: ReplicaSlot) -> ReplicaID { replicas[slot].id }

    /// What an operator sees of a replica.
    package enum ReplicaStanding: String {
        case inSync
        case joining
        case absent
        case full
        case failed
    }
    package func standing(_ slot: ReplicaSlot) -> ReplicaStanding {
        let replica = replicas[slot]
        if members.contains(slot) { return replica.hasFailed ? .failed : .inSync }
        if joiner == slot { return .joining }
        if replica.isFull { return .full }
        return replica.link == .down ? .absent : .failed
    }
    package var memberSlots: SlotSet { members }
    package var configuredSlots: [ReplicaSlot] {
        (0..<replicas.count).filter { replicas[$0].isConfigured || members.contains($0) }
    }

    func configure(_ list: [ReplicaID]) {
        for slot in 0..<replicas.count where replicas[slot].isConfigured {
            guard !list.contains(replicas[slot].id) else { continue }
            replicas[slot].isConfigured = false
            if replicas[slot].link != .down { failReplica(slot, .administrator) }
        }
        for id in list {
            guard let slot = assignSlot(id) else { continue }
            replicas[slot].isConfigured = true
        }
    }
    /// The replica's slot, a free one if it has none yet; nil if there are too many replicas.
    func assignSlot(_ id: ReplicaID) -> ReplicaSlot? {
        if let slot = slot(of: id) { return slot }
        let free = (0..<replicas.count).first {
            !replicas[$0].isConfigured && replicas[$0].link == .down && !members.contains($0)
        }
        guard let slot = free else { return nil }
        replicas[slot] = ReplicaState()
        replicas[slot].id = id
        return slot
    }

    func member(_ slot: ReplicaSlot) -> VolumeRecord.Member {
        VolumeRecord.Member(
            replica: replicas[slot].id, incarnation: replicas[slot].incarnation)
    }
    /// Whether the replica in the slot, as greeted, is the one the record means.
    private func isRecorded(_ slot: ReplicaSlot) -> Bool {
        record?.inSync.contains(member(slot)) ?? false
    }

    /// A loser of a salvage keeps its bytes until an administrator lets it go.
    func mayJoin(_ slot: ReplicaSlot) -> Bool {
        guard let record, !mutations.contains(.joinKept) else { return true }
        return !record.out.contains { $0.member == member(slot) && $0.isKept }
    }

    // MARK: - Connections

    func connected(_ slot: ReplicaSlot) {
        guard replicas[slot].link == .down else { return }
        replicas[slot].link = .connected
        replicas[slot].outstanding = 0
        replicas[slot].reads = 0
        replicas[slot].isPinging = false
        controlPayload = HelloRequest(
            volume: configuration.volume, engine: configuration.instance
        ).encoded()
        sendControl(slot, FrameHeader(kind: .hello))
    }

    func disconnected(_ slot: ReplicaSlot) {
        if replicas[slot].link != .down { replicas[slot].failure = .disconnected }
        wentDown(slot)
    }

    /// Gives a replica up: closes its connection and lets the rules for lost replicas run.
    func failReplica(
        _ slot: ReplicaSlot, _ reason: VolumeRecord.DepartureReason = .unknown
    ) {
        if reason == .full { becameFull(slot) }
        guard replicas[slot].link != .down else { return }
        replicas[slot].failure = reason
        actions.append(.disconnect(slot))
        wentDown(slot)
    }

    private func wentDown(_ slot: ReplicaSlot) {
        guard replicas[slot].link != .down else { return }
        replicas[slot].link = .down
        replicas[slot].outstanding = 0
        replicas[slot].reads = 0
        replicas[slot].sentEpoch = .zero
        replicas[slot].installedEpoch = .zero
        installReplies[slot] = nil
        if phase == .serving, members.contains(slot) {
            if !replicas[slot].hasFailed { note(.replicaLost(slot)) }
            replicas[slot].hasFailed = true
        }
        if joiner == slot {
            if pendingChange == .promote {
                replicas[slot].hasFailed = true  // a member perhaps: known when the store answers
            } else {
                dropJoiner(retryMilliseconds: 1000)
            }
        }
        restartJobs(awaiting: slot)
        retryReads(from: slot)
    }

    /// Reads that a lost replica will not answer are asked of another.
    private func retryReads(from slot: ReplicaSlot) {
        dropHedges(of: slot)
        for index in 0..<slotsUsed {
            let op = slots[index]
            guard op.use == .client, op.phase != .waiting, !op.isReady, Int(op.source) == slot
            else { continue }
            guard op.phase == .readingEdges || op.isRead || op.operation.kind == .status else {
                continue
            }
            retryRead(index)
        }
    }
    func retryRead(_ index: Int) {
        if slots[index].isExpired { return release(index) }
        slots[index].generation &+= 1
        if slots[index].phase == .readingEdges {
            readEdges(index)
        } else if slots[index].isRead {
            sendRead(index)
        } else {
            sendStatus(index)
        }
    }

    func sendControl(_ slot: ReplicaSlot, _ header: FrameHeader) {
        var header = header
        header.tableLength = UInt32(controlPayload.count)
        header.tableChecksum = checksum(of: controlPayload)
        owe(slot)
        actions.append(.sendControl(slot, header))
    }

    func greeted(_ slot: ReplicaSlot, _ reply: HelloReply) {
        guard reply.member.replica == replicas[slot].id else {
            note(.protocolError(slot))
            failReplica(slot, .protocolError)
            return
        }
        replicas[slot].link = .greeted
        mayJoin = true
        let isSame = replicas[slot].incarnation == reply.member.incarnation
        replicas[slot].isRolledBack =
            isSame && (replicas[slot].isRolledBack || reply.promise < replicas[slot].promise)
        replicas[slot].incarnation = reply.member.incarnation
        replicas[slot].instance = reply.instance
        replicas[slot].promise = reply.promise
        replicas[slot].promisedNonce = reply.installed?.nonce ?? 0
        replicas[slot].size = reply.size
        if phase == .installing, members.contains(slot) { install(slot) }
    }

    // MARK: - Install

    /// Asks a member or joiner for its promise to the record that stands.
    func install(_ slot: ReplicaSlot) {
        guard let record, replicas[slot].link == .greeted else { return }
        guard replicas[slot].promise <= record.epoch else {
            if mutations.contains(.recordOlderIgnored) { return failReplica(slot, .protocolError) }
            verifyPromise()
            return
        }
        // There is one record per epoch: whoever keeps another one has seen a store that was since
        // restored from an old copy.
        if replicas[slot].promise == record.epoch, replicas[slot].promisedNonce != record.nonce,
            !mutations.contains(.sameEpochIsSameRecord)
        {
            return stop(.recordOlderThanReplica)
        }
        if members.contains(slot), !isRecorded(slot) { return }  // another making: not the member
        guard replicas[slot].size >= record.size else {
            stop(.sizeMismatch)
            return
        }
        if replicas[slot].sentEpoch != record.epoch { replicas[slot].installSentAt = now }
        replicas[slot].sentEpoch = record.epoch
        controlPayload = InstallRequest(
            engine: configuration.instance, ended: configuration.endedInstance, record: record
        ).encoded()
        var header = FrameHeader(kind: .install)
        header.epoch = record.epoch
        sendControl(slot, header)
    }
    func installAll() {
        var rest = members
        if let joiner { rest.insert(SlotSet(joiner)) }
        while let slot = rest.popFirst() {
            if replicas[slot].link == .greeted, !replicas[slot].hasFailed { install(slot) }
        }
    }

    func installed(_ slot: ReplicaSlot, epoch: Epoch, _ reply: InstallReply) {
        guard epoch == replicas[slot].sentEpoch else { return }  // an earlier record's
        replicas[slot].installedEpoch = epoch
        replicas[slot].promise = epoch
        replicas[slot].promisedNonce = record?.nonce ?? 0
        replicas[slot].isRebooted = reply.isRebooted
        // Without a restart of its host no mark is lost.
        if !reply.isRebooted, reply.flushed < replicas[slot].answered {
            replicas[slot].isRolledBack = true
        }
        replicas[slot].answered = reply.flushed
        replicas[slot].marked = reply.flushed
        replicas[slot].probe = .zero
        if phase == .installing {
            let before = replicas[slot].promiseBefore ?? reply.promiseBefore
            replicas[slot].promiseBefore = min(before, reply.promiseBefore)
        }
        if members.contains(slot) { markedPoint = max(markedPoint, reply.stablePoint) }
        installReplies[slot] = reply
        renewLease(slot, sentAt: replicas[slot].installSentAt)
        waitOut(reply)
        if phase == .serving { updateRequired() }
    }

    /// Every member has promised the record that stands, and nothing is about to change it.
    var isSettled: Bool {
        guard epoch != .zero, pendingChange == nil else { return false }
        var rest = members
        while let slot = rest.popFirst() {
            if replicas[slot].hasFailed || replicas[slot].installedEpoch != epoch {
                return false
            }
        }
        return true
    }

    /// D: acknowledgements may do without a removed member only when the change is recorded *and*
    /// every remaining member has durably installed it.
    func updateRequired() {
        guard let record else { return }
        var rest = members
        while let slot = rest.popFirst() {
            if replicas[slot].installedEpoch != record.epoch,
                !mutations.contains(.ackBeforeInstall)
            {
                return
            }
        }
        required = members
        if let joiner, joinStage == .flushing || joinStage == .promoting,
            !mutations.contains(.promoteWithoutRequiringJoiner)
        {
            required.insert(SlotSet(joiner))
        }
        recheckAll()
    }

    /// Looks at everything on the way again, after the set of needed replies changed.
    func recheckAll() {
        for index in 0..<slotsUsed where slots[index].phase != .waiting {
            switch slots[index].use {
            case .client where slots[index].isReady: answerReady(index)
            case _ where slots[index].phase != .inFlight: break
            case .flush: settleFlush(index)
            case .client where slots[index].isFlush: settleFlush(index)
            case .client where !slots[index].isRead && slots[index].operation.kind != .status:
                settleWrite(index)
            default: break
            }
        }
        startAll()
    }

    // MARK: - The record

    func fetch() {
        phase = .fetching
        isStoreBusy = true
        actions.append(.storeGet)
    }
    /// A replica has promised an epoch this engine does not know: somebody else has taken over, or
    /// the store was restored from an old copy. The store decides which.
    func verifyPromise() {
        isVerifyingPromise = true
        guard !isStoreBusy, pendingChange == nil else { return }
        isStoreBusy = true
        actions.append(.storeGet)
    }

    /// Proposes the next record: one epoch further, with a nonce of its own.
    func propose(_ purpose: ChangePurpose, _ change: (inout VolumeRecord) -> Void) {
        guard let record else { return }
        precondition(pendingChange == nil && !isStoreBusy)
        proposedRecord = record
        proposedRecord.epoch = record.epoch.next
        proposedRecord.nonce = nextNonce()
        proposedRecord.change = purpose.recorded
        change(&proposedRecord)
        precondition(!proposedRecord.inSync.isEmpty || mutations.contains(.removeLast))
        pendingChange = purpose
        isStoreBusy = true
        actions.append(.storeCompareAndSwap(expected: record.epoch))
    }

    func storeAnswered(_ outcome: StoreOutcome) {
        guard isStoreBusy else { return }
        isStoreBusy = false
        switch outcome {
        case .unavailable:
            note(.storeUnavailable)
            if mutations.contains(.inDoubtCASAssumedLost), pendingChange != nil {
                if pendingChange == .remove { dropRemovedUnrecorded() }
                pendingChange = nil
                return
            }
            storeRetryAt = now.adding(milliseconds: 200)
        case .notFound:
            stop(.volumeNotFound)
        case .record(let current), .conflict(let current):
            if pendingChange == nil { fetched(current) } else { swapped(current) }
        }
    }

    /// The answer to a get.
    private func fetched(_ current: VolumeRecord) {
        if isVerifyingPromise, let record {
            stop(current.epoch > record.epoch ? .fenced : .recordOlderThanReplica)
            return
        }
        guard phase == .fetching else { return }
        record = current
        recordBefore = current
        adoptMembers()
        claim()
    }

    /// The answer to a compare-and-swap. In doubt, the same proposal is sent again until an epoch
    /// above the old one is read: seeing the old one proves nothing, the first copy may still land.
    private func swapped(_ current: VolumeRecord) {
        guard let record else { return }
        if current.epoch == proposedRecord.epoch && current.nonce == proposedRecord.nonce {
            committed()
        } else if current.epoch <= record.epoch {
            storeRetryAt = now.adding(milliseconds: 50)
        } else {
            stop(.fenced)
        }
    }

    private func committed() {
        guard let purpose = pendingChange else { return }
        let previous = members
        record = proposedRecord
        pendingChange = nil
        adoptMembers()
        switch purpose {
        case .takeover:
            beginInstalling()
        case .remove:
            noteRemoved(previous.subtracting(members))
            if phase == .installing {
                deadline = now.adding(milliseconds: configuration.removalDeadlineMilliseconds)
            }
            installAll()
            if mutations.contains(.ackBeforeInstall) { updateRequired() }
        case .join:
            if let joiner { note(.replicaJoining(joiner, proposedRecord.epoch)) }
            installAll()
        case .promote:
            // First its promise, then its first read as a member.
            installAll()
            promoted()
        case .reinstate:
            noteReinstated(members.subtracting(previous))
            deadline = now.adding(milliseconds: configuration.removalDeadlineMilliseconds)
            installAll()
        case .detach:
            installAll()
        }
        if isVerifyingPromise { verifyPromise() }
    }

    private func noteRemoved(_ gone: SlotSet) {
        var rest = gone
        while let slot = rest.popFirst() {
            note(.replicaRemoved(slot, proposedRecord.epoch, replicas[slot].failure))
            replicas[slot].hasFailed = false
            replicas[slot].joinAfter = max(
                replicas[slot].joinAfter, now.adding(milliseconds: 200))
        }
    }

    private func adoptMembers() {
        guard let record else { return }
        members = []
        for member in record.inSync {
            // Slots are few, the set of members smaller: a record that names more is damaged.
            guard let slot = assignSlot(member.replica) else { continue }
            members.insert(SlotSet(slot))
        }
    }

    /// D: takes failed members out of the in-sync set, never the last one.
    func removeFailedMembers() {
        guard phase == .serving, pendingChange == nil else { return }
        var failed: SlotSet = []
        var rest = members
        while let slot = rest.popFirst() {
            if replicas[slot].hasFailed { failed.insert(SlotSet(slot)) }
        }
        guard !failed.isEmpty else { return }
        // Nor, before they are equal, the last one whose host has not restarted.
        guard failed != members || mutations.contains(.removeLast),
            !isResolving || mayRemoveOthers(members.subtracting(failed))
        else {
            stall()
            return
        }
        guard !isStoreBusy else { return }
        proposeRemoval(failed)
    }

    func proposeRemoval(_ gone: SlotSet) {
        propose(.remove) { next in
            for slot in 0..<replicas.count where gone.contains(slot) {
                let id = replicas[slot].id
                guard let index = next.inSync.firstIndex(where: { $0.replica == id }) else {
                    continue
                }
                let member = next.inSync.remove(at: index)
                next.out.removeAll { $0.member.replica == id }
                next.out.append(
                    VolumeRecord.Departure(
                        member: member, leftEpoch: next.epoch, stablePoint: flushedBound(slot),
                        reason: replicas[slot].failure))
            }
        }
    }
    /// Only under a mutation: behaves as if the removal had failed, and goes on without the member.
    private func dropRemovedUnrecorded() {
        var rest = members
        while let slot = rest.popFirst() {
            if replicas[slot].hasFailed {
                required.remove(SlotSet(slot))
                replicas[slot].hasFailed = false
                members.remove(SlotSet(slot))
            }
        }
        recheckAll()
    }

    // MARK: - Time

    func tick() {
        if let retry = storeRetryAt, now >= retry, !isStoreBusy {
            storeRetryAt = nil
            isStoreBusy = true
            if pendingChange != nil, let record {
                actions.append(.storeCompareAndSwap(expected: record.epoch))
            } else {
                actions.append(.storeGet)
            }
        }
        let deadline = configuration.removalDeadlineMilliseconds * 1_000_000
        for slot in 0..<replicas.count where replicas[slot].link != .down {
            if replicas[slot].outstanding > 0,
                now.nanoseconds(since: replicas[slot].owingSince) >= deadline
            {
                failReplica(slot, .silent)
            }
        }
        renewLeases()
        watchLatencies()
        hedgeReads()
        expireOld()
        if isStarved { startAll() }
        retryFull()
    }
}
