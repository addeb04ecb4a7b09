import Testing

@testable import HapteraCore

extension ReplicaBench {
    static let cloneMember = VolumeRecord.Member(
        replica: ReplicaID(rawValue: 17), incarnation: Incarnation(rawValue: 18))

    /// Makes a copy of a clone of the layer's snapshot, which has everything flushed first.
    func clone(
        _ layer: LayerID, of source: VolumeRecord, sequence: () -> UInt64
    ) throws -> (disk: ReplicaTestDisk, record: VolumeRecord) {
        let snapshot = try #require(source.snapshots.first { $0.layer == layer })
        let record = VolumeRecord(
            cloning: snapshot, of: source, volume: Self.volume, name: "clone", size: core.size,
            nonce: 3, inSync: [Self.cloneMember])
        let layers = try core.beginSharing(layer, epoch: record.epoch)
        for _ in 0..<20 where core.layersToLink(layers) == nil {
            let (number, epoch) = (sequence(), core.promise.rawValue)
            send(.flush, epoch: epoch, sequence: number)
            try run()
            send(.stable, epoch: epoch, sequence: number, auxiliary: epoch)
            try tick()
        }
        let linked = try #require(core.layersToLink(layers))
        let other = ReplicaTestDisk()
        disk.link(linked, to: other)
        core.endSharing(layers, linked: linked)
        try ReplicaCore.createClone(
            storage: other, member: Self.cloneMember, record: record,
            source: .init(layers: linked, size: core.identity.size, logIndex: core.logNextIndex),
            logCapacity: ActivityLog.capacityMin)
        return (other, record)
    }
}

/// Layers whose files two copies have: neither changes what the other one sees.
@Suite struct ReplicaSharingTests {
    private var block: Int { ReplicaBench.block }

    /// `threeLayers`, all frozen, under an empty head.
    private func four() throws -> (bench: ReplicaBench, seen: [UInt32: [UInt8]]) {
        let (bench, seen) = try ReplicaBench.threeLayers()
        try bench.installNext(layers: 4)
        return (bench, seen)
    }
    private func clone(
        _ bench: ReplicaBench, _ layer: UInt32
    ) throws -> (disk: ReplicaTestDisk, record: VolumeRecord) {
        var sequence: UInt64 = 100
        let record = try #require(bench.core.installedRecord)
        return try bench.clone(LayerID(rawValue: layer), of: record) {
            sequence += 1
            return sequence
        }
    }
    private func open(_ disk: ReplicaTestDisk, _ record: VolumeRecord) throws -> ReplicaBench {
        let bench = try ReplicaBench(disk: disk, create: false)
        bench.lineage = record
        _ = try bench.attach(epoch: record.epoch.rawValue + 1)
        return bench
    }

    /// The clone has the layers below its snapshot's, whether their snapshots are still there or
    /// not; both go their ways; when one has gone, the other's deleted layers are merged.
    @Test(arguments: [[], [1], [1, 2], [1, 2, 3]] as [Set<UInt32>], [2, 3] as [UInt32])
    func cloneAndSourceAreIndependent(deleted: Set<UInt32>, layer: UInt32) throws {
        let (bench, seen) = try four()
        let expected = try #require(seen[layer])
        if deleted.contains(1), !deleted.contains(2) {
            // Retired, and not merged yet.
            bench.deleted = [1]
            try bench.installNext()
        }
        let (disk, record) = try clone(bench, layer)
        let other = try open(disk, record)
        #expect(try other.read(0, 8) == expected)
        #expect(try other.read(0, 8, layer: layer) == expected)
        #expect(other.core.retiredLayerCount == Int(layer) - 1)

        other.write(ReplicaBench.pattern(90), at: 0, epoch: record.epoch.rawValue + 1)
        bench.write(ReplicaBench.pattern(80), at: 0, epoch: bench.core.promise.rawValue)
        try other.run()
        try bench.run()
        bench.deleted = deleted
        try bench.installNext()
        try bench.settle()
        try other.settle()
        for kept in [1, 2, 3] as Set<UInt32> where !deleted.contains(kept) {
            #expect(try bench.read(0, 8, layer: kept) == seen[kept])
        }
        let head = ReplicaBench.pattern(80) + (seen[3] ?? []).dropFirst(block)
        #expect(try bench.read(0, 8) == head)
        #expect(try other.read(0, 8) == ReplicaBench.pattern(90) + expected.dropFirst(block))
        #expect(disk.violations == [] && bench.disk.violations == [])
        #expect(!deleted.contains(layer) || bench.core.retiredLayerCount > 0)

        // The source is deleted: the clone's layers are its own, and become one.
        bench.disk.discard()
        for layer in other.core.sharedLayers { other.core.setShared(layer, false) }
        try other.settle()
        #expect(other.core.retiredLayerCount == 0)
        #expect(try other.read(0, 8, layer: layer) == expected)
        #expect(try other.read(0, 8) == ReplicaBench.pattern(90) + expected.dropFirst(block))
        #expect(other.pool.inUse == 0 && other.failure == nil && bench.pool.inUse == 0)
    }

    @Test func theSourceMergesWhenTheCloneHasGone() throws {
        let (bench, seen) = try four()
        let (disk, _) = try clone(bench, 2)
        bench.deleted = [1, 2]
        try bench.installNext()
        try bench.settle()
        #expect(bench.core.retiredLayerCount == 2)
        try bench.reopen()
        _ = try bench.attach(epoch: 30)
        #expect(bench.core.sharedLayers == [1, 2].map(LayerID.init))
        try bench.settle()
        #expect(try bench.read(0, 8, layer: 3) == seen[3] && bench.core.retiredLayerCount == 2)
        disk.discard()
        for layer in bench.core.sharedLayers { bench.core.setShared(layer, false) }
        try bench.settle()
        #expect(bench.core.layers == [3, 4].map(LayerID.init))
        #expect(try bench.read(0, 8, layer: 3) == seen[3])
        #expect(bench.pool.inUse == 0 && bench.failure == nil)
    }

    /// What is stuck counts as its heir's: every answer about the layer is that of a copy that has
    /// merged the two.
    @Test func answersAreThoseOfAMergedCopy() throws {
        func answers(isShared: Bool) throws -> [[UInt8]] {
            let (bench, _) = try four()
            bench.write(ReplicaBench.pattern(95), at: UInt64(9 * block), epoch: 4, sequence: 6)
            try bench.run()
            if isShared { _ = try clone(bench, 2) }
            bench.deleted = [1, 2]
            try bench.installNext()
            if !isShared { try bench.settle() }
            let epoch = bench.core.promise.rawValue
            var answers: [[UInt8]] = []
            func ask(_ kind: FrameKind, layer: UInt32, length: Int, flags: UInt16 = 0) throws {
                let tag = bench.send(
                    kind, epoch: epoch, length: length, flags: flags, layer: layer)
                try bench.run()
                let reply = try #require(bench.reply(tag))
                #expect(reply.header.status == .ok)
                answers += [reply.table, reply.data]
            }
            for layer in [3, 4] as [UInt32] {
                try ask(.digest, layer: layer, length: Geometry.regionSize)
                try ask(.read, layer: layer, length: 8 * block, flags: FrameFlags.resync)
                try ask(.verify, layer: layer, length: Geometry.regionSize)
                try ask(.status, layer: layer, length: Geometry.regionSize)
            }
            #expect(bench.pool.inUse == 0 && bench.core.retiredLayerCount == (isShared ? 2 : 0))
            return answers
        }
        let (shared, merged) = (try answers(isShared: true), try answers(isShared: false))
        for (index, answer) in shared.enumerated() where index != 0 {
            #expect(answer == merged[index], "answer \(index)")
        }
        // The digest's birth is at most later.
        #expect(shared[0].dropFirst(8) == merged[0].dropFirst(8))
    }

    /// A repair is what the layer holds by its entries: its bytes are written where they were.
    /// Anything else is no repair, and refused.
    @Test(arguments: [2, 3] as [UInt32]) func sharedLayersTakeRepairsOnly(layer: UInt32) throws {
        let (bench, seen) = try four()
        let (disk, record) = try clone(bench, layer)
        bench.deleted = [1]
        try bench.installNext()
        let view = try #require(seen[layer])
        // Of layer 1, and of the layer itself.
        for (place, holder) in [(7, 1), (3, layer)] as [(Int, UInt32)] {
            let memory = try disk.memory(.data(LayerID(rawValue: holder)))
            memory[place * block + 5] ^= 1
            #expect(try bench.read(place, 1, layer: layer) == nil)
        }
        let epoch = bench.core.promise.rawValue
        func write(_ data: [UInt8], _ first: Int) throws -> FrameStatus? {
            let tag = bench.write(
                data, at: UInt64(first * block), epoch: epoch, sequence: 40,
                flags: FrameFlags.resync | FrameFlags.fua, layer: layer)
            try bench.run()
            return bench.status(tag)
        }
        #expect(try write(ReplicaBench.pattern(77), 7) == .ioError)
        let target = [UInt8](view[3 * block..<8 * block])
        // The bottom layer is deleted in one case only: then both are one.
        let isFold = layer == 2
        #expect(try write(target, 3) == (isFold ? .ok : .ioError))
        guard isFold else { return }
        #expect(try bench.read(0, 8, layer: layer) == view)
        let other = try open(disk, record)
        #expect(try other.read(0, 8) == view)
        #expect(bench.pool.inUse == 0 && other.pool.inUse == 0)
        // Only these two were changed, and no page.
        #expect(bench.disk.violations.count == 1 || bench.disk.violations.count == 2)
        #expect(bench.disk.violations.allSatisfy { $0.contains("changed") })
    }

    @Test func whatCannotBeSharedIsRefused() throws {
        let (bench, _) = try four()
        func refusal(_ layer: UInt32, _ epoch: UInt64 = 1000) -> SharingRefusal? {
            do throws(SharingRefusal) {
                _ = try bench.core.beginSharing(LayerID(rawValue: layer), epoch: Epoch(epoch))
                return nil
            } catch { return error }
        }
        #expect(refusal(9) == .noSuchLayer && refusal(4) == .noSuchLayer)
        #expect(refusal(2, 4) == .epochTooLow)
        bench.deleted = [1]
        try bench.installNext()
        #expect(refusal(1) == .noSuchLayer)
        #expect(bench.core.sharedLayers == [])
        #expect(refusal(2) == nil && bench.core.sharedLayers == [1, 2].map(LayerID.init))
        // Nothing is flushed: not yet. And it can be given up.
        #expect(bench.core.layersToLink(bench.core.sharedLayers) == nil)
        let layers = bench.core.sharedLayers
        bench.core.endSharing(layers, linked: [])
        for layer in layers { bench.core.setShared(layer, false) }
        try bench.settle()
        #expect(bench.core.retiredLayerCount == 0)
    }

    /// A clone's log begins where its source's was: pages that it shares name records below, and
    /// those that it writes later, when the layers are its own, must count.
    @Test func changesAfterMergesSurviveAPowerCut() throws {
        let (bench, seen) = try four()
        let (disk, record) = try clone(bench, 3)
        bench.disk.discard()
        let other = try open(disk, record)
        try other.settle()
        #expect(other.core.retiredLayerCount == 0)
        var random = TestRandom(seed: 5)
        disk.cutPower(&random, keepPercent: 100)
        try other.reopen(boot: 2)
        _ = try other.attach(epoch: record.epoch.rawValue + 5)
        #expect(try other.read(0, 8) == seen[3])
    }

    /// Any work on a volume whose snapshots are cloned all the time, deleted, with kills.
    @Test(arguments: 1...4 as ClosedRange<UInt64>, [false, true])
    func clonesStayAsTheyWere(seed: UInt64, isTree: Bool) throws {
        let model = try ChainModel(seed: seed, isTree: isTree, isCloned: true)
        for step in 0..<200 {
            try model.act(step)
            if step % 20 == 0, model.isInstalled {
                try model.check(step)
                try model.checkClones(step)
            }
        }
        try model.installAll()
        try model.check(200)
        try model.checkClones(200)
        #expect(model.clonesMade > 1)
        while !model.clones.isEmpty { model.discardClone(0) }
        try model.bench.settle()
        try model.check(201)
        #expect(model.bench.core.sharedLayers == [])
        #expect(model.bench.core.unmergedLayerCount == 0)
        #expect(model.bench.pool.inUse == 0 && model.bench.failure == nil)
    }

    /// Two clones of one snapshot are asked for; the first is given up while the second waits.
    @Test func aShareGivenUpLeavesTheOtherItsLayers() throws {
        let (bench, seen) = try four()
        let record = try #require(bench.core.installedRecord)
        let first = try bench.core.beginSharing(LayerID(rawValue: 2), epoch: Epoch(1000))
        let second = try bench.core.beginSharing(LayerID(rawValue: 2), epoch: Epoch(1000))
        // At the deadline, or because linking fails.
        bench.core.endSharing(first, linked: [])
        for layer in first where !bench.disk.isShared(layer) { bench.core.setShared(layer, false) }
        #expect(bench.core.sharedLayers == second)
        try bench.settle()
        let linked = try #require(bench.core.layersToLink(second))
        let disk = ReplicaTestDisk()
        bench.disk.link(linked, to: disk)
        bench.core.endSharing(second, linked: linked)
        let snapshot = try #require(record.snapshots.first { $0.layer.rawValue == 2 })
        let cloned = VolumeRecord(
            cloning: snapshot, of: record, volume: ReplicaBench.volume, name: "clone",
            size: bench.core.size, nonce: 3, inSync: [ReplicaBench.cloneMember])
        try ReplicaCore.createClone(
            storage: disk, member: ReplicaBench.cloneMember, record: cloned,
            source: .init(
                layers: linked, size: bench.core.identity.size,
                logIndex: bench.core.logNextIndex), logCapacity: ActivityLog.capacityMin)
        bench.deleted = [1, 2]
        try bench.installNext()
        try bench.settle()
        #expect(bench.disk.violations == [])
        let other = try open(disk, cloned)
        #expect(try other.read(0, 8) == seen[2])
    }

    /// A joiner is to share its members' damage in a block of which a deleted layer, whose files a
    /// clone has, holds an older version: its heir says so, and the clone keeps what it has.
    @Test func aLostBlockHidesWhatIsStuck() throws {
        let (bench, seen) = try four()
        let (disk, record) = try clone(bench, 1)
        bench.deleted = [1]
        try bench.installNext()
        let tag = bench.send(
            .adopt, epoch: bench.core.promise.rawValue, offset: 0, length: 4096, sequence: 40,
            auxiliary: 1 | 0x1234_5678 << 32, flags: FrameFlags.resync, layer: 2)
        try bench.run()
        #expect(bench.status(tag) == .ok)
        for layer in [2, 3, 0] as [UInt32] { #expect(try bench.read(0, 1, layer: layer) == nil) }
        let expected = try #require(seen[3])
        #expect(try bench.read(1, 7) == [UInt8](expected[block...]))
        try bench.settle()
        #expect(try bench.read(0, 1) == nil)
        #expect(bench.disk.violations == [] && bench.pool.inUse == 0)
        #expect(try open(disk, record).read(0, 8) == seen[1])
    }

    /// What a power cut left of a write, in a deleted layer that can't be merged because a clone is
    /// about to be made: an engine without a better copy keeps it. (Seed 5152174: it was refused,
    /// and a block that no flush had covered could not be read any more.)
    @Test func doubtfulBytesBeneathAreKept() throws {
        let (bench, seen) = try ReplicaBench.threeLayers()
        _ = try bench.core.beginSharing(LayerID(rawValue: 2), epoch: Epoch(1 << 40))
        bench.deleted = [1]
        try bench.installNext()
        try bench.disk.memory(.data(LayerID(rawValue: 1)))[100] ^= 1
        #expect(try bench.read(0, 1, layer: 2) == nil)
        func adopt(_ blocks: Int, _ sequence: UInt64) throws -> FrameStatus? {
            let tag = bench.send(
                .adopt, epoch: bench.core.promise.rawValue, offset: 0, length: blocks * block,
                sequence: sequence, auxiliary: AdoptRequest.keep, flags: FrameFlags.resync,
                layer: 2)
            try bench.run()
            return bench.status(tag)
        }
        #expect(try adopt(4, 40) == .ioError, "of two layers at once: the engine asks singly")
        #expect(try adopt(1, 41) == .ok)
        var expected = try #require(seen[2])
        expected[100] ^= 1
        #expect(try bench.read(0, 8, layer: 2) == expected)
        #expect(bench.pool.inUse == 0 && bench.failure == nil)
    }

    /// Below the record's lowest layer everything reads zero, so absent and zero are the same
    /// there; copies differ in it when one has a retired layer left (seed 401521).
    @Test(arguments: [BlockState.zero, .absent]) func absentIsZeroInTheLowestLayer(
        wanted: BlockState
    ) throws {
        let bench = try ReplicaBench()
        _ = try bench.attach()
        bench.write(ReplicaBench.pattern(10, blocks: 8), at: 0, epoch: 1)
        try bench.run()
        try bench.installNext(layers: 2)
        if wanted == .absent {
            // The copy has layer 1 stuck, shared with a clone; another has merged and dropped it.
            _ = try clone(bench, 1)
            bench.deleted = [1]
            try bench.installNext()
        }
        // A client's trim of what was never written, in the record's lowest layer.
        let layer: UInt32 = wanted == .absent ? 2 : 1
        if wanted == .absent {
            let tag = bench.send(
                .setState, epoch: bench.core.promise.rawValue, offset: 100 * 4096, length: 4096,
                sequence: 2, auxiliary: UInt64(BlockState.zero.rawValue))
            try bench.run()
            #expect(bench.status(tag) == .ok)
            try bench.installNext(layers: 3)
        }
        _ = try clone(bench, layer)
        // What a scrub's job, or a copy to this member when it has been away, sends here for a
        // member that has it the other way.
        let tag = bench.send(
            .setState, epoch: bench.core.promise.rawValue, offset: 100 * 4096, length: 4096,
            sequence: 40, auxiliary: UInt64(wanted.rawValue), flags: FrameFlags.resync,
            layer: layer)
        try bench.run()
        #expect(bench.status(tag) == .ok)
    }

    /// The source's copy was made when the volume had grown; the snapshot is of before.
    @Test func aCloneOfASnapshotFromBeforeTheCopyWasMade() throws {
        let (bench, _) = try four()
        var record = try #require(bench.core.installedRecord)
        record.grow(to: 2 * record.size)  // at layer 4
        let snapshot = try #require(record.snapshots.first { $0.layer.rawValue == 3 })
        let cloned = VolumeRecord(
            cloning: snapshot, of: record, volume: ReplicaBench.volume, name: "clone",
            size: record.size(of: snapshot.layer), nonce: 3, inSync: [ReplicaBench.cloneMember])
        let disk = ReplicaTestDisk()
        bench.disk.link([1, 2, 3].map(LayerID.init), to: disk)
        // `share` answers the size with which a replica that replaced another one was made.
        try ReplicaCore.createClone(
            storage: disk, member: ReplicaBench.cloneMember, record: cloned,
            source: .init(
                layers: [1, 2, 3].map(LayerID.init), size: record.size,
                logIndex: bench.core.logNextIndex), logCapacity: ActivityLog.capacityMin)
    }

    /// The source drops a deleted layer that held nothing as soon as it was linked: the clone has
    /// it all the same.
    @Test func theSourceMayDropWhatItShared() throws {
        let (bench, seen) = try four()
        let record = try #require(bench.core.installedRecord)
        let snapshot = try #require(record.snapshots.first { $0.layer.rawValue == 2 })
        let cloned = VolumeRecord(
            cloning: snapshot, of: record, volume: ReplicaBench.volume, name: "clone",
            size: bench.core.size, nonce: 3, inSync: [ReplicaBench.cloneMember])
        try bench.settle()
        let layers = try bench.core.beginSharing(LayerID(rawValue: 2), epoch: cloned.epoch)
        let disk = ReplicaTestDisk()
        bench.disk.link(layers, to: disk)
        try bench.disk.remove(LayerID(rawValue: 1))
        let source = ReplicaCore.CloneSource(
            layers: layers, size: bench.core.identity.size, logIndex: bench.core.logNextIndex)
        func make(_ disk: ReplicaTestDisk) throws {
            try ReplicaCore.createClone(
                storage: disk, member: ReplicaBench.cloneMember, record: cloned, source: source,
                logCapacity: ActivityLog.capacityMin)
        }
        try make(disk)
        #expect(try open(disk, cloned).read(0, 8) == seen[2])
        #expect(throws: StorageError.self) { try make(ReplicaTestDisk()) }
    }

    /// Before anything is linked, what the snapshot's flush has yet to cover may still come.
    @Test func aPendingShareKeepsNoWriteAway() throws {
        let bench = try ReplicaBench()
        _ = try bench.attach()
        try bench.installNext(layers: 2)
        let layers = try bench.core.beginSharing(LayerID(rawValue: 1), epoch: Epoch(1000))
        let epoch = bench.core.promise.rawValue
        let tag = bench.write(
            ReplicaBench.pattern(10), at: 0, epoch: epoch, sequence: 9, layer: 1)
        try bench.run()
        #expect(bench.status(tag) == .ok)
        #expect(bench.core.layersToLink(layers) == nil)
        bench.send(.flush, epoch: epoch, sequence: 10)
        try bench.run()
        bench.send(.stable, epoch: epoch, sequence: 10, auxiliary: epoch)
        try bench.tick()
        #expect(bench.core.layersToLink(layers) == layers)
        bench.core.endSharing(layers, linked: layers)
        let late = bench.write(
            ReplicaBench.pattern(11), at: 0, epoch: epoch, sequence: 11, layer: 1)
        try bench.run()
        #expect(bench.status(late) == .ioError)
        #expect(try bench.read(0, 1) == ReplicaBench.pattern(10))
    }

    /// A layer that is shorter than the volume, as every clone made with a larger size has.
    @Test func inspectReadsLayersThatAreShorter() throws {
        let (bench, _) = try four()
        var record = bench.record(epoch: bench.core.promise.rawValue + 1, layers: 5)
        record.grow(to: 2 * bench.core.size)
        let tag = bench.send(
            .install, epoch: record.epoch.rawValue,
            table: InstallRequest(engine: InstanceID(rawValue: 1), record: record).encoded())
        try bench.run()
        #expect(bench.status(tag) == .ok)
        try bench.settle()
        let reader = try ReplicaReader(opening: bench.disk)
        #expect(throws: Never.self) { _ = try reader.births() }
    }
}
