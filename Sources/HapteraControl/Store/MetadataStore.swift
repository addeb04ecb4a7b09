import Foundation
import GRDB
import HapteraCore
import HapteraHost

/// The metadata store on one SQLite file: volume records, desired state, nodes, events.
///
/// Every change is one transaction, durable when it returns (write-ahead log, synchronous=FULL).
/// A volume's record is opaque here but for its validation: its meaning is the engine's.
package final class MetadataStore: Sendable {
    package let database: DatabasePool
    /// Milliseconds since 1970; a parameter so that tests own the time.
    let clock: @Sendable () -> Int64
    let swaps = SwapQueue()

    package static let eventsMax = 10_000

    package init(
        path: String, clock: @escaping @Sendable () -> Int64 = MetadataStore.wallClock
    ) throws {
        var configuration = Configuration()
        configuration.busyMode = .timeout(5)
        database = try DatabasePool(path: path, configuration: configuration)
        // Afterwards, on the one connection that writes: the pool sets NORMAL, with which a power
        // cut takes back transactions that were reported as done.
        try database.writeWithoutTransaction { db in
            try db.execute(sql: "PRAGMA synchronous = FULL")
        }
        self.clock = clock
        try Self.migrator(clock: clock).migrate(database)
    }

    package static let wallClock: @Sendable () -> Int64 = {
        Int64(Date().timeIntervalSince1970 * 1000)
    }

    private static func migrator(
        clock: @escaping @Sendable () -> Int64
    ) -> DatabaseMigrator {
        var migrator = DatabaseMigrator()
        migrator.registerMigration("1") { db in
            try db.execute(sql: Self.schema)
            try db.execute(
                sql: "INSERT INTO meta (name, value) VALUES ('clusterID', ?)",
                arguments: [VolumeID.random().text])
        }
        registerHistory(&migrator)
        migrator.registerMigration("settings") { db in try db.execute(sql: Self.settingsSchema) }
        migrator.registerMigration("abandonedEngines") { db in
            try db.execute(
                sql: """
                    CREATE TABLE abandonedEngines (
                        volumeID TEXT NOT NULL, volume TEXT NOT NULL,
                        node TEXT NOT NULL REFERENCES nodes (name),
                        clientGeneration INTEGER NOT NULL,
                        PRIMARY KEY (volumeID, node)) STRICT;
                    """)
        }
        migrator.registerMigration("scratch") { db in
            try db.execute(
                sql: "ALTER TABLE volumes ADD COLUMN isScratch INTEGER NOT NULL DEFAULT 0")
        }
        registerLabels(&migrator)
        registerGroups(&migrator)
        registerSchedules(&migrator, clock: clock)
        registerClones(&migrator)
        migrator.registerMigration("detectZeroes") { db in
            try db.execute(
                sql: "ALTER TABLE volumes ADD COLUMN detectsZeroes INTEGER NOT NULL DEFAULT 0")
        }
        registerMaintenance(&migrator)
        registerNodeLimits(&migrator)
        registerFilling(&migrator)
        registerScrubs(&migrator)
        registerDamage(&migrator)
        return migrator
    }

    private static let schema = """
        CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
        CREATE TABLE nodes (
            name TEXT PRIMARY KEY, nodeID TEXT NOT NULL, address TEXT NOT NULL,
            directory TEXT NOT NULL, version TEXT NOT NULL, pid INTEGER NOT NULL) STRICT;
        CREATE TABLE volumes (
            id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, sizeBytes INTEGER NOT NULL,
            replicaCount INTEGER NOT NULL, phase TEXT NOT NULL, attachedNode TEXT,
            isDetaching INTEGER NOT NULL, clientGeneration INTEGER NOT NULL,
            servedGeneration INTEGER NOT NULL, createdMilliseconds INTEGER NOT NULL) STRICT;
        CREATE TABLE replicas (
            id TEXT PRIMARY KEY, volumeID TEXT NOT NULL REFERENCES volumes (id),
            ordinal INTEGER NOT NULL, node TEXT NOT NULL REFERENCES nodes (name),
            incarnation TEXT NOT NULL, phase TEXT NOT NULL, address TEXT NOT NULL,
            directory TEXT NOT NULL) STRICT;
        CREATE INDEX replicasOfVolume ON replicas (volumeID, ordinal);
        CREATE TABLE records (
            volumeID TEXT PRIMARY KEY REFERENCES volumes (id), epoch INTEGER NOT NULL,
            record BLOB NOT NULL) STRICT;
        CREATE TABLE deletedVolumes (
            name TEXT PRIMARY KEY, id TEXT NOT NULL, timeMilliseconds INTEGER NOT NULL) STRICT;
        CREATE TABLE events (
            id INTEGER PRIMARY KEY AUTOINCREMENT, timeMilliseconds INTEGER NOT NULL,
            kind TEXT NOT NULL, subject TEXT NOT NULL, message TEXT NOT NULL,
            actor TEXT NOT NULL, peer TEXT NOT NULL) STRICT;
        """

    /// Volume settings, reboots of nodes, replaced replicas.
    private static let settingsSchema = """
        ALTER TABLE volumes ADD COLUMN minInSync INTEGER NOT NULL DEFAULT 1;
        ALTER TABLE volumes ADD COLUMN ioTimeoutMilliseconds INTEGER NOT NULL DEFAULT 0;
        ALTER TABLE volumes ADD COLUMN leaseMilliseconds INTEGER NOT NULL DEFAULT 500;
        ALTER TABLE volumes ADD COLUMN removalDeadlineMilliseconds INTEGER NOT NULL DEFAULT 3000;
        ALTER TABLE volumes ADD COLUMN staleReplicaTimeoutMilliseconds INTEGER NOT NULL
            DEFAULT 1800000;
        ALTER TABLE volumes ADD COLUMN attachedBootID TEXT NOT NULL DEFAULT '';
        ALTER TABLE volumes ADD COLUMN hadRemoteClient INTEGER NOT NULL DEFAULT 0;
        ALTER TABLE volumes ADD COLUMN acceptLossInstance TEXT NOT NULL DEFAULT '';
        ALTER TABLE nodes ADD COLUMN bootID TEXT NOT NULL DEFAULT '';
        ALTER TABLE replicas ADD COLUMN replaces TEXT;
        ALTER TABLE replicas ADD COLUMN isAutomatic INTEGER NOT NULL DEFAULT 0;
        CREATE TABLE discardedReplicas (
            id TEXT PRIMARY KEY, volumeID TEXT NOT NULL, volume TEXT NOT NULL,
            node TEXT NOT NULL REFERENCES nodes (name), incarnation TEXT NOT NULL,
            sizeBytes INTEGER NOT NULL, timeMilliseconds INTEGER NOT NULL) STRICT;
        """

    package func clusterID() async throws -> String {
        try await database.read { db in
            try String.fetchOne(db, sql: "SELECT value FROM meta WHERE name = 'clusterID'") ?? ""
        }
    }

    /// One transaction, in which `Caller.current` is still the requester's.
    func transaction<Result: Sendable>(
        _ body: @escaping @Sendable (Database) throws -> Result
    ) async throws -> Result {
        let caller = Caller.current
        return try await database.write { db in
            try Caller.$current.withValue(caller) { try body(db) }
        }
    }

    // MARK: Events

    /// Part of the transaction that makes the change it tells of.
    func addEvent(
        _ db: Database, _ kind: String, _ subject: String, _ message: String,
        by caller: Caller = .current
    ) throws {
        var event = EventRow(
            id: nil, timeMilliseconds: clock(), kind: kind, subject: subject, message: message,
            actor: caller.actor, peer: caller.peer)
        try event.insert(db)
        guard let id = event.id, id % 256 == 0 else { return }
        try db.execute(
            sql: "DELETE FROM events WHERE id <= ?", arguments: [id - Int64(Self.eventsMax)])
    }

    package func addEvent(
        _ kind: String, _ subject: String, _ message: String, by caller: Caller
    ) async throws {
        try await transaction { db in
            try self.addEvent(db, kind, subject, message, by: caller)
        }
    }

    /// The newest `limit` events after `id`, oldest first.
    package func events(after id: Int64, limit: Int) async throws -> [EventRow] {
        let newest = try await database.read { db in
            try EventRow.fetchAll(
                db, sql: "SELECT * FROM events WHERE id > ? ORDER BY id DESC LIMIT ?",
                arguments: [id, limit])
        }
        return newest.reversed()
    }
}

extension VolumeID {
    package static func random() -> VolumeID {
        VolumeID(high: UInt64.random(in: .min ... .max), low: UInt64.random(in: .min ... .max))
    }
}
