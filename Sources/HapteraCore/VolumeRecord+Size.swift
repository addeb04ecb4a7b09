// The sizes of a volume and of its snapshots.

extension VolumeRecord {
    /// Bytes that a volume may have.
    package static func isValidSize(_ size: UInt64) -> Bool {
        size > 0 && size <= Geometry.volumeSizeMax && size % UInt64(Geometry.blockSize) == 0
    }
    /// Bytes of the volume while the layer was its head: the size of its snapshot.
    package func size(of layer: LayerID) -> UInt64 {
        growths.first { $0.head > layer }?.sizeBefore ?? size
    }

    /// Whether the layer has room for anything of the region: older ones may end before it.
    package func reaches(_ layer: LayerID, _ region: UInt64) -> Bool {
        growths.isEmpty || region < Geometry.regionCount(size: size(of: layer))
    }

    /// The lowest layer above that one which reaches the region; `.head`: the lowest of all.
    package func layer(above layer: LayerID, reaching region: UInt64) -> LayerID? {
        layers[layers.index(above: layer)...].first { reaches($0, region) }
    }

    /// Whether another growth can be recorded; a second one at the same head needs no room.
    package var mayGrow: Bool {
        var record = self
        record.grow(to: Geometry.volumeSizeMax)
        return record.growths.count <= Self.growthsMax
    }

    /// Precondition: `newSize` is a valid size, and not below `size`.
    package mutating func grow(to newSize: UInt64) {
        precondition(newSize >= size)
        // Layers are numbered upwards: those from the head on are as large as the volume. Only what
        // some layer is left of has to be remembered.
        if growths.last?.head != head { growths.append(Growth(head: head, sizeBefore: size)) }
        size = newSize
        forgetGrowths()
    }

    /// Those that no layer's size depends on any more.
    package mutating func forgetGrowths() {
        var before = LayerID.head
        var kept: [Growth] = []
        for growth in growths {
            if layers.contains(where: { $0 >= before && $0 < growth.head }) { kept.append(growth) }
            before = growth.head
        }
        growths = kept
    }
    private static let growthsMax = 64
}
