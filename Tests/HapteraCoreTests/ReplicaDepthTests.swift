import Testing

@testable import HapteraCore

/// Many layers that all know the same regions: what reading through them costs.
@Suite struct ReplicaDepthTests {
    private static let regions = 8

    /// One block of every region in each layer, another one each time, all of it in the tables;
    /// the head is the last layer. Block 255 is in none.
    private func deep(layers: Int) throws -> ReplicaBench {
        let bench = try ReplicaBench(regions: Self.regions)
        _ = try bench.attach()
        for layer in 1...layers {
            if layer > 1 { try bench.installNext(layers: layer) }
            for region in 0..<Self.regions {
                bench.write(
                    ReplicaBench.pattern(UInt64(layer * 16 + region)),
                    at: UInt64(region * Geometry.regionSize + layer * Geometry.blockSize),
                    epoch: bench.core.promise.rawValue)
                try bench.run()
            }
            try bench.flush(UInt64(layer + 1))
            try bench.tick(milliseconds: 20_000)
        }
        return bench
    }
    private func readAll(_ bench: ReplicaBench, block: Int) throws {
        for region in 0..<Self.regions {
            let first = region * Geometry.blocksPerRegion + block
            #expect(try bench.read(first, 1) != nil)
        }
    }
    /// Pages that are read meanwhile.
    private func loads(_ bench: ReplicaBench, _ body: () throws -> Void) rethrows -> Int {
        var count = 0
        bench.fault = { action in
            if case .read(.table, _, _, _, _, _) = action { count += 1 }
            return nil
        }
        try body()
        bench.fault = nil
        return count
    }

    /// The room in memory is not that of the day the copy was opened.
    @Test func layersThatComeFindRoomInMemory() throws {
        let bench = try deep(layers: 30)
        try readAll(bench, block: 255)
        #expect(try loads(bench) { try readAll(bench, block: 254) } == 0)
    }

    /// What has been seen through all layers is found without asking them again: other blocks of
    /// the region too, and after another snapshot.
    @Test func aRegionsLayersAreAskedOnce() throws {
        let bench = try deep(layers: 30)
        try bench.reopen()
        _ = try bench.attach(epoch: 40)
        try readAll(bench, block: 255)
        for layer in 2..<30 { bench.core.forget(LayerID(rawValue: UInt32(layer))) }
        #expect(
            try loads(bench) { for block in 1...31 { try readAll(bench, block: block) } } == 0)
        for layer in 1...30 {
            let seen = try bench.read(3 * Geometry.blocksPerRegion + layer, 1)
            #expect(seen == ReplicaBench.pattern(UInt64(layer * 16 + 3)), "layer \(layer)")
        }
        try bench.installNext(layers: 31)
        #expect(try loads(bench) { for block in 1...31 { try readAll(bench, block: block) } } == 0)
        #expect(bench.pool.inUse == 0 && bench.failure == nil)
    }

    /// Pages of layers further down are read beside the one that is waited for.
    @Test func pagesAreReadTogether() throws {
        let bench = try deep(layers: 30)
        try bench.reopen()
        _ = try bench.attach(epoch: 40)
        bench.send(.read, epoch: 40, offset: 255 * 4096, length: 4096)
        var rounds = 0
        while !bench.pending.isEmpty {
            rounds += 1
            for _ in 0..<bench.pending.count { try bench.performOne() }
        }
        #expect(rounds <= 7)
    }

    /// What is only read ahead costs nobody anything: neither a disk's error nor damage in a page
    /// that the read does without.
    @Test(arguments: [false, true]) func aPageReadAheadMayFail(isDamaged: Bool) throws {
        let bench = try deep(layers: 30)
        let sick = LayerID(rawValue: 20)
        if isDamaged {
            try bench.disk.memory(.table(sick)).slice(0, TablePage.pairSize).fill(0xa5)
        }
        var reads = 0
        bench.fault = { action in
            guard case .read(.table(sick), _, _, _, _, _) = action else { return nil }
            reads += 1
            return isDamaged ? nil : -5
        }
        try bench.reopen()
        _ = try bench.attach(epoch: 40)
        #expect(try bench.read(25, 1) == ReplicaBench.pattern(25 * 16))
        #expect(reads == 1 && bench.failure == nil)
        // Who needs it is told.
        let needed = bench.send(.read, epoch: 40, offset: 10 * 4096, length: 4096)
        try bench.run()
        #expect(isDamaged ? bench.failure != nil : bench.status(needed) == .ioError)
    }

    /// What was seen before is not what a frozen layer shows after a change.
    @Test(arguments: [2, 15, 29] as [UInt32])
    func aChangeOfAFrozenLayerIsSeen(layer: UInt32) throws {
        let bench = try deep(layers: 30)
        let epoch = bench.core.promise.rawValue
        for block in [200, Int(layer)] {
            try readAll(bench, block: block)
            let late = ReplicaBench.pattern(UInt64(7000 + block))
            bench.write(
                late, at: UInt64(block * Geometry.blockSize), epoch: epoch, sequence: 99,
                layer: layer)
            try bench.run()
            #expect(try bench.read(block, 1) == late)
            let absent = bench.send(
                .setState, epoch: epoch, offset: UInt64(block * Geometry.blockSize), length: 4096,
                sequence: 100, layer: layer)
            try bench.run()
            #expect(bench.status(absent) == .ok)
            #expect(try bench.read(block, 1) == ReplicaBench.zero(1))
        }
    }

    /// A layer that took in a larger one does not go where only itself would have room: what is
    /// written behind the end of a file grows it, durably or not (as seed 403123).
    @Test func whatALayerTookInMustFit() {
        let ids = (1...5).map { LayerID(rawValue: UInt32($0)) }
        var record = VolumeRecord(
            volume: ReplicaBench.volume, name: "vol", epoch: Epoch(9), nonce: 1,
            size: UInt64(200 * Geometry.regionSize), inSync: [])
        record.layers = ids
        record.growths = [
            .init(head: ids[2], sizeBefore: UInt64(100 * Geometry.regionSize))
        ]
        var chain = LayerChain(
            ids, regionCount: 200, rooms: [100, 200, 200, 200, 200])
        for region in 0..<50 as Range<UInt64> { chain.mark(ids[0], region) }
        for region in 0..<20 as Range<UInt64> { chain.mark(ids[1], region) }
        chain.mark(ids[2], 150)
        chain.change(LayerTree(), record) { _ in }
        chain.change(LayerTree(), record) { $0.retire(ids[1]) }
        #expect(chain.isDown(1))
        record.layers = [ids[0], ids[3], ids[4]]
        chain.change(LayerTree(), record) { $0.retire(ids[2]) }
        record.layers = [ids[3], ids[4]]
        chain.change(LayerTree(), record) { $0.retire(ids[0]) }
        #expect(chain.isDown(1) && !chain.isDown(0))
        chain.change(LayerTree(), record) { $0.remove(ids[2]) }
        #expect(!chain.isDown(0))
    }

    /// Layers go, up and down, under what was seen.
    @Test func mergesAreSeen() throws {
        let bench = try deep(layers: 12)
        var left = Set(1...12)
        for gone in [3, 11, 1, 7, 2, 8] {
            bench.deleted.insert(UInt32(gone))
            left.remove(gone)
            try bench.installNext()
            for round in 0..<4 {
                try readAll(bench, block: 255)
                for layer in 1...12 {
                    let seen = try bench.read(5 * Geometry.blocksPerRegion + layer, 1)
                    #expect(seen == ReplicaBench.pattern(UInt64(layer * 16 + 5)), "of \(layer)")
                }
                try bench.flush(UInt64(200 + gone * 10 + round))
                try bench.tick(milliseconds: 20_000)
            }
        }
        try bench.settle()
        #expect(bench.core.layers.map(\.rawValue) == left.sorted().map(UInt32.init))
        #expect(bench.pool.inUse == 0 && bench.failure == nil)
    }
}

extension ReplicaCore {
    /// As if other pages had taken the room of the layer's.
    fileprivate func forget(_ layer: LayerID) {
        for frame in 0..<cache.frames.count
        where cache.frames[frame].layer == layer && cache.list(of: Int32(frame)) == .clean {
            cache.release(Int32(frame))
        }
    }
}
