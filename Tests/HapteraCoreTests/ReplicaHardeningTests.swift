import Testing

@testable import HapteraCore

/// Weak spots found by replaying crashes, or by thinking about them.
@Suite struct ReplicaHardeningTests {
    private let layer = LayerID(rawValue: 1)

    /// Cut right after the page of a region was written that was activated and never written to:
    /// its other slot, made shortly before, may be gone.
    @Test func aRegionDrainsOnlyWhenItsSlotsAreDurable() throws {
        for seed in 1...30 as ClosedRange<UInt64> {
            let bench = try ReplicaBench(seed: seed)
            _ = try bench.attach()
            bench.write(ReplicaBench.pattern(1), at: 0, sequence: 1)
            // Slots and activation, but the engine is gone before the write begins.
            try bench.performOne()
            bench.step(.disconnected(connection: 0))
            try bench.run()
            bench.now = bench.now.adding(milliseconds: 20_000)
            bench.step(.tick)
            while let next = bench.pending.first {
                try bench.performOne()
                if case .write(.table, _, _, _, _, _) = next { break }
            }
            var random = TestRandom(seed: seed)
            bench.disk.cutPower(&random, keepPercent: 50)
            try bench.reopen()
            #expect(try bench.attach(epoch: 2) != nil)
        }
    }

    /// A killed process leaves a page written and not synced; the log's tail must not pass the
    /// records that page replaces.
    @Test func aPageOfAKilledProcessIsSyncedBeforeTheTailMoves() throws {
        let bench = try ReplicaBench()
        _ = try bench.attach()
        let data = ReplicaBench.pattern(7, blocks: 100)
        bench.write(data, at: 0, sequence: 1)
        bench.send(.flush, sequence: 2)
        try bench.run()
        bench.send(.stable, sequence: 2, auxiliary: 1)
        bench.now = bench.now.adding(milliseconds: 20_000)
        bench.step(.tick)
        while let next = bench.pending.first {
            try bench.performOne()
            if case .write(.table, _, _, _, _, _) = next { break }
        }
        try bench.reopen()
        for _ in 0..<3 { try bench.tick() }
        var random = TestRandom(seed: 1)
        bench.disk.cutPower(&random, keepPercent: 0)
        try bench.reopen()
        _ = try bench.attach(epoch: 2)
        let read = bench.send(.read, epoch: 2, offset: 0, length: data.count)
        try bench.run()
        #expect(bench.reply(read)?.data == data)
    }

    /// At rest each slot of the manifest holds the newest: rot in one takes no promise back.
    @Test(arguments: [0, 1])
    func aRottenManifestSlotTakesNoPromiseBack(slot: Int) throws {
        for epochs in 1...2 as ClosedRange<UInt64> {
            let bench = try ReplicaBench()
            for epoch in 1...epochs {
                _ = try bench.attach(epoch: epoch, on: Int(epoch), engine: epoch)
            }
            try bench.disk.memory(.manifest)[slot * Manifest.slotSize + 100] ^= 4
            try bench.reopen()
            #expect(bench.core.promise == Epoch(epochs))
        }
    }

    /// A trim whose region drained, and then the process ended before the space was given back.
    @Test func spaceOwedByATrimComesBackAfterACrash() throws {
        let bench = try ReplicaBench()
        _ = try bench.attach()
        bench.write(ReplicaBench.pattern(3, blocks: 4), at: 0, sequence: 1)
        try bench.run()
        bench.send(
            .setState, length: 3 * 4096, sequence: 2, auxiliary: UInt64(BlockState.zero.rawValue))
        try bench.run()
        for isDrained in [false, true] {
            if isDrained {
                bench.send(.flush, epoch: 2, sequence: 3)
                try bench.run()
                bench.send(.stable, epoch: 2, sequence: 3, auxiliary: 2)
                bench.now = bench.now.adding(milliseconds: 20_000)
                bench.step(.tick)
                while bench.core.activeRegionCount > 0 { try bench.performOne() }
            }
            #expect(try bench.disk.nextAllocated(.data(layer), from: 0)?.lowerBound == 0)
            try bench.reopen()
            _ = try bench.attach(epoch: isDrained ? 3 : 2)
        }
        try bench.tick()
        // The one block that holds data is all that is left.
        #expect(try bench.disk.nextAllocated(.data(layer), from: 0)?.lowerBound == 3 * 4096)
        let read = bench.send(.read, epoch: 3, offset: 3 * 4096, length: 4096)
        try bench.run()
        #expect(bench.reply(read)?.data == ReplicaBench.pattern(6))
    }

    /// One stable point may have to free everything an engine has under way.
    @Test func theActivityLogHoldsAllRegionsOfAnEngine() {
        #expect(ReplicaOptions.activeRegionsDefault > EngineCore.outstandingMax)
    }
}
