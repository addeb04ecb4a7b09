import Testing

@testable import HapteraCore

/// Layers that go over to the deleted one below them, and what meets them on their way.
extension ReplicaMergeTests {
    /// The lowest snapshot holds nearly everything, the next one little: that is what moves. The
    /// layer has the files of the one that is gone from then on, over restarts, and is merged
    /// upwards under its new name when its own snapshot goes.
    @Test func theSmallerOneMoves() throws {
        let bench = try ReplicaBench()
        _ = try bench.attach()
        var view = ReplicaBench.pattern(10, blocks: 200)
        bench.write(view, at: 0)
        bench.write(ReplicaBench.pattern(9), at: UInt64(Geometry.regionSize), sequence: 2)
        try bench.run()
        try bench.installNext(layers: 2)
        bench.write(ReplicaBench.pattern(300, blocks: 3), at: 8192, epoch: 2, sequence: 3)
        bench.send(
            .setState, epoch: 2, offset: UInt64(100 * block), length: 2 * block, sequence: 4,
            auxiliary: UInt64(BlockState.zero.rawValue))
        try bench.run()
        view.replaceSubrange(8192..<8192 + 3 * block, with: ReplicaBench.pattern(300, blocks: 3))
        view.replaceSubrange(100 * block..<102 * block, with: ReplicaBench.zero(2))
        try bench.installNext(layers: 3)
        bench.deleted = [1]
        try bench.installNext()
        #expect(try bench.read(0, 200, layer: 2, flags: FrameFlags.resync) == view)
        try bench.settle()
        #expect(bench.core.mergedBytes == UInt64(3 * block) && bench.core.retiredLayerCount == 0)
        func check(files: [UInt32], names: [UInt32]) throws {
            #expect(bench.core.layers.map(\.rawValue) == names)
            #expect(bench.core.layerFiles.map(\.rawValue) == files)
            #expect(try bench.disk.layersPresent().map(\.rawValue) == files)
            #expect(try bench.read(0, 200, layer: names[0]) == view)
            #expect(try bench.read(0, 200) == view)
            #expect(try bench.read(256, 1) == ReplicaBench.pattern(9))
            let reader = try ReplicaReader(opening: bench.disk)
            try reader.view(0, from: LayerID(rawValue: names[0])) {
                (index, verdict, bytes) throws(StorageError) in
                guard index < 200 else { return }
                #expect(bytes.bytes() == [UInt8](view[index * block..<(index + 1) * block]))
                #expect(verdict != .damaged)
            }
        }
        try check(files: [1, 3], names: [2, 3])
        // What the trim covers has given its space back.
        let data = try bench.disk.memory(.data(LayerID(rawValue: 1)))
        #expect(data.slice(100 * block, 2 * block).isZero)
        try bench.reopen(boot: 2)
        _ = try bench.attach(epoch: 20)
        try check(files: [1, 3], names: [2, 3])
        bench.deleted = [1, 2]
        try bench.installNext()
        #expect(try bench.read(0, 1, layer: 2) == nil, "it can't be meant")
        try bench.settle()
        try check(files: [3], names: [3])
        #expect(bench.pool.inUse == 0 && bench.failure == nil)
    }

    /// A trim over a block that was trimmed and has not given its space back yet: it does.
    @Test func aTrimOverATrimGivesSpaceBack() throws {
        let bench = try ReplicaBench()
        _ = try bench.attach()
        bench.write(ReplicaBench.pattern(10, blocks: 8), at: 0)
        try bench.run()
        func trim(_ epoch: UInt64) throws {
            bench.send(
                .setState, epoch: epoch, offset: UInt64(4 * block), length: block,
                sequence: 2 * epoch, auxiliary: UInt64(BlockState.zero.rawValue))
            try bench.run()
        }
        try trim(1)
        try bench.installNext(layers: 2)
        try trim(2)
        try bench.installNext(layers: 3)
        bench.deleted = [1]
        try bench.installNext()
        try bench.settle()
        #expect(bench.core.layerFiles == [1, 3].map(LayerID.init))
        let data = try bench.disk.memory(.data(LayerID(rawValue: 1)))
        #expect(data.slice(4 * block, block).isZero && !data.slice(0, 4 * block).isZero)
    }

    /// The volume grew between the two: the lower one's files are too short to be the upper one's,
    /// so that goes up, and the copy opens.
    @Test func aLayerThatIsTooShortGoesUp() throws {
        let bench = try ReplicaBench(regions: 2)
        _ = try bench.attach()
        bench.write(ReplicaBench.pattern(10, blocks: 8), at: 0)
        bench.write(ReplicaBench.pattern(9), at: UInt64(Geometry.regionSize), sequence: 2)
        try bench.run()
        bench.lineage = bench.record(epoch: 1)
        try bench.installChanged { $0.freezeHead("a", created: 1) }
        let prepare = bench.send(
            .prepareSize, epoch: 2, offset: UInt64(6 * Geometry.regionSize))
        try bench.run()
        #expect(bench.status(prepare) == .ok)
        try bench.installChanged { $0.grow(to: UInt64(6 * Geometry.regionSize)) }
        bench.write(ReplicaBench.pattern(30), at: 4096, epoch: 3, sequence: 5)
        try bench.run()
        try bench.installChanged { $0.freezeHead("b", created: 2) }
        try bench.installChanged { $0.deleteSnapshot(of: LayerID(rawValue: 1)) }
        try bench.settle()
        #expect(bench.core.retiredLayerCount == 0)
        #expect(bench.core.layerFiles == [2, 3].map(LayerID.init))
        try bench.reopen()
        let view =
            ReplicaBench.pattern(10, blocks: 8).prefix(block) + ReplicaBench.pattern(30)
            + ReplicaBench.pattern(10, blocks: 8).dropFirst(2 * block)
        #expect(bench.core.size == UInt64(6 * Geometry.regionSize))
        let reader = try ReplicaReader(opening: bench.disk)
        try reader.view(0, from: LayerID(rawValue: 2)) {
            (index, _, bytes) throws(StorageError) in
            guard index < 8 else { return }
            #expect(bytes.bytes() == [UInt8](view[index * block..<(index + 1) * block]))
        }
    }

    /// A write to the frozen layer that a client sent before, and that comes when the layer is
    /// about to leave: it waits, and is there afterwards.
    @Test func aLateWriteIsNotLostWithTheLayer() throws {
        let (bench, seen) = try ReplicaBench.threeLayers()
        bench.deleted = [1]
        try bench.installNext()
        var leaving = false
        for round in 0..<60 as Range<UInt64> where !leaving {
            let epoch = bench.core.promise.rawValue
            bench.send(.flush, epoch: epoch, sequence: 100 + round)
            try bench.run()
            bench.send(.stable, epoch: epoch, sequence: 100 + round, auxiliary: epoch)
            bench.now = bench.now.adding(milliseconds: 20_000)
            bench.step(.tick)
            leaving = !bench.core.merge.leaving.isEmpty
            if !leaving { try bench.run() }
        }
        #expect(leaving)
        let tag = bench.write(
            ReplicaBench.pattern(88), at: UInt64(6 * block), epoch: bench.core.promise.rawValue,
            sequence: 300, layer: 2)
        try bench.run()
        try bench.settle()
        #expect(bench.status(tag) == .ok)
        var view = try #require(seen[2])
        view.replaceSubrange(6 * block..<7 * block, with: ReplicaBench.pattern(88))
        #expect(try bench.read(0, 8, layer: 2) == view)
        #expect(bench.core.layerFiles == [1, 3].map(LayerID.init))
        #expect(bench.pool.inUse == 0 && bench.failure == nil)
    }

    /// What is known to be gone of a layer is forgotten when it no longer goes over: it may come
    /// again by other ways, and the layer go over to another one later.
    @Test func whatCameAgainIsNotTakenForGone() throws {
        let bench = try ReplicaBench(regions: 6)
        _ = try bench.attach()
        let region = UInt64(Geometry.regionSize)
        func put(_ value: UInt64, _ regions: Range<UInt64>, layer: UInt32 = 0) throws {
            for number in regions {
                bench.write(
                    ReplicaBench.pattern(value + number), at: number * region,
                    epoch: bench.core.promise.rawValue, sequence: 10 + number,
                    flags: layer > 0 ? FrameFlags.resync : 0, layer: layer)
                try bench.run()
            }
        }
        try put(100, 0..<6)
        try bench.installNext(layers: 2)
        try put(200, 0..<4)
        try bench.installNext(layers: 3)
        try put(300, 0..<2)
        try bench.installNext(layers: 4)
        bench.deleted = [2]
        try bench.installNext()
        // Some of layer 3 goes over to layer 2.
        for round in 0..<2 as Range<UInt64> {
            let epoch = bench.core.promise.rawValue
            bench.send(.flush, epoch: epoch, sequence: 100 + round)
            try bench.run()
            bench.send(.stable, epoch: epoch, sequence: 100 + round, auxiliary: epoch)
            bench.now = bench.now.adding(milliseconds: 20_000)
            bench.step(.tick)
            for _ in 0..<12 where !bench.pending.isEmpty { try bench.performOne() }
        }
        // It grows: now the other way round.
        try put(400, 2..<6, layer: 3)
        try bench.installNext()
        try bench.settle()
        bench.deleted = [1, 2]
        try bench.installNext()
        try bench.settle()
        #expect(bench.core.retiredLayerCount == 0)
        for number in 0..<6 as Range<UInt64> {
            let expected = ReplicaBench.pattern((number < 2 ? 300 : 400) + number)
            #expect(try bench.read(Int(number) * 256, 1, layer: 3) == expected, "region \(number)")
        }
        #expect(bench.pool.inUse == 0 && bench.failure == nil)
    }

    /// Seed 608283: a manifest that a killed process has written and not synced is what opening
    /// finds. Files that it does not name go only when it is durable.
    @Test func filesGoByADurableManifestOnly() throws {
        let (bench, seen) = try ReplicaBench.threeLayers(regions: 2)
        bench.deleted = [2]
        try bench.installNext()
        var isWritten = false
        bench.fault = { action in
            guard case .write(.manifest, _, _, _, _, _) = action else { return nil }
            isWritten = bench.core.retiredLayerCount > 0 && !bench.core.merge.leaving.isEmpty
            return nil
        }
        rounds: for round in 0..<60 as Range<UInt64> {
            let epoch = bench.core.promise.rawValue
            bench.send(.flush, epoch: epoch, sequence: 100 + round)
            bench.now = bench.now.adding(milliseconds: 20_000)
            bench.send(.stable, epoch: epoch, sequence: 100 + round, auxiliary: epoch)
            bench.step(.tick)
            while !bench.pending.isEmpty {
                try bench.performOne()
                if isWritten { break rounds }
            }
        }
        #expect(isWritten)
        bench.fault = nil
        try bench.reopen()
        bench.disk.cutPower(&bench.random, keepPercent: 0)
        try bench.reopen(boot: 2)
        _ = try bench.attach(epoch: 30)
        #expect(try bench.read(0, 8) == seen[3])
    }

    /// Seed 1000819: what has gone over is active below only. Else an Install raises a birth that
    /// goes with the files, and the engine compares the region for nothing.
    @Test func whatWentOverIsActiveOnce() throws {
        let (bench, _) = try ReplicaBench.threeLayers(regions: 2)
        bench.deleted = [1]
        try bench.installNext()
        for round in 0..<60 as Range<UInt64> where !bench.core.chain.isAbsorbed(1, 0) {
            let epoch = bench.core.promise.rawValue
            bench.send(.flush, epoch: epoch, sequence: 100 + round)
            bench.now = bench.now.adding(milliseconds: 100)
            bench.step(.tick)
            while !bench.pending.isEmpty, !bench.core.chain.isAbsorbed(1, 0) {
                try bench.performOne()
            }
        }
        #expect(bench.core.chain.isAbsorbed(1, 0))
        let tag = bench.install(epoch: bench.core.promise.rawValue + 1)
        try bench.run()
        let reply = try #require(bench.reply(tag).flatMap { InstallReply(decoding: $0.table) })
        let lower = LayerRegion(LayerID(rawValue: 2), 0)
        #expect(reply.activeRegions.filter { $0 == lower }.count == 1)
    }

    /// Resync writes to the heir while it goes over: what they leave is there afterwards.
    @Test func changesMeetAMergeDownwards() throws {
        let (bench, seen) = try ReplicaBench.threeLayers()
        bench.deleted = [1]
        try bench.installNext()
        let epoch = bench.core.promise.rawValue
        var view = try #require(seen[2])
        for (place, sequence) in zip([0, 2, 6], 50...)
            as Zip2Sequence<[Int], PartialRangeFrom<UInt64>>
        {
            let tag = bench.write(
                ReplicaBench.pattern(UInt64(70 + place)), at: UInt64(place * block), epoch: epoch,
                sequence: sequence, flags: FrameFlags.resync, layer: 2)
            try bench.run()
            #expect(bench.status(tag) == .ok)
            view.replaceSubrange(
                place * block..<(place + 1) * block, with: ReplicaBench.pattern(UInt64(70 + place)))
            try bench.tick()
        }
        // A copy may say that nothing is there.
        let tag = bench.send(
            .setState, epoch: epoch, offset: UInt64(5 * block), length: block, sequence: 60,
            flags: FrameFlags.resync, layer: 2)
        try bench.run()
        #expect(bench.status(tag) == .ok)
        view.replaceSubrange(5 * block..<6 * block, with: ReplicaBench.zero(1))
        #expect(try bench.read(0, 8, layer: 2) == view)
        try bench.settle()
        #expect(bench.core.retiredLayerCount == 0)
        #expect(try bench.read(0, 8, layer: 2) == view)
        try bench.reopen()
        _ = try bench.attach(epoch: 30)
        #expect(try bench.read(0, 8, layer: 2) == view)
        #expect(bench.pool.inUse == 0 && bench.failure == nil)
    }
}
