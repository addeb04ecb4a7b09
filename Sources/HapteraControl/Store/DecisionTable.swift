import Foundation
import GRDB
import HapteraCore

/// What administrators decide about replicas that are out: each is one more epoch of the record.
extension MetadataStore {
    /// Writes the record of a salvage if the volume's epoch is still the one it follows.
    /// `endsAttachment`: the engine's node is gone for good, so the volume is attached nowhere.
    func salvage(
        _ volume: VolumeRow, _ proposed: VolumeRecord, endsAttachment: Bool, message: String
    ) async throws -> StoredVolume {
        try await transaction { db in
            try self.swap(db, volume, proposed)
            if endsAttachment, var row = try VolumeRow.fetchOne(db, key: volume.id) {
                row.endAttachment()
                row.nextNode = nil
                try row.update(db)
            }
            try self.addEvent(db, "VolumeSalvaged", "volume/\(volume.name)", message)
            return try Self.stored(db, try VolumeRow.fetchOne(db, key: volume.id) ?? volume)
        }
    }

    private func swap(_ db: Database, _ volume: VolumeRow, _ proposed: VolumeRecord) throws {
        guard let stored = try Self.storedRecord(db, volume.id),
            let current = VolumeRecord(decoding: stored.bytes),
            current.epoch.next == proposed.epoch
        else {
            throw ControlError(
                .conflict, "volume '\(volume.name)' changed meanwhile; look at it again")
        }
        let replicas = try ReplicaRow.filter(Column("volumeID") == volume.id).fetchAll(db)
        let rules = RecordRules(after: current, known: Set(replicas.compactMap(\.member)))
        if let objection = rules.objection(to: proposed, by: .administrator) {
            throw ControlError(.precondition, objection)
        }
        try putRecord(db, proposed)
    }

    /// Makes a record the volume's, whatever stood before.
    func putRecord(_ db: Database, _ record: VolumeRecord) throws {
        try db.execute(
            sql: "UPDATE volumes SET unchangedSince = 0 WHERE id = ?",
            arguments: [record.volume.text])
        try db.execute(
            sql: "INSERT OR REPLACE INTO records (volumeID, epoch, record) VALUES (?, ?, ?)",
            arguments: [
                record.volume.text, Int64(record.epoch.rawValue), Data(record.encoded()),
            ])
        try noteHistory(db, record)
        try settleLabels(db, record)
    }

    /// Lets a replica that was kept be filled again.
    package func rejoinReplica(_ replica: String, of name: String) async throws -> StoredVolume {
        try await decide(name, replica) { db, stored, departure in
            guard departure.isKept else { return nil }
            try self.addEvent(
                db, "ReplicaRejoinRequested", "volume/\(name)",
                "replica \(replica): what it kept is given up")
            return { $0?.isKept = false }
        }
    }

    /// Changes what the record says of a replica that is out. `body` returns how; nil: not at all.
    private func decide(
        _ name: String, _ replica: String,
        _ body:
            @escaping @Sendable (Database, StoredVolume, VolumeRecord.Departure) throws ->
            ((inout VolumeRecord.Departure?) -> Void)?
    ) async throws -> StoredVolume {
        try await transaction { db in
            guard let row = try VolumeRow.filter(Column("name") == name).fetchOne(db) else {
                throw Self.noVolume(name)
            }
            let stored = try Self.stored(db, row)
            guard row.phase == .ready, let record = stored.record,
                let known = stored.replicas.first(where: { $0.id == replica }),
                known.phase == .run
            else {
                throw ControlError(
                    .notFound,
                    "volume '\(name)' has no replica \(replica); see 'storagectl replica list "
                        + "\(name)'")
            }
            guard known.member != record.joining,
                let index = record.out.firstIndex(where: { $0.member == known.member })
            else {
                let place =
                    known.member == record.joining ? "being filled" : "in the in-sync set"
                throw ControlError(
                    .precondition,
                    "replica \(replica) is \(place): only one that is out can be given up")
            }
            var departure: VolumeRecord.Departure? = record.out[index]
            guard let change = try body(db, stored, record.out[index]) else { return stored }
            change(&departure)
            var next = record
            next.epoch = record.epoch.next
            next.nonce = UInt64.random(in: 1 ... .max)
            next.change = .administration
            next.out.remove(at: index)
            if let departure { next.out.insert(departure, at: index) }
            try self.swap(db, row, next)
            return try Self.stored(db, row)
        }
    }
}
