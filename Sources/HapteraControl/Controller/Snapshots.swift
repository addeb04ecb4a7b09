import HapteraAPI
import HapteraCore
import HapteraHost

/// Snapshots as the volume's record names them. Only an engine takes or deletes one: its change of
/// the record is the moment the snapshot is of, or ends at, so that nothing here needs to remember
/// what was asked for.
extension Controller {
    static let snapshotTimeouts: ClosedRange<UInt64> = 1000...3_600_000
    static let snapshotTimeoutDefault: UInt64 = 60_000

    /// Oldest first.
    package func snapshots(
        of name: String, selector: String = ""
    ) async throws -> [Haptera_V1_Snapshot] {
        let selector = try Self.selector(selector)
        let stored = try await store.volume(named: name)
        let volume = view(stored)
        let labels = try await store.snapshotLabels(of: stored.volume.id)
        let lineage = lineage(stored)
        return (stored.record?.snapshots ?? []).map {
            Self.message($0, of: volume, stored.record, labels[$0.name], lineage)
        }
        .filter { selector.matches($0.labels) }
    }
    private func lineage(_ stored: StoredVolume) -> SnapshotLineage {
        SnapshotLineage(
            stored.record, own: bytes(\.layerBytes, stored),
            exclusive: bytes(\.exclusiveBytes, stored))
    }
    /// By layer, what is said of it on the replica where it is most; empty: no replica has said.
    private func bytes(
        _ path: KeyPath<Haptera_V1_ReplicaReport, [UInt32: UInt64]>, _ stored: StoredVolume
    ) -> [LayerID: UInt64] {
        stored.replicas.filter { stored.isMember($0) }.reduce(into: [:]) { bytes, row in
            for (layer, count) in observedNodes[row.node]?.replica(row.id)?[keyPath: path] ?? [:] {
                let layer = LayerID(rawValue: layer)
                bytes[layer] = max(bytes[layer] ?? 0, count)
            }
        }
    }

    package func snapshot(
        _ snapshot: String, of name: String
    ) async throws -> Haptera_V1_Snapshot {
        try Self.check(snapshot)
        guard let found = try await existing(snapshot, of: name) else {
            throw MetadataStore.noSnapshot(snapshot, of: name)
        }
        return found
    }

    /// Of one that the record names; no engine is asked.
    package func labelSnapshot(
        _ request: Haptera_V1_LabelSnapshotRequest
    ) async throws -> Haptera_V1_Snapshot {
        try Self.check(request.name)
        try await store.relabelSnapshot(
            request.name, of: request.volume, set: request.set, remove: request.remove)
        changes.notify()
        return try await snapshot(request.name, of: request.volume)
    }

    /// Answers when the snapshot is taken, and durable on every member: only the engine knows that.
    /// The record names it before, so a name that is there is no answer yet. One that was asked for
    /// again is answered as it is, with the time of the first request. `reserved`: labels only the
    /// controller gives; never to one that is there already.
    package func createSnapshot(
        _ request: Haptera_V1_CreateSnapshotRequest, reserved: [String: String] = [:]
    ) async throws -> Haptera_V1_Snapshot {
        try Self.check(request.name)
        if let objection = Labels.objection(to: request.labels) {
            throw ControlError(.invalid, objection)
        }
        let (stored, node) = try await knowingNodes {
            let stored = try await store.volume(named: request.volume)
            return (stored, try nodeThatTakes(request.name, of: stored))
        }
        let isNamed = stored.record?.snapshot(named: request.name) != nil
        if let node { try await tasks.requireConnected(node) }
        // Before it is taken: the transaction that names it gives it its labels.
        try await label(request, stored, reserved)
        if let node {
            if !isNamed {
                try await store.addEvent(
                    "SnapshotRequested", "volume/\(request.volume)", "snapshot \(request.name)",
                    by: Caller.current)
                changes.notify()
            }
            do {
                try await take(request, stored, on: node)
            } catch let error as ControlError {
                guard error.code == .inDoubt else {
                    try await forgetLabels(request, stored)
                    throw error
                }
                throw await doubtIfTaken(request, error.message)
            }
            changes.notify()
        }
        if let found = try await existing(request.name, of: request.volume) { return found }
        throw await doubtIfTaken(request, "its engine says so, and the record does not name it")
    }

    /// Answers when the record does not name the snapshot any more. Its space comes back later: the
    /// replicas see to that by themselves.
    package func deleteSnapshot(_ request: Haptera_V1_DeleteSnapshotRequest) async throws {
        try Self.check(request.name)
        let (stored, snapshot, node) = try await knowingNodes {
            let stored = try await store.volume(named: request.volume)
            guard let snapshot = stored.record?.snapshot(named: request.name) else {
                throw MetadataStore.noSnapshot(request.name, of: request.volume)
            }
            return (stored, snapshot, try nodeThatDeletes(from: stored))
        }
        try await store.requireNoCloneUnderWay(of: stored.volume, snapshot: request.name)
        try await tasks.requireConnected(node)
        try await store.addEvent(
            "SnapshotDeletionRequested", "volume/\(request.volume)", "snapshot \(request.name)",
            by: Caller.current)
        changes.notify()
        var failure: ControlError?
        do {
            try await delete(request, stored, on: node)
        } catch let error as ControlError {
            failure = error
        }
        changes.notify()
        // Gone is gone, whatever was answered. One of the same name taken since is another.
        if let record = try? await store.volume(named: request.volume).record,
            !record.snapshots.contains(snapshot)
        {
            return
        }
        if let failure, failure.code != .inDoubt { throw failure }
        throw await doubt(
            request.name, of: request.volume, was: "deleted",
            failure?.message ?? "its engine says so", ifNamed: "the volume names it still")
    }

    /// Answers when the volume holds what the snapshot does, with the snapshot of what it held.
    package func revertVolume(
        _ request: Haptera_V1_RevertVolumeRequest
    ) async throws -> Haptera_V1_Snapshot {
        try Self.check(request.snapshot)
        try Self.check(request.keep)
        let (stored, node) = try await knowingNodes {
            let stored = try await store.volume(named: request.volume)
            return (stored, try nodeThatReverts(request, stored))
        }
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
            try await revert(request, stored, on: node)
        } catch let error as ControlError where error.code == .inDoubt {
            throw await doubt(
                "to \(request.snapshot)", of: request.volume, error.message)
        }
        changes.notify()
        if let kept = try await existing(request.keep, of: request.volume) { return kept }
        throw await doubt(
            "to \(request.snapshot)", of: request.volume,
            "its engine says so, and the record does not name '\(request.keep)'")
    }

    /// The node whose engine can do it.
    private func nodeThatReverts(
        _ request: Haptera_V1_RevertVolumeRequest, _ stored: StoredVolume
    ) throws -> String {
        let volume = stored.volume.name
        guard let record = stored.record,
            let target = record.snapshot(named: request.snapshot)
        else { throw MetadataStore.noSnapshot(request.snapshot, of: volume) }
        if let kept = record.snapshot(named: request.keep) {
            guard record.hasReverted(to: target, keeping: kept) else {
                throw Self.refused(
                    "volume '\(volume)' has a snapshot '\(request.keep)' already: choose another "
                        + "name for what is to be kept")
            }
        } else if !record.mayRevert(keeping: request.keep) {
            throw Self.refused(
                "the record of volume '\(volume)' has no room for another revert, or for the "
                    + "snapshot that one keeps: delete snapshots, above all those that reverts "
                    + "have kept")
        }
        guard let node = try servingNode(stored) else {
            throw Self.refused(
                "volume '\(volume)' is not attached, and only its engine can revert it: attach it "
                    + "first, and connect no client: storagectl volume attach \(volume)")
        }
        return node
    }

    private func revert(
        _ request: Haptera_V1_RevertVolumeRequest, _ stored: StoredVolume, on node: String
    ) async throws {
        let timeout = Self.timeout(request.timeoutMilliseconds)
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
        let trouble = (try? await store.volume(named: volume)).map { view($0).reason } ?? ""
        return ControlError(
            .inDoubt,
            "it is not known whether volume '\(volume)' was reverted \(what): \(reason)"
                + (trouble.isEmpty ? "" : " (\(trouble))"))
    }

    func existing(
        _ snapshot: String, of name: String
    ) async throws -> Haptera_V1_Snapshot? {
        let stored = try await store.volume(named: name)
        let labels = try await store.snapshotLabels(of: stored.volume.id)
        return stored.record?.snapshot(named: snapshot).map {
            Self.message(
                $0, of: view(stored), stored.record, labels[snapshot],
                lineage(stored))
        }
    }

    private func label(
        _ request: Haptera_V1_CreateSnapshotRequest, _ stored: StoredVolume,
        _ reserved: [String: String]
    ) async throws {
        guard let id = stored.record?.volume else { return }
        try await store.labelSnapshot(request.name, of: id, request.labels, reserved: reserved)
    }

    private func forgetLabels(
        _ request: Haptera_V1_CreateSnapshotRequest, _ stored: StoredVolume
    ) async throws {
        guard let id = stored.record?.volume else { return }
        try await store.forgetPendingLabels(request.name, of: id)
    }

    static func check(_ name: String) throws {
        guard VolumeRecord.isValidSnapshotName(name) else {
            throw ControlError(
                .invalid,
                "'\(name.prefix(100))' is no snapshot name: use \(VolumeRecord.snapshotNameRule)")
        }
    }

    static func refused(_ reason: String) -> ControlError {
        ControlError(.precondition, reason)
    }

    /// The node whose engine can take it, or nil if nobody needs to.
    func nodeThatTakes(_ name: String, of stored: StoredVolume) throws -> String? {
        let volume = stored.volume.name
        let isNamed = stored.record?.snapshot(named: name) != nil
        guard let node = try servingNode(stored) else {
            // An engine that left in order has flushed.
            if isNamed, stored.record?.isClean == true { return nil }
            let attach = "attach it first: storagectl volume attach \(volume)"
            throw Self.refused(
                isNamed
                    ? "volume '\(volume)' names a snapshot '\(name)', and its engine ended before "
                        + "it said that every replica has it; to be sure, \(attach)"
                    : "volume '\(volume)' is not attached, and only its engine can take a "
                        + "snapshot: \(attach)")
        }
        guard isNamed || stored.record?.mayHold(snapshotNamed: name) == true else {
            throw Self.refused(
                "volume '\(volume)' has \(view(stored).snapshotCount) snapshots: its record cannot "
                    + "hold another one")
        }
        return node
    }

    private func nodeThatDeletes(from stored: StoredVolume) throws -> String {
        let volume = stored.volume.name
        guard let node = try servingNode(stored) else {
            throw Self.refused(
                "volume '\(volume)' is not attached, and only its engine can delete a snapshot: "
                    + "attach it first: storagectl volume attach \(volume)")
        }
        return node
    }

    /// The node whose engine can be asked, or nil if the volume is not attached. Throws where that
    /// would lead nowhere.
    func servingNode(_ stored: StoredVolume) throws -> String? {
        let volume = stored.volume.name
        let now = view(stored)
        guard stored.volume.phase != .deleting else {
            throw Self.refused("volume '\(volume)' is being deleted")
        }
        guard let node = stored.volume.attachedNode else { return nil }
        guard now.state == .attached else {
            throw Self.refused(
                now.state == .detaching
                    ? "volume '\(volume)' is being detached; wait until it is, then attach it again"
                    : "volume '\(volume)' is still being attached; try again when it is, see "
                        + "'storagectl volume show \(volume)'")
        }
        guard observedNodes[node]?.isReady == true else {
            throw Self.refused(
                "node \(node), which runs the engine of volume '\(volume)', is not heard of: bring "
                    + "it back; see 'storagectl node list'")
        }
        guard now.robustness != .faulted else {
            throw Self.refused("volume '\(volume)' serves nobody: \(now.reason)")
        }
        return node
    }

    private func take(
        _ request: Haptera_V1_CreateSnapshotRequest, _ stored: StoredVolume, on node: String
    ) async throws {
        let timeout = Self.timeout(request.timeoutMilliseconds)
        let created = UInt64(clamping: store.clock())
        _ = try await tasks.ask(node, timeout: Self.patience(timeout), doubt: .inDoubt) {
            $0.takeSnapshot.volumeID = stored.volume.id
            $0.takeSnapshot.clientGeneration = UInt64(stored.volume.clientGeneration)
            $0.takeSnapshot.name = request.name
            $0.takeSnapshot.createdUnixMilliseconds = created
            $0.takeSnapshot.timeoutMilliseconds = timeout
        }
    }

    private func delete(
        _ request: Haptera_V1_DeleteSnapshotRequest, _ stored: StoredVolume, on node: String
    ) async throws {
        let timeout = Self.timeout(request.timeoutMilliseconds)
        _ = try await tasks.ask(node, timeout: Self.patience(timeout), doubt: .inDoubt) {
            $0.deleteSnapshot.volumeID = stored.volume.id
            $0.deleteSnapshot.clientGeneration = UInt64(stored.volume.clientGeneration)
            $0.deleteSnapshot.name = request.name
            $0.deleteSnapshot.timeoutMilliseconds = timeout
        }
    }

    /// How long an engine may take, milliseconds.
    static func timeout(_ wanted: UInt64) -> UInt64 {
        guard wanted != 0 else { return snapshotTimeoutDefault }
        return min(max(wanted, snapshotTimeouts.lowerBound), snapshotTimeouts.upperBound)
    }

    /// The agent gives up first: it knows more of why.
    static func patience(_ timeout: UInt64) -> Duration {
        Duration.milliseconds(timeout) + .seconds(2)
    }

    private func doubtIfTaken(
        _ request: Haptera_V1_CreateSnapshotRequest, _ reason: String
    ) async -> ControlError {
        await doubt(
            request.name, of: request.volume, was: "taken", reason,
            ifNamed: "the volume names it, but not every replica may have all of it yet")
    }

    /// `done`: what it is not known to be. `ifNamed`: what to add if the record names it.
    private func doubt(
        _ snapshot: String, of volume: String, was done: String, _ reason: String, ifNamed: String
    ) async -> ControlError {
        var words =
            "it is not known whether snapshot '\(snapshot)' of volume '\(volume)' was \(done): "
            + reason
        guard let stored = try? await store.volume(named: volume) else {
            return ControlError(.inDoubt, words)
        }
        let trouble = view(stored).reason
        if !trouble.isEmpty { words += " (\(trouble))" }
        if stored.record?.snapshot(named: snapshot) != nil { words += "; \(ifNamed)" }
        return ControlError(.inDoubt, words)
    }

    private static func message(
        _ snapshot: VolumeRecord.Snapshot, of volume: Haptera_V1_Volume, _ record: VolumeRecord?,
        _ labels: [String: String]?, _ lineage: SnapshotLineage
    ) -> Haptera_V1_Snapshot {
        var message = Haptera_V1_Snapshot()
        message.labels = labels ?? [:]
        message.name = snapshot.name
        message.volume = volume.name
        message.layer = snapshot.layer.rawValue
        message.createdUnixMilliseconds = Int64(clamping: snapshot.created)
        message.sizeBytes = record?.size(of: snapshot.layer) ?? volume.sizeBytes
        if let record {
            message.parent = lineage.parents[snapshot.layer]?.name ?? ""
            message.isVolumeParent = lineage.parents[record.head] == snapshot
        }
        if let own = lineage.own[snapshot.layer] {
            message.ownBytes = own
            message.cumulativeBytes = lineage.cumulative[snapshot.layer] ?? own
        }
        if let exclusive = lineage.exclusive[snapshot.layer] {
            message.exclusiveBytes = exclusive
        }
        if volume.state == .attached {
            message.uri = SnapshotExport.uri(volume.engine.uri, snapshot.name)
            message.unixUri = SnapshotExport.uri(volume.engine.unixUri, snapshot.name)
        }
        return message
    }
}

/// An engine exports a snapshot beside the volume, as VOLUME@SNAPSHOT.
enum SnapshotExport {
    /// The volume's URI with the other export's name. Empty stays empty.
    static func uri(_ volume: String, _ snapshot: String) -> String {
        guard !volume.isEmpty else { return "" }
        let end = volume.firstIndex(of: "?") ?? volume.endIndex
        return volume[..<end] + "@" + snapshot + volume[end...]
    }
}
