/// Names a buffer of a `BufferPool`.
package struct BufferID: RawRepresentable, Hashable, BitwiseCopyable, Sendable {
    package var rawValue: UInt32
    @inlinable package init(rawValue: UInt32) { self.rawValue = rawValue }
    package static let none = BufferID(rawValue: .max)
}

/// Reference-counted I/O buffers in three size classes (4 KiB, 128 KiB, 1 MiB), 4 KiB aligned,
/// handed out last-in first-out so that warm memory is reused.
///
/// Memory is reserved at start (address space only) and becomes resident when first used, so an
/// idle process stays small. `allocate` returns nil when a class has run out: the caller stops
/// receiving (back-pressure) and tries again after a release. Single-threaded.
package final class BufferPool {
    package struct Limits: Sendable {
        /// Buffers of 4 KiB, 128 KiB and 1 MiB.
        package var small: Int
        package var medium: Int
        package var large: Int
        package init(small: Int = 2048, medium: Int = 256, large: Int = 192) {
            self.small = small
            self.medium = medium
            self.large = large
        }
    }
    private struct SizeClass {
        var size: Int
        var first: Int
        var count: Int
        var free: Int
        var freeCount: Int
        var base: Int
    }
    package static let sizeMax = 1 << 20
    private let block: MemoryBlock
    private let references: FixedArray<UInt32>
    private let nextFree: FixedArray<Int32>
    private let classes: FixedArray<SizeClass>

    package init(limits: Limits = Limits()) {
        let sizes = [4096, 128 << 10, 1 << 20]
        let counts = [limits.small, limits.medium, limits.large]
        block = MemoryBlock(count: max(4096, zip(sizes, counts).map(*).reduce(0, +)))
        let total = counts.reduce(0, +)
        references = FixedArray(repeating: 0, count: total)
        nextFree = FixedArray(repeating: -1, count: total)
        classes = FixedArray(
            repeating: SizeClass(size: 0, first: 0, count: 0, free: -1, freeCount: 0, base: 0),
            count: 3)
        var first = 0
        var base = 0
        for index in 0..<3 {
            for buffer in 0..<counts[index] {
                nextFree[first + buffer] =
                    buffer + 1 < counts[index] ? Int32(first + buffer + 1) : -1
            }
            classes[index] = SizeClass(
                size: sizes[index], first: first, count: counts[index],
                free: counts[index] > 0 ? first : -1, freeCount: counts[index], base: base)
            first += counts[index]
            base += sizes[index] * counts[index]
        }
    }

    /// A buffer of at least `size` bytes (at most 1 MiB) with one reference, or nil if that size
    /// class has run out.
    package func allocate(_ size: Int) -> BufferID? {
        precondition(size > 0 && size <= Self.sizeMax)
        let index = size <= 4096 ? 0 : size <= 128 << 10 ? 1 : 2
        let free = classes[index].free
        guard free >= 0 else { return nil }
        classes[index].free = Int(nextFree[free])
        classes[index].freeCount -= 1
        references[free] = 1
        return BufferID(rawValue: UInt32(free))
    }
    package func retain(_ buffer: BufferID) {
        precondition(references[Int(buffer.rawValue)] > 0)
        references[Int(buffer.rawValue)] += 1
    }
    /// Gives one reference back; the last one frees the buffer.
    package func release(_ buffer: BufferID) {
        let id = Int(buffer.rawValue)
        precondition(references[id] > 0)
        references[id] -= 1
        guard references[id] == 0 else { return }
        let index = classIndex(id)
        nextFree[id] = Int32(classes[index].free)
        classes[index].free = id
        classes[index].freeCount += 1
    }
    /// The whole buffer (4096, 131072 or 1048576 bytes).
    package func memory(_ buffer: BufferID) -> RawMemory {
        let id = Int(buffer.rawValue)
        precondition(references[id] > 0)
        let index = classIndex(id)
        let size = classes[index].size
        return block.memory.slice(classes[index].base + (id - classes[index].first) * size, size)
    }
    /// Buffers of the class for `size` that are free now.
    package func available(_ size: Int) -> Int {
        classes[size <= 4096 ? 0 : size <= 128 << 10 ? 1 : 2].freeCount
    }
    /// Buffers in use, over all classes; a leak test expects zero at rest.
    package var inUse: Int {
        (0..<3).reduce(0) { $0 + classes[$1].count - classes[$1].freeCount }
    }
    /// All of the pool's memory, for registration with the kernel.
    package var whole: RawMemory { block.memory }

    private func classIndex(_ id: Int) -> Int {
        id < classes[1].first ? 0 : id < classes[2].first ? 1 : 2
    }
}
