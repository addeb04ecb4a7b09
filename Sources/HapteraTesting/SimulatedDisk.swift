import HapteraCore

/// What a disk does wrong, set by the world's fault plan and read at each operation.
struct DiskTrouble {
    /// Multiplies latencies.
    var slowness = 1
    /// Per thousand operations.
    var readErrors = 0
    var writeErrors = 0
    var syncErrors = 0
    var isFull = false
}

/// An operation ended.
struct DiskCompletion {
    var token: UInt64
    /// Bytes transferred, or a negative errno.
    var result: Int
    /// Where read data goes.
    var destination: (buffer: BufferID, offset: Int)?
}

/// A replica's directory on a disk that reorders, tears, fails and forgets as real ones do.
///
/// Asynchronous operations land when they complete; `kill -9` of their process does not stop them.
/// A power cut stops everything and keeps what `SimulatedFile` says. A sync covers what had landed
/// when it was submitted, nothing else.
final class SimulatedDisk: ReplicaStorage {
    private enum Kind {
        case read(buffer: BufferID, bufferOffset: Int)
        case write([UInt8])
        case sync(before: UInt64, snapshot: [(sector: Int, bytes: [UInt8])])
        case punch
    }
    private struct Operation {
        var id: UInt64
        var file: ReplicaFile
        var kind: Kind
        var offset: Int
        var length: Int
        var token: UInt64
    }

    private let random: RandomSource
    private(set) var files: [SimulatedFile] = []
    private var operations: [Operation] = []
    private var nextOperation: UInt64 = 0
    private var nextOrder: UInt64 = 0
    private var scratch = MemoryBlock(count: Geometry.regionSize)
    var trouble = DiskTrouble()
    /// Synchronous calls until the process is cut off in the middle of opening; nil: never.
    var callsUntilCut: Int?
    /// A sync failed: nothing written before it can be relied on until the host restarts.
    private(set) var hasFailedSync = false

    init(random: RandomSource) {
        self.random = random
    }

    func file(_ name: ReplicaFile) -> SimulatedFile? { files.first { $0.name == name } }

    private func existing(_ name: ReplicaFile) throws(StorageError) -> SimulatedFile {
        if let left = callsUntilCut {
            if left == 0 { throw StorageError(.io(errno: 5), "cut off") }
            callsUntilCut = left - 1
        }
        guard let file = file(name) else { throw StorageError(.notFound, "no \(name)") }
        return file
    }

    // MARK: Asynchronous operations

    /// Operations submitted and not ended; a new process waits until there are none.
    var operationsInFlight: Int { operations.count }
    /// Writes to layers' data under way.
    var dataWritesInFlight: Int {
        operations.count {
            if case .write = $0.kind, case .data = $0.file { return true }
            return false
        }
    }

    /// Accepts an action; returns the operation's number and how long it takes (nanoseconds), or
    /// nil if the action is none of the disk's.
    func submit(_ action: ReplicaAction, pool: BufferPool) -> (operation: UInt64, delay: UInt64)? {
        var operation: Operation
        var delay = random.delay(microseconds: 15, 400)
        switch action {
        case .read(let file, let offset, let length, let buffer, let bufferOffset, let token):
            operation = Operation(
                id: 0, file: file, kind: .read(buffer: buffer, bufferOffset: bufferOffset),
                offset: Int(offset), length: length, token: token)
        case .write(let file, let offset, let length, let buffer, let bufferOffset, let token):
            let bytes = pool.memory(buffer).slice(bufferOffset, length).bytes()
            operation = Operation(
                id: 0, file: file, kind: .write(bytes), offset: Int(offset), length: length,
                token: token)
        case .sync(let file, let token):
            operation = Operation(
                id: 0, file: file, kind: startSync(file), offset: 0, length: 0, token: token)
            delay = random.delay(microseconds: 100, 4000)
        case .punch(let file, let offset, let length, let token):
            operation = Operation(
                id: 0, file: file, kind: .punch, offset: Int(offset), length: Int(length),
                token: token)
        default:
            return nil
        }
        nextOperation += 1
        operation.id = nextOperation
        operations.append(operation)
        return (operation.id, delay * UInt64(trouble.slowness))
    }

    private func startSync(_ name: ReplicaFile) -> Kind {
        guard let file = file(name) else { return .sync(before: 0, snapshot: []) }
        return .sync(
            before: nextOrder, snapshot: file.isMapped ? file.snapshotMapped() : [])
    }

    /// The operation's time has come: it lands. Nil if a power cut took it. `pool` is nil when the
    /// process that asked is gone.
    func complete(_ id: UInt64, pool: BufferPool?) -> DiskCompletion? {
        guard let index = operations.firstIndex(where: { $0.id == id }) else { return nil }
        let operation = operations.remove(at: index)
        guard let file = file(operation.file) else {
            return DiskCompletion(token: operation.token, result: -2)
        }
        var result = operation.length
        switch operation.kind {
        case .read(let buffer, let bufferOffset):
            if random.permille(trouble.readErrors) {
                result = -5
            } else if let pool {
                result = read(
                    file, operation, into: pool.memory(buffer).slice(bufferOffset, operation.length)
                )
            }
        case .write(let bytes):
            result = write(file, operation, bytes)
        case .sync(let before, let snapshot):
            result = finishSync(file, before: before, snapshot: snapshot)
        case .punch:
            land(file, offset: operation.offset, bytes: [], length: operation.length)
            result = 0
        }
        return DiskCompletion(token: operation.token, result: result)
    }

    private func land(_ file: SimulatedFile, offset: Int, bytes: [UInt8], length: Int) {
        file.land(.init(order: nextOrder, offset: offset, bytes: bytes, length: length))
        nextOrder += 1
    }

    private func write(_ file: SimulatedFile, _ operation: Operation, _ bytes: [UInt8]) -> Int {
        let needsSpace: Bool
        if case .data = operation.file {
            needsSpace = !file.allocated[operation.offset / 4096]
        } else {
            needsSpace = false
        }
        if trouble.isFull && needsSpace { return -28 }
        if random.permille(trouble.writeErrors) {
            // What a failed write leaves is anybody's guess: here a torn half.
            let half = bytes.count / 2 / 512 * 512
            if half > 0 && random.permille(500) {
                land(
                    file, offset: operation.offset, bytes: [UInt8](bytes[..<half]), length: half)
            }
            return -5
        }
        land(file, offset: operation.offset, bytes: bytes, length: bytes.count)
        return bytes.count
    }

    private func finishSync(
        _ file: SimulatedFile, before: UInt64, snapshot: [(sector: Int, bytes: [UInt8])]
    ) -> Int {
        if random.permille(trouble.syncErrors) {
            hasFailedSync = true
            file.abandon(before: before, random)
            return -5
        }
        if file.isMapped {
            if !hasFailedSync { file.makeDurable(snapshot: snapshot) }
        } else {
            file.makeDurable(before: before)
        }
        return 0
    }

    /// A read sees each sector of an overlapping write in flight before or after its change.
    private func read(_ file: SimulatedFile, _ operation: Operation, into memory: RawMemory) -> Int
    {
        let available = max(0, min(operation.length, file.size - operation.offset))
        memory.copy(from: file.current.slice(operation.offset, available))
        for other in operations where other.file == operation.file {
            guard case .write(let bytes) = other.kind else { continue }
            let start = max(other.offset, operation.offset)
            let end = min(other.offset + bytes.count, operation.offset + available)
            for at in stride(from: start, to: max(start, end), by: 512) where random.permille(500) {
                memory.copy(
                    from: [UInt8](bytes[at - other.offset..<at - other.offset + 512]),
                    at: at - operation.offset)
            }
        }
        return available
    }

    /// The host loses power: operations under way are torn, unsynced writes survive by chance.
    func cutPower() {
        // Nearly everything, nearly nothing, or a mixture: each finds other bugs.
        let keepPermille = random.pick([0, 50, 500, 500, 950, 1000])
        for file in files {
            var torn: [SimulatedFile.Unsynced] = []
            for operation in operations where operation.file == file.name {
                guard case .write(let bytes) = operation.kind else { continue }
                torn.append(
                    .init(
                        order: nextOrder, offset: operation.offset, bytes: bytes,
                        length: bytes.count))
                nextOrder += 1
            }
            file.cutPower(keepPermille: keepPermille, torn: torn, random)
        }
        files.removeAll { !$0.isNameDurable }
        operations = []
        hasFailedSync = false
    }

    // MARK: ReplicaStorage

    func read(_ file: ReplicaFile, offset: UInt64, into memory: RawMemory) throws(StorageError)
        -> Int
    {
        let file = try existing(file)
        let available = max(0, min(memory.count, file.size - Int(offset)))
        if available > 0 { memory.copy(from: file.current.slice(Int(offset), available)) }
        return available
    }
    func write(_ file: ReplicaFile, offset: UInt64, from memory: RawMemory) throws(StorageError) {
        let file = try existing(file)
        guard memory.count > 0 else { return }
        if file.isMapped { return file.current.copy(from: memory, at: Int(offset)) }
        land(file, offset: Int(offset), bytes: memory.bytes(), length: memory.count)
    }
    func sync(_ file: ReplicaFile) throws(StorageError) {
        let file = try existing(file)
        if file.isMapped { file.makeDurable(snapshot: file.snapshotMapped()) }
        file.makeDurable(before: nextOrder)
    }
    func size(_ file: ReplicaFile) throws(StorageError) -> UInt64 {
        UInt64(try existing(file).size)
    }
    func create(_ file: ReplicaFile, size: UInt64) throws(StorageError) {
        guard self.file(file) == nil else { throw StorageError(.exists, "\(file)") }
        files.append(SimulatedFile(name: file, size: Int(size)))
    }
    func syncDirectories() throws(StorageError) {
        for file in files { file.isNameDurable = true }
    }
    func nextAllocated(_ file: ReplicaFile, from offset: UInt64) throws(StorageError)
        -> Range<UInt64>?
    {
        let file = try existing(file)
        let pages = (file.size + 4095) / 4096
        var first = Int(offset) / 4096
        while first < pages && !file.allocated[first] { first += 1 }
        guard first < pages else { return nil }
        var end = first
        while end < pages && file.allocated[end] { end += 1 }
        return max(offset, UInt64(first * 4096))..<UInt64(min(end * 4096, file.size))
    }
    func mapLog(size: Int) throws(StorageError) -> RawMemory {
        let file = try existing(.log)
        guard file.size >= size else { throw StorageError(.damaged, "log is too short") }
        // What was written before is in the images already; from here on stores go to one of them.
        file.isMapped = true
        return file.current.slice(0, size)
    }
}
