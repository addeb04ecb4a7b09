import HapteraCore

/// How many layers a world's volume gets, drawn from a source of its own: the rest of a world that
/// is not deep does not depend on it.
struct SimulatedDepth {
    /// Snapshots come one after the other and are deleted from the middle, while clients read more
    /// than they write: much of what they read lies below several layers.
    let isDeep: Bool
    /// As few layers as reads go through before there are views of regions (`LayerViews`).
    let layersForViews: Int
    /// Regions take each other's.
    let hasFewViews: Bool
    /// As many layers as a copy may have: in some worlds so few that snapshots and reverts are
    /// refused, and who was away may not come back before it has merged what it had.
    let layersMax: Int

    /// What has to be in a layer below the head that is to stay there, in blocks, and percent of
    /// what the head has: clients of a simulation soon write more than they have before.
    let stayingBlocksMin: Int
    let risingPercent: UInt64
    let hiddenBlocksMin: Int
    /// Snapshots are few, the newest is what is deleted, and clients read more than they write:
    /// what lies right below the head is often a deleted layer, and the larger one.
    let isShallow: Bool

    /// What full disks have no room for.
    let fullness: DiskTrouble.Fullness

    init(seed: UInt64, mutations: MutationSet) {
        let random = RandomSource(seed: RandomSource.mix(seed ^ 0x4445_5054))
        isDeep = random.permille(150) || mutations.contains(.viewOutlivesChange)
        layersForViews = random.pick([1, 2])
        hasFewViews = random.permille(500)
        let isLow = mutations.isEmpty && random.permille(200)
        layersMax = isLow ? random.between(6, 12) : Manifest.layersMax
        fullness = mutations.isEmpty ? random.pick([.data, .newPages, .all]) : .data
        stayingBlocksMin = random.pick([0, 2, 16, 2048])
        risingPercent = random.pick([0, 20, 100])
        hiddenBlocksMin = random.pick([0, 0, 8192])
        isShallow = !isDeep && (random.permille(150) || mutations.contains(.hiddenNotDurable))
    }
}

extension World {
    /// A snapshot or a revert was refused, because some member has as many layers as it may have.
    func observeTooManyLayers() {
        coverage.took(.layersFull)
        if depth.layersMax == Manifest.layersMax { fail("no member has too many layers") }
    }
    /// No layer is added that a member would refuse.
    func checkLayers(_ record: VolumeRecord, before: VolumeRecord) {
        let added = record.layers.count { $0 > before.head }
        guard added > 0 else { return }
        for host in hosts where before.contains(host) && !host.isRolledBack {
            guard let core = host.core, core.installedRecord?.epoch == before.epoch else {
                continue
            }
            if core.layerFiles.count + added > depth.layersMax {
                fail("\(host.name) has \(core.layerFiles.count) layers, and is to have more")
            }
        }
    }
}

extension Workload {
    mutating func deepen(_ depth: SimulatedDepth) {
        if depth.isShallow {
            snapshotsMax = 8
            snapshotPauseMilliseconds = 1000
            deletionPermille = 500
            readPermille = 600
        }
        guard depth.isDeep else { return }
        snapshotsMax = 30
        snapshotPauseMilliseconds = 150
        deletionPermille = 400
        readPermille = 700
    }
}
