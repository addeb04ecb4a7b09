import Foundation
import Glibc
import HapteraAPI
import HapteraCore
import Synchronization
import Testing

@testable import HapteraControl

/// A scrub from the request to what it found, over the stand-ins of `SnapshotTests`.
@Suite struct ScrubTests {
    typealias World = SnapshotTests.World

    private func scrub(_ world: World, _ name: String = "vol") async throws -> Haptera_V1_Volume {
        var request = Haptera_V1_ScrubVolumeRequest()
        request.name = name
        return try await world.controller.scrubVolume(request)
    }

    private func say(_ world: World, _ state: String, region: UInt64 = 4, bad: UInt64 = 2) {
        world.scrub.withLock {
            $0 = Haptera_V1_ScrubReport()
            $0?.id = "1"
            $0?.state = state
            $0?.regionsDone = region
            $0?.regionsTotal = 1024
            $0?.blocksBad = bad
            $0?.blocksRepaired = bad
        }
        world.controller.changes.notify()
    }
    private func region(_ world: World) async throws -> UInt64? {
        try await world.test.store.volume(named: "vol").scrub?.value?.region
    }

    @Test func theEngineIsToldAndItsReportsAreShown() async throws {
        let world = try await World()
        say(world, "running")
        world.live()
        let caller = Caller(actor: "ann@host", peer: "ipv4:10.0.0.1:5")
        let volume = try await Caller.$current.withValue(caller) { try await scrub(world) }
        #expect(volume.scrub.state == .running && volume.scrub.regionsDone == 4)
        let requested = try #require(try await world.events.first { $0.kind == "ScrubRequested" })
        #expect(requested.subject == "volume/vol" && requested.actor == "ann@host")
        // One that is under way goes on.
        let id = try await world.test.store.volume(named: "vol").scrub?.value?.id
        _ = try await scrub(world)
        #expect(try await world.test.store.volume(named: "vol").scrub?.value?.id == id)
        #expect(try await world.count("ScrubRequested") == 1)

        for (state, done) in [("waiting", 5 as UInt64), ("finished", 9)] {
            say(world, state, region: done)
            try await world.report()
            let scrub = try await world.controller.volume(named: "vol").scrub
            #expect("\(scrub.state)" == state && scrub.regionsDone == done)
            #expect(scrub.blocksBad == 2)
        }
        // Told once.
        try await world.report()
        let ends = try await world.events.filter { $0.kind == "ScrubFinished" }
        #expect(
            ends.map(\.message) == [
                "0 blocks checked, 2 bad, 2 repaired, 0 lost, 0 regions skipped"
            ])
        #expect(ends.map(\.subject) == ["volume/vol"])
        // The next one is another.
        say(world, "running")
        _ = try await scrub(world)
        #expect(try await world.test.store.volume(named: "vol").scrub?.value?.id != id)
    }

    /// The engine of an attached volume does not say what its scrub waits for.
    @Test func whatAScrubBesideClientsWaitsFor() async throws {
        let world = try await World()
        say(world, "running")
        world.live()
        _ = try await scrub(world)
        func reason() async throws -> String {
            try await world.report()
            return try await world.controller.volume(named: "vol").scrub.reason
        }
        #expect(try await reason() == "")
        say(world, "waiting")
        #expect(
            try await reason()
                == "its engine does something else first: a takeover, or a snapshot")
        let lost = try #require(try await world.record.inSync.last).replica.text
        #expect(try await world.swap(.removal) { $0.inSync.removeLast() } == .swapped)
        #expect(try await reason() == "replica \(lost) on node c is absent")
    }

    /// A detached volume gets an engine for it. Who attaches meanwhile waits for nothing, and his
    /// engine goes on with it from where it was, on another node; so does the next one without
    /// clients when the volume is detached again.
    @Test func itGoesOnWhateverEngineThereIs() async throws {
        let world = try await World(attached: false)
        world.live()
        let noted = try await scrub(world)
        #expect(noted.state == .detached && noted.scrub.state == .waiting)
        #expect(noted.scrub.reason == "it is scrubbed when others on its nodes have been")
        say(world, "running", region: 300)
        for task in try await world.controller.tendScrubs() { await task.value }
        #expect(try await world.phase(on: "a") == .maintain)
        let scrubbed = try await world.controller.volume(named: "vol")
        #expect(scrubbed.state == .detached && scrubbed.reason == "it is being scrubbed")
        #expect(scrubbed.scrub.state == .running && scrubbed.scrub.reason.isEmpty)
        // Nobody ends it, and it is not begun twice.
        try await world.controller.tendMaintenances()
        #expect(try await world.controller.tendScrubs().isEmpty)
        #expect(try await world.phase(on: "a") == .maintain)
        #expect(try await region(world) == 0, "noted too often")

        _ = try await world.controller.attach("vol", node: "b")
        try await world.until { $0.volume.attachedNode == "b" && !$0.volume.isMaintained }
        #expect(try await region(world) == 300)
        let wanted = try await world.controller.desired(for: "b", nodeID: hexadecimal(2))
        #expect(ScrubProgress(text: wanted.engines[0].scrub)?.region == 300)
        say(world, "running", region: 500)
        try await world.until { $0.volume.servedGeneration == 2 }
        #expect(try await world.controller.tendScrubs().isEmpty)

        try await world.report()
        _ = try await world.controller.detach("vol")
        try await world.untilDetached()
        #expect(try await region(world) == 500)
        for task in try await world.controller.tendScrubs() { await task.value }
        say(world, "finished", region: 1024)
        try await world.until { $0.scrub?.isFinished == true }
        try await world.controller.tendMaintenances()
        try await world.untilDetached()
        let done = try await world.controller.volume(named: "vol")
        #expect(done.scrub.state == .finished && done.scrub.blocksRepaired == 2)
        #expect(done.scrub.regionsDone == 1024 && done.scrub.regionsTotal == 1024)
        #expect(try await world.count("ScrubRequested") == 1)
        #expect(try await world.count("ScrubFinished") == 1)
        #expect(try await world.record.isClean)
        #expect(try await world.controller.tendScrubs().isEmpty)
    }

    /// Each half minute, should the node be lost; what is older or another's is not taken.
    @Test func howFarItIsIsNoted() async throws {
        let world = try await World()
        say(world, "running", region: 10)
        world.live()
        _ = try await scrub(world)
        #expect(try await region(world) == 0)
        world.test.clock.advance(MetadataStore.scrubNotesMilliseconds)
        try await world.report()
        #expect(try await region(world) == 10)
        world.test.clock.advance(MetadataStore.scrubNotesMilliseconds)
        say(world, "running", region: 9)
        try await world.report()
        #expect(try await region(world) == 10)
    }

    /// It gives its turn away, and has it again later.
    @Test func oneThatGetsNowhereHoldsNoEngine() async throws {
        let world = try await World(attached: false)
        world.live()
        say(world, "waiting", region: 7)
        _ = try await scrub(world)
        for task in try await world.controller.tendScrubs() { await task.value }
        try await world.report(obeyingOn: ["a", "b", "c"])
        _ = try await world.controller.tendScrubs()
        for wait in [DetachedScrubs.stuckMilliseconds - 1, 1] {
            #expect(try await world.phase(on: "a") == .maintain)
            world.test.clock.advance(wait)
            try await world.report(obeyingOn: ["a", "b", "c"])
            #expect(try await world.controller.tendScrubs().isEmpty)
        }
        try await world.untilDetached()
        #expect(try await region(world) == 7)
        #expect(try await world.controller.tendScrubs().isEmpty)
        world.test.clock.advance(DetachedScrubs.stuckMilliseconds)
        try await world.report(obeyingOn: ["a", "b", "c"])
        for task in try await world.controller.tendScrubs() { await task.value }
        #expect(try await world.phase(on: "a") == .maintain)
    }

    @Test func whatCannotBeScrubbedIsSaid() async throws {
        let world = try await World(attached: false)
        #expect(try await world.swap(.takeover) { $0.isClean = false } == .swapped)
        let error = await #expect(throws: ControlError.self) { _ = try await scrub(world) }
        #expect(error?.code == .precondition)
        #expect(
            error?.message
                == "volume 'vol' cannot be scrubbed: it is not attached, and its last engine did "
                + "not leave in order: attach it first: storagectl volume attach vol")
        #expect(try await world.test.store.volume(named: "vol").scrub == nil)
        let unknown = await #expect(throws: ControlError.self) {
            _ = try await scrub(world, "other")
        }
        #expect(unknown?.code == .notFound)
    }
}

/// Whose turn it is.
@Suite struct DetachedScrubTests {
    private func entry(
        _ name: String, on nodes: Set<String>, since: Int64,
        _ state: DetachedScrubs.Entry.State = .due, isRunning: Bool = false
    ) -> DetachedScrubs.Entry {
        .init(id: name, name: name, nodes: nodes, since: since, state: state, isRunning: isRunning)
    }
    private func next(
        _ scrubs: DetachedScrubs, _ entries: [DetachedScrubs.Entry], now: Int64 = 0
    ) -> [String] {
        scrubs.next(entries, now: now).map(\.name)
    }

    @Test func oneAtATimeOnEachNode() {
        var scrubs = DetachedScrubs()
        let entries = [
            entry("a", on: ["1", "2"], since: 3), entry("b", on: ["2", "3"], since: 2),
            entry("c", on: ["3", "4"], since: 4), entry("d", on: ["5"], since: 9),
        ]
        #expect(next(scrubs, entries) == ["b", "d"])
        scrubs.beginning = ["b"]
        #expect(next(scrubs, entries) == ["d"])
        scrubs.beginning = []
        let held = [entry("b", on: ["2", "3"], since: 2, .held)]
        #expect(next(scrubs, held + entries.filter { $0.name != "b" }) == ["d"])
        // That of an attached volume counts while it does something.
        let attached = entry("x", on: ["5", "1"], since: 0, .attached, isRunning: true)
        #expect(next(scrubs, entries + [attached]) == ["b"])
        let waiting = entry("x", on: ["5", "1"], since: 0, .attached)
        #expect(next(scrubs, entries + [waiting]) == ["b", "d"])
        // Nor does one that cannot be begun keep others waiting.
        let hindered = entry("x", on: ["5", "1"], since: 0, .hindered)
        #expect(next(scrubs, entries + [hindered]) == ["b", "d"])
    }

    @Test func oneThatGivesUpLetsOthersHaveItsTurn() {
        var scrubs = DetachedScrubs()
        let held = entry("a", on: ["1"], since: 1, .held)
        var running = held
        running.isRunning = true
        scrubs.began("a", now: 0)
        let stuck = [(running, 60_000 as Int64), (held, 119_999), (held, 120_000)].map {
            scrubs.isStuck($0.0, now: $0.1)
        }
        #expect(stuck == [false, false, true])
        scrubs.giveUp("a", now: 120_000)
        let entries = [entry("a", on: ["1"], since: 1), entry("b", on: ["1"], since: 2)]
        #expect(next(scrubs, entries, now: 120_000) == ["b"])
        #expect(next(scrubs, entries, now: 180_000) == ["a"])
    }
}

/// What a node's agent has its engine do.
@Suite struct EngineTaskTests {
    private static let volumeID = "00000000000000010000000000000002"

    private func servingBench() async throws -> (NodeAgentBench, Haptera_V1_EngineReport) {
        let bench = try NodeAgentBench()
        bench.want(.create)
        let replica = try await bench.untilReplica(.running)
        bench.want(.attach, addresses: [replica.address], attachment: 1)
        return (bench, try await bench.untilEngine(.serving))
    }
    /// It outlives the engine that began it, and goes on from where it is known to be.
    @Test func engineAfterEngineGoesOnWithAScrub() async throws {
        let (bench, engine) = try await servingBench()
        #expect(!engine.hasScrub)
        bench.desired.engines[0].scrub = "7:3:0:0:0:0:0"
        let running = try await bench.until("scrub") { $0.engines.first?.hasScrub == true }
        #expect(try await bench.engineStatus["scrub"] == "7:3:0:0:0:0:0")
        #expect(running.engines[0].scrub.state == "running")
        #expect(running.engines[0].scrub.progress == "7:3:0:0:0:0:0")
        #expect(running.engines[0].scrub.regionsTotal == 9)
        // One at a time, and one that is under way is left alone.
        for wanted in ["7:2:0:0:0:0:0", "8:0:0:0:0:0:0", ""] {
            bench.desired.engines[0].scrub = wanted
            for _ in 0..<3 { try await bench.step() }
            #expect(try await bench.engineStatus["scrub"] == "7:3:0:0:0:0:0")
        }

        bench.desired.engines[0].scrub = "7:2:0:0:0:0:0"
        kill(engine.pid, SIGKILL)
        try await bench.untilGone(engine.pid)
        _ = try await bench.until("another engine") {
            $0.engines.first?.state == .serving && $0.engines.first?.pid != engine.pid
        }
        // The engine's last word is newer than what was noted of it.
        for _ in 0..<200 {
            if try await bench.engineStatus["scrub"] == "7:3:0:0:0:0:0" { break }
            try await bench.step()
        }
        #expect(try await bench.engineStatus["scrub"] == "7:3:0:0:0:0:0")

        // Ended: it is not begun again, and the next one is another.
        let socket = bench.directory.path + "/run/e-0000000000000001.sock"
        #expect(FileManager.default.createFile(atPath: socket + ".scrubbed", contents: nil))
        bench.now += 1000
        _ = try await bench.until("its end") { $0.engines.first?.scrub.state == "finished" }
        for _ in 0..<3 { try await bench.step() }
        #expect(try await bench.engineStatus["scrub"] == "7:3:0:0:0:0:0")
        bench.desired.engines[0].scrub = "8:0:0:0:0:0:0"
        try await bench.step()
        #expect(try await bench.engineStatus["scrub"] == "8:0:0:0:0:0:0")
    }

    @Test func aGrowthIsToldToTheEngine() async throws {
        let (bench, _) = try await servingBench()
        var task = Haptera_V1_AgentTask()
        task.growVolume.volumeID = Self.volumeID
        task.growVolume.clientGeneration = 1
        task.growVolume.sizeBytes = 2 << 30
        task.growVolume.timeoutMilliseconds = 5000
        let grown = await bench.agent.perform(task)
        #expect(grown.error.isEmpty)
        task.growVolume.sizeBytes = 2 << 40
        let refused = await bench.agent.perform(task)
        #expect(refused.error == "replica 1 cannot have a file of that size")
        task.growVolume.clientGeneration = 2
        let other = await bench.agent.perform(task)
        #expect(other.error.hasPrefix("no engine serves volume 'vol' there") && !other.inDoubt)
    }
}
