import Testing

@testable import HapteraCore

/// Deleted layers: what they hold goes to their heirs, whatever happens meanwhile.
@Suite struct ReplicaMergeTests {
    private let block = 4096
    private func zero(_ blocks: Int) -> [UInt8] { [UInt8](repeating: 0, count: blocks * 4096) }

    private func read(
        _ bench: ReplicaBench, _ first: Int, _ count: Int, layer: UInt32 = 0, flags: UInt16 = 0
    ) throws -> [UInt8]? {
        let tag = bench.send(
            .read, epoch: bench.core.promise.rawValue, offset: UInt64(first * block),
            length: count * block, flags: flags, layer: layer)
        try bench.run()
        guard let reply = bench.reply(tag), reply.header.status == .ok else { return nil }
        return reply.data.isEmpty ? zero(count) : reply.data
    }
    private func install(_ bench: ReplicaBench, layers: Int = 0) throws {
        let tag = bench.install(epoch: bench.core.promise.rawValue + 1, layers: layers)
        try bench.run()
        #expect(bench.status(tag) == .ok)
    }
    private func flush(_ bench: ReplicaBench, _ sequence: UInt64) throws {
        let epoch = bench.core.promise.rawValue
        let tag = bench.send(.flush, epoch: epoch, sequence: sequence)
        try bench.run()
        #expect(bench.status(tag) == .ok)
        bench.send(.stable, epoch: epoch, sequence: sequence, auxiliary: epoch)
        try bench.run()
    }

    /// Blocks 0..<8 in layer 1, 2..<4 again in layer 2, 3..<5 again in layer 3, 1 trimmed there.
    /// `isUpperLarger`: layer 2 knows more regions than layer 1, so that that one goes over to it.
    private func three(
        regions: Int = 8, isUpperLarger: Bool = false
    ) throws -> (bench: ReplicaBench, seen: [UInt32: [UInt8]]) {
        let bench = try ReplicaBench(regions: regions)
        _ = try bench.attach()
        var view = ReplicaBench.pattern(10, blocks: 8)
        var seen: [UInt32: [UInt8]] = [:]
        func put(_ data: [UInt8], _ first: Int) throws {
            bench.write(data, at: UInt64(first * block), epoch: bench.core.promise.rawValue)
            try bench.run()
            view.replaceSubrange(first * block..<first * block + data.count, with: data)
        }
        bench.write(view, at: 0)
        try bench.run()
        seen[1] = view
        try install(bench, layers: 2)
        try put(ReplicaBench.pattern(30, blocks: 2), 2)
        if isUpperLarger {
            bench.write(ReplicaBench.pattern(9), at: UInt64(Geometry.regionSize), epoch: 2)
            try bench.run()
        }
        seen[2] = view
        try install(bench, layers: 3)
        try put(ReplicaBench.pattern(50, blocks: 2), 3)
        bench.send(
            .setState, epoch: 3, offset: 4096, length: 4096, sequence: 2,
            auxiliary: UInt64(BlockState.zero.rawValue))
        try bench.run()
        view.replaceSubrange(4096..<8192, with: zero(1))
        seen[3] = view
        return (bench, seen)
    }

    private func settle(_ bench: ReplicaBench) throws {
        // One layer after the other may go over to the one below.
        for round in 0..<60 as Range<UInt64> where round < 8 || bench.core.isMergeDue {
            try flush(bench, 100 + round)
            try bench.tick(milliseconds: 20_000)
        }
    }

    @Test(arguments: [[1], [2], [1, 2]] as [Set<UInt32>], [false, true])
    func whatIsSeenStaysAndTheLayerGoes(deleted: Set<UInt32>, isReopened: Bool) throws {
        let (bench, seen) = try three()
        bench.deleted = deleted
        try install(bench)
        func check() throws {
            for (layer, expected) in seen where !deleted.contains(layer) {
                #expect(try read(bench, 0, 8, layer: layer) == expected, "layer \(layer)")
            }
        }
        try check()
        #expect(try read(bench, 0, 1, layer: deleted.min() ?? 0) == nil, "it can't be meant")
        if isReopened {
            try bench.reopen()
            _ = try bench.attach(epoch: 9)
            try check()
        }
        try settle(bench)
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
        let (bench, _) = try three()
        bench.deleted = [2]
        try install(bench)
        let tag = bench.send(.digest, epoch: 4, flags: FrameFlags.resync, layer: 3)
        try bench.run()
        let table = try #require(bench.reply(tag)?.table)
        let states = (0..<8).map { table[8 + $0 * RegionDigest.blockRecordSize] }
        #expect(states == [0, 2, 1, 1, 1, 0, 0, 0])
        #expect(bench.pool.inUse == 0)
    }

    /// The birth goes along: a replica that is away misses what the deleted layer got meanwhile.
    @Test func birthsAreInherited() throws {
        let (bench, _) = try three()
        bench.write(
            ReplicaBench.pattern(9), at: UInt64(Geometry.regionSize), epoch: 3, sequence: 7)
        try bench.run()
        try install(bench, layers: 4)
        bench.deleted = [3]
        try install(bench)
        try settle(bench)
        #expect(bench.core.retiredLayerCount == 0)
        for (since, expected) in [(3, 3), (4, 3), (6, 0)] as [(UInt64, UInt8)] {
            let tag = bench.send(.regionMap, epoch: 5, length: 8, auxiliary: since)
            try bench.run()
            #expect(bench.reply(tag)?.table == [expected], "since \(since)")
        }
    }

    /// A damaged block is not made good by being moved.
    @Test func damageGoesAlong() throws {
        let (bench, seen) = try three()
        try settle(bench)
        try bench.disk.memory(.data(LayerID(rawValue: 1)))[0] ^= 1
        bench.deleted = [1]
        try install(bench)
        try settle(bench)
        #expect(bench.core.retiredLayerCount == 0)
        #expect(try read(bench, 0, 1) == nil)
        #expect(try read(bench, 1, 7) == seen[3].map { [UInt8]($0[4096...]) })
    }

    /// No space for the heir's blocks: what waits is refused, the copy goes on and merges later.
    @Test func aFullDiskDelaysAMerge() throws {
        let (bench, seen) = try three(isUpperLarger: true)
        bench.deleted = [1]
        bench.fault = { action in
            if case .write(.data, _, _, _, _, _) = action { -28 } else { nil }
        }
        try install(bench)
        let tag = bench.send(.digest, epoch: 4, flags: FrameFlags.resync, layer: 2)
        try bench.run()
        #expect(bench.status(tag) == .noSpace)
        #expect(bench.core.retiredLayerCount == 1 && bench.failure == nil)
        #expect(try read(bench, 0, 8) == seen[3])
        bench.fault = nil
        try settle(bench)
        #expect(bench.core.retiredLayerCount == 0)
        #expect(try read(bench, 0, 8) == seen[3])
        #expect(bench.pool.inUse == 0)
    }

    /// What was written before the disk was full gives its space back: others need it.
    @Test func aMergeThatFailsLeavesNothingBehind() throws {
        let (bench, seen) = try three(isUpperLarger: true)
        bench.deleted = [1]
        var written = 0
        bench.fault = { action in
            guard case .write(.data, _, _, _, _, _) = action else { return nil }
            written += 1
            return written > 1 ? -28 : nil
        }
        try install(bench)
        try settle(bench)
        for _ in 0..<40 { try bench.tick(milliseconds: 400) }
        #expect(written > 1 && bench.core.retiredLayerCount == 1)
        let heir = try bench.disk.memory(.data(LayerID(rawValue: 2)))
        #expect(heir.slice(0, 2 * block).isZero && !heir.slice(2 * block, 2 * block).isZero)
        #expect(try read(bench, 0, 8) == seen[3])
    }

    /// Seed 500543: what cannot be read now is not lost over it.
    @Test func anUnreadableBlockDelaysAMerge() throws {
        let (bench, seen) = try three(isUpperLarger: true)
        bench.deleted = [1]
        bench.fault = { action in
            if case .read(.data, _, _, _, _, _) = action { -5 } else { nil }
        }
        try install(bench)
        let tag = bench.send(.digest, epoch: 4, flags: FrameFlags.resync, layer: 2)
        try bench.run()
        try settle(bench)
        #expect(bench.status(tag) == .ioError && bench.failure == nil)
        bench.fault = nil
        #expect(bench.core.retiredLayerCount == 1)
        #expect(try read(bench, 0, 8) == seen[3])
        try settle(bench)
        #expect(bench.core.retiredLayerCount == 0)
        #expect(try read(bench, 0, 8) == seen[3])
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
            let (bench, seen) = try three(regions: 2, isUpperLarger: what.isUpperLarger)
            try flush(bench, 90)
            bench.deleted = what.deleted
            bench.disk.changesMax = bench.disk.changeCount + cut
            bench.random = TestRandom(seed: UInt64(cut))
            let isCut: Bool
            do {
                try install(bench)
                try settle(bench)
                isCut = false
            } catch { isCut = true }
            bench.disk.cutPower(&bench.random, keepPercent: keepPercent)
            try bench.reopen(boot: 2)
            if bench.core.installedRecord?.epoch != Epoch(4) { bench.deleted = [] }
            _ = try bench.attach(epoch: 9)
            #expect(try read(bench, 0, 8) == seen[3], "cut after \(cut)")
            #expect(try read(bench, 0, 8, layer: left[0]) == seen[left[0]], "cut after \(cut)")
            bench.deleted = what.deleted
            try install(bench)
            try settle(bench)
            #expect(try read(bench, 0, 8) == seen[3], "cut after \(cut), merged")
            #expect(try read(bench, 0, 8, layer: left[0]) == seen[left[0]], "cut after \(cut)")
            #expect(bench.core.layers == left.map(LayerID.init), "cut after \(cut)")
            #expect(bench.failure == nil && bench.pool.inUse == 0)
            if !isCut { return }
        }
        Issue.record("it never ended")
    }

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
        try install(bench, layers: 2)
        bench.write(ReplicaBench.pattern(300, blocks: 3), at: 8192, epoch: 2, sequence: 3)
        bench.send(
            .setState, epoch: 2, offset: UInt64(100 * block), length: 2 * block, sequence: 4,
            auxiliary: UInt64(BlockState.zero.rawValue))
        try bench.run()
        view.replaceSubrange(8192..<8192 + 3 * block, with: ReplicaBench.pattern(300, blocks: 3))
        view.replaceSubrange(100 * block..<102 * block, with: zero(2))
        try install(bench, layers: 3)
        bench.deleted = [1]
        try install(bench)
        #expect(try read(bench, 0, 200, layer: 2, flags: FrameFlags.resync) == view)
        try settle(bench)
        #expect(bench.core.mergedBytes == UInt64(3 * block) && bench.core.retiredLayerCount == 0)
        func check(files: [UInt32], names: [UInt32]) throws {
            #expect(bench.core.layers.map(\.rawValue) == names)
            #expect(bench.core.layerFiles.map(\.rawValue) == files)
            #expect(try bench.disk.layersPresent().map(\.rawValue) == files)
            #expect(try read(bench, 0, 200, layer: names[0]) == view)
            #expect(try read(bench, 0, 200) == view)
            #expect(try read(bench, 256, 1) == ReplicaBench.pattern(9))
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
        try install(bench)
        #expect(try read(bench, 0, 1, layer: 2) == nil, "it can't be meant")
        try settle(bench)
        try check(files: [3], names: [3])
        #expect(bench.pool.inUse == 0 && bench.failure == nil)
    }

    /// The volume grew between the two: the lower one's files are too short to be the upper one's,
    /// so that goes up, and the copy opens.
    @Test func aLayerThatIsTooShortGoesUp() throws {
        let bench = try ReplicaBench(regions: 2)
        _ = try bench.attach()
        bench.write(ReplicaBench.pattern(10, blocks: 8), at: 0)
        bench.write(ReplicaBench.pattern(9), at: UInt64(Geometry.regionSize), sequence: 2)
        try bench.run()
        func install(_ change: (inout VolumeRecord) -> Void) throws {
            var record = try #require(bench.lineage)
            record.epoch = bench.core.promise.next
            record.engine = InstanceID(rawValue: 1)
            change(&record)
            bench.lineage = record
            let tag = bench.send(
                .install, epoch: record.epoch.rawValue,
                table: InstallRequest(engine: record.engine, record: record).encoded())
            try bench.run()
            #expect(bench.status(tag) == .ok)
        }
        bench.lineage = bench.record(epoch: 1)
        try install { $0.freezeHead("a", created: 1) }
        let prepare = bench.send(
            .prepareSize, epoch: 2, offset: UInt64(6 * Geometry.regionSize))
        try bench.run()
        #expect(bench.status(prepare) == .ok)
        try install { $0.grow(to: UInt64(6 * Geometry.regionSize)) }
        bench.write(ReplicaBench.pattern(30), at: 4096, epoch: 3, sequence: 5)
        try bench.run()
        try install { $0.freezeHead("b", created: 2) }
        try install { $0.deleteSnapshot(of: LayerID(rawValue: 1)) }
        try settle(bench)
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

    /// A write to the frozen layer that a client sent before, and that comes when the layer is about
    /// to leave: it waits, and is there afterwards.
    @Test func aLateWriteIsNotLostWithTheLayer() throws {
        let (bench, seen) = try three()
        bench.deleted = [1]
        try install(bench)
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
        try settle(bench)
        #expect(bench.status(tag) == .ok)
        var view = try #require(seen[2])
        view.replaceSubrange(6 * block..<7 * block, with: ReplicaBench.pattern(88))
        #expect(try read(bench, 0, 8, layer: 2) == view)
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
        try install(bench, layers: 2)
        try put(200, 0..<4)
        try install(bench, layers: 3)
        try put(300, 0..<2)
        try install(bench, layers: 4)
        bench.deleted = [2]
        try install(bench)
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
        try install(bench)
        try settle(bench)
        bench.deleted = [1, 2]
        try install(bench)
        try settle(bench)
        #expect(bench.core.retiredLayerCount == 0)
        for number in 0..<6 as Range<UInt64> {
            let expected = ReplicaBench.pattern((number < 2 ? 300 : 400) + number)
            #expect(try read(bench, Int(number) * 256, 1, layer: 3) == expected, "region \(number)")
        }
        #expect(bench.pool.inUse == 0 && bench.failure == nil)
    }

    /// Resync writes to the heir while it goes over: what they leave is there afterwards.
    @Test func changesMeetAMergeDownwards() throws {
        let (bench, seen) = try three()
        bench.deleted = [1]
        try install(bench)
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
        view.replaceSubrange(5 * block..<6 * block, with: zero(1))
        #expect(try read(bench, 0, 8, layer: 2) == view)
        try settle(bench)
        #expect(bench.core.retiredLayerCount == 0)
        #expect(try read(bench, 0, 8, layer: 2) == view)
        try bench.reopen()
        _ = try bench.attach(epoch: 30)
        #expect(try read(bench, 0, 8, layer: 2) == view)
        #expect(bench.pool.inUse == 0 && bench.failure == nil)
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
        try settle(model.bench)
        #expect(model.bench.core.layers.map(\.rawValue) == model.views.keys.sorted())
        #expect(model.bench.pool.inUse == 0 && model.bench.failure == nil)
    }
}
