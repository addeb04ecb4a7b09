// The volume record and its changes: rule D.

extension EngineCore {
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
        pendingChange = purpose
        isChangeInDoubt = false
        refusalReason = ""
        proposedRecord = record
        proposedRecord.epoch = record.epoch.next
        proposedRecord.nonce = nextNonce()
        proposedRecord.change = purpose.recorded
        change(&proposedRecord)
        forgetDeparted()
        proposedRecord.promised = promised(by: proposedRecord, before: record)
        precondition(!proposedRecord.inSync.isEmpty || mutations.contains(.removeLast))
        isStoreBusy = true
        actions.append(.storeCompareAndSwap(expected: record.epoch))
    }

    /// What every member of `next` has promised, as far as this engine knows. Who is reinstated was
    /// not asked for the promises given while it was out.
    private func promised(by next: VolumeRecord, before: VolumeRecord) -> Epoch {
        var least = before.epoch
        for member in next.inSync {
            guard let slot = slot(of: member.replica), self.member(slot) == member else {
                return before.promised
            }
            least = min(least, replicas[slot].promise)
        }
        return pendingChange == .reinstate
            ? min(least, before.promised) : max(least, before.promised)
    }

    /// Who left and is not configured any more need not be remembered: should it return, it is
    /// compared in full. Losers of a salvage are kept until an administrator lets them go.
    private func forgetDeparted() {
        var excess = proposedRecord.out.count - Self.departedMax
        proposedRecord.out.removeAll { departure in
            guard excess > 0, !departure.isKept,
                slot(of: departure.member.replica).map({ !replicas[$0].isConfigured }) ?? true
            else { return false }
            excess -= 1
            return true
        }
    }
    private static let departedMax = 16

    func storeAnswered(_ outcome: StoreOutcome) {
        guard isStoreBusy else { return }
        isStoreBusy = false
        switch outcome {
        case .unavailable:
            note(.storeUnavailable)
            isChangeInDoubt = pendingChange != nil
            if mutations.contains(.inDoubtCASAssumedLost), pendingChange != nil {
                if pendingChange == .remove { dropRemovedUnrecorded() }
                pendingChange = nil
                return
            }
            storeRetryAt = now.adding(milliseconds: 200)
        case .notFound:
            stop(.volumeNotFound)
        case .refused(let reason):
            refused(reason)
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
        let isNews = phase == .hearing && current.epoch > record?.epoch ?? .zero
        guard phase == .fetching || isNews else { return }
        record = current
        recordBefore = current
        adoptMembers()
        greetAgain()
        hear()
    }

    /// Members that greeted before the record was read, or long before the claim was granted, may
    /// have promised more since. (Seed 274: an engine still at work had raised both meanwhile. Seed
    /// 5811131: what an engine before had asked for took long, as did the claim.)
    func greetAgain() {
        var rest = members
        while let slot = rest.popFirst() {
            if replicas[slot].link == .greeted, isOlderMember(slot) {
                failReplica(slot, .disconnected)
            }
        }
    }

    /// The answer to a compare-and-swap. In doubt, the same proposal is sent again until an epoch
    /// above the old one is read: seeing the old one proves nothing, the first copy may still land.
    private func swapped(_ current: VolumeRecord) {
        guard let record else { return }
        if current.epoch == proposedRecord.epoch && current.nonce == proposedRecord.nonce {
            committed()
        } else if !refusalReason.isEmpty, current == record {
            giveUpChange()
        } else if current.epoch <= record.epoch {
            storeRetryAt = now.adding(milliseconds: 50)
        } else {
            stop(.fenced)
        }
    }

    /// What is proposed must not become the record. If an earlier request for it was not answered,
    /// that says nothing of the earlier one: the record tells whether it was taken.
    private func refused(_ reason: String) {
        guard pendingChange != nil else {
            storeRetryAt = now.adding(milliseconds: 200)
            return
        }
        refusalReason = reason
        guard isChangeInDoubt else { return giveUpChange() }
        isStoreBusy = true
        actions.append(.storeGet)
    }

    /// A joiner can be done without, also if a request for it lands yet: both records have the same
    /// members, and the next change meets the other one and stops this engine. What else is needed
    /// and refused this engine cannot put right. (After a promotion in doubt it could not even tell
    /// whose replies count.) Another one begins with what the record says then.
    private func giveUpChange() {
        guard pendingChange == .join else { return stop(.refused) }
        pendingChange = nil
        dropJoiner(retryMilliseconds: 1000)
        if isVerifyingPromise { verifyPromise() }
    }

    private func committed() {
        guard let purpose = pendingChange else { return }
        let previous = members
        let sizeBefore = size
        let layersBefore = record?.layers ?? []
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
            // Its mark tells that all others know of the removal.
            wantFlush()
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
        case .snapshot, .revert:
            installAll()
            frozeHead()
        case .deleteSnapshot:
            installAll()
            deletedSnapshot(of: layersBefore)
        case .resize:
            installAll()
            resized(from: sizeBefore)
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
        // Who comes back may have what nobody had.
        lostReads = [:]
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
}
