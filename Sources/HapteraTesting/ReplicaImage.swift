import HapteraCore

/// What a replica's files say, read without its process: page, then log, then data, as opening
/// does it. Made of the current image (what a restarted process finds) or of the durable one (what
/// a power cut is sure to leave).
struct ReplicaImage {
    /// One layer by itself.
    struct Layer {
        let id: LayerID
        /// The number of its files.
        let file: LayerID
        fileprivate(set) var entries: [BlockEntry]
        fileprivate(set) var activeRegions: [UInt64] = []
        fileprivate var births: [Epoch] = []
        fileprivate(set) var logIndex: [UInt64] = []
        /// By block: what it was before records that no flush is known to have covered.
        fileprivate var bases: [Int: BlockEntry] = [:]
        fileprivate let data: RawMemory
        /// Where blocks are that a retired layer still holds for this one.
        fileprivate var elsewhere: [Int: RawMemory] = [:]

        /// What its table page says; an active region counts as written in the promised epoch.
        func birth(_ region: UInt64, promise: Epoch) -> Epoch {
            let birth = births[Int(region)]
            return activeRegions.contains(region) ? max(promise, birth) : birth
        }
        func isDoubtful(_ block: Int) -> Bool {
            entries[block].state == .data
                && CRC32C.checksum(bytes(block)) != entries[block].checksum
        }
        fileprivate func bytes(_ block: Int) -> RawMemory {
            (elsewhere[block] ?? data).slice(block * Geometry.blockSize, Geometry.blockSize)
        }
        /// Takes in the layer below, which is retired.
        fileprivate mutating func inherit(_ lower: Layer) {
            for block in entries.indices
            where entries[block].state == .absent && lower.entries[block].state != .absent {
                entries[block] = lower.entries[block]
                elsewhere[block] = lower.elsewhere[block] ?? lower.data
            }
            for region in lower.activeRegions where !activeRegions.contains(region) {
                activeRegions.append(region)
            }
            for region in births.indices {
                births[region] = max(births[region], lower.births[region])
            }
        }
    }
    private(set) var promise = Epoch.zero
    /// Those the record names, lowest first.
    private(set) var layers: [Layer] = []
    /// As seen from the head, and which layer that is of; -1: of none.
    private(set) var entries: [BlockEntry] = []
    private var owners: [Int] = []
    /// The record kept with the promise.
    private(set) var installed: VolumeRecord?
    /// The record by which it is looked at: the true one, or the one kept.
    private var record: VolumeRecord?

    /// Nil if the files do not make sense: then opening must fail too. `top`: as seen from that
    /// layer; nil: from the head. `record`: which layer lies over which, and which is the head, if
    /// not as the copy knows it: it may not have been told of a revert.
    init?(
        _ disk: SimulatedDisk, isDurable: Bool, sizeBytes: UInt64, from top: LayerID? = nil,
        record: VolumeRecord? = nil
    ) {
        func image(_ name: ReplicaFile) -> RawMemory? {
            disk.file(name).map { isDurable ? $0.durable : $0.current }
        }
        guard let log = image(.log), let manifestFile = image(.manifest),
            case .manifest(let manifest) = Manifest.load(
                manifestFile.slice(0, Int(Manifest.fileSize)))
        else { return nil }
        promise = manifest.promise
        installed = manifest.installed
        for id in manifest.layers {
            guard let data = image(.data(id)), let table = image(.table(id)),
                let layer = Self.layer(id, manifest.name(of: id), data, table, sizeBytes)
            else { return nil }
            layers.append(layer)
        }
        guard let (tail, capacity) = Self.header(log) else { return nil }
        let records = (tail..<tail + capacity).compactMap { index in
            let at = ActivityLog.ringOffset + Int(index % capacity) * LogRecord.size
            return LogRecord(decoding: log, at: at).flatMap { $0.index == index ? $0 : nil }
        }
        let covered = records.filter { $0.kind == .covered }.map(\.position).max() ?? 0
        for record in records { replay(record, covered) }
        // As opening does it after a power cut.
        if isDurable { dropUnsynced() }
        fold(manifest.retiredLayers.map(manifest.name(of:)), installed)
        self.record = record ?? installed
        look(from: top ?? self.record?.head ?? manifest.head)
    }

    private static func layer(
        _ id: LayerID, _ name: LayerID, _ data: RawMemory, _ table: RawMemory, _ sizeBytes: UInt64
    ) -> Layer? {
        let blocks = Int(sizeBytes) / Geometry.blockSize
        var layer = Layer(
            id: name, file: id, entries: Array(repeating: .absent, count: blocks), data: data)
        for region in 0..<Geometry.regionCount(size: sizeBytes) {
            let at = Int(TablePage.pairOffset(region: region))
            guard at + TablePage.pairSize <= table.count else {
                // The volume was smaller.
                layer.logIndex.append(0)
                layer.births.append(.zero)
                continue
            }
            let pair = table.slice(at, TablePage.pairSize)
            switch TablePage.loadPair(pair, layer: id, region: region) {
            case .neverWritten:
                layer.logIndex.append(0)
                layer.births.append(.zero)
            case .damaged: return nil
            case .page(let page, _):
                layer.logIndex.append(page.logIndex)
                layer.births.append(page.birth)
                let from = Int(page.version % 2) * TablePage.size + TablePage.entriesOffset
                let memory = pair.slice(from, TablePage.entriesSize)
                let first = Int(region) * Geometry.blocksPerRegion
                for block in first..<min(first + Geometry.blocksPerRegion, blocks) {
                    let at = (block - first) * BlockEntry.size
                    layer.entries[block] = BlockEntry(decoding: memory, at: at) ?? .absent
                }
            }
        }
        return layer
    }

    static func header(_ log: RawMemory) -> (tail: UInt64, capacity: UInt64)? {
        var best: (counter: UInt64, tail: UInt64, capacity: UInt64)?
        for slot in [log.slice(0, 512), log.slice(4096, 512)] {
            guard slot.load(UInt32.self, 0) == ActivityLog.magic,
                slot.load(UInt32.self, 64) == CRC32C.checksum(slot.slice(0, 64))
            else { continue }
            let counter = slot.load(UInt64.self, 8)
            if best.map({ counter > $0.counter }) ?? true {
                best = (counter, slot.load(UInt64.self, 16), slot.load(UInt64.self, 24))
            }
        }
        return best.map { ($0.tail, $0.capacity) }
    }

    private mutating func replay(_ record: LogRecord, _ covered: UInt64) {
        guard record.kind == .activate || record.kind == .entry,
            let place = layers.firstIndex(where: { $0.file == record.layer })
        else { return }
        let perRegion = UInt64(Geometry.blocksPerRegion)
        let region = record.kind == .entry ? record.position / perRegion : record.position
        guard region < layers[place].logIndex.count,
            record.index >= layers[place].logIndex[Int(region)]
        else { return }
        if !layers[place].activeRegions.contains(region) {
            layers[place].activeRegions.append(region)
        }
        guard record.kind == .entry else { return }
        let entry = BlockEntry(state: record.state, checksum: record.checksum)
        let first = Int(record.position)
        for block in first..<min(first + Int(record.count), layers[place].entries.count) {
            if record.index < covered {
                layers[place].bases[block] = nil
            } else if layers[place].bases[block] == nil {
                let before = layers[place].entries[block]
                if place > 0 || entry.state == .data && before.state.isZero {
                    layers[place].bases[block] = before
                }
            }
            layers[place].entries[block] = entry
        }
    }
    private mutating func dropUnsynced() {
        for place in layers.indices {
            for (block, base) in layers[place].bases
            where base.state != .data && layers[place].isDoubtful(block) {
                layers[place].entries[block] = base
            }
        }
    }

    /// Retired layers count as their heirs'.
    private mutating func fold(_ retired: [LayerID], _ record: VolumeRecord?) {
        // The nearest first: what it holds hides what is below. Not into others that are retired:
        // of one that was discarded it is not known any more what it was made over (seed 403429).
        for place in layers.indices.dropLast().reversed()
        where retired.contains(layers[place].id) {
            let heir = layers.indices.dropFirst(place + 1).first {
                !retired.contains(layers[$0].id)
                    && Self.isSeen(layers[place].id, from: layers[$0].id, record)
            }
            if let heir { layers[heir].inherit(layers[place]) }
        }
        layers.removeAll { retired.contains($0.id) }
    }

    /// The same files, seen from another layer.
    func seen(from top: LayerID) -> ReplicaImage {
        var image = self
        image.look(from: top)
        return image
    }
    /// The same files, as they count when they promise the record: its Install retires the layers
    /// that it does not name any more.
    func promising(_ record: VolumeRecord) -> ReplicaImage {
        guard promise < record.epoch else { return self }
        var image = self
        let gone = layers.map(\.id).filter { !record.layers.contains($0) }
        image.fold(gone, record)
        image.record = record
        image.look(from: record.head)
        return image
    }
    func layer(_ id: LayerID) -> Layer? { layers.first { $0.id == id } }

    /// Goes down layer by layer as they were made, whether they are left or not.
    private static func isSeen(
        _ lower: LayerID, from upper: LayerID, _ record: VolumeRecord?
    ) -> Bool {
        var layer = upper
        while layer > lower {
            let revert = record?.reverts.first { $0.head == layer }
            layer = revert?.target ?? LayerID(rawValue: layer.rawValue - 1)
        }
        return layer == lower
    }

    private mutating func look(from top: LayerID) {
        entries = Array(repeating: .absent, count: layers.first?.entries.count ?? 0)
        owners = Array(repeating: -1, count: entries.count)
        for (place, layer) in layers.enumerated() where Self.isSeen(layer.id, from: top, record) {
            for block in entries.indices where layer.entries[block].state != .absent {
                entries[block] = layer.entries[block]
                owners[block] = place
            }
        }
    }

    /// Of any layer.
    var activeRegions: Set<UInt64> { Set(layers.flatMap(\.activeRegions)) }
    /// Of whichever layer it is latest in.
    func birth(_ region: UInt64) -> Epoch {
        layers.map { $0.birth(region, promise: promise) }.max() ?? .zero
    }

    func isDoubtful(_ block: Int) -> Bool {
        owners[block] >= 0 && layers[owners[block]].isDoubtful(block)
    }
    /// The block's bytes as a reader would see them if it trusted them.
    func value(sector: Int, _ contents: Contents) -> ValueID {
        let block = sector / Content.sectorsPerBlock
        guard entries[block].state == .data else { return 0 }
        let at = sector % Content.sectorsPerBlock * Content.sectorSize
        return contents.value(
            in: layers[owners[block]].bytes(block).slice(at, Content.sectorSize),
            sector: UInt64(sector))
    }
}
