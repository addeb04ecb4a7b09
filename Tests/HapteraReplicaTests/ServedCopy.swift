import Glibc
import HapteraCore
import HapteraIO

@testable import HapteraReplica

/// A copy in a directory, served by the real core, whose disk operations are done one by one.
final class ServedCopy {
    static let volume = VolumeID(high: 1, low: 2)
    static let blockSize = Geometry.blockSize
    let core: ReplicaCore
    private let storage: DirectoryStorage
    private let pool = BufferPool(limits: .init(small: 600, medium: 40, large: 16))
    private var now = Instant(rawValue: 1_000_000_000)
    private var tag: UInt64 = 0
    private var sequence: UInt64 = 1
    private var replies: [UInt64: (header: FrameHeader, data: [UInt8])] = [:]
    private(set) var failure: ReplicaFailure?
    /// As `InstallReply.isRebooted` would say.
    var isRebooted: Bool { core.isRebooted }

    static func create(_ directory: String, _ member: VolumeRecord.Member, regions: Int) throws {
        try ReplicaCore.create(
            storage: DirectoryStorage(directory: directory, mode: .serve),
            identity: ReplicaIdentity(
                volume: volume, name: "volume", replica: member.replica,
                incarnation: member.incarnation, size: UInt64(regions * Geometry.regionSize)),
            logCapacity: ActivityLog.capacityMin)
    }

    init(_ directory: String) throws {
        storage = DirectoryStorage(directory: directory, mode: .serve)
        storage.markPlaces = [DirectoryStorage.markMemory]
        for file in [ReplicaFile.manifest, .log] { _ = try storage.descriptor(file) }
        let options = ReplicaOptions(
            instance: InstanceID(rawValue: randomUInt64() | 1),
            bootID: try storage.bootAfterFailedSyncs(HostBoot.read()))
        core = try ReplicaCore(opening: storage, options: options, pool: pool)
        step(.connected(connection: 0))
        try send(.hello, HelloRequest(volume: Self.volume, engine: engine).encoded())
        try install { _ in }
    }
    private let engine = InstanceID(rawValue: 1)

    /// The next record, with that change.
    func install(_ change: (inout VolumeRecord) -> Void) throws {
        var record =
            core.installedRecord
            ?? VolumeRecord(
                volume: Self.volume, name: "volume", epoch: .zero, nonce: 1, size: core.size,
                inSync: [core.identity.member])
        change(&record)
        record.epoch = core.promise.next
        record.engine = engine
        try send(.install, InstallRequest(engine: engine, record: record).encoded())
    }
    func takeSnapshot(_ name: String) throws {
        try install { record in
            let head = record.head
            record.snapshots.append(.init(layer: head, name: name, created: 1))
            record.layers.append(LayerID(rawValue: head.rawValue + 1))
        }
    }

    static func pattern(_ value: Int) -> [UInt8] {
        (0..<blockSize).map { UInt8(truncatingIfNeeded: $0 / 7 &+ value &* 31) | 1 }
    }
    func write(_ block: Int, _ value: Int) throws {
        let data = Self.pattern(value)
        var table = ByteWriter()
        table.append(checksum(of: data))
        try send(.write, table.bytes, data, block: block, count: 1)
    }
    /// Write-zeroes that keeps the space.
    func zero(_ block: Int) throws {
        try send(.setState, block: block, count: 1, auxiliary: 3)
    }
    /// Nil: it is refused, or the process fails.
    func read(_ block: Int, layer: UInt32 = 0) throws -> [UInt8]? {
        let reply = try? send(.read, block: block, count: 1, layer: layer)
        guard let reply, reply.header.status == .ok else { return nil }
        return reply.data.isEmpty ? [UInt8](repeating: 0, count: Self.blockSize) : reply.data
    }
    func flush() throws {
        sequence += 1
        try send(.flush)
        try send(.stable, auxiliary: core.promise.rawValue)
    }
    /// Everything is drained, and the log's tail behind it; but for what no stable point covers.
    func close(isStable: Bool = true) throws {
        if isStable { try flush() }
        core.beginShutdown(now: now)
        try run()
        for _ in 0..<100 where !core.isShutDown {
            now = now.adding(milliseconds: 100)
            step(.tick)
            try run()
        }
        guard core.isShutDown else { throw StorageError(.inUse, "it does not end") }
    }

    // MARK: frames

    @discardableResult
    private func send(
        _ kind: FrameKind, _ table: [UInt8] = [], _ data: [UInt8] = [], block: Int = 0,
        count: Int = 0, layer: UInt32 = 0, auxiliary: UInt64 = 0
    ) throws -> (header: FrameHeader, data: [UInt8]) {
        tag += 1
        if kind == .write || kind == .setState { sequence += 1 }
        var header = FrameHeader(kind: kind)
        header.layer = LayerID(rawValue: layer)
        header.epoch = core.promise
        header.tag = tag
        header.sequence = SequenceNumber(sequence)
        header.offset = UInt64(block * Self.blockSize)
        header.length = UInt32(count * Self.blockSize)
        header.auxiliary = auxiliary
        header.tableLength = UInt32(table.count)
        header.dataLength = UInt32(data.count)
        var buffer = BufferID.none
        if !data.isEmpty, let allocated = pool.allocate(data.count) {
            buffer = allocated
            pool.memory(allocated).copy(from: data)
        }
        let memory = MemoryBlock(count: max(table.count, 1))
        memory.memory.copy(from: table)
        step(
            .frame(
                connection: 0, header, table: memory.memory.slice(0, table.count), buffer: buffer))
        try run()
        guard kind != .stable else { return (header, []) }
        guard failure == nil, let reply = replies[tag] else {
            throw StorageError(.damaged, "no answer to \(kind)")
        }
        guard reply.header.status == .ok || kind == .read else {
            throw StorageError(.damaged, "\(kind): \(reply.header.status)")
        }
        return reply
    }

    // MARK: actions

    private var pending: [ReplicaAction] = []
    private func step(_ event: ReplicaEvent) {
        core.step(event, now: now)
        while let action = core.actions.popFirst() {
            switch action {
            case .reply(_, let header, let table, let data, let offset):
                var bytes: [UInt8] = []
                if table != .none { pool.release(table) }
                if data != .none {
                    bytes = pool.memory(data).slice(offset, Int(header.dataLength)).bytes()
                    pool.release(data)
                }
                replies[header.tag] = (header, bytes)
            case .close, .note: break
            case .failed(let reason): failure = reason
            default: pending.append(action)
            }
        }
    }
    private func run() throws {
        while !pending.isEmpty, failure == nil { try perform(pending.removeFirst()) }
    }
    private func perform(_ action: ReplicaAction) throws {
        switch action {
        case .read(let file, let offset, let length, let buffer, let at, let token):
            let memory = pool.memory(buffer).slice(at, length)
            let count = try storage.read(file, offset: offset, into: memory)
            step(.disk(token: token, result: count))
        case .write(let file, let offset, let length, let buffer, let at, let token):
            try storage.write(
                file, offset: offset, from: pool.memory(buffer).slice(at, length))
            step(.disk(token: token, result: length))
        case .sync(.layers, let token):
            try storage.syncDirectories()
            step(.disk(token: token, result: 0))
        case .sync(let file, let token):
            try storage.sync(file)
            step(.disk(token: token, result: 0))
        case .create(let layer, let size, let token):
            try storage.createLayer(layer, size: size)
            step(.disk(token: token, result: 0))
        case .punch(let file, let offset, let length, let token):
            let opened = try DirectFile(path: storage.path(file), direct: false)
            try opened.punch(offset: offset, length: UInt64(length))
            step(.disk(token: token, result: 0))
        default: preconditionFailure("\(action) is not expected here")
        }
    }
}
