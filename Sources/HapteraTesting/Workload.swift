import HapteraCore

/// One request of a simulated client, from its first submission to its end.
final class ClientOperation {
    let id: Int
    let kind: OperationKind
    let flags: OperationFlags
    let offset: UInt64
    let length: Int
    let worker: Int
    let generation: UInt64
    /// The engine it was first given to, and the one that has it now; -1: none.
    var firstEngine = -1
    var engine = -1
    /// Times it was handed to an engine.
    var attempts = 0
    var isComplete = false
    /// Its client is gone, or got an error: nobody knows whether it happened.
    var isAbandoned = false
    /// Acknowledgements there had been when it was first asked for.
    var begunAt = 0
    /// The highest epoch anything had been answered in when it began.
    var startedAfter = Epoch.zero
    /// For a read: what each sector held.
    var values: [ValueID] = []
    /// For a status: what each sector was promised to hold when it was asked for, and the losses
    /// there had been.
    var promised: [Int] = []
    var losses = 0

    init(
        id: Int, kind: OperationKind, flags: OperationFlags, offset: UInt64, length: Int,
        worker: Int, generation: UInt64
    ) {
        self.id = id
        self.kind = kind
        self.flags = flags
        self.offset = offset
        self.length = length
        self.worker = worker
        self.generation = generation
    }

    /// What a write leaves in each of its sectors.
    var value: ValueID { kind == .write ? ValueID(id) : 0 }
    var changesData: Bool { kind == .write || kind == .trim || kind == .writeZeroes }
    /// The sectors it reads or changes. A trim is rounded inwards to whole blocks.
    var sectors: Range<Int> {
        let sector = Content.sectorSize
        if kind == .flush { return 0..<0 }
        guard kind == .trim else {
            return Int(offset) / sector..<(Int(offset) + length) / sector
        }
        let block = Geometry.blockSize
        let first = (Int(offset) + block - 1) / block
        let end = (Int(offset) + length) / block
        guard first < end else { return 0..<0 }
        return first * Content.sectorsPerBlock..<end * Content.sectorsPerBlock
    }
    var isOutstanding: Bool { !isComplete && !isAbandoned }
    var text: String {
        "\(kind)\(flags.contains(.fua) ? "+fua" : "") #\(id) \(offset / 512)+\(length / 512)"
    }
}

/// What clients do: which ranges they use and in which mixture. Few blocks are hot, so that
/// requests meet; some ranges are adjacent, cross a region's end, or are parts of blocks.
struct Workload {
    let sizeBytes: UInt64
    /// Runs of hot blocks.
    let clusters: [Range<UInt64>]
    /// A block each of regions that nothing else touches; written once.
    var freshBlocks: [UInt64] = []
    let subBlockPermille: Int
    var readPermille: Int
    var flushPermille: Int
    var trimPermille: Int
    let fuaPermille: Int
    /// Longest pause between two requests of a worker.
    let thinkMillisecondsMax: Int
    var depth: Int
    var workers: Int
    /// Snapshots taken at most, and the longest time between two.
    var snapshotsMax: Int
    var snapshotPauseMilliseconds: Int
    /// That a snapshot is deleted in place of another being taken.
    var deletionPermille: Int
    /// Requests at most to an engine that was superseded.
    static let staleRequestsMax = 2
    static let staleReadsMax = 8
    /// Of each replica. As in a real one more than requests under way can need at once, or they
    /// could wait for each other on different replicas; often fewer than the volume has, so that
    /// writes wait for regions to be drained.
    var activeRegionsMax: Int { depth * workers + Self.staleRequestsMax + 1 }

    init(random: RandomSource, sizeBytes: UInt64, origin: SimulatedOrigin? = nil) {
        self.sizeBytes = sizeBytes
        let blocks = sizeBytes / UInt64(Geometry.blockSize)
        let perRegion = UInt64(Geometry.blocksPerRegion)
        var clusters: [Range<UInt64>] = [0..<2, blocks - 2..<blocks]
        if blocks > perRegion + 2 { clusters.append(perRegion - 2..<perRegion + 2) }
        let drawn =
            origin == nil ? random.between(2, 6) + (blocks > 4 * perRegion ? 16 : 0) : 0
        for _ in 0..<drawn {
            let start = UInt64(random.below(Int(blocks) - 8))
            clusters.append(start..<start + UInt64(random.between(1, 6)))
        }
        if let origin { clusters += origin.clusters }
        for index in clusters.indices { clusters.swapAt(index, random.below(clusters.count)) }
        self.clusters = clusters
        let touched = Set(clusters.joined().map { $0 / perRegion })
        for region in 0..<blocks / perRegion where !touched.contains(region) {
            freshBlocks.append(region * perRegion + UInt64(random.below(Int(perRegion))))
        }
        subBlockPermille = random.pick([0, 100, 400])
        readPermille = random.pick([200, 350, 500])
        flushPermille = random.pick([5, 30, 100])
        trimPermille = random.pick([0, 60, 200])
        fuaPermille = random.pick([0, 50, 300])
        thinkMillisecondsMax = random.pick([5, 40, 200])
        snapshotsMax = random.pick(origin == nil ? [0, 0, 2, 5] : [2, 2, 3, 5])
        snapshotPauseMilliseconds = random.pick([300, 3000])
        deletionPermille = random.pick([0, 300, 700])
        (workers, depth) = random.pick([(1, 1), (1, 3), (2, 1), (2, 4), (4, 2), (3, 4)])
    }

    /// Those that clients use, ascending.
    var hotSectors: [Int] {
        Set(
            (Array(clusters.joined()) + freshBlocks).flatMap {
                let first = Int($0) * Content.sectorsPerBlock
                return first..<first + Content.sectorsPerBlock
            }
        ).sorted()
    }

    /// A request within one region.
    func draw(_ random: RandomSource) -> (
        kind: OperationKind, flags: OperationFlags, offset: UInt64, length: Int
    ) {
        if random.permille(flushPermille) { return (.flush, [], 0, 0) }
        let kind: OperationKind
        if random.permille(readPermille) {
            kind = random.permille(50) ? .status : .read
        } else if random.permille(trimPermille) {
            kind = random.permille(500) ? .trim : .writeZeroes
        } else {
            kind = .write
        }
        var (offset, length) = drawRange(random)
        if kind != .status, random.permille(subBlockPermille) {
            let sectors = length / Content.sectorSize
            let first = random.below(sectors)
            let count = random.between(1, sectors - first)
            offset += UInt64(first * Content.sectorSize)
            length = count * Content.sectorSize
        }
        var flags: OperationFlags = []
        if kind != .read && kind != .status && random.permille(fuaPermille) { flags.insert(.fua) }
        if kind == .writeZeroes && random.permille(300) { flags.insert(.noHole) }
        return (kind, flags, offset, length)
    }

    private func drawRange(_ random: RandomSource) -> (offset: UInt64, length: Int) {
        // The later a run in the list, the rarer: some are first touched late.
        let cluster = clusters[random.below(random.below(clusters.count) + 1)]
        let first = cluster.lowerBound + UInt64(random.below(cluster.count))
        let regionEnd =
            (first / UInt64(Geometry.blocksPerRegion) + 1) * UInt64(Geometry.blocksPerRegion)
        let end = min(cluster.upperBound, regionEnd)
        let count = random.between(1, Int(end - first))
        return (first * UInt64(Geometry.blockSize), count * Geometry.blockSize)
    }
}
