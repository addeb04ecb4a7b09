import GRDB
import HapteraAPI
import HapteraCore
import HapteraHost
import Logging
import Synchronization
import Testing

@testable import HapteraControl

/// Schedules as they are stored.
@Suite struct ScheduleTableTests {
    private static func wanted(
        _ change: (inout Haptera_V1_ScheduleSpecification) -> Void = { _ in }
    ) -> Haptera_V1_ScheduleSpecification {
        var wanted = Haptera_V1_ScheduleSpecification()
        wanted.name = "hourly"
        wanted.cron = "@hourly"
        wanted.action = .snapshot
        wanted.retain = 3
        wanted.all = true
        change(&wanted)
        return wanted
    }

    @Test func oneIsThereFromTheBeginningAndStaysGone() async throws {
        let test = try TestStore()
        let weekly = try #require(try await test.store.schedules().first)
        #expect(weekly.row.name == "weekly-scrub" && weekly.row.action == .scrub)
        #expect(weekly.row.cron == "0 3 * * 0" && weekly.row.timeZone == "UTC")
        #expect(weekly.message.specification.all && !weekly.row.isPaused)
        // 1970-01-04 was a Sunday.
        #expect(weekly.row.nextMilliseconds == (3 * 86_400 + 3 * 3600) * 1000)
        try await test.store.deleteSchedule("weekly-scrub")
        try test.store.database.close()
        let again = try MetadataStore(path: test.directory.path + "/store")
        #expect(try await again.schedules().isEmpty)
    }

    @Test func createdOnce() async throws {
        let test = try TestStore()
        let caller = Caller(actor: "ann@host")
        let first = try await Caller.$current.withValue(caller) {
            try await test.store.createSchedule(ScheduleRow(Self.wanted(), now: test.clock.now))
        }
        #expect(first.row.nextMilliseconds == 3_600_000)
        let event = try #require(try await test.store.events(after: 0, limit: 10).last)
        #expect(event.kind == "ScheduleCreated" && event.subject == "schedule/hourly")
        #expect(event.actor == "ann@host")
        #expect(event.message == "snapshots, 3 kept, of all volumes, at '@hourly' UTC")
        test.clock.advance(86_400_000)
        let again = try await test.store.createSchedule(
            ScheduleRow(Self.wanted(), now: test.clock.now))
        #expect(again == first)
        let error = await #expect(throws: ControlError.self) {
            let other = Self.wanted { $0.retain = 4 }
            _ = try await test.store.createSchedule(ScheduleRow(other, now: test.clock.now))
        }
        #expect(error?.code == .conflict)
        #expect(
            error?.message == "schedule 'hourly' exists with other arguments: snapshots, 3 kept, "
                + "of all volumes, at '@hourly' UTC; to change it: storagectl schedule update "
                + "hourly")
        let scrub = await #expect(throws: ControlError.self) {
            let other = Self.wanted {
                $0.action = .scrub
                $0.retain = 0
            }
            _ = try await test.store.createSchedule(ScheduleRow(other, now: test.clock.now))
        }
        #expect(scrub?.message.contains("delete it first (its snapshots stay)") == true)
    }

    @Test func whatMakesNoScheduleIsRefused() throws {
        let changes: [(inout Haptera_V1_ScheduleSpecification) -> Void] = [
            { $0.name = "" }, { $0.name = "Hourly" },
            { $0.name = String(repeating: "s", count: 49) }, { $0.cron = "" },
            { $0.cron = "0 0 30 2 *" }, { $0.timeZone = "CET" }, { $0.timeZone = "Mars/North" },
            { $0.action = .unspecified }, { $0.retain = 0 }, { $0.retain = 1001 },
            { $0.action = .scrub }, { $0.all = false }, { $0.selector = "a=1" },
            { $0.volumes = ["v"] },
            {
                $0.all = false
                $0.selector = "a="
                $0.volumes = ["v"]
            },
            {
                $0.all = false
                $0.selector = ",,"
            },
            {
                $0.all = false
                $0.volumes = ["V"]
            },
            {
                $0.all = false
                $0.volumes = Array(repeating: "v", count: 257)
            },
        ]
        for (index, change) in changes.enumerated() {
            let error = #expect(throws: ControlError.self, "\(index)") {
                try ScheduleRow(Self.wanted(change), now: 0)
            }
            #expect(error?.code == .invalid, "\(index)")
        }
        _ = try ScheduleRow(Self.wanted { $0.name = String(repeating: "s", count: 48) }, now: 0)
        let berlin = try ScheduleRow(
            Self.wanted {
                $0.cron = "0 3 * * *"
                $0.timeZone = "Europe/Berlin"
            }, now: 0)
        #expect(berlin.nextMilliseconds == 2 * 3_600_000)
    }

    /// The longest name there is makes a snapshot name that is one.
    @Test func snapshotsAreNamedAfterTheTime() throws {
        let name = String(repeating: "s", count: ScheduleLimits.nameLengthMax)
        let row = try ScheduleRow(name: name, cron: "* * * * *", action: .snapshot, now: 0)
        let snapshot = row.snapshotName(at: 1_795_935_900_000)
        #expect(snapshot == name + "-20261129-0705")
        #expect(VolumeRecord.isValidSnapshotName(snapshot))
    }

    @Test func namedVolumesMustBeThere() async throws {
        let test = try TestStore()
        _ = try await test.makeVolume()
        func create(_ volumes: [String]) async throws -> StoredSchedule {
            let wanted = Self.wanted {
                $0.all = false
                $0.volumes = volumes
            }
            return try await test.store.createSchedule(ScheduleRow(wanted, now: test.clock.now))
        }
        let error = await #expect(throws: ControlError.self) { _ = try await create(["vol", "x"]) }
        #expect(error?.code == .notFound)
        #expect(try await create(["vol"]).message.specification.volumes == ["vol"])
    }

    @Test func pausedResumedDeleted() async throws {
        let test = try TestStore()
        _ = try await test.store.createSchedule(ScheduleRow(Self.wanted(), now: test.clock.now))
        let paused = try await test.store.pauseSchedule("hourly", isPaused: true)
        #expect(paused.row.isPaused && paused.message.nextUnixMilliseconds == 0)
        test.clock.advance(10 * 3_600_000)
        #expect(paused.row.due(now: test.clock.now) == nil)
        // What passed meanwhile is not made up for.
        for _ in 0..<2 {
            let resumed = try await test.store.pauseSchedule("hourly", isPaused: false)
            #expect(resumed.row.nextMilliseconds == 11 * 3_600_000)
            #expect(resumed.row.due(now: test.clock.now) == nil)
        }
        try await test.store.deleteSchedule("hourly")
        let kinds = try await test.store.events(after: 0, limit: 10).map(\.kind)
        #expect(
            kinds == ["ScheduleCreated", "SchedulePaused", "ScheduleResumed", "ScheduleDeleted"])
        for act in [
            { try await test.store.deleteSchedule("hourly") },
            { _ = try await test.store.pauseSchedule("hourly", isPaused: true) },
            { _ = try await test.store.schedule(named: "hourly") },
        ] {
            let error = await #expect(throws: ControlError.self) { try await act() }
            #expect(error?.code == .notFound)
        }
    }

    @Test func aRunIsOfOneTime() async throws {
        let test = try TestStore()
        let volume = try await test.makeVolume()
        let row = try await test.store.createSchedule(
            ScheduleRow(Self.wanted(), now: test.clock.now)
        ).row
        let hour: Int64 = 3_600_000
        test.clock.advance(hour)
        try await test.store.beginRun(row, fire: hour, volumes: [volume.volume.id])
        let begun = try await test.store.schedule(named: "hourly")
        #expect(begun.row.lastMilliseconds == hour && begun.row.nextMilliseconds == 2 * hour)
        let run = try #require(begun.runs.first)
        #expect(run.volume == "vol" && run.state == .waiting && run.fireMilliseconds == hour)
        // Decided from what was there before: too late.
        try await test.store.beginRun(row, fire: 5 * hour, volumes: [])
        #expect(try await test.store.schedule(named: "hourly") == begun)

        test.clock.advance(hour)
        try await test.store.beginRun(begun.row, fire: 2 * hour, volumes: [volume.volume.id])
        // Of the time before.
        try await test.store.noteRun(run, .taken)
        let next = try #require(try await test.store.schedule(named: "hourly").runs.first)
        #expect(next.state == .waiting && next.fireMilliseconds == 2 * hour)
        // Resumed, it does not make up for what it had not begun.
        _ = try await test.store.pauseSchedule("hourly", isPaused: true)
        #expect(try await test.store.schedule(named: "hourly").runs == [next])
        #expect(try await test.store.pauseSchedule("hourly", isPaused: false).runs.isEmpty)
    }

    @Test func aReasonIsToldOnce() async throws {
        let test = try TestStore()
        let volume = try await test.makeVolume()
        var row = try await test.store.createSchedule(
            ScheduleRow(Self.wanted(), now: test.clock.now)
        ).row
        let hour: Int64 = 3_600_000
        for fire in [hour, 2 * hour] {
            test.clock.advance(hour)
            try await test.store.beginRun(row, fire: fire, volumes: [volume.volume.id])
            let begun = try await test.store.schedule(named: "hourly")
            row = begun.row
            try await test.store.noteRun(
                try #require(begun.runs.first), .waiting, message: "away",
                event: "ScheduleVolumeSkipped")
        }
        let told = try await test.store.events(after: 0, limit: 100)
            .filter { $0.kind == "ScheduleVolumeSkipped" }
        #expect(told.map(\.message) == ["volume 'vol': away"])
        #expect(told.first?.subject == "schedule/hourly")
    }
}

/// From the time that comes to the snapshot that is kept, over the stand-ins of `SnapshotTests`.
@Suite struct ScheduleTests {
    typealias World = SnapshotTests.World

    private static let minute: Int64 = 60_000

    private func create(
        _ world: World, _ action: Haptera_V1_ScheduleAction = .snapshot, retain: UInt32 = 2
    ) async throws {
        var wanted = Haptera_V1_ScheduleSpecification()
        wanted.name = "often"
        wanted.cron = "* * * * *"
        wanted.action = action
        wanted.retain = action == .snapshot ? retain : 0
        wanted.all = true
        _ = try await world.controller.createSchedule(wanted)
    }

    /// Rounds until nothing is left to do just now.
    private func settle(_ world: World) async throws {
        for _ in 0..<12 {
            for task in try await world.controller.runSchedules() { await task.value }
        }
    }

    private func pass(_ world: World, _ milliseconds: Int64 = minute) async throws {
        world.test.clock.advance(milliseconds)
        try await world.report()
    }

    private func names(_ world: World) async throws -> [String] {
        try await world.controller.snapshots(of: "vol").map(\.name)
    }

    private func run(_ world: World) async throws -> Haptera_V1_ScheduledVolume {
        try #require(try await world.controller.schedule(named: "often").runs.first)
    }

    @Test func snapshotsAreTakenAndTheNewestKept() async throws {
        let world = try await World()
        try await create(world)
        try await settle(world)
        #expect(try await names(world).isEmpty)
        _ = try await world.create("by-hand")
        for _ in 0..<4 {
            try await pass(world)
            try await settle(world)
        }
        #expect(
            try await names(world)
                == ["by-hand", "often-19700101-0019", "often-19700101-0020"])
        let last = try await world.controller.snapshot("often-19700101-0020", of: "vol")
        #expect(last.labels == ["haptera.io/schedule": "often"])
        #expect(try await run(world).state == .done)
        let schedule = try await world.controller.schedule(named: "often")
        #expect(schedule.lastUnixMilliseconds == 20 * Self.minute)
        #expect(schedule.nextUnixMilliseconds == 21 * Self.minute)

        let events = try await world.events
        #expect(events.count { $0.kind == "ScheduleRunStarted" } == 4)
        #expect(
            events.first { $0.kind == "ScheduleRunStarted" }?.message
                == "for 1970-01-01T00:17:00Z, volumes: 1")
        for kind in ["SnapshotRequested", "SnapshotDeletionRequested"] {
            let who = events.filter { $0.kind == kind && $0.message != "snapshot by-hand" }
            #expect(Set(who.map(\.actor)) == ["schedule/often"], "\(kind)")
        }
        #expect(
            world.askedToDelete.withLock { $0.map(\.name) }
                == ["often-19700101-0017", "often-19700101-0018"])
    }

    /// Two days without a controller are one snapshot.
    @Test func whatWasMissedIsMadeUpForOnce() async throws {
        let world = try await World()
        try await create(world)
        try await pass(world, 48 * 60 * Self.minute)
        try await settle(world)
        #expect(try await names(world) == ["often-19700103-0016"])
        #expect(world.asked.withLock { $0.count } == 1)
    }

    /// The controller ends between noting the time and asking, or between the answer and noting it.
    @Test func aCrashNeitherForgetsNorDoubles() async throws {
        let world = try await World()
        try await create(world)
        try await pass(world)
        // The first round only notes the time.
        #expect(try await world.controller.runSchedules().isEmpty)
        #expect(try await run(world).state == .waiting)
        let name = "often-19700101-0017"
        var request = Haptera_V1_CreateSnapshotRequest()
        request.volume = "vol"
        request.name = name
        _ = try await world.controller.createSnapshot(
            request, reserved: [ScheduleRow.label: "often"])
        let again = Controller(
            store: world.test.store, recordService: "h:1",
            logger: Logger(label: "test") { _ in SwiftLogNoOpLogHandler() })
        // It does not know the nodes yet, and waits for them.
        #expect(try await again.runSchedules().isEmpty)
        #expect(try await run(world).reason.isEmpty)

        try await settle(world)
        #expect(try await names(world) == [name])
        #expect(try await run(world).state == .done)
        #expect(try await world.events.count { $0.kind == "SnapshotCreated" } == 1)
    }

    /// Its clients may live on somewhere: nobody asked for a takeover.
    @Test func aVolumeThatWasNotLeftInOrderIsSkippedUntilItIsAttached() async throws {
        let world = try await World(attached: false)
        try await create(world)
        #expect(try await world.swap(.takeover) { $0.isClean = false } == .swapped)
        for _ in 0..<3 {
            try await pass(world)
            try await settle(world)
        }
        let waiting = try await run(world)
        #expect(waiting.state == .waiting)
        #expect(waiting.reason == "it is not attached, and its last engine did not leave in order")
        let skipped = try await world.events.filter { $0.kind == "ScheduleVolumeSkipped" }
        #expect(skipped.map(\.message) == ["volume 'vol': \(waiting.reason)"])

        _ = try await world.test.store.attachVolume("vol", node: "a", ready: ["a"])
        try await world.report()
        try await settle(world)
        #expect(try await names(world) == ["often-19700101-0019"])
        #expect(try await run(world).reason.isEmpty)
    }

    /// An engine without clients that ended with its node keeps nobody waiting.
    @Test func oneWithoutClientsMayHaveEndedAnyhow() async throws {
        let world = try await World(attached: false)
        try await create(world)
        _ = try await world.test.store.beginMaintenance("vol", after: 0, on: "a", words: "w")
        #expect(try await world.swap(.takeover) { $0.isClean = false } == .swapped)
        try await world.test.store.abandonMaintenance("vol", generation: 1)
        world.live()
        try await pass(world)
        try await settle(world)
        #expect(try await names(world) == ["often-19700101-0017"])
        try await world.untilDetached()
    }

    /// It gets an engine for it, and stays detached.
    @Test func aDetachedVolumeIsScrubbed() async throws {
        let world = try await World(attached: false)
        world.scrub.withLock {
            $0 = Haptera_V1_ScrubReport()
            $0?.state = "running"
        }
        world.live()
        try await create(world, .scrub)
        try await pass(world)
        try await settle(world)
        #expect(try await run(world).state == .running)
        for task in try await world.controller.tendScrubs() { await task.value }
        #expect(try await world.phase(on: "a") == .maintain)
        #expect(try await world.controller.volume(named: "vol").reason == "it is being scrubbed")
        world.scrub.withLock { $0?.state = "finished" }
        world.controller.changes.notify()
        try await world.until { $0.scrub?.isFinished == true }
        try await settle(world)
        #expect(try await run(world).state == .done)
        try await world.controller.tendMaintenances()
        try await world.untilDetached()
    }

    /// One of what it was left with, and no more while nothing changes; again after it was.
    @Test func aDetachedVolumeGetsOneOfWhatItHolds() async throws {
        let world = try await World(attached: false)
        world.live()
        try await create(world)
        for _ in 0..<4 {
            try await pass(world)
            try await settle(world)
        }
        #expect(try await names(world) == ["often-19700101-0017"])
        let done = try await run(world)
        #expect(done.state == .done)
        #expect(
            done.reason == "it is not attached, and has not changed since 'often-19700101-0017'")
        let skipped = try await world.events.filter { $0.kind == "ScheduleVolumeSkipped" }
        #expect(skipped.map(\.message) == ["volume 'vol': \(done.reason)"])
        #expect(try await world.controller.volume(named: "vol").state == .detached)

        // Attached, though nothing is known to have been written; and what was taken is deleted.
        for detach in [true, false] {
            if detach {
                _ = try await world.controller.attach("vol", node: "a")
                try await world.until { $0.volume.servedGeneration == $0.volume.clientGeneration }
                _ = try await world.controller.detach("vol")
                try await world.until { $0.volume.attachedNode == nil }
            } else {
                try await world.delete("often-19700101-0021")
                try await world.until { $0.volume.attachedNode == nil }
            }
            try await pass(world)
            try await settle(world)
            try await world.until { $0.volume.attachedNode == nil }
        }
        #expect(try await names(world) == ["often-19700101-0017", "often-19700101-0022"])
    }

    @Test func whatTheEngineRefusesIsTriedAgain() async throws {
        let world = try await World()
        try await create(world, retain: 1)
        world.engine.withLock { $0 = .refuses }
        try await pass(world)
        try await settle(world)
        #expect(world.asked.withLock { $0.count } == 1)
        #expect(try await run(world).reason == "node a: no space for another layer")
        world.engine.withLock { $0 = .obeys }
        try await pass(world, 15_000)
        try await settle(world)
        #expect(try await names(world) == ["often-19700101-0017"])

        // A reader of the oldest: it goes when the reader has.
        try await pass(world, 45_000)
        _ = try await world.controller.runSchedules()
        for task in try await world.controller.runSchedules() { await task.value }
        world.engine.withLock { $0 = .refuses }
        try await settle(world)
        #expect(try await names(world) == ["often-19700101-0017", "often-19700101-0018"])
        #expect(try await run(world).state == .taken)
        #expect(
            try await run(world).reason
                == "snapshot 'often-19700101-0017' is not deleted: node a: 2 clients read the "
                + "snapshot; disconnect them first")
        world.engine.withLock { $0 = .obeys }
        try await pass(world, 15_000)
        try await settle(world)
        #expect(try await names(world) == ["often-19700101-0018"])
        #expect(try await run(world).state == .done)
        let failed = try await world.events.filter { $0.kind == "ScheduleVolumeFailed" }
        #expect(failed.count == 2)
    }

    @Test func aScrubIsFollowedToItsEnd() async throws {
        let world = try await World()
        world.live()
        try await create(world, .scrub)
        for state in ["running", "waiting"] {
            world.scrub.withLock {
                $0 = Haptera_V1_ScrubReport()
                $0?.state = state
            }
            try await pass(world, state == "running" ? 60_000 : 4000)
            try await settle(world)
            #expect(try await run(world).state == .running)
        }
        let id = try await world.test.store.volume(named: "vol").scrub?.value?.id
        world.scrub.withLock { $0?.state = "finished" }
        world.controller.changes.notify()
        try await world.until { $0.scrub?.isFinished == true }
        try await pass(world, 4000)
        try await settle(world)
        let done = try await run(world)
        #expect(done.state == .done && done.doneUnixMilliseconds == world.test.clock.now)
        #expect(try await world.test.store.volume(named: "vol").scrub?.value?.id == id)
        #expect(try await world.events.count { $0.kind == "ScrubRequested" } == 1)
    }

    @Test func nothingIsLeftOfWhatIsDeleted() async throws {
        let world = try await World()
        try await create(world)
        try await pass(world)
        try await settle(world)
        try await world.controller.deleteSchedule("often")
        #expect(try await names(world) == ["often-19700101-0017"])
        let left = try await world.test.store.database.read { db in
            try Int.fetchOne(db, sql: "SELECT COUNT(*) FROM scheduleRuns")
        }
        #expect(left == 0)
        try await pass(world)
        try await settle(world)
        #expect(try await names(world) == ["often-19700101-0017"])
    }
}
