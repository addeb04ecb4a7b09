#if canImport(Glibc)
    import Glibc
#else
    import Musl
#endif
import HapteraCore

/// One file of a simulated disk: what a process reads now, and what a power cut is sure to leave.
///
/// The two images differ only in `unsynced`: writes that landed and were not covered by a sync. A
/// mapped file (the activity log) is stored into directly, so its images are compared instead.
final class SimulatedFile {
    struct Unsynced {
        /// Landing order, over the whole disk.
        var order: UInt64
        var offset: Int
        /// Empty for a punched hole.
        var bytes: [UInt8]
        var length: Int
    }
    static let grain = Content.sectorSize

    let name: ReplicaFile
    private(set) var size: Int
    private(set) var durableSize: Int
    private var currentBlock: MemoryBlock
    private var durableBlock: MemoryBlock
    private(set) var unsynced: [Unsynced] = []
    /// Sizes it was given without a byte being written, and in which order.
    private var unsyncedSizes: [(order: UInt64, size: Int)] = []
    /// Ranges a failed sync has thrown out of the cache's care: no later sync makes them durable.
    private var abandoned: [Range<Int>] = []
    var isMapped = false
    /// 4 KiB pages that were ever written: the file system's allocation.
    private(set) var allocated: [Bool]

    init(name: ReplicaFile, size: Int) {
        self.name = name
        self.size = size
        durableSize = size
        let capacity = max(size, 4096)
        currentBlock = MemoryBlock(count: capacity)
        durableBlock = MemoryBlock(count: capacity)
        allocated = [Bool](repeating: false, count: (capacity + 4095) / 4096)
    }

    /// The same bytes, all of them durable.
    var copy: SimulatedFile {
        let copy = SimulatedFile(name: name, size: size)
        copy.currentBlock = MemoryBlock(count: current.count)
        copy.durableBlock = MemoryBlock(count: current.count)
        copy.current.copy(from: current)
        copy.durable.copy(from: current)
        copy.allocated = allocated
        return copy
    }

    var current: RawMemory { currentBlock.memory }
    var durable: RawMemory { durableBlock.memory }

    private func grow(to end: Int) {
        guard end > current.count else { return }
        precondition(!isMapped, "a mapped file does not grow")
        let larger = (MemoryBlock(count: end * 2), MemoryBlock(count: end * 2))
        larger.0.memory.copy(from: current)
        larger.1.memory.copy(from: durable)
        (currentBlock, durableBlock) = larger
        allocated += [Bool](repeating: false, count: (end * 2 + 4095) / 4096 - allocated.count)
    }

    /// Makes it longer.
    func extend(to end: Int, order: UInt64) {
        precondition(end > size)
        grow(to: end)
        size = end
        unsyncedSizes.append((order, end))
    }

    func land(_ write: Unsynced) {
        let end = write.offset + write.length
        grow(to: end)
        if write.bytes.isEmpty {
            current.slice(write.offset, write.length).fill()
        } else {
            current.copy(from: write.bytes, at: write.offset)
            for page in write.offset / 4096...(end - 1) / 4096 { allocated[page] = true }
            size = max(size, end)
        }
        unsynced.append(write)
    }

    /// Makes everything that landed before `order` durable (as a completed fdatasync does).
    func makeDurable(before order: UInt64) {
        var rest: [Unsynced] = []
        for write in unsynced {
            guard write.order < order else {
                rest.append(write)
                continue
            }
            apply(write, toDurable: write.offset..<write.offset + write.length)
            durableSize = max(durableSize, write.bytes.isEmpty ? 0 : write.offset + write.length)
        }
        unsynced = rest
        for change in unsyncedSizes where change.order < order {
            durableSize = max(durableSize, change.size)
        }
        unsyncedSizes.removeAll { $0.order < order }
    }

    private func apply(_ write: Unsynced, toDurable range: Range<Int>) {
        let target = durable.slice(range.lowerBound, range.count)
        if write.bytes.isEmpty { return target.fill() }
        let skipped = range.lowerBound - write.offset
        if skipped == 0 && range.count == write.length { return target.copy(from: write.bytes) }
        target.copy(from: [UInt8](write.bytes[skipped..<skipped + range.count]))
    }

    /// A sync failed: each covered sector made it or did not, and the cache forgets which.
    func abandon(before order: UInt64, _ random: RandomSource) {
        let covered = unsynced.filter { $0.order < order }
        unsynced.removeAll { $0.order < order }
        for write in covered {
            keepSome(of: write, permille: 500, random)
            abandoned.append(write.offset..<write.offset + write.length)
        }
    }

    private func keepSome(of write: Unsynced, permille: Int, _ random: RandomSource) {
        var at = write.offset
        let end = write.offset + write.length
        while at < end {
            let next = min((at / Self.grain + 1) * Self.grain, end)
            if random.permille(permille) {
                apply(write, toDurable: at..<next)
                durableSize = max(durableSize, write.bytes.isEmpty ? 0 : next)
            }
            at = next
        }
    }

    /// The power fails: a random part of what was not synced survives, sector by sector, and it is
    /// all there is from now on. `torn`: writes that were still under way.
    func cutPower(keepPermille: Int, torn: [Unsynced], _ random: RandomSource) {
        if isMapped { return cutPowerMapped(keepPermille: keepPermille, random) }
        let pending = unsynced + torn
        for write in pending {
            grow(to: write.offset + write.length)
            keepSome(of: write, permille: keepPermille, random)
        }
        let touched = pending.map { $0.offset..<$0.offset + $0.length } + abandoned
        for range in touched {
            current.copy(from: durable.slice(range.lowerBound, range.count), at: range.lowerBound)
        }
        for change in unsyncedSizes where random.permille(500) {
            durableSize = max(durableSize, change.size)
        }
        unsyncedSizes = []
        size = durableSize
        unsynced = []
        abandoned = []
    }

    /// Per sector the kernel wrote back nothing, everything, or what was there at some moment in
    /// between: records are stored in ascending order, so such a moment is a prefix.
    private func cutPowerMapped(keepPermille: Int, _ random: RandomSource) {
        for sector in dirtySectors() {
            let start = sector * Self.grain
            var kept = 0
            if random.permille(keepPermille) {
                kept = random.permille(700) ? Self.grain : random.below(Self.grain / 8 + 1) * 8
            }
            durable.copy(from: current.slice(start, kept), at: start)
            current.copy(from: durable.slice(start, Self.grain), at: start)
        }
    }

    func dirtySectors() -> [Int] {
        var dirty: [Int] = []
        for page in stride(from: 0, to: size, by: 4096) {
            let length = min(4096, size - page)
            if isEqual(current.slice(page, length), durable.slice(page, length)) { continue }
            for at in stride(from: page, to: page + length, by: Self.grain)
            where !isEqual(current.slice(at, Self.grain), durable.slice(at, Self.grain)) {
                dirty.append(at / Self.grain)
            }
        }
        return dirty
    }

    /// A copy of the mapped sectors that a sync beginning now will make durable.
    func snapshotMapped() -> [(sector: Int, bytes: [UInt8])] {
        dirtySectors().map { ($0, current.slice($0 * Self.grain, Self.grain).bytes()) }
    }
    func makeDurable(snapshot: [(sector: Int, bytes: [UInt8])]) {
        for (sector, bytes) in snapshot { durable.copy(from: bytes, at: sector * Self.grain) }
    }

    /// Flips one bit behind everybody's back.
    func rot(byte: Int, bit: Int) {
        current[byte] ^= 1 << UInt8(bit)
        durable[byte] = current[byte]
    }
}

private func isEqual(_ a: RawMemory, _ b: RawMemory) -> Bool {
    precondition(a.count == b.count)
    // SAFETY: both views have `count` readable bytes. (Comparing checksums instead would be wrong
    // here: bytes that end in their own CRC all have the same one.)
    return unsafe memcmp(a.base, b.base, a.count) == 0
}
