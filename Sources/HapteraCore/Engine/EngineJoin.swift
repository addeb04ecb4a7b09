// Rule J: a replica outside the in-sync set is filled and promoted.

extension EngineCore {
    func advanceJoin() {
        guard phase == .serving, !isResolving else { return }
        switch joinStage {
        case .none: chooseJoiner()
        case .installing:
            guard let joiner, let record, isSettled,
                replicas[joiner].installedEpoch == record.epoch
            else { return }
            if !recordRollBack(joiner) { beginMapping() }
        case .mapping: advanceMapping()
        case .promoting: break
        case .copying:
            if neededCount == 0, activeJobs(.copy) == 0 { beginJoinFlush() }
        case .flushing: promoteIfFlushed()
        }
    }

    /// Takes the first replica that is there, and not a member, through the record into joining.
    private func chooseJoiner() {
        guard mayJoin, !isDetaching, isSettled, !isStoreBusy, let record else { return }
        // Asked again when somebody is greeted, and with every tick.
        mayJoin = false
        for slot in 0..<replicas.count {
            let replica = replicas[slot]
            guard replica.isConfigured, replica.link == .greeted, !members.contains(slot),
                mayJoin(slot),
                now >= replica.joinAfter
            else { continue }
            guard replica.promise <= record.epoch else {
                if mutations.contains(.recordOlderIgnored) { continue }
                verifyPromise()
                return
            }
            guard replica.size <= record.size else { continue }
            let member = member(slot)
            joiner = slot
            joinStage = .installing
            replicas[slot].hasFailed = false
            replicas[slot].isFull = false
            let regions = Geometry.regionCount(size: record.size)
            needed = [UInt64](repeating: 0, count: Int((regions + 63) / 64))
            neededCount = 0
            neededTotal = 0
            neededCursor = 0
            // J: writes on the way now may or may not be in what the joiner is compared with.
            if !mutations.contains(.inFlightRegionsNotCopied) { markRegionsInFlight() }
            if !mutations.contains(.joinerKeepsRequests) { forgetRequests(of: slot) }
            joinProgress = JoinProgress(isNew: isNewReplica(member), at: now)
            propose(.join) { next in
                next.joining = member
                if replicas[slot].isRolledBack { next.markRolledBack(member) }
            }
            return
        }
    }

    /// What it was sent, or answered, before its present connection: no reply to that will come,
    /// and none that came speaks for the joiner.
    private func forgetRequests(of slot: ReplicaSlot) {
        for index in 0..<slotsUsed where slots[index].use != .free {
            slots[index].sent.remove(SlotSet(slot))
            slots[index].replied.remove(SlotSet(slot))
            slots[index].full.remove(SlotSet(slot))
        }
    }

    private func markRegionsInFlight() {
        for index in 0..<slotsUsed {
            guard slots[index].use == .client, slots[index].phase != .waiting,
                slots[index].endBlock > slots[index].firstBlock, !slots[index].isRead
            else { continue }
            markNeeded(slots[index].firstBlock / UInt64(Geometry.blocksPerRegion))
        }
    }

    func isNeeded(_ region: UInt64) -> Bool {
        needed[Int(region / 64)] & (1 << (region % 64)) != 0
    }
    func markNeeded(_ region: UInt64) {
        guard !isNeeded(region) else { return }
        needed[Int(region / 64)] |= 1 << (region % 64)
        neededCount += 1
    }
    /// The next region to copy that no job has yet, round and round until none is left.
    func nextNeeded() -> UInt64? {
        guard neededCount > activeJobs(.copy) else { return nil }
        for _ in 0...needed.count {
            if neededCursor >= needed.count { neededCursor = 0 }
            var word = needed[neededCursor]
            while word != 0 {
                let region = UInt64(neededCursor * 64 + word.trailingZeroBitCount)
                if !hasJob(region) { return region }
                word &= word - 1
            }
            neededCursor += 1
        }
        return nil
    }

    func regionCopied(_ region: UInt64) {
        guard joinStage == .copying, isNeeded(region) else { return }
        creditWithheld(region)
        needed[Int(region / 64)] &= ~(1 << (region % 64))
        neededCount -= 1
        regionsCopied += 1
        lastRegionCopied = region
        let done = neededTotal - neededCount
        if let joiner, done % 64 == 0 || neededCount == 0 {
            note(
                .rebuildProgress(
                    joiner, regionsDone: UInt64(done), regionsTotal: UInt64(neededTotal)))
        }
    }

    // MARK: - Promotion

    /// Everything is copied. From here on the joiner's reply is required, then it is flushed, then
    /// the record makes it a member: in this order, so that it holds everything acknowledged before
    /// the record says so and everything after.
    private func beginJoinFlush() {
        guard let joiner, isSettled, isLive(joiner) else { return }
        joinStage = .flushing
        if !mutations.contains(.promoteWithoutRequiringJoiner) {
            required.insert(SlotSet(joiner))
        }
        isJoinFlushed = false
        if mutations.contains(.promoteWithoutFlush) {
            isJoinFlushed = true
            return
        }
        var header = FrameHeader(kind: .flush)
        let index = allocateSlot(.flush, Operation(kind: .flush, userData: Self.joinFlush))
        sequence = SequenceNumber(sequence.rawValue + 1)
        slots[index].phase = .inFlight
        slots[index].sequence = sequence
        slots[index].sentAt = now
        slots[index].sent = SlotSet(joiner)
        header.tag = tag(index)
        header.sequence = sequence
        send(joiner, header)
    }
    static let joinFlush: UInt64 = 1

    private func promoteIfFlushed() {
        guard isJoinFlushed, let joiner, isSettled, !isStoreBusy else { return }
        let member = VolumeRecord.Member(
            replica: replicas[joiner].id, incarnation: replicas[joiner].incarnation)
        joinStage = .promoting
        propose(.promote) { next in
            next.inSync.append(member)
            next.joining = nil
            next.out.removeAll { $0.member.replica == member.replica }
        }
    }

    func promoted() {
        guard let joiner else { return }
        unreadableJoins = 0
        note(.replicaPromoted(joiner, proposedRecord.epoch))
        replicas[joiner].fullBackoff = 0
        replicas[joiner].isRolledBack = false
        self.joiner = nil
        joinStage = .none
        needed = []
        held = []
        // Writes that were only held for the joiner now count it as a member.
        recheckAll()
        flushDueAt = now
    }

    /// The joiner drops out: no record change, no acknowledgement waits for it.
    func dropJoiner(retryMilliseconds: UInt64) {
        guard let slot = joiner, pendingChange != .promote else { return }
        note(.joinFailed(slot))
        joiner = nil
        joinStage = .none
        neededCount = 0
        required.remove(SlotSet(slot))
        replicas[slot].joinAfter = max(
            replicas[slot].joinAfter, now.adding(milliseconds: retryMilliseconds))
        replicas[slot].sentEpoch = .zero
        replicas[slot].installedEpoch = .zero
        abandonJobs(.copy)
        for index in 0..<slotsUsed
        where slots[index].use == .flush && slots[index].operation.userData == Self.joinFlush {
            release(index)
        }
        if replicas[slot].link != .down {
            // What is on the way to it belongs to this attempt: a new one begins on a new
            // connection.
            actions.append(.disconnect(slot))
            replicas[slot].link = .down
            replicas[slot].outstanding = 0
            forgetRoom(of: slot)
        }
        if phase == .serving { recheckAll() }
    }
}
