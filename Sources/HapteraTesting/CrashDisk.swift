#if canImport(Glibc)
    import Glibc
#else
    import Musl
#endif
import HapteraCore

/// What a crash keeps of one file's writes that no sync has covered.
enum CrashKeep: Equatable {
    case nothing
    case everything
    /// Each sector of each write with this chance.
    case some(permille: Int)
}

/// One file of a recorded disk, in three images: as the process sees it, as is certain to survive,
/// and a crash image under examination. The last is equal to the second between examinations.
final class CrashFile {
    struct Write {
        var id: Int
        var offset: Int
        /// Empty: a punched hole.
        var bytes: [UInt8]
        var length: Int
        var isLanded: Bool
        /// The sync that makes it durable.
        var sync: Int?
    }
    let size: Int
    let current: MemoryBlock
    let durable: MemoryBlock
    let image: MemoryBlock
    /// Not durable, in the order they were asked for.
    var writes: [Write] = []
    var isNameDurable = false
    var isSizeDurable = false
    /// Its name was taken away, which no sync of the names has made durable.
    var isRemoved = false
    /// A crash has left the name and no byte.
    var isEmpty = false
    var length: Int { isEmpty ? 0 : size }
    /// What of `image` may differ from `durable`.
    private var touched: [Range<Int>] = []

    init(size: Int) {
        self.size = size
        current = MemoryBlock(count: size)
        durable = MemoryBlock(count: size)
        image = MemoryBlock(count: size)
    }

    static func put(_ bytes: [UInt8], length: Int, to memory: RawMemory, at offset: Int) {
        if bytes.isEmpty {
            memory.slice(offset, length).fill()
        } else {
            memory.copy(from: bytes, at: offset)
        }
    }

    func land(_ id: Int) {
        guard let index = writes.firstIndex(where: { $0.id == id }) else { return }
        writes[index].isLanded = true
        let write = writes[index]
        Self.put(write.bytes, length: write.length, to: current.memory, at: write.offset)
    }
    /// A sync begins: it covers what has landed.
    func cover(by sync: Int) {
        for index in writes.indices where writes[index].isLanded && writes[index].sync == nil {
            writes[index].sync = sync
        }
    }
    func settle(_ sync: Int) {
        for write in writes where write.sync == sync {
            Self.put(write.bytes, length: write.length, to: durable.memory, at: write.offset)
            Self.put(write.bytes, length: write.length, to: image.memory, at: write.offset)
        }
        writes.removeAll { $0.sync == sync }
        isSizeDurable = true
    }

    /// Nobody waits for those under way any more.
    func forgetSyncs() {
        for index in writes.indices { writes[index].sync = nil }
    }

    // MARK: the crash image

    func touch(_ offset: Int, _ length: Int) { touched.append(offset..<offset + length) }

    func makeImage(_ keep: CrashKeep, isMapped: Bool, _ random: RandomSource) {
        for write in writes where keep != .nothing {
            touch(write.offset, write.length)
            guard case .some(let permille) = keep else {
                Self.put(write.bytes, length: write.length, to: image.memory, at: write.offset)
                continue
            }
            // A hole is made block by block; everything else tears between sectors.
            let grain = write.bytes.isEmpty ? Geometry.blockSize : 512
            for at in stride(from: 0, to: write.length, by: grain) where random.permille(permille) {
                var count = min(grain, write.length - at)
                // The kernel may write a mapped page out between two stores.
                if isMapped && random.permille(200) { count = random.below(count / 8 + 1) * 8 }
                guard count > 0 else { continue }
                let bytes = write.bytes.isEmpty ? [] : [UInt8](write.bytes[at..<at + count])
                Self.put(bytes, length: count, to: image.memory, at: write.offset + at)
            }
        }
    }
    func discardImage() {
        for range in touched {
            image.memory.copy(
                from: durable.memory.slice(range.lowerBound, range.count), at: range.lowerBound)
        }
        touched = []
    }
    /// The image is all there is from now on.
    func adoptImage() {
        for range in touched {
            let bytes = image.memory.slice(range.lowerBound, range.count)
            durable.memory.copy(from: bytes, at: range.lowerBound)
        }
        touched = []
        writes = []
        current.memory.copy(from: durable.memory)
    }
}

/// The disk under a running replica: performs what the core asks, remembers what is durable, and
/// can show what a crash at this moment may leave.
final class CrashDisk: ReplicaStorage {
    private(set) var files: [ReplicaFile: CrashFile] = [:]
    /// In a fixed order, for the same images on every machine.
    private(set) var order: [ReplicaFile] = []
    private var mapped: RawMemory?
    private let shadow = MemoryBlock(count: Int(ActivityLog.fileSize(capacity: CrashDisk.records)))
    static let records = ActivityLog.capacityMin
    private var nextID = 0
    /// Called after everything that changes what a crash may leave.
    var onChange: () -> Void = {}

    func file(_ name: ReplicaFile) throws(StorageError) -> CrashFile {
        guard let file = files[name], !file.isRemoved else {
            throw StorageError(.notFound, "\(name): not there")
        }
        return file
    }
    private func id() -> Int {
        nextID += 1
        return nextID
    }

    // MARK: asynchronous operations

    func beginWrite(_ name: ReplicaFile, offset: UInt64, bytes: [UInt8], length: Int) -> Int {
        let own = id()
        files[name]?.writes.append(
            .init(id: own, offset: Int(offset), bytes: bytes, length: length, isLanded: false))
        onChange()
        return own
    }
    func land(_ name: ReplicaFile, _ own: Int) {
        files[name]?.land(own)
        onChange()
    }
    /// The write ends with an error. Its first `kept` bytes are there.
    func failWrite(_ name: ReplicaFile, _ own: Int, kept: Int) {
        guard let file = files[name], let index = file.writes.firstIndex(where: { $0.id == own })
        else { return }
        if kept == 0 {
            file.writes.remove(at: index)
        } else {
            file.writes[index].bytes.removeLast(file.writes[index].length - kept)
            file.writes[index].length = kept
            file.land(own)
        }
        onChange()
    }
    func beginSync(_ name: ReplicaFile) -> Int {
        noteStores()
        let own = id()
        files[name]?.cover(by: own)
        return own
    }
    func endSync(_ name: ReplicaFile, _ own: Int) {
        files[name]?.settle(own)
        onChange()
    }

    /// Finds what the core has stored in the log's mapping since the last call.
    func noteStores() {
        guard let mapped, let file = files[.log], !isSame(mapped, shadow.memory) else { return }
        for at in stride(from: 0, to: mapped.count, by: 512) {
            let sector = mapped.slice(at, 512)
            guard !isSame(sector, shadow.memory.slice(at, 512)) else { continue }
            shadow.memory.copy(from: sector, at: at)
            file.writes.append(
                .init(id: id(), offset: at, bytes: sector.bytes(), length: 512, isLanded: true))
        }
        onChange()
    }

    // MARK: ReplicaStorage, for creating and opening

    func read(_ name: ReplicaFile, offset: UInt64, into memory: RawMemory) throws(StorageError)
        -> Int
    {
        let file = try file(name)
        let length = max(0, min(memory.count, file.length - Int(offset)))
        memory.copy(from: file.current.memory.slice(Int(offset), length))
        return length
    }
    func write(_ name: ReplicaFile, offset: UInt64, from memory: RawMemory) throws(StorageError) {
        _ = try file(name)
        let own = beginWrite(name, offset: offset, bytes: memory.bytes(), length: memory.count)
        land(name, own)
    }
    func sync(_ name: ReplicaFile) throws(StorageError) {
        _ = try file(name)
        let own = beginSync(name)
        onChange()
        endSync(name, own)
    }
    func size(_ name: ReplicaFile) throws(StorageError) -> UInt64 {
        UInt64(try file(name).length)
    }
    func create(_ name: ReplicaFile, size: UInt64) throws(StorageError) {
        if let file = files[name], !file.isRemoved, !file.isEmpty {
            throw StorageError(.exists, "\(name): is there")
        }
        // Numbers of layers are not given out again.
        precondition(files[name]?.isRemoved != true)
        if files[name] == nil { order.append(name) }
        files[name] = CrashFile(size: Int(size))
        onChange()
    }
    func remove(_ layer: LayerID) throws(StorageError) {
        for name in [ReplicaFile.data(layer), .table(layer)] {
            files[name]?.isRemoved = true
            onChange()
        }
    }
    func layersPresent() throws(StorageError) -> [LayerID] {
        present(in: order.filter { files[$0]?.isRemoved == false })
    }
    func syncDirectories() throws(StorageError) {
        for (name, file) in files {
            file.isNameDurable = true
            if file.isRemoved { forget(name) }
        }
        onChange()
    }
    private func forget(_ name: ReplicaFile) {
        files[name] = nil
        order.removeAll { $0 == name }
    }
    func nextAllocated(_ name: ReplicaFile, from offset: UInt64) throws(StorageError)
        -> Range<UInt64>?
    {
        let file = try file(name)
        return file.isEmpty ? nil : allocatedPage(file.current.memory, from: offset)
    }
    func mapLog(size: Int) throws(StorageError) -> RawMemory {
        let memory = try file(.log).current.memory.slice(0, size)
        shadow.memory.copy(from: memory)
        mapped = memory
        return memory
    }

    // MARK: crashes

    /// The process ends; what it asked of the disk happens all the same.
    func endProcess() {
        noteStores()
        for file in files.values {
            for write in file.writes where !write.isLanded { file.land(write.id) }
            file.forgetSyncs()
        }
        mapped = nil
    }
    /// The machine ends, and the image is what is left of the disk.
    func become(_ image: CrashImage) {
        mapped = nil
        for (name, file) in files {
            file.adoptImage()
            guard let size = image.sizes[name] else {
                forget(name)
                continue
            }
            file.isRemoved = false
            file.isNameDurable = true
            file.isSizeDurable = true
            file.isEmpty = size == 0
        }
    }
}

/// What a crash has left, as the next process finds it. Its own writes stay within the image.
final class CrashImage: ReplicaStorage {
    private let disk: CrashDisk
    /// Sizes of the files whose names survived.
    private(set) var sizes: [ReplicaFile: Int] = [:]
    /// Files that were not there.
    private var fresh: [ReplicaFile: CrashFile] = [:]

    /// `keep` by place in `disk.order`.
    init(_ disk: CrashDisk, keep: [CrashKeep], _ random: RandomSource) {
        self.disk = disk
        for (name, keep) in zip(disk.order, keep) {
            guard let file = disk.files[name] else { continue }
            file.makeImage(keep, isMapped: name == .log, random)
            let hasAll = keep == .everything
            guard file.isNameDurable || hasAll || random.permille(500),
                !file.isRemoved || !hasAll && random.permille(500)
            else { continue }
            let hasSize = file.isSizeDurable || hasAll || random.permille(500)
            sizes[name] = hasSize ? file.length : 0
        }
    }
    func discard() {
        for file in disk.files.values { file.discardImage() }
    }

    private func file(_ name: ReplicaFile) throws(StorageError) -> CrashFile {
        guard sizes[name] != nil, let file = fresh[name] ?? disk.files[name] else {
            throw StorageError(.notFound, "\(name): not there")
        }
        return file
    }
    func read(_ name: ReplicaFile, offset: UInt64, into memory: RawMemory) throws(StorageError)
        -> Int
    {
        let file = try file(name)
        let length = max(0, min(memory.count, (sizes[name] ?? 0) - Int(offset)))
        if length > 0 { memory.copy(from: file.image.memory.slice(Int(offset), length)) }
        return length
    }
    func write(_ name: ReplicaFile, offset: UInt64, from memory: RawMemory) throws(StorageError) {
        let file = try file(name)
        file.touch(Int(offset), memory.count)
        file.image.memory.copy(from: memory, at: Int(offset))
    }
    func punch(_ name: ReplicaFile, offset: UInt64, length: Int) throws(StorageError) {
        let file = try file(name)
        file.touch(Int(offset), length)
        file.image.memory.slice(Int(offset), length).fill()
    }
    func sync(_ name: ReplicaFile) throws(StorageError) { _ = try file(name) }
    func size(_ name: ReplicaFile) throws(StorageError) -> UInt64 {
        _ = try file(name)
        return UInt64(sizes[name] ?? 0)
    }
    /// A file without a byte is what a creation cut short leaves.
    func create(_ name: ReplicaFile, size: UInt64) throws(StorageError) {
        guard sizes[name] ?? 0 == 0 else { throw StorageError(.exists, "\(name): is there") }
        fresh[name] = CrashFile(size: Int(size))
        sizes[name] = Int(size)
    }
    func remove(_ layer: LayerID) throws(StorageError) {
        for name in [ReplicaFile.data(layer), .table(layer)] { sizes[name] = nil }
    }
    func layersPresent() throws(StorageError) -> [LayerID] { present(in: Array(sizes.keys)) }
    func syncDirectories() throws(StorageError) {}
    func nextAllocated(_ name: ReplicaFile, from offset: UInt64) throws(StorageError)
        -> Range<UInt64>?
    {
        let file = try file(name)
        return sizes[name] == 0 ? nil : allocatedPage(file.image.memory, from: offset)
    }
    func mapLog(size: Int) throws(StorageError) -> RawMemory {
        let file = try file(.log)
        file.touch(0, file.size)
        return file.image.memory.slice(0, size)
    }
}

private func present(in names: [ReplicaFile]) -> [LayerID] {
    var found: Set<LayerID> = []
    for case .data(let layer) in names { found.insert(layer) }
    for case .table(let layer) in names { found.insert(layer) }
    return found.sorted()
}

/// The first 4 KiB page at or after `offset` that is not all zero: these disks give no space to
/// others.
private func allocatedPage(_ memory: RawMemory, from offset: UInt64) -> Range<UInt64>? {
    for at in stride(from: Int(offset) / 4096 * 4096, to: memory.count, by: 4096) {
        let length = min(4096, memory.count - at)
        if !memory.slice(at, length).isZero {
            return max(offset, UInt64(at))..<UInt64(at + length)
        }
    }
    return nil
}

private func isSame(_ a: RawMemory, _ b: RawMemory) -> Bool {
    precondition(a.count == b.count)
    // SAFETY: both views have `count` readable bytes.
    return unsafe memcmp(a.base, b.base, a.count) == 0
}
