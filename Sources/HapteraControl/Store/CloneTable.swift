import Foundation
import GRDB
import HapteraCore
import HapteraHost

// Volumes that begin as a snapshot of another one. Their replicas are made on the nodes of that
// one's, of the same layers; the volume's first record, which names them, is fixed when it is asked
// for, since the replicas are made with it.

/// A snapshot by name: what a new volume is to begin as, or did.
package struct CloneSource: Equatable, Sendable {
    package var volume: String
    package var snapshot: String

    package init(volume: String, snapshot: String) throws(ControlError) {
        guard Names.isValidLabel(volume) else {
            throw ControlError(
                .invalid, "'\(volume.prefix(100))' is no volume name: use \(Names.labelRule)")
        }
        guard VolumeRecord.isValidSnapshotName(snapshot) else {
            throw ControlError(
                .invalid,
                "'\(snapshot.prefix(100))' is no snapshot name: use "
                    + VolumeRecord.snapshotNameRule)
        }
        self.init(known: volume, snapshot)
    }

    init(known volume: String, _ snapshot: String) {
        self.volume = volume
        self.snapshot = snapshot
    }

    package var text: String { "\(volume)@\(snapshot)" }
}

/// The snapshot that a new volume begins as, in its volume as that is stored.
struct CloneOrigin {
    let source: CloneSource
    let stored: StoredVolume
    let record: VolumeRecord
    let snapshot: VolumeRecord.Snapshot

    init(_ source: CloneSource, of stored: StoredVolume) throws(ControlError) {
        let volume = source.volume
        guard stored.volume.phase == .ready, let record = stored.record else {
            let words = stored.volume.phase == .deleting ? "being deleted" : "still being created"
            throw ControlError(.precondition, "volume '\(volume)' is \(words)")
        }
        guard let snapshot = record.snapshot(named: source.snapshot) else {
            throw MetadataStore.noSnapshot(source.snapshot, of: volume)
        }
        self.source = source
        self.stored = stored
        self.record = record
        self.snapshot = snapshot
    }

    private var sizeBytes: UInt64 { record.size(of: snapshot.layer) }

    /// Members hold all of every snapshot that the record names; others may lack some of it.
    private var members: [ReplicaRow] {
        let members = stored.replicas.filter { $0.phase == .run && stored.isMember($0) }
        let lasting = members.filter { !$0.isTemporary }
        return lasting.isEmpty ? members : lasting
    }

    func plan(
        _ wanted: VolumeSpecification, candidates: [Placement.Candidate], _ seen: SeenNodes
    ) throws(ControlError) -> VolumePlan {
        guard wanted.sizeBytes == 0 || wanted.sizeBytes >= sizeBytes else {
            throw ControlError(
                .invalid,
                "a volume made from \(source.text) has at least its \(Self.exact(sizeBytes)), not "
                    + Self.exact(wanted.sizeBytes))
        }
        try Placement.requireReady(wanted.nodes, among: candidates)
        let ready = Set(candidates.map(\.name))
        let usable = members.filter { seen.running.contains($0.id) && ready.contains($0.node) }
        guard !usable.isEmpty else { throw nothingToShare(seen.running) }
        let allowed = usable.filter { wanted.nodes.isEmpty || wanted.nodes.contains($0.node) }
        let count =
            wanted.replicas > 0
            ? wanted.replicas
            : allowed.isEmpty
                ? min(wanted.nodes.count, Geometry.replicasMax)
                : min(allowed.count, stored.volume.replicaCount)
        let need = ReplicaNeed(
            volume: wanted.name, sizeBytes: max(wanted.sizeBytes, sizeBytes),
            dataBytes: seen.sourceBytes)
        let places = try Placement.choose(
            replicas: count, requested: wanted.nodes, candidates: candidates,
            sources: allowed.map { .init(replica: $0.id, node: $0.node) },
            need: need)
        var plan = VolumePlan(sizeBytes: need.sizeBytes, places: places, origin: self)
        if places.allSatisfy({ $0.source == nil }) {
            plan.temporary = try temporary(of: usable, candidates: candidates, need)
        }
        return plan
    }

    /// If one of their nodes is lost meanwhile, the other is there: what is written before the
    /// lasting ones are filled must not depend on a single node.
    static let temporaryMax = 2

    /// Where the layers are, so that the volume is there at once and the others can be filled.
    private func temporary(
        of usable: [ReplicaRow], candidates: [Placement.Candidate], _ need: ReplicaNeed
    ) throws(ControlError) -> [Placement.Place] {
        let sources = usable.map { Placement.Source(replica: $0.id, node: $0.node) }
        let nodes = Set(usable.map(\.node))
        let places = Placement.share(
            sources, candidates: candidates.filter { nodes.contains($0.name) }, need: need,
            max: Self.temporaryMax)
        guard !places.places.isEmpty else {
            throw ControlError(
                .precondition,
                "volume '\(need.volume)' needs a node that has \(source.text) until it is filled: "
                    + places.refusals)
        }
        return places.places
    }

    private func nothingToShare(_ running: Set<String>) -> ControlError {
        let places = members.map { running.contains($0.id) ? $0.node : "\($0.node) (not running)" }
        return ControlError(
            .precondition,
            "no replica could share the layers of \(source.text), which is in sync on "
                + (places.isEmpty ? "no node" : places.joined(separator: ", "))
                + ": use a node where it is in sync and runs; see 'storagectl volume show "
                + "\(source.volume)'")
    }

    /// Sizes that differ may look the same when they are rounded.
    private static func exact(_ bytes: UInt64) -> String {
        "\(VolumeSize.text(bytes)) (\(bytes) bytes)"
    }
}

extension VolumeRow {
    package var origin: CloneSource? {
        guard let originVolume, let originSnapshot else { return nil }
        return CloneSource(known: originVolume, originSnapshot)
    }

    /// The first record of a clone that is being made.
    var cloneRecord: VolumeRecord? {
        firstRecord.flatMap { VolumeRecord(decoding: [UInt8]($0)) }
    }

    /// Only replicas that are made of the snapshot's layers are in sync; the engine fills others.
    mutating func begin(as origin: CloneOrigin, _ replicas: [ReplicaRow]) {
        guard let id = VolumeID(id) else { return }
        originVolumeID = origin.stored.volume.id
        originVolume = origin.source.volume
        originSnapshot = origin.source.snapshot
        var record = VolumeRecord(
            cloning: origin.snapshot, of: origin.record, volume: id, name: name,
            size: UInt64(sizeBytes), nonce: UInt64.random(in: 1 ... .max),
            inSync: replicas.filter { $0.source != nil }.compactMap(\.member))
        record.take(settings)
        firstRecord = Data(record.encoded())
    }
}

extension MetadataStore {
    static func registerClones(_ migrator: inout DatabaseMigrator) {
        migrator.registerMigration("clones") { db in
            try db.execute(
                sql: """
                    ALTER TABLE volumes ADD COLUMN originVolumeID TEXT;
                    ALTER TABLE volumes ADD COLUMN originVolume TEXT;
                    ALTER TABLE volumes ADD COLUMN originSnapshot TEXT;
                    ALTER TABLE volumes ADD COLUMN firstRecord BLOB;
                    ALTER TABLE replicas ADD COLUMN source TEXT;
                    """)
        }
    }

    static func noSnapshot(_ snapshot: String, of volume: String) -> ControlError {
        ControlError(
            .notFound,
            "volume '\(volume)' has no snapshot '\(snapshot)'; see 'storagectl snapshot list "
                + "\(volume)'")
    }

    static func clonable(_ db: Database, _ source: CloneSource) throws -> StoredVolume {
        guard let row = try VolumeRow.filter(Column("name") == source.volume).fetchOne(db) else {
            throw noVolume(source.volume)
        }
        return try stored(db, row)
    }

    /// By its names: whoever asks again is answered though the source may be gone since.
    static func requireSameOrigin(
        _ volume: VolumeRow, _ wanted: VolumeSpecification
    ) throws(ControlError) {
        guard volume.origin != wanted.source else { return }
        func words(_ source: CloneSource?) -> String { source.map { "from \($0.text)" } ?? "empty" }
        throw ControlError(
            .conflict,
            "volume '\(volume.name)' exists and was made \(words(volume.origin)), not "
                + words(wanted.source))
    }

    /// Refuses what would take its layers from a clone that does not have all of them yet. One that
    /// has is no concern of its source's. `snapshot`: of that one only.
    static func requireNoCloneUnderWay(
        _ db: Database, of source: VolumeRow, snapshot: String? = nil
    ) throws {
        let clone = try String.fetchOne(
            db,
            sql: """
                SELECT clone.name FROM volumes clone JOIN replicas r ON r.volumeID = clone.id
                WHERE clone.originVolumeID = :source AND clone.phase = 'creating'
                    AND r.phase = 'create' AND r.source IS NOT NULL
                    AND clone.originSnapshot = ifnull(:snapshot, clone.originSnapshot)
                ORDER BY clone.name LIMIT 1
                """, arguments: ["source": source.id, "snapshot": snapshot])
        guard let clone else { return }
        throw ControlError(
            .precondition,
            "volume '\(clone)' is being made from it; wait until it is, or delete that one")
    }

    /// The same, for who is about to ask an engine to delete the snapshot. A clone asked for just
    /// then may find it gone: its creation fails, and nothing is lost.
    func requireNoCloneUnderWay(of source: VolumeRow, snapshot: String) async throws {
        try await database.read { db in
            try Self.requireNoCloneUnderWay(db, of: source, snapshot: snapshot)
        }
    }
}
