import HapteraCore
import HapteraHost
import Testing

@testable import HapteraControl

/// Decisions only: what is stored and observed in, what is to be done out.
@Suite struct SchedulePlanTests {
    private static let minute: Int64 = 60_000
    private static let hour = 60 * minute
    /// 2026-11-29 07:05 UTC, a Sunday.
    private static let start: Int64 = 1_795_935_900_000
    private static let eight = start + 55 * minute

    private func hourly(
        _ name: String = "hourly", retain: Int = 2, selector: String = "",
        volumes: [String] = []
    ) throws -> ScheduleRow {
        try ScheduleRow(
            name: name, cron: "@hourly", action: .snapshot, retain: retain, selector: selector,
            volumes: volumes, now: Self.start)
    }

    private func run(
        _ volume: String, _ state: ScheduleRunRow.State = .waiting, of schedule: String = "hourly",
        fire: Int64 = eight, since: Int64 = eight, message: String = "", done: Int64 = 0
    ) -> ScheduleRunRow {
        ScheduleRunRow(
            schedule: schedule, volumeID: volume, volume: volume, fireMilliseconds: fire,
            state: state, stateMilliseconds: since, message: message, doneMilliseconds: done)
    }

    private func volume(_ name: String, _ change: (inout SchedulePlan.Volume) -> Void = { _ in })
        -> SchedulePlan.Volume
    {
        var volume = SchedulePlan.Volume(id: name, name: name)
        change(&volume)
        return volume
    }

    private func steps(
        _ schedule: ScheduleRow, _ runs: [ScheduleRunRow] = [], _ volumes: [SchedulePlan.Volume],
        attempts: ScheduleAttempts = .init(), now: Int64 = eight + 1000
    ) -> [SchedulePlan.Step] {
        SchedulePlan(
            [StoredSchedule(row: schedule, runs: runs)], volumes: volumes, attempts: attempts,
            now: now
        ).steps
    }

    /// The schedule after it began to act for eight o'clock.
    private func begun(_ schedule: ScheduleRow) -> ScheduleRow {
        var schedule = schedule
        schedule.lastMilliseconds = Self.eight
        schedule.nextMilliseconds = Self.eight + Self.hour
        return schedule
    }

    // MARK: When

    @Test func nothingBeforeItsTime() throws {
        let schedule = try hourly()
        #expect(schedule.nextMilliseconds == Self.eight)
        #expect(steps(schedule, [], [volume("v")], now: Self.eight - 1).isEmpty)
        #expect(
            steps(schedule, [], [volume("v")], now: Self.eight)
                == [.begin(schedule, fire: Self.eight, volumes: ["v"])])
    }

    /// A controller that was away for days does not take a snapshot for each hour.
    @Test func missedTimesCountAsOne() throws {
        let schedule = try hourly()
        let now = Self.eight + 49 * Self.hour + 17 * Self.minute
        #expect(
            steps(schedule, [], [volume("v")], now: now)
                == [.begin(schedule, fire: Self.eight + 49 * Self.hour, volumes: ["v"])])
    }

    @Test func aPausedScheduleBeginsNothing() throws {
        var schedule = try hourly()
        schedule.isPaused = true
        #expect(steps(schedule, [run("v")], [volume("v")]).isEmpty)
        #expect(SchedulePlan.isIdle([.init(row: schedule, runs: [run("v")])], now: Self.eight))
    }

    @Test func volumesAreChosenWhenTheTimeComes() throws {
        let volumes = [
            volume("a") { $0.labels = ["app": "db"] },
            volume("b") { $0.labels = ["app": "db", "tier": "test"] }, volume("c"),
        ]
        func chosen(_ schedule: ScheduleRow) -> [String] {
            guard case .begin(_, _, let volumes) = steps(schedule, [], volumes).first else {
                return ["nothing"]
            }
            return volumes
        }
        #expect(chosen(try hourly()) == ["a", "b", "c"])
        #expect(chosen(try hourly(selector: "app=db")) == ["a", "b"])
        #expect(chosen(try hourly(selector: "app=db,tier!=test")) == ["a"])
        #expect(chosen(try hourly(selector: "app in (db,web),tier notin (test)")) == ["a"])
        #expect(chosen(try hourly(selector: "tier notin (test,x)")) == ["a", "c"])
        #expect(chosen(try hourly(volumes: ["c", "a", "gone"])) == ["a", "c"])
        #expect(chosen(try hourly(selector: "app=web")) == [])
    }

    @Test func idleWhileNothingIsOpen() throws {
        let schedule = begun(try hourly())
        func isIdle(_ runs: [ScheduleRunRow], now: Int64 = Self.eight + 1000) -> Bool {
            SchedulePlan.isIdle([StoredSchedule(row: schedule, runs: runs)], now: now)
        }
        #expect(isIdle([]) && isIdle([run("v", .done)]))
        #expect(!isIdle([run("v", .done), run("w", .taken)]) && !isIdle([run("v")]))
        #expect(!isIdle([], now: Self.eight + Self.hour))
    }

    // MARK: Snapshots

    @Test func oneSnapshotOfEachVolume() throws {
        let schedule = begun(try hourly())
        #expect(
            steps(schedule, [run("v"), run("w", .done)], [volume("v"), volume("w")])
                == [.takeSnapshot(run("v"), "hourly-20261129-0800")])
    }

    /// It was refused for ever: what is beyond the newest goes when one was taken, which could not
    /// be. A schedule that has not as many as it keeps deletes nothing, and never its last one.
    @Test(arguments: [(2, 3, false), (2, 2, true), (2, 1, false), (1, 1, false), (1, 3, false)])
    func aFullVolumeLosesTheOldestFirst(retain: Int, own: Int, isExact: Bool) throws {
        let schedule = begun(try hourly(retain: retain))
        let full = volume("v") {
            $0.snapshots = (0..<VolumeRecord.snapshotsMax).map { number in
                .init(name: "\(number)", schedule: number % 100 < 1 ? "hourly" : nil)
            }
            var left = own
            for index in $0.snapshots.indices where $0.snapshots[index].schedule != nil {
                if left == 0 { $0.snapshots[index].schedule = "daily" } else { left -= 1 }
            }
        }
        let taken = SchedulePlan.Step.takeSnapshot(run("v"), "hourly-20261129-0800")
        let deletes = own > max(retain - 1, 1)
        #expect(
            steps(schedule, [run("v")], [full])
                == [deletes ? .deleteSnapshot(run("v"), "0") : taken])
        // A reader holds it up: the next, if there is one, or none.
        var attempts = ScheduleAttempts()
        attempts.failed(run("v"), "0", now: Self.eight + 500)
        if deletes {
            #expect(
                steps(schedule, [run("v")], [full], attempts: attempts)
                    == [isExact ? taken : .deleteSnapshot(run("v"), "100")])
        }
        var roomy = full
        roomy.snapshots.removeLast()
        #expect(steps(schedule, [run("v")], [roomy]) == [taken])
    }

    /// A crash after it was taken and before that was noted: asked for again, it is the same one.
    @Test func aSnapshotThatIsThereIsAskedForAgain() throws {
        let schedule = begun(try hourly())
        let taken = volume("v") {
            $0.snapshots = [.init(name: "hourly-20261129-0800", schedule: "hourly")]
            $0.obstacle = "it is not attached"
        }
        #expect(
            steps(schedule, [run("v")], [taken])
                == [.takeSnapshot(run("v"), "hourly-20261129-0800")])
        // Somebody else's of that name is not touched, and not counted.
        for owner in [nil, "daily"] {
            let foreign = volume("v") {
                $0.snapshots = [.init(name: "hourly-20261129-0800", schedule: owner)]
            }
            #expect(
                steps(schedule, [run("v")], [foreign]) == [
                    .hold(
                        run("v"),
                        why: "there is a snapshot 'hourly-20261129-0800' that the schedule did "
                            + "not take")
                ])
        }
    }

    @Test func aVolumeThatCannotBeAskedWaitsAndIsToldOnce() throws {
        let schedule = begun(try hourly())
        let detached = volume("v") { $0.obstacle = "it is not attached" }
        #expect(
            steps(schedule, [run("v"), run("w")], [detached, volume("w")]) == [
                .hold(run("v"), why: "it is not attached"),
                .takeSnapshot(run("w"), "hourly-20261129-0800"),
            ])
        let told = run("v", message: "it is not attached")
        #expect(steps(schedule, [told], [detached]).isEmpty)
        // Attached within the hour: it is made up for.
        #expect(
            steps(schedule, [told], [volume("v")], now: Self.eight + 59 * Self.minute)
                == [.takeSnapshot(told, "hourly-20261129-0800")])
        // Afterwards the next time is what counts.
        #expect(
            steps(schedule, [told], [volume("v")], now: Self.eight + Self.hour)
                == [.begin(schedule, fire: Self.eight + Self.hour, volumes: ["v"])])
        // A volume that is gone.
        #expect(steps(schedule, [told], []).isEmpty)
    }

    /// Only what the schedule took itself counts: others may go at any time.
    @Test func whatHasNotChangedIsSkipped() throws {
        let schedule = begun(try hourly())
        func detached(_ snapshots: [SchedulePlan.Volume.Snapshot]) -> SchedulePlan.Volume {
            volume("v") {
                $0.unchangedSince = LayerID(rawValue: 5)
                $0.snapshots = snapshots
            }
        }
        let name = "hourly-20261129-0800"
        let before = SchedulePlan.Volume.Snapshot(
            name: "b", schedule: "hourly", layer: LayerID(rawValue: 4))
        let other = SchedulePlan.Volume.Snapshot(
            name: "o", schedule: "daily", layer: LayerID(rawValue: 6))
        let own = SchedulePlan.Volume.Snapshot(
            name: "h", schedule: "hourly", layer: LayerID(rawValue: 5))
        #expect(
            steps(schedule, [run("v")], [detached([before, other])])
                == [.takeSnapshot(run("v"), name)])
        #expect(
            steps(schedule, [run("v")], [detached([before, own, other])]) == [
                .skip(run("v"), why: "it is not attached, and has not changed since 'h'")
            ])
        let attached = volume("v") { $0.snapshots = [before, own] }
        #expect(steps(schedule, [run("v")], [attached]) == [.takeSnapshot(run("v"), name)])
        // Though nobody could be asked.
        var away = detached([own])
        away.obstacle = "no in-sync replica of it is running"
        #expect(
            steps(schedule, [run("v")], [away]) == [
                .skip(run("v"), why: "it is not attached, and has not changed since 'h'")
            ])
    }

    @Test func whatFailedIsTriedLaterAndLater() throws {
        let schedule = begun(try hourly())
        let (wanted, name) = (run("v"), "hourly-20261129-0800")
        var attempts = ScheduleAttempts()
        var now = Self.eight
        for delay in [15, 30, 60, 120, 240, 480, 600, 600] as [Int64] {
            attempts.failed(wanted, name, now: now)
            let early = now + delay * 1000 - 1
            #expect(
                steps(schedule, [wanted], [volume("v")], attempts: attempts, now: early).isEmpty)
            now += delay * 1000
            #expect(attempts.mayTry(wanted, name, now: now))
        }
        // Another volume does not wait for it.
        #expect(
            steps(
                schedule, [wanted, run("w")], [volume("v"), volume("w")], attempts: attempts,
                now: Self.eight) == [.takeSnapshot(run("w"), name)])
        attempts.succeeded(wanted, name)
        #expect(attempts.mayTry(wanted, name, now: Self.eight))
        attempts.failed(wanted, name, now: now)
        attempts.forget("hourly")
        #expect(attempts.mayTry(wanted, name, now: now))
    }

    @Test func oneThingAtATimeOnAVolume() throws {
        var attempts = ScheduleAttempts()
        attempts.busy = ["v"]
        let schedule = begun(try hourly())
        #expect(steps(schedule, [run("v")], [volume("v")], attempts: attempts).isEmpty)
        let two = [schedule, begun(try hourly("other"))].map { row in
            StoredSchedule(row: row, runs: [run("v", of: row.name)])
        }
        let steps = SchedulePlan(
            two, volumes: [volume("v")], attempts: .init(), now: Self.eight + 1
        ).steps
        #expect(steps == [.takeSnapshot(run("v"), "hourly-20261129-0800")])
    }

    // MARK: Retention

    private func kept(_ names: [String], by schedule: String? = "hourly")
        -> [SchedulePlan.Volume.Snapshot]
    {
        names.map { .init(name: $0, schedule: schedule) }
    }

    @Test func theOldestGoesAfterANewOneIsTaken() throws {
        let schedule = begun(try hourly())
        let full = volume("v") { $0.snapshots = self.kept(["1", "2", "3", "4"]) }
        #expect(
            steps(schedule, [run("v", .taken)], [full]) == [.deleteSnapshot(run("v", .taken), "1")])
        let right = volume("v") { $0.snapshots = self.kept(["3", "4"]) }
        #expect(steps(schedule, [run("v", .taken)], [right]) == [.finish(run("v", .taken))])
        // Not before, and not again.
        let early = steps(schedule, [run("v")], [full])
        #expect(early == [.takeSnapshot(run("v"), "hourly-20261129-0800")])
        #expect(steps(schedule, [run("v", .done)], [full]).isEmpty)
    }

    @Test func nothingButItsOwnIsDeleted() throws {
        let schedule = begun(try hourly(retain: 1))
        let mixed = volume("v") {
            $0.snapshots =
                self.kept(["mine", "hourly-20261129-0600"], by: nil)
                + self.kept(["d1", "d2"], by: "daily") + self.kept(["h1"])
        }
        #expect(steps(schedule, [run("v", .taken)], [mixed]) == [.finish(run("v", .taken))])
    }

    /// A reader holds up the deletion of what it reads, and of nothing else.
    @Test func aSnapshotThatIsReadGoesLater() throws {
        let schedule = begun(try hourly(retain: 1))
        let taken = run("v", .taken)
        var attempts = ScheduleAttempts()
        attempts.failed(taken, "1", now: Self.eight)
        let full = volume("v") { $0.snapshots = self.kept(["1", "2", "3"]) }
        #expect(
            steps(schedule, [taken], [full], attempts: attempts) == [.deleteSnapshot(taken, "2")])
        let left = volume("v") { $0.snapshots = self.kept(["1", "3"]) }
        #expect(steps(schedule, [taken], [left], attempts: attempts).isEmpty)
        #expect(
            steps(schedule, [taken], [left], attempts: attempts, now: Self.eight + 15_000)
                == [.deleteSnapshot(taken, "1")])
        let detached = volume("v") {
            $0.snapshots = self.kept(["1", "3"])
            $0.obstacle = "it is not attached"
        }
        #expect(steps(schedule, [taken], [detached]).isEmpty)
    }
}

/// Scrubs, one at a time on each node.
@Suite struct ScrubPlanTests {
    private static let now: Int64 = 1_795_935_900_000

    private func weekly() throws -> ScheduleRow {
        var row = try ScheduleRow(
            name: "w", cron: "0 3 * * 0", action: .scrub, now: Self.now - 86_400_000)
        row.lastMilliseconds = row.nextMilliseconds
        try row.reckonNext(after: Self.now)
        return row
    }

    private func run(
        _ volume: String, _ state: ScheduleRunRow.State = .waiting, since: Int64 = 0,
        done: Int64 = 0, message: String = ""
    ) -> ScheduleRunRow {
        ScheduleRunRow(
            schedule: "w", volumeID: volume, volume: volume, fireMilliseconds: 1, state: state,
            stateMilliseconds: since, message: message, doneMilliseconds: done)
    }

    private func volume(
        _ name: String, on nodes: Set<String>, _ scrub: SchedulePlan.Volume.Scrub = .none,
        obstacle: String? = nil
    ) -> SchedulePlan.Volume {
        SchedulePlan.Volume(
            id: name, name: name, nodes: nodes, obstacle: obstacle, scrub: scrub)
    }

    private func steps(
        _ runs: [ScheduleRunRow], _ volumes: [SchedulePlan.Volume],
        attempts: ScheduleAttempts = .init(), isPaused: Bool = false
    ) throws -> [SchedulePlan.Step] {
        var row = try weekly()
        row.isPaused = isPaused
        return SchedulePlan(
            [StoredSchedule(row: row, runs: runs)], volumes: volumes, attempts: attempts,
            now: Self.now
        ).steps
    }

    @Test func volumesOfOneNodeOneAfterTheOther() throws {
        let volumes = [
            volume("a", on: ["1", "2"]), volume("b", on: ["2", "3"]), volume("c", on: ["3", "4"]),
            volume("d", on: ["5"]),
        ]
        let runs = ["a", "b", "c", "d"].map { run($0) }
        #expect(try steps(runs, volumes) == [.scrub(run("a")), .scrub(run("c")), .scrub(run("d"))])
        // Who was done longest ago comes first.
        let waited = [run("a", done: 30), run("b", done: 10), run("c", done: 20)]
        #expect(try steps(waited, volumes) == [.scrub(run("b", done: 10))])
    }

    @Test func itWaitsForScrubsThatGoOn() throws {
        let waiting = run("b")
        func next(
            _ other: SchedulePlan.Volume, _ state: ScheduleRunRow.State = .running
        ) throws -> [SchedulePlan.Step] {
            try steps([run("a", state), waiting], [other, volume("b", on: ["1"])])
        }
        #expect(try next(volume("a", on: ["1"], .running)).isEmpty)
        // Somebody began it by hand.
        #expect(try next(volume("a", on: ["1"], .running), .done).isEmpty)
        #expect(try next(volume("a", on: ["2"], .running)) == [.scrub(waiting)])
        // One that only waits for its replicas holds nobody up.
        #expect(try next(volume("a", on: ["1"], .waiting)) == [.scrub(waiting)])
        #expect(
            try next(volume("a", on: ["1"], .finished))
                == [.finish(run("a", .running)), .scrub(waiting)])
    }

    /// The store that noted it was lost.
    @Test func aScrubThatIsForgottenIsAskedForAgain() throws {
        let asked = run("a", .running)
        #expect(try steps([asked], [volume("a", on: ["1"])]) == [.scrubAgain(asked)])
        #expect(
            try steps([asked], [volume("a", on: ["1"], obstacle: "it is not attached")])
                == [.scrubAgain(asked)])
        // A node that is not heard of has not said that it ended.
        #expect(
            try steps([asked], [volume("a", on: ["1"], .running, obstacle: "node 1 is away")])
                .isEmpty)
    }

    @Test func whatCannotBeAskedIsToldAndFailuresWait() throws {
        let detached = volume("a", on: ["1"], obstacle: "it is not attached")
        #expect(
            try steps([run("a"), run("b")], [detached, volume("b", on: ["1"])])
                == [.hold(run("a"), why: "it is not attached"), .scrub(run("b"))])
        var attempts = ScheduleAttempts()
        attempts.failed(run("a"), "", now: Self.now)
        #expect(try steps([run("a")], [volume("a", on: ["1"])], attempts: attempts).isEmpty)
        attempts = .init()
        attempts.busy = ["a"]
        #expect(
            try steps(
                [run("a"), run("b")], [volume("a", on: ["1"]), volume("b", on: ["1"])],
                attempts: attempts
            ).isEmpty)
    }

    @Test func pausedItOnlyNotesTheEnd() throws {
        let runs = [run("a", .running), run("b")]
        let volumes = [volume("a", on: ["1"], .finished), volume("b", on: ["2"])]
        #expect(try steps(runs, volumes, isPaused: true) == [.finish(run("a", .running))])
    }
}
