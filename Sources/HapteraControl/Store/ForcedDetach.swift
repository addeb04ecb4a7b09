import GRDB
import HapteraCore

extension MetadataStore {
    /// Gives an attachment up without its engine's word. The record stays as it is, not clean: the
    /// next engine takes the volume over as after a crash, fences the old one by its epoch and
    /// waits for its leases. Refused if `isNodeReady`: then the engine can be asked.
    package func abandonAttachment(_ name: String, isNodeReady: Bool) async throws -> StoredVolume {
        try await changeVolume(name) { db, stored in
            var row = stored.volume
            guard let node = row.attachedNode else { return }
            guard !isNodeReady else {
                throw ControlError(
                    .precondition,
                    "node \(node) is there and can end the engine in order: storagectl volume "
                        + "detach \(name), without --force")
            }
            try self.abandon(db, row, on: node)
            row.endAttachment()
            row.nextNode = nil
            try row.update(db)
            try self.addEvent(
                db, "VolumeDetachForced", "volume/\(name)",
                "from node \(node), which is not heard of; its engine is ended when it returns")
        }
    }

    func abandon(_ db: Database, _ row: VolumeRow, on node: String) throws {
        try AbandonedEngineRow(
            volumeID: row.id, volume: row.name, node: node, clientGeneration: row.clientGeneration
        ).upsert(db)
    }

    /// What the node still has to end, but for volumes that are attached to it again.
    static func abandoned(_ db: Database, on node: String) throws -> [AbandonedEngineRow] {
        try AbandonedEngineRow.fetchAll(
            db,
            sql: """
                SELECT abandonedEngines.* FROM abandonedEngines LEFT JOIN volumes
                    ON volumes.id = abandonedEngines.volumeID
                WHERE node = ? AND attachedNode IS NOT abandonedEngines.node ORDER BY volumeID
                """, arguments: [node])
    }

    /// The row that the report of a detached engine settles.
    static func settled(
        _ db: Database, by fact: ReportedFacts.Engine, on node: String
    ) throws -> AbandonedEngineRow? {
        guard fact.isDetached || fact.hasServed else { return nil }
        let row = try AbandonedEngineRow.filter(Column("volumeID") == fact.volumeID)
            .filter(Column("node") == node).fetchOne(db)
        // One of a later attachment is only started when the earlier one's is gone.
        guard let row else { return nil }
        let isIt = fact.isDetached && fact.clientGeneration >= row.clientGeneration
        return isIt || fact.clientGeneration > row.clientGeneration ? row : nil
    }
}
