import HapteraCore

/// A replica's process and the engine's end of its connections.
final class CrashHost {
    struct Reply {
        var header: FrameHeader
        var table: [UInt8]
        var data: [UInt8]
    }
    /// The last bytes of the volume are in a region cut short.
    static let regions = 4
    static let size = UInt64((regions - 1) * Geometry.regionSize + 64 * Geometry.blockSize)
    static let firstLayer = LayerID(rawValue: 1)
    static let identity = ReplicaIdentity(
        volume: VolumeID(high: 1, low: 2), name: "volume", replica: ReplicaID(rawValue: 3),
        incarnation: Incarnation(rawValue: 4), size: size)

    let pool: BufferPool
    let core: ReplicaCore
    private(set) var connection = -1
    var now = Instant(rawValue: 1_000_000_000)
    private(set) var failure: ReplicaFailure?
    private var tag: UInt64 = 0
    private let table = MemoryBlock(count: FrameHeader.recordTableLengthMax)
    /// A disk operation is to be performed, now or later.
    var perform: (ReplicaAction) -> Void = { _ in }
    var replied: (Reply) -> Void = { _ in }
    /// After each step of the core, before what it asked for is done.
    var stepped: () -> Void = {}

    init(
        opening storage: ReplicaStorage, instance: UInt64, boot: UInt64, mutations: MutationSet,
        limits: BufferPool.Limits
    ) throws(StorageError) {
        pool = BufferPool(limits: limits)
        var options = ReplicaOptions(
            instance: InstanceID(rawValue: instance), bootID: BootID(high: boot, low: 1),
            tableCachePagesMax: 68, activeRegionsMax: 3, mutations: mutations)
        options.hash = CrashContent.digest
        options.stayingBlocksMin = 0
        options.risingPercent = 20
        options.hiddenBlocksMin = 0
        core = try ReplicaCore(opening: storage, options: options, pool: pool)
    }

    func step(_ event: ReplicaEvent) {
        core.step(event, now: now)
        stepped()
        while let action = core.actions.popFirst() { handle(action) }
    }
    func beginShutdown() {
        core.beginShutdown(now: now)
        stepped()
        while let action = core.actions.popFirst() { handle(action) }
    }
    private func handle(_ action: ReplicaAction) {
        switch action {
        case .read, .write, .sync, .punch, .create, .extend, .remove: perform(action)
        case .reply(let connection, let header, let table, let buffer, let offset):
            var reply = Reply(header: header, table: [], data: [])
            if header.tableLength > 0 {
                reply.table = pool.memory(table).slice(0, Int(header.tableLength)).bytes()
            }
            if header.dataLength > 0 {
                reply.data = pool.memory(buffer).slice(offset, Int(header.dataLength)).bytes()
            }
            if table != .none { pool.release(table) }
            if buffer != .none { pool.release(buffer) }
            if connection == self.connection { replied(reply) }
        case .failed(let reason): failure = reason
        case .close, .note: break
        }
    }

    // MARK: frames

    /// Nil: no buffer for the data now.
    @discardableResult
    func send(
        _ kind: FrameKind, epoch: UInt64, layer: LayerID = .head, offset: UInt64 = 0,
        length: Int = 0, sequence: UInt64 = 0, auxiliary: UInt64 = 0, flags: UInt16 = 0,
        table: [UInt8] = [], values: [UInt64] = []
    ) -> UInt64? {
        var header = FrameHeader(kind: kind)
        var buffer = BufferID.none
        var tableLength = table.count
        self.table.memory.copy(from: table)
        if !values.isEmpty {
            guard let free = pool.allocate(values.count * Geometry.blockSize) else { return nil }
            buffer = free
            for (place, value) in values.enumerated() {
                let block = pool.memory(buffer).slice(place * 4096, 4096)
                CrashContent.fill(block, value)
                self.table.memory.store(CRC32C.checksum(block), place * 4)
            }
            header.dataLength = UInt32(values.count * Geometry.blockSize)
            tableLength = values.count * 4
        }
        tag += 1
        header.flags = flags
        header.layer = layer
        header.epoch = Epoch(epoch)
        header.tag = tag
        header.sequence = SequenceNumber(sequence)
        header.offset = offset
        header.length = UInt32(length)
        header.auxiliary = auxiliary
        header.tableLength = UInt32(tableLength)
        let own = tag
        step(
            .frame(
                connection: connection, header, table: self.table.memory.slice(0, tableLength),
                buffer: buffer))
        return own
    }

    static func record(epoch: UInt64, layers: [LayerID]) -> VolumeRecord {
        var record = VolumeRecord(
            volume: identity.volume, name: identity.name, epoch: Epoch(epoch), nonce: epoch,
            size: size, inSync: [identity.member])
        record.engine = InstanceID(rawValue: epoch)
        record.layers = layers
        return record
    }
    /// A new engine, on a connection of its own. Returns the tags of hello and Install.
    func attach(epoch: UInt64, layers: [LayerID]) -> (hello: UInt64?, install: UInt64?) {
        let engine = InstanceID(rawValue: epoch)
        if connection >= 0 { step(.disconnected(connection: connection)) }
        connection = (connection + 1) % ReplicaLimits.connectionsMax
        step(.connected(connection: connection))
        let hello = HelloRequest(volume: Self.identity.volume, engine: engine)
        let install = InstallRequest(
            engine: engine, record: Self.record(epoch: epoch, layers: layers))
        return (
            send(.hello, epoch: epoch, table: hello.encoded()),
            send(.install, epoch: epoch, table: install.encoded())
        )
    }
}

/// Blocks that say whose they are: all their words are one value, so a mixture shows.
enum CrashContent {
    static func fill(_ block: RawMemory, _ value: UInt64) {
        var at = 0
        while at < block.count {
            block.store(value, at)
            at += 8
        }
    }
    /// Stands for the hash of a digest: the value, and how many sectors hold it.
    static func digest(_ block: RawMemory) -> (low: UInt64, high: UInt64) {
        let value = block.load(UInt64.self, 0)
        var same: UInt64 = 0
        for at in stride(from: 0, to: block.count, by: 512)
        where block.load(UInt64.self, at) == value && block.load(UInt64.self, at + 504) == value {
            same += 1
        }
        return (value, same)
    }
}
