import Foundation
import GRDB
import HapteraCore
import HapteraHost

// Maintenance: a volume that is not attached has an engine for as long as something is done to it
// that only an engine can do. No client can connect to that one. It is an attachment with a client
// generation of its own in all that concerns its replicas and its record, so that whatever ends it
// in the middle leaves what the end of any attachment leaves; in the eyes of users the volume stays
// detached.
//
// 1. the row says so, with node and generation -> a controller that starts anew ends it
// 2. the engine takes the volume over          -> the record is not clean: taken over as any
// 3. what is wanted is done, or not
// 4. the row says that the engine is to leave
// 5. the engine has left, the record is clean
// 6. the row is as before; who wanted to attach meanwhile is attached, in the same transaction

extension VolumeRow {
    /// It has an engine, and is not attached.
    package var isMaintained: Bool { maintenance != nil }
    /// Where clients find it, or shall.
    package var clientNode: String? { isMaintained ? nextNode : attachedNode }

    mutating func endAttachment() {
        attachedNode = nil
        isDetaching = false
        maintenance = nil
    }
}

extension StoredVolume {
    /// It has no engine, and the last one has flushed everything and said so.
    package var wasLeftInOrder: Bool { volume.attachedNode == nil && record?.isClean == true }
}

extension MetadataStore {
    static func registerMaintenance(_ migrator: inout DatabaseMigrator) {
        migrator.registerMigration("maintenance") { db in
            try db.execute(
                sql: """
                    ALTER TABLE volumes ADD COLUMN maintenance TEXT;
                    ALTER TABLE volumes ADD COLUMN nextNode TEXT;
                    ALTER TABLE volumes ADD COLUMN unchangedSince INTEGER NOT NULL DEFAULT 0;
                    """)
        }
    }

    /// Gives a detached volume an engine that lets no client in. Nil: it is not as it was, after
    /// that client generation. `words`: what it is for.
    package func beginMaintenance(
        _ name: String, after generation: Int64, on node: String, words: String
    ) async throws -> StoredVolume? {
        let stored = try await changeVolume(name) { db, stored in
            var row = stored.volume
            guard row.phase == .ready, row.attachedNode == nil, row.clientGeneration == generation
            else { return }
            // Whatever engine there was has left for good: from here on only this one, which has no
            // clients, could change the volume.
            if row.unchangedSince == 0, let record = stored.record, record.isClean {
                row.unchangedSince = Int64(record.head.rawValue)
            }
            row.maintenance = words
            row.nextNode = nil
            try self.beginAttachment(db, &row, on: node)
            try row.update(db)
            try self.addEvent(
                db, "MaintenanceBegun", "volume/\(name)", "\(words): an engine on node \(node)")
        }
        let isBegun =
            stored.volume.isMaintained && stored.volume.clientGeneration == generation + 1
        return isBegun ? stored : nil
    }

    /// Has the engine leave in order, if it is that attachment's still.
    package func endMaintenance(_ name: String, generation: Int64) async throws {
        _ = try await changeVolume(name) { db, stored in
            var row = stored.volume
            guard row.isMaintained, row.clientGeneration == generation, !row.isDetaching else {
                return
            }
            row.isDetaching = true
            try row.update(db)
        }
    }

    /// Gives the engine up, whose node is not heard of: as `abandonAttachment`, but that nobody
    /// needs to be asked, since no client relies on it. Who wanted to attach is attached.
    package func abandonMaintenance(_ name: String, generation: Int64) async throws {
        _ = try await changeVolume(name) { db, stored in
            var row = stored.volume
            guard row.isMaintained, row.clientGeneration == generation,
                let node = row.attachedNode
            else { return }
            try self.abandon(db, row, on: node)
            try self.finishAttachment(
                db, &row, event: "MaintenanceAbandoned",
                "node \(node) is not heard of; its engine is ended when it returns")
        }
    }

    /// The engine of an attachment is gone. `event`: of a maintenance.
    func finishAttachment(
        _ db: Database, _ row: inout VolumeRow, event: String = "MaintenanceEnded",
        _ words: String
    ) throws {
        let subject = "volume/\(row.name)"
        try addEvent(db, row.isMaintained ? event : "VolumeDetached", subject, words)
        row.endAttachment()
        try Self.forgetGrowths(db, of: row.id)
        if let node = row.nextNode {
            row.nextNode = nil
            try beginAttachment(db, &row, on: node)
            row.unchangedSince = 0
        }
        try row.update(db)
    }

    /// The next attachment, with clients or without.
    func beginAttachment(_ db: Database, _ row: inout VolumeRow, on node: String) throws {
        row.attachedNode = node
        row.isDetaching = false
        row.clientGeneration += 1
        row.attachedBootID = try NodeRow.fetchOne(db, key: node)?.bootID ?? ""
        row.hadRemoteClient = false
        row.acceptLossInstance = ""
    }
}
