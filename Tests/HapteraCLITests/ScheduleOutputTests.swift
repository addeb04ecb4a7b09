import ArgumentParser
import HapteraAPI
import Testing

@testable import HapteraCLI

/// As `OutputTests`: these texts change only with their documentation.
@Suite struct ScheduleOutputTests {
    private static func schedule() -> Haptera_V1_Schedule {
        var schedule = Haptera_V1_Schedule()
        schedule.specification.name = "hourly"
        schedule.specification.cron = "0 * * * *"
        schedule.specification.timeZone = "UTC"
        schedule.specification.action = .snapshot
        schedule.specification.retain = 24
        schedule.specification.selector = "app=db"
        schedule.createdUnixMilliseconds = 1_795_935_900_123
        schedule.lastUnixMilliseconds = 1_795_939_200_000
        schedule.nextUnixMilliseconds = 1_795_942_800_000
        var run = Haptera_V1_ScheduledVolume()
        run.volume = "a"
        run.state = .done
        run.doneUnixMilliseconds = 1_795_939_201_000
        schedule.runs.append(run)
        run.volume = "b"
        run.state = .waiting
        run.reason = "it is not attached"
        run.doneUnixMilliseconds = 0
        schedule.runs.append(run)
        return schedule
    }

    private static func weekly() -> Haptera_V1_Schedule {
        var schedule = Haptera_V1_Schedule()
        schedule.specification.name = "weekly-scrub"
        schedule.specification.cron = "0 3 * * 0"
        schedule.specification.timeZone = "UTC"
        schedule.specification.action = .scrub
        schedule.specification.all = true
        schedule.paused = true
        return schedule
    }

    @Test func asJSON() {
        #expect(
            Presentation.value(Self.schedule()).json() == """
                {
                  "name": "hourly",
                  "cron": "0 * * * *",
                  "timeZone": "UTC",
                  "action": "snapshot",
                  "retain": 24,
                  "all": false,
                  "selector": "app=db",
                  "volumes": [],
                  "paused": false,
                  "created": "2026-11-29T07:05:00.123Z",
                  "last": "2026-11-29T08:00:00.000Z",
                  "next": "2026-11-29T09:00:00.000Z",
                  "runs": [
                    {
                      "volume": "a",
                      "state": "done",
                      "reason": null,
                      "done": "2026-11-29T08:00:01.000Z"
                    },
                    {
                      "volume": "b",
                      "state": "waiting",
                      "reason": "it is not attached",
                      "done": null
                    }
                  ]
                }
                """)
        #expect(
            Presentation.value(Self.weekly()).json(pretty: false)
                == #"{"name":"weekly-scrub","cron":"0 3 * * 0","timeZone":"UTC","action":"scrub","#
                + #""retain":null,"all":true,"selector":null,"volumes":[],"paused":true,"#
                + #""created":null,"last":null,"next":null,"runs":[]}"#)
    }

    @Test func asTable() {
        let table = Presentation.table([Self.schedule(), Self.weekly()])
        #expect(table.header == ["NAME", "CRON", "ZONE", "ACTION", "VOLUMES", "LAST", "NEXT"])
        #expect(
            table.rows == [
                [
                    "hourly", "0 * * * *", "UTC", "snapshot, keep 24", "app=db",
                    "2026-11-29T08:00:00Z", "2026-11-29T09:00:00Z",
                ],
                ["weekly-scrub", "0 3 * * 0", "UTC", "scrub", "all", "", "paused"],
            ])
    }

    @Test func details() {
        #expect(
            Presentation.details(Self.schedule()) == """
                name:        hourly
                cron:        0 * * * * (UTC)
                action:      snapshot, keep 24
                volumes:     app=db
                last:        2026-11-29T08:00:00Z
                next:        2026-11-29T09:00:00Z

                VOLUME  STATE    DONE                  REASON
                a       done     2026-11-29T08:00:01Z  -
                b       waiting  -                     it is not attached
                """)
        #expect(
            Presentation.details(Self.weekly()).hasSuffix("volumes:     all\nnext:        paused"))
        #expect(
            Presentation.created(Self.schedule())
                == "schedule hourly: snapshot, keep 24, of app=db; next: 2026-11-29T09:00:00Z")
    }

    private func parse(_ words: [String]) throws -> Haptera_V1_ScheduleSpecification {
        let command = try Storagectl.parseAsRoot(["schedule", "create"] + words)
        return try #require(command as? ScheduleCommand.Create).specification
    }

    @Test func argumentsAreTheSpecification() throws {
        #expect(
            try parse([
                "hourly", "--cron", "0 * * * *", "--snapshot", "--retain", "24", "--selector",
                "app=db", "-o", "json",
            ]) == Self.schedule().specification)
        #expect(
            try parse(["weekly-scrub", "--cron", "0  3 * * 0", "--scrub", "--all"])
                == Self.weekly().specification)
        let named = try parse([
            "n", "--cron", "@Daily", "--time-zone", "Europe/Berlin", "--snapshot", "--retain=1",
            "--volume", "a", "--volume", "b",
        ])
        #expect(named.volumes == ["a", "b"] && named.timeZone == "Europe/Berlin")
        #expect(named.cron == "@daily" && !named.all)
    }

    @Test(arguments: [
        ["--cron", "@daily", "--all"], ["--cron", "@daily", "--all", "--snapshot"],
        ["--cron", "@daily", "--all", "--snapshot", "--scrub", "--retain", "1"],
        ["--cron", "@daily", "--all", "--snapshot", "--retain", "0"],
        ["--cron", "@daily", "--all", "--scrub", "--retain", "1"], ["--cron", "@daily", "--scrub"],
        ["--all", "--scrub"], ["--cron", "0 0 30 2 *", "--all", "--scrub"],
        ["--cron", "@daily", "--scrub", "--all", "--volume", "v"],
        ["--cron", "@daily", "--scrub", "--selector", ""],
        ["--cron", "@daily", "--scrub", "--selector", "a,"],
        ["--cron", "-5 * * * *", "--scrub", "--all"],
    ])
    func usageErrors(_ words: [String]) {
        #expect(throws: (any Error).self) { _ = try parse(["n"] + words) }
    }

    @Test func wrongCronsAreNamed() {
        let error = #expect(throws: (any Error).self) {
            _ = try parse(["n", "--cron", "61 * * * *", "--scrub", "--all"])
        }
        #expect(error.map { Storagectl.message(for: $0) }?.contains("'61' is no minute") == true)
    }

    private func update(_ words: [String]) throws -> Haptera_V1_UpdateScheduleRequest {
        let command = try Storagectl.parseAsRoot(["schedule", "update"] + words)
        return try #require(command as? ScheduleCommand.Update).request
    }

    /// What is not named is not in the request.
    @Test func anUpdateSaysWhatIsNamed() throws {
        var wanted = Haptera_V1_UpdateScheduleRequest()
        wanted.name = "n"
        wanted.retain = 3
        #expect(try update(["n", "--retain", "3"]) == wanted)
        wanted.cron = "@daily"
        wanted.timeZone = "Europe/Berlin"
        wanted.selector = "app in (a,b)"
        wanted.action = .snapshot
        wanted.paused = false
        #expect(
            try update([
                "n", "--retain=3", "--cron", "@Daily", "--time-zone", "Europe/Berlin",
                "--selector", "app in (a,b)", "--snapshot", "--resume",
            ]) == wanted)
        let paused = try update(["n", "--pause", "--all"])
        #expect(paused.hasPaused && paused.paused && paused.all && !paused.hasSelector)
        #expect(try update(["n", "--volume", "a", "--volume", "b"]).volumes == ["a", "b"])
        #expect(try update(["n", "--scrub"]).action == .scrub)
        #expect(try !update(["n", "--cron", "@daily"]).hasPaused)
    }

    @Test(arguments: [
        ([], "say what to change: --cron, --time-zone"),
        (["--retain", "0"], "1 to 1000 snapshots"),
        (["--retain", "1001"], "not 1001"), (["--retain", "-1"], "'-1' is invalid"),
        (["--cron", "61 * * * *"], "'61' is no minute"), (["--cron", "0 0 30 2 *"], "never comes"),
        (["--selector", ""], "the selector is empty"),
        (["--selector", "a in ()"], "selector, character 7: there is no value"),
        (["--all", "--volume", "v"], "say which volumes once"), (["--volume", "V"], "no name"),
        (["--all", "--selector", "a"], "say which volumes once"),
        (["--pause", "--resume"], "not both"), (["--snapshot", "--scrub"], "or scrubs"),
        (["--scrub", "--retain", "1"], "--retain goes with --snapshot"),
    ])
    func wrongUpdatesAreNamed(_ words: [String], _ what: String) {
        let error = #expect(throws: (any Error).self) { _ = try update(["n"] + words) }
        let message = error.map { Storagectl.message(for: $0) } ?? ""
        #expect(message.contains(what), "\(message)")
    }
}
