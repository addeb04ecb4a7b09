import HapteraCore

/// One engine process: the real core, and the part of its shell that the simulator plays.
final class SimulatedEngine {
    let index: Int
    let instance: InstanceID
    let generation: UInt64
    let core: EngineCore
    let pool: BufferPool
    var connections: [SimulatedNetwork.Connection?]
    private(set) var isAlive = true
    /// The process is stopped (SIGSTOP) until then, nanoseconds.
    var pausedUntil: UInt64 = 0
    var isServing = false { didSet { if isServing && !oldValue { servings += 1 } } }
    /// How often it has begun to serve.
    private(set) var servings = 0
    var hasServed = false
    /// Of its core, when the step under way began.
    var unresolvedBefore: Set<UInt64> = []
    /// The nonce of the change it asked for last.
    var proposedNonce: UInt64 = 0
    /// That change, until its outcome is known.
    var proposal: VolumeRecord?
    /// Of its core, as last looked at.
    var isCopying = false
    var regionsCopied: UInt64 = 0
    /// It took the volume over for clients that remember nothing.
    var servesNewClients = false
    /// Guards against handing requests over from within a hand-over.
    var isSubmitting = false
    /// A request handed to the core, in the order of handing over: the core's `userData` is the
    /// place in this list.
    struct Attempt {
        var operation: ClientOperation
        var session: UInt32
        var completions = 0
        /// It reads since that time of serving.
        var readsSince = 0
    }
    var attempts: [Attempt] = []
    /// The clients' connection; requests of an earlier one have nobody to answer to.
    var session: UInt32 = 1
    /// The connection is broken and there is no new one yet.
    var isSessionDead = false
    /// Requests of earlier sessions that the core still has.
    var leftovers = 0
    /// Requests the core or the pool had no room for yet, in order.
    var unsent: [ClientOperation] = []
    /// On their way on a broken connection.
    var late: [ClientOperation] = []
    let clock: SimulatedClock

    init(
        index: Int, volume: VolumeID, generation: UInt64, random: RandomSource,
        mutations: MutationSet, rulesOff: MutationSet, leases: SimulatedLeases,
        detectsZeroes: Bool
    ) {
        self.index = index
        self.generation = generation
        clock = SimulatedClock(random: random)
        instance = InstanceID(rawValue: random.next() | 1)
        pool = BufferPool(limits: .init(small: 96, medium: 16, large: 12))
        var configuration = EngineConfiguration(
            volume: volume, instance: instance, endpoint: "engine-\(index)",
            clientGeneration: generation, nonceSeed: random.next(),
            removalDeadlineMilliseconds: leases.removalMilliseconds)
        configuration.leaseMilliseconds = leases.milliseconds
        configuration.renewMilliseconds = UInt64(leases.milliseconds) / 3
        configuration.ioTimeoutMilliseconds = leases.ioTimeoutMilliseconds
        configuration.minInSync = leases.minInSync
        configuration.detectsZeroes = detectsZeroes
        // Few, so that some regions are equal and others not for a while.
        configuration.jobsMax = mutations.isDisjoint(with: .rulesOfSlowFilling) ? 4 : 1
        core = EngineCore(configuration: configuration, pool: pool)
        core.mutations = rulesOff
        connections = Array(repeating: nil, count: Geometry.replicaSlotsMax)
    }

    /// It waits for no change of the record.
    var isSettled: Bool { proposal.map { $0.epoch <= core.epoch } ?? true }
    var isRunning: Bool { isAlive && core.phase != .stopped }
    func kill() { isAlive = false }
    var name: String { "engine-\(index)" }
}

/// How long engines rely on replicas. Nothing may rest on a lease being shorter than the deadline:
/// where it is longer, replicas that were not reached are removed while leases are out.
struct SimulatedLeases {
    let milliseconds: UInt32
    let removalMilliseconds: UInt64
    /// Of client requests; 0: held for ever.
    let ioTimeoutMilliseconds: UInt64
    /// Members without whom nothing is acknowledged.
    let minInSync: UInt8

    /// With rot about, a member that only pauses must not be removed: it may have the good copy.
    init(
        random: RandomSource, replicas: Int, sparesPausedMembers: Bool, mutations: MutationSet
    ) {
        let drawn: (UInt32, UInt64) = random.pick([
            (500, 3000), (500, 3000), (500, 500), (2500, 3000), (3000, 800),
        ])
        let isJudged = !mutations.isDisjoint(with: FaultPlan.leaseRules)
        (milliseconds, removalMilliseconds) =
            isJudged ? (3000, 800) : sparesPausedMembers ? (500, 3000) : drawn
        let timesOut = random.permille(200) || mutations.contains(.erroredWriteNotResolved)
        ioTimeoutMilliseconds = timesOut ? random.pick([100, 700, 4000]) : 0
        minInSync = random.permille(250) ? UInt8(min(2, replicas)) : 1
    }
}

extension World {
    /// Starts an engine process that takes the volume over and becomes the clients' engine.
    func startEngine(generation: UInt64) {
        let engine = SimulatedEngine(
            index: engines.count, volume: volume, generation: generation, random: random,
            mutations: options.mutations, rulesOff: options.rulesOff, leases: leases,
            detectsZeroes: detectsZeroes)
        engines.append(engine)
        currentEngine = engine.index
        note("\(engine.name) starts, client generation \(generation)")
        step(engine, .configure(hosts.map(\.id)))
        step(engine, .start)
        for host in hosts {
            guard let slot = engine.core.slot(of: host.id) else { continue }
            timeline.schedule(
                after: random.delay(microseconds: 100, 20_000),
                .connect(engine: engine.index, slot: slot))
        }
        timeline.schedule(
            after: milliseconds(random.below(100)), .engineTick(engine.index))
    }

    func killEngine(_ engine: SimulatedEngine) {
        guard engine.isAlive else { return }
        note("\(engine.name) is killed")
        engine.kill()
        engine.isServing = false
        closeAll(engine)
    }
    private func closeAll(_ engine: SimulatedEngine) {
        for connection in engine.connections {
            if let connection { network.closeFromEngine(connection) }
        }
        engine.connections = Array(repeating: nil, count: Geometry.replicaSlotsMax)
    }

    /// Feeds the core one event and performs what it asks for.
    func step(_ engine: SimulatedEngine, _ event: EngineEvent) {
        guard engine.isAlive else { return }
        engine.unresolvedBefore = engine.core.unresolvedRegions
        engine.core.step(event, now: timeline.instant(engine.clock))
        while let action = engine.core.actions.popFirst() { perform(action, engine) }
        observeJoin(engine)
        submitUnsent(engine)
    }

    private func perform(_ action: EngineAction, _ engine: SimulatedEngine) {
        switch action {
        case .send(let slot, let header, let table, let buffer, let offset):
            guard let connection = engine.connections[slot] else { return }
            let data =
                header.dataLength > 0
                ? engine.pool.memory(buffer).slice(Int(offset), Int(header.dataLength)) : nil
            let bytes =
                header.tableLength > 0
                ? engine.core.table(table).slice(0, Int(header.tableLength)) : nil
            observeRequest(engine, connection, header)
            network.send(connection, toReplica: true, header: header, table: bytes, data: data)
        case .sendControl(let slot, let header):
            guard let connection = engine.connections[slot] else { return }
            let payload = engine.core.controlPayload
            let block = MemoryBlock(count: max(1, payload.count))
            block.memory.copy(from: payload)
            network.send(
                connection, toReplica: true, header: header,
                table: block.memory.slice(0, payload.count), data: nil)
        case .disconnect(let slot):
            guard let connection = engine.connections[slot] else { return }
            trace("\(engine.name) disconnects \(hosts[connection.replica].name)")
            engine.connections[slot] = nil
            network.closeFromEngine(connection)
            timeline.schedule(
                after: milliseconds(random.between(10, 500)),
                .connect(engine: engine.index, slot: slot))
            pendingDisconnects.append((engine, slot))
        case .complete(let userData, let result, let buffer, let tableLength, let isHole):
            completed(
                engine, Int(userData), result, buffer: buffer, tableLength: Int(tableLength),
                isHole: isHole)
        case .snapshotTaken(let token, let layer, let result):
            snapshotTaken(engine, token, layer, result)
        case .released(let token, let wasHeld): released(engine, token, wasHeld)
        case .snapshotDeleted(let token, let result): snapshotDeleted(engine, token, result)
        case .resized(let token, let result, _): resized(engine, token, result)
        case .sizeChanged: break
        case .storeGet:
            store.get(engine: engine.index)
        case .storeCompareAndSwap(let expected):
            observeProposal(engine)
            store.compareAndSwap(
                engine: engine.index, expected: expected, record: engine.core.proposedRecord)
        case .note(let note):
            self.note("\(engine.name): \(note)")
            observeNote(engine, note)
        case .serving(let serving):
            self.note("\(engine.name) serving: \(serving)")
            engine.isServing = serving
            if serving { engineServes(engine) }
        case .stopped:
            note("\(engine.name) stopped: \(engine.core.stopReason?.rawValue ?? "")")
            closeAll(engine)
            // Its node starts another one.
            if engine.core.stopReason == .refused, engine.index == currentEngine {
                startEngine(generation: generation)
                attach(to: engines[engines.count - 1])
            }
            if engine.core.stopReason == .recordOlderThanReplica {
                timeline.schedule(after: milliseconds(random.below(500)), .relief(.record))
                // Meanwhile the node starts it again, and again: it must not get through.
                if trueHistory != nil, random.permille(700) { startEngine(generation: generation) }
            }
        }
    }

    /// `disconnected` follows `disconnect` as an event of its own.
    func deliverDisconnects() {
        while !pendingDisconnects.isEmpty {
            let (engine, slot) = pendingDisconnects.removeFirst()
            if engine.connections[slot] == nil { step(engine, .disconnected(slot)) }
        }
    }

    /// A frame or the end of a connection reaches an engine.
    func deliver(
        _ parcel: SimulatedNetwork.Parcel, to engine: SimulatedEngine,
        _ connection: SimulatedNetwork.Connection
    ) {
        let slot = connection.slot
        switch parcel {
        case .opened:
            guard engine.isRunning, engine.connections[slot] == nil else {
                network.closeFromEngine(connection)
                return
            }
            engine.connections[slot] = connection
            step(engine, .connected(slot))
        case .closed:
            guard engine.connections[slot] === connection else { return }
            trace("\(engine.name) loses \(hosts[connection.replica].name)")
            engine.connections[slot] = nil
            network.closeFromEngine(connection)
            timeline.schedule(
                after: milliseconds(random.between(10, 500)),
                .connect(engine: engine.index, slot: slot))
            step(engine, .disconnected(slot))
        case .frame(let bytes):
            guard engine.connections[slot] === connection, engine.isRunning else { return }
            guard let frame = decode(bytes) else {
                return fail("a frame of \(hosts[connection.replica].name) does not parse")
            }
            trace("\(engine.name) <- \(hosts[connection.replica].name) \(describe(frame.header))")
            let empty = frame.table.slice(0, 0)
            if frame.header.dataLength > 0,
                let target = engine.core.readTarget(frame.header, from: slot)
            {
                engine.pool.memory(target.buffer).copy(from: frame.data, at: target.offset)
                step(engine, .frame(slot, frame.header, table: frame.table, data: empty))
            } else {
                step(engine, .frame(slot, frame.header, table: frame.table, data: frame.data))
            }
        }
        deliverDisconnects()
    }

    /// The engine's shell tries to reach a replica, again and again with a pause.
    func connect(_ engine: SimulatedEngine, _ slot: ReplicaSlot) {
        guard engine.isRunning, engine.connections[slot] == nil,
            let host = hosts.first(where: { $0.id == engine.core.replicaID(slot) })
        else { return }
        let isBlocked =
            network.blockedUntil(engine: engine.index, replica: host.index, toReplica: true) > 0
            || network.blockedUntil(engine: engine.index, replica: host.index, toReplica: false)
                > 0
        guard !isBlocked, host.core != nil, let number = host.freeConnection else {
            timeline.schedule(
                after: milliseconds(isBlocked ? 1000 : random.between(50, 500)),
                .connect(engine: engine.index, slot: slot))
            return
        }
        let connection = network.open(
            engine: engine.index, slot: slot, replica: host.index, process: host.process,
            number: number)
        host.connections[number] = connection
        deliver(.connected(connection: number), to: host)
    }

    func decode(_ bytes: [UInt8]) -> (header: FrameHeader, table: RawMemory, data: RawMemory)? {
        let memory = frameBlock.memory
        memory.copy(from: bytes)
        guard let header = try? FrameHeader(decoding: memory),
            bytes.count == FrameHeader.size + header.payloadLength
        else { return nil }
        let table = memory.slice(FrameHeader.size, Int(header.tableLength))
        guard header.tableLength == 0 || CRC32C.checksum(table) == header.tableChecksum else {
            return nil
        }
        let data = memory.slice(
            FrameHeader.size + Int(header.tableLength), Int(header.dataLength))
        return (header, table, data)
    }

    func describe(_ header: FrameHeader) -> String {
        var text = header.isReply ? "\(header.kind) reply \(header.status)" : "\(header.kind)"
        text += " e\(header.epoch.rawValue)"
        if header.sequence != .zero { text += " s\(header.sequence.rawValue)" }
        if header.length > 0 {
            text += " block \(header.offset / 4096)+\(Int(header.length) / 4096)"
        }
        if header.auxiliary != 0 { text += " aux \(header.auxiliary)" }
        if header.flags > 1 { text += " flags \(header.flags)" }
        return text
    }
}
