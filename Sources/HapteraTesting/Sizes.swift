import HapteraCore

// Invariant 36: what a copy has counted is what deletions would give back. It is counted in the
// background, so it is judged when nothing changes any more.

extension World {
    /// Simulated seconds within which everything has been counted.
    static let countingSeconds = 60

    func checkSizes() {
        // (Seed 1400923: whose clone was deleted while it was paused.)
        for host in hosts { notice(host) }
        let isCounted = run(seconds: Self.countingSeconds) {
            hosts.allSatisfy { host in
                guard let core = host.core else { return true }
                // What another volume shares it counts otherwise, until it has noticed.
                return core.isSpaceCounted && (core.sharedLayers.isEmpty || host.disk.isShared)
            }
        }
        // A page that is not what it was written as is never counted.
        guard isCounted || !faults.rot else { return }
        check(36, isCounted, "sizes are not counted")
        for host in hosts where host.rot == .none {
            checkSharedSizes(host)
            guard let core = host.core, !host.disk.isShared, core.unmergedLayerCount == 0,
                let record = core.installedRecord, !record.hasUnneededLayers,
                let image = ReplicaImage(
                    host.disk, isDurable: false, sizeBytes: workload.sizeBytes)
            else { continue }
            for space in core.snapshotSpaces {
                var deleted = record
                deleted.deleteSnapshot(of: space.layer)
                let expected = image.dataCount(record) - image.dataCount(deleted)
                let discarded = space.files.isEmpty ? 0 : image.dataCount(of: space.layer)
                let found = space.blocks.map { Int($0) + discarded }
                check(
                    36, found == expected,
                    "\(host.name) says that \(found.map(String.init) ?? "no number of") blocks of "
                        + "layer \(space.layer.rawValue) are exclusive: it is \(expected)")
            }
        }
    }
}

extension World {
    /// What another volume has as well is exclusive in neither.
    private func checkSharedSizes(_ host: SimulatedReplica) {
        guard host.disk.isLinked, let core = host.core else { return }
        let files = Dictionary(uniqueKeysWithValues: zip(core.layers, core.layerFiles))
        for space in core.snapshotSpaces {
            guard let file = files[space.layer], host.disk.isLinked(file) else { continue }
            check(
                36, space.blocks == 0 && space.files.isEmpty,
                "\(host.name) says that \(space.blocks.map(String.init) ?? "no number of") blocks "
                    + "of layer \(space.layer.rawValue), which another volume has, are exclusive")
        }
    }
}

extension ReplicaImage {
    /// Blocks with data when every layer that the record does not name has become one with its
    /// heir.
    fileprivate func dataCount(_ record: VolumeRecord) -> Int {
        var folds: [LayerID: [BlockState]] = [:]
        // The uppermost first: what it holds hides the rest.
        for layer in layers.reversed() {
            guard let heir = record.tree.heir(of: layer.id, in: record.layers) else { continue }
            let states = layer.entries.map(\.state)
            let above = folds[heir] ?? states
            folds[heir] = zip(above, states).map { $0 == .absent ? $1 : $0 }
        }
        return folds.values.reduce(0) { $0 + $1.count { $0 == .data } }
    }
    fileprivate func dataCount(of layer: LayerID) -> Int {
        self.layer(layer)?.entries.count { $0.state == .data } ?? 0
    }
}

extension VolumeRecord {
    /// A salvage has taken the name of a layer, which goes with the next snapshot that is deleted:
    /// that one gives back more than by itself (seed 2197).
    fileprivate var hasUnneededLayers: Bool {
        var record = self
        record.deleteSnapshot(of: .head)
        return record.layers != layers
    }
}
