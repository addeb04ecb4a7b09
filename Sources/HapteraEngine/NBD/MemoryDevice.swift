import Glibc
import HapteraCore

/// A volume in memory: sparse, with a state per block, so that clients see the same allocation
/// states as of a real volume. For tests and as a baseline; its content ends with the process.
package final class MemoryDevice: BlockDevice {
    /// Bytes; the states alone of so much take 256 MiB of address space.
    package static let sizeMax: UInt64 = 1 << 40

    package let name: String
    package let size: UInt64
    package let isReadOnly: Bool
    package let pool: BufferPool
    package let zeroesFastWithoutHole = true
    package weak var frontend: (any BlockDeviceFrontend)?

    /// Blocks that are not in state data are zero here.
    private let content: MemoryBlock
    /// A byte per block, the raw value of `BlockState`. Zero, as it starts, is absent.
    private let states: MemoryBlock
    private struct Completion: BitwiseCopyable {
        var userData: UInt64
        var buffer: BufferID
        var tableLength: Int32 = 0
        var isHole = false
    }
    private let completed = ValueQueue<Completion>()

    /// `size`: a multiple of 4096, at most `sizeMax`.
    package init(name: String, size: UInt64, isReadOnly: Bool, pool: BufferPool) {
        precondition(size > 0 && size <= Self.sizeMax && size % UInt64(Geometry.blockSize) == 0)
        self.name = name
        self.size = size
        self.isReadOnly = isReadOnly
        self.pool = pool
        content = MemoryBlock(count: Int(size))
        states = MemoryBlock(count: Int(size) / Geometry.blockSize)
    }

    package var canSubmit: Bool { true }

    package func submit(_ operation: Operation) {
        var completion = Completion(userData: operation.userData, buffer: operation.buffer)
        let offset = Int(operation.offset)
        switch operation.kind {
        case .read: completion.isHole = read(operation)
        case .write: write(operation)
        case .trim: zero(offset, operation.length, .zero)
        case .writeZeroes:
            let state: BlockState =
                operation.flags.contains(.noHole) ? .zeroAllocated : .zero
            zero(offset, operation.length, state)
        case .flush: break
        case .status: completion.tableLength = status(operation)
        }
        completed.append(completion)
    }

    package func completeReady() -> Bool {
        guard !completed.isEmpty else { return false }
        while let completion = completed.popFirst() {
            frontend?.complete(
                userData: completion.userData, result: .ok, buffer: completion.buffer,
                tableLength: completion.tableLength, isHole: completion.isHole)
        }
        return true
    }

    /// True if the range is nothing but zeroes by its states.
    private func read(_ operation: Operation) -> Bool {
        let target = pool.memory(operation.buffer)
        let offset = Int(operation.offset)
        let position = offset % Geometry.blockSize
        let blocks = Geometry.blocks(offset: operation.offset, length: operation.length)
        var block = Int(blocks.lowerBound)
        while block < Int(blocks.upperBound), state(block) != .data { block += 1 }
        let isHole = block == Int(blocks.upperBound)
        if isHole {
            target.slice(position, operation.length).fill()
        } else {
            target.copy(from: content.memory.slice(offset, operation.length), at: position)
        }
        return isHole
    }

    private func write(_ operation: Operation) {
        let offset = Int(operation.offset)
        let source = pool.memory(operation.buffer)
            .slice(offset % Geometry.blockSize, operation.length)
        content.memory.copy(from: source, at: offset)
        let blocks = Geometry.blocks(offset: operation.offset, length: operation.length)
        states.memory.slice(Int(blocks.lowerBound), blocks.count).fill(BlockState.data.rawValue)
    }

    /// Blocks covered in part keep their state.
    private func zero(_ offset: Int, _ length: Int, _ state: BlockState) {
        let unit = Geometry.blockSize
        let first = (offset + unit - 1) / unit
        let end = (offset + length) / unit
        guard first < end else {
            content.memory.slice(offset, length).fill()
            return
        }
        content.memory.slice(offset, first * unit - offset).fill()
        content.memory.slice(end * unit, offset + length - end * unit).fill()
        states.memory.slice(first, end - first).fill(state.rawValue)
        discard(content.memory.slice(first * unit, (end - first) * unit))
    }

    /// Gives whole pages back; they read zero from then on.
    private func discard(_ memory: RawMemory) {
        guard memory.count >= 64 << 10 else {
            memory.fill()
            return
        }
        // SAFETY: the range lies in the mapping of `content`, which is private and anonymous, so
        // dropped pages come back as zeroes; both ends are at page boundaries.
        let result = unsafe madvise(memory.base, memory.count, MADV_DONTNEED)
        if result != 0 { memory.fill() }
    }

    private func status(_ operation: Operation) -> Int32 {
        let table = pool.memory(operation.buffer)
        let blocks = Geometry.blocks(offset: operation.offset, length: operation.length)
        var count = 0
        var index = Int(blocks.lowerBound)
        while index < Int(blocks.upperBound), count < NBDBlockStatus.extentsMax {
            let state = state(index)
            let start = index
            repeat { index += 1 } while index < Int(blocks.upperBound) && self.state(index) == state
            table.store(
                UInt64(index - start) * UInt64(Geometry.blockSize),
                count * NBDBlockStatus.extentSize)
            table.store(UInt64(state.rawValue), count * NBDBlockStatus.extentSize + 8)
            count += 1
        }
        return Int32(count * NBDBlockStatus.extentSize)
    }

    private func state(_ block: Int) -> BlockState {
        guard let state = BlockState(rawValue: states.memory[block]) else {
            preconditionFailure("a state that was never written")
        }
        return state
    }
}
