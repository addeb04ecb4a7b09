import GRDB
import HapteraCore

/// The last scrub of a volume. It outlives engines, attachments and controllers: whichever engine
/// the volume has next goes on with it.
package struct ScrubRow: Codable, Equatable, Sendable, FetchableRecord, PersistableRecord {
    package static let databaseTableName = "scrubs"
    package var volumeID: String
    /// As far as it was when it was last noted (`ScrubProgress.text`).
    package var progress: String
    package var isFinished: Bool
    package var requestedMilliseconds: Int64
    package var notedMilliseconds: Int64

    var value: ScrubProgress? { ScrubProgress(text: progress) }
}

/// What an engine's report says of a scrub.
package struct ScrubFact: Equatable, Sendable {
    package var progress: ScrubProgress
    package var isFinished: Bool
}

extension MetadataStore {
    /// How often progress is noted while a scrub goes on. What is not noted is done again, if the
    /// node of the engine is lost.
    static let scrubNotesMilliseconds: Int64 = 30_000

    static func registerScrubs(_ migrator: inout DatabaseMigrator) {
        migrator.registerMigration("scrubs") { db in
            try db.execute(
                sql: """
                    CREATE TABLE scrubs (
                        volumeID TEXT NOT NULL PRIMARY KEY
                            REFERENCES volumes (id) ON DELETE CASCADE,
                        progress TEXT NOT NULL, isFinished INTEGER NOT NULL,
                        requestedMilliseconds INTEGER NOT NULL,
                        notedMilliseconds INTEGER NOT NULL) STRICT;
                    """)
        }
    }

    /// A scrub is wanted. One that is under way goes on. `known`: of one that the volume's engine
    /// is about, and that is not noted here.
    package func requestScrub(
        _ name: String, known: ScrubProgress? = nil
    ) async throws -> StoredVolume {
        try await changeVolume(name) { db, stored in
            guard stored.scrub?.isFinished != false else { return }
            var progress = known ?? ScrubProgress()
            if known == nil { progress.id = .random(in: 1 ... .max) }
            let now = self.clock()
            try ScrubRow(
                volumeID: stored.volume.id, progress: progress.text, isFinished: false,
                requestedMilliseconds: now, notedMilliseconds: now
            ).upsert(db)
            try self.addEvent(
                db, "ScrubRequested", "volume/\(name)", "all replicas, with snapshots")
        }
    }

    /// The scrub as it is to be noted now; nil: nothing is.
    private func scrubNews(
        _ db: Database, _ fact: ReportedFacts.Engine, node: String
    ) throws -> (ScrubRow, VolumeRow)? {
        guard let scrub = fact.scrub,
            let volume = try VolumeRow.fetchOne(db, key: fact.volumeID),
            volume.attachedNode == node, volume.clientGeneration == fact.clientGeneration,
            var row = try ScrubRow.fetchOne(db, key: fact.volumeID), !row.isFinished,
            let noted = row.value, noted.id == scrub.progress.id,
            scrub.isFinished || scrub.progress.region >= noted.region
        else { return nil }
        let now = clock()
        let isDue =
            fact.isDetached || now - row.notedMilliseconds >= Self.scrubNotesMilliseconds
        guard scrub.isFinished || isDue && scrub.progress != noted else { return nil }
        row.progress = scrub.progress.text
        row.isFinished = scrub.isFinished
        row.notedMilliseconds = now
        return (row, volume)
    }

    func isScrubNews(_ db: Database, _ fact: ReportedFacts.Engine, node: String) throws -> Bool {
        try scrubNews(db, fact, node: node) != nil
    }

    /// Before an attachment is ended by the same fact: the next engine goes on from here.
    func noteScrub(_ db: Database, _ fact: ReportedFacts.Engine, node: String) throws {
        guard let (row, volume) = try scrubNews(db, fact, node: node), let found = row.value else {
            return
        }
        try row.update(db)
        guard row.isFinished else { return }
        try noteDamage(db, after: row)
        try addEvent(
            db, "ScrubFinished", "volume/\(volume.name)",
            "\(found.checked) blocks checked, \(found.bad) bad, \(found.repaired) repaired, "
                + "\(found.lost) lost, \(found.skipped) regions skipped")
    }
}
