import Testing

@testable import HapteraCore

/// The layer right below the head that stays there, being larger than what is above it.
@Suite struct ReplicaStayTests {
    var block: Int { ReplicaBench.block }
    private var regionBytes: UInt64 { UInt64(Geometry.regionSize) }

    /// Two regions of a snapshot, the first of them partly written and trimmed since.
    private func bench(_ view: inout [UInt8], min: Int = 0) throws -> ReplicaBench {
        var options = ReplicaBench.options()
        options.stayingBlocksMin = min
        let bench = try ReplicaBench(options: options)
        _ = try bench.attach()
        view = ReplicaBench.pattern(10, blocks: 200)
        bench.write(view, at: 0)
        bench.write(ReplicaBench.pattern(9, blocks: 4), at: regionBytes, sequence: 2)
        try bench.run()
        try bench.installNext(layers: 2)
        try put(ReplicaBench.pattern(300, blocks: 3), 2, bench, &view, sequence: 3)
        bench.send(
            .setState, epoch: 2, offset: UInt64(100 * block), length: 2 * block, sequence: 4,
            auxiliary: UInt64(BlockState.zero.rawValue))
        try bench.run()
        view.replaceSubrange(100 * block..<102 * block, with: ReplicaBench.zero(2))
        bench.deleted = [1]
        try bench.installNext()
        return bench
    }
    /// The layer has stayed, and nothing of it is hidden any more.
    private func settled() throws -> (ReplicaBench, view: [UInt8]) {
        var view: [UInt8] = []
        let bench = try bench(&view)
        try bench.settle()
        #expect(bench.core.isLayerStaying)
        return (bench, view)
    }
    private func put(
        _ data: [UInt8], _ first: Int, _ bench: ReplicaBench, _ view: inout [UInt8],
        sequence: UInt64, flags: UInt16 = 0
    ) throws {
        let tag = bench.write(
            data, at: UInt64(first * block), epoch: bench.core.promise.rawValue,
            sequence: sequence, flags: flags)
        try bench.run()
        #expect(bench.status(tag) == .ok)
        view.replaceSubrange(first * block..<first * block + data.count, with: data)
    }
    private func check(_ bench: ReplicaBench, _ view: [UInt8], files: [UInt32]) throws {
        #expect(bench.core.layerFiles.map(\.rawValue) == files)
        #expect(try bench.disk.layersPresent().map(\.rawValue) == files)
        #expect(try bench.read(0, 200) == view)
        #expect(try bench.read(256, 4) == ReplicaBench.pattern(9, blocks: 4))
        let reader = try ReplicaReader(opening: bench.disk)
        try reader.view(0, from: bench.core.headLayer) {
            (index, verdict, bytes) throws(StorageError) in
            guard index < 200 else { return }
            #expect(bytes.bytes() == [UInt8](view[index * block..<(index + 1) * block]))
            #expect(verdict != .damaged)
        }
        #expect(bench.pool.inUse == 0 && bench.failure == nil)
    }
    /// In order: no page is in memory because the log tells of it.
    private func restart(_ bench: ReplicaBench) throws {
        try stop(bench)
        try bench.reopen(boot: 2)
    }
    private func stop(_ bench: ReplicaBench) throws {
        bench.core.beginShutdown(now: bench.now)
        for _ in 0..<50 where !bench.core.isShutDown { try bench.tick() }
        #expect(bench.core.isShutDown)
    }
    private func isPunched(_ bench: ReplicaBench, _ blocks: Range<Int>) throws -> Bool {
        try bench.disk.memory(.data(LayerID(rawValue: 1)))
            .slice(blocks.lowerBound * block, blocks.count * block).isZero
    }

    /// Nothing is moved; what the head hides gives its space back, also what it hides later, also
    /// after a restart.
    @Test func whatIsLargerStays() throws {
        var (bench, view) = try settled()
        #expect(bench.core.isLayerStaying && bench.core.unmergedLayerCount == 0)
        #expect(bench.core.mergedBytes == 0)
        try check(bench, view, files: [1, 2])
        #expect(try isPunched(bench, 2..<5) && isPunched(bench, 100..<102))
        #expect(try !isPunched(bench, 0..<2) && !isPunched(bench, 5..<6))
        #expect(bench.core.hiddenBlocks.map { $0.unmerged } == 0)
        try bench.reopen(boot: 2)
        _ = try bench.attach(epoch: 20)
        try check(bench, view, files: [1, 2])
        try put(ReplicaBench.pattern(400, blocks: 2), 50, bench, &view, sequence: 30)
        try bench.settle()
        #expect(bench.core.isLayerStaying && bench.core.mergedBytes == 0)
        #expect(try isPunched(bench, 50..<52))
        try check(bench, view, files: [1, 2])
    }

    /// Places in the chain change while blocks are read for the engine: those that cannot be read
    /// at once are not looked for in the old ones.
    @Test func aLayerLeavesWhileWhatCannotBeReadIsReadAgain() throws {
        var options = ReplicaBench.options()
        options.stayingBlocksMin = 0
        let bench = try ReplicaBench(options: options)
        _ = try bench.attach()
        var view = ReplicaBench.pattern(10, blocks: 200)
        bench.write(view, at: 0)
        try bench.run()
        try bench.installNext(layers: 2)
        try put(ReplicaBench.pattern(300), 5, bench, &view, sequence: 3)
        try bench.installNext(layers: 3)
        try put(ReplicaBench.pattern(400, blocks: 4), 10, bench, &view, sequence: 4)
        bench.deleted = [1, 2]
        try bench.installNext()
        func isManifest(_ action: ReplicaAction) -> Bool {
            switch action {
            case .write(.manifest, _, _, _, _, _), .sync(.manifest, _): true
            default: false
            }
        }
        for round in 0..<60 as Range<UInt64> where bench.pending.isEmpty {
            try bench.flush(500 + round)
            bench.now = bench.now.adding(milliseconds: 20_000)
            bench.step(.tick)
            if !bench.pending.contains(where: isManifest) { try bench.run() }
        }
        #expect(bench.core.layerFiles.map(\.rawValue) == [1, 2, 3])
        let tag = bench.send(
            .digest, epoch: bench.core.promise.rawValue, length: Geometry.regionSize,
            flags: FrameFlags.resync, layer: 3)
        for _ in 0..<2 {
            let next = try #require(bench.pending.firstIndex(where: isManifest))
            bench.pending.insert(bench.pending.remove(at: next), at: 0)
            try bench.performOne()
        }
        #expect(bench.core.layerFiles.map(\.rawValue) == [1, 3])
        bench.fault = { action in
            if case .read(.data, _, let length, _, _, _) = action, length > 4096 { -5 } else { nil }
        }
        try bench.run()
        let table = try #require(bench.reply(tag)?.table)
        let memory = MemoryBlock(count: RegionDigest.size)
        memory.memory.copy(from: table)
        for index in 0..<200 {
            let found = try #require(RegionDigest.decode(index: index, from: memory.memory))
            let bytes = [UInt8](view[index * block..<(index + 1) * block])
            #expect(!found.isDoubtful && found.entry.checksum == checksum(of: bytes))
        }
        bench.fault = nil
        try bench.settle()
        try check(bench, view, upTo: 200)
    }
    private func check(_ bench: ReplicaBench, _ view: [UInt8], upTo count: Int) throws {
        #expect(try bench.read(0, count) == view)
        #expect(bench.pool.inUse == 0 && bench.failure == nil)
    }

    /// One of a few blocks goes up to the head, whose own are fewer still.
    @Test func whatIsLittleGoesUp() throws {
        var view: [UInt8] = []
        let bench = try bench(&view, min: 2048)
        try bench.settle()
        #expect(!bench.core.isLayerStaying && bench.core.retiredLayerCount == 0)
        #expect(bench.core.mergedBytes == UInt64((204 - 5) * block))
        try check(bench, view, files: [2])
    }

    /// The head has become the larger one: what is left goes up, and is the smaller part.
    @Test func whatHasBecomeTheSmallerGoesUp() throws {
        var (bench, view) = try settled()
        try put(ReplicaBench.pattern(500, blocks: 120), 3, bench, &view, sequence: 40)
        try bench.settle()
        #expect(bench.core.retiredLayerCount == 0)
        #expect(bench.core.mergedBytes == UInt64((204 - 121) * block))
        try check(bench, view, files: [2])
    }

    /// The next snapshot freezes the head, which then goes over to the layer that has stayed.
    @Test func theNextSnapshotGoesDown() throws {
        var (bench, view) = try settled()
        try bench.installNext(layers: 3)
        let frozen = view
        try put(ReplicaBench.pattern(600), 7, bench, &view, sequence: 50)
        try bench.settle()
        #expect(bench.core.retiredLayerCount == 0 && bench.core.mergedBytes == UInt64(3 * block))
        #expect(bench.core.layers.map(\.rawValue) == [2, 3])
        #expect(try bench.read(0, 200, layer: 2) == frozen)
        try check(bench, view, files: [1, 3])
        // And that one's deletion moves nothing again.
        bench.deleted = [1, 2]
        try bench.installNext()
        try bench.settle()
        #expect(bench.core.isLayerStaying && bench.core.mergedBytes == UInt64(3 * block))
        #expect(try isPunched(bench, 7..<8))
        try check(bench, view, files: [1, 3])
    }

    /// Of several the largest stays: the one below goes up to it, the one above to the head.
    @Test func theOthersGoOverToIt() throws {
        var options = ReplicaBench.options()
        options.stayingBlocksMin = 0
        let bench = try ReplicaBench(options: options)
        _ = try bench.attach()
        var view = ReplicaBench.pattern(10, blocks: 200)
        bench.write(ReplicaBench.pattern(70, blocks: 20), at: 0)
        bench.write(ReplicaBench.pattern(9, blocks: 4), at: regionBytes, sequence: 2)
        try bench.run()
        try bench.installNext(layers: 2)
        bench.write(view, at: 0, epoch: 2, sequence: 3)
        for region in 2..<5 as Range<UInt64> {
            bench.write(
                ReplicaBench.pattern(region, blocks: 30), at: region * regionBytes, epoch: 2,
                sequence: 3 + region)
        }
        try bench.run()
        try bench.installNext(layers: 3)
        try put(ReplicaBench.pattern(80, blocks: 6), 10, bench, &view, sequence: 20)
        try bench.installNext(layers: 4)
        try put(ReplicaBench.pattern(90, blocks: 2), 10, bench, &view, sequence: 30)
        bench.deleted = [1, 2, 3]
        try bench.installNext()
        try bench.settle()
        #expect(bench.core.isLayerStaying && bench.core.retiredLayerCount == 1)
        #expect(bench.core.mergedBytes == UInt64(8 * block))
        try check(bench, view, files: [2, 4])
    }

    /// What the engine asks of the head by itself is answered from both, at once and the same as of
    /// a copy that has merged them; a copy to it has its region merged first.
    @Test func theEngineSeesOneLayer() throws {
        var view: [UInt8] = []
        let (staying, merged) = (try bench(&view), try bench(&view, min: 2048))
        try staying.settle()
        try merged.settle()
        let tables = try [staying, merged].map { bench in
            let tag = bench.send(
                .digest, epoch: bench.core.promise.rawValue, flags: FrameFlags.resync)
            try bench.run()
            return try #require(bench.reply(tag)?.table)
        }
        #expect(tables[0] == tables[1] && tables[0].count == RegionDigest.size)
        #expect(staying.core.mergedBytes == 0)
        try put(
            ReplicaBench.pattern(700), 60, staying, &view, sequence: 60, flags: FrameFlags.resync)
        #expect(staying.core.mergedBytes == UInt64(195 * block))
        try staying.settle()
        // What is left is no more than the head has.
        #expect(staying.core.retiredLayerCount == 0)
        try check(staying, view, files: [2])
    }

    /// One read of a page that fails for a moment moves nothing.
    @Test func oneFailedReadIsNoReason() throws {
        let (bench, view) = try settled()
        try restart(bench)
        var failed = 0
        bench.fault = { action in
            guard failed == 0, case .read(.table, _, let length, _, _, _) = action,
                length > TablePage.pairSize
            else { return nil }
            failed += 1
            return -5
        }
        _ = try bench.attach(epoch: 20)
        try bench.settle()
        #expect(failed == 1 && bench.core.isLayerStaying && bench.core.mergedBytes == 0)
        try check(bench, view, files: [1, 2])
    }

    /// Zeroes that keep their space give it back, too, when they are hidden.
    @Test func zeroesWithSpaceAreHidden() throws {
        var options = ReplicaBench.options()
        options.stayingBlocksMin = 0
        let bench = try ReplicaBench(options: options)
        _ = try bench.attach()
        bench.write(ReplicaBench.pattern(10, blocks: 200), at: 0)
        try bench.run()
        bench.send(
            .setState, epoch: 1, offset: UInt64(100 * block), length: 50 * block, sequence: 2,
            auxiliary: UInt64(BlockState.zeroAllocated.rawValue))
        try bench.run()
        try bench.installNext(layers: 2)
        bench.deleted = [1]
        try bench.installNext()
        bench.write(
            ReplicaBench.pattern(300, blocks: 50), at: UInt64(100 * block), epoch: 3, sequence: 3)
        try bench.run()
        try bench.settle()
        #expect(try bench.core.isLayerStaying && isPunched(bench, 100..<150))
    }

    /// On a full disk what is hidden gives its space back, though nothing can be moved: not even a
    /// layer below the one that stays. Also while clients are busy.
    @Test(arguments: [false, true]) func aFullDiskGetsWhatIsHidden(isBusy: Bool) throws {
        var options = ReplicaBench.options(active: 64)
        options.stayingBlocksMin = 0
        let bench = try ReplicaBench(regions: 16, options: options)
        _ = try bench.attach()
        var sequence: UInt64 = 1
        func put(_ region: Int, _ first: Int, _ count: Int, _ value: UInt64) throws {
            sequence += 1
            bench.write(
                ReplicaBench.pattern(value, blocks: count),
                at: UInt64(region) * regionBytes + UInt64(first * block),
                epoch: bench.core.promise.rawValue, sequence: sequence)
            try bench.run()
        }
        for region in 1...12 { try put(region, 0, 4, 10) }
        try bench.installNext(layers: 2)
        for region in 0...14 { try put(region, 100, 40, 20) }
        try bench.installNext(layers: 3)
        try put(1, 100, 40, 40)
        bench.deleted = [1, 2]
        bench.fault = { action in
            guard case .write(.data, _, _, _, _, _) = action else { return nil }
            return -28
        }
        try bench.installNext()
        for _ in 0..<600 {
            sequence += 1
            try bench.flush(sequence)
            for _ in 0..<(isBusy ? 8 : 0) { _ = try bench.read(0, 1) }
            try bench.tick()
        }
        let data = try bench.disk.memory(.data(LayerID(rawValue: 2)))
        #expect(data.slice(Geometry.regionSize + 100 * block, 40 * block).isZero)
    }

    /// Beside requests it waits until it is much.
    @Test func aBusyClientsBlocksAreNotLookedAtOneByOne() throws {
        var (bench, view) = try settled()
        let before = bench.core.hiddenRegions
        for round in 0..<100 as Range<UInt64> {
            for _ in 0..<8 { _ = try bench.read(0, 1) }
            if round % 10 == 0 {
                try put(
                    ReplicaBench.pattern(round), 60 + Int(round / 10), bench, &view,
                    sequence: 100 + round)
            }
            try bench.tick(milliseconds: 1000)
        }
        #expect(bench.core.hiddenRegions == before && bench.core.hiddenBlocks?.unmerged == 10)
        try bench.settle()
        #expect(bench.core.hiddenRegions > before && bench.core.isLayerStaying)
        #expect(try isPunched(bench, 60..<70))
        try check(bench, view, files: [1, 2])
    }

    /// A replica that is told to stop gives back what it owes first: afterwards nobody knows of it.
    @Test(arguments: [false, true]) func stoppingForgetsNoSpace(isTrimmed: Bool) throws {
        var options = ReplicaBench.options()
        options.stayingBlocksMin = 0
        let bench = try ReplicaBench(options: options)
        _ = try bench.attach()
        bench.write(ReplicaBench.pattern(10, blocks: 250), at: 0)
        try bench.run()
        if !isTrimmed {
            try bench.installNext(layers: 2)
            bench.deleted = [1]
            try bench.installNext()
        }
        for place in 0..<100 as Range<UInt64> {
            let (offset, epoch) = (2 * place * UInt64(block), bench.core.promise.rawValue)
            if isTrimmed {
                bench.send(
                    .setState, epoch: epoch, offset: offset, length: block, sequence: 10 + place,
                    auxiliary: UInt64(BlockState.zero.rawValue))
            } else {
                bench.write(
                    ReplicaBench.pattern(place), at: offset, epoch: epoch, sequence: 10 + place)
            }
            try bench.run()
        }
        for round in 0..<300 as Range<UInt64> where bench.core.unneededBlocks == 0 {
            try bench.flush(500 + round)
            try bench.tick()
        }
        try bench.flush(900)
        #expect(bench.core.unneededBlocks > 0)
        try stop(bench)
        // Before opening, which makes some of it zero.
        #expect(try (0..<100).allSatisfy { try isPunched(bench, 2 * $0..<2 * $0 + 1) })
    }

    /// While the pages cannot be read nothing is known, and the merge finds out.
    @Test func whatCannotBeCountedGoesUp() throws {
        let (bench, view) = try settled()
        try restart(bench)
        var failed = 0
        bench.fault = { action in
            guard case .read(.table, _, let length, _, _, _) = action, length > TablePage.pairSize
            else { return nil }
            failed += 1
            return -5
        }
        _ = try bench.attach(epoch: 20)
        try bench.settle()
        #expect(failed > 0 && bench.core.retiredLayerCount == 0)
        try check(bench, view, files: [2])
    }

    /// The power is cut at every step after the head has hidden something: what was flushed is
    /// there, whichever of the two has it.
    @Test(arguments: 0..<40)
    func noPowerCutTakesAnything(step: Int) throws {
        var view: [UInt8] = []
        let bench = try bench(&view)
        try bench.flush(100)
        for _ in 0..<3 * step {
            if bench.pending.isEmpty {
                bench.now = bench.now.adding(milliseconds: 700)
                bench.step(.tick)
            } else {
                try bench.performOne(anyOrder: true)
            }
        }
        var random = TestRandom(seed: UInt64(step))
        bench.disk.cutPower(&random, keepPercent: random.below(3) * 50)
        try bench.reopen(boot: 2)
        _ = try bench.attach(epoch: 30)
        #expect(try bench.read(0, 200) == view)
        try bench.settle()
        #expect(try bench.read(0, 200) == view)
    }
}
