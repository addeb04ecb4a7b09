import HapteraCore

/// What each snapshot came after and what it takes, of one record: worked out once for all of them.
struct SnapshotLineage {
    /// The snapshot that one came after; none: none that is left. The head's is the volume's.
    private(set) var parents: [LayerID: VolumeRecord.Snapshot] = [:]
    /// Bytes of a layer with all that it is read through.
    private(set) var cumulative: [LayerID: UInt64] = [:]
    /// Bytes of a layer by itself, as replicas have said.
    let own: [LayerID: UInt64]
    /// What deleting the layer's snapshot gives back, as replicas have said.
    let exclusive: [LayerID: UInt64]

    init(
        _ record: VolumeRecord?, own: [LayerID: UInt64], exclusive: [LayerID: UInt64] = [:]
    ) {
        self.own = own
        self.exclusive = exclusive
        guard let record else { return }
        let tree = record.tree
        let named = Dictionary(uniqueKeysWithValues: record.snapshots.map { ($0.layer, $0) })
        // Ascending: what is below a layer comes before it.
        for (place, layer) in record.layers.enumerated() {
            let below = tree.below(place, in: record.layers).map { record.layers[$0] }
            parents[layer] = below.flatMap { named[$0] ?? parents[$0] }
            cumulative[layer] = (own[layer] ?? 0) + (below.flatMap { cumulative[$0] } ?? 0)
        }
    }
}
