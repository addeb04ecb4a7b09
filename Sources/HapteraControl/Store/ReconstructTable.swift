import Foundation
import GRDB
import HapteraCore

extension MetadataStore {
    /// Attachments that the lost store may have begun after the record was written: their numbers
    /// are not given out again, since node agents remember them.
    static let generationsSkipped: Int64 = 1000

    func deletedVolumeIDs() async throws -> Set<String> {
        try await database.read { db in
            try String.fetchSet(db, sql: "SELECT id FROM deletedVolumes")
        }
    }

    /// Makes the store know a volume as its replicas remember it. An engine that outlived the store
    /// stays the volume's.
    func reconstruct(
        _ record: VolumeRecord, _ found: [NodeScan.Found],
        engine: NodeScan.Engine?
    ) async throws {
        try await transaction { db in
            let id = record.volume.text
            var row =
                try VolumeRow.fetchOne(db, key: id)
                ?? VolumeRow(
                    id: record.volume, name: record.name, sizeBytes: Int64(record.size),
                    replicaCount: Self.replicaCount(record), created: self.clock())
            row.phase = .ready
            let generation = Int64(clamping: record.clientGeneration)
            if let engine {
                row.attachedNode = engine.node
                // One that was there for something nobody remembers has nothing left to do.
                row.isDetaching = engine.isMaintenance
                row.maintenance = engine.isMaintenance ? "the store was reconstructed" : nil
                row.clientGeneration = Int64(clamping: engine.generation)
                row.servedGeneration = min(row.clientGeneration, generation)
            } else if row.clientGeneration <= generation {
                row.clientGeneration = generation
                // Whoever was attached before is not any more.
                row.endAttachment()
            }
            row.nextNode = nil
            // An engine of an earlier number than the record's was started by the restored store,
            // and can do nothing with its record: the attachment begins anew.
            if row.clientGeneration < generation || row.attachedNode == nil {
                row.clientGeneration = max(
                    row.clientGeneration, generation + Self.generationsSkipped)
                row.servedGeneration = 0
            }
            try row.upsert(db)
            try self.putReplicas(db, record, found)
            try self.putRecord(db, record)
            try self.addEvent(
                db, "VolumeReconstructed", "volume/\(row.name)",
                "epoch \(record.epoch.rawValue), from "
                    + found.map { "\($0.inspection.replica) on \($0.node)" }
                    .joined(separator: ", "))
        }
    }

    /// As many copies as the record tells of.
    private static func replicaCount(_ record: VolumeRecord) -> Int {
        let members = Set(
            (record.inSync + record.out.map(\.member) + [record.joining].compactMap { $0 })
                .map(\.replica))
        return min(members.count, Geometry.replicasMax)
    }

    /// A directory that the record does not name (its replica was replaced, or is being deleted) is
    /// left alone.
    private func putReplicas(
        _ db: Database, _ record: VolumeRecord, _ found: [NodeScan.Found]
    ) throws {
        let volume = record.volume.text
        let named = Set(
            record.inSync + record.out.map(\.member) + [record.joining].compactMap { $0 })
        let discarded = Set(try Self.discarded(db, on: nil).map(\.id))
        let known = try ReplicaRow.filter(Column("volumeID") == volume).fetchAll(db)
        var ordinal = (known.map(\.ordinal).max() ?? -1) + 1
        for replica in found where !discarded.contains(replica.inspection.replica) {
            guard let member = replica.inspection.member, named.contains(member) else { continue }
            if var row = known.first(where: { $0.id == replica.inspection.replica }) {
                guard row.phase != .remove else { continue }
                row.node = replica.node
                row.incarnation = replica.inspection.incarnation
                row.phase = .run
                try row.update(db)
                continue
            }
            try ReplicaRow(
                id: replica.inspection.replica, volumeID: volume, ordinal: ordinal,
                node: replica.node, incarnation: replica.inspection.incarnation, phase: .run,
                address: "", directory: replica.directory
            ).insert(db)
            ordinal += 1
        }
    }
}
