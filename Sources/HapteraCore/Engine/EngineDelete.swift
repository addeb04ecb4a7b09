// Deleting a snapshot: a change of the record takes its name and its layer out, and the Install
// that follows makes every replica count what the layer holds as the next layer's. What they then
// do with it is their own affair (ReplicaCore+Merge): to the engine the layer is gone.
//
// A crash before the change is recorded leaves the snapshot, one after it the next takeover to
// install the record.

struct DeletionRequest {
    var token: UInt64
    var name: String
    /// The change was sent to the store: the snapshot may be gone.
    var isProposed = false
}

extension EngineCore {
    private static let deletionsWaitingMax = 16

    func deleteSnapshot(_ token: UInt64, name: String) {
        guard phase == .serving, !isDetaching, let record,
            deletionRequests.count < Self.deletionsWaitingMax
        else { return answerDeletion(token, .notServing) }
        guard record.snapshot(named: name) != nil else {
            return answerDeletion(token, .notThere)
        }
        deletionRequests.append(DeletionRequest(token: token, name: name))
    }
    func answerDeletion(_ token: UInt64, _ result: DeletionResult) {
        actions.append(.snapshotDeleted(token: token, result))
    }

    /// After every event, while there is a request.
    func advanceDeletion() {
        guard let request = deletionRequests.first, !request.isProposed else { return }
        if isDetaching {
            return answerDeletion(deletionRequests.removeFirst().token, .notServing)
        }
        guard phase == .serving, let record, isSettled, !isStoreBusy, !isResolving, !hasReleased,
            snapshotStage == .waiting, joinStage != .flushing, joinStage != .promoting
        else { return }
        guard let layer = record.snapshot(named: request.name)?.layer else {
            return answerDeletion(deletionRequests.removeFirst().token, .notThere)
        }
        // What is on its way to a frozen layer names it.
        guard !hasWritesBelowHead(), !isBeingRead(layer) else { return }
        deletionRequests[0].isProposed = true
        deletedLayer = layer
        propose(.deleteSnapshot) { next in
            next.deleteSnapshot(of: layer)
            guard mutations.contains(.revertForgotten) else { return }
            next.reverts.removeAll { next.layers.index(ofLayer: $0.target) == nil }
        }
    }
    /// Its deletion is next: what was asked of the layer ends, nothing is added.
    func isAboutToGo(_ layer: LayerID) -> Bool {
        guard layer != .head, let request = deletionRequests.first else { return false }
        return record?.snapshot(named: request.name)?.layer == layer
    }
    private func isBeingRead(_ layer: LayerID) -> Bool {
        for index in 0..<slotsUsed
        where slots[index].use == .client || slots[index].use == .hedge {
            let operation = slots[index].operation
            if operation.layer == layer || operation.base == layer { return true }
        }
        return false
    }

    /// The record says so, and everybody was told: what was the layer's is its heir's.
    func deletedSnapshot(of before: [LayerID]) {
        guard let record, !deletionRequests.isEmpty else { return }
        let request = deletionRequests.removeFirst()
        note(.snapshotDeleted(deletedLayer, record.epoch))
        forgetLayers(before.filter { record.layers.index(ofLayer: $0) == nil })
        deletedLayer = .head
        answerDeletion(request.token, .ok)
    }
    /// Jobs at the heir of such a layer begin it again: what they have compared was one of two
    /// halves. Those at such a layer go on with the next one above it, which need not be its heir
    /// if there were reverts (seed 2006411: layers between the two were not copied); that one's
    /// turn comes. Those above the heir have made both equal.
    private func forgetLayers(_ gone: [LayerID]) {
        let heirs = gone.compactMap(remaining)
        for job in 0..<jobsMax where jobs[job].stage != .free {
            let layer = jobs[job].layer
            // What was copied into such a layer is its heir's on the joiner, too: that is not empty
            // any more, and zero must be written where it is to hide it (seed 2825886).
            if jobs[job].kind == .copy, layer != .head { markHeld(jobs[job].region) }
            guard gone.contains(layer) || heirs.contains(layer) else { continue }
            if gone.contains(layer) { jobs[job].layer = nearest(above: layer) }
            jobs[job].unfit = []
            jobs[job].acceptsDamage = false
            if jobs[job].stage != .waiting { restart(job) }
        }
        for (region, layers) in suspectLayers where layers.contains(where: gone.contains) {
            suspectLayers[region] = nil
            for suspected in layers { suspect(region, remaining(suspected) ?? head) }
        }
    }
    /// The layer itself if the record names it, or the one that has what it held; nil: none has.
    func remaining(_ layer: LayerID) -> LayerID? {
        guard let record else { return layer }
        return record.tree.heir(of: layer, in: record.layers)
    }
    private func nearest(above layer: LayerID) -> LayerID {
        guard let layers = record?.layers else { return layer }
        let place = layers.index(above: layer)
        return place < layers.count ? layers[place] : head
    }

    func abandonDeletions() {
        for request in deletionRequests {
            answerDeletion(request.token, request.isProposed ? .inDoubt : .notServing)
        }
        deletionRequests = []
    }
}
