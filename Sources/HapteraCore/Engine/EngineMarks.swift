// What a replica is known to have flushed, over power cuts: how a copy that was rolled back is told
// from one that merely lost what was never flushed.
//
// A replica stores a mark of each point it has flushed; the mark becomes durable with the next sync
// of its log. So a mark is known durable when a flush has been answered that was sent after the one
// it marks was answered. One such flush at a time is followed, per replica: its probe.

extension EngineCore {
    /// A flush of this number is about to be sent to the replica.
    func probeMark(_ slot: ReplicaSlot, _ sequence: SequenceNumber) {
        guard replicas[slot].probe == .zero else { return }
        replicas[slot].probe = sequence
        replicas[slot].probedPoint = replicas[slot].answered
    }

    func flushAnswered(_ slot: ReplicaSlot, _ header: FrameHeader) {
        if header.sequence == replicas[slot].probe {
            replicas[slot].probe = .zero
            replicas[slot].marked = max(replicas[slot].marked, replicas[slot].probedPoint)
        }
        guard header.auxiliary & FlushReply.isUnmarked == 0 else { return }
        // The replica marks the epoch that the flush was sent in; it answers in that of an Install
        // that has come since.
        guard let index = slotIndex(ofTag: header.tag) else { return }
        let epoch = min(header.epoch, slots[index].epoch)
        let point = StablePoint(epoch: epoch, sequence: header.sequence)
        replicas[slot].answered = max(replicas[slot].answered, point)
    }

    /// Raises the point every member holds a durable mark of, at most to S.
    func learnMarks(upTo stable: StablePoint) {
        var least = stable
        var rest = members
        while let slot = rest.popFirst() { least = min(least, replicas[slot].marked) }
        markedPoint = max(markedPoint, least)
    }

    /// What the replica, leaving the in-sync set, has certainly flushed and marked.
    func flushedBound(_ slot: ReplicaSlot) -> StablePoint {
        if replicas[slot].failure == .rolledBack { return markedPoint }
        // Without an Install of it this engine knows only what its peers were told by another.
        return replicas[slot].marked == .zero ? markedPoint : replicas[slot].marked
    }

    /// T2: the members that have promised and whose files are older than their peers know them to
    /// have been. Never all of them: who was told of the point holds a mark of it.
    func rolledBackMembers(_ promised: SlotSet) -> SlotSet {
        var known = StablePoint.zero
        var rest = promised
        while let slot = rest.popFirst() {
            known = max(known, installReplies[slot]?.stablePoint ?? .zero)
        }
        var found = SlotSet()
        rest = promised
        while let slot = rest.popFirst() {
            if let reply = installReplies[slot],
                reply.flushed < max(known, replicas[slot].flushedBefore)
            {
                found.insert(SlotSet(slot))
            }
        }
        return found == promised ? SlotSet() : found
    }
}

extension VolumeRecord.DepartureReason {
    /// Why a replica that answered a request with this status is given up.
    static func failing(_ status: FrameStatus) -> Self {
        switch status {
        case .noSpace: .full
        case .ioError, .checksumMismatch: .ioError
        case .unavailable: .disconnected
        default: .protocolError
        }
    }
}
