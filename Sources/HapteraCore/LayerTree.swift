/// Which layer was made over which. Every layer is made as the head, over the one that was the head
/// before; a revert makes one over the layer of the snapshot that it goes back to. Ids are given
/// out in order and never again, so only the reverts have to be remembered: a volume without any is
/// a chain.
///
/// Layers that are gone keep their place here. What one held is its heir's, the lowest layer above
/// it that is left; it was discarded if none is.
package struct LayerTree: Equatable, Sendable {
    /// By head, ascending.
    package var reverts: [VolumeRecord.Revert]

    package init(_ reverts: [VolumeRecord.Revert] = []) { self.reverts = reverts }

    /// Whether what `lower` held when `upper` was made, and what it holds if it is that layer, is
    /// seen from `upper`.
    package func isSeen(_ lower: LayerID, from upper: LayerID) -> Bool {
        var top = upper
        // Layers made since a revert are a chain, down to the head that it made.
        while let revert = latest(upTo: top), revert.head > lower { top = revert.target }
        return lower <= top
    }
    /// The place, in ascending `layers`, of the nearest one that is seen from the layer at `place`.
    package func below(_ place: Int, in layers: [LayerID]) -> Int? {
        var top = LayerID(rawValue: layers[place].rawValue - 1)
        if let revert = latest(upTo: layers[place]), revert.head == layers[place] {
            top = revert.target
        }
        while true {
            let revert = latest(upTo: top)
            let found = layers.index(above: top) - 1
            if found >= 0, layers[found] >= revert?.head ?? .head { return found }
            guard let revert else { return nil }
            top = revert.target
        }
    }
    private func latest(upTo layer: LayerID) -> VolumeRecord.Revert? {
        var (low, high) = (0, reverts.count)
        while low < high {
            let middle = (low + high) / 2
            if reverts[middle].head > layer { high = middle } else { low = middle + 1 }
        }
        return low > 0 ? reverts[low - 1] : nil
    }
    /// The layer itself if it is one of ascending `layers`, or the one that has what it held. Nil:
    /// nobody has.
    package func heir(of layer: LayerID, in layers: [LayerID]) -> LayerID? {
        var place = layers.index(above: LayerID(rawValue: layer.rawValue &- 1))
        while place < layers.count {
            if isSeen(layer, from: layers[place]) { return layers[place] }
            place += 1
        }
        return nil
    }
}

extension VolumeRecord {
    /// The volume went back to the snapshot of layer `target`: `head` was made over it.
    package struct Revert: Equatable, Sendable {
        package var head: LayerID
        package var target: LayerID
        package init(head: LayerID, target: LayerID) {
            self.head = head
            self.target = target
        }
    }
    package var tree: LayerTree { LayerTree(reverts) }

    /// Whether the snapshot `kept` is what a revert to that one has kept.
    package func hasReverted(to snapshot: Snapshot, keeping kept: Snapshot) -> Bool {
        reverts.contains {
            $0.head.rawValue == kept.layer.rawValue + 1 && $0.target == snapshot.layer
        }
    }

    /// Freezes the head under a name. `target`: the new one is made over that layer instead.
    package mutating func freezeHead(_ name: String, created: UInt64, target: LayerID? = nil) {
        snapshots.append(Snapshot(layer: head, name: name, created: created))
        let next = LayerID(rawValue: head.rawValue + 1)
        if let target { reverts.append(Revert(head: next, target: target)) }
        layers.append(next)
    }

    /// Takes the name out, and every layer that nobody needs any more: neither a snapshot nor two
    /// layers that were made over it.
    package mutating func deleteSnapshot(of layer: LayerID) {
        snapshots.removeAll { $0.layer == layer }
        let named = Set(snapshots.map(\.layer))
        let tree = tree
        var isDone = false
        while !isDone {
            var above = [Int](repeating: 0, count: layers.count)
            for place in layers.indices {
                if let below = tree.below(place, in: layers) { above[below] += 1 }
            }
            let unneeded = layers.indices.dropLast().last {
                above[$0] < 2 && !named.contains(layers[$0])
            }
            if let unneeded { layers.remove(at: unneeded) }
            isDone = unneeded == nil
        }
        forgetReverts()
        forgetGrowths()
    }

    /// Those that nothing of is left: layers made since count as made over what was there before,
    /// and are gone as well.
    private mutating func forgetReverts() {
        let tree = tree
        reverts.removeAll { revert in
            !layers.contains { tree.isSeen(revert.head, from: $0) }
        }
    }
}
