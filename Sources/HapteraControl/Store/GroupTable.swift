import GRDB

/// A snapshot of several volumes that is being taken: not noted any more once it is one.
package struct GroupRow: Codable, Equatable, Sendable, FetchableRecord, PersistableRecord {
    package static let databaseTableName = "groups"
    package var id: String
    package var snapshot: String
    /// Names, with commas between them.
    package var volumes: String
    package var timeMilliseconds: Int64
}

extension MetadataStore {
    static func registerGroups(_ migrator: inout DatabaseMigrator) {
        migrator.registerMigration("groups") { db in
            try db.execute(
                sql: """
                    CREATE TABLE groups (
                        id TEXT NOT NULL PRIMARY KEY, snapshot TEXT NOT NULL,
                        volumes TEXT NOT NULL, timeMilliseconds INTEGER NOT NULL) STRICT;
                    """)
        }
    }

    func beginGroup(_ group: GroupRow) async throws {
        try await transaction { db in
            try group.insert(db)
            for volume in group.volumes.split(separator: ",") {
                try self.addEvent(
                    db, "SnapshotRequested", "volume/\(volume)",
                    "snapshot \(group.snapshot), of the group \(group.volumes)")
            }
        }
    }
    func endGroup(_ group: GroupRow) async throws {
        try await transaction { db in _ = try group.delete(db) }
    }
    package func groups() async throws -> [GroupRow] {
        try await database.read { db in try GroupRow.fetchAll(db) }
    }
}
