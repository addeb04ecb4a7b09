import GRDB
import HapteraAPI
import HapteraHost

/// Changes of a schedule that is there. Whatever changes, nothing that is past becomes due by it.
extension ScheduleRow {
    /// As it is after a request, which names only what changes. Refused whole or not at all.
    func changed(
        by request: Haptera_V1_UpdateScheduleRequest, now: Int64
    ) throws(ControlError) -> ScheduleRow {
        try requireOwnAction(request)
        let choices = [request.all, request.hasSelector, !request.volumes.isEmpty]
        let choiceCount = choices.count { $0 }
        guard choiceCount <= 1 else {
            throw ControlError(
                .invalid, "a schedule is for all volumes, for a selector or for those named: one")
        }
        guard !request.hasSelector || !request.selector.isEmpty else {
            throw ControlError(.invalid, "the selector is empty: say all volumes if that is meant")
        }
        guard
            choiceCount == 1 || request.hasCron || request.hasTimeZone || request.hasRetain
                || request.hasPaused
        else { throw ControlError(.invalid, "say what to change of schedule '\(name)'") }

        var wanted = message.specification
        if request.hasCron { wanted.cron = request.cron }
        if request.hasTimeZone { wanted.timeZone = request.timeZone }
        if request.hasRetain { wanted.retain = request.retain }
        if choiceCount == 1 {
            wanted.all = request.all
            wanted.selector = request.selector
            wanted.volumes = request.volumes
        }
        var row = try ScheduleRow(wanted, now: now)
        row.isPaused = request.hasPaused ? request.paused : isPaused
        row.createdMilliseconds = createdMilliseconds
        row.lastMilliseconds = lastMilliseconds
        // Reckoned from now, unless it is due as before: also if that has passed meanwhile.
        if !row.hasOtherTimes(than: self) { row.nextMilliseconds = nextMilliseconds }
        return row
    }

    private func requireOwnAction(
        _ request: Haptera_V1_UpdateScheduleRequest
    ) throws(ControlError) {
        let wanted: ScheduleKind?
        switch request.action {
        case .unspecified: wanted = nil
        case .snapshot: wanted = .snapshot
        case .scrub: wanted = .scrub
        case .UNRECOGNIZED:
            throw ControlError(.invalid, "a schedule takes snapshots or scrubs, nothing else")
        }
        guard wanted == nil || wanted == action else {
            throw ControlError(
                .precondition,
                "schedule '\(name)' \(action == .snapshot ? "takes snapshots" : "scrubs"), and "
                    + "that cannot be changed: create another one, and delete this one if it is "
                    + "to end")
        }
        guard action == .snapshot || request.retain == 0 else {
            throw ControlError(
                .precondition, "schedule '\(name)' scrubs: it has no snapshots to keep")
        }
    }

    /// Whether its times are to be reckoned anew after it was `before`.
    fileprivate func hasOtherTimes(than before: ScheduleRow) -> Bool {
        cron != before.cron || timeZone != before.timeZone || (before.isPaused && !isPaused)
    }

    fileprivate func hasOtherVolumes(than before: ScheduleRow) -> Bool {
        selector != before.selector || volumes != before.volumes
    }
}

extension MetadataStore {
    package func updateSchedule(
        _ request: Haptera_V1_UpdateScheduleRequest
    ) async throws -> StoredSchedule {
        try await transaction { db in
            let before = try Self.scheduleRow(db, request.name)
            let row = try before.changed(by: request, now: self.clock())
            guard row != before else { return try Self.stored(db, row) }
            // One that is gone since may stay named.
            if row.hasOtherVolumes(than: before) {
                try Self.requireVolumes(db, row.volumeNames)
            }
            try row.update(db)
            try Self.giveUpRuns(db, of: row, since: before)
            let changes = zip(row.clauses, before.clauses).filter { $0 != $1 }
                .map { "\($0) (was \($1))" }
            if !changes.isEmpty {
                try self.addEvent(
                    db, "ScheduleUpdated", "schedule/\(row.name)",
                    changes.joined(separator: ", "))
            }
            if row.isPaused != before.isPaused {
                try self.addEvent(
                    db, row.isPaused ? "SchedulePaused" : "ScheduleResumed",
                    "schedule/\(row.name)", "")
            }
            return try Self.stored(db, row)
        }
    }

    /// What is not begun is for times that do not count any more, or of volumes that are not meant
    /// any more. What is begun goes on to its end.
    private static func giveUpRuns(
        _ db: Database, of row: ScheduleRow, since before: ScheduleRow
    ) throws {
        for run in try stored(db, row).runs where run.state == .waiting {
            let isMeant =
                try !row.hasOtherVolumes(than: before)
                || row.selects(run.volume, labels(db, of: run.volumeID))
            if isMeant, !row.hasOtherTimes(than: before) { continue }
            try db.execute(
                sql: "DELETE FROM scheduleRuns WHERE schedule = ? AND volumeID = ?",
                arguments: [run.schedule, run.volumeID])
        }
    }
}
