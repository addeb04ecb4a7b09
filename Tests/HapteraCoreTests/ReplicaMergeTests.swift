import Testing

@testable import HapteraCore

/// Deleted layers: what they hold goes to their heirs, whatever happens meanwhile.
@Suite struct ReplicaMergeTests {
    var block: Int { ReplicaBench.block }

    @Test(arguments: [[1], [2], [1, 2]] as [Set<UInt32>], [false, true])
    func whatIsSeenStaysAndTheLayerGoes(deleted: Set<UInt32>, isReopened: Bool) throws {
        let (bench, seen) = try ReplicaBench.threeLayers()
        bench.deleted = deleted
        try bench.installNext()
        func check() throws {
            for (layer, expected) in seen where !deleted.contains(layer) {
                #expect(try bench.read(0, 8, layer: layer) == expected, "layer \(layer)")
            }
        }
        try check()
        #expect(try bench.read(0, 1, layer: deleted.min() ?? 0) == nil, "it can't be meant")
        if isReopened {
            try bench.reopen()
            _ = try bench.attach(epoch: 9)
            try check()
        }
        try bench.settle()
        try check()
        #expect(bench.core.retiredLayerCount == 0)
        let left = [1, 2, 3].filter { !deleted.contains($0) }.map(LayerID.init)
        #expect(bench.core.layers == left)
        #expect(try bench.disk.layersPresent() == bench.core.layerFiles)
        try bench.reopen()
        _ = try bench.attach(epoch: 20)
        try check()
        #expect(bench.pool.inUse == 0 && bench.failure == nil)
    }

    /// To the engine the two layers are one at once: digests and copies wait for the merge.
    @Test func digestsAreOfBothLayers() throws {
        let (bench, _) = try ReplicaBench.threeLayers()
        bench.deleted = [2]
        try bench.installNext()
        let tag = bench.send(.digest, epoch: 4, flags: FrameFlags.resync, layer: 3)
        try bench.run()
        let table = try #require(bench.reply(tag)?.table)
        let states = (0..<8).map { table[8 + $0 * RegionDigest.blockRecordSize] }
        #expect(states == [0, 2, 1, 1, 1, 0, 0, 0])
        #expect(bench.pool.inUse == 0)
    }

    /// The birth goes along: a replica that is away misses what the deleted layer got meanwhile.
    @Test func birthsAreInherited() throws {
        let (bench, _) = try ReplicaBench.threeLayers()
        bench.write(
            ReplicaBench.pattern(9), at: UInt64(Geometry.regionSize), epoch: 3, sequence: 7)
        try bench.run()
        try bench.installNext(layers: 4)
        bench.deleted = [3]
        try bench.installNext()
        try bench.settle()
        #expect(bench.core.retiredLayerCount == 0)
        for (since, expected) in [(3, 3), (4, 3), (6, 0)] as [(UInt64, UInt8)] {
            let tag = bench.send(.regionMap, epoch: 5, length: 8, auxiliary: since)
            try bench.run()
            #expect(bench.reply(tag)?.table == [expected], "since \(since)")
        }
    }

    /// A damaged block is not made good by being moved.
    @Test func damageGoesAlong() throws {
        let (bench, seen) = try ReplicaBench.threeLayers()
        try bench.settle()
        try bench.disk.memory(.data(LayerID(rawValue: 1)))[0] ^= 1
        bench.deleted = [1]
        try bench.installNext()
        try bench.settle()
        #expect(bench.core.retiredLayerCount == 0)
        #expect(try bench.read(0, 1) == nil)
        #expect(try bench.read(1, 7) == seen[3].map { [UInt8]($0[4096...]) })
    }

    /// No space for the heir's blocks: what waits is refused, the copy goes on and merges later.
    @Test func aFullDiskDelaysAMerge() throws {
        let (bench, seen) = try ReplicaBench.threeLayers(isUpperLarger: true)
        bench.deleted = [1]
        bench.fault = { action in
            if case .write(.data, _, _, _, _, _) = action { -28 } else { nil }
        }
        try bench.installNext()
        let tag = bench.send(.digest, epoch: 4, flags: FrameFlags.resync, layer: 2)
        try bench.run()
        #expect(bench.status(tag) == .noSpace)
        #expect(bench.core.retiredLayerCount == 1 && bench.failure == nil)
        #expect(try bench.read(0, 8) == seen[3])
        bench.fault = nil
        try bench.settle()
        #expect(bench.core.retiredLayerCount == 0)
        #expect(try bench.read(0, 8) == seen[3])
        #expect(bench.pool.inUse == 0)
    }

    /// What was written before the disk was full gives its space back: others need it.
    @Test func aMergeThatFailsLeavesNothingBehind() throws {
        let (bench, seen) = try ReplicaBench.threeLayers(isUpperLarger: true)
        bench.deleted = [1]
        var written = 0
        bench.fault = { action in
            guard case .write(.data, _, _, _, _, _) = action else { return nil }
            written += 1
            return written > 1 ? -28 : nil
        }
        try bench.installNext()
        try bench.settle()
        for _ in 0..<40 { try bench.tick(milliseconds: 400) }
        #expect(written > 1 && bench.core.retiredLayerCount == 1)
        let heir = try bench.disk.memory(.data(LayerID(rawValue: 2)))
        #expect(heir.slice(0, 2 * block).isZero && !heir.slice(2 * block, 2 * block).isZero)
        #expect(try bench.read(0, 8) == seen[3])
    }

    /// Seed 500543: what cannot be read now is not lost over it.
    @Test func anUnreadableBlockDelaysAMerge() throws {
        let (bench, seen) = try ReplicaBench.threeLayers(isUpperLarger: true)
        bench.deleted = [1]
        bench.fault = { action in
            if case .read(.data, _, _, _, _, _) = action { -5 } else { nil }
        }
        try bench.installNext()
        try bench.settle()
        #expect(bench.failure == nil && bench.core.retiredLayerCount == 1)
        bench.fault = nil
        #expect(try bench.read(0, 8) == seen[3])
        try bench.settle()
        #expect(bench.core.retiredLayerCount == 0)
        #expect(try bench.read(0, 8) == seen[3])
    }

    /// A sector of a deleted layer that is bad for good costs its block, and neither the others of
    /// the region nor the replica its membership: who compares or fills it would be refused for
    /// ever. When the block has been written from another copy, the merge gets on.
    @Test(arguments: [false, true]) func anUnreadableBlockCostsNoOther(isReopened: Bool) throws {
        let (bench, seen) = try ReplicaBench.threeLayers(isUpperLarger: true)
        try bench.settle()
        if isReopened {
            try bench.reopen()
            _ = try bench.attach(epoch: 9)
        }
        bench.deleted = [1]
        let bad = 6 * block
        bench.fault = { action in
            guard case .read(.data(LayerID(rawValue: 1)), let offset, let length, _, _, _) = action
            else { return nil }
            return (Int(offset)..<Int(offset) + length).contains(bad) ? -5 : nil
        }
        try bench.installNext()
        let epoch = bench.core.promise.rawValue
        func digest() throws -> [RegionDigest.Block?] {
            let tag = bench.send(
                .digest, epoch: epoch, length: Geometry.regionSize, flags: FrameFlags.resync,
                layer: 2)
            try bench.run()
            #expect(bench.status(tag) == .ok)
            let table = try #require(bench.reply(tag)?.table)
            let memory = MemoryBlock(count: RegionDigest.size)
            memory.memory.copy(from: table)
            return (0..<8).map { RegionDigest.decode(index: $0, from: memory.memory) }
        }
        #expect(try digest().map { $0?.isDoubtful } == (0..<8).map { $0 == 6 })
        try bench.settle()
        #expect(bench.core.retiredLayerCount == 1)
        #expect(try digest().map { $0?.isDoubtful } == (0..<8).map { $0 == 6 })
        let expected = seen[2] ?? []
        #expect(try bench.read(0, 6, layer: 2) == [UInt8](expected[..<bad]))
        #expect(try bench.read(6, 1, layer: 2) == nil)
        let verify = bench.send(
            .verify, epoch: epoch, length: Geometry.regionSize, flags: FrameFlags.resync, layer: 2)
        try bench.run()
        #expect(bench.status(verify) == .ok)

        let write = bench.write(
            [UInt8](expected[bad..<bad + block]), at: UInt64(bad), epoch: epoch, sequence: 90,
            flags: FrameFlags.resync, layer: 2)
        try bench.run()
        #expect(bench.status(write) == .ok)
        #expect(try digest().allSatisfy { $0?.isDoubtful == false })
        try bench.settle()
        #expect(bench.core.retiredLayerCount == 0)
        #expect(try bench.read(0, 8, layer: 2) == expected)
        #expect(try bench.read(0, 8) == seen[3])
        #expect(bench.pool.inUse == 0 && bench.failure == nil)
    }

    /// What it would show cannot be told from what it hides: nothing is taken back over it.
    @Test func nothingIsRevealedOverAnUnreadableBlock() throws {
        let (bench, seen) = try ReplicaBench.threeLayers(isUpperLarger: true)
        try bench.settle()
        bench.deleted = [1]
        bench.fault = { action in
            if case .read(.data(LayerID(rawValue: 1)), _, _, _, _, _) = action { -5 } else { nil }
        }
        try bench.installNext()
        let tag = bench.send(
            .setState, epoch: bench.core.promise.rawValue, offset: UInt64(2 * block),
            length: block, sequence: 90, flags: FrameFlags.resync, layer: 2)
        try bench.run()
        #expect(bench.status(tag) == .ioError)
        bench.fault = nil
        try bench.settle()
        #expect(bench.core.retiredLayerCount == 0)
        #expect(try bench.read(0, 8, layer: 2) == seen[2])
        #expect(bench.pool.inUse == 0 && bench.failure == nil)
    }

    /// The power fails after any change of the disk: what was flushed is there, in every layer.
    @Test(
        arguments: [0, 50, 100],
        [([1, 2], false), ([1], false), ([1], true)] as [(Set<UInt32>, Bool)])
    func anyCutWhileALayerGoesIsLawful(
        keepPercent: Int, what: (deleted: Set<UInt32>, isUpperLarger: Bool)
    ) throws {
        let left = ([1, 2, 3] as Set<UInt32>).subtracting(what.deleted).sorted()
        for cut in stride(from: 1, to: 2000, by: 7) {
            let (bench, seen) = try ReplicaBench.threeLayers(
                regions: 2, isUpperLarger: what.isUpperLarger)
            try bench.flush(90)
            bench.deleted = what.deleted
            bench.disk.changesMax = bench.disk.changeCount + cut
            bench.random = TestRandom(seed: UInt64(cut))
            let isCut: Bool
            do {
                try bench.installNext()
                try bench.settle()
                isCut = false
            } catch { isCut = true }
            bench.disk.cutPower(&bench.random, keepPercent: keepPercent)
            try bench.reopen(boot: 2)
            if bench.core.installedRecord?.epoch != Epoch(4) { bench.deleted = [] }
            _ = try bench.attach(epoch: 9)
            #expect(try bench.read(0, 8) == seen[3], "cut after \(cut)")
            #expect(try bench.read(0, 8, layer: left[0]) == seen[left[0]], "cut after \(cut)")
            bench.deleted = what.deleted
            try bench.installNext()
            try bench.settle()
            #expect(try bench.read(0, 8) == seen[3], "cut after \(cut), merged")
            #expect(try bench.read(0, 8, layer: left[0]) == seen[left[0]], "cut after \(cut)")
            #expect(bench.core.layers == left.map(LayerID.init), "cut after \(cut)")
            #expect(bench.failure == nil && bench.pool.inUse == 0)
            if !isCut { return }
        }
        Issue.record("it never ended")
    }

    /// Writes, trims, snapshots, deletions, flushes, kills and idle times in any order against a
    /// model; disk operations end in any order.
    @Test(arguments: 1...8 as ClosedRange<UInt64>)
    func everySnapshotLeftStaysAsItWas(seed: UInt64) throws {
        let model = try ChainModel(seed: seed)
        for step in 0..<200 {
            try model.act(step)
            if step % 8 == 0 { try model.check(step) }
        }
        #expect(model.deletions > 3)
        try model.bench.settle()
        #expect(model.bench.core.layers.map(\.rawValue) == model.views.keys.sorted())
        #expect(model.bench.pool.inUse == 0 && model.bench.failure == nil)
    }

    // MARK: schedules that delete faster than merges end

    /// A merge under way is not begun anew when its heir is deleted, too.
    @Test func whatHasBegunGoesOnWithoutItsHeir() throws {
        let bench = try ReplicaBench(regions: 16)
        _ = try bench.attach()
        func put(_ regions: Int) throws {
            let layer = bench.core.headLayer.rawValue
            for region in 0..<regions {
                bench.write(
                    ReplicaBench.pattern(UInt64(layer) * 100 + UInt64(region)),
                    at: UInt64(region * Geometry.regionSize + Int(layer) * block),
                    epoch: bench.core.promise.rawValue)
                try bench.run()
            }
            try bench.flush(UInt64(layer) * 10)
            try bench.tick(milliseconds: 20_000)
        }
        for (layer, regions) in [(1, 16), (2, 16), (3, 2)] {
            try put(regions)
            try bench.installNext(layers: layer + 1)
        }
        // Clients are busy: a few regions are begun, not all.
        for _ in 0..<8 { bench.send(.ping, epoch: bench.core.promise.rawValue) }
        try bench.tick()
        bench.deleted = [1]
        try bench.installNext()
        for _ in 0..<2 {
            for _ in 0..<8 { bench.send(.ping, epoch: bench.core.promise.rawValue) }
            try bench.tick()
        }
        let before = bench.core.mergedRegions
        #expect(before > 0 && before < 16, "\(before)")
        bench.deleted = [1, 2]
        try bench.installNext()
        try bench.settle()
        #expect(bench.core.layers.map(\.rawValue) == [3, 4])
        #expect(bench.core.mergedRegions == 18, "\(before) before")
        for layer in 1...2 {
            let seen = try bench.read(15 * Geometry.blocksPerRegion + layer, 1)
            #expect(seen == ReplicaBench.pattern(UInt64(layer * 100 + 15)))
        }
        #expect(bench.pool.inUse == 0 && bench.failure == nil)
    }

    /// A snapshot is taken and one deleted every 600 ms, all regions are written to meanwhile, and
    /// clients are busy.
    @Test func layersDoNotPileUp() throws {
        let bench = try ReplicaBench(regions: 8)
        _ = try bench.attach()
        var most = 0
        for layer in 1...40 {
            for region in 0..<8 {
                bench.write(
                    ReplicaBench.pattern(UInt64(layer * 8 + region)),
                    at: UInt64(region * Geometry.regionSize + layer * block),
                    epoch: bench.core.promise.rawValue)
                try bench.run()
            }
            try bench.flush(UInt64(layer * 10))
            if layer > 2 { bench.deleted.insert(UInt32(layer - 2)) }
            try bench.installNext(layers: layer + 1)
            for _ in 0..<6 {
                for _ in 0..<8 {
                    bench.send(.ping, epoch: bench.core.promise.rawValue)
                    try bench.run()
                }
                try bench.tick()
            }
            most = max(most, bench.core.retiredLayerCount)
        }
        #expect(most <= 6)
        try bench.settle()
        for layer in 1...40 {
            let seen = try bench.read(5 * Geometry.blocksPerRegion + layer, 1)
            #expect(seen == ReplicaBench.pattern(UInt64(layer * 8 + 5)))
        }
        #expect(bench.pool.inUse == 0 && bench.failure == nil)
    }

    // MARK: space

    /// What went over is given back before much more goes.
    @Test(arguments: [false, true])
    func littleSpaceIsTakenTwice(isDown: Bool) throws {
        let regions = 96
        let bench = try ReplicaBench(regions: regions, options: ReplicaBench.options(active: 256))
        _ = try bench.attach()
        for layer in 1...2 {
            for region in 0..<regions {
                bench.write(
                    ReplicaBench.pattern(UInt64(region), blocks: 4),
                    at: UInt64(region * Geometry.regionSize + layer * 8 * block),
                    epoch: bench.core.promise.rawValue)
                try bench.run()
            }
            try bench.flush(UInt64(layer * 10))
            try bench.tick(milliseconds: 20_000)
            if layer == 1 || isDown { try bench.installNext(layers: layer + 1) }
        }
        bench.core.merge.owedBlocksMax = 64
        var (extra, most) = (0, 0)
        bench.fault = { action in
            switch action {
            case .write(.data, _, let length, _, _, _): extra += length / Geometry.blockSize
            case .punch(.data, _, _, _): extra -= 4
            default: break
            }
            most = max(most, extra)
            return nil
        }
        bench.deleted = [1]
        try bench.installNext()
        for _ in 0..<200 where bench.core.retiredLayerCount > 0 {
            try bench.tick()
        }
        #expect(bench.core.retiredLayerCount == 0 && bench.core.mergedRegions == UInt64(regions))
        #expect(most <= 64, "blocks")
    }
}
