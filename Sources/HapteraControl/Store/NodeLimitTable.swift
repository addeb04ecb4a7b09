import Foundation
import GRDB
import HapteraAPI
import HapteraCore
import HapteraHost

// How much may be put on nodes. What is promised is what the store says in the transaction that
// promises more: of two who ask at once, the second one sees the first one's.

/// A size that a volume is about to have: promised before its engine is asked, so that it counts
/// while that may still do it.
struct GrowthRow: Codable, FetchableRecord, PersistableRecord {
    static let databaseTableName = "growths"
    var volumeID: String
    var sizeBytes: Int64
}

extension MetadataStore {
    static func registerNodeLimits(_ migrator: inout DatabaseMigrator) {
        migrator.registerMigration("nodeLimits") { db in
            try db.execute(
                sql: """
                    CREATE TABLE nodeLimits (
                        node TEXT PRIMARY KEY REFERENCES nodes (name),
                        overcommitPercent INTEGER NOT NULL, reserveBytes INTEGER NOT NULL,
                        isLow INTEGER NOT NULL) STRICT;
                    CREATE TABLE growths (
                        volumeID TEXT NOT NULL REFERENCES volumes (id) ON DELETE CASCADE,
                        sizeBytes INTEGER NOT NULL,
                        PRIMARY KEY (volumeID, sizeBytes)) STRICT;
                    ALTER TABLE replicas ADD COLUMN expectedBytes INTEGER NOT NULL DEFAULT 0;
                    """)
        }
    }

    /// Of every node that is registered.
    package func rooms(_ spaces: NodeSpaces) async throws -> [String: NodeRoom] {
        try await database.read { db in try Self.rooms(db, spaces) }
    }

    static func rooms(_ db: Database, _ spaces: NodeSpaces) throws -> [String: NodeRoom] {
        var rooms: [String: NodeRoom] = [:]
        for name in try String.fetchAll(db, sql: "SELECT name FROM nodes") {
            rooms[name] = NodeRoom(limits: try limits(db, of: name), space: spaces[name])
        }
        let sizes = try promisedSizes(db)
        let replicas = try ReplicaRow.fetchAll(db)
        var members: [String: Set<VolumeRecord.Member>] = [:]
        for row in replicas {
            rooms[row.node]?.replicas += 1
            guard row.phase != .remove, var room = rooms[row.node] else { continue }
            room.promisedBytes = saturating(room.promisedBytes, sizes[row.volumeID] ?? 0)
            if row.expectedBytes > 0 {
                let inSync = try members[row.volumeID] ?? Self.members(db, row.volumeID)
                members[row.volumeID] = inSync
                let isFilled = row.member.map(inSync.contains) ?? false
                let there = room.space?.allocated[row.id] ?? 0
                if !isFilled, UInt64(row.expectedBytes) > there {
                    room.incomingBytes = saturating(
                        room.incomingBytes, UInt64(row.expectedBytes) - there)
                }
            }
            rooms[row.node] = room
        }
        return rooms
    }

    /// By volume id: its size, or what it is about to grow to.
    private static func promisedSizes(_ db: Database) throws -> [String: UInt64] {
        let rows = try Row.fetchAll(
            db,
            sql: """
                SELECT id, max(volumes.sizeBytes, ifnull(max(growths.sizeBytes), 0)) AS size
                FROM volumes LEFT JOIN growths ON growths.volumeID = volumes.id GROUP BY id
                """)
        return Dictionary(
            uniqueKeysWithValues: rows.map { ($0["id"], UInt64(clamping: $0["size"] as Int64)) })
    }

    private static func members(
        _ db: Database, _ volume: String
    ) throws -> Set<VolumeRecord.Member> {
        let record = try storedRecord(db, volume).flatMap { VolumeRecord(decoding: $0.bytes) }
        return Set(record?.inSync ?? [])
    }

    private static func limits(_ db: Database, of node: String) throws -> NodeLimits {
        try NodeLimits.fetchOne(db, key: node) ?? NodeLimits(node: node)
    }

    // MARK: Changes

    /// Changes what is given and leaves the rest.
    package func updateNode(_ request: Haptera_V1_UpdateNodeRequest) async throws {
        let name = request.name
        guard request.overcommitPercent <= UInt32(NodeLimits.overcommitMax) else {
            throw ControlError(
                .invalid,
                "--overcommit of node '\(name)' is 1% to \(NodeLimits.overcommitMax)%, or none, "
                    + "not \(request.overcommitPercent)%")
        }
        guard request.reserveBytes <= UInt64(NodeLimits.reserveMax) else {
            throw ControlError(
                .invalid,
                "--reserve of node '\(name)' is at most "
                    + "\(VolumeSize.text(UInt64(NodeLimits.reserveMax))), not "
                    + "\(request.reserveBytes) bytes")
        }
        try await transaction { db in
            guard try NodeRow.fetchOne(db, key: name) != nil else { throw Self.noNode(name) }
            let before = try Self.limits(db, of: name)
            var limits = before
            if request.hasOvercommitPercent {
                limits.overcommitPercent = Int(request.overcommitPercent)
            }
            if request.hasReserveBytes { limits.reserveBytes = Int64(request.reserveBytes) }
            guard limits != before else { return }
            try limits.upsert(db)
            try self.addEvent(db, "NodeUpdated", "node/\(name)", limits.text)
        }
    }

    static func noNode(_ name: String) -> ControlError {
        ControlError(.notFound, "there is no node '\(name)'; see 'storagectl node list'")
    }

    /// Notes whether the node runs short of space. True: news.
    package func noteSpace(_ space: NodeSpace, of node: String) async throws -> Bool {
        let isNews = try await database.read { db in
            try Self.limits(db, of: node).turn(space) != nil
        }
        guard isNews else { return false }
        return try await transaction { db in
            var limits = try Self.limits(db, of: node)
            guard let isLow = limits.turn(space), try NodeRow.fetchOne(db, key: node) != nil else {
                return false
            }
            limits.isLow = isLow
            try limits.upsert(db)
            let figures =
                "\(VolumeSize.text(space.availableBytes)) are available, "
                + "\(VolumeSize.text(limits.reserve(of: space))) reserved"
            try self.addEvent(
                db, isLow ? "NodeSpaceLow" : "NodeSpaceRecovered", "node/\(node)",
                isLow ? figures + ": no replica is put there, and none grows" : figures,
                by: .controller)
            return true
        }
    }

    // MARK: Growth

    /// Refuses a size that a node of the volume's replicas has no room for.
    package func requireRoomToGrow(
        _ name: String, to size: UInt64, spaces: NodeSpaces
    ) async throws {
        try await database.read { db in
            guard let row = try VolumeRow.filter(Column("name") == name).fetchOne(db) else {
                throw Self.noVolume(name)
            }
            try Self.requireRoom(db, for: Self.stored(db, row), toGrowTo: size, spaces)
        }
    }

    /// The same, and promises it, on all nodes or none.
    package func beginGrowth(
        _ name: String, to size: UInt64, spaces: NodeSpaces
    ) async throws {
        _ = try await changeVolume(name) { db, stored in
            try Self.requireRoom(db, for: stored, toGrowTo: size, spaces)
            guard size > UInt64(stored.volume.sizeBytes) else { return }
            try GrowthRow(volumeID: stored.volume.id, sizeBytes: Int64(size)).upsert(db)
        }
    }

    private static func requireRoom(
        _ db: Database, for stored: StoredVolume, toGrowTo size: UInt64, _ spaces: NodeSpaces
    ) throws {
        let promised = try promisedSizes(db)[stored.volume.id] ?? UInt64(stored.volume.sizeBytes)
        guard size > promised else { return }
        let rooms = try rooms(db, spaces)
        let replicas = Dictionary(
            grouping: stored.replicas.filter { $0.phase != .remove }, by: \.node)
        for (node, there) in replicas.sorted(by: { $0.key < $1.key }) {
            let (more, overflow) = (size - promised).multipliedReportingOverflow(
                by: UInt64(there.count))
            let why = rooms[node]?.objection(
                to: "volume '\(stored.volume.name)' to grow to \(VolumeSize.text(size))",
                promise: overflow ? .max : more, data: 0)
            if let why { throw ControlError(.precondition, why + "; the volume keeps its size") }
        }
    }

    /// The engine has said what became of it. What is in doubt counts until that engine has left,
    /// or the volume has the size.
    package func endGrowth(_ volumeID: String, to size: UInt64) async throws {
        try await transaction { db in
            try db.execute(
                sql: "DELETE FROM growths WHERE volumeID = ? AND sizeBytes = ?",
                arguments: [volumeID, Int64(size)])
        }
    }

    /// Nothing will grow any more, but for what is larger than `size`.
    static func forgetGrowths(
        _ db: Database, of volumeID: String, upTo size: UInt64 = .max
    ) throws {
        try db.execute(
            sql: "DELETE FROM growths WHERE volumeID = ? AND sizeBytes <= ?",
            arguments: [volumeID, Int64(clamping: size)])
    }
}
