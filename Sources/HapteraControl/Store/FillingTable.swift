import Foundation
import GRDB
import HapteraCore

// A volume that begins as a snapshot may have replicas where nobody has that snapshot. They are
// made empty, and filled by an engine; if all of them are, temporary replicas share the layers on
// nodes that have them, and are the volume's first members. From then on:
//
// 1. the row says that it is being filled     -> whoever starts anew goes on
// 2. as many lasting replicas are in sync as it is meant to have
// 3. the row says that it is filled, and that the temporary ones leave, in one transaction
// 4. the engine has taken them out of the in-sync set
// 5. they are discarded, and their nodes remove them
//
// If lasting ones are lost between 3 and 4, the temporary ones stay: it is being filled again.

extension StoredVolume {
    /// Those it is meant to have, and what is to take their place.
    package var lastingReplicas: [ReplicaRow] { replicas.filter { !$0.isTemporary } }
    /// Lasting ones that the record counts in.
    package var filledCount: Int {
        replicas.count { !$0.isTemporary && $0.phase == .run && isMember($0) }
    }
    /// Until the temporary ones are gone.
    package var isBeingFilled: Bool { volume.isFilling || replicas.contains(where: \.isTemporary) }
    /// A temporary one was told to leave, and could be needed.
    package var hasLeftTooEarly: Bool {
        !volume.isFilling && filledCount < volume.replicaCount
            && replicas.contains { $0.isTemporary && $0.phase == .leave && isMember($0) }
    }
    /// A temporary one that has left the in-sync set is not filled again.
    package func isForEngine(_ row: ReplicaRow) -> Bool {
        row.phase == .run && (!row.isTemporary || isMember(row) || isJoining(row))
    }
}

extension MetadataStore {
    static func registerFilling(_ migrator: inout DatabaseMigrator) {
        migrator.registerMigration("filling") { db in
            try db.execute(
                sql: """
                    ALTER TABLE volumes ADD COLUMN isFilling INTEGER NOT NULL DEFAULT 0;
                    ALTER TABLE replicas ADD COLUMN isTemporary INTEGER NOT NULL DEFAULT 0;
                    """)
        }
    }

    static func isTemporary(_ row: ReplicaRow, of volume: VolumeRow) -> ControlError {
        ControlError(
            .precondition,
            "replica \(row.id) of volume '\(volume.name)' is temporary: it goes by itself when "
                + "\(volume.replicaCount) others are in sync; see 'storagectl volume show "
                + "\(volume.name)'")
    }

    package func finishFilling(_ name: String) async throws {
        _ = try await changeVolume(name) { db, stored in
            var volume = stored.volume
            guard volume.phase == .ready, volume.isFilling,
                stored.filledCount >= volume.replicaCount
            else { return }
            let temporary = stored.replicas.filter { $0.isTemporary && $0.phase == .run }
            // A clone of the clone may be about to share their layers.
            let sharing = try String.fetchSet(
                db, sql: "SELECT source FROM replicas WHERE phase = 'create' AND source NOT NULL")
            guard !temporary.contains(where: { sharing.contains($0.id) }) else { return }
            volume.isFilling = false
            try volume.update(db)
            let places = temporary.map(\.node).joined(separator: ", ")
            try self.addEvent(
                db, "VolumeFilled", "volume/\(name)",
                "\(stored.filledCount) replicas are in sync"
                    + (places.isEmpty ? "" : "; what was shared on \(places) meanwhile goes"))
            for row in temporary { try self.take(db, row, outOf: stored) }
        }
    }

    package func resumeFilling(_ name: String) async throws {
        _ = try await changeVolume(name) { db, stored in
            guard stored.hasLeftTooEarly else { return }
            var volume = stored.volume
            volume.isFilling = true
            try volume.update(db)
            for var row in stored.replicas where row.isTemporary && row.phase == .leave {
                row.phase = .run
                try row.update(db)
            }
            try self.addEvent(
                db, "VolumeFillingResumed", "volume/\(name)",
                "only \(stored.filledCount) of \(volume.replicaCount) replicas are in sync; what "
                    + "was shared meanwhile stays until they are")
        }
    }
}
