import GRDB
import HapteraCore
import HapteraHost

// Replicas that come and go while their volume lives.

extension ReplicaRow {
    /// A new replica of the volume, with an identity nobody had before.
    init(
        of volume: VolumeRow, ordinal: Int, node: String, replaces: String? = nil,
        isAutomatic: Bool = false, source: String? = nil, expectedBytes: UInt64 = 0,
        isTemporary: Bool = false
    ) {
        self.init(
            id: hexadecimal(UInt64.random(in: 1 ... .max)), volumeID: volume.id, ordinal: ordinal,
            node: node, incarnation: hexadecimal(UInt64.random(in: 1 ... .max)), phase: .create,
            replaces: replaces, isAutomatic: isAutomatic, source: source)
        self.expectedBytes = Int64(clamping: expectedBytes)
        self.isTemporary = isTemporary
    }
}

extension StoredVolume {
    func replica(_ id: String) throws(ControlError) -> ReplicaRow {
        guard let row = replicas.first(where: { $0.id == id }) else {
            throw ControlError(
                .notFound,
                "volume '\(volume.name)' has no replica '\(id)'; see 'storagectl replica list "
                    + "\(volume.name)'")
        }
        return row
    }
    package func isMember(_ row: ReplicaRow) -> Bool {
        guard let member = row.member else { return false }
        return record?.inSync.contains(member) ?? false
    }
    package func isJoining(_ row: ReplicaRow) -> Bool {
        guard let member = row.member else { return false }
        return record?.joining == member
    }
    /// Its bytes are what a salvage decided against: kept until somebody says otherwise.
    package func isKept(_ row: ReplicaRow) -> Bool {
        record?.out.contains { $0.member.replica.text == row.id && $0.isKept } ?? false
    }
    /// The replica that is to take the row's place.
    package func replacement(of row: ReplicaRow) -> ReplicaRow? {
        replicas.first { $0.replaces == row.id }
    }
}

extension MetadataStore {
    /// Adds a replica on `node` that takes the place of `id` once it is in sync. One at a time for
    /// each volume; the same again changes nothing. `dataBytes`: what it is to be filled with.
    package func replaceReplica(
        _ id: String, of volume: String, node: String, isAutomatic: Bool, why: String,
        dataBytes: UInt64 = 0, spaces: NodeSpaces = [:]
    ) async throws -> StoredVolume {
        try await changeVolume(volume) { db, stored in
            let old = try stored.replica(id)
            if let running = stored.replicas.first(where: { $0.replaces != nil }) {
                guard running.replaces == id else {
                    throw ControlError(
                        .precondition,
                        "replica \(running.replaces ?? "") of volume '\(volume)' is being replaced "
                            + "by \(running.id); one at a time: wait for it, or give it up with: "
                            + "storagectl replica delete \(volume) \(running.id)")
                }
                return
            }
            guard !old.isTemporary else { throw Self.isTemporary(old, of: stored.volume) }
            guard stored.volume.phase == .ready, old.phase == .run else {
                throw ControlError(
                    .precondition, "replica \(id) is being made or removed; try again later")
            }
            guard !stored.isKept(old) else {
                throw ControlError(
                    .precondition,
                    "replica \(id) keeps the data that a salvage decided against; remove it with: "
                        + "storagectl replica delete \(volume) \(id) --discard-kept")
            }
            guard stored.replicas.count < Geometry.replicaSlotsMax else {
                throw ControlError(
                    .precondition,
                    "volume '\(volume)' has \(stored.replicas.count) replicas, those that come and "
                        + "go counted, and cannot have another: wait until one has gone")
            }
            var room = try Self.rooms(db, spaces)[node]
            let need = ReplicaNeed(
                volume: volume, sizeBytes: UInt64(stored.volume.sizeBytes), dataBytes: dataBytes)
            if let why = room?.take(need) { throw ControlError(.precondition, why) }
            let ordinal = (stored.replicas.map(\.ordinal).max() ?? 0) + 1
            let new = ReplicaRow(
                of: stored.volume, ordinal: ordinal, node: node, replaces: id,
                isAutomatic: isAutomatic, expectedBytes: dataBytes)
            try new.insert(db)
            try self.addEvent(
                db, "ReplicaReplacementStarted", "volume/\(volume)",
                "replica \(id) on node \(old.node) is to be replaced by \(new.id) on node \(node)"
                    + (why.isEmpty ? "" : ": \(why)"))
        }
    }

    /// The replacement is in sync: the one it replaces goes.
    package func finishReplacement(by id: String, of volume: String) async throws {
        _ = try await changeVolume(volume) { db, stored in
            var new = try stored.replica(id)
            guard let oldID = new.replaces, stored.isMember(new) else { return }
            new.replaces = nil
            new.isAutomatic = false
            try new.update(db)
            guard let old = stored.replicas.first(where: { $0.id == oldID }) else { return }
            try self.addEvent(
                db, "ReplicaReplaced", "volume/\(volume)",
                "replica \(oldID) on node \(old.node) by \(id) on node \(new.node), which is in "
                    + "sync; the old one's data is removed when its node is there")
            try self.take(db, old, outOf: stored)
        }
    }

    /// Takes the replica out of the volume: at once if the record does without it, otherwise once
    /// the engine has taken it out of the in-sync set.
    package func discardReplica(
        _ id: String, of volume: String, why: String
    ) async throws -> StoredVolume {
        try await changeVolume(volume) { db, stored in
            let row = try stored.replica(id)
            guard row.phase != .leave else { return }
            try self.addEvent(
                db, "ReplicaDiscarded", "volume/\(volume)",
                "replica \(id) on node \(row.node)" + (why.isEmpty ? "" : ": \(why)"))
            try self.take(db, row, outOf: stored)
        }
    }

    /// A replica that was told to leave, and that the record of this epoch does not count in any
    /// more, goes. That may still name it as the joiner: whoever asks knows from its engine that it
    /// is not. No other record has come since, and none will count it in: it is not known then.
    package func finishLeaving(
        _ id: String, of volume: String, after epoch: Epoch?
    ) async throws {
        _ = try await changeVolume(volume) { db, stored in
            let row = try stored.replica(id)
            guard row.phase == .leave, !stored.isMember(row), stored.record?.epoch == epoch else {
                return
            }
            try self.discard(db, row, of: stored.volume)
        }
    }

    func take(_ db: Database, _ row: ReplicaRow, outOf stored: StoredVolume) throws {
        guard stored.isMember(row) || stored.isJoining(row) else {
            return try discard(db, row, of: stored.volume)
        }
        var row = row
        row.phase = .leave
        row.replaces = nil
        try row.update(db)
    }

    private func discard(_ db: Database, _ row: ReplicaRow, of volume: VolumeRow) throws {
        try DiscardedReplicaRow(
            id: row.id, volumeID: row.volumeID, volume: volume.name, node: row.node,
            incarnation: row.incarnation, sizeBytes: volume.sizeBytes, timeMilliseconds: clock()
        ).insert(db)
        try row.delete(db)
    }

    /// Removes a replica because somebody asked: the volume is meant to have one less, unless it is
    /// itself only a replacement.
    package func deleteReplica(
        _ id: String, of name: String, discardKept: Bool
    ) async throws -> StoredVolume {
        try await changeVolume(name) { db, stored in
            let row = try stored.replica(id)
            guard row.phase != .leave else { return }
            guard stored.volume.phase == .ready else {
                throw ControlError(
                    .precondition, "volume '\(name)' is still being created; try again later")
            }
            guard !row.isTemporary || !(stored.isMember(row) || stored.isJoining(row)) else {
                throw Self.isTemporary(row, of: stored.volume)
            }
            guard discardKept || !stored.isKept(row) else {
                throw ControlError(
                    .precondition,
                    "replica \(id) keeps the data that a salvage decided against; to give that up, "
                        + "add --discard-kept")
            }
            try Self.requireRedundancy(stored, without: row)
            if stored.replacement(of: row) == nil, row.replaces == nil, !row.isTemporary {
                var volume = stored.volume
                volume.replicaCount -= 1
                try volume.update(db)
            }
            if var heir = stored.replacement(of: row) {
                heir.replaces = nil
                heir.isAutomatic = false
                try heir.update(db)
            }
            try self.addEvent(
                db, "ReplicaDeleteRequested", "volume/\(name)", "replica \(id) on node \(row.node)")
            try self.take(db, row, outOf: stored)
        }
    }

    private static func requireRedundancy(
        _ stored: StoredVolume, without row: ReplicaRow
    ) throws(ControlError) {
        let name = stored.volume.name
        guard stored.isMember(row) else { return }
        let left = stored.replicas.count {
            $0.id != row.id && $0.phase == .run && stored.isMember($0)
        }
        guard left >= max(1, stored.volume.minInSync) else {
            throw ControlError(
                .precondition,
                "without replica \(row.id), volume '\(name)' would have \(left) in sync, and needs "
                    + "\(max(1, stored.volume.minInSync)); wait until others are, or see "
                    + "'storagectl volume update \(name) --min-in-sync'")
        }
        guard stored.volume.attachedNode != nil, !stored.volume.isMaintained else {
            throw ControlError(
                .precondition,
                "replica \(row.id) is in sync, and only a running engine can take it out: attach "
                    + "the volume first: storagectl volume attach \(name)")
        }
    }

    /// What nodes still hold of replicas that are gone.
    package func discardedReplicas(on node: String? = nil) async throws -> [DiscardedReplicaRow] {
        try await database.read { db in try Self.discarded(db, on: node) }
    }
    static func discarded(_ db: Database, on node: String?) throws -> [DiscardedReplicaRow] {
        let all = DiscardedReplicaRow.order(Column("id"))
        return try (node.map { all.filter(Column("node") == $0) } ?? all).fetchAll(db)
    }
}
