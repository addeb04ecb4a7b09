import HapteraAPI
import HapteraCore

/// Snapshots as the volume's record names them. Only an engine takes one: its change of the record
/// is the moment the snapshot is of, so that nothing here needs to remember that one was asked for.
extension Controller {
    static let snapshotTimeouts: ClosedRange<UInt64> = 1000...3_600_000
    static let snapshotTimeoutDefault: UInt64 = 60_000

    /// Oldest first.
    package func snapshots(of name: String) async throws -> [Haptera_V1_Snapshot] {
        let stored = try await store.volume(named: name)
        let volume = view(stored)
        return (stored.record?.snapshots ?? []).map { Self.message($0, of: volume) }
    }

    package func snapshot(
        _ snapshot: String, of name: String
    ) async throws -> Haptera_V1_Snapshot {
        try Self.check(snapshot)
        guard let found = try await existing(snapshot, of: name) else {
            throw ControlError(
                .notFound,
                "volume '\(name)' has no snapshot '\(snapshot)'; see 'storagectl snapshot list "
                    + "\(name)'")
        }
        return found
    }

    /// Answers when the snapshot is taken, and durable on every member: only the engine knows that.
    /// The record names it before, so a name that is there is no answer yet. One that was asked for
    /// again is answered as it is, with the time of the first request.
    package func createSnapshot(
        _ request: Haptera_V1_CreateSnapshotRequest
    ) async throws -> Haptera_V1_Snapshot {
        try Self.check(request.name)
        let (stored, node) = try await knowingNodes {
            let stored = try await store.volume(named: request.volume)
            return (stored, try snapshotNode(stored, name: request.name))
        }
        let isNamed = stored.record?.snapshot(named: request.name) != nil
        if let node {
            try await tasks.requireConnected(node)
            if !isNamed {
                try await store.addEvent(
                    "SnapshotRequested", "volume/\(request.volume)", "snapshot \(request.name)",
                    by: Caller.current)
                changes.notify()
            }
            do {
                try await take(request, stored, on: node)
            } catch let error as ControlError where error.code == .inDoubt {
                throw await doubt(request, error.message)
            }
            changes.notify()
        }
        if let found = try await existing(request.name, of: request.volume) { return found }
        throw await doubt(request, "its engine says so, and the record does not name it")
    }

    private func existing(
        _ snapshot: String, of name: String
    ) async throws -> Haptera_V1_Snapshot? {
        let stored = try await store.volume(named: name)
        return stored.record?.snapshot(named: snapshot).map { Self.message($0, of: view(stored)) }
    }

    private static func check(_ name: String) throws {
        guard VolumeRecord.isValidSnapshotName(name) else {
            throw ControlError(
                .invalid,
                "'\(name.prefix(100))' is no snapshot name: use \(VolumeRecord.snapshotNameRule)")
        }
    }

    /// The node whose engine can take it, or nil if nobody needs to. Throws where asking that
    /// engine would lead nowhere.
    private func snapshotNode(_ stored: StoredVolume, name: String) throws -> String? {
        let volume = stored.volume.name
        func refused(_ reason: String) -> ControlError { ControlError(.precondition, reason) }
        let now = view(stored)
        let isNamed = stored.record?.snapshot(named: name) != nil
        guard stored.volume.phase != .deleting else {
            throw refused("volume '\(volume)' is being deleted")
        }
        guard let node = stored.volume.attachedNode else {
            // An engine that left in order has flushed.
            if isNamed, stored.record?.isClean == true { return nil }
            let attach = "attach it first: storagectl volume attach \(volume)"
            throw refused(
                isNamed
                    ? "volume '\(volume)' names a snapshot '\(name)', and its engine ended before "
                        + "it said that every replica has it; to be sure, \(attach)"
                    : "volume '\(volume)' is not attached, and only its engine can take a "
                        + "snapshot: \(attach)")
        }
        guard now.state == .attached else {
            throw refused(
                now.state == .detaching
                    ? "volume '\(volume)' is being detached; wait until it is, then attach it again"
                    : "volume '\(volume)' is still being attached; try again when it is, see "
                        + "'storagectl volume show \(volume)'")
        }
        guard observedNodes[node]?.isReady == true else {
            throw refused(
                "node \(node), which runs the engine of volume '\(volume)', is not heard of: bring "
                    + "it back; see 'storagectl node list'")
        }
        guard now.robustness != .faulted else {
            throw refused("volume '\(volume)' serves nobody: \(now.reason)")
        }
        guard isNamed || stored.record?.mayHold(snapshotNamed: name) == true else {
            throw refused(
                "volume '\(volume)' has \(now.snapshotCount) snapshots: its record cannot hold "
                    + "another one")
        }
        return node
    }

    private func take(
        _ request: Haptera_V1_CreateSnapshotRequest, _ stored: StoredVolume, on node: String
    ) async throws {
        let wanted =
            request.timeoutMilliseconds == 0
            ? Self.snapshotTimeoutDefault : request.timeoutMilliseconds
        let timeout = min(
            max(wanted, Self.snapshotTimeouts.lowerBound), Self.snapshotTimeouts.upperBound)
        let created = UInt64(clamping: store.clock())
        // The agent gives up first: it knows more of why.
        let patience = Duration.milliseconds(timeout) + .seconds(2)
        _ = try await tasks.ask(node, timeout: patience, doubt: .inDoubt) {
            $0.takeSnapshot.volumeID = stored.volume.id
            $0.takeSnapshot.clientGeneration = UInt64(stored.volume.clientGeneration)
            $0.takeSnapshot.name = request.name
            $0.takeSnapshot.createdUnixMilliseconds = created
            $0.takeSnapshot.timeoutMilliseconds = timeout
        }
    }

    private func doubt(
        _ request: Haptera_V1_CreateSnapshotRequest, _ reason: String
    ) async -> ControlError {
        let volume = request.volume
        var words =
            "it is not known whether snapshot '\(request.name)' of volume '\(volume)' was taken: "
            + reason
        guard let stored = try? await store.volume(named: volume) else {
            return ControlError(.inDoubt, words)
        }
        let trouble = view(stored).reason
        if !trouble.isEmpty { words += " (\(trouble))" }
        if stored.record?.snapshot(named: request.name) != nil {
            words += "; the volume names it, but not every replica may have all of it yet"
        }
        return ControlError(.inDoubt, words)
    }

    private static func message(
        _ snapshot: VolumeRecord.Snapshot, of volume: Haptera_V1_Volume
    ) -> Haptera_V1_Snapshot {
        var message = Haptera_V1_Snapshot()
        message.name = snapshot.name
        message.volume = volume.name
        message.layer = snapshot.layer.rawValue
        message.createdUnixMilliseconds = Int64(clamping: snapshot.created)
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
