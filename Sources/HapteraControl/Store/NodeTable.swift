import Foundation
import GRDB
import HapteraCore
import HapteraHost

/// What a node's report settles: facts that change what is wanted.
package struct ReportedFacts: Equatable, Sendable {
    package struct Replica: Equatable, Sendable {
        package var id: String
        package var address: String
        package var directory: String
        package var isRemoved: Bool
    }
    package struct Engine: Equatable, Sendable {
        package var volumeID: String
        package var clientGeneration: Int64
        package var hasServed: Bool
        package var isDetached: Bool
        package var hadRemoteClient = false
        package var scrub: ScrubFact?
        package var damage: DamageFact?
    }
    /// Replicas that run, or are removed.
    package var replicas: [Replica] = []
    /// Engines that have served, or are gone in order.
    package var engines: [Engine] = []
    package init() {}
}

extension MetadataStore {
    package func nodes() async throws -> [NodeRow] {
        try await database.read { db in try NodeRow.order(Column("name")).fetchAll(db) }
    }

    /// Adds or updates a node. A name belongs to the directory that took it first.
    package func registerNode(_ node: NodeRow) async throws {
        guard Names.isValidLabel(node.name) else {
            throw ControlError(.invalid, "'\(node.name)' is no node name: use \(Names.labelRule)")
        }
        guard node.nodeID.utf8.count == 16, parseHexadecimal(node.nodeID.utf8) != nil,
            node.directory.hasPrefix("/"), node.directory.utf8.count <= 4096,
            Names.hostAndPort(Names.endpoint(host: node.address, port: 1)) != nil
        else { throw ControlError(.invalid, "the node's id, address or directory is malformed") }
        try await transaction { db in
            let known = try NodeRow.fetchOne(db, key: node.name)
            if let known, known.nodeID != node.nodeID {
                throw ControlError(
                    .precondition,
                    "the node name '\(node.name)' belongs to the directory "
                        + "\(known.directory) on \(known.address); choose another --name")
            }
            if known == node { return }
            try node.upsert(db)
            let caller = Caller(actor: "node/\(node.name)", peer: Caller.current.peer)
            try self.noteBoot(db, node, by: caller)
            try self.addEvent(
                db, known == nil ? "NodeRegistered" : "NodeStarted", "node/\(node.name)",
                "at \(node.address), \(node.directory), process \(node.pid)", by: caller)
        }
    }

    /// A client lives on the node its volume is attached to: after a restart of that host it is a
    /// new one, which remembers no acknowledged write. One that came from another host may live on.
    private func noteBoot(_ db: Database, _ node: NodeRow, by caller: Caller) throws {
        guard !node.bootID.isEmpty else { return }
        let attached = try VolumeRow.filter(Column("attachedNode") == node.name).fetchAll(db)
        for var row in attached where row.attachedBootID != node.bootID {
            let isNewBoot = !row.attachedBootID.isEmpty
            row.attachedBootID = node.bootID
            if isNewBoot, !row.hadRemoteClient {
                row.clientGeneration += 1
                if !row.isMaintained {
                    try addEvent(
                        db, "ClientEnded", "volume/\(row.name)",
                        "node \(node.name) has restarted; client generation "
                            + "\(row.clientGeneration) begins", by: caller)
                }
            }
            try row.update(db)
        }
    }

    /// What one node shall run and remove.
    package struct DesiredRows: Sendable {
        package var replicas: [(ReplicaRow, VolumeRow)]
        /// Engines get the replicas whose address is known.
        package var engines: [StoredVolume]
        package var discarded: [DiscardedReplicaRow]
        package var abandoned: [AbandonedEngineRow]
    }

    package func desired(for node: String) async throws -> DesiredRows {
        try await database.read { db in
            let rows = try ReplicaRow.filter(Column("node") == node).order(Column("id"))
                .fetchAll(db)
            let replicas = try rows.compactMap { row in
                try VolumeRow.fetchOne(db, key: row.volumeID).map { (row, $0) }
            }
            let attached = try VolumeRow.filter(Column("attachedNode") == node)
                .order(Column("name")).fetchAll(db)
            return DesiredRows(
                replicas: replicas, engines: try attached.map { try Self.stored(db, $0) },
                discarded: try Self.discarded(db, on: node),
                abandoned: try Self.abandoned(db, on: node))
        }
    }

    /// Takes over what a node reported. True if anything changed that others depend on.
    package func apply(_ facts: ReportedFacts, from node: String) async throws -> Bool {
        let caller = Caller(actor: "node/\(node)")
        // Reports come every second and rarely say anything new: look before writing.
        let isNews = try await database.read { db in
            try facts.replicas.contains { fact in
                guard let row = try ReplicaRow.fetchOne(db, key: fact.id), row.node == node else {
                    return try fact.isRemoved && Self.isDiscarded(db, fact.id, on: node)
                }
                return Self.isNews(fact, to: row)
            }
                || facts.engines.contains { fact in
                    if try Self.settled(db, by: fact, on: node) != nil { return true }
                    if try self.isScrubNews(db, fact, node: node) { return true }
                    if try self.isDamageNews(db, fact, node: node) { return true }
                    guard let row = try VolumeRow.fetchOne(db, key: fact.volumeID) else {
                        return false
                    }
                    return Self.isNews(fact, to: row, node: node)
                }
        }
        guard isNews else { return false }
        return try await transaction { db in
            try Caller.$current.withValue(caller) {
                for fact in facts.replicas { try self.apply(db, fact, node: node) }
                for fact in facts.engines { try self.apply(db, fact, node: node) }
                return true
            }
        }
    }

    private static func isDiscarded(_ db: Database, _ id: String, on node: String) throws -> Bool {
        try DiscardedReplicaRow.fetchOne(db, key: id)?.node == node
    }

    private static func isNews(_ fact: ReportedFacts.Replica, to row: ReplicaRow) -> Bool {
        if fact.isRemoved { return row.phase == .remove }
        return row.phase == .create || row.address != fact.address
            || row.directory != fact.directory
    }

    private static func isNews(
        _ fact: ReportedFacts.Engine, to row: VolumeRow, node: String
    ) -> Bool {
        guard row.attachedNode == node, row.clientGeneration == fact.clientGeneration else {
            return false
        }
        return (fact.isDetached && row.isDetaching)
            || (fact.hasServed && row.servedGeneration < fact.clientGeneration)
            || (fact.hadRemoteClient && !row.hadRemoteClient)
    }

    private func apply(_ db: Database, _ fact: ReportedFacts.Replica, node: String) throws {
        if fact.isRemoved, try Self.isDiscarded(db, fact.id, on: node),
            let gone = try DiscardedReplicaRow.fetchOne(db, key: fact.id)
        {
            try gone.delete(db)
            try addEvent(
                db, "ReplicaDataRemoved", "volume/\(gone.volume)",
                "replica \(gone.id), from node \(node)")
            return
        }
        guard var row = try ReplicaRow.fetchOne(db, key: fact.id), row.node == node,
            Self.isNews(fact, to: row), let volume = try VolumeRow.fetchOne(db, key: row.volumeID)
        else { return }
        if fact.isRemoved {
            try row.delete(db)
            try finishDeletion(db, volume)
            return
        }
        row.address = fact.address
        row.directory = fact.directory
        let isCreated = row.phase == .create
        if isCreated { row.phase = .run }
        try row.update(db)
        if isCreated, volume.phase == .creating { try finishCreation(db, volume) }
    }

    /// The record comes into being when every replica runs, in the same transaction
    /// that notes the last of them: an engine never finds a member that was not made yet.
    private func finishCreation(_ db: Database, _ volume: VolumeRow) throws {
        let stored = try Self.stored(db, volume)
        guard stored.lastingReplicas.count == volume.replicaCount,
            stored.replicas.allSatisfy({ $0.phase == .run }), let id = VolumeID(volume.id)
        else { return }
        var record =
            volume.cloneRecord
            ?? VolumeRecord(
                volume: id, name: volume.name, epoch: Epoch(1),
                nonce: UInt64.random(in: 1 ... .max), size: UInt64(volume.sizeBytes),
                inSync: stored.replicas.compactMap(\.member))
        record.take(volume.settings)
        try putRecord(db, record)
        var row = volume
        row.phase = .ready
        row.firstRecord = nil
        try row.update(db)
        try addEvent(
            db, "VolumeCreated", "volume/\(volume.name)", "id \(volume.id)", by: .controller)
    }

    private func finishDeletion(_ db: Database, _ volume: VolumeRow) throws {
        let left = try ReplicaRow.filter(Column("volumeID") == volume.id).fetchCount(db)
        guard left == 0, volume.phase == .deleting else { return }
        try volume.delete(db)
        try db.execute(
            sql: "INSERT OR REPLACE INTO deletedVolumes (name, id, timeMilliseconds) "
                + "VALUES (?, ?, ?)",
            arguments: [volume.name, volume.id, clock()])
        try addEvent(
            db, "VolumeDeleted", "volume/\(volume.name)", "id \(volume.id)", by: .controller)
    }

    private func apply(_ db: Database, _ fact: ReportedFacts.Engine, node: String) throws {
        if let row = try Self.settled(db, by: fact, on: node) {
            try row.delete(db)
            try addEvent(
                db, "AbandonedEngineEnded", "volume/\(row.volume)", "on node \(node)")
        }
        try noteDamage(db, fact, node: node)
        try noteScrub(db, fact, node: node)
        guard var row = try VolumeRow.fetchOne(db, key: fact.volumeID),
            Self.isNews(fact, to: row, node: node)
        else { return }
        let subject = "volume/\(row.name)"
        if fact.hasServed, row.servedGeneration < fact.clientGeneration {
            row.servedGeneration = fact.clientGeneration
            if !row.isMaintained {
                try addEvent(db, "VolumeAttached", subject, "on node \(node)")
            }
        }
        row.hadRemoteClient = row.hadRemoteClient || fact.hadRemoteClient
        if fact.isDetached, row.isDetaching {
            try finishAttachment(db, &row, "from node \(node)")
        } else {
            try row.update(db)
        }
    }
}
