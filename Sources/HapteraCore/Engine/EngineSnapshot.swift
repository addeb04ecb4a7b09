// Rule S, snapshots: the head is frozen by a change of the record and the Install that follows it.
//
// No request of a client waits for it. Whatever changes data names the layer that was the engine's
// head when it was sent, and the engine takes the new head in the step that sends the Install to
// all members. So a write is before the freeze or behind it, on all of them alike, even if one
// refuses it and gets it again after the Install.
//
// A revert is the same, but for what the new head is made over: the layer of an older snapshot. It
// changes what clients see, so they are held from the request until it is answered.
//
// A crash, of anybody, leaves behind
//  1. before the change is recorded: no snapshot;
//  2. before all have installed it: the snapshot, which the next takeover installs. Writes to the
//     frozen layer that are not everywhere are in the activity logs, under that layer: resolved;
//  3. before the flush: the same, with what was not flushed lost only as in the head;
//  4. after it: nothing to do. Only now is the requester answered.

/// A request for a snapshot, or for a revert, which takes one.
struct SnapshotRequest {
    var token: UInt64
    var name: String
    /// The snapshot to go back to; empty: this is no revert.
    var target = ""
    /// Of the hold that its freeze begins; 0: none.
    var hold: UInt64 = 0
    /// Milliseconds since 1970.
    var created: UInt64
    /// The change was sent to the store: the snapshot may be there.
    var isProposed = false
    /// The head is frozen, which is all that who asks with a hold waits for.
    var isAnswered = false
    /// The layer that was frozen; `.head`: not known yet.
    var layer = LayerID.head
    var isRevert: Bool { !target.isEmpty }
}

/// Where the first of the requests stands.
///
///     waiting -> proposed -> frozen -> flushing -> answered
///        |                     ^
///        +--- its name is there+
///     frozen, flushing -> waiting: the volume stalled; the record says what became of it
enum SnapshotStage: UInt8, BitwiseCopyable {
    /// For the membership to settle, and for members to be equal.
    case waiting
    /// The change of the record is on the way.
    case proposed
    /// Members install it, and writes to the frozen layer end.
    case frozen
    /// What the frozen layer holds becomes durable.
    case flushing
}

extension EngineCore {
    /// Requests that wait for the one under way.
    private static let snapshotsWaitingMax = 16
    static let snapshotFlush: UInt64 = 2

    func takeSnapshot(_ request: SnapshotRequest, _ asked: SnapshotHold? = nil) {
        precondition((1...VolumeRecord.nameLengthMax).contains(request.name.utf8.count))
        let token = request.token
        guard phase == .serving, !isDetaching, let record else {
            return answerSnapshot(token, .head, .notServing)
        }
        if let refusal = refusal(of: request, record) {
            return answerSnapshot(token, .head, refusal)
        }
        // One that an engine before left half-way, or that is still under way, is finished first:
        // the answer says that it is equal and durable everywhere.
        if let there = record.snapshot(named: request.name), there.layer <= finishedLayer {
            return answerSnapshot(token, there.layer, .exists)
        }
        guard snapshotRequests.count <= Self.snapshotsWaitingMax else {
            return answerSnapshot(token, .head, .notServing)
        }
        if let asked {
            guard hold == nil else { return answerSnapshot(token, .head, .busy) }
            beginHold(asked)
        }
        snapshotRequests.append(request)
    }
    /// Why it cannot be, by the record; nil: it can, or is there.
    private func refusal(of request: SnapshotRequest, _ record: VolumeRecord) -> SnapshotResult? {
        let there = record.snapshot(named: request.name)
        guard request.isRevert else {
            return there != nil || record.mayHold(snapshotNamed: request.name) ? nil : .tooMany
        }
        guard let target = record.snapshot(named: request.target) else { return .notThere }
        if let there {
            return record.hasReverted(to: target, keeping: there) ? nil : .nameTaken
        }
        return record.mayRevert(keeping: request.name) ? nil : .tooMany
    }
    func answerSnapshot(_ token: UInt64, _ layer: LayerID, _ result: SnapshotResult) {
        actions.append(.snapshotTaken(token: token, layer, result))
    }

    /// After every event, while there is a request.
    func advanceSnapshot() {
        guard phase == .serving else { return }
        if isDetaching { refuseWaiting() }
        switch snapshotStage {
        case .waiting: beginSnapshot()
        case .frozen: flushSnapshot()
        case .proposed, .flushing: break
        }
    }
    /// Clients wait while the first of the requests is a revert.
    private func holdClients() {
        let isRevert = snapshotRequests.first?.isRevert == true
        guard isRevert != isReverting else { return }
        isReverting = isRevert
        if !isReverting { startAll() }
    }
    private var hasClientAtWork: Bool {
        (0..<slotsUsed).contains {
            slots[$0].use == .client && slots[$0].operation.layer == .head
                && slots[$0].phase != .waiting
        }
    }

    private func beginSnapshot() {
        guard let request = snapshotRequests.first, let record else { return }
        holdClients()
        guard isSettled, !isStoreBusy, !isResolving, !hasReleased else { return }
        if let refusal = refusal(of: request, record) { return endSnapshot(refusal) }
        if let there = record.snapshot(named: request.name) {
            snapshotRequests[0].layer = there.layer
            beginFinishing()
            return flushSnapshot()
        }
        // An Install that a member refuses costs the member, and if all do, the volume stands.
        guard !isAnyLayersFull else { return endSnapshot(.tooManyLayers) }
        // Whoever wanted it held back has given it up.
        if request.hold != 0, !isHoldOpen(request.hold) { return endSnapshot(.notHeld) }
        // A joiner that is about to be a member is one first. And who has no space for a write may
        // have none for a layer's files: an Install that fails costs the member.
        guard joinStage != .flushing, joinStage != .promoting, !isFullEverywhere else { return }
        guard !request.isRevert || !hasClientAtWork else { return }
        let target = record.snapshot(named: request.target)?.layer
        snapshotRequests[0].isProposed = true
        snapshotStage = .proposed
        propose(request.isRevert ? .revert : .snapshot) {
            $0.freezeHead(request.name, created: request.created, target: target)
        }
    }

    private var isAnyLayersFull: Bool {
        var rest = members
        while let slot = rest.popFirst() {
            if replicas[slot].isLayersFull { return true }
        }
        return false
    }

    /// The record says so, and everybody was told: what is sent from here on goes to the new head.
    func frozeHead() {
        guard !snapshotRequests.isEmpty else { return }
        snapshotRequests[0].layer = proposedRecord.snapshots.last?.layer ?? .head
        beginFinishing()
        let token = snapshotRequests[0].hold
        guard token != 0 else { return }
        startHolding(token, above: snapshotRequests[0].layer)
        snapshotRequests[0].isAnswered = true
        answerSnapshot(snapshotRequests[0].token, snapshotRequests[0].layer, .ok)
    }
    private func beginFinishing() {
        snapshotStage = .frozen
        snapshotCursor = 0
    }

    /// Flushes when every member has the new head and nothing more can change what is frozen.
    private func flushSnapshot() {
        guard isSettled, !isResolving, !hasWritesBelowHead(), !hasReleased else { return }
        if mutations.contains(.snapshotBeforeFlush) { return finishSnapshot() }
        snapshotStage = .flushing
        sendFlush(allocateSlot(.flush, Operation(kind: .flush, userData: Self.snapshotFlush)))
    }

    /// Whether a write to a layer that is frozen now is on the way, be it to the joiner only. A
    /// slot that holds none gets none any more, so none is looked at again.
    func hasWritesBelowHead() -> Bool {
        while snapshotCursor < slotsUsed {
            let index = snapshotCursor
            if slots[index].use == .client, slots[index].phase == .inFlight,
                slots[index].layer != .head, slots[index].layer < head
            {
                return true
            }
            snapshotCursor += 1
        }
        return false
    }

    /// Everything in the frozen layers is on every member, and durable.
    func finishSnapshot() {
        guard let record, let request = snapshotRequests.first else { return }
        finishedLayer = record.layers.dropLast().last ?? .head
        if request.isProposed {
            let target = record.snapshot(named: request.target)?.layer
            note(
                request.isRevert
                    ? .reverted(to: target ?? .head, record.epoch)
                    : .snapshotTaken(request.layer, record.epoch))
        }
        endSnapshot(request.isProposed ? .ok : .exists)
    }
    private func endSnapshot(_ result: SnapshotResult) {
        let request = snapshotRequests.removeFirst()
        snapshotStage = .waiting
        giveUpHold(request.hold)
        if !request.isAnswered { answerSnapshot(request.token, request.layer, result) }
        holdClients()
    }

    /// The volume stalled. Its next takeover installs the record that stands.
    func restartSnapshot() {
        if snapshotStage != .proposed { snapshotStage = .waiting }
    }
    /// The engine is detached: only what is under way goes on.
    private func refuseWaiting() {
        let isUnderWay = snapshotStage != .waiting || snapshotRequests.first?.isProposed == true
        while snapshotRequests.count > (isUnderWay ? 1 : 0) {
            let request = snapshotRequests.removeLast()
            giveUpHold(request.hold)
            answerSnapshot(request.token, .head, .notServing)
        }
        holdClients()
    }
    func abandonSnapshots() {
        for request in snapshotRequests where !request.isAnswered {
            answerSnapshot(
                request.token, request.layer, request.isProposed ? .inDoubt : .notServing)
        }
        snapshotRequests = []
        snapshotStage = .waiting
        hold = nil
    }

    /// The layer a write's frame names.
    func layerToName(_ index: Int) -> LayerID {
        mutations.contains(.snapshotWritesUnlayered) ? .head : slots[index].layer
    }
}

extension VolumeRecord {
    /// Letters, digits, `.`, `_` and `-`, so that a name is a word in a command, in a line of
    /// status and in an export's path; not first what would hide a file or look like an option.
    package static func isValidSnapshotName(_ name: String) -> Bool {
        guard (1...nameLengthMax).contains(name.utf8.count), !name.hasPrefix("."),
            !name.hasPrefix("-")
        else { return false }
        return name.utf8.allSatisfy { byte in
            switch byte {
            case UInt8(ascii: "a")...UInt8(ascii: "z"), UInt8(ascii: "A")...UInt8(ascii: "Z"),
                UInt8(ascii: "0")...UInt8(ascii: "9"):
                true
            case UInt8(ascii: "."), UInt8(ascii: "_"), UInt8(ascii: "-"): true
            default: false
            }
        }
    }
    package static let snapshotNameRule =
        "1 to \(nameLengthMax) letters, digits, '.', '_' and '-', not beginning with '.' or '-'"
}
