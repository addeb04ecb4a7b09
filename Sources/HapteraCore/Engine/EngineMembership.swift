// Connections and promises: rule I.

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
                && $0 != joiner  // it may be a member by now
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
        forgetRoom(of: slot)
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
        restartScrub(awaiting: slot)
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
        if phase == .hearing { _ = isAsRecorded(slot) }
        if phase == .installing, members.contains(slot) { install(slot) }
    }

    /// Whether what the replica promised agrees with the record. If not, this engine is not the
    /// volume's any more, or the store was restored from an old copy: it finds out which, and
    /// stops.
    func isAsRecorded(_ slot: ReplicaSlot) -> Bool {
        guard let record else { return false }
        guard replicas[slot].promise <= record.epoch else {
            if mutations.contains(.recordOlderIgnored) {
                failReplica(slot, .protocolError)
            } else {
                verifyPromise()
            }
            return false
        }
        // There is one record per epoch: whoever keeps another one has seen a store that was since
        // restored from an old copy.
        if replicas[slot].promise == record.epoch, replicas[slot].promisedNonce != record.nonce,
            members.contains(slot), !mutations.contains(.sameEpochIsSameRecord)
        {
            stop(.recordOlderThanReplica)
            return false
        }
        return true
    }

    // MARK: - Install

    /// Asks a member or joiner for its promise to the record that stands.
    func install(_ slot: ReplicaSlot) {
        guard let record, replicas[slot].link == .greeted, isAsRecorded(slot) else { return }
        if members.contains(slot), !isRecorded(slot) { return }  // another making: not the member
        if members.contains(slot), isOlderMember(slot), !isLossAccepted { return }
        // A smaller copy grows with the Install.
        guard replicas[slot].size <= record.size else {
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
        // Nothing begins before everything is settled: one outcome may close another's region.
        isRechecking = true
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
        isRechecking = false
        startAll()
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
        failStuck()
        renewLeases()
        watchLatencies()
        hedgeReads()
        expireOld()
        if isStarved { startAll() }
        retryFull()
    }

    /// A request that others have done, and one replica owes for so many removal deadlines, is
    /// stuck there, though it answers other requests: its answers to those must not cover for it.
    /// Not while what takes room in activity logs waits for a takeover's end.
    private static let stuckDeadlines: UInt64 = 4
    private func failStuck() {
        guard phase == .serving, !isResolving else { return }
        let limit = Self.stuckDeadlines * configuration.removalDeadlineMilliseconds * 1_000_000
        for index in 0..<slotsUsed
        where slots[index].phase == .inFlight
            && (slots[index].use == .client || slots[index].use == .flush)
        {
            guard now.nanoseconds(since: slots[index].sentAt) >= limit, !slots[index].isReady else {
                continue
            }
            if slots[index].isRead {
                let source = Int(slots[index].source)
                if isLive(source), liveMembers.count > 1 { failReplica(source, .silent) }
                continue
            }
            let answered = slots[index].replied.union(slots[index].full)
            guard !answered.isEmpty else { continue }
            var late = slots[index].sent.subtracting(answered)
            while let slot = late.popFirst() {
                if isLive(slot) { failReplica(slot, .silent) }
            }
        }
    }
}
