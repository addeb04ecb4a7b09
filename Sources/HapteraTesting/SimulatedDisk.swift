import HapteraCore

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
        case create(LayerID, size: UInt64)
        case extend(LayerID, size: UInt64)
        case remove(LayerID)
        /// Of names: what there is when it begins.
        case syncNames([ReplicaFile])
    }
    private struct Operation {
        var id: UInt64
        var file: ReplicaFile
        var kind: Kind
        var offset: Int
        var length: Int
        var token: UInt64
    }

    /// A file's name in this directory.
    struct Name {
        let file: SimulatedFile
        /// It survives a power cut.
        var isDurable = false
        /// It was deleted, and a power cut has brought it back: nobody goes by it.
        var isStray = false
    }

    private let random: RandomSource
    private let drive: SimulatedDrive
    private(set) var names: [Name] = []
    /// Deleted since names were last synced: a power cut may bring them back.
    private var unlinked: [Name] = []
    private var operations: [Operation] = []
    private var nextOperation: UInt64 = 0
    private var nextOrder: UInt64 {
        get { drive.nextOrder }
        set { drive.nextOrder = newValue }
    }
    var trouble: DiskTrouble {
        get { drive.trouble }
        set { drive.trouble = newValue }
    }
    /// Synchronous calls until the process is cut off in the middle of opening; nil: never.
    var callsUntilCut: Int?
    /// A sync failed: nothing written before it can be relied on until the host restarts.
    private(set) var hasFailedSync = false
    /// Layers whose files a clone has as well of which nothing else is there, and what was done to
    /// any shared one that must not be.
    var shared: Set<LayerID> = []
    var violation: String?

    init(random: RandomSource) {
        self.random = random
        drive = SimulatedDrive()
    }
    /// Another directory on the same disk, empty. Links can be made between them.
    init(random: RandomSource, beside other: SimulatedDisk) {
        precondition(other.neighbour == nil)
        self.random = random
        drive = other.drive
        neighbour = other
        other.neighbour = self
    }

    func file(_ name: ReplicaFile) -> SimulatedFile? { names.first { $0.file.name == name }?.file }

    private func countCall() throws(StorageError) {
        guard let left = callsUntilCut else { return }
        if left == 0 { throw StorageError(.io(errno: 5), "cut off") }
        callsUntilCut = left - 1
    }
    private func existing(_ name: ReplicaFile) throws(StorageError) -> SimulatedFile {
        try countCall()
        guard let file = file(name) else { throw StorageError(.notFound, "no \(name)") }
        return file
    }

    // MARK: Asynchronous operations

    /// Operations submitted and not ended; a new process waits until there are none.
    var operationsInFlight: Int { operations.count }
    var idsInFlight: [UInt64] { operations.map(\.id) }
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
        case .create(let layer, let size, let token):
            operation = Operation(
                id: 0, file: .layers, kind: .create(layer, size: size), offset: 0, length: 0,
                token: token)
        case .extend(let layer, let size, let token):
            operation = Operation(
                id: 0, file: .layers, kind: .extend(layer, size: size), offset: 0, length: 0,
                token: token)
        case .remove(let layer, let token):
            operation = Operation(
                id: 0, file: .layers, kind: .remove(layer), offset: 0, length: 0, token: token)
        case .sync(.layers, let token):
            operation = Operation(
                id: 0, file: .layers, kind: .syncNames(names.map(\.file.name)), offset: 0,
                length: 0,
                token: token)
            delay = random.delay(microseconds: 100, 4000)
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
        delay *= UInt64(trouble.slowness)
        if random.permille(trouble.outliers) { delay += milliseconds(random.between(100, 3000)) }
        nextOperation += 1
        operation.id = nextOperation
        operations.append(operation)
        return (operation.id, delay)
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
        if let result = completeNames(operation) {
            return DiskCompletion(token: operation.token, result: result)
        }
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
            judgeShared(
                operation.file, offset: operation.offset, bytes: bytes, length: bytes.count)
            result = write(file, operation, bytes)
        case .sync(let before, let snapshot):
            result = finishSync(file, before: before, snapshot: snapshot)
        case .punch:
            judgeShared(
                operation.file, offset: operation.offset, bytes: [], length: operation.length)
            land(file, offset: operation.offset, bytes: [], length: operation.length)
            result = 0
        case .create, .extend, .remove, .syncNames: preconditionFailure("is about no file")
        }
        return DiskCompletion(token: operation.token, result: result)
    }

    /// An operation about files' names has ended; nil: it is none.
    private func completeNames(_ operation: Operation) -> Int? {
        switch operation.kind {
        case .create(let layer, let size):
            if trouble.isFull && trouble.fullness != .data { return -28 }
            do throws(StorageError) {
                try createLayer(layer, size: size)
                return 0
            } catch { return error.result }
        case .extend(let layer, let size):
            do throws(StorageError) {
                // Now and then a file system takes no file as large as that.
                if random.permille(100) { throw StorageError(.io(errno: 27), "too large") }
                try extendLayer(layer, size: size)
                return 0
            } catch { return error.result }
        case .remove(let layer):
            unlink(layer)
            return 0
        case .syncNames(let synced):
            for index in names.indices where synced.contains(names[index].file.name) {
                names[index].isDurable = true
            }
            unlinked = []
            return 0
        default: return nil
        }
    }
    private func land(_ file: SimulatedFile, offset: Int, bytes: [UInt8], length: Int) {
        file.land(.init(order: nextOrder, offset: offset, bytes: bytes, length: length))
        nextOrder += 1
    }

    private func write(_ file: SimulatedFile, _ operation: Operation, _ bytes: [UInt8]) -> Int {
        if trouble.isFull,
            trouble.needsSpace(file, offset: operation.offset, length: operation.length)
        {
            // What there was space for, or what needed none, may have been written.
            let half = bytes.count / 2 / 512 * 512
            if half > 0 && random.permille(300) {
                land(
                    file, offset: operation.offset, bytes: [UInt8](bytes[..<half]), length: half)
            }
            return -28
        }
        if random.permille(trouble.writeErrors) {
            // What a failed write leaves is anybody's guess: here a torn half.
            let half = bytes.count / 2 / 512 * 512
            if half > 0 && random.permille(500) {
                land(
                    file, offset: operation.offset, bytes: [UInt8](bytes[..<half]), length: half)
            }
            return -5
        }
        if let offset = place(operation, file, bytes) {
            land(file, offset: offset, bytes: bytes, length: bytes.count)
        }
        return bytes.count
    }

    /// Where a write ends up: where it should, except for a data write of a disk in trouble. Pages,
    /// log and manifest are spared: of a page lost together with its data nothing is left that
    /// would tell, and only comparing the copies finds it.
    private func place(_ operation: Operation, _ file: SimulatedFile, _ bytes: [UInt8]) -> Int? {
        guard case .data = operation.file else { return operation.offset }
        switch trouble.misdoing {
        case .none: return operation.offset
        case .lose:
            trouble.misdoing = .none
            return nil
        case .misdirect:
            trouble.misdoing = .none
            let places = (file.size - bytes.count) / Geometry.blockSize
            return random.below(places + 1) * Geometry.blockSize
        }
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
        guard available > 0 else { return 0 }
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
    /// `isAlone`: only what nobody else has is lost.
    func cutPower(isAlone: Bool = false) {
        // Nearly everything, nearly nothing, or a mixture: each finds other bugs.
        let keepPermille = random.pick([0, 50, 500, 500, 950, 1000])
        let other = neighbour
        for file in names.map(\.file) where !isAlone || other?.has(file) != true {
            let torn = torn(file) + (other?.torn(file) ?? [])
            file.cutPower(keepPermille: keepPermille, torn: torn, random)
        }
        if !isAlone, let other {
            for file in other.names.map(\.file) where !has(file) {
                file.cutPower(keepPermille: keepPermille, torn: other.torn(file), random)
            }
            other.cutNames()
        }
        cutNames()
    }
    /// Writes to the file under way.
    private func torn(_ file: SimulatedFile) -> [SimulatedFile.Unsynced] {
        guard has(file) else { return [] }
        var torn: [SimulatedFile.Unsynced] = []
        for operation in operations where operation.file == file.name {
            guard case .write(let bytes) = operation.kind else { continue }
            torn.append(
                .init(
                    order: nextOrder, offset: operation.offset, bytes: bytes,
                    length: bytes.count))
            nextOrder += 1
        }
        return torn
    }
    private func cutNames() {
        for var name in unlinked where random.permille(500) {
            name.isStray = true
            names.append(name)
        }
        unlinked = []
        // A name that was not synced is gone, or is there, perhaps without the file's size.
        names.removeAll { !$0.isDurable && random.permille(500) }
        for index in names.indices where !names[index].isDurable && random.permille(500) {
            let file = names[index].file
            // That of a file which was there before is for the whole of it.
            guard neighbour?.has(file) != true else { continue }
            names[index] = Name(file: SimulatedFile(name: file.name, size: 0))
        }
        operations = []
        hasFailedSync = false
    }

    // MARK: Files with names in two directories

    /// The other directory on this disk, if there is one.
    private(set) weak var neighbour: SimulatedDisk?
    /// Gives the layers' files names in this directory as well.
    func link(_ layers: [LayerID], from other: SimulatedDisk) {
        precondition(other === neighbour)
        for layer in layers {
            for name in [ReplicaFile.data(layer), .table(layer)] {
                guard let file = other.file(name), !has(file) else { continue }
                names.append(Name(file: file))
            }
        }
    }
    /// The directory is deleted, when what was asked for in it has been done.
    func delete() {
        for operation in operations { _ = complete(operation.id, pool: nil) }
        names = []
        unlinked = []
        neighbour?.neighbour = nil
        neighbour = nil
    }

    // MARK: Whole directories

    /// A copy of the directory, as a backup program makes it.
    struct Backup {
        fileprivate var files: [SimulatedFile]
    }
    func backup() -> Backup { Backup(files: names.map(\.file.copy)) }
    /// Puts a copy back. The process must be gone.
    func restore(_ backup: Backup) {
        unlinked = []
        shared = []
        names = backup.files.map { Name(file: $0.copy, isDurable: true) }
        operations = []
        hasFailedSync = false
    }
    /// A new, empty disk.
    func replace() {
        clear()
        trouble = DiskTrouble()
    }
    func clear() {
        names = []
        unlinked = []
        shared = []
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
        try countCall()
        if let found = self.file(file) {
            // One without a byte is what a creation cut short leaves: it is taken for new.
            guard found.size == 0 else { throw StorageError(.exists, "\(file)") }
            names.removeAll { $0.file.name == file }
        }
        names.append(Name(file: SimulatedFile(name: file, size: Int(size))))
    }
    private func unlink(_ layer: LayerID) {
        let isOf = { (name: Name) in
            name.file.name == .data(layer) || name.file.name == .table(layer)
        }
        unlinked += names.filter(isOf)
        names.removeAll(where: isOf)
        shared.remove(layer)
    }
    func remove(_ layer: LayerID) throws(StorageError) {
        try countCall()
        unlink(layer)
    }
    func layersPresent() throws(StorageError) -> [LayerID] {
        Set(names.compactMap(\.file.name.layer)).sorted()
    }
    func extend(_ file: ReplicaFile, size: UInt64) throws(StorageError) {
        let file = try existing(file)
        guard file.size < Int(size) else { return }
        file.extend(to: Int(size), order: nextOrder)
        nextOrder += 1
    }
    func syncDirectories() throws(StorageError) {
        try countCall()
        for index in names.indices { names[index].isDurable = true }
        unlinked = []
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
