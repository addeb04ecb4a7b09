import Foundation
import GRDB
import HapteraCore

/// A volume record as it once stood.
package struct HistoryEntry: Equatable, Sendable {
    /// 0 for a record from before history was kept.
    package var timeMilliseconds: Int64
    package var record: VolumeRecord

    package init(timeMilliseconds: Int64, record: VolumeRecord) {
        self.timeMilliseconds = timeMilliseconds
        self.record = record
    }
}

/// Every record a volume has had, noted in the transaction that makes it the volume's.
extension MetadataStore {
    /// Changes kept per volume, beside those that are never forgotten.
    package static let historyMax = 10_000
    /// Bytes of them, as if all were as long as the newest: 10,000 are fewer with many snapshots.
    static let historyBytesMax = 320 << 20
    /// Changes between two prunings.
    static let historySlack: UInt64 = 256

    static func registerHistory(_ migrator: inout DatabaseMigrator) {
        migrator.registerMigration("history") { db in
            try db.execute(
                sql: """
                    CREATE TABLE history (
                        volumeID TEXT NOT NULL, epoch INTEGER NOT NULL,
                        timeMilliseconds INTEGER NOT NULL, change INTEGER NOT NULL,
                        record BLOB NOT NULL, PRIMARY KEY (volumeID, epoch)) STRICT, WITHOUT ROWID;
                    INSERT INTO history SELECT volumeID, epoch, 0, 0, record FROM records;
                    """)
        }
    }

    func noteHistory(
        _ db: Database, _ record: VolumeRecord, keeping limit: Int = historyMax,
        bytes: Int = historyBytesMax
    ) throws {
        let encoded = record.encoded()
        try db.execute(
            sql: "INSERT OR REPLACE INTO history VALUES (?, ?, ?, ?, ?)",
            arguments: [
                record.volume.text, Int64(record.epoch.rawValue), clock(),
                Int(record.change.rawValue), Data(encoded),
            ])
        let epoch = record.epoch.rawValue
        let limit = min(limit, bytes / encoded.count)
        guard epoch % Self.historySlack == 0, epoch > UInt64(limit) else { return }
        // What people decided stays, and so does what says since when a replica is out.
        let decisions: [VolumeRecord.Change] = [.creation, .salvage, .reconstruction]
        let kept = record.out.map { Int64($0.leftEpoch.rawValue) }
        try HistoryQuery.older(
            record.volume.text, than: Int64(epoch) - Int64(limit),
            except: kept, decisions.map { Int($0.rawValue) }
        ).execute(db)
    }

    func forgetHistory(_ db: Database, _ volume: String) throws {
        try db.execute(sql: "DELETE FROM history WHERE volumeID = ?", arguments: [volume])
    }

    /// The newest `limit` changes, and those that made the epochs of `also`; newest last.
    package func history(
        of volume: String, limit: Int, also epochs: [Epoch] = []
    ) async throws -> [HistoryEntry] {
        try await database.read { db in
            let newest = try Row.fetchAll(
                db,
                sql: "SELECT * FROM history WHERE volumeID = ? ORDER BY epoch DESC LIMIT ?",
                arguments: [volume, limit])
            var rows = Dictionary(newest.map { ($0["epoch"] as Int64, $0) }) { $1 }
            for epoch in epochs where rows[Int64(epoch.rawValue)] == nil {
                rows[Int64(epoch.rawValue)] = try Row.fetchOne(
                    db, sql: "SELECT * FROM history WHERE volumeID = ? AND epoch = ?",
                    arguments: [volume, Int64(epoch.rawValue)])
            }
            return rows.sorted { $0.key < $1.key }.compactMap { _, row in
                let data: Data = row["record"]
                return VolumeRecord(decoding: [UInt8](data)).map {
                    HistoryEntry(timeMilliseconds: row["timeMilliseconds"], record: $0)
                }
            }
        }
    }
}

private struct HistoryQuery {
    var sql: String
    var arguments: StatementArguments

    /// Deletes what is older than an epoch, except the epochs and kinds of change named.
    static func older(
        _ volume: String, than epoch: Int64, except epochs: [Int64], _ changes: [Int]
    ) -> HistoryQuery {
        func marks(_ count: Int) -> String {
            Array(repeating: "?", count: count).joined(separator: ", ")
        }
        return HistoryQuery(
            sql: "DELETE FROM history WHERE volumeID = ? AND epoch <= ? "
                + "AND epoch NOT IN (\(marks(epochs.count))) "
                + "AND change NOT IN (\(marks(changes.count)))",
            arguments: StatementArguments([volume]) + StatementArguments([epoch])
                + StatementArguments(epochs) + StatementArguments(changes))
    }

    func execute(_ db: Database) throws { try db.execute(sql: sql, arguments: arguments) }
}
