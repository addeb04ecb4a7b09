@testable import HapteraCore

/// A small deterministic random source: a failing seed fails again.
struct TestRandom {
    private var state: UInt64
    init(seed: UInt64) { state = seed &* 0x9E37_79B9_7F4A_7C15 | 1 }
    mutating func next() -> UInt64 {
        state ^= state << 13
        state ^= state >> 7
        state ^= state << 17
        return state
    }
    mutating func below(_ limit: Int) -> Int { Int(next() >> 11) % limit }
    mutating func chance(_ percent: Int) -> Bool { below(100) < percent }
}

/// Files in memory that know what is durable. `cutPower` keeps any subset of the 512-byte sectors
/// written since each file's last sync.
final class ReplicaTestDisk: ReplicaStorage {
    private static let sector = 512
    private final class File {
        var now: MemoryBlock
        var durable: MemoryBlock
        var size: UInt64
        var durableSize: UInt64
        /// Sectors that may differ from what is durable.
        var dirty: Set<Int> = []
        /// Names, in the directories of several disks.
        var links = 1
        init(size: UInt64) {
            now = MemoryBlock(count: Int(size))
            durable = MemoryBlock(count: Int(size))
            self.size = size
            durableSize = size
        }
        func extend(to size: UInt64) {
            for block in [\File.now, \.durable] {
                let longer = MemoryBlock(count: Int(size))
                longer.memory.copy(from: self[keyPath: block].memory.slice(0, Int(self.size)))
                self[keyPath: block] = longer
            }
            self.size = size
        }
        /// What no sync has made longer may be as short as it was.
        func shrink() {
            let lost = Int(durableSize)..<Int(size)
            for block in [now, durable] {
                block.memory.slice(lost.lowerBound, lost.count).fill()
            }
            size = durableSize
            dirty = dirty.filter { $0 * 512 < Int(durableSize) }
        }
        func markAll(_ range: Range<Int>) {
            guard !range.isEmpty else { return }
            for sector in range.lowerBound / 512...(range.upperBound - 1) / 512 {
                dirty.insert(sector)
            }
        }
        func keep(_ sector: Int) {
            let length = min(512, Int(size) - sector * 512)
            durable.memory.copy(from: now.memory.slice(sector * 512, length), at: sector * 512)
        }
        func forget(_ sector: Int) {
            let length = min(512, Int(size) - sector * 512)
            now.memory.copy(from: durable.memory.slice(sector * 512, length), at: sector * 512)
        }
    }
    private var files: [ReplicaFile: File] = [:]
    /// What was done to files that another disk has as well, and must not be: pages written, bytes
    /// changed.
    private(set) var violations: [String] = []
    private var namesDurable: Set<ReplicaFile> = []
    /// Changes (writes, creations, syncs) so far, and after how many the power fails.
    private(set) var changeCount = 0
    var changesMax = Int.max
    /// No write to a layer's data is taken.
    var refusesData = false
    var refusesRoom = false
    struct PowerCut: Error {}

    private func file(_ name: ReplicaFile) throws(StorageError) -> File {
        guard let file = files[name] else { throw StorageError(.notFound, "\(name): not there") }
        return file
    }
    private func change() throws(StorageError) {
        guard changeCount < changesMax else { throw StorageError(.io(errno: 5), "power cut") }
        changeCount += 1
    }

    func read(_ name: ReplicaFile, offset: UInt64, into memory: RawMemory) throws(StorageError)
        -> Int
    {
        let file = try file(name)
        guard offset < file.size else { return 0 }
        let length = min(memory.count, Int(file.size - offset))
        memory.copy(from: file.now.memory.slice(Int(offset), length))
        return length
    }
    func write(_ name: ReplicaFile, offset: UInt64, from memory: RawMemory) throws(StorageError) {
        let file = try file(name)
        if refusesData, case .data = name { throw StorageError(.io(errno: 5), "bad sector") }
        try change()
        if file.links > 1 {
            let now = file.now.memory.slice(Int(offset), memory.count)
            if case .table = name { violations.append("\(name) written at \(offset)") }
            if !now.equals(memory) { violations.append("\(name) changed at \(offset)") }
        }
        file.now.memory.copy(from: memory, at: Int(offset))
        file.markAll(Int(offset)..<Int(offset) + memory.count)
    }
    func sync(_ name: ReplicaFile) throws(StorageError) {
        let file = try file(name)
        try change()
        if name == .log { file.markAll(0..<Int(file.size)) }
        for sector in file.dirty { file.keep(sector) }
        file.dirty = []
        file.durableSize = file.size
    }
    func extend(_ name: ReplicaFile, size: UInt64) throws(StorageError) {
        let file = try file(name)
        guard file.size < size else { return }
        if refusesRoom { throw StorageError(.noSpace, "\(name): no room") }
        try change()
        file.extend(to: size)
    }
    func size(_ name: ReplicaFile) throws(StorageError) -> UInt64 { try file(name).size }
    func create(_ name: ReplicaFile, size: UInt64) throws(StorageError) {
        guard files[name] == nil else { throw StorageError(.exists, "\(name): is there") }
        try change()
        files[name] = File(size: size)
    }
    func remove(_ layer: LayerID) throws(StorageError) {
        try change()
        for name in [ReplicaFile.data(layer), .table(layer)] {
            files.removeValue(forKey: name)?.links -= 1
        }
    }
    func isShared(_ layer: LayerID) -> Bool { files[.data(layer)].map { $0.links > 1 } ?? false }
    /// Gives the layers' files names on another disk.
    func link(_ layers: [LayerID], to other: ReplicaTestDisk) {
        for layer in layers {
            for name in [ReplicaFile.data(layer), .table(layer)] {
                files[name]?.links += 1
                other.files[name] = files[name]
            }
        }
    }
    /// The directory is deleted.
    func discard() {
        for file in files.values { file.links -= 1 }
        files = [:]
    }
    func layersPresent() throws(StorageError) -> [LayerID] {
        Set(files.keys.compactMap(\.layer)).sorted()
    }
    func syncDirectories() throws(StorageError) {
        try change()
        namesDurable = Set(files.keys)
    }
    func nextAllocated(_ name: ReplicaFile, from offset: UInt64) throws(StorageError) -> Range<
        UInt64
    >? {
        let file = try file(name)
        var page = Int(offset) / 4096
        while page * 4096 < Int(file.size) {
            let length = min(4096, Int(file.size) - page * 4096)
            if !file.now.memory.slice(page * 4096, length).isZero {
                return max(offset, UInt64(page * 4096))..<UInt64(page * 4096 + length)
            }
            page += 1
        }
        return nil
    }
    func mapLog(size: Int) throws(StorageError) -> RawMemory {
        try file(.log).now.memory.slice(0, size)
    }
    func punch(_ name: ReplicaFile, offset: UInt64, length: UInt64) throws(StorageError) {
        let file = try file(name)
        try change()
        file.now.memory.slice(Int(offset), Int(length)).fill()
        file.markAll(Int(offset)..<Int(offset + length))
    }

    /// Keeps each unsynced sector with the given chance; names not synced are lost or kept together
    /// with their files.
    func cutPower(_ random: inout TestRandom, keepPercent: Int) {
        for (name, file) in files.sorted(by: { "\($0.key)" < "\($1.key)" }) {
            if !namesDurable.contains(name), random.chance(50) {
                files[name] = nil
                continue
            }
            if file.durableSize < file.size, random.chance(50) { file.shrink() }
            file.durableSize = file.size
            if name == .log { markLogChanges(file) }
            for sector in file.dirty.sorted() {
                if random.chance(keepPercent) { file.keep(sector) } else { file.forget(sector) }
            }
            file.dirty = []
        }
        changesMax = .max
    }
    /// Stores into the mapping leave no trace but the difference.
    private func markLogChanges(_ file: File) {
        for sector in 0..<Int(file.size) / Self.sector {
            let at = sector * Self.sector
            if !file.now.memory.slice(at, 512).equals(file.durable.memory.slice(at, 512)) {
                file.dirty.insert(sector)
            }
        }
    }
    func replace(_ name: ReplicaFile, _ bytes: [UInt8]) {
        let file = File(size: UInt64(bytes.count))
        for block in [file.now, file.durable] { block.memory.copy(from: bytes) }
        files[name] = file
    }
    /// Direct access, for damage.
    func memory(_ name: ReplicaFile) throws(StorageError) -> RawMemory {
        try file(name).now.memory
    }
}

/// A replica on a test disk with an engine's side of one or more connections.
final class ReplicaBench {
    static let volume = VolumeID(high: 1, low: 2)
    let disk: ReplicaTestDisk
    private static let limits = BufferPool.Limits(small: 600, medium: 200, large: 16)
    private(set) var pool = BufferPool(limits: limits)
    private(set) var options: ReplicaOptions
    private(set) var core: ReplicaCore
    var now = Instant(rawValue: 1_000_000_000)
    var replies: [(connection: Int, header: FrameHeader, table: [UInt8], data: [UInt8])] = []
    var failure: ReplicaFailure?
    var closed: Set<Int> = []
    /// Disk operations not yet performed, and those that may be picked for reordering.
    var pending: [ReplicaAction] = []
    var random: TestRandom
    /// Fails the next disk operation it says yes to, with the result it gives.
    var fault: ((ReplicaAction) -> Int?)?
    private var tag: UInt64 = 0

    static func identity(regions: Int = 8) -> ReplicaIdentity {
        ReplicaIdentity(
            volume: volume, name: "vol", replica: ReplicaID(rawValue: 7),
            incarnation: Incarnation(rawValue: 8), size: UInt64(regions * Geometry.regionSize))
    }
    static func options(active: Int = 16, instance: UInt64 = 1, boot: UInt64 = 1)
        -> ReplicaOptions
    {
        ReplicaOptions(
            instance: InstanceID(rawValue: instance), bootID: BootID(high: 0, low: boot),
            tableCachePagesMax: active + 64, activeRegionsMax: active)
    }

    init(
        disk: ReplicaTestDisk = ReplicaTestDisk(), create: Bool = true, regions: Int = 8,
        options: ReplicaOptions = ReplicaBench.options(), seed: UInt64 = 1
    ) throws(StorageError) {
        self.disk = disk
        if create {
            try ReplicaCore.create(
                storage: disk, identity: Self.identity(regions: regions),
                logCapacity: ActivityLog.capacityMin)
        }
        self.options = options
        core = try ReplicaCore(opening: disk, options: options, pool: pool)
        random = TestRandom(seed: seed)
    }

    /// The process has ended, and the next one opens the same files.
    func reopen(boot: UInt64? = nil) throws(StorageError) {
        if let boot { options.bootID = BootID(high: 0, low: boot) }
        pending = []
        pool = BufferPool(limits: Self.limits)
        var again = options
        again.instance = InstanceID(rawValue: options.instance.rawValue + random.next() >> 8)
        core = try ReplicaCore(opening: disk, options: again, pool: pool)
    }

    func step(_ event: ReplicaEvent) {
        core.step(event, now: now)
        drain()
    }
    private func drain() {
        while let action = core.actions.popFirst() {
            switch action {
            case .read, .write, .sync, .punch, .create, .extend, .remove: pending.append(action)
            case .reply(let connection, let header, let table, let data, let offset):
                take(connection, header, table, data, offset)
            case .close(let connection): closed.insert(connection)
            case .note: break
            case .failed(let reason): failure = reason
            }
        }
    }
    private func take(
        _ connection: Int, _ header: FrameHeader, _ table: BufferID, _ data: BufferID,
        _ offset: Int
    ) {
        var tableBytes: [UInt8] = []
        var dataBytes: [UInt8] = []
        if table != .none {
            tableBytes = pool.memory(table).slice(0, Int(header.tableLength)).bytes()
            pool.release(table)
        }
        if data != .none {
            dataBytes = pool.memory(data).slice(offset, Int(header.dataLength)).bytes()
            pool.release(data)
        }
        replies.append((connection, header, tableBytes, dataBytes))
    }

    /// Performs one pending disk operation: the first, or any.
    func performOne(anyOrder: Bool = false) throws(StorageError) {
        let action = pending.remove(at: anyOrder ? random.below(pending.count) : 0)
        var result = fault?(action)
        let token: UInt64
        switch action {
        case .read(let file, let offset, let length, let buffer, let at, let own):
            token = own
            if result == nil {
                result = try disk.read(
                    file, offset: offset, into: pool.memory(buffer).slice(at, length))
            }
        case .write(let file, let offset, let length, let buffer, let at, let own):
            token = own
            if result == nil {
                try disk.write(file, offset: offset, from: pool.memory(buffer).slice(at, length))
                result = length
            }
        case .create(let layer, let size, let own):
            token = own
            if result == nil {
                try disk.createLayer(layer, size: size)
                result = 0
            }
        case .extend(let layer, let size, let own):
            token = own
            if result == nil {
                try disk.extendLayer(layer, size: size)
                result = 0
            }
        case .remove(let layer, let own):
            token = own
            if result == nil {
                try disk.remove(layer)
                result = 0
            }
        case .sync(.layers, let own):
            token = own
            if result == nil {
                try disk.syncDirectories()
                result = 0
            }
        case .sync(let file, let own):
            token = own
            if result == nil {
                try disk.sync(file)
                result = 0
            }
        case .punch(let file, let offset, let length, let own):
            token = own
            if result == nil {
                try disk.punch(file, offset: offset, length: length)
                result = 0
            }
        default: preconditionFailure("not a disk operation")
        }
        step(.disk(token: token, result: result ?? -5))
    }
    func run() throws(StorageError) {
        while !pending.isEmpty, failure == nil { try performOne() }
    }
    func tick(milliseconds: UInt64 = 100) throws(StorageError) {
        now = now.adding(milliseconds: milliseconds)
        step(.tick)
        try run()
    }

    // MARK: the engine's side

    @discardableResult
    func send(
        _ kind: FrameKind, on connection: Int = 0, epoch: UInt64 = 1, offset: UInt64 = 0,
        length: Int = 0, sequence: UInt64 = 1, auxiliary: UInt64 = 0, flags: UInt16 = 0,
        layer: UInt32 = 0, table: [UInt8] = [], data: [UInt8]? = nil
    ) -> UInt64 {
        tag += 1
        var header = FrameHeader(kind: kind)
        header.flags = flags
        header.layer = LayerID(rawValue: layer)
        header.epoch = Epoch(epoch)
        header.tag = tag
        header.sequence = SequenceNumber(sequence)
        header.offset = offset
        header.length = UInt32(length)
        header.auxiliary = auxiliary
        header.tableLength = UInt32(table.count)
        var buffer = BufferID.none
        if let data, let allocated = pool.allocate(data.count) {
            buffer = allocated
            pool.memory(allocated).copy(from: data)
            header.dataLength = UInt32(data.count)
        }
        let block = MemoryBlock(count: max(table.count, 1))
        block.memory.copy(from: table)
        step(
            .frame(
                connection: connection, header, table: block.memory.slice(0, table.count),
                buffer: buffer))
        return tag
    }
    func reply(_ tag: UInt64) -> (
        connection: Int, header: FrameHeader, table: [UInt8], data: [UInt8]
    )? {
        replies.first { $0.header.tag == tag }
    }
    func status(_ tag: UInt64) -> FrameStatus? { reply(tag)?.header.status }

    /// Layers of snapshots that records do not name any more.
    var deleted: Set<UInt32> = []
    /// Whose layers, snapshots and reverts records have; nil: as many layers as the copy has, or
    /// more, but for `deleted`.
    var lineage: VolumeRecord?
    /// Records have another member, and this one as the joiner.
    var isJoining = false
    /// Records tell of a salvage at this epoch that went on from this copy.
    var salvaged: Epoch?
    func record(epoch: UInt64, engine: UInt64 = 1, layers: Int = 0) -> VolumeRecord {
        var record = VolumeRecord(
            volume: Self.volume, name: "vol", epoch: Epoch(epoch), nonce: epoch,
            size: core.size, inSync: [core.identity.member])
        record.engine = InstanceID(rawValue: engine)
        if isJoining {
            record.joining = core.identity.member
            record.inSync[0].replica = ReplicaID(rawValue: ~core.identity.replica.rawValue)
        }
        record.lineage = [salvaged].compactMap(\.self).map {
            .init(epoch: $0, survivor: core.identity.replica, partedEpoch: $0)
        }
        if let lineage {
            record.layers = lineage.layers
            record.snapshots = lineage.snapshots
            record.reverts = lineage.reverts
            return record
        }
        let top = max(UInt32(layers), core.headLayer.rawValue)
        record.layers = (1...top).filter { !deleted.contains($0) }.map(LayerID.init)
        record.snapshots = record.layers.dropLast().map {
            .init(layer: $0, name: "s\($0.rawValue)", created: 1)
        }
        return record
    }
    @discardableResult
    func hello(on connection: Int = 0, engine: UInt64 = 1) -> UInt64 {
        step(.connected(connection: connection))
        return send(
            .hello, on: connection,
            table: HelloRequest(volume: Self.volume, engine: InstanceID(rawValue: engine))
                .encoded())
    }
    @discardableResult
    func install(
        on connection: Int = 0, epoch: UInt64, engine: UInt64 = 1, layers: Int = 0
    ) -> UInt64 {
        let request = InstallRequest(
            engine: InstanceID(rawValue: engine),
            record: record(epoch: epoch, engine: engine, layers: layers))
        return send(.install, on: connection, epoch: epoch, table: request.encoded())
    }
    func attach(epoch: UInt64 = 1, on connection: Int = 0, engine: UInt64 = 1) throws(StorageError)
        -> InstallReply?
    {
        hello(on: connection, engine: engine)
        let tag = install(on: connection, epoch: epoch, engine: engine)
        try run()
        return reply(tag).flatMap { InstallReply(decoding: $0.table) }
    }

    /// Blocks that differ from each other and from those of any other value; the block at `index`
    /// is that of `value + index` alone.
    static func checksums(_ data: [UInt8]) -> [UInt8] {
        var writer = ByteWriter()
        for block in 0..<data.count / 4096 {
            writer.append(checksum(of: [UInt8](data[block * 4096..<(block + 1) * 4096])))
        }
        return writer.bytes
    }
    @discardableResult
    func write(
        _ data: [UInt8], at offset: UInt64, epoch: UInt64 = 1, sequence: UInt64 = 1,
        flags: UInt16 = 0, layer: UInt32 = 0, on connection: Int = 0
    ) -> UInt64 {
        send(
            .write, on: connection, epoch: epoch, offset: offset, length: data.count,
            sequence: sequence, flags: flags, layer: layer, table: Self.checksums(data),
            data: data)
    }
}
