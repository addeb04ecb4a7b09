import HapteraCore

/// What a replica's files say, read without its process: page, then log, then data, as opening
/// does it. Made of the current image (what a restarted process finds) or of the durable one (what
/// a power cut is sure to leave).
struct ReplicaImage {
    private(set) var promise = Epoch.zero
    private(set) var entries: [BlockEntry]
    private(set) var activeRegions: [UInt64] = []
    /// The record kept with the promise.
    private(set) var installed: VolumeRecord?
    private var births: [Epoch] = []
    private let data: RawMemory

    /// Nil if the files do not make sense: then opening must fail too.
    init?(_ disk: SimulatedDisk, isDurable: Bool, sizeBytes: UInt64) {
        func image(_ name: ReplicaFile) -> RawMemory? {
            disk.file(name).map { isDurable ? $0.durable : $0.current }
        }
        let layer = LayerID(rawValue: 1)
        guard let data = image(.data(layer)), let table = image(.table(layer)),
            let log = image(.log), let manifestFile = image(.manifest),
            case .manifest(let manifest) = Manifest.load(
                manifestFile.slice(0, Int(Manifest.fileSize)))
        else { return nil }
        self.data = data
        promise = manifest.promise
        installed = manifest.installed
        entries = Array(repeating: .absent, count: Int(sizeBytes) / Geometry.blockSize)

        var logIndex: [UInt64] = []
        for region in 0..<Geometry.regionCount(size: sizeBytes) {
            let pair = table.slice(
                Int(TablePage.pairOffset(region: region)), TablePage.pairSize)
            switch TablePage.loadPair(pair, layer: layer, region: region) {
            case .neverWritten:
                logIndex.append(0)
                births.append(.zero)
            case .damaged: return nil
            case .page(let page, _):
                logIndex.append(page.logIndex)
                births.append(page.birth)
                let from = Int(page.version % 2) * TablePage.size + TablePage.entriesOffset
                takeEntries(pair.slice(from, TablePage.entriesSize), region)
            }
        }
        guard let (tail, capacity) = Self.header(log) else { return nil }
        for index in tail..<tail + capacity {
            let at = ActivityLog.ringOffset + Int(index % capacity) * LogRecord.size
            guard let record = LogRecord(decoding: log, at: at), record.index == index else {
                continue
            }
            replay(record, logIndex)
        }
    }

    private mutating func takeEntries(_ memory: RawMemory, _ region: UInt64) {
        let first = Int(region) * Geometry.blocksPerRegion
        for block in first..<min(first + Geometry.blocksPerRegion, entries.count) {
            entries[block] =
                BlockEntry(decoding: memory, at: (block - first) * BlockEntry.size) ?? .absent
        }
    }

    private static func header(_ log: RawMemory) -> (tail: UInt64, capacity: UInt64)? {
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

    private mutating func replay(_ record: LogRecord, _ logIndex: [UInt64]) {
        guard record.kind == .activate || record.kind == .entry else { return }
        let perRegion = UInt64(Geometry.blocksPerRegion)
        let region = record.kind == .entry ? record.position / perRegion : record.position
        guard region < logIndex.count, record.index >= logIndex[Int(region)] else { return }
        if !activeRegions.contains(region) { activeRegions.append(region) }
        guard record.kind == .entry else { return }
        let entry = BlockEntry(state: record.state, checksum: record.checksum)
        let first = Int(record.position)
        for block in first..<min(first + Int(record.count), entries.count) {
            entries[block] = entry
        }
    }

    /// What its table page says; an active region counts as written in the promised epoch.
    func birth(_ region: UInt64) -> Epoch {
        activeRegions.contains(region) ? max(promise, births[Int(region)]) : births[Int(region)]
    }

    func isDoubtful(_ block: Int) -> Bool {
        entries[block].state == .data
            && CRC32C.checksum(bytes(block)) != entries[block].checksum
    }
    private func bytes(_ block: Int) -> RawMemory {
        data.slice(block * Geometry.blockSize, Geometry.blockSize)
    }
    /// The block's bytes as a reader would see them if it trusted them.
    func value(sector: Int, scratch: RawMemory) -> ValueID {
        let block = sector / Content.sectorsPerBlock
        guard entries[block].state == .data else { return 0 }
        let at = sector % Content.sectorsPerBlock * Content.sectorSize
        return Content.value(
            in: bytes(block).slice(at, Content.sectorSize), sector: UInt64(sector),
            scratch: scratch)
    }
}
