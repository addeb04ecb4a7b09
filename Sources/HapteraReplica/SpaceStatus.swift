import HapteraCore

/// What a copy takes, what deletions would give back and what comes back by itself, for `status`:
/// see docs/snapshots.md, "Sizes". What is not counted yet is left out.
struct SpaceStatus {
    private let core: ReplicaCore
    private let storage: DirectoryStorage
    private let allocated: [ReplicaFile: UInt64]

    init(_ core: ReplicaCore, _ storage: DirectoryStorage) {
        self.core = core
        self.storage = storage
        allocated = storage.allocatedBytes()
    }

    func fields(sharedBytes: ([ReplicaFile: UInt64]) -> UInt64) -> [(key: String, value: String)] {
        let own = ownBytes
        var fields = [
            ("allocatedBytes", String(allocated.values.reduce(0, +))),
            ("layerBytes", Self.text(own)),
            ("exclusiveBytes", Self.text(exclusiveBytes(own))),
            ("sharedLayers", String(core.sharedLayers.count)),
            ("sharedBytes", String(sharedBytes(allocated))),
            // Behind what was written last, if it is being counted.
            ("sizes", core.isSpaceCounted ? "counted" : "counting"),
        ]
        if let hidden = core.hiddenBlocks {
            let blocks = hidden.unmerged + core.unneededBlocks
            fields += [
                ("reclaimableBytes", String(Self.bytes(blocks) + discardedBytes)),
                ("stuckBytes", String(Self.bytes(hidden.stuck))),
            ]
        }
        return fields
    }

    /// What the data of each layer takes, and that of deleted ones with it whose heir it is.
    private var ownBytes: [LayerID: UInt64] {
        var bytes: [LayerID: UInt64] = [:]
        for layer in core.layerFiles {
            guard let owner = core.owner(of: layer) else { continue }
            bytes[owner, default: 0] += allocated[.data(layer)] ?? 0
        }
        return bytes
    }
    private func exclusiveBytes(_ own: [LayerID: UInt64]) -> [LayerID: UInt64] {
        var bytes: [LayerID: UInt64] = [:]
        for space in core.snapshotSpaces {
            guard let blocks = space.blocks else { continue }
            let files = space.files.reduce(0) { $0 + (allocated[.data($1)] ?? 0) }
            // A file system that compresses gives less back than was written.
            let counted =
                space.files.isEmpty
                ? min(Self.bytes(blocks), own[space.layer] ?? 0) : Self.bytes(blocks)
            bytes[space.layer] = files + counted
        }
        return bytes
    }
    /// Of layers that belong to none any more: their files are about to be deleted.
    private var discardedBytes: UInt64 {
        allocated.reduce(0) { sum, file in
            guard case .data(let layer) = file.key, core.owner(of: layer) == nil,
                !storage.isShared(layer)
            else { return sum }
            return sum + file.value
        }
    }

    private static func bytes(_ blocks: UInt64) -> UInt64 { blocks * UInt64(Geometry.blockSize) }
    /// `LAYER:BYTES,...`
    private static func text(_ bytes: [LayerID: UInt64]) -> String {
        bytes.sorted { $0.key < $1.key }.map { "\($0.key.rawValue):\($0.value)" }
            .joined(separator: ",")
    }
}
