import GRDB
import HapteraAPI
import HapteraCore
import HapteraHost
import Synchronization
import Testing

@testable import HapteraControl

/// Schedules that are changed while they are there.
@Suite struct ScheduleUpdateTests {
    typealias World = SnapshotTests.World

    private static let minute: Int64 = 60_000
    private static let hour = 60 * minute

    private func create(
        _ store: MetadataStore,
        _ change: (inout Haptera_V1_ScheduleSpecification) -> Void = { _ in }
    ) async throws -> ScheduleRow {
        var wanted = Haptera_V1_ScheduleSpecification()
        wanted.name = "hourly"
        wanted.cron = "@hourly"
        wanted.action = .snapshot
        wanted.retain = 3
        wanted.all = true
        change(&wanted)
        return try await store.createSchedule(ScheduleRow(wanted, now: store.clock())).row
    }

    private func update(
        _ store: MetadataStore, _ change: (inout Haptera_V1_UpdateScheduleRequest) -> Void
    ) async throws -> StoredSchedule {
        var request = Haptera_V1_UpdateScheduleRequest()
        request.name = "hourly"
        change(&request)
        return try await store.updateSchedule(request)
    }

    private func lastEvent(_ store: MetadataStore) async throws -> EventRow {
        try #require(try await store.events(after: 0, limit: 100).last)
    }

    // MARK: What changes, and what stays

    @Test func whatIsGivenChangesAndTheRestStays() async throws {
        let test = try TestStore()
        var wanted = try await create(test.store)
        test.clock.advance(Self.minute)
        let caller = Caller(actor: "ann@host")
        let updated = try await Caller.$current.withValue(caller) {
            try await update(test.store) { $0.retain = 24 }
        }
        wanted.retain = 24
        #expect(updated.row == wanted && updated.runs.isEmpty)
        let event = try await lastEvent(test.store)
        #expect(event.kind == "ScheduleUpdated" && event.subject == "schedule/hourly")
        #expect(event.actor == "ann@host" && event.message == "24 kept (was 3 kept)")
        // The same again is no change.
        test.clock.advance(Self.hour)
        #expect(try await update(test.store) { $0.retain = 24 } == updated)
        #expect(try await lastEvent(test.store) == event)

        let again = try await update(test.store) {
            $0.action = .snapshot
            $0.cron = "30  2 * * *"
            $0.timeZone = "Europe/Berlin"
            $0.selector = "app in (db,web)"
        }
        wanted.cron = "30 2 * * *"
        wanted.timeZone = "Europe/Berlin"
        wanted.selector = "app in (db,web)"
        // In 1970 Berlin is an hour ahead, in January; it is 01:17 UTC.
        wanted.nextMilliseconds = 90 * Self.minute
        #expect(again.row == wanted)
        #expect(
            try await lastEvent(test.store).message
                == "of volumes with app in (db,web) (was of all volumes), at '30 2 * * *' "
                + "Europe/Berlin (was at '@hourly' UTC)")
        let stored = try MetadataStore(path: test.directory.path + "/store")
        #expect(try await stored.schedule(named: "hourly").row == wanted)
        #expect(try await stored.schedule(named: "weekly-scrub").row.cron == "0 3 * * 0")
    }

    @Test func volumesAreChosenAnew() async throws {
        let test = try TestStore()
        _ = try await test.makeVolume()
        let all = try await create(test.store)
        func choose(
            _ change: (inout Haptera_V1_UpdateScheduleRequest) -> Void
        ) async throws -> Haptera_V1_ScheduleSpecification {
            try await update(test.store, change).message.specification
        }
        let named = try await choose { $0.volumes = ["vol", "vol"] }
        #expect(named.volumes == ["vol"] && !named.all)
        let selected = try await choose { $0.selector = "app=db" }
        #expect(selected.selector == "app=db" && selected.volumes.isEmpty && !selected.all)
        #expect(try await choose { $0.all = true } == all.message.specification)

        let error = await #expect(throws: ControlError.self) {
            _ = try await choose { $0.volumes = ["vol", "none"] }
        }
        #expect(error?.code == .notFound)
        // Gone since it was named: that keeps nobody from changing the rest.
        _ = try await choose { $0.volumes = ["vol"] }
        try await test.store.database.write { db in
            try db.execute(sql: "UPDATE volumes SET name = 'renamed'")
        }
        #expect(try await choose { $0.retain = 4 }.volumes == ["vol"])
        #expect(try await choose { $0.volumes = ["vol"] }.retain == 4)
    }

    /// How it is refused, why, and what is asked for.
    private typealias Refusal = (
        code: ControlError.Code, words: String,
        change: @Sendable (inout Haptera_V1_UpdateScheduleRequest) -> Void
    )
    private static let refused: [Refusal] = [
        (.invalid, "say what to change of schedule 'hourly'", { _ in }),
        (.invalid, "say what to change", { $0.action = .snapshot }),
        (.invalid, "'61' is no minute", { $0.cron = "61 * * * *" }),
        (.invalid, "'' is no cron expression", { $0.cron = "" }),
        (.invalid, "there is no time zone 'Mars/North'", { $0.timeZone = "Mars/North" }),
        (.invalid, "a schedule keeps 1 to 1000 snapshots", { $0.retain = 0 }),
        (.invalid, "a schedule keeps 1 to 1000 snapshots", { $0.retain = 1001 }),
        (.invalid, "the selector is empty", { $0.selector = "" }),
        (.invalid, "selector, character 5: it ends where '('", { $0.selector = "a in" }),
        (.invalid, "'V' is no volume name", { $0.volumes = ["V"] }),
        (
            .invalid, "a schedule is for all volumes, for a selector or for those named",
            {
                $0.all = true
                $0.selector = "a"
            }
        ),
        (
            .precondition,
            "schedule 'hourly' takes snapshots, and that cannot be changed: create",
            {
                $0.action = .scrub
                $0.cron = "@daily"
            }
        ),
        (.invalid, "a schedule takes snapshots or scrubs", { $0.action = .UNRECOGNIZED(9) }),
        (.notFound, "there is no schedule 'x'", { $0.name = "x" }),
        (
            .precondition, "schedule 'weekly-scrub' scrubs, and that cannot be changed",
            {
                $0.name = "weekly-scrub"
                $0.action = .snapshot
                $0.retain = 3
            }
        ),
        (
            .precondition, "schedule 'weekly-scrub' scrubs: it has no snapshots to keep",
            {
                $0.name = "weekly-scrub"
                $0.retain = 3
            }
        ),
    ]

    @Test func whatCannotBeIsRefusedWhole() async throws {
        let test = try TestStore()
        let before = try await create(test.store)
        let event = try await lastEvent(test.store)
        for (code, words, change) in Self.refused {
            let error = await #expect(throws: ControlError.self, "\(words)") {
                _ = try await update(test.store) {
                    change(&$0)
                    // Together with what would be a change.
                    if $0.hasCron { $0.paused = true }
                }
            }
            #expect(error?.code == code, "\(words)")
            #expect(error?.message.hasPrefix(words) == true, "\(error?.message ?? "")")
        }
        #expect(try await test.store.schedule(named: "hourly").row == before)
        #expect(try await lastEvent(test.store) == event)
    }

    // MARK: When

    /// Times that have passed do not become due, and one that was due already is given up.
    @Test func aNewTimeCountsFromNow() async throws {
        for isDue in [false, true] {
            let test = try TestStore()
            _ = try await create(test.store)
            test.clock.advance(isDue ? 5 * Self.hour : 10 * Self.minute)
            let before = try await test.store.schedule(named: "hourly").row
            #expect((before.due(now: test.clock.now) != nil) == isDue)
            // The last of its times passed a moment ago.
            let row = try await update(test.store) { $0.cron = "*/2 * * * *" }.row
            #expect(row.due(now: test.clock.now) == nil)
            #expect(row.lastMilliseconds == 0)
            let next = (test.clock.now / (2 * Self.minute) + 1) * 2 * Self.minute
            #expect(row.nextMilliseconds == next)
            test.clock.advance(2 * Self.minute)
            #expect(row.due(now: test.clock.now) == next)
        }
    }

    @Test func anotherZoneIsAnotherTime() async throws {
        let test = try TestStore()
        _ = try await create(test.store) { $0.cron = "0 3 * * *" }
        test.clock.advance(2 * Self.hour)
        // 02:16 UTC: three o'clock in Berlin has passed.
        let row = try await update(test.store) { $0.timeZone = "Europe/Berlin" }.row
        #expect(row.nextMilliseconds == (24 + 2) * Self.hour)
        #expect(try await update(test.store) { $0.timeZone = "" }.row.timeZone == "UTC")
    }

    /// What is due for an hour that passed unseen stays so when something else changes.
    @Test func whatIsDueStaysDueUnlessTheTimesChange() async throws {
        let test = try TestStore()
        _ = try await create(test.store)
        test.clock.advance(5 * Self.hour)
        let event = try await lastEvent(test.store)
        // The same in other letters.
        let same = try await update(test.store) {
            $0.cron = " @HOURLY "
            $0.timeZone = "UTC"
        }
        #expect(same.row.due(now: test.clock.now) == 5 * Self.hour)
        #expect(try await lastEvent(test.store) == event)
        let row = try await update(test.store) {
            $0.retain = 4
            $0.selector = "a=1"
        }.row
        #expect(row.due(now: test.clock.now) == 5 * Self.hour)
    }

    @Test func pausedAndResumed() async throws {
        let test = try TestStore()
        let before = try await create(test.store)
        func kinds() async throws -> [String] {
            try await test.store.events(after: 0, limit: 100).map(\.kind)
        }
        for _ in 0..<2 {
            let paused = try await update(test.store) { $0.paused = true }
            #expect(paused.row.isPaused && paused.message.nextUnixMilliseconds == 0)
        }
        #expect(try await kinds() == ["ScheduleCreated", "SchedulePaused"])
        test.clock.advance(5 * Self.hour)
        // It stays paused, whatever else changes.
        #expect(try await update(test.store) { $0.retain = 9 }.row.isPaused)
        var wanted = before
        wanted.retain = 2
        wanted.nextMilliseconds = 6 * Self.hour
        for _ in 0..<2 {
            let row = try await update(test.store) {
                $0.paused = false
                $0.retain = 2
            }.row
            #expect(row == wanted && row.due(now: test.clock.now) == nil)
        }
        #expect(
            try await kinds() == [
                "ScheduleCreated", "SchedulePaused", "ScheduleUpdated", "ScheduleUpdated",
                "ScheduleResumed",
            ])
        // It was not paused: nothing is reckoned anew.
        test.clock.advance(3 * Self.hour)
        let row = try await update(test.store) { $0.paused = false }.row
        #expect(row.due(now: test.clock.now) == 8 * Self.hour)
    }

    // MARK: What is under way

    /// A schedule of two volumes, `db` labelled, that is to act for one o'clock.
    private func begin(_ test: TestStore) async throws -> StoredSchedule {
        for name in ["vol", "other"] { _ = try await test.makeVolume(name) }
        _ = try await test.store.labelVolume("vol", set: ["app": "db"], remove: [])
        let row = try await create(test.store)
        test.clock.advance(Self.hour)
        let ids = try await test.store.volumes().map(\.volume.id)
        try await test.store.beginRun(row, fire: Self.hour, volumes: ids)
        return try await test.store.schedule(named: "hourly")
    }

    @Test func whatIsNotBegunGoesWithTheOldTimes() async throws {
        let test = try TestStore()
        let begun = try await begin(test)
        #expect(begun.runs.map(\.volume) == ["other", "vol"])
        // Of the same times, and still meant.
        #expect(try await update(test.store) { $0.retain = 1 }.runs == begun.runs)
        // Its snapshot is there; older ones are still to be deleted.
        try await test.store.noteRun(begun.runs[1], .taken)
        let runs = try await update(test.store) { $0.cron = "@daily" }.runs
        #expect(runs.map(\.volume) == ["vol"] && runs.first?.state == .taken)
        // Noted too late: the run is not there any more.
        try await test.store.noteRun(begun.runs[0], .taken)
        #expect(try await test.store.schedule(named: "hourly").runs == runs)
    }

    @Test func whatIsNotBegunGoesWithItsVolume() async throws {
        let test = try TestStore()
        let begun = try await begin(test)
        let selected = try await update(test.store) { $0.selector = "app in (db)" }
        #expect(selected.runs == [begun.runs[1]])
        // Meant again, it has to wait for its time.
        #expect(try await update(test.store) { $0.all = true }.runs == selected.runs)
        #expect(try await update(test.store) { $0.volumes = ["other"] }.runs.isEmpty)
    }

    @Test func aScrubThatIsBegunGoesOn() async throws {
        let test = try TestStore()
        let volume = try await test.makeVolume()
        let row = try await create(test.store) {
            $0.action = .scrub
            $0.retain = 0
        }
        test.clock.advance(Self.hour)
        try await test.store.beginRun(row, fire: Self.hour, volumes: [volume.volume.id])
        let run = try #require(try await test.store.schedule(named: "hourly").runs.first)
        try await test.store.noteRun(run, .running)
        let updated = try await update(test.store) {
            $0.cron = "@weekly"
            $0.selector = "none=x"
            $0.paused = true
        }
        #expect(updated.runs.map(\.state) == [.running])
    }

    // MARK: Over the controller

    private func settle(_ world: World) async throws {
        for _ in 0..<12 {
            for task in try await world.controller.runSchedules() { await task.value }
        }
    }

    private func pass(_ world: World) async throws {
        world.test.clock.advance(Self.minute)
        try await world.report()
        try await settle(world)
    }

    private func update(
        _ world: World, _ change: (inout Haptera_V1_UpdateScheduleRequest) -> Void
    ) async throws {
        var request = Haptera_V1_UpdateScheduleRequest()
        request.name = "hourly"
        change(&request)
        _ = try await world.controller.updateSchedule(request)
    }

    private func times(_ world: World) async throws -> [String] {
        try await world.controller.snapshots(of: "vol").map { String($0.name.suffix(4)) }
    }

    @Test func snapshotsFollowTheNewTimesAndNumbers() async throws {
        let world = try await World()
        _ = try await create(world.test.store) { $0.cron = "* * * * *" }
        for _ in 0..<2 { try await pass(world) }
        #expect(try await times(world) == ["0017", "0018"])
        // Nothing of the past, though minutes have passed with nobody looking.
        world.test.clock.advance(3 * Self.minute)
        try await update(world) { $0.cron = "*/5 * * * *" }
        try await world.report()
        try await settle(world)
        #expect(try await times(world) == ["0017", "0018"])
        for _ in 0..<4 { try await pass(world) }
        #expect(try await times(world) == ["0017", "0018", "0025"])
        // Fewer: not before there is a newer one.
        try await update(world) { $0.retain = 1 }
        try await settle(world)
        #expect(try await times(world) == ["0017", "0018", "0025"])
        for _ in 0..<5 { try await pass(world) }
        #expect(try await times(world) == ["0030"])
    }

    /// It was planned with the number of before.
    @Test func aDeletionThatIsPlannedLooksAgain() async throws {
        let world = try await World()
        _ = try await create(world.test.store) { $0.cron = "* * * * *" }
        for _ in 0..<3 { try await pass(world) }
        let run = try #require(try await world.test.store.schedule(named: "hourly").runs.first)
        let oldest = "hourly-19700101-0017"
        func delete() async throws -> Int {
            try await world.controller.deleteSnapshot(run, oldest)
            return world.askedToDelete.withLock { $0.count }
        }
        #expect(try await delete() == 0)
        try await update(world) {
            $0.retain = 1
            $0.paused = true
        }
        #expect(try await delete() == 0)
        try await update(world) { $0.paused = false }
        #expect(try await delete() == 1)
        #expect(try await times(world) == ["0018", "0019"])
        try await world.controller.deleteSchedule("hourly")
        try await world.controller.deleteSnapshot(run, "hourly-19700101-0018")
        #expect(try await times(world) == ["0018", "0019"])
    }
}
