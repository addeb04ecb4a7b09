// Rule G, growing: every member makes room, then the record says the new size, then all install it.
//
// A copy that cannot be that large (a file system's limit, a full disk) says so before anything is
// promised, and the volume stays as it is. A crash leaves
//  1. before the change is recorded: the old size, and room that nobody uses;
//  2. after it: the new size, which the next takeover installs.
// Nothing beyond the old size is served before 2, and what is sent there goes behind the Install:
// no member sees it at the old size.

struct ResizeRequest {
    var token: UInt64
    /// Bytes.
    var size: UInt64
    /// The change was sent to the store: the volume may be that large.
    var isProposed = false
}

extension EngineCore {
    private static let resizesWaitingMax = 16

    func resize(_ token: UInt64, to size: UInt64) {
        precondition(VolumeRecord.isValidSize(size))
        guard phase == .serving, !isDetaching, let record,
            resizeRequests.count < Self.resizesWaitingMax
        else { return answerResize(token, .notServing) }
        guard size >= record.size else { return answerResize(token, .smaller) }
        resizeRequests.append(ResizeRequest(token: token, size: size))
    }
    func answerResize(_ token: UInt64, _ result: ResizeResult, by slot: ReplicaSlot = 0) {
        actions.append(.resized(token: token, result, by: slot))
    }
    private func endResize(_ result: ResizeResult, by slot: ReplicaSlot = 0) {
        answerResize(resizeRequests.removeFirst().token, result, by: slot)
        forgetRoom()
    }
    private func forgetRoom() {
        roomAsked = []
        roomMade = []
        roomAttempt &+= 1
    }

    /// After every event, while there is a request.
    func advanceResize() {
        guard let request = resizeRequests.first, let record else { return }
        if request.isProposed {
            // All have it: nobody answers for the old size any more.
            if phase == .serving, record.size >= request.size, isSettled { endResize(.ok) }
            return
        }
        if isDetaching { return endResize(.notServing) }
        guard phase == .serving, isSettled, !isStoreBusy, !isResolving, !hasReleased,
            snapshotStage == .waiting, joinStage == .none || joinStage == .copying
        else { return }
        guard request.size > record.size else {
            return endResize(request.size == record.size ? .exists : .smaller)
        }
        guard record.mayGrow else { return endResize(.tooMany) }
        var copies = members
        if let joiner { copies.insert(SlotSet(joiner)) }
        askForRoom(copies.subtracting(roomAsked), request.size)
        guard copies.isSubset(of: roomMade) || mutations.contains(.growthUnprepared) else { return }
        resizeRequests[0].isProposed = true
        propose(.resize) { $0.grow(to: request.size) }
    }

    private func askForRoom(_ slots: SlotSet, _ size: UInt64) {
        var rest = slots
        while let slot = rest.popFirst() {
            guard isLive(slot) else { continue }
            roomAsked.insert(SlotSet(slot))
            var header = FrameHeader(kind: .prepareSize)
            header.tag = roomAttempt
            header.offset = size
            send(slot, header)
        }
    }
    func madeRoom(_ slot: ReplicaSlot, _ header: FrameHeader) {
        guard let request = resizeRequests.first, !request.isProposed, header.tag == roomAttempt,
            roomAsked.contains(slot)
        else { return }
        switch header.status {
        case .ok: roomMade.insert(SlotSet(slot))
        case .noSpace: endResize(.noSpace, by: slot)
        default: endResize(.refused, by: slot)
        }
    }
    /// An Install went past the question: it is asked again.
    func roomRefused(_ slot: ReplicaSlot, _ header: FrameHeader) -> Bool {
        guard header.kind == .prepareSize else { return false }
        if header.tag == roomAttempt { roomAsked.remove(SlotSet(slot)) }
        return true
    }
    func forgetRoom(of slot: ReplicaSlot) {
        roomAsked.remove(SlotSet(slot))
        roomMade.remove(SlotSet(slot))
    }

    /// The record says so, and everybody was told: what is beyond the old size is absent on all of
    /// them, on the joiner as well.
    func resized(from before: UInt64) {
        guard let record else { return }
        note(.resized(record.size, record.epoch))
        actions.append(.sizeChanged)
        if joinStage == .copying {
            let words = Int((Geometry.regionCount(size: record.size) + 63) / 64)
            needed += [UInt64](repeating: 0, count: words - needed.count)
            held += [UInt64](repeating: 0, count: words - held.count)
        }
        // Nothing is on the way to what is new, so that what holds the last region holds all of it.
        guard before % UInt64(Geometry.regionSize) != 0 else { return }
        let last = Geometry.region(ofByte: before - 1)
        for job in 0..<jobsMax where jobs[job].stage != .free && jobs[job].region == last {
            let index = Int(jobs[job].slot)
            slots[index].endBlock = slots[index].firstBlock + UInt64(blockCount(last))
            if jobs[job].stage != .waiting { restart(job) }
        }
    }

    func abandonResizes() {
        for request in resizeRequests {
            answerResize(request.token, request.isProposed ? .inDoubt : .notServing)
        }
        resizeRequests = []
    }
}
