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
        let (lineage, places) = (lineage(stored), snapshotPlaces(stored))
        return (stored.record?.snapshots ?? []).map {
            Self.message($0, of: volume, stored.record, labels[$0.name], lineage, places)
        }
        .filter { selector.matches($0.labels) }
    }
    func lineage(_ stored: StoredVolume) -> SnapshotLineage {
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
        return try await withEngine(
            of: request.volume, for: "a snapshot is being taken",
            timeout: request.timeoutMilliseconds,
            isNeeded: { try isToBeTaken(request.name, of: $0) }
        ) { try await create(request, reserved, $0) }
    }

    private func create(
        _ request: Haptera_V1_CreateSnapshotRequest, _ reserved: [String: String],
        _ use: EngineUse
    ) async throws -> Haptera_V1_Snapshot {
        let stored = use.stored
        let isNamed = stored.record?.snapshot(named: request.name) != nil
        if let node = use.node { try await tasks.requireConnected(node) }
        // Before it is taken: the transaction that names it gives it its labels.
        try await label(request, stored, reserved)
        if let node = use.node {
            if !isNamed {
                try await store.addEvent(
                    "SnapshotRequested", "volume/\(request.volume)", "snapshot \(request.name)",
                    by: Caller.current)
                changes.notify()
            }
            do {
                try await take(request, use, on: node)
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
        try await withEngine(
            of: request.volume, for: "a snapshot is being deleted",
            timeout: request.timeoutMilliseconds,
            isNeeded: { stored in
                _ = try Self.named(request.name, in: stored)
                try requireUnread(request.name, of: stored.volume)
                return true
            }
        ) { try await delete(request, $0) }
    }

    private func delete(
        _ request: Haptera_V1_DeleteSnapshotRequest, _ use: EngineUse
    ) async throws {
        let snapshot = try Self.named(request.name, in: use.stored)
        guard let node = use.node else { return }
        try await store.requireNoCloneUnderWay(of: use.stored.volume, snapshot: request.name)
        try await tasks.requireConnected(node)
        try await store.addEvent(
            "SnapshotDeletionRequested", "volume/\(request.volume)", "snapshot \(request.name)",
            by: Caller.current)
        changes.notify()
        var failure: ControlError?
        do {
            try await delete(request, use, on: node)
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

    func existing(
        _ snapshot: String, of name: String
    ) async throws -> Haptera_V1_Snapshot? {
        let stored = try await store.volume(named: name)
        let labels = try await store.snapshotLabels(of: stored.volume.id)
        return stored.record?.snapshot(named: snapshot).map {
            Self.message(
                $0, of: view(stored), stored.record, labels[snapshot], lineage(stored),
                snapshotPlaces(stored))
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

    static func named(
        _ snapshot: String, in stored: StoredVolume
    ) throws -> VolumeRecord.Snapshot {
        guard let found = stored.record?.snapshot(named: snapshot) else {
            throw MetadataStore.noSnapshot(snapshot, of: stored.volume.name)
        }
        return found
    }

    /// False: it is there, and nobody needs to be asked. Throws if there is no room for it.
    func isToBeTaken(_ name: String, of stored: StoredVolume) throws -> Bool {
        let isNamed = stored.record?.snapshot(named: name) != nil
        if isNamed, stored.wasLeftInOrder { return false }
        guard isNamed || stored.record?.mayHold(snapshotNamed: name) == true else {
            throw Self.refused(
                "volume '\(stored.volume.name)' has \(view(stored).snapshotCount) snapshots: its "
                    + "record cannot hold another one: delete some")
        }
        return true
    }

    /// The node whose engine can be asked, or nil if the volume is not attached. Throws where that
    /// would lead nowhere.
    func servingNode(_ stored: StoredVolume) throws -> String? {
        let volume = stored.volume.name
        let now = view(stored)
        guard stored.volume.phase != .deleting else {
            throw Self.refused("volume '\(volume)' is being deleted")
        }
        guard let node = stored.volume.clientNode else { return nil }
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
        _ request: Haptera_V1_CreateSnapshotRequest, _ use: EngineUse, on node: String
    ) async throws {
        let (stored, timeout) = (use.stored, use.timeout)
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
        _ request: Haptera_V1_DeleteSnapshotRequest, _ use: EngineUse, on node: String
    ) async throws {
        let (stored, timeout) = (use.stored, use.timeout)
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
        let trouble = self.trouble(stored)
        if !trouble.isEmpty { words += " (\(trouble))" }
        if stored.record?.snapshot(named: snapshot) != nil { words += "; \(ifNamed)" }
        return ControlError(.inDoubt, words)
    }

    private static func message(
        _ snapshot: VolumeRecord.Snapshot, of volume: Haptera_V1_Volume, _ record: VolumeRecord?,
        _ labels: [String: String]?, _ lineage: SnapshotLineage,
        _ places: (uri: String, unixURI: String)
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
        message.uri = SnapshotExport.uri(places.uri, snapshot.name)
        message.unixUri = SnapshotExport.uri(places.unixURI, snapshot.name)
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
