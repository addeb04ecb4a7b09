import Foundation
import GRDB
import HapteraCore
import HapteraHost

/// Schedules, and what became of them. A time to act for is noted with all of its volumes before
/// anything is done, so that a crash neither forgets it nor makes two of it.
extension MetadataStore {
    package static let schedulesMax = 256
    /// There from the first start of a cluster; it may be paused or deleted as any other.
    package static let weeklyScrub = "weekly-scrub"

    static func registerSchedules(
        _ migrator: inout DatabaseMigrator, clock: @escaping @Sendable () -> Int64
    ) {
        migrator.registerMigration("schedules") { db in
            try db.execute(
                sql: """
                    CREATE TABLE schedules (
                        name TEXT PRIMARY KEY, cron TEXT NOT NULL, timeZone TEXT NOT NULL,
                        action TEXT NOT NULL, retain INTEGER NOT NULL, selector TEXT NOT NULL,
                        volumes TEXT NOT NULL, isPaused INTEGER NOT NULL,
                        createdMilliseconds INTEGER NOT NULL, lastMilliseconds INTEGER NOT NULL,
                        nextMilliseconds INTEGER NOT NULL) STRICT;
                    CREATE TABLE scheduleRuns (
                        schedule TEXT NOT NULL REFERENCES schedules (name) ON DELETE CASCADE,
                        volumeID TEXT NOT NULL REFERENCES volumes (id) ON DELETE CASCADE,
                        fireMilliseconds INTEGER NOT NULL, state TEXT NOT NULL,
                        stateMilliseconds INTEGER NOT NULL, message TEXT NOT NULL,
                        doneMilliseconds INTEGER NOT NULL,
                        PRIMARY KEY (schedule, volumeID)) STRICT, WITHOUT ROWID;
                    """)
            // Here, so that once it is deleted it stays so.
            try ScheduleRow(name: weeklyScrub, cron: "0 3 * * 0", action: .scrub, now: clock())
                .insert(db)
        }
    }

    package func schedules() async throws -> [StoredSchedule] {
        try await database.read { db in
            try ScheduleRow.order(Column("name")).fetchAll(db).map { try Self.stored(db, $0) }
        }
    }

    package func schedule(named name: String) async throws -> StoredSchedule {
        try await database.read { db in try Self.stored(db, try Self.scheduleRow(db, name)) }
    }

    static func stored(_ db: Database, _ row: ScheduleRow) throws -> StoredSchedule {
        let runs = try ScheduleRunRow.fetchAll(
            db,
            sql: "SELECT scheduleRuns.*, volumes.name AS volume FROM scheduleRuns "
                + "JOIN volumes ON volumes.id = volumeID WHERE schedule = ? ORDER BY volume",
            arguments: [row.name])
        return StoredSchedule(row: row, runs: runs)
    }

    static func scheduleRow(_ db: Database, _ name: String) throws -> ScheduleRow {
        guard let row = try ScheduleRow.fetchOne(db, key: name) else {
            throw ControlError(
                .notFound,
                "there is no schedule '\(name.prefix(100))'; see 'storagectl schedule list'")
        }
        return row
    }

    /// One of that name that says the same is returned as it is.
    package func createSchedule(_ wanted: ScheduleRow) async throws -> StoredSchedule {
        try await transaction { db in
            if let row = try ScheduleRow.fetchOne(db, key: wanted.name) {
                guard row.isSame(as: wanted) else {
                    let advice =
                        row.action == wanted.action
                        ? "to change it: storagectl schedule update \(row.name)"
                        : "delete it first (its snapshots stay): storagectl schedule delete "
                            + row.name
                    throw ControlError(
                        .conflict,
                        "schedule '\(row.name)' exists with other arguments: \(Self.words(row)); "
                            + advice)
                }
                return try Self.stored(db, row)
            }
            guard try ScheduleRow.fetchCount(db) < Self.schedulesMax else {
                throw ControlError(
                    .precondition,
                    "there are \(Self.schedulesMax) schedules, and cannot be more; see "
                        + "'storagectl schedule list'")
            }
            try Self.requireVolumes(db, wanted.volumeNames)
            try wanted.insert(db)
            try self.addEvent(
                db, "ScheduleCreated", "schedule/\(wanted.name)", Self.words(wanted))
            return StoredSchedule(row: wanted, runs: [])
        }
    }

    static func requireVolumes(_ db: Database, _ names: [String]) throws {
        for name in names where try VolumeRow.filter(Column("name") == name).fetchCount(db) == 0 {
            throw Self.noVolume(name)
        }
    }

    static func words(_ row: ScheduleRow) -> String {
        ([row.action == .snapshot ? "snapshots" : "scrubs"] + row.clauses).joined(separator: ", ")
    }

    package func deleteSchedule(_ name: String) async throws {
        try await transaction { db in
            try Self.scheduleRow(db, name).delete(db)
            try self.addEvent(db, "ScheduleDeleted", "schedule/\(name)", "its snapshots stay")
        }
    }

    /// A schedule that is resumed goes on with the next time, and gives up what it had not begun.
    package func pauseSchedule(_ name: String, isPaused: Bool) async throws -> StoredSchedule {
        try await transaction { db in
            var row = try Self.scheduleRow(db, name)
            if row.isPaused != isPaused {
                row.isPaused = isPaused
                if !isPaused {
                    try row.reckonNext(after: self.clock())
                    try db.execute(
                        sql: "DELETE FROM scheduleRuns WHERE schedule = ? AND state = ?",
                        arguments: [name, ScheduleRunRow.State.waiting.rawValue])
                }
                try row.update(db)
                try self.addEvent(
                    db, isPaused ? "SchedulePaused" : "ScheduleResumed", "schedule/\(name)", "")
            }
            return try Self.stored(db, row)
        }
    }

    // MARK: Runs

    /// Notes that a schedule acts for `fire` now, on these volumes. What is not done of the time
    /// before is given up. Does nothing if the schedule was changed meanwhile.
    func beginRun(_ schedule: ScheduleRow, fire: Int64, volumes: [String]) async throws {
        try await transaction { db in
            guard var row = try ScheduleRow.fetchOne(db, key: schedule.name), row == schedule
            else { return }
            row.lastMilliseconds = fire
            try row.reckonNext(after: max(fire, self.clock()))
            try row.update(db)
            let old = try Self.stored(db, row).runs
            for run in old where !volumes.contains(run.volumeID) {
                try db.execute(
                    sql: "DELETE FROM scheduleRuns WHERE schedule = ? AND volumeID = ?",
                    arguments: [run.schedule, run.volumeID])
            }
            for volume in volumes {
                let before = old.first { $0.volumeID == volume }
                // A reason that still holds is not told again.
                let isOpen = before?.state == .waiting || before?.state == .done
                let message = isOpen ? before?.message ?? "" : ""
                try db.execute(
                    sql: "INSERT OR REPLACE INTO scheduleRuns VALUES (?, ?, ?, ?, ?, ?, ?)",
                    arguments: [
                        row.name, volume, fire, ScheduleRunRow.State.waiting.rawValue,
                        self.clock(), message, before?.doneMilliseconds ?? 0,
                    ])
            }
            guard !volumes.isEmpty else { return }
            try self.addEvent(
                db, "ScheduleRunStarted", "schedule/\(row.name)",
                "for \(Self.time(fire)), volumes: \(volumes.count)")
        }
    }

    private static func time(_ milliseconds: Int64) -> String {
        Date(timeIntervalSince1970: Double(milliseconds / 1000)).formatted(.iso8601)
    }

    /// Notes what became of a volume. `event`: its kind, told if the message is news. Does nothing
    /// if the schedule acts for another time by now.
    func noteRun(
        _ run: ScheduleRunRow, _ state: ScheduleRunRow.State, message: String = "",
        event: String? = nil
    ) async throws {
        try await transaction { db in
            let key: StatementArguments = [run.schedule, run.volumeID, run.fireMilliseconds]
            let place = "WHERE schedule = ? AND volumeID = ? AND fireMilliseconds = ?"
            guard
                let known = try Row.fetchOne(
                    db, sql: "SELECT state, message FROM scheduleRuns " + place, arguments: key)
            else { return }
            let isChange = known["state"] != state.rawValue
            guard isChange || known["message"] != message else { return }
            try db.execute(
                sql: "UPDATE scheduleRuns SET state = ?, message = ? " + place,
                arguments: [state.rawValue, message] + key)
            if isChange {
                try db.execute(
                    sql: "UPDATE scheduleRuns SET stateMilliseconds = ? " + place,
                    arguments: [self.clock()] + key)
            }
            if state == .done {
                try db.execute(
                    sql: "UPDATE scheduleRuns SET doneMilliseconds = ? " + place,
                    arguments: [self.clock()] + key)
            }
            guard let event, known["message"] != message else { return }
            try self.addEvent(
                db, event, "schedule/\(run.schedule)", "volume '\(run.volume)': \(message)",
                by: .controller)
        }
    }

    /// Which schedule took which snapshots, by volume and name.
    func scheduledSnapshots() async throws -> [String: [String: String]] {
        try await database.read { db in
            let rows = try Row.fetchAll(
                db, sql: "SELECT * FROM snapshotLabels WHERE key = ? AND layer != ?",
                arguments: [ScheduleRow.label, Self.pendingLayer])
            return rows.reduce(into: [:]) { found, row in
                found[row["volumeID"] as String, default: [:]][row["snapshot"]] = row["value"]
            }
        }
    }
}
