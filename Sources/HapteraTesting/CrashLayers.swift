import HapteraCore

// Snapshots in a crash replay: layers that are frozen by an Install, and retired by another one.
extension CrashOracle {
    /// Those of the record: deleted ones are not in it.
    var layers: [LayerID] { sections.filter { !$0.isDeleted }.map(\.layer) }
    /// Regions of these; a place is that of a block, by `Geometry.blocksPerRegion`.
    var regionPlaces: [Int] {
        (0..<sections.count * CrashHost.regions).filter {
            !sections[$0 / CrashHost.regions].isDeleted
        }
    }
    func region(at place: Int) -> LayerRegion {
        LayerRegion(
            sections[place / CrashHost.regions].layer, UInt64(place % CrashHost.regions))
    }

    /// A snapshot: from the next Install on the head is another one.
    mutating func addLayer() {
        let head = sections[sections.count - 1].layer
        sections.append(CrashSection(layer: LayerID(rawValue: head.rawValue + 1)))
        blocks += Array(repeating: CrashBlock(), count: CrashSection.stride)
    }

    /// Nothing is doubtful, under way, or not yet durable.
    var isAtRest: Bool {
        blocks.allSatisfy { block in
            block.versions.count == 1 && !block.isBusy && !block.newest.isDoubtful
                && block.newest.id == block.stable && block.current == block.stable
        }
    }
    /// The layer's snapshot goes: its heir shows what it does not hold itself.
    mutating func delete(_ section: Int) {
        guard let heir = sections.indices.first(where: { $0 > section && !sections[$0].isDeleted })
        else { return }
        sections[section].isDeleted = true
        for place in 0..<CrashSection.stride {
            let from = blocks[section * CrashSection.stride + place]
            let to = heir * CrashSection.stride + place
            if blocks[to].newest.state == .absent { blocks[to] = from }
        }
    }

    /// The block as it is read: the uppermost layer's that holds it.
    func seen(_ block: Int, in found: [CrashFound?]) -> CrashFound? {
        for section in sections.indices.reversed() where !sections[section].isDeleted {
            guard let own = found[section * CrashSection.stride + block] else { return nil }
            if own.isDoubtful || own.entry.state != .absent { return own }
        }
        return found[(sections.count - 1) * CrashSection.stride + block]
    }
}

extension CrashReplay {
    private static let layersMost = 4

    func snapshot() throws(StorageError) {
        guard oracle.layers.count < Self.layersMost else { return }
        if random.permille(300) { try finishWrites() }
        guard !isOver else { return }
        oracle.addLayer()
        try install()
    }
    /// What is durable of both is known exactly then.
    func deleteLayer() throws(StorageError) {
        let chosen = oracle.sections.indices.dropLast().filter { !oracle.sections[$0].isDeleted }
        guard !chosen.isEmpty else { return }
        try settle()
        guard !isOver, oracle.isAtRest else { return }
        oracle.delete(random.pick(Array(chosen)))
        try install()
    }
}
