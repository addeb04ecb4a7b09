// A volume that begins as a snapshot of another one, whose layers it shares.

extension VolumeRecord {
    /// How far above its source's epoch a clone begins, so that nothing that the source still does
    /// while the copies are made reaches it: births of the layers shared count in both.
    package static let epochsAboveSource: UInt64 = 1000

    /// The first record of a clone: the layer of the snapshot under its own name, and an empty head
    /// over it. Layers keep their numbers, since their files do. `size`: bytes, not below the
    /// snapshot's. `inSync`: copies that are made from those of `source`'s members.
    package init(
        cloning snapshot: Snapshot, of source: VolumeRecord, volume: VolumeID, name: String,
        size: UInt64, nonce: UInt64, inSync: [Member]
    ) {
        self.init(
            volume: volume, name: name,
            epoch: Epoch(source.epoch.rawValue + Self.epochsAboveSource), nonce: nonce,
            size: source.size(of: snapshot.layer), inSync: inSync)
        layers = [snapshot.layer, LayerID(rawValue: snapshot.layer.rawValue + 1)]
        snapshots = [snapshot]
        if size > self.size { grow(to: size) }
    }
}
