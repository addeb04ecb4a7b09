import Testing

@testable import HapteraCore

/// Reverts: the layers of a volume are a tree, and so are those of every copy.
@Suite struct LayerTreeTests {
    private func layer(_ id: UInt32) -> LayerID { LayerID(rawValue: id) }
    private func record() -> VolumeRecord {
        VolumeRecord(
            volume: ReplicaBench.volume, name: "vol", epoch: Epoch(1), nonce: 1, size: 1 << 20,
            inSync: [.init(replica: ReplicaID(rawValue: 1), incarnation: Incarnation(rawValue: 1))])
    }

    /// Snapshots a (1) and b (2); back to a: 4 over 1, and what was is kept (3).
    private func reverted() -> VolumeRecord {
        var record = record()
        record.freezeHead("a", created: 1)
        record.freezeHead("b", created: 2)
        record.freezeHead("kept", created: 3, target: layer(1))
        return record
    }

    @Test func aRevertMakesAHeadOverAnOlderLayer() {
        let record = reverted()
        #expect(record.layers.map(\.rawValue) == [1, 2, 3, 4])
        #expect(record.reverts == [.init(head: layer(4), target: layer(1))])
        let seen = (1...4).map { lower in record.tree.isSeen(layer(lower), from: layer(4)) }
        #expect(seen == [true, false, false, true])
        #expect((1...3).allSatisfy { record.tree.isSeen(layer($0), from: layer(3)) })
        #expect(record.tree.below(3, in: record.layers) == 0)
        #expect(VolumeRecord(decoding: record.encoded()) == record)
    }

    @Test func aLayerThatTwoWereMadeOverOutlivesItsSnapshot() {
        var record = reverted()
        record.deleteSnapshot(of: layer(1))
        #expect(record.layers.map(\.rawValue) == [1, 2, 3, 4])
        #expect(record.snapshots.map(\.name) == ["b", "kept"])
        // Its other line ends: what it holds is the head's.
        record.deleteSnapshot(of: layer(3))
        #expect(record.layers.map(\.rawValue) == [1, 2, 4])
        record.deleteSnapshot(of: layer(2))
        #expect(record.layers.map(\.rawValue) == [4])
        // A copy that was away still has 2 and 3, and must not take them for the head's.
        #expect(record.reverts.count == 1)
        let heirs = (1...4).map { record.tree.heir(of: layer($0), in: record.layers)?.rawValue }
        #expect(heirs == [4, nil, nil, 4])
        #expect(VolumeRecord(decoding: record.encoded()) == record)
    }

    @Test func aRevertIsForgottenWithEverythingMadeSince() {
        var record = reverted()
        record.freezeHead("kept again", created: 4, target: layer(1))
        #expect(record.reverts.count == 2)
        record.deleteSnapshot(of: layer(4))
        #expect(record.reverts == [.init(head: layer(5), target: layer(1))])
        #expect(record.tree.heir(of: layer(4), in: record.layers) == nil)
    }

    @Test func whatHappenedAfterwardsIsNoFormerRevert() throws {
        let record = reverted()
        let kept = try #require(record.snapshot(named: "kept"))
        let (a, b) = (record.snapshots[0], record.snapshots[1])
        #expect(record.hasReverted(to: a, keeping: kept))
        #expect(!record.hasReverted(to: b, keeping: kept))
        #expect(!record.hasReverted(to: a, keeping: b))
    }

    @Test func recordsWithoutRevertsAreAsBefore() {
        var record = record()
        record.freezeHead("a", created: 1)
        var reader = ByteReader(record.encoded())
        _ = reader.read(UInt32.self)
        #expect(reader.read(UInt32.self) == VolumeRecord.formatVersion)
    }

    @Test func revertsThatMakeNoSenseAreRefused() {
        for (head, target) in [(4, 4), (4, 5), (5, 1), (1, 0), (4, 0)] as [(UInt32, UInt32)] {
            var record = reverted()
            record.reverts = [.init(head: layer(head), target: layer(target))]
            #expect(VolumeRecord(decoding: record.encoded()) == nil, "\(head) over \(target)")
        }
        var record = reverted()
        record.reverts += record.reverts
        #expect(VolumeRecord(decoding: record.encoded()) == nil)
    }

    @Test func thereIsALimit() {
        var record = record()
        record.freezeHead("golden", created: 1)
        var count = 0
        while record.mayRevert(keeping: "kept\(count)") {
            record.freezeHead("kept\(count)", created: 1, target: layer(1))
            count += 1
        }
        #expect(count == VolumeRecord.revertsMax)
        #expect(VolumeRecord(decoding: record.encoded()) == record)
        // What reverts have kept can go, and then there is room.
        for number in 0..<count {
            let kept = record.snapshot(named: "kept\(number)")
            record.deleteSnapshot(of: kept?.layer ?? .head)
        }
        #expect(record.layers.count == 2 && record.reverts.count == 1)
    }

    /// Snapshots, reverts, deletions, writes, kills and idle times in any order against a model
    /// with a tree of its own.
    @Test(arguments: [2, 3, 5, 6, 7, 8] as [UInt64])
    func everySnapshotLeftStaysAsItWas(seed: UInt64) throws {
        let model = try ChainModel(seed: seed, isTree: true)
        for step in 0..<140 {
            try model.act(step)
            guard step % 8 == 0 else { continue }
            try model.check(step)
            guard step % 40 == 0 else { continue }
            for (base, top) in model.pairs where model.isInstalled {
                let tag = model.ask(since: base, in: top)
                try model.bench.run()
                let changed = model.answer(tag)
                #expect(
                    changed == model.changed(since: base, in: top),
                    "step \(step), since \(base) in \(top)")
            }
        }
        #expect(model.deletions > 1 && model.reverts > 0)
        try model.installAll()
        for round in 0..<10 as Range<UInt64> {
            let epoch = model.bench.core.promise.rawValue
            model.bench.send(.flush, epoch: epoch, sequence: 10_000 + round)
            try model.bench.run()
            model.bench.send(
                .stable, epoch: epoch, sequence: 10_000 + round, auxiliary: epoch)
            try model.bench.run()
            try model.bench.tick(milliseconds: 20_000)
        }
        try model.check(140)
        let left = model.held.keys.sorted()
        let (there, names) = (model.bench.core.layers.map(\.rawValue), Set(left))
        #expect(there.filter(names.contains) == left)
        #expect(there.count == left.count + (model.bench.core.isLayerStaying ? 1 : 0))
        #expect(try model.bench.disk.layersPresent() == model.bench.core.layerFiles)
        #expect(model.bench.lineage?.layers.map(\.rawValue) == left)
        #expect(model.bench.pool.inUse == 0 && model.bench.failure == nil)
    }
}
