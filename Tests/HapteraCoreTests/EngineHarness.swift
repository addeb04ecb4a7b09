@testable import HapteraCore

/// A replica made of dictionaries: answers as a real one would, at once, unless told to misbehave.
final class FakeReplica {
    typealias Blocks = [UInt64: (entry: BlockEntry, data: [UInt8])]
    let member: VolumeRecord.Member
    var size: UInt64
    /// What it has been asked to make room for.
    var room: UInt64 = 0
    /// What each layer of its chain holds itself.
    var layers: [LayerID: Blocks] = [LayerID(rawValue: 1): [:]]
    var tree = LayerTree()
    /// With so many it takes no more, and says so.
    var layersMax = Int.max
    /// Of the head.
    var blocks: Blocks {
        get { layers[head] ?? [:] }
        set { layers[head] = newValue }
    }
    var head: LayerID { layers.keys.max() ?? .head }
    /// What deleted layers held is their heirs'.
    func merge(into record: VolumeRecord) {
        let chain = record.layers
        tree = record.tree
        for layer in layers.keys.sorted().reversed() where !chain.contains(layer) {
            let held = layers.removeValue(forKey: layer) ?? [:]
            guard let heir = tree.heir(of: layer, in: chain) else { continue }
            layers[heir, default: [:]].merge(held) { own, lower in
                own.entry.state == .absent ? lower : own
            }
        }
    }
    var promise = Epoch.zero
    var installed: VolumeRecord?
    var isUp = true
    var isRebooted = false
    var process: UInt64 = 7
    /// Its activity log: regions of the lowest layer, and of others.
    var active: [UInt64] = []
    var activeAbove: [LayerRegion] = []
    /// What it flushed last, and what it was told everybody holds a mark of.
    var flushed = StablePoint.zero
    var stable = StablePoint.zero
    var leaseRemaining: UInt32 = 0
    /// Reads and writes are answered so much later.
    var delayMilliseconds: UInt64 = 0
    /// By region; in maps what is not here counts as written just now.
    var births: [UInt64: UInt64] = [:]
    /// Requests of these kinds get no answer (they are applied).
    var mute: Set<UInt16> = []
    /// Answer these kinds with an error instead.
    var errors: [UInt16: FrameStatus] = [:]
    /// Blocks whose bytes cannot be kept.
    var unreadable: Set<UInt64> = []
    /// It answers a read of a damaged block with an error.
    var verifies = false
    /// It answers for one layer at a time when it is asked to verify.
    var verifiesByLayer = false
    /// Regions that a stable point leaves out.
    var leftOut: [UInt64] = []
    /// Their answers, kept back.
    var muted: [FrameHeader] = []
    /// What it is sent waits in `unheard`.
    var isDeaf = false
    var unheard: [(header: FrameHeader, table: [UInt8], data: [UInt8])] = []
    /// Kinds received, in order.
    var seen: [FrameKind] = []
    /// The same with their headers, but for what has none of interest.
    var heard: [FrameHeader] = []

    init(_ id: UInt64, size: UInt64) {
        member = VolumeRecord.Member(
            replica: ReplicaID(rawValue: id), incarnation: Incarnation(rawValue: id * 10))
        self.size = size
    }

    func entry(_ block: UInt64) -> BlockEntry { blocks[block]?.entry ?? .absent }
    /// Of the lowest layer, as copies are compared: below it everything reads zero.
    func lowestEntry(_ block: UInt64) -> BlockEntry {
        let entry = entry(block)
        return entry.state == .absent ? BlockEntry(state: .zero) : entry
    }
    /// What a request means by a layer.
    func named(_ layer: LayerID) -> LayerID { layer == .head ? head : layer }
    /// The block as that layer holds it, or as it is seen from there.
    func block(_ block: UInt64, in layer: LayerID, isMerged: Bool) -> Blocks.Value {
        let own = layers[layer]?[block] ?? (BlockEntry(state: .absent), [])
        guard isMerged, own.entry.state == .absent,
            let below = layers.keys.filter({ $0 < layer && tree.isSeen($0, from: layer) }).max()
        else { return own }
        return self.block(block, in: below, isMerged: true)
    }
    func put(_ block: UInt64, _ bytes: [UInt8], in layer: LayerID) {
        layers[layer, default: [:]][block] = (
            BlockEntry(state: .data, checksum: checksum(of: bytes)), bytes
        )
    }
}

/// One engine core, fake replicas and a store, run to a standstill after every event.
final class EngineHarness {
    static let size: UInt64 = 4 << 20
    let pool = BufferPool(limits: .init(small: 128, medium: 8, large: 12))
    let core: EngineCore
    let fakes: [FakeReplica]
    var stored: VolumeRecord
    var now = Instant(rawValue: 1_000_000_000)
    /// Lost: the store takes the change, but its answer does not arrive.
    var losesStoreReplies = false
    var isStoreDown = false
    /// Replicas that are up come back when the engine has disconnected them.
    var reconnects = false
    /// What the store refuses, whether it stands already or not.
    var refuses: (VolumeRecord) -> Bool = { _ in false }
    var results: [UInt64: OperationResult] = [:]
    var reads: [UInt64: [UInt8]] = [:]
    var notes: [EngineNote] = []
    var released: [UInt64: Bool] = [:]
    var snapshots: [UInt64: (layer: LayerID, result: SnapshotResult)] = [:]
    var deletions: [UInt64: DeletionResult] = [:]
    var resizes: [UInt64: (result: ResizeResult, by: ReplicaSlot)] = [:]
    private var events: [EngineEvent] = []
    private var operations: [UInt64: Operation] = [:]
    private var late:
        [(at: Instant, slot: ReplicaSlot, header: FrameHeader, table: [UInt8], data: [UInt8])] = []
    private var nextUserData: UInt64 = 0

    init(
        replicas: Int = 3, members: Int? = nil, generation: UInt64 = 1,
        configure: (inout EngineConfiguration) -> Void = { _ in }
    ) {
        fakes = (0..<replicas).map { FakeReplica(UInt64($0 + 1), size: Self.size) }
        let volume = VolumeID(high: 1, low: 2)
        stored = VolumeRecord(
            volume: volume, name: "test", epoch: Epoch(1), nonce: 1, size: Self.size,
            inSync: fakes.prefix(members ?? replicas).map(\.member))
        var configuration = EngineConfiguration(
            volume: volume, instance: InstanceID(rawValue: 99), endpoint: "",
            clientGeneration: generation, nonceSeed: 5)
        configuration.jobsMax = 4
        configure(&configuration)
        core = EngineCore(configuration: configuration, pool: pool)
        run(.configure(fakes.map(\.member.replica)))
    }

    func start() {
        run(.start)
        for fake in fakes where fake.isUp { connect(fake) }
    }
    func slot(_ fake: FakeReplica) -> ReplicaSlot {
        core.slot(of: fake.member.replica) ?? -1
    }
    func connect(_ fake: FakeReplica) {
        fake.isUp = true
        run(.connected(slot(fake)))
    }
    func kill(_ fake: FakeReplica) {
        fake.isUp = false
        run(.disconnected(slot(fake)))
    }
    func pass(milliseconds: UInt64) {
        for _ in 0..<(milliseconds / 100) {
            now = now.adding(milliseconds: 100)
            let due = late.filter { $0.at <= now }
            late.removeAll { $0.at <= now }
            for reply in due {
                receive(reply.slot, reply.header, reply.table, reply.data)
            }
            run(.tick)
        }
    }
    func run(_ event: EngineEvent) {
        events.append(event)
        while !events.isEmpty {
            core.step(events.removeFirst(), now: now)
            while let action = core.actions.popFirst() { perform(action) }
        }
    }

    @discardableResult
    func write(_ offset: UInt64, _ bytes: [UInt8]) -> UInt64 {
        let position = Int(offset % 4096)
        guard let buffer = pool.allocate((position + bytes.count + 4095) / 4096 * 4096) else {
            preconditionFailure("pool")
        }
        pool.memory(buffer).copy(from: bytes, at: position)
        return submit(.write, offset, bytes.count, buffer)
    }
    @discardableResult
    func read(
        _ offset: UInt64, _ count: Int, session: UInt32 = 0, layer: LayerID = .head
    ) -> UInt64 {
        guard let buffer = pool.allocate((Int(offset % 4096) + count + 4095) / 4096 * 4096) else {
            preconditionFailure("pool")
        }
        return submit(.read, offset, count, buffer, session: session, layer: layer)
    }
    @discardableResult
    func submit(
        _ kind: OperationKind, _ offset: UInt64 = 0, _ length: Int = 0, _ buffer: BufferID = .none,
        flags: OperationFlags = [], session: UInt32 = 0, layer: LayerID = .head,
        base: LayerID = .head
    ) -> UInt64 {
        nextUserData += 1
        var operation = Operation(
            kind: kind, flags: flags, offset: offset, length: length, buffer: buffer,
            userData: nextUserData)
        operation.session = session
        operation.layer = layer
        operation.base = base
        operations[nextUserData] = operation
        run(.submit(operation))
        return nextUserData
    }

    private func perform(_ action: EngineAction) {
        switch action {
        case .send(let slot, let header, let tableOf, let buffer, let bufferOffset):
            let table =
                tableOf >= 0
                ? core.table(tableOf).slice(0, Int(header.tableLength)).bytes() : []
            let data =
                buffer == .none
                ? [] : pool.memory(buffer).slice(Int(bufferOffset), Int(header.dataLength)).bytes()
            deliver(slot, header, table, data)
        case .sendControl(let slot, let header):
            deliver(slot, header, core.controlPayload, [])
        case .disconnect(let slot):
            events.append(.disconnected(slot))
            if reconnects, fakes.contains(where: { $0.isUp && self.slot($0) == slot }) {
                events.append(.connected(slot))
            }
        case .complete(let userData, let result, let buffer, _, _):
            precondition(results[userData] == nil, "answered twice")
            results[userData] = result
            guard buffer != .none, let operation = operations[userData] else { return }
            if operation.kind == .read, result == .ok {
                reads[userData] = pool.memory(buffer)
                    .slice(Int(operation.offset % 4096), operation.length).bytes()
            }
            pool.release(buffer)
        case .snapshotTaken(let token, let layer, let result):
            snapshots[token] = (layer, result)
        case .released(let token, let wasHeld): released[token] = wasHeld
        case .snapshotDeleted(let token, let result): deletions[token] = result
        case .resized(let token, let result, let slot): resizes[token] = (result, slot)
        case .sizeChanged: break
        case .storeGet: events.append(.store(isStoreDown ? .unavailable : .record(stored)))
        case .storeCompareAndSwap(let expected): swap(expected)
        case .note(let note): notes.append(note)
        case .serving, .stopped: break
        }
    }

    private func swap(_ expected: Epoch) {
        guard !isStoreDown else { return events.append(.store(.unavailable)) }
        guard !refuses(core.proposedRecord) else {
            return events.append(.store(.refused("as the test wants")))
        }
        let matches = stored.epoch == expected
        if matches { stored = core.proposedRecord }
        if losesStoreReplies {
            events.append(.store(.unavailable))
        } else {
            events.append(.store(matches ? .record(stored) : .conflict(stored)))
        }
    }

    // MARK: - The replicas' side

    private func deliver(
        _ slot: ReplicaSlot, _ header: FrameHeader, _ table: [UInt8], _ data: [UInt8]
    ) {
        guard let fake = fakes.first(where: { self.slot($0) == slot }), fake.isUp else { return }
        guard !fake.isDeaf else { return fake.unheard.append((header, table, data)) }
        fake.seen.append(header.kind)
        fake.heard.append(header)
        var reply = header.reply(.ok, epoch: fake.promise)
        var replyTable: [UInt8] = []
        var replyData: [UInt8] = []
        if header.kind != .hello, header.kind != .install, header.epoch != fake.promise {
            reply.status = .staleEpoch
        } else if let error = fake.errors[header.kind.rawValue] {
            reply.status = error
        } else {
            answer(fake, header, table, data, &reply, &replyTable, &replyData)
        }
        if header.kind == .stable { return }
        if fake.mute.contains(header.kind.rawValue) { return fake.muted.append(reply) }
        reply.tableLength = UInt32(replyTable.count)
        reply.dataLength = UInt32(replyData.count)
        if fake.delayMilliseconds > 0, header.kind == .write || header.kind == .read {
            let at = now.adding(milliseconds: fake.delayMilliseconds)
            late.append((at, slot, reply, replyTable, replyData))
        } else {
            receive(slot, reply, replyTable, replyData)
        }
    }

    /// Lets a deaf replica hear what waits, from the given frame on.
    func hear(_ fake: FakeReplica, from first: Int) {
        let frames = fake.unheard[first...]
        fake.unheard = []
        fake.isDeaf = false
        for frame in frames { deliver(slot(fake), frame.header, frame.table, frame.data) }
        run(.tick)
    }
    /// Lets it say what it kept back.
    func answerMuted(_ fake: FakeReplica) {
        let replies = fake.muted
        fake.muted = []
        for reply in replies { receive(slot(fake), reply, [], []) }
        run(.tick)
    }
    func refuse(
        _ fake: FakeReplica, _ header: FrameHeader, _ status: FrameStatus, epoch: Epoch? = nil
    ) {
        receive(slot(fake), header.reply(status, epoch: epoch ?? fake.promise), [], [])
        run(.tick)
    }

    private func receive(
        _ slot: ReplicaSlot, _ reply: FrameHeader, _ table: [UInt8], _ data: [UInt8]
    ) {
        let tableBlock = MemoryBlock(count: max(table.count, 1))
        tableBlock.memory.copy(from: table)
        if !data.isEmpty, let target = core.readTarget(reply, from: slot) {
            pool.memory(target.buffer).copy(from: data, at: target.offset)
        }
        core.step(
            .frame(
                slot, reply, table: tableBlock.memory.slice(0, table.count),
                data: tableBlock.memory.slice(0, 0)), now: now)
    }

    private func answer(
        _ fake: FakeReplica, _ header: FrameHeader, _ table: [UInt8], _ data: [UInt8],
        _ reply: inout FrameHeader, _ replyTable: inout [UInt8], _ replyData: inout [UInt8]
    ) {
        let first = header.offset / 4096
        let count = UInt64(header.length) / 4096
        let layer = fake.named(header.layer)
        defer { if fake.layers.count >= fake.layersMax { reply.flags |= FrameFlags.layersFull } }
        switch header.kind {
        case .hello:
            replyTable = HelloReply(
                member: fake.member, instance: InstanceID(rawValue: fake.process),
                promise: fake.promise,
                size: fake.size, installed: fake.installed
            ).encoded()
        case .install:
            guard let request = InstallRequest(decoding: table) else { return }
            let added = request.record.layers.count { fake.layers[$0] == nil }
            guard added == 0 || fake.layers.count + added <= fake.layersMax else {
                reply.status = .noSpace
                return
            }
            for layer in request.record.layers where fake.layers[layer] == nil {
                fake.layers[layer] = [:]
            }
            fake.merge(into: request.record)
            let before = fake.promise
            fake.promise = request.record.epoch
            fake.size = request.record.size
            reply.epoch = fake.promise
            replyTable = InstallReply(
                instance: InstanceID(rawValue: fake.process), isRebooted: fake.isRebooted,
                flushed: fake.flushed,
                stablePoint: fake.stable, promiseBefore: before,
                leaseRemainingMilliseconds: fake.leaseRemaining,
                activeRegions: fake.active.map { LayerRegion(LayerID(rawValue: 1), $0) }
                    + fake.activeAbove
            ).encoded()
        case .write:
            for index in 0..<count {
                let bytes = [UInt8](data[Int(index) * 4096..<Int(index + 1) * 4096])
                fake.put(first + index, bytes, in: layer)
            }
        case .setState:
            let state = BlockState(rawValue: UInt8(header.auxiliary)) ?? .absent
            for index in first..<first + count {
                fake.layers[layer, default: [:]][index] = (BlockEntry(state: state), [])
            }
        case .flush:
            fake.flushed = StablePoint(epoch: header.epoch, sequence: header.sequence)
        case .stable where header.length > 0: fake.leftOut.append(header.offset >> 20)
        case .stable:
            fake.stable = StablePoint(
                epoch: Epoch(header.offset), sequence: SequenceNumber(header.tag))
        case .read: reply.status = answerChecked(fake, header, &replyTable, &replyData)
        case .prepareSize: fake.room = header.offset
        case .status: replyTable = Self.allData(header.length)
        case .digest: replyTable = digest(fake, first, count, layer)
        case .adopt:
            let blocks = first..<first + count
            reply.status = fake.adopt(header, blocks, in: layer)
            guard header.auxiliary == 0, reply.status == .ok else { return }
            answerRead(fake, header, &replyTable, &replyData)
        case .verify: replyTable = verification(fake, first, count, layer)
        case .regionMap: replyTable = regionMap(fake, header)
        default: break
        }
    }

    private func regionMap(_ fake: FakeReplica, _ header: FrameHeader) -> [UInt8] {
        var map = [UInt8](repeating: 0, count: (Int(header.length) + 7) / 8)
        for block in fake.layers.values.flatMap(\.keys)
        where header.auxiliary <= fake.births[block / 256] ?? .max {
            map[Int(block / 256 / 8)] |= 1 << (block / 256 % 8)
        }
        return map
    }
    private static func allData(_ length: UInt32) -> [UInt8] {
        var writer = ByteWriter()
        writer.append(UInt64(length))
        writer.append(UInt64(BlockState.data.rawValue))
        return writer.bytes
    }
    private func answerRead(
        _ fake: FakeReplica, _ header: FrameHeader, _ table: inout [UInt8], _ data: inout [UInt8]
    ) {
        let first = header.offset / 4096
        let layer = fake.named(header.layer)
        let isMerged = header.flags & FrameFlags.resync == 0
        var hasData = false
        for index in first..<first + UInt64(header.length) / 4096 {
            let (entry, bytes) = fake.block(index, in: layer, isMerged: isMerged)
            var writer = ByteWriter()
            writer.append(UInt64(entry.state.rawValue) | UInt64(entry.checksum) << 32)
            table += writer.bytes
            if entry.state == .data { hasData = true }
            data += entry.state == .data ? bytes : [UInt8](repeating: 0, count: 4096)
        }
        if !hasData { data = [] }
    }
    private func answerChecked(
        _ fake: FakeReplica, _ header: FrameHeader, _ table: inout [UInt8], _ data: inout [UInt8]
    ) -> FrameStatus {
        answerRead(fake, header, &table, &data)
        let first = header.offset / 4096
        let isRead = fake.unreadable.isDisjoint(
            with: first..<first + UInt64(header.length) / 4096)
        // As a replica that verifies what it reads.
        if isRead, !fake.verifies || isIntact(table, data) { return .ok }
        data = []
        return isRead ? .checksumMismatch : .ioError
    }
    private func isIntact(_ table: [UInt8], _ data: [UInt8]) -> Bool {
        let memory = MemoryBlock(count: table.count)
        memory.memory.copy(from: table)
        return (0..<data.count / 4096).allSatisfy { block in
            let entry = BlockEntry(decoding: memory.memory, at: block * BlockEntry.size)
            return entry?.state != .data
                || entry?.checksum == checksum(of: [UInt8](data[block * 4096..<(block + 1) * 4096]))
        }
    }

    private func digest(
        _ fake: FakeReplica, _ first: UInt64, _ count: UInt64, _ layer: LayerID
    ) -> [UInt8] {
        let block = MemoryBlock(count: RegionDigest.size)
        block.memory.store(fake.births[first / 256] ?? 0, 0)
        for index in 0..<count {
            let (entry, data) = fake.block(first + index, in: layer, isMerged: false)
            let isRead = !fake.unreadable.contains(first + index)
            let isDoubtful =
                entry.state == .data && (!isRead || checksum(of: data) != entry.checksum)
            let low = isRead ? UInt64(data.reduce(0) { ($0 &* 31) &+ UInt64($1) }) : 0
            RegionDigest.encode(
                .init(
                    entry: entry, isDoubtful: isDoubtful, hashLow: low, hashHigh: isRead ? 1 : 0),
                index: Int(index), to: block.memory)
        }
        return block.memory.bytes()
    }
}

extension EngineHarness {
    /// A volume with a chain of three layers, two of them snapshots, "a" and "b".
    static func layered(members: Int = 3) -> EngineHarness {
        let h = EngineHarness(members: members)
        let layers = (1...3).map { LayerID(rawValue: $0) }
        h.stored.layers = layers
        h.stored.snapshots = [
            .init(layer: layers[0], name: "a", created: 1),
            .init(layer: layers[1], name: "b", created: 2),
        ]
        for fake in h.fakes.prefix(members) {
            fake.layers = [layers[0]: [:], layers[1]: [:], layers[2]: [:]]
        }
        return h
    }
}
