import Testing

@testable import HapteraCore

/// One copy grows: room first, the size with an Install.
@Suite struct ReplicaGrowthTests {
    private let region = UInt64(Geometry.regionSize)

    private func install(
        _ bench: ReplicaBench, epoch: UInt64, size: UInt64, layers: Int = 0
    ) -> UInt64 {
        var record = bench.record(epoch: epoch, layers: layers)
        record.size = size
        let request = InstallRequest(engine: InstanceID(rawValue: 1), record: record)
        return bench.send(.install, epoch: epoch, table: request.encoded())
    }
    private func read(_ bench: ReplicaBench, _ offset: UInt64) throws -> [UInt8]? {
        let tag = bench.send(
            .read, epoch: bench.core.promise.rawValue, offset: offset, length: 4096)
        try bench.run()
        guard let reply = bench.reply(tag), reply.header.status == .ok else { return nil }
        return reply.data.isEmpty ? [UInt8](repeating: 0, count: 4096) : reply.data
    }

    @Test func theSizeComesWithTheInstall() throws {
        let bench = try ReplicaBench(regions: 2)
        _ = try bench.attach()
        bench.write(ReplicaBench.pattern(1), at: 0)
        try bench.run()
        let prepare = bench.send(.prepareSize, offset: 5 * region)
        try bench.run()
        #expect(bench.status(prepare) == .ok && bench.core.size == 2 * region)
        #expect(try bench.disk.size(.data(LayerID(rawValue: 1))) == 5 * region)
        // Room is not size.
        let early = bench.write(ReplicaBench.pattern(2), at: 4 * region)
        try bench.run()
        #expect(bench.status(early) == .invalid)
        // Behind the Install on its connection, before that is answered.
        let grown = install(bench, epoch: 2, size: 5 * region)
        let write = bench.write(ReplicaBench.pattern(3), at: 4 * region, epoch: 2)
        try bench.run()
        #expect(bench.status(grown) == .ok && bench.status(write) == .ok)
        #expect(bench.core.size == 5 * region)
        try bench.reopen()
        _ = try bench.attach(epoch: 3)
        #expect(bench.core.size == 5 * region)
        #expect(try read(bench, 4 * region) == ReplicaBench.pattern(3))
        #expect(try read(bench, 0) == ReplicaBench.pattern(1))
        // It never shrinks.
        let smaller = install(bench, epoch: 4, size: 2 * region)
        try bench.run()
        #expect(bench.status(smaller) == .invalid && bench.core.size == 5 * region)
    }

    /// Who was away when room was asked for makes it with the Install, in its own head, and new
    /// layers are made as large.
    @Test func anInstallAloneIsEnough() throws {
        let bench = try ReplicaBench(regions: 2)
        _ = try bench.attach()
        var record = bench.record(epoch: 2, layers: 2)
        record.growths = [.init(head: LayerID(rawValue: 1), sizeBefore: region)]
        record.growths = []
        record.size = 6 * region
        let tag = bench.send(
            .install, epoch: 2,
            table: InstallRequest(engine: InstanceID(rawValue: 1), record: record).encoded())
        try bench.run()
        #expect(bench.status(tag) == .ok)
        for layer in [1, 2] as [UInt32] {
            #expect(try bench.disk.size(.data(LayerID(rawValue: layer))) == 6 * region)
            #expect(
                try bench.disk.size(.table(LayerID(rawValue: layer)))
                    == ReplicaCore.tableSize(6 * region))
        }
        bench.write(ReplicaBench.pattern(4), at: 5 * region, epoch: 2)
        try bench.run()
        #expect(try read(bench, 5 * region) == ReplicaBench.pattern(4))
    }

    @Test func aFrozenLayerKeepsItsSize() throws {
        let bench = try ReplicaBench(regions: 2)
        _ = try bench.attach()
        let first = ReplicaBench.pattern(1)
        bench.write(first, at: region)
        try bench.run()
        bench.install(epoch: 2, layers: 2)
        try bench.run()
        var record = bench.record(epoch: 3)
        record.grow(to: 4 * region)
        let tag = bench.send(
            .install, epoch: 3,
            table: InstallRequest(engine: InstanceID(rawValue: 1), record: record).encoded())
        bench.write(ReplicaBench.pattern(2), at: 3 * region, epoch: 3)
        try bench.run()
        #expect(bench.status(tag) == .ok)
        #expect(try bench.disk.size(.data(LayerID(rawValue: 1))) == 2 * region)
        #expect(try bench.disk.size(.data(LayerID(rawValue: 2))) == 4 * region)
        try bench.reopen()
        record.epoch = Epoch(4)
        bench.hello()
        bench.send(
            .install, epoch: 4,
            table: InstallRequest(engine: InstanceID(rawValue: 1), record: record).encoded())
        try bench.run()
        // Through the chain, where the lower layer is shorter.
        #expect(try read(bench, 3 * region) == ReplicaBench.pattern(2))
        #expect(try read(bench, region) == first)
        #expect(try read(bench, 2 * region) == [UInt8](repeating: 0, count: 4096))
        let digest = bench.send(
            .digest, epoch: 4, offset: 3 * region, flags: FrameFlags.resync, layer: 1)
        try bench.run()
        #expect(bench.status(digest) == .ok)
    }

    /// The record forgets a layer's size with the layer; its files may still be there. (Seed 361.)
    @Test func aDeletedLayerMayBeShorterThanTheRecordKnows() throws {
        let bench = try ReplicaBench(regions: 2)
        _ = try bench.attach()
        bench.write(ReplicaBench.pattern(1), at: region)
        try bench.run()
        bench.install(epoch: 2, layers: 2)
        try bench.run()
        var record = bench.record(epoch: 3)
        record.grow(to: 4 * region)
        func install() {
            bench.send(
                .install, epoch: record.epoch.rawValue,
                table: InstallRequest(engine: InstanceID(rawValue: 1), record: record).encoded())
        }
        install()
        try bench.run()
        record.epoch = Epoch(4)
        record.layers.removeFirst()
        record.snapshots = []
        record.forgetGrowths()
        install()
        try bench.run()
        #expect(bench.core.retiredLayerCount == 1 && record.growths == [])
        try bench.reopen()
        #expect(bench.core.retiredLayerCount == 1)
        record.epoch = Epoch(5)
        bench.hello()
        install()
        try bench.run()
        for round in 0..<8 as Range<UInt64> {
            bench.send(.flush, epoch: 5, sequence: 10 + round)
            try bench.run()
            bench.send(.stable, epoch: 5, sequence: 10 + round, auxiliary: 5)
            try bench.tick(milliseconds: 20_000)
        }
        #expect(bench.core.retiredLayerCount == 0)
        #expect(try read(bench, region) == ReplicaBench.pattern(1))
    }

    @Test(arguments: [-28, -27])
    func whatCannotGrowSaysSoAndGoesOn(_ error: Int) throws {
        let bench = try ReplicaBench(regions: 2)
        _ = try bench.attach()
        bench.fault = { action in if case .extend = action { error } else { nil } }
        let prepare = bench.send(.prepareSize, offset: 9 * region)
        try bench.run()
        #expect(bench.status(prepare) == (error == -28 ? .noSpace : .ioError))
        let tag = install(bench, epoch: 2, size: 9 * region)
        try bench.run()
        #expect(bench.status(tag) == (error == -28 ? .noSpace : .ioError))
        #expect(bench.failure == nil && bench.core.size == 2 * region)
        bench.fault = nil
        let again = install(bench, epoch: 3, size: 9 * region)
        bench.write(ReplicaBench.pattern(5), at: 8 * region, epoch: 3)
        try bench.run()
        #expect(bench.status(again) == .ok)
        #expect(try read(bench, 8 * region) == ReplicaBench.pattern(5))
    }

    @Test func aFailedSyncOfRoomEndsTheReplica() throws {
        let bench = try ReplicaBench(regions: 2)
        _ = try bench.attach()
        bench.fault = { action in
            if case .sync(.table, _) = action { -5 } else { nil }
        }
        let prepare = bench.send(.prepareSize, offset: 9 * region)
        try bench.run()
        #expect(bench.failure != nil && bench.status(prepare) == nil)
    }

    @Test func absurdSizesAreRefused() throws {
        let bench = try ReplicaBench(regions: 2)
        _ = try bench.attach()
        for size in [0, 4095, Geometry.volumeSizeMax + 4096, UInt64.max - 4095] {
            let tag = bench.send(.prepareSize, offset: size)
            try bench.run()
            #expect(bench.status(tag) == .invalid)
        }
        // Smaller, or none at all: it has that much.
        let tag = bench.send(.prepareSize, offset: 4096)
        try bench.run()
        #expect(bench.status(tag) == .ok && bench.core.size == 2 * region)
    }

    /// More regions in memory than the small volume had frames for.
    @Test func theCacheGrowsToo() throws {
        let bench = try ReplicaBench(regions: 1, options: ReplicaBench.options(active: 400))
        _ = try bench.attach()
        bench.write(ReplicaBench.pattern(1), at: 0)
        try bench.run()
        #expect(bench.core.cache.frames.count == 73)
        _ = install(bench, epoch: 2, size: 100 * region)
        try bench.run()
        #expect(bench.core.cache.frames.count == 9 * 100 + 64)
        for number in 0..<100 as Range<UInt64> {
            bench.write(
                ReplicaBench.pattern(number), at: number * region + 4096, epoch: 2,
                sequence: number + 2)
        }
        try bench.run()
        #expect(bench.core.activeRegionCount == 100)
        for number in 0..<100 as Range<UInt64> {
            let found = try read(bench, number * region + 4096)
            #expect(found == ReplicaBench.pattern(number))
        }
        #expect(try read(bench, 0) == ReplicaBench.pattern(1))
    }

    /// The power fails at any point of a growth: the old size or the new one, and what was flushed.
    @Test func anyCutLeavesOneSizeOrTheOther() throws {
        var grew = 0
        for seed in 1...8 as ClosedRange<UInt64> {
            for limit in stride(from: 1, through: 14, by: 1) {
                if try cut(seed: seed, after: limit, mutations: MutationSet()) { grew += 1 }
            }
        }
        #expect(grew > 20)
    }
    @Test func roomThatIsNotSyncedIsMissed() throws {
        var isCaught = false
        for seed in 1...30 as ClosedRange<UInt64> where !isCaught {
            for limit in 1...14 where !isCaught {
                do {
                    _ = try cut(seed: seed, after: limit, mutations: .growthNotSynced)
                } catch { isCaught = true }
            }
        }
        #expect(isCaught)
    }

    /// True: the copy has the new size.
    private func cut(seed: UInt64, after limit: Int, mutations: MutationSet) throws -> Bool {
        var options = ReplicaBench.options()
        options.mutations = mutations
        let bench = try ReplicaBench(regions: 2, options: options, seed: seed)
        _ = try bench.attach()
        let first = ReplicaBench.pattern(seed)
        bench.write(first, at: region)
        bench.send(.flush, sequence: 2)
        try bench.run()
        bench.disk.changesMax = bench.disk.changeCount + limit
        let tag = install(bench, epoch: 2, size: 4 * region)
        bench.write(ReplicaBench.pattern(seed + 100), at: 3 * region, epoch: 2, sequence: 3)
        let flush = bench.send(.flush, epoch: 2, sequence: 4)
        do throws(StorageError) { try bench.run() } catch {}
        let (isInstalled, isFlushed) = (bench.status(tag) == .ok, bench.status(flush) == .ok)
        var random = TestRandom(seed: seed * 31 + UInt64(limit))
        bench.disk.cutPower(&random, keepPercent: random.below(3) * 50)
        try bench.reopen()
        _ = try bench.attach(epoch: 3)
        let size = bench.core.size
        #expect(size == 4 * region || (size == 2 * region && !isInstalled))
        #expect(try read(bench, region) == first)
        if isFlushed {
            #expect(try read(bench, 3 * region) == ReplicaBench.pattern(seed + 100))
        }
        return size == 4 * region
    }
}
