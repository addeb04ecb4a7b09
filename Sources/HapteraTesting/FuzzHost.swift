import HapteraCore

/// A replica's files in memory, without any trouble of their own.
final class FuzzFiles: ReplicaStorage {
    private var files: [ReplicaFile: MemoryBlock] = [:]

    func copy() -> FuzzFiles {
        let other = FuzzFiles()
        for (name, block) in files {
            let fresh = MemoryBlock(count: block.memory.count)
            // Data is never looked at by what opens.
            if case .data = name {} else { fresh.memory.copy(from: block.memory) }
            other.files[name] = fresh
        }
        return other
    }
    func memory(_ name: ReplicaFile) -> RawMemory {
        guard let block = files[name] else { preconditionFailure("\(name) was not created") }
        return block.memory
    }

    func read(_ file: ReplicaFile, offset: UInt64, into memory: RawMemory) throws(StorageError)
        -> Int
    {
        let source = self.memory(file)
        guard offset < UInt64(source.count) else { return 0 }
        let length = min(memory.count, source.count - Int(offset))
        memory.copy(from: source.slice(Int(offset), length))
        return length
    }
    func write(_ file: ReplicaFile, offset: UInt64, from memory: RawMemory) throws(StorageError) {
        self.memory(file).copy(from: memory, at: Int(offset))
    }
    func sync(_ file: ReplicaFile) throws(StorageError) {}
    func size(_ file: ReplicaFile) throws(StorageError) -> UInt64 {
        guard let block = files[file] else { throw StorageError(.notFound, "\(file)") }
        return UInt64(block.memory.count)
    }
    func create(_ file: ReplicaFile, size: UInt64) throws(StorageError) {
        files[file] = MemoryBlock(count: Int(size))
    }
    /// No larger than a fuzzer's memory.
    func extend(_ file: ReplicaFile, size: UInt64) throws(StorageError) {
        let old = memory(file)
        guard old.count < size else { return }
        guard size <= 64 << 20 else { throw StorageError(.io(errno: 27), "\(file): too large") }
        let longer = MemoryBlock(count: Int(size))
        longer.memory.copy(from: old, at: 0)
        files[file] = longer
    }
    func syncDirectories() throws(StorageError) {}
    func nextAllocated(_ file: ReplicaFile, from offset: UInt64) throws(StorageError) -> Range<
        UInt64
    >? {
        let count = UInt64(memory(file).count)
        return offset < count ? offset..<count : nil
    }
    func mapLog(size: Int) throws(StorageError) -> RawMemory { memory(.log) }
}

/// A core that is sent nonsense, and whose disk does at once what it is asked.
final class FuzzHost {
    private let files = FuzzFiles()
    private let pool = BufferPool(limits: .init(small: 512, medium: 64, large: 8))
    private let core: ReplicaCore
    private let table = MemoryBlock(count: FrameHeader.recordTableLengthMax)
    private var now = Instant(rawValue: 1)
    private var isConnected = Array(repeating: false, count: 3)
    private(set) var answered = 0
    private(set) var refused = 0

    init(_ identity: ReplicaIdentity) {
        do throws(StorageError) {
            try ReplicaCore.create(
                storage: files, identity: identity, logCapacity: ActivityLog.capacityMin)
            core = try ReplicaCore(
                opening: files,
                options: ReplicaOptions(
                    instance: InstanceID(rawValue: 1), tableCachePagesMax: 68,
                    activeRegionsMax: 2),
                pool: pool)
        } catch { preconditionFailure(error.message) }
    }

    /// One frame on one of three connections, with what its kind needs, more or less.
    func feed(_ random: RandomSource, _ frame: FrameHeader) {
        let connection = random.below(isConnected.count)
        if !isConnected[connection] || random.permille(3) { greet(random, connection) }
        var header = frame
        var buffer = BufferID.none
        if header.kind == .write || random.permille(5) {
            (header, buffer) = payload(random, header)
        } else if random.permille(50) {
            header.tableLength = UInt32(random.below(2048))
        }
        send(connection, header, buffer)
        if random.permille(100) {
            now = now.adding(milliseconds: UInt64(random.below(20_000)))
            step(.tick)
        }
    }

    private func payload(_ random: RandomSource, _ frame: FrameHeader) -> (FrameHeader, BufferID) {
        var header = frame
        let length = random.permille(900) ? Int(header.length & ~4095) : random.below(5) * 4096
        guard length > 0, length <= 16_384, let buffer = pool.allocate(length) else {
            return (header, .none)
        }
        for block in 0..<length / 4096 {
            let bytes = pool.memory(buffer).slice(block * 4096, 4096)
            bytes.store(random.next(), 0)
            table.memory.store(CRC32C.checksum(bytes), block * 4)
        }
        header.dataLength = UInt32(length)
        header.tableLength = UInt32(length / 1024)
        if random.permille(50) { table.memory[0] ^= 1 }
        return (header, buffer)
    }

    private func greet(_ random: RandomSource, _ connection: Int) {
        if isConnected[connection] { step(.disconnected(connection: connection)) }
        step(.connected(connection: connection))
        isConnected[connection] = true
        let engine = InstanceID(rawValue: UInt64(connection + 1))
        sendControl(
            connection, .hello,
            HelloRequest(volume: core.identity.volume, engine: engine).encoded())
        var record = VolumeRecord(
            volume: core.identity.volume, name: "volume", epoch: Epoch(1), nonce: 1,
            size: core.identity.size, inSync: [core.identity.member])
        record.engine = engine
        let request = InstallRequest(engine: engine, record: record).encoded()
        sendControl(connection, .install, request)
        let copy = MemoryBlock(count: request.count)
        copy.memory.copy(from: request)
        ReplicaFuzzer.mutate(copy.memory, random)
        sendControl(connection, .install, copy.memory.bytes())
    }

    private func sendControl(_ connection: Int, _ kind: FrameKind, _ bytes: [UInt8]) {
        var header = FrameHeader(kind: kind)
        header.tableLength = UInt32(bytes.count)
        table.memory.copy(from: bytes)
        send(connection, header, .none)
    }

    private func send(_ connection: Int, _ header: FrameHeader, _ buffer: BufferID) {
        guard isConnected[connection], core.canAccept else {
            if buffer != .none { pool.release(buffer) }
            return
        }
        step(
            .frame(
                connection: connection, header,
                table: table.memory.slice(0, Int(header.tableLength)), buffer: buffer))
    }

    private func step(_ event: ReplicaEvent) {
        core.step(event, now: now)
        while let action = core.actions.popFirst() { perform(action) }
    }

    private func perform(_ action: ReplicaAction) {
        switch action {
        case .read(let file, let offset, let length, let buffer, let at, let token):
            let source = files.memory(file).slice(Int(offset), length)
            pool.memory(buffer).copy(from: source, at: at)
            step(.disk(token: token, result: length))
        case .write(let file, let offset, let length, let buffer, let at, let token):
            files.memory(file).copy(from: pool.memory(buffer).slice(at, length), at: Int(offset))
            step(.disk(token: token, result: length))
        case .create(let layer, let size, let token):
            do throws(StorageError) {
                try files.createLayer(layer, size: size)
            } catch { preconditionFailure(error.message) }
            step(.disk(token: token, result: 0))
        case .extend(let layer, let size, let token):
            do throws(StorageError) {
                try files.extendLayer(layer, size: size)
                step(.disk(token: token, result: 0))
            } catch { step(.disk(token: token, result: error.result)) }
        case .remove(_, let token), .sync(_, let token): step(.disk(token: token, result: 0))
        case .punch(let file, let offset, let length, let token):
            files.memory(file).slice(Int(offset), Int(length)).fill()
            step(.disk(token: token, result: 0))
        case .reply(_, let header, let tableBuffer, let buffer, _):
            if header.status == .ok { answered += 1 } else { refused += 1 }
            if tableBuffer != .none { pool.release(tableBuffer) }
            if buffer != .none { pool.release(buffer) }
        case .close(let connection):
            guard isConnected[connection] else { return }
            isConnected[connection] = false
            step(.disconnected(connection: connection))
        case .note: break
        case .failed(let reason): preconditionFailure("good files, and yet: \(reason)")
        }
    }

    /// Everybody leaves: nothing may be left behind.
    func finish() {
        for connection in isConnected.indices where isConnected[connection] {
            isConnected[connection] = false
            step(.disconnected(connection: connection))
        }
        core.beginShutdown(now: now)
        for _ in 0..<4 {
            now = now.adding(milliseconds: 100)
            step(.tick)
        }
        precondition(core.isShutDown, "does not shut down")
        precondition(pool.inUse == 0, "buffers were not given back")
    }
}
