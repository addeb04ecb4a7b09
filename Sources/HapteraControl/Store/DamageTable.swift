import GRDB
import HapteraAPI
import HapteraCore

/// What became of a block whose copy was damaged, as engines call it.
package enum DamageOutcome: String, Codable, CaseIterable, Sendable {
    case repaired, lost, damaged

    var eventKind: String {
        switch self {
        case .repaired: "BlocksRepaired"
        case .lost: "BlocksLost"
        case .damaged: "BlocksDamaged"
        }
    }
}

/// What an engine process has counted since it started.
package struct DamageFact: Equatable, Sendable {
    package struct Finding: Equatable, Sendable {
        package var number: UInt64
        package var outcome: DamageOutcome
        package var offset: UInt64
        package var replicas: [String]
    }
    /// Decimal number of the process.
    package var instance: String
    package var count: UInt64
    /// Blocks.
    package var sums: [DamageOutcome: UInt64]
    /// The newest, oldest first.
    package var findings: [Finding]

    /// Nil: it says nothing of any.
    init?(_ report: Haptera_V1_EngineReport) {
        guard report.hasDamage, report.damage.count > 0, report.instance != 0 else { return nil }
        let damage = report.damage
        instance = "\(report.instance)"
        count = damage.count
        sums = [
            .repaired: damage.blocksRepaired, .lost: damage.blocksLost,
            .damaged: damage.blocksDamaged,
        ]
        findings = damage.findings.compactMap { finding in
            DamageOutcome(rawValue: finding.outcome).map {
                Finding(
                    number: finding.number, outcome: $0, offset: finding.offset,
                    replicas: finding.replicaIds)
            }
        }
    }
}

/// What of a volume's damage is told, and what is to be told with the next event.
///
/// How far an engine process was heard is noted in one transaction with what is new of it, so that
/// no restart of a controller or node agent loses or doubles any of it. The counters end with the
/// engine: what it counted in its last second, or while no controller was there, is in its log.
package struct DamageRow: Codable, Equatable, Sendable, FetchableRecord, PersistableRecord {
    package static let databaseTableName = "damage"

    /// Of one outcome, since its last event.
    struct Sum: Codable, Equatable, Sendable {
        struct Place: Codable, Equatable, Sendable {
            var offset: Int64
            var replicas: [String]
        }
        var blocks: Int64 = 0
        /// The first few.
        var places: [Place] = []
        /// 0: never.
        var toldMilliseconds: Int64 = 0
    }
    static let placesMax = 4

    package var volumeID: String
    /// The engine process heard last, and what it had counted then.
    var instance = ""
    var count: Int64 = 0
    var sums: [String: Int64] = [:]
    /// By outcome.
    var untold: [String: Sum] = [:]
    /// When blocks were lost last, and no later scrub has found everything good; 0: none are known.
    package var lostMilliseconds: Int64 = 0

    /// False: the fact says nothing new.
    mutating func take(_ fact: DamageFact, now: Int64) -> Bool {
        let isSame = fact.instance == instance
        let seen = isSame ? UInt64(count) : 0
        guard fact.count > seen else { return false }
        for outcome in DamageOutcome.allCases {
            let before = isSame ? sums[outcome.rawValue] ?? 0 : 0
            let after = Int64(clamping: fact.sums[outcome] ?? 0)
            sums[outcome.rawValue] = after
            guard after > before else { continue }
            var sum = untold[outcome.rawValue] ?? Sum()
            sum.blocks += after - before
            for finding in fact.findings
            where finding.number > seen && finding.outcome == outcome
                && sum.places.count < Self.placesMax
            {
                sum.places.append(
                    .init(offset: Int64(clamping: finding.offset), replicas: finding.replicas))
            }
            untold[outcome.rawValue] = sum
            if outcome == .lost { lostMilliseconds = now }
        }
        instance = fact.instance
        count = Int64(clamping: fact.count)
        return true
    }

    /// What an event is due for.
    func due(_ now: Int64) -> [DamageOutcome] {
        DamageOutcome.allCases.filter { outcome in
            guard let sum = untold[outcome.rawValue], sum.blocks > 0 else { return false }
            let passed = now - sum.toldMilliseconds
            // Below zero: the clock was set back.
            return passed < 0 || passed >= MetadataStore.damageEventsMilliseconds
        }
    }
}

extension MetadataStore {
    /// One event of a kind in so long, with the sum of what was found meanwhile.
    static let damageEventsMilliseconds: Int64 = 60_000

    static func registerDamage(_ migrator: inout DatabaseMigrator) {
        migrator.registerMigration("damage") { db in
            try db.execute(
                sql: """
                    CREATE TABLE damage (
                        volumeID TEXT NOT NULL PRIMARY KEY
                            REFERENCES volumes (id) ON DELETE CASCADE,
                        instance TEXT NOT NULL, count INTEGER NOT NULL, sums TEXT NOT NULL,
                        untold TEXT NOT NULL, lostMilliseconds INTEGER NOT NULL) STRICT;
                    """)
        }
    }

    /// The row with what is new; nil: nothing is.
    private func damageNews(
        _ db: Database, _ fact: ReportedFacts.Engine, node: String
    ) throws -> (DamageRow, VolumeRow)? {
        guard let damage = fact.damage,
            let volume = try VolumeRow.fetchOne(db, key: fact.volumeID),
            volume.attachedNode == node, volume.clientGeneration == fact.clientGeneration
        else { return nil }
        var row =
            try DamageRow.fetchOne(db, key: fact.volumeID) ?? DamageRow(volumeID: fact.volumeID)
        return row.take(damage, now: clock()) ? (row, volume) : nil
    }

    func isDamageNews(_ db: Database, _ fact: ReportedFacts.Engine, node: String) throws -> Bool {
        try damageNews(db, fact, node: node) != nil
    }

    func noteDamage(_ db: Database, _ fact: ReportedFacts.Engine, node: String) throws {
        guard let (news, volume) = try damageNews(db, fact, node: node) else { return }
        var row = news
        try tell(db, &row, of: volume)
        try row.upsert(db)
    }

    /// Tells what had to wait, because an event of its kind had just been.
    package func tellDamage() async throws {
        let now = clock()
        let isDue = try await database.read { db in
            try DamageRow.fetchAll(db).contains { !$0.due(now).isEmpty }
        }
        guard isDue else { return }
        try await transaction { db in
            for var row in try DamageRow.fetchAll(db) where !row.due(now).isEmpty {
                guard let volume = try VolumeRow.fetchOne(db, key: row.volumeID) else { continue }
                try self.tell(db, &row, of: volume)
                try row.update(db)
            }
        }
    }

    private func tell(_ db: Database, _ row: inout DamageRow, of volume: VolumeRow) throws {
        let now = clock()
        let replicas = try ReplicaRow.filter(Column("volumeID") == volume.id).fetchAll(db)
        let nodes = Dictionary(replicas.map { ($0.id, $0.node) }) { first, _ in first }
        for outcome in row.due(now) {
            guard let sum = row.untold[outcome.rawValue] else { continue }
            try addEvent(
                db, outcome.eventKind, "volume/\(volume.name)",
                DamageText.text(outcome, sum, volume: volume.name, nodes: nodes))
            row.untold[outcome.rawValue] = DamageRow.Sum(toldMilliseconds: now)
        }
    }

    /// A scrub that was begun after the last loss, and found all of it good, ends the condition;
    /// one that found a loss begins it.
    func noteDamage(_ db: Database, after scrub: ScrubRow) throws {
        guard let found = scrub.value else { return }
        let known = try DamageRow.fetchOne(db, key: scrub.volumeID)
        if found.lost > 0 {
            var row = known ?? DamageRow(volumeID: scrub.volumeID)
            row.lostMilliseconds = clock()
            try row.upsert(db)
        } else if found.skipped == 0, var row = known,
            row.lostMilliseconds <= scrub.requestedMilliseconds
        {
            row.lostMilliseconds = 0
            try row.update(db)
        }
    }
}

/// The words of an event about damage.
enum DamageText {
    /// `nodes`: of the volume's replicas.
    static func text(
        _ outcome: DamageOutcome, _ sum: DamageRow.Sum, volume: String, nodes: [String: String]
    ) -> String {
        let places = sum.places.map { place in
            let replicas = place.replicas.map { id in
                "replica \(id)" + (nodes[id].map { " on node \($0)" } ?? "")
            }
            return "offset \(place.offset)"
                + (replicas.isEmpty ? "" : " (\(replicas.joined(separator: ", ")))")
        }
        let words = "\(blocks(sum.blocks)) \(predicate(outcome, sum.blocks))"
        let list = places.isEmpty ? "" : ": first " + places.joined(separator: ", ")
        return words + list + advice(outcome, volume)
    }

    private static func blocks(_ count: Int64) -> String {
        count == 1 ? "1 block" : "\(count) blocks"
    }
    private static func predicate(_ outcome: DamageOutcome, _ count: Int64) -> String {
        let isOne = count == 1
        return switch outcome {
        case .repaired:
            (isOne ? "was" : "were") + " damaged and rewritten from another replica"
        case .lost: (isOne ? "has" : "have") + " no good copy on any replica in sync"
        case .damaged:
            (isOne ? "is" : "are") + " damaged on a replica and not known to be repaired"
        }
    }
    private static func advice(_ outcome: DamageOutcome, _ volume: String) -> String {
        switch outcome {
        case .repaired: ""
        case .lost:
            "; reads there fail: write them anew or restore them from a backup, then "
                + "'storagectl volume scrub \(volume)' tells whether any are left"
        case .damaged: "; 'storagectl volume scrub \(volume)' repairs what can be"
        }
    }
}
