// What was counted, as users ask for it: see docs/snapshots.md, "Sizes".

extension ReplicaCore {
    /// Of each snapshot of the record, what deleting it alone gives back when its layer is merged.
    package var snapshotSpaces: [SnapshotSpace] {
        guard let record = manifest.installed, !record.snapshots.isEmpty else { return [] }
        followChain()
        let named = Set(record.snapshots.map(\.layer))
        return record.snapshots.compactMap { snapshot in
            guard let place = chain.place(named: snapshot.layer), !chain.isRetired(place) else {
                return nil
            }
            return snapshotSpace(place, named)
        }
    }

    private func snapshotSpace(_ place: Int, _ named: Set<LayerID>) -> SnapshotSpace? {
        guard let group = space.groups.groups[place] else { return nil }
        var found = SnapshotSpace(layer: group.name)
        switch space.groups.overCounts[place] {
        case 0:
            // The end of a line: nobody inherits it. What it was made over is a snapshot's, or is
            // there for what else was made over it, and becomes one with that.
            found.files = group.files.filter { chain.index(of: $0).map(chain.isShared) == false }
            found.blocks = 0
            if let below = space.groups.below(place), !named.contains(chain.name(below)),
                space.groups.overCounts[below] == 2,
                let under = space.groups.groups[below],
                let other = under.covers.firstIndex(where: { $0.name != group.name })
            {
                found.blocks = blocks(under, under.covers[other])
            }
        case 1: found.blocks = group.covers.first.flatMap { blocks(group, $0) }
        // The layer stays for what was made over it.
        default: found.blocks = 0
        }
        return found
    }

    /// What the two give back when they become one.
    private func blocks(_ group: LayerGroup, _ cover: LayerGroup.Cover) -> UInt64? {
        let isShared = { (file: LayerID) in self.chain.index(of: file).map(self.chain.isShared) }
        // Nothing is merged into a shared layer, or out of it.
        if isShared(group.files[0]) != false { return 0 }
        if cover.files.contains(where: { isShared($0) != false }) { return 0 }
        return group.isKnown ? cover.total : nil
    }

    /// Blocks of deleted snapshots' layers that nothing of the volume shows: those that come back
    /// with merges, and those that stay because a clone shares the layers. Nil: not counted yet.
    package var hiddenBlocks: (unmerged: UInt64, stuck: UInt64)? {
        guard chain.retiredCount > 0 else { return (0, 0) }
        followChain()
        var hidden: (unmerged: UInt64, stuck: UInt64) = (0, 0)
        for case .some(let group) in space.groups.groups where group.files.count > 1 {
            guard group.isKnown else { return nil }
            hidden.unmerged += group.unmerged
            hidden.stuck += group.stuck
        }
        return hidden
    }
    /// Blocks whose space is about to be given back.
    package var unneededBlocks: UInt64 {
        var count = 0
        for frame in 0..<cache.frames.count where cache.frames[frame].state != .free {
            count += cache.frames[frame].unneeded.count
        }
        return UInt64(count)
    }

    /// Everything that has changed is counted.
    package var isSpaceCounted: Bool {
        guard chain.count > 1 else { return true }
        return space.groups.isCurrent(chain) && !space.isCounting
            && space.groups.groups.allSatisfy {
                $0.map { $0.isKnown && $0.staleCount == 0 } ?? true
            }
    }
}
