import Glibc
import HapteraCore
import HapteraIO

/// One ordinary file (or block device) as a volume, read and written with O_DIRECT: the server's
/// baseline without replication. A write that covers a block in part reads the block first, so
/// operations on the same blocks run one after the other.
package final class FileDevice: BlockDevice, CompletionHandler {
    /// Operations under way at once.
    private static let operationsMax = 256

    package let name: String
    package let size: UInt64
    package let isReadOnly: Bool
    package let pool: BufferPool
    package let zeroesFastWithoutHole = true
    package weak var frontend: (any BlockDeviceFrontend)?

    private let reactor: Reactor
    private let descriptor: Int32
    private let file: FileID
    private var handler = HandlerID.none

    /// free -> waiting (an overlapping operation is before it) -> what its kind needs of
    /// readingHead -> readingTail -> transferring -> syncing -> free
    private enum Step: UInt8, BitwiseCopyable {
        case free, waiting, readingHead, readingTail, transferring, writingZeroes, syncing
    }
    private struct Slot: BitwiseCopyable {
        var step = Step.free
        var operation = Operation(kind: .flush, userData: 0)
        /// Submission order, for who waits for whom.
        var order: UInt64 = 0
        /// Blocks the operation touches; empty for those that exclude nobody.
        var first: UInt64 = 0
        var end: UInt64 = 0
    }
    private let slots = FixedArray(repeating: Slot(), count: operationsMax)
    private struct Answer: BitwiseCopyable {
        var userData: UInt64
        var buffer: BufferID
        var tableLength: Int32
    }
    private let statuses = ValueQueue<Answer>(capacity: 16)
    /// A block for the head and one for the tail of each slot's write.
    private let edges = MemoryBlock(count: operationsMax * 2 * Geometry.blockSize)
    private let zeroes = MemoryBlock(count: Geometry.regionSize)
    private var inUse = 0
    private var waiting = 0
    private var order: UInt64 = 0

    package init(path: String, name: String, isReadOnly: Bool, reactor: Reactor) throws(IOError) {
        self.name = name
        self.isReadOnly = isReadOnly
        self.reactor = reactor
        pool = reactor.pool
        descriptor = try FileDescriptors.open(
            path, flags: isReadOnly ? O_RDONLY : O_RDWR, isDirect: true)
        let end = lseek(descriptor, 0, SEEK_END)
        guard end > 0, end % off_t(Geometry.blockSize) == 0 else {
            close(descriptor)
            throw IOError("'\(path)' has \(end) bytes; it must be a multiple of 4096, above 0")
        }
        size = UInt64(end)
        file = reactor.register(file: descriptor, label: "data")
        handler = reactor.register(self)
    }

    package var canSubmit: Bool { inUse < Self.operationsMax }
    package func submit(_ operation: Operation) {
        guard operation.kind != .status else {
            statuses.append(
                Answer(
                    userData: operation.userData, buffer: operation.buffer,
                    tableLength: status(operation)))
            return
        }
        guard let index = (0..<Self.operationsMax).first(where: { slots[$0].step == .free }) else {
            preconditionFailure("submitted without room")
        }
        inUse += 1
        order += 1
        var slot = Slot(step: .waiting, operation: operation, order: order)
        if operation.kind != .read && operation.kind != .flush {
            let blocks = Geometry.blocks(offset: operation.offset, length: operation.length)
            slot.first = blocks.lowerBound
            slot.end = blocks.upperBound
        }
        slots[index] = slot
        if isBlocked(index) { waiting += 1 } else { begin(index) }
    }

    package func completeReady() -> Bool {
        guard !statuses.isEmpty else { return false }
        while let answer = statuses.popFirst() {
            frontend?.complete(
                userData: answer.userData, result: .ok, buffer: answer.buffer,
                tableLength: answer.tableLength, isHole: false)
        }
        return true
    }

    /// Whether an earlier operation holds some of the same blocks.
    private func isBlocked(_ index: Int) -> Bool {
        let slot = slots[index]
        guard slot.end > slot.first else { return false }
        for other in 0..<Self.operationsMax where slots[other].step != .free {
            let before = slots[other]
            if before.order < slot.order && before.first < slot.end && slot.first < before.end {
                return true
            }
        }
        return false
    }

    // MARK: Steps

    private func begin(_ index: Int) {
        let operation = slots[index].operation
        let token = UInt64(index)
        slots[index].step = .transferring
        switch operation.kind {
        case .read:
            reactor.read(
                file, into: wholeBlocks(operation), offset: aligned(operation.offset),
                handler: handler, token: token)
        case .write, .writeZeroes: readHead(index)
        case .trim:
            reactor.punch(
                file, offset: operation.offset, length: UInt64(operation.length),
                handler: handler, token: token)
        case .flush:
            reactor.sync(file, handler: handler, token: token)
        case .status: preconditionFailure("answered by submit")
        }
    }

    private func aligned(_ offset: UInt64) -> UInt64 {
        offset & ~UInt64(Geometry.blockSize - 1)
    }
    private func head(_ operation: Operation) -> Int {
        Int(operation.offset % UInt64(Geometry.blockSize))
    }
    /// Bytes of the last block behind the operation's end.
    private func tail(_ operation: Operation) -> Int {
        let over = (head(operation) + operation.length) % Geometry.blockSize
        return over == 0 ? 0 : Geometry.blockSize - over
    }
    private func wholeBlocks(_ operation: Operation) -> RawMemory {
        let length = head(operation) + operation.length + tail(operation)
        return pool.memory(operation.buffer).slice(0, length)
    }
    private func edge(_ index: Int, isTail: Bool) -> RawMemory {
        edges.memory.slice((index * 2 + (isTail ? 1 : 0)) * Geometry.blockSize, Geometry.blockSize)
    }

    private func readHead(_ index: Int) {
        let operation = slots[index].operation
        guard head(operation) != 0 else {
            readTail(index)
            return
        }
        slots[index].step = .readingHead
        reactor.read(
            file, into: edge(index, isTail: false), offset: aligned(operation.offset),
            handler: handler, token: UInt64(index))
    }
    private func readTail(_ index: Int) {
        let operation = slots[index].operation
        guard tail(operation) != 0 else {
            transfer(index)
            return
        }
        slots[index].step = .readingTail
        reactor.read(
            file, into: edge(index, isTail: true),
            offset: aligned(operation.offset + UInt64(operation.length)), handler: handler,
            token: UInt64(index))
    }

    /// The blocks' edges are known: writes.
    private func transfer(_ index: Int) {
        let operation = slots[index].operation
        slots[index].step = .transferring
        let before = head(operation)
        let after = tail(operation)
        guard operation.kind == .write else {
            transferZeroes(index, before, after)
            return
        }
        let memory = wholeBlocks(operation)
        memory.copy(from: edge(index, isTail: false).slice(0, before))
        memory.copy(
            from: edge(index, isTail: true).slice(Geometry.blockSize - after, after),
            at: memory.count - after)
        reactor.write(
            file, from: memory, offset: aligned(operation.offset), handler: handler,
            token: UInt64(index))
    }

    /// Whole blocks by the file system; with edges, by writing.
    private func transferZeroes(_ index: Int, _ before: Int, _ after: Int) {
        let operation = slots[index].operation
        if before != 0 || after != 0 {
            writeZeroes(index)
        } else if operation.flags.contains(.noHole) {
            reactor.zero(
                file, offset: operation.offset, length: UInt64(operation.length),
                handler: handler, token: UInt64(index))
        } else {
            reactor.punch(
                file, offset: operation.offset, length: UInt64(operation.length),
                handler: handler, token: UInt64(index))
        }
    }

    /// Writes zeroes over the whole blocks, the edges kept. Those with edges are rare and small:
    /// they go through a block of their own.
    private func writeZeroes(_ index: Int) {
        let operation = slots[index].operation
        let before = head(operation)
        let after = tail(operation)
        slots[index].step = .writingZeroes
        let length = before + operation.length + after
        var memory = zeroes.memory.slice(0, length)
        if before != 0 || after != 0 {
            let block = edgeZeroes[index] ?? MemoryBlock(count: Geometry.regionSize)
            edgeZeroes[index] = block
            memory = block.memory.slice(0, length)
            memory.fill()
            memory.copy(from: edge(index, isTail: false).slice(0, before))
            memory.copy(
                from: edge(index, isTail: true).slice(Geometry.blockSize - after, after),
                at: length - after)
        }
        reactor.write(
            file, from: memory, offset: aligned(operation.offset), handler: handler,
            token: UInt64(index))
    }
    private var edgeZeroes: [Int: MemoryBlock] = [:]

    package func completed(token: UInt64, result: Int) {
        let index = Int(token)
        let operation = slots[index].operation
        let step = slots[index].step
        let isTransfer =
            operation.kind == .read || operation.kind == .write && step == .transferring
        let expected =
            step == .writingZeroes || isTransfer
            ? head(operation) + operation.length + tail(operation)
            : step == .readingHead || step == .readingTail ? Geometry.blockSize : 0
        if result == -Int(EOPNOTSUPP) && step == .transferring {
            // The file system cannot punch: a trim is a hint, zeroes are written.
            if operation.kind == .writeZeroes {
                writeZeroes(index)
                return
            }
            if operation.kind == .trim {
                end(index, .ok)
                return
            }
        }
        guard result == expected else {
            end(index, result == -Int(ENOSPC) ? .noSpace : .ioError)
            return
        }
        switch step {
        case .readingHead: readTail(index)
        case .readingTail: transfer(index)
        case .transferring, .writingZeroes:
            guard operation.flags.contains(.fua), operation.kind != .read else {
                end(index, .ok)
                return
            }
            slots[index].step = .syncing
            reactor.sync(file, handler: handler, token: token)
        case .syncing: end(index, .ok)
        case .free, .waiting: preconditionFailure("a completion for no operation")
        }
    }

    private func end(_ index: Int, _ result: OperationResult) {
        let operation = slots[index].operation
        slots[index] = Slot()
        edgeZeroes[index] = nil
        inUse -= 1
        frontend?.complete(
            userData: operation.userData, result: result, buffer: operation.buffer,
            tableLength: 0, isHole: false)
        guard waiting > 0 else { return }
        for other in 0..<Self.operationsMax
        where slots[other].step == .waiting && !isBlocked(other) {
            waiting -= 1
            begin(other)
        }
    }

    // MARK: Status

    /// What the file system says of data and holes; if it does not, all is data. It does not tell
    /// zeroes with space from holes.
    private func status(_ operation: Operation) -> Int32 {
        let table = pool.memory(operation.buffer)
        let end = operation.offset + UInt64(operation.length)
        var position = operation.offset
        var count = 0
        func put(to next: UInt64, _ state: BlockState) {
            guard next > position, count < NBDBlockStatus.extentsMax else { return }
            table.store(next - position, count * NBDBlockStatus.extentSize)
            table.store(UInt64(state.rawValue), count * NBDBlockStatus.extentSize + 8)
            count += 1
            position = next
        }
        while position < end, count < NBDBlockStatus.extentsMax {
            do throws(IOError) {
                let data = try FileDescriptors.nextData(descriptor, from: position)
                put(to: min(data?.lowerBound ?? end, end), .absent)
                if let data { put(to: min(data.upperBound, end), .data) }
            } catch {
                put(to: end, .data)
            }
        }
        return Int32(count * NBDBlockStatus.extentSize)
    }
}
