import Foundation
import HapteraAPI
import HapteraCore
import Logging
import Synchronization
import Testing

@testable import HapteraControl

/// From what engines count of damaged blocks to events and a condition, over the stand-ins of
/// `SnapshotTests`.
@Suite struct DamageTests {
    typealias World = SnapshotTests.World
    private static let minute = MetadataStore.damageEventsMilliseconds

    private static func finding(
        _ number: UInt64, _ outcome: String, _ offset: UInt64, _ replicas: [String] = []
    ) -> Haptera_V1_DamageFinding {
        var finding = Haptera_V1_DamageFinding()
        finding.number = number
        finding.outcome = outcome
        finding.offset = offset
        finding.blocks = 1
        finding.replicaIds = replicas
        return finding
    }

    private static func say(
        _ world: World, instance: UInt64 = 7, repaired: UInt64 = 0, lost: UInt64 = 0,
        _ findings: [Haptera_V1_DamageFinding]
    ) async throws {
        var report = Haptera_V1_DamageReport()
        report.count = findings.last?.number ?? 0
        report.blocksRepaired = repaired
        report.blocksLost = lost
        report.findings = findings
        world.damage.withLock { $0 = (instance, report) }
        try await world.report()
    }
    private static func events(_ world: World, _ kind: String = "BlocksRepaired") async throws
        -> [String]
    {
        try await world.events.filter { $0.kind == kind }.map(\.message)
    }

    @Test func theFirstIsToldAtOnceAndTheRestInSum() async throws {
        let world = try await World()
        let row = try #require(try await world.test.store.volume(named: "vol").replicas.first)
        #expect(try await Self.events(world).isEmpty)
        let first = Self.finding(1, "repaired", 8192, [row.id])
        try await Self.say(world, repaired: 1, [first])
        let words =
            "1 block was damaged and rewritten from another replica: first offset 8192 "
            + "(replica \(row.id) on node a)"
        #expect(try await Self.events(world) == [words])
        let event = try #require(try await world.events.last { $0.kind == "BlocksRepaired" })
        #expect(event.subject == "volume/vol" && event.actor == "node/a")

        // Again the same; then more, which waits, however often it is looked at.
        try await world.report()
        world.test.clock.advance(Self.minute - 1)
        try await Self.say(world, repaired: 3, [first, Self.finding(2, "repaired", 4096)])
        try await Self.say(
            world, repaired: 9,
            [first, Self.finding(2, "repaired", 4096)]
                + (3...8).map { Self.finding($0, "repaired", $0 << 20) })
        try await world.test.store.tellDamage()
        #expect(try await Self.events(world) == [words])
        world.test.clock.advance(1)
        try await world.test.store.tellDamage()
        try await world.test.store.tellDamage()
        let offsets = [4096, 3 << 20, 4 << 20, 5 << 20].map { "offset \($0)" }
        #expect(
            try await Self.events(world).dropFirst() == [
                "8 blocks were damaged and rewritten from another replica: first "
                    + offsets.joined(separator: ", ")
            ])
        #expect(try await world.controller.volume(named: "vol").conditions.isEmpty)
    }

    /// The sums that wait outlive the controller and the engine, and nothing is told twice.
    @Test func noRestartLosesOrDoublesAny() async throws {
        let world = try await World()
        try await Self.say(world, repaired: 1, [Self.finding(1, "repaired", 0)])
        try await Self.say(
            world, repaired: 2, (1...2).map { Self.finding($0, "repaired", $0 << 20) })
        let quiet = Logger(label: "test") { _ in SwiftLogNoOpLogHandler() }
        let next = Controller(store: world.test.store, recordService: "h:1", logger: quiet)
        var report = Haptera_V1_NodeReport()
        report.name = "a"
        report.nodeID = hexadecimal(1)
        var engine = Haptera_V1_EngineReport()
        engine.volumeID = try await world.test.store.volume(named: "vol").volume.id
        engine.clientGeneration = 1
        engine.state = .serving
        let damage = try #require(world.damage.withLock { $0 })
        (engine.instance, engine.damage) = damage
        report.engines = [engine]
        try await next.report(report)
        // The next engine begins at 0: as much as the one before is more all the same.
        engine.instance = 8
        report.engines = [engine]
        try await next.report(report)
        try await next.report(report)
        world.test.clock.advance(Self.minute)
        try await next.store.tellDamage()
        let told = try await Self.events(world)
        #expect(told.map { $0.prefix(8) } == ["1 block ", "3 blocks"])
        // That of an attachment that is over says nothing any more.
        engine.clientGeneration = 2
        engine.instance = 9
        report.engines = [engine]
        world.test.clock.advance(Self.minute)
        try await next.report(report)
        #expect(try await Self.events(world) == told)
    }

    @Test func lostBlocksAreAConditionUntilALaterScrubFindsNone() async throws {
        let world = try await World()
        func conditions() async throws -> [Haptera_V1_VolumeCondition] {
            try await world.controller.volume(named: "vol").conditions
        }
        func scrub(lost: UInt64 = 0, skipped: UInt64 = 0, after act: () async throws -> Void = {})
            async throws
        {
            let noted = try await world.test.store.requestScrub("vol")
            world.test.clock.advance(1)
            try await act()
            var progress = try #require(noted.scrub?.value)
            (progress.lost, progress.skipped) = (lost, skipped)
            var facts = ReportedFacts()
            facts.engines = [
                .init(
                    volumeID: noted.volume.id, clientGeneration: 1, hasServed: true,
                    isDetached: false, scrub: ScrubFact(progress: progress, isFinished: true))
            ]
            _ = try await world.test.store.apply(facts, from: "a")
            world.test.clock.advance(1)
        }
        let loss = Self.finding(1, "lost", 4096, ["00000000000000ff"])
        try await scrub { try await Self.say(world, lost: 1, [loss]) }
        #expect(try await conditions() == [.lostBlocks], "this scrub may have passed it before")
        #expect(
            try await Self.events(world, "BlocksLost") == [
                "1 block has no good copy on any replica in sync: first offset 4096 (replica "
                    + "00000000000000ff); reads there fail: write them anew or restore them from a "
                    + "backup, then 'storagectl volume scrub vol' tells whether any are left"
            ])
        try await scrub(skipped: 1)
        #expect(try await conditions() == [.lostBlocks])
        try await scrub()
        #expect(try await conditions().isEmpty)
        try await scrub(lost: 2)
        #expect(try await conditions() == [.lostBlocks])
        // It is about the volume, and outlives its engine.
        try await world.report(.serving)
        #expect(try await conditions() == [.lostBlocks])
    }

    @Test func whatAnEngineSaysIsReported() throws {
        #expect(DamageWords.report(["state": "serving"]) == nil)
        let report = try #require(
            DamageWords.report([
                "damage": "12", "damage.repaired": "20", "damage.lost": "1",
                "damage.damaged": "2", "damage.12": "lost:8192:1:00000000000000aa",
                "damage.9": "repaired:4096:3:00000000000000aa,00000000000000bb",
                "damage.10": "damaged:0:2:", "damage.11": "nonsense",
            ]))
        #expect(report.count == 12 && report.blocksRepaired == 20 && report.blocksDamaged == 2)
        #expect(report.findings.map(\.number) == [9, 10, 12])
        #expect(report.findings.map(\.offset) == [4096, 0, 8192])
        #expect(report.findings[0].replicaIds == ["00000000000000aa", "00000000000000bb"])
        #expect(report.findings[1].replicaIds.isEmpty)
        var engine = Haptera_V1_EngineReport()
        engine.damage = report
        #expect(DamageFact(engine) == nil, "nobody knows whose counters these are")
        engine.instance = 5
        #expect(DamageFact(engine)?.sums == [.repaired: 20, .lost: 1, .damaged: 2])
    }

    @Test func aNodeAgentPassesItOn() async throws {
        let bench = try NodeAgentBench()
        bench.want(.create)
        let replica = try await bench.untilReplica(.running)
        bench.want(.attach, addresses: [replica.address], attachment: 1)
        let engine = try await bench.untilEngine(.serving)
        #expect(!engine.hasDamage && engine.instance != 0)
        let path = bench.directory.path + "/run/e-0000000000000001.sock.damage"
        try "damage=1\ndamage.lost=1\ndamage.1=lost:0:1:00000000000000aa\n".write(
            toFile: path, atomically: true, encoding: .utf8)
        bench.now += 1000
        let told = try await bench.until("the damage") { $0.engines.first?.hasDamage == true }
        #expect(told.engines[0].damage.findings.map(\.outcome) == ["lost"])
    }
}
