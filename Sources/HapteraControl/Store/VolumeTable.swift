import Foundation
import GRDB
import HapteraAPI
import HapteraCore
import HapteraHost

/// A volume with everything the store knows of it, read in one transaction.
package struct StoredVolume: Equatable, Sendable {
    package var volume: VolumeRow
    package var replicas: [ReplicaRow]
    package var record: VolumeRecord?
    package var labels: [String: String] = [:]
    package var scrub: ScrubRow?
    package var damage: DamageRow?
}

/// Arguments of a create, checked.
package struct VolumeSpecification: Equatable, Sendable {
    package static let replicasDefault = 3
    package var name: String
    /// 0: with a source, as large as it.
    package var sizeBytes: UInt64
    /// 0: with a source, as many as can share its layers.
    package var replicas: Int
    package var nodes: [String]
    /// What was said of the settings; the rest is as usual.
    package var settings: Haptera_V1_VolumeSettings
    package var labels: [String: String]
    /// For tests: faults may be injected.
    package var isScratch: Bool
    /// What to begin as; nil: empty.
    package var source: CloneSource?

    package init(
        name: String, sizeBytes: UInt64, replicas: UInt32, nodes: [String],
        settings: Haptera_V1_VolumeSettings = .init(), labels: [String: String] = [:],
        isScratch: Bool = false, source: CloneSource? = nil
    ) throws(ControlError) {
        guard Names.isValidLabel(name) else {
            throw ControlError(.invalid, "'\(name)' is no volume name: use \(Names.labelRule)")
        }
        guard VolumeSize.isValid(sizeBytes) || (source != nil && sizeBytes == 0) else {
            throw ControlError(.invalid, "a volume's size is \(VolumeSize.rule), not \(sizeBytes)")
        }
        let count = replicas == 0 && source == nil ? Self.replicasDefault : Int(replicas)
        guard count <= Geometry.replicasMax else {
            throw ControlError(
                .invalid, "a volume has 1 to \(Geometry.replicasMax) replicas, not \(count)")
        }
        for node in nodes where !Names.isValidLabel(node) {
            throw ControlError(.invalid, "'\(node)' is no node name: use \(Names.labelRule)")
        }
        try VolumeSettings().changed(by: settings)
            .check(replicas: count == 0 ? Geometry.replicasMax : count)
        if let objection = Labels.objection(to: labels) { throw ControlError(.invalid, objection) }
        self.labels = labels
        self.isScratch = isScratch
        self.name = name
        self.settings = settings
        self.sizeBytes = sizeBytes
        self.replicas = count
        self.nodes = nodes
        self.source = source
    }

    package init(_ request: Haptera_V1_CreateVolumeRequest) throws(ControlError) {
        let (volume, snapshot) = (request.sourceVolume, request.sourceSnapshot)
        guard volume.isEmpty == snapshot.isEmpty else {
            throw ControlError(
                .invalid, "a source is a volume and a snapshot of it: name both or neither")
        }
        try self.init(
            name: request.name, sizeBytes: request.sizeBytes, replicas: request.replicas,
            nodes: request.nodes, settings: request.settings, labels: request.labels,
            isScratch: request.scratch,
            source: volume.isEmpty ? nil : CloneSource(volume: volume, snapshot: snapshot))
    }
}

/// What nodes have said, as far as it matters to a new volume.
struct SeenNodes {
    /// Nodes.
    var ready: [String]
    /// Replicas, on nodes that are ready.
    var running: Set<String>
    var spaces: NodeSpaces
    /// What a copy of the snapshot takes that it begins as.
    var sourceBytes: UInt64
}

/// What a new volume is made of.
struct VolumePlan {
    var sizeBytes: UInt64
    var places: [Placement.Place]
    /// Nil: empty.
    var origin: CloneOrigin?
    /// Beside `places`, if none of these shares what it begins as.
    var temporary: [Placement.Place] = []

    var isToFill: Bool { origin != nil && places.contains { $0.source == nil } }
    var temporaryWords: String {
        temporary.isEmpty
            ? ""
            : ", shared on \(temporary.map(\.node).joined(separator: ", ")) until these are filled"
    }
}

extension MetadataStore {
    /// All volumes, or the one of that name, by name.
    package func volumes(named name: String? = nil) async throws -> [StoredVolume] {
        try await database.read { db in
            let rows =
                if let name {
                    try VolumeRow.filter(Column("name") == name).fetchAll(db)
                } else {
                    try VolumeRow.order(Column("name")).fetchAll(db)
                }
            return try rows.map { try Self.stored(db, $0) }
        }
    }

    package func volume(named name: String) async throws -> StoredVolume {
        guard let found = try await volumes(named: name).first else { throw Self.noVolume(name) }
        return found
    }

    static func stored(_ db: Database, _ row: VolumeRow) throws -> StoredVolume {
        let replicas = try ReplicaRow.filter(Column("volumeID") == row.id).order(Column("ordinal"))
            .fetchAll(db)
        let record = try storedRecord(db, row.id).flatMap { VolumeRecord(decoding: $0.bytes) }
        return StoredVolume(
            volume: row, replicas: replicas, record: record, labels: try labels(db, of: row.id),
            scrub: try ScrubRow.fetchOne(db, key: row.id),
            damage: try DamageRow.fetchOne(db, key: row.id))
    }

    static func noVolume(_ name: String) -> ControlError {
        ControlError(.notFound, "there is no volume '\(name)'; see 'storagectl volume list'")
    }

    /// Adds the volume and its replicas, to be made by their nodes. A volume of that name with the
    /// same arguments is returned as it is. `running`: replicas, on nodes that are ready.
    /// `sourceBytes`: what a copy of the source takes.
    package func createVolume(
        _ wanted: VolumeSpecification, candidates ready: [String], running: Set<String> = [],
        spaces: NodeSpaces = [:], sourceBytes: UInt64 = 0
    ) async throws -> StoredVolume {
        let seen = SeenNodes(
            ready: ready, running: running, spaces: spaces, sourceBytes: sourceBytes)
        return try await createVolume(wanted, seen)
    }

    private func createVolume(
        _ wanted: VolumeSpecification, _ seen: SeenNodes
    ) async throws -> StoredVolume {
        try await transaction { db in
            if let row = try VolumeRow.filter(Column("name") == wanted.name).fetchOne(db) {
                let existing = try Self.stored(db, row)
                try Self.requireSame(existing, wanted)
                return existing
            }
            let plan = try Self.plan(db, wanted, seen)
            var row = VolumeRow(
                id: .random(), name: wanted.name, sizeBytes: Int64(plan.sizeBytes),
                replicaCount: plan.places.count, created: self.clock())
            row.settings = row.settings.changed(by: wanted.settings)
            try row.settings.check(replicas: row.replicaCount)
            row.isScratch = wanted.isScratch
            row.isFilling = plan.isToFill
            let lasting = plan.places.enumerated().map { ordinal, place in
                ReplicaRow(
                    of: row, ordinal: ordinal, node: place.node, source: place.source,
                    expectedBytes: place.source == nil ? seen.sourceBytes : 0)
            }
            let temporary = plan.temporary.enumerated().map { ordinal, place in
                ReplicaRow(
                    of: row, ordinal: lasting.count + ordinal, node: place.node,
                    source: place.source, isTemporary: true)
            }
            let replicas = lasting + temporary
            if let origin = plan.origin { row.begin(as: origin, replicas) }
            try row.insert(db)
            try self.putLabels(db, wanted.labels, of: row.id)
            for replica in replicas { try replica.insert(db) }
            try db.execute(
                sql: "DELETE FROM deletedVolumes WHERE name = ?", arguments: [wanted.name])
            let origin = row.origin.map { ", from \($0.text)" } ?? ""
            try self.addEvent(
                db, "VolumeRequested", "volume/\(wanted.name)",
                "\(VolumeSize.text(plan.sizeBytes))\(origin), replicas on "
                    + lasting.map(\.node).joined(separator: ", ") + plan.temporaryWords)
            return try Self.stored(db, row)
        }
    }

    private static func plan(
        _ db: Database, _ wanted: VolumeSpecification, _ seen: SeenNodes
    ) throws -> VolumePlan {
        let rooms = try rooms(db, seen.spaces)
        let candidates = seen.ready.map { name in
            rooms[name].map { Placement.Candidate($0) }
                ?? Placement.Candidate(name: name, replicas: 0)
        }
        if let source = wanted.source {
            let origin = try CloneOrigin(source, of: clonable(db, source))
            return try origin.plan(wanted, candidates: candidates, seen)
        }
        let places = try Placement.choose(
            replicas: wanted.replicas, requested: wanted.nodes, candidates: candidates,
            need: ReplicaNeed(volume: wanted.name, sizeBytes: wanted.sizeBytes))
        return VolumePlan(sizeBytes: wanted.sizeBytes, places: places)
    }

    private static func requireSame(
        _ existing: StoredVolume, _ wanted: VolumeSpecification
    ) throws(ControlError) {
        let volume = existing.volume
        if volume.phase == .deleting {
            throw ControlError(
                .precondition, "volume '\(volume.name)' is being deleted; try again when it is gone"
            )
        }
        try requireSameOrigin(volume, wanted)
        let nodes = existing.lastingReplicas.map(\.node)
        let size = wanted.sizeBytes == 0 ? UInt64(volume.sizeBytes) : wanted.sizeBytes
        let count = wanted.replicas == 0 ? volume.replicaCount : wanted.replicas
        let isPlacedAsAsked =
            wanted.nodes.count == count
            ? nodes.sorted() == wanted.nodes.sorted()
            : wanted.nodes.isEmpty || Set(nodes).isSubset(of: wanted.nodes)
        guard volume.sizeBytes == Int64(size), volume.replicaCount == count, isPlacedAsAsked,
            volume.settings.changed(by: wanted.settings) == volume.settings,
            existing.labels.merging(wanted.labels, uniquingKeysWith: { $1 }) == existing.labels
        else {
            let size = VolumeSize.text(UInt64(volume.sizeBytes))
            throw ControlError(
                .conflict,
                "volume '\(volume.name)' exists with other arguments: \(size), "
                    + "\(volume.replicaCount) replicas on \(nodes.joined(separator: ", "))")
        }
    }

    /// Wants an engine on `node`; without one, on a node that holds an in-sync replica. At once, or
    /// as soon as a maintenance has ended.
    package func attachVolume(
        _ name: String, node: String?, ready: Set<String>
    ) async throws -> StoredVolume {
        try await changeVolume(name) { db, stored in
            var row = stored.volume
            guard row.phase == .ready else {
                throw ControlError(
                    .precondition, "volume '\(name)' is still being created; try again later")
            }
            if let attached = row.clientNode {
                if row.isDetaching, !row.isMaintained {
                    throw ControlError(
                        .precondition,
                        "volume '\(name)' is being detached from \(attached); wait "
                            + "until it is, then attach it")
                }
                guard node == nil || node == attached else {
                    throw ControlError(
                        .precondition,
                        "volume '\(name)' is attached to \(attached); detach it "
                            + "first: storagectl volume detach \(name)")
                }
                return
            }
            let target = try Self.attachTarget(stored, node: node, ready: ready)
            if let words = row.maintenance {
                row.nextNode = target
                try row.update(db)
                try self.addEvent(
                    db, "VolumeAttachRequested", "volume/\(name)",
                    "on node \(target), as soon as the other engine has left: \(words)")
                return
            }
            try self.beginAttachment(db, &row, on: target)
            row.unchangedSince = 0
            try row.update(db)
            try self.addEvent(
                db, "VolumeAttachRequested", "volume/\(name)",
                "on node \(target), client generation \(row.clientGeneration)")
        }
    }

    private static func attachTarget(
        _ stored: StoredVolume, node: String?, ready: Set<String>
    ) throws(ControlError) -> String {
        if let node {
            guard ready.contains(node) else {
                throw ControlError(
                    .precondition,
                    "node \(node) is not known or not ready; see 'storagectl node "
                        + "list'")
            }
            return node
        }
        let inSync = Set(stored.record?.inSync.map(\.replica.text) ?? [])
        let holders = stored.replicas.filter { inSync.contains($0.id) }.map(\.node)
        guard let best = (holders + ready.sorted()).first(where: ready.contains) else {
            throw ControlError(.unavailable, "no node is ready; see 'storagectl node list'")
        }
        return best
    }

    /// The engine process `instance` may go on from rebooted replicas.
    package func acceptLoss(
        _ name: String, instance: UInt64, question: String
    ) async throws -> StoredVolume {
        try await changeVolume(name) { db, stored in
            var row = stored.volume
            guard row.acceptLossInstance != "\(instance)" else { return }
            row.acceptLossInstance = "\(instance)"
            row.unchangedSince = 0
            try row.update(db)
            try self.addEvent(db, "LossAccepted", "volume/\(name)", question)
        }
    }

    package func detachVolume(_ name: String) async throws -> StoredVolume {
        try await changeVolume(name) { db, stored in
            var row = stored.volume
            guard row.clientNode != nil, !row.isDetaching || row.isMaintained else { return }
            // Of a maintenance only the attachment that was to follow it is given up.
            if row.isMaintained { row.nextNode = nil } else { row.isDetaching = true }
            try row.update(db)
            try self.addEvent(db, "VolumeDetachRequested", "volume/\(name)", "")
        }
    }

    /// Begins to delete. True if the volume is gone already (it was deleted before).
    package func deleteVolume(_ name: String) async throws -> Bool {
        try await transaction { db in
            guard var row = try VolumeRow.filter(Column("name") == name).fetchOne(db) else {
                let wasDeleted = try Int.fetchOne(
                    db, sql: "SELECT COUNT(*) FROM deletedVolumes WHERE name = ?",
                    arguments: [name])
                guard wasDeleted == 1 else { throw Self.noVolume(name) }
                return true
            }
            if row.phase == .deleting { return false }
            if let node = row.clientNode {
                throw ControlError(
                    .precondition,
                    "volume '\(name)' is attached to \(node); detach it first: "
                        + "storagectl volume detach \(name)")
            }
            if let words = row.maintenance {
                throw ControlError(
                    .unavailable, "volume '\(name)' still has an engine: \(words); try again")
            }
            try Self.requireNoCloneUnderWay(db, of: row)
            row.phase = .deleting
            try row.update(db)
            let snapshots = try Self.stored(db, row).record?.snapshots.count ?? 0
            try db.execute(sql: "DELETE FROM records WHERE volumeID = ?", arguments: [row.id])
            try self.forgetHistory(db, row.id)
            try db.execute(
                sql: "UPDATE replicas SET phase = 'remove', replaces = NULL WHERE volumeID = ?",
                arguments: [row.id])
            try self.addEvent(
                db, "VolumeDeleteRequested", "volume/\(name)",
                snapshots == 0 ? "" : "with its \(snapshots) snapshots")
            return false
        }
    }

    func changeVolume(
        _ name: String,
        _ change: @escaping @Sendable (Database, StoredVolume) throws -> Void
    ) async throws -> StoredVolume {
        try await transaction { db in
            guard let row = try VolumeRow.filter(Column("name") == name).fetchOne(db) else {
                throw Self.noVolume(name)
            }
            guard row.phase != .deleting else {
                throw ControlError(.precondition, "volume '\(name)' is being deleted")
            }
            try change(db, try Self.stored(db, row))
            guard let now = try VolumeRow.fetchOne(db, key: row.id) else {
                throw Self.noVolume(name)
            }
            return try Self.stored(db, now)
        }
    }
}
