import Testing

@testable import HapteraCore

/// Bytes of before under blocks that hold nothing: they are seen by nobody, not even where a write
/// over them is torn.
@Suite struct ReplicaStaleTests {
    private let lowest = ReplicaFile.data(LayerID(rawValue: 1))

    private func reopened(
        _ disk: ReplicaTestDisk, boot: UInt64, _ mutations: MutationSet = []
    ) throws -> ReplicaBench {
        var options = ReplicaBench.options(boot: boot)
        options.mutations = mutations
        let next = try ReplicaBench(disk: disk, create: false, options: options)
        _ = try next.attach(epoch: next.core.promise.rawValue + 1)
        return next
    }

    /// A crash keeps a write's data and not its record, and nothing is there. The next write to the
    /// block is torn: it shows itself, or zero.
    @Test(arguments: [1, 2] as [UInt64], [false, true])
    func aCrashKeepsDataWithoutItsRecord(boot: UInt64, isKept: Bool) throws {
        let bench = try ReplicaBench()
        _ = try bench.attach()
        bench.write(ReplicaBench.pattern(1), at: 4096)
        try bench.run()
        let stale = ReplicaBench.pattern(2, blocks: 2)
        try bench.disk.memory(lowest).copy(from: stale, at: 3 * 4096)
        let next = try reopened(bench.disk, boot: boot, isKept ? .staleIsKept : [])
        #expect(try next.read(1, 1) == ReplicaBench.pattern(1))
        #expect(try next.read(2, 4) == ReplicaBench.zero(4))
        var random = TestRandom(seed: 5)
        bench.disk.cutPower(&random, keepPercent: 0)
        let beneath = try bench.disk.memory(lowest).slice(3 * 4096, 8192).bytes()
        #expect(beneath == (isKept ? stale : ReplicaBench.zero(2)))
    }

    /// A sector that takes nothing is no reason not to open.
    @Test func aBadSectorCostsNoReplica() throws {
        let bench = try ReplicaBench()
        _ = try bench.attach()
        bench.write(ReplicaBench.pattern(1), at: 4096)
        try bench.run()
        try bench.disk.memory(lowest).copy(from: ReplicaBench.pattern(2), at: 3 * 4096)
        bench.disk.refusesData = true
        let next = try reopened(bench.disk, boot: 2)
        #expect(try next.read(1, 3) == ReplicaBench.pattern(1) + ReplicaBench.zero(2))
    }

    /// Of a layer that a clone has as well, nothing is written.
    @Test func aSharedLayerIsLeftAsItIs() throws {
        let bench = try ReplicaBench()
        _ = try bench.attach()
        bench.write(ReplicaBench.pattern(1), at: 4096)
        try bench.run()
        try bench.settle()
        try bench.disk.memory(lowest).copy(from: ReplicaBench.pattern(2), at: 3 * 4096)
        let clone = ReplicaTestDisk()
        bench.disk.link([LayerID(rawValue: 1)], to: clone)
        _ = try reopened(bench.disk, boot: 2)
        #expect(bench.disk.violations.isEmpty)
    }
}
