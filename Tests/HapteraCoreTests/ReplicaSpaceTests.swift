import Testing

@testable import HapteraCore

/// What a copy's files hold, read from them as if by another process, and what deletions would
/// leave of it: the definitions of docs/snapshots.md taken at their word.
struct SpaceModel {
    private struct File {
        var id: LayerID
        var name: LayerID
        var states: [BlockState]
        var isShared: Bool
        var dataCount: Int { states.count { $0 == .data } }
    }
    /// Ascending.
    private var files: [File] = []
    let record: VolumeRecord

    init(_ disk: ReplicaTestDisk) throws {
        let reader = try ReplicaReader(opening: disk)
        record = try #require(reader.manifest.installed)
        for id in reader.manifest.layers {
            var states: [BlockState] = []
            for number in 0..<reader.regionCount {
                let region = try reader.region(number, layer: id)
                states += (0..<Geometry.blocksPerRegion).map { reader.entry(region, $0).state }
            }
            files.append(
                File(
                    id: id, name: reader.manifest.name(of: id), states: states,
                    isShared: disk.isShared(id)))
        }
    }

    /// The layers that count as one, the uppermost first.
    private func groups(_ record: VolumeRecord) -> [LayerID: [File]] {
        files.reversed().reduce(into: [:]) { groups, file in
            guard let heir = record.tree.heir(of: file.name, in: record.layers) else { return }
            groups[heir, default: []].append(file)
        }
    }
    private func fold(_ files: [File]) -> [BlockState] {
        guard var fold = files.first?.states else { return [] }
        for file in files.dropFirst() {
            for block in fold.indices where fold[block] == .absent {
                fold[block] = file.states[block]
            }
        }
        return fold
    }
    private func merging(_ group: [File]) -> [File] { Array(group.prefix { !$0.isShared }) }

    /// Blocks of data on the disk when everything is merged that can be.
    private func atRest(_ record: VolumeRecord) -> Int {
        let groups = groups(record)
        let kept = Set(groups.values.joined().map(\.id))
        let elsewhere = files.filter { !kept.contains($0.id) && $0.isShared }
        return elsewhere.reduce(0) { $0 + $1.dataCount }
            + groups.values.reduce(0) { sum, group in
                let merging = merging(group)
                return sum + fold(merging).count { $0 == .data }
                    + group.dropFirst(merging.count).reduce(0) { $0 + $1.dataCount }
            }
    }
    func exclusive(_ layer: LayerID) -> Int {
        var deleted = record
        deleted.deleteSnapshot(of: layer)
        return atRest(record) - atRest(deleted)
    }
    var hidden: (unmerged: Int, stuck: Int) {
        groups(record).values.reduce(into: (0, 0)) { sum, group in
            for place in group.indices {
                let above = fold(Array(group[..<place]))
                let hidden = zip(group[place].states, above).count { $0 == .data && $1 != .absent }
                if place < merging(group).count { sum.0 += hidden } else { sum.1 += hidden }
            }
        }
    }
    /// Blocks that hold bytes nobody can ever read.
    func leaks(_ disk: ReplicaTestDisk) throws -> [String] {
        try files.flatMap { file in
            let data = try disk.memory(.data(file.id))
            return file.states.indices.filter { block in
                file.states[block] != .data && (block + 1) * Geometry.blockSize <= data.count
                    && !data.slice(block * Geometry.blockSize, Geometry.blockSize).isZero
            }.map { "\(file.id.rawValue):\($0) \(file.states[$0])" }
        }
    }
    func dataCount(_ file: LayerID) -> Int { files.first { $0.id == file }?.dataCount ?? 0 }
    /// Of the group: what comes back without its deletion.
    func unmerged(_ layer: LayerID) -> Int {
        let merging = merging(groups(record)[layer] ?? [])
        return merging.reduce(0) { $0 + $1.dataCount } - fold(merging).count { $0 == .data }
    }
}

extension ReplicaBench {
    /// Until everything has been counted. `isMerging`: merges that have to read get on.
    func count(isMerging: Bool = true) throws {
        let before = fault
        if !isMerging {
            fault = { action in
                if case .read(.data, _, _, _, _, _) = action { -5 } else { nil }
            }
        }
        defer { fault = before }
        for _ in 0..<40 {
            try tick(milliseconds: 6000)
            if core.isSpaceCounted { return }
        }
        Issue.record("it never ends")
    }

    /// Compares with the model, as soon as everything is counted.
    func checkSpace(_ what: String, isMerging: Bool = true) throws {
        try count(isMerging: isMerging)
        guard core.chain.count > 1 else { return }
        let model = try SpaceModel(disk)
        let spaces = core.snapshotSpaces
        #expect(spaces.map(\.layer) == model.record.snapshots.map(\.layer), "\(what)")
        for space in spaces {
            let isDiscarded = !space.files.isEmpty
            let expected =
                model.exclusive(space.layer) + (isDiscarded ? model.unmerged(space.layer) : 0)
            let found = space.files.reduce(Int(space.blocks ?? 999_999)) {
                $0 + model.dataCount($1)
            }
            #expect(found == expected, "\(what): layer \(space.layer.rawValue)")
        }
        let hidden = try #require(core.hiddenBlocks, "\(what)")
        #expect(
            hidden.unmerged == UInt64(model.hidden.unmerged)
                && hidden.stuck == UInt64(model.hidden.stuck), "\(what)")
    }
}

/// Sizes of snapshots, against a model that deletes them.
@Suite struct ReplicaSpaceTests {
    private var block: Int { ReplicaBench.block }

    /// 0..<8 in layer 1, of which 2 and 3 are hidden by layer 2, of whose 2 layer 3 hides one.
    @Test func whatTheNextOneHidesIsExclusive() throws {
        let (bench, _) = try ReplicaBench.threeLayers()
        try bench.count()
        #expect(
            bench.core.snapshotSpaces == [
                SnapshotSpace(layer: LayerID(rawValue: 1), blocks: 2),
                SnapshotSpace(layer: LayerID(rawValue: 2), blocks: 1),
            ])
        try bench.checkSpace("three layers")
        // A trim hides as data does; what was hidden already changes nothing.
        let epoch = bench.core.promise.rawValue
        bench.send(
            .setState, epoch: epoch, offset: 0, length: 5 * block, sequence: 9,
            auxiliary: UInt64(BlockState.zero.rawValue))
        try bench.run()
        try bench.count()
        #expect(bench.core.snapshotSpaces.map(\.blocks) == [2, 2])
        bench.deleted = [1]
        try bench.installNext()
        #expect(bench.core.snapshotSpaces.map(\.blocks) == [nil], "layer 1 may hold more of it")
        try bench.checkSpace("deleted", isMerging: false)
        try bench.settle()
        try bench.checkSpace("merged")
        // Blocks 0 and 1 of layer 1 are layer 2's now, and hidden.
        #expect(bench.core.snapshotSpaces.map(\.blocks) == [5])
        #expect(bench.pool.inUse == 0)
    }

    /// Taking one needs no counting, and what is known stays known.
    @Test func aNewSnapshotIsKnownAtOnce() throws {
        let (bench, _) = try ReplicaBench.threeLayers()
        try bench.count()
        try bench.installNext(layers: 4)
        #expect(bench.core.snapshotSpaces.map(\.blocks) == [2, 1, 0])
        #expect(bench.core.isSpaceCounted)
    }

    /// After a restart nothing is known, and nothing said, until it has been counted.
    @Test func aRestartCountsAgain() throws {
        let (bench, _) = try ReplicaBench.threeLayers()
        try bench.reopen()
        #expect(bench.core.snapshotSpaces.map(\.blocks) == [nil, nil])
        _ = try bench.attach(epoch: 9)
        try bench.count()
        #expect(bench.core.snapshotSpaces.map(\.blocks) == [2, 1])
    }

    /// A page that can't be read is tried again; meanwhile nothing is said.
    @Test func whatCannotBeReadIsNotGuessed() throws {
        let (bench, _) = try ReplicaBench.threeLayers()
        // Out of the log, so that nothing is in memory afterwards.
        try bench.settle()
        bench.core.beginShutdown(now: bench.now)
        for _ in 0..<4 { try bench.tick() }
        #expect(bench.core.isShutDown)
        try bench.reopen()
        _ = try bench.attach(epoch: 9)
        var failed = 0
        bench.fault = { action in
            guard case .read(.table, _, _, _, _, _) = action else { return nil }
            failed += 1
            return -5
        }
        for _ in 0..<4 { try bench.tick(milliseconds: 6000) }
        #expect(failed > 2 && bench.core.snapshotSpaces.map(\.blocks) == [nil, nil])
        bench.fault = nil
        try bench.checkSpace("readable again")
        #expect(bench.core.snapshotSpaces.map(\.blocks) == [2, 1])
        #expect(bench.pool.inUse == 0 && bench.failure == nil)
    }

    /// Nothing comes back of what a clone has, and what it hides is stuck.
    @Test func sharedLayersGiveNothingBack() throws {
        let (bench, _) = try ReplicaBench.threeLayers()
        try bench.installNext(layers: 4)
        var sequence: UInt64 = 100
        let record = try #require(bench.core.installedRecord)
        let (clone, _) = try bench.clone(LayerID(rawValue: 2), of: record) {
            sequence += 1
            return sequence
        }
        try bench.checkSpace("shared")
        #expect(bench.core.snapshotSpaces.map(\.blocks) == [0, 0, 0])
        bench.deleted = [1, 2]
        try bench.installNext()
        try bench.settle()
        try bench.checkSpace("deleted, and stuck")
        let hidden = try #require(bench.core.hiddenBlocks)
        #expect(hidden.unmerged == 0 && hidden.stuck == 5)
        clone.discard()
        for layer in bench.core.sharedLayers { bench.core.setShared(layer, false) }
        try bench.checkSpace("alone again", isMerging: false)
        try bench.settle()
        try bench.checkSpace("merged")
        #expect(bench.core.hiddenBlocks.map { $0.stuck } == 0)
    }

    /// Writes, trims, snapshots, deletions, reverts, clones, kills and idle times in any order,
    /// counted at any time, with merges done and with merges that do not get on.
    @Test(
        arguments: 1...10 as ClosedRange<UInt64>,
        [(false, false), (true, false), (false, true), (true, true)])
    func countsAreTheModels(seed: UInt64, kind: (isTree: Bool, isCloned: Bool)) throws {
        _ = try work(seed, isTree: kind.isTree, isCloned: kind.isCloned)
    }
    /// A layer of which nothing was left had its regions forgotten, stayed for the sake of others,
    /// and was filled again: space that it had yet to give back was never given back.
    @Test(arguments: [4, 6] as [UInt64])
    func whatIsFilledAgainKeepsNothingUnneeded(seed: UInt64) throws {
        let bench = try work(seed, isTree: false, isCloned: true).bench
        #expect(bench.core.unneededBlocks == 0)
        #expect(try SpaceModel(bench.disk).leaks(bench.disk) == [])
    }
    private func work(_ seed: UInt64, isTree: Bool, isCloned: Bool) throws -> ChainModel {
        let model = try ChainModel(seed: seed, isTree: isTree, isCloned: isCloned)
        for step in 0..<160 {
            try model.act(step)
            guard model.bench.random.below(4) == 0 else { continue }
            try model.bench.checkSpace(
                "step \(step)", isMerging: model.bench.random.below(2) == 0)
        }
        try model.installAll()
        try model.bench.checkSpace("installed", isMerging: false)
        while !model.clones.isEmpty { model.discardClone(0) }
        try model.bench.settle()
        try model.bench.checkSpace("at rest")
        #expect(model.bench.core.unmergedLayerCount == 0)
        #expect(model.bench.pool.inUse == 0 && model.bench.failure == nil)
        return model
    }

    /// A volume of several words of regions grows; its last regions are counted as well.
    @Test func aVolumeThatGrows() throws {
        let bench = try ReplicaBench(regions: 70)
        bench.lineage = bench.record(epoch: 1)
        _ = try bench.attach()
        func put(_ region: Int, _ value: UInt64) throws {
            bench.write(
                ReplicaBench.pattern(value), at: UInt64(region * Geometry.regionSize),
                epoch: bench.core.promise.rawValue, sequence: value)
            try bench.run()
            #expect(bench.replies.last?.header.status == .ok)
        }
        for region in [0, 63, 64, 69] { try put(region, UInt64(region + 1)) }
        try bench.installChanged { $0.freezeHead("first", created: 1) }
        try put(63, 100)
        try put(69, 101)
        try bench.checkSpace("as small as it was")
        #expect(bench.core.snapshotSpaces.map(\.blocks) == [2])
        try bench.installChanged { $0.grow(to: UInt64(140 * Geometry.regionSize)) }
        try put(139, 102)
        try put(0, 103)
        try bench.installChanged { $0.freezeHead("second", created: 1) }
        try put(139, 104)
        try bench.checkSpace("larger")
        #expect(bench.core.snapshotSpaces.map(\.blocks) == [3, 1])
    }
}
