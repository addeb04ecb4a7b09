import Foundation
import GRDB
import HapteraCore
import HapteraHost

/// Labels are the store's alone: no engine or replica knows them. Those of a volume go with its
/// row; those of a snapshot in the transaction that takes its name out of the record.
extension MetadataStore {
    /// Layer of the labels of a snapshot that was asked for and is not in the record yet.
    static let pendingLayer = 0
    /// What was asked for and never came into being is forgotten after so long.
    static let pendingMaxMilliseconds: Int64 = 86_400_000

    static func registerLabels(_ migrator: inout DatabaseMigrator) {
        migrator.registerMigration("labels") { db in
            try db.execute(
                sql: """
                    CREATE TABLE volumeLabels (
                        volumeID TEXT NOT NULL REFERENCES volumes (id) ON DELETE CASCADE,
                        key TEXT NOT NULL, value TEXT NOT NULL,
                        PRIMARY KEY (volumeID, key)) STRICT, WITHOUT ROWID;
                    CREATE TABLE snapshotLabels (
                        volumeID TEXT NOT NULL REFERENCES volumes (id) ON DELETE CASCADE,
                        snapshot TEXT NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL,
                        layer INTEGER NOT NULL, timeMilliseconds INTEGER NOT NULL,
                        PRIMARY KEY (volumeID, snapshot, key)) STRICT, WITHOUT ROWID;
                    """)
        }
    }

    // MARK: Volumes

    static func labels(_ db: Database, of volume: String) throws -> [String: String] {
        let rows = try Row.fetchAll(
            db, sql: "SELECT key, value FROM volumeLabels WHERE volumeID = ?", arguments: [volume])
        return Dictionary(rows.map { ($0["key"], $0["value"]) }) { $1 }
    }

    func putLabels(_ db: Database, _ labels: [String: String], of volume: String) throws {
        for (key, value) in labels {
            try db.execute(
                sql: "INSERT OR REPLACE INTO volumeLabels VALUES (?, ?, ?)",
                arguments: [volume, key, value])
        }
    }

    /// Sets and removes what is named and leaves the rest.
    package func labelVolume(
        _ name: String, set: [String: String], remove: [String]
    ) async throws -> StoredVolume {
        try Self.check(set, remove)
        return try await changeVolume(name) { db, stored in
            let labels = try Self.changed(stored.labels, set, remove, of: "volume '\(name)'")
            guard labels != stored.labels else { return }
            try db.execute(
                sql: "DELETE FROM volumeLabels WHERE volumeID = ?", arguments: [stored.volume.id])
            try self.putLabels(db, labels, of: stored.volume.id)
            try self.addEvent(
                db, "VolumeLabelled", "volume/\(name)", Self.words(set, remove))
        }
    }

    /// Refuses what is no label, or not for somebody to change.
    private static func check(_ set: [String: String], _ remove: [String]) throws(ControlError) {
        if let objection = Labels.objection(to: set) { throw ControlError(.invalid, objection) }
        for key in remove {
            if let objection = Labels.objection(to: key) { throw ControlError(.invalid, objection) }
            guard set[key] == nil else {
                throw ControlError(.invalid, "label '\(key)' is both set and removed")
            }
        }
    }

    private static func changed(
        _ labels: [String: String], _ set: [String: String], _ remove: [String], of what: String
    ) throws(ControlError) -> [String: String] {
        var labels = labels.merging(set) { $1 }
        for key in remove { labels[key] = nil }
        if let objection = Labels.countObjection(labels.count) {
            throw ControlError(.precondition, "\(what): \(objection)")
        }
        return labels
    }

    private static func words(_ set: [String: String], _ remove: [String]) -> String {
        let words = set.sorted { $0.key < $1.key }.map { "\($0.key)=\($0.value)" }
        return (words + remove.map { "\($0)-" }).joined(separator: " ")
    }

    // MARK: Snapshots

    /// By snapshot, of those the record names.
    package func snapshotLabels(of volume: String) async throws -> [String: [String: String]] {
        try await database.read { db in
            let rows = try Row.fetchAll(
                db, sql: "SELECT * FROM snapshotLabels WHERE volumeID = ? AND layer != ?",
                arguments: [volume, Self.pendingLayer])
            return rows.reduce(into: [:]) { labels, row in
                labels[row["snapshot"] as String, default: [:]][row["key"]] = row["value"]
            }
        }
    }

    /// What a snapshot shall be labelled with. One that is in the record keeps what it has besides,
    /// and gets nothing `reserved`: those say who took it. For one that is not, this replaces what
    /// an earlier request wanted, and holds from the moment that the record names it.
    func labelSnapshot(
        _ name: String, of volume: VolumeID, _ labels: [String: String],
        reserved: [String: String] = [:]
    ) async throws {
        if let objection = Labels.objection(to: labels) { throw ControlError(.invalid, objection) }
        try await transaction { db in
            let record = try Self.storedRecord(db, volume.text)
                .flatMap { VolumeRecord(decoding: $0.bytes) }
            if let snapshot = record?.snapshot(named: name) {
                try self.add(db, labels, to: snapshot, of: volume.text)
                return
            }
            let limit = self.clock() - Self.pendingMaxMilliseconds
            try db.execute(
                sql: "DELETE FROM snapshotLabels WHERE volumeID = ? AND layer = ? "
                    + "AND (snapshot = ? OR timeMilliseconds < ?)",
                arguments: [volume.text, Self.pendingLayer, name, limit])
            for (key, value) in labels.merging(reserved, uniquingKeysWith: { $1 }) {
                try self.put(db, key, value, name, volume.text, layer: Self.pendingLayer)
            }
        }
    }

    /// Sets and removes what is named, of a snapshot that the record names, and leaves the rest.
    package func relabelSnapshot(
        _ name: String, of volume: String, set: [String: String], remove: [String]
    ) async throws {
        try Self.check(set, remove)
        _ = try await changeVolume(volume) { db, stored in
            guard let snapshot = stored.record?.snapshot(named: name) else {
                throw Self.noSnapshot(name, of: volume)
            }
            let id = stored.volume.id
            let rows = try Row.fetchAll(
                db,
                sql: "SELECT key, value FROM snapshotLabels WHERE volumeID = ? AND snapshot = ?",
                arguments: [id, name])
            let old: [String: String] = Dictionary(rows.map { ($0["key"], $0["value"]) }) { $1 }
            let labels = try Self.changed(old, set, remove, of: "snapshot '\(name)'")
            guard labels != old else { return }
            for (key, value) in set {
                try self.put(db, key, value, name, id, layer: Int(snapshot.layer.rawValue))
            }
            for key in remove {
                try db.execute(
                    sql: "DELETE FROM snapshotLabels "
                        + "WHERE volumeID = ? AND snapshot = ? AND key = ?",
                    arguments: [id, name, key])
            }
            try self.addEvent(
                db, "SnapshotLabelled", "volume/\(volume)",
                "snapshot \(name): \(Self.words(set, remove))")
        }
    }

    private func add(
        _ db: Database, _ labels: [String: String], to snapshot: VolumeRecord.Snapshot,
        of volume: String
    ) throws {
        guard !labels.isEmpty else { return }
        for (key, value) in labels {
            try put(
                db, key, value, snapshot.name, volume, layer: Int(snapshot.layer.rawValue))
        }
        let count =
            try Int.fetchOne(
                db, sql: "SELECT COUNT(*) FROM snapshotLabels WHERE volumeID = ? AND snapshot = ?",
                arguments: [volume, snapshot.name]) ?? 0
        if let objection = Labels.countObjection(count) {
            throw ControlError(.precondition, "snapshot '\(snapshot.name)': \(objection)")
        }
    }

    private func put(
        _ db: Database, _ key: String, _ value: String, _ snapshot: String, _ volume: String,
        layer: Int
    ) throws {
        try db.execute(
            sql: "INSERT OR REPLACE INTO snapshotLabels VALUES (?, ?, ?, ?, ?, ?)",
            arguments: [volume, snapshot, key, value, layer, clock()])
    }

    /// The snapshot was refused: nothing is to be labelled.
    func forgetPendingLabels(_ name: String, of volume: VolumeID) async throws {
        try await transaction { db in
            try db.execute(
                sql: "DELETE FROM snapshotLabels WHERE volumeID = ? AND layer = ? AND snapshot = ?",
                arguments: [volume.text, Self.pendingLayer, name])
        }
    }

    /// Part of the transaction that makes the record the volume's: labels that wait find their
    /// snapshot, and those whose snapshot is gone go. Another of the same name has another layer.
    func settleLabels(_ db: Database, _ record: VolumeRecord) throws {
        let rows = try Row.fetchAll(
            db, sql: "SELECT DISTINCT snapshot, layer FROM snapshotLabels WHERE volumeID = ?",
            arguments: [record.volume.text])
        for row in rows {
            let (name, layer): (String, Int) = (row["snapshot"], row["layer"])
            let now = record.snapshot(named: name).map { Int($0.layer.rawValue) }
            if now == layer || (now == nil && layer == Self.pendingLayer) { continue }
            let key: StatementArguments = [record.volume.text, name, layer]
            let place = "WHERE volumeID = ? AND snapshot = ? AND layer = ?"
            if let now, layer == Self.pendingLayer {
                try db.execute(
                    sql: "UPDATE snapshotLabels SET layer = ? " + place, arguments: [now] + key)
            } else {
                try db.execute(sql: "DELETE FROM snapshotLabels " + place, arguments: key)
            }
        }
    }
}
