import HapteraAPI
import HapteraCore

/// Volumes that began as a snapshot where not all of their replicas could share it: their engine
/// fills these, as it does any joiner. One that is not attached gets an engine for so long, which
/// whoever attaches it does not wait for.
extension Controller {
    static let fillingWords = "its replicas are being filled"

    func tendFilling(_ stored: StoredVolume) async throws {
        let (volume, id) = (stored.volume, stored.volume.id)
        // What nodes hold that have yet to report to us is not known: what goes on goes on.
        let isUnknown = try await !knowsNodes
        let isWanted =
            volume.clientNode == nil && !maintenances.isClosed(id)
            && (needsEngine(stored) || isUnknown)
        guard !maintenances.isHeld(id, by: .filling) else {
            if !isWanted { await release(volume, .filling) }
            return
        }
        guard isWanted, !volume.isDetaching,
            let ticket = try await ticket(stored, mayBegin: !isUnknown)
        else { return }
        maintenances.hold(id, ticket, .filling)
        await leave(
            EngineUse(stored: stored, node: nil, deadline: .now, ticket: ticket, words: nil))
    }

    /// The share of an engine that is there, or of another one. Nil: not now.
    private func ticket(_ stored: StoredVolume, mayBegin: Bool) async throws -> UInt64? {
        let (volume, id) = (stored.volume, stored.volume.id)
        if maintenances.isUsed(id) { return maintenances.join(id, for: nil) }
        if volume.isMaintained {
            guard volume.maintenance == Self.fillingWords else { return nil }
            let ticket = maintenances.begin(id, for: nil)
            maintenances.begun(id, ticket, generation: volume.clientGeneration)
            return ticket
        }
        guard mayBegin, let node = try? maintenanceNode(stored) else { return nil }
        return try await Caller.$current.withValue(.controller) {
            do {
                return try await begin(stored, on: node, for: Self.fillingWords, nil)
            } catch let error as ControlError where error.code != .invalid {
                // Its node is about to go, or the volume: looked at again.
                return nil
            }
        }
    }

    /// A replica can be filled, or has to be taken out of the record.
    private func needsEngine(_ stored: StoredVolume) -> Bool {
        let isLeaving = stored.replicas.contains {
            $0.phase == .leave && (stored.isMember($0) || stored.isJoining($0))
        }
        if isLeaving { return true }
        guard stored.volume.isFilling else { return false }
        // About to be finished: the same engine lets the temporary ones go.
        if stored.filledCount >= stored.volume.replicaCount { return true }
        let nodes = observedNodes
        return stored.lastingReplicas.contains { row in
            guard row.phase == .run, !stored.isMember(row), !stored.isKept(row),
                let node = nodes[row.node], node.isReady
            else { return false }
            return node.replica(row.id)?.state == .running
        }
    }
}
