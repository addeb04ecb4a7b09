import HapteraAPI
import HapteraCore
import HapteraHost

/// Going back to a snapshot. Only the volume's engine does it, and keeps what the volume held as
/// another snapshot.
extension Controller {
    /// Answers when the volume holds what the snapshot does, with the snapshot of what it held.
    package func revertVolume(
        _ request: Haptera_V1_RevertVolumeRequest
    ) async throws -> Haptera_V1_Snapshot {
        try Self.check(request.snapshot)
        try Self.check(request.keep)
        return try await withEngine(
            of: request.volume, for: "it is being reverted",
            timeout: request.timeoutMilliseconds, isNeeded: { try isToBeReverted(request, $0) }
        ) { try await revert(request, $0) }
    }

    private func revert(
        _ request: Haptera_V1_RevertVolumeRequest, _ use: EngineUse
    ) async throws -> Haptera_V1_Snapshot {
        if let node = use.node { try await revert(request, use, on: node) }
        if let kept = try await existing(request.keep, of: request.volume) { return kept }
        throw await doubt(
            "to \(request.snapshot)", of: request.volume,
            "its engine says so, and the record does not name '\(request.keep)'")
    }

    private func revert(
        _ request: Haptera_V1_RevertVolumeRequest, _ use: EngineUse, on node: String
    ) async throws {
        let stored = use.stored
        try await tasks.requireConnected(node)
        // Whatever waits under that name was wanted for a snapshot that never came: with a group's
        // label, what is kept would be deleted as one of its.
        if let id = stored.record?.volume {
            try await store.labelSnapshot(request.keep, of: id, [:])
        }
        try await store.addEvent(
            "RevertRequested", "volume/\(request.volume)",
            "to snapshot \(request.snapshot), keeping \(request.keep)", by: Caller.current)
        changes.notify()
        do {
            try await ask(request, use, on: node)
        } catch let error as ControlError where error.code == .inDoubt {
            throw await doubt(
                "to \(request.snapshot)", of: request.volume, error.message)
        }
        changes.notify()
    }

    /// False: it is, and nobody needs to be asked. Throws if it cannot be.
    private func isToBeReverted(
        _ request: Haptera_V1_RevertVolumeRequest, _ stored: StoredVolume
    ) throws -> Bool {
        let volume = stored.volume.name
        let target = try Self.named(request.snapshot, in: stored)
        guard let record = stored.record else { return true }
        if let kept = record.snapshot(named: request.keep) {
            guard record.hasReverted(to: target, keeping: kept) else {
                throw Self.refused(
                    "volume '\(volume)' has a snapshot '\(request.keep)' already: choose another "
                        + "name for what is to be kept")
            }
            return !stored.wasLeftInOrder
        } else if !record.mayRevert(keeping: request.keep) {
            throw Self.refused(
                "the record of volume '\(volume)' has no room for another revert, or for the "
                    + "snapshot that one keeps: delete snapshots, above all those that reverts "
                    + "have kept")
        }
        return true
    }

    private func ask(
        _ request: Haptera_V1_RevertVolumeRequest, _ use: EngineUse, on node: String
    ) async throws {
        let (stored, timeout) = (use.stored, use.timeout)
        let created = UInt64(clamping: store.clock())
        _ = try await tasks.ask(node, timeout: Self.patience(timeout), doubt: .inDoubt) {
            $0.revertToSnapshot.volumeID = stored.volume.id
            $0.revertToSnapshot.clientGeneration = UInt64(stored.volume.clientGeneration)
            $0.revertToSnapshot.snapshot = request.snapshot
            $0.revertToSnapshot.keep = request.keep
            $0.revertToSnapshot.createdUnixMilliseconds = created
            $0.revertToSnapshot.timeoutMilliseconds = timeout
        }
    }

    private func doubt(
        _ what: String, of volume: String, _ reason: String
    ) async -> ControlError {
        let trouble = (try? await store.volume(named: volume)).map { self.trouble($0) } ?? ""
        return ControlError(
            .inDoubt,
            "it is not known whether volume '\(volume)' was reverted \(what): \(reason)"
                + (trouble.isEmpty ? "" : " (\(trouble))"))
    }
}
