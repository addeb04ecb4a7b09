import HapteraCore

/// A world's clones, drawn from a source of their own: the rest of it does not depend on them. Of
/// each only the links are there: they change what the source may do, and nobody but it must keep
/// to the rules.
struct SimulatedClones {
    /// A replica that was asked to share a snapshot's layers.
    struct Pending {
        var host: Int
        var process: Int
        var layers: [LayerID]
        /// Nanoseconds.
        var deadline: UInt64
    }
    var pending: Pending?
    let random: RandomSource
    /// Whether this world has any.
    let areThere: Bool

    /// They are volumes, one in each such world: see SecondVolume.swift.
    let isVolume: Bool
    /// What is asked of the source's replicas for that one.
    var making: Making?
    /// When one of the two volumes is deleted, and which.
    var end: End?

    /// `isClone`: of the volume that is one.
    init(seed: UInt64, options: SimulationOptions, isClone: Bool) {
        random = RandomSource(seed: RandomSource.mix(seed ^ 0x434C_4F4E))
        let areDrawn = random.permille(500)
        let mutations = options.mutations
        let isJudged = !mutations.isDisjoint(with: Self.volumeRules) || options.clonesClones
        isVolume = isClone || isJudged || !areDrawn && random.permille(850)
        areThere = areDrawn || isVolume || !mutations.isDisjoint(with: Self.rules)
    }
    static let rules: MutationSet = [.foldIgnored, .sharedIsMerged, .sharedBeforeDrained]
}

// Clones are made of snapshots on one replica or another, and deleted, under everything else.
extension World {
    func scheduleClone() {
        timeline.schedule(after: milliseconds(clones.random.between(20, 1500)), .clone)
    }

    func cloneOrNot() {
        guard clones.pending == nil else { return linkClone() }
        defer { if clones.pending == nil { scheduleClone() } }
        let host = clones.random.pick(hosts)
        let isLate = !isChaos && host.core?.retiredLayerCount ?? 0 > 0
        if !host.disk.shared.isEmpty, isLate || clones.random.permille(400) {
            note("clones of layers of \(host.name) are deleted")
            host.disk.unshare()
        }
        notice(host)
        guard isChaos, let core = host.core, host.pausedUntil <= timeline.now,
            let record = core.installedRecord, !record.snapshots.isEmpty
        else { return }
        let snapshot = clones.random.pick(record.snapshots)
        do throws(SharingRefusal) {
            let layers = try core.beginSharing(snapshot.layer, epoch: Epoch(1 << 40))
            clones.pending = .init(
                host: host.index, process: host.process, layers: layers,
                deadline: timeline.now + milliseconds(3000))
            timeline.schedule(after: milliseconds(1), .clone)
        } catch { trace("\(host.name) cannot share \(snapshot.name): \(error)") }
    }

    /// The process looks at its files' links from time to time.
    func notice(_ host: SimulatedReplica) {
        guard let core = host.core, host.pausedUntil <= timeline.now else { return }
        for layer in core.sharedLayers where !host.disk.isShared(layer) {
            core.setShared(layer, false)
        }
    }

    private func linkClone() {
        guard let pending = clones.pending else { return }
        let host = hosts[pending.host]
        guard host.process == pending.process, let core = host.core else {
            clones.pending = nil
            return scheduleClone()
        }
        guard host.pausedUntil <= timeline.now else {
            return timeline.schedule(at: host.pausedUntil, .clone)
        }
        let ready = core.layersToLink(pending.layers)
        guard ready != nil || timeline.now >= pending.deadline else {
            return timeline.schedule(after: milliseconds(clones.random.between(1, 50)), .clone)
        }
        if let ready {
            note("\(host.name) shares layers \(ready.map(\.rawValue)) with a clone")
            host.disk.share(ready)
            coverage.took(.clone)
        }
        core.endSharing(pending.layers, linked: ready ?? [])
        notice(host)
        clones.pending = nil
        scheduleClone()
    }

    /// 35: what a layer holds and its table stay as they are while a clone has its files.
    func checkShared(_ host: SimulatedReplica) {
        guard host.disk.isShared else { return }
        coverage.evaluated(35)
        if let violation = host.disk.violation {
            fail("invariant 35: \(host.name): \(violation)")
        }
    }
}

extension SimulatedDisk {
    func has(_ file: SimulatedFile) -> Bool { names.contains { $0.file === file } }
    /// And the replica of this directory goes by it.
    func uses(_ file: SimulatedFile) -> Bool {
        names.contains { $0.file === file && !$0.isStray }
    }
    /// Some layer's files have names in the other directory.
    var isLinked: Bool {
        guard let neighbour else { return false }
        return names.contains { neighbour.has($0.file) }
    }

    /// Its files have names in the other directory.
    func isLinked(_ layer: LayerID) -> Bool {
        guard let neighbour else { return false }
        return files(of: layer).contains(where: neighbour.has)
    }
    private func files(of layer: LayerID) -> [SimulatedFile] {
        [.data(layer), .table(layer)].compactMap(file)
    }
    /// Somebody else goes by what the layer's files hold. (Seed 2845054: a power cut had brought
    /// back the name of a table that the other replica had deleted.)
    private func isOthersToo(_ layer: LayerID) -> Bool {
        guard !shared.contains(layer) else { return true }
        guard let neighbour else { return false }
        return files(of: layer).contains(where: neighbour.uses)
    }
    func isShared(_ layer: LayerID) -> Bool { shared.contains(layer) || isLinked(layer) }
    var isShared: Bool { !shared.isEmpty || isLinked }
    func share(_ layers: [LayerID]) { shared.formUnion(layers) }
    /// Every clone of which only the links are there is deleted.
    func unshare() { shared = [] }

    /// Judges a write, or a hole, of a layer whose files a clone has as well.
    func judgeShared(_ name: ReplicaFile, offset: Int, bytes: [UInt8], length: Int) {
        switch name {
        case .table(let layer) where isOthersToo(layer):
            violation = "a page of the table of shared layer \(layer.rawValue) is written"
        case .data(let layer) where isOthersToo(layer):
            for at in stride(from: 0, to: length, by: Geometry.blockSize) {
                let block = (offset + at) / Geometry.blockSize
                // A page that has rotted behind the process says nothing (5605500, 5607133).
                guard let entry = entry(layer, block) else { continue }
                let isLawful =
                    bytes.isEmpty
                    ? entry.state != .data
                    : entry.state == .data && entry.checksum == checksum(bytes, at)
                if !isLawful {
                    violation = "block \(block) of shared layer \(layer.rawValue) is changed"
                }
            }
        default: break
        }
    }
    private func checksum(_ bytes: [UInt8], _ at: Int) -> UInt32 {
        HapteraCore.checksum(of: [UInt8](bytes[at..<at + Geometry.blockSize]))
    }
    private func entry(_ layer: LayerID, _ block: Int) -> BlockEntry? {
        let region = UInt64(block / Geometry.blocksPerRegion)
        let start = Int(TablePage.pairOffset(region: region))
        guard let table = file(.table(layer)), start + TablePage.pairSize <= table.size else {
            return .absent
        }
        let pair = table.current.slice(start, TablePage.pairSize)
        let page: TablePage
        switch TablePage.loadPair(pair, layer: layer, region: region) {
        case .neverWritten: return .absent
        case .page(let found, isWhole: true): page = found
        case .page, .damaged: return nil
        }
        let entries = start + Int(page.version % 2) * TablePage.size + TablePage.entriesOffset
        let place = block % Geometry.blocksPerRegion * BlockEntry.size
        return BlockEntry(decoding: table.current, at: entries + place) ?? .absent
    }
}
