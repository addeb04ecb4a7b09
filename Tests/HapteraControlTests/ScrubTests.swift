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

    @Test func theEngineIsAskedAndItsReportsAreShown() async throws {
        let world = try await World()
        let caller = Caller(actor: "ann@host", peer: "ipv4:10.0.0.1:5")
        let volume = try await Caller.$current.withValue(caller) { try await scrub(world) }
        #expect(!volume.engine.hasScrub)
        let asked = world.askedToScrub.withLock { $0 }
        let stored = try await world.test.store.volume(named: "vol")
        #expect(asked.map(\.volumeID) == [stored.volume.id])
        #expect(asked.map(\.clientGeneration) == [1])
        let requested = try #require(try await world.events.first { $0.kind == "ScrubRequested" })
        #expect(requested.subject == "volume/vol" && requested.actor == "ann@host")

        for (state, done) in [("running", 4 as UInt64), ("waiting", 4), ("finished", 9)] {
            world.scrub.withLock {
                $0 = Haptera_V1_ScrubReport()
                $0?.id = "1"
                $0?.state = state
                $0?.regionsDone = done
                $0?.regionsTotal = 9
                $0?.blocksBad = 2
                $0?.blocksRepaired = 2
            }
            try await world.report()
            let scrub = try await world.controller.volume(named: "vol").engine.scrub
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
    }

    @Test func onlyAnAttachedVolumeCanBeAsked() async throws {
        let world = try await World(attached: false)
        let error = await #expect(throws: ControlError.self) { _ = try await scrub(world) }
        #expect(error?.code == .precondition)
        #expect(
            error?.message
                == "volume 'vol' is not attached, and only its engine can scrub it: attach it "
                + "first: storagectl volume attach vol")
        let unknown = await #expect(throws: ControlError.self) {
            _ = try await scrub(world, "other")
        }
        #expect(unknown?.code == .notFound)
        #expect(world.askedToScrub.withLock { $0.isEmpty })
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
    private func scrub(generation: UInt64 = 1) -> Haptera_V1_AgentTask {
        var task = Haptera_V1_AgentTask()
        task.scrubVolume.volumeID = Self.volumeID
        task.scrubVolume.clientGeneration = generation
        return task
    }

    /// It outlives the engine that began it.
    @Test func anotherEngineGoesOnWithAScrub() async throws {
        let (bench, engine) = try await servingBench()
        #expect(!engine.hasScrub)
        let wrong = await bench.agent.perform(scrub(generation: 2))
        #expect(wrong.error == "no engine serves the volume")
        let begun = await bench.agent.perform(scrub())
        #expect(begun.error.isEmpty)
        let words = try #require(try await bench.engineStatus["scrub"])
        #expect(words.hasSuffix(":0:0:0:0:0:0"))
        // One that is under way goes on.
        let again = await bench.agent.perform(scrub())
        #expect(again.error.isEmpty)
        #expect(try await bench.engineStatus["scrub"] == words)
        let running = try await bench.until("scrub") { $0.engines.first?.hasScrub == true }
        #expect(running.engines[0].scrub.state == "running")
        #expect(running.engines[0].scrub.regionsTotal == 9)

        kill(engine.pid, SIGKILL)
        try await bench.untilGone(engine.pid)
        _ = try await bench.until("another engine") {
            $0.engines.first?.state == .serving && $0.engines.first?.pid != engine.pid
        }
        for _ in 0..<200 {
            if try await bench.engineStatus["scrub"] == words { break }
            try await bench.step()
        }
        #expect(try await bench.engineStatus["scrub"] == words)

        // Ended: the next one is another.
        let socket = bench.directory.path + "/run/e-0000000000000001.sock"
        #expect(FileManager.default.createFile(atPath: socket + ".scrubbed", contents: nil))
        _ = try await bench.until("its end") { $0.engines.first?.scrub.state == "finished" }
        let next = await bench.agent.perform(scrub())
        #expect(next.error.isEmpty)
        #expect(try await bench.engineStatus["scrub"] != words)
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
        #expect(other.error == "no engine serves the volume" && !other.inDoubt)
    }
}
