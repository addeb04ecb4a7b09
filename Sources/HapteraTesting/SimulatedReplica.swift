import HapteraCore

/// One replica's host: its disk, and the real core while its process runs.
final class SimulatedReplica {
    let index: Int
    let id: ReplicaID
    /// Of the copy in its directory: another one after its disk was replaced.
    private(set) var incarnation: Incarnation
    let disk: SimulatedDisk
    private(set) var bootID: UInt64
    /// Another one after every boot.
    private(set) var clock: SimulatedClock
    /// Counts process starts; what belongs to an earlier one is dropped.
    private(set) var process = 0
    private(set) var core: ReplicaCore?
    private(set) var pool: BufferPool?
    var connections: [SimulatedNetwork.Connection?]
    /// The process is stopped (SIGSTOP) until then, nanoseconds.
    private(set) var pausedUntil: UInt64 = 0
    /// Nobody starts it.
    var isAbsent = false
    /// What the process will find when it goes on.
    private var held: [ReplicaEvent] = []
    /// What it held some time ago.
    private(set) var backup: SimulatedDisk.Backup?
    private(set) var backupFlushed = StablePoint.zero
    private(set) var backupPromise = Epoch.zero
    /// A member put back as it was: until it has left, nothing is true of its copy.
    var isRolledBack = false
    /// Of what its files say of the data nothing is certain.
    var rot = FileRot.none
    /// The process that made the last promise seen.
    var installedProcess = -1
    /// The host lost power since its copy was last equal to the others.
    var isLossy = false
    /// The replica says of itself that it may have lost something (`InstallReply.isRebooted`).
    var isMarkedRebooted = false
    /// When the power was last cut, and the process last started; nanoseconds.
    var powerCutAt: UInt64 = 0
    var startedAt: UInt64 = 0
    var installedAt: UInt64 = 0
    /// What the world has seen of the replica's promises.
    var promised = Epoch.zero
    var installed = Epoch.zero
    /// The highest record that any copy of it had installed.
    var installedEver = Epoch.zero
    /// Values of the sectors it acknowledged, ever.
    var applied: Set<ValueID> = []
    /// By operation that zeroes or trims: the blocks it acknowledged, ever.
    var zeroed: [Int: Set<UInt64>] = [:]
    /// Requests that change data, taken in and not answered.
    var requests: [DataRequest] = []
    /// Highest (epoch, sequence) applied per block, for the order of writes.
    var order: [StablePoint]

    /// Births an Install has raised: the epoch by region.
    /// Digests asked for, by tag.
    var digestLayers: [UInt64: LayerID] = [:]
    var restamped: [LayerRegion: Epoch] = [:]
    /// By region, the epoch of the last client's write it answered for.
    var lastWrite: [LayerRegion: Epoch] = [:]
    var dataWriteCount = 0
    /// Blocks that it was told are damaged on the members, too.
    var marked: Set<Int> = []

    struct DataRequest {
        var connection: Int
        var tag: UInt64
        var epoch: Epoch
        var sequence: SequenceNumber
        var layer: LayerID
        var blocks: Range<UInt64>
        var values: [ValueID]
        /// The client's operation, if it zeroes or trims.
        var zeroing: Int?
        /// Made by the engine to make copies equal, not by a client.
        var isCopy: Bool
    }

    /// `disk`: its directory; nil: on a disk of its own.
    init(index: Int, random: RandomSource, blockCount: Int, disk: SimulatedDisk? = nil) {
        self.index = index
        id = ReplicaID(rawValue: random.next() | 1)
        incarnation = Incarnation(rawValue: random.next() | 1)
        self.disk = disk ?? SimulatedDisk(random: random.fork())
        bootID = random.next() | 1
        clock = SimulatedClock(random: random)
        connections = Array(repeating: nil, count: ReplicaLimits.connectionsMax)
        order = Array(repeating: .zero, count: blockCount)
    }

    var name: String { "replica-\(index)" }
    var member: VolumeRecord.Member { .init(replica: id, incarnation: incarnation) }
    var freeConnection: Int? { connections.firstIndex { $0 == nil } }

    /// Whether it has acknowledged all of a write, or of what zeroes.
    func hasApplied(_ operation: ClientOperation) -> Bool {
        guard operation.value == 0 else { return applied.contains(operation.value) }
        let perBlock = Content.sectorsPerBlock
        let blocks = zeroed[operation.id] ?? []
        return operation.sectors.allSatisfy { blocks.contains(UInt64($0 / perBlock)) }
    }
    /// A request that changes the block is under way.
    func isWriting(_ block: Int) -> Bool {
        requests.contains { $0.blocks.contains(UInt64(block)) }
    }
    func started(_ core: ReplicaCore, _ pool: BufferPool) {
        self.core = core
        self.pool = pool
    }
    func nextProcess() { process += 1 }
    func stopped() {
        core = nil
        pool = nil
        process += 1
        requests = []
        pausedUntil = 0
        held = []
        // A region that was on its way into the log, or out of it, may be found outside.
        restamped = [:]
        connections = Array(repeating: nil, count: ReplicaLimits.connectionsMax)
    }
    func rebooted(_ random: RandomSource) {
        bootID = random.next() | 1
        clock = SimulatedClock(random: random)
    }

    func pause(until time: UInt64) { pausedUntil = time }
    func hold(_ event: ReplicaEvent) { held.append(event) }
    func resume() -> [ReplicaEvent] {
        defer { held = [] }
        pausedUntil = 0
        return held
    }
    func takeBackup() {
        backup = disk.backup()
        backupFlushed = core?.flushedPoint ?? .zero
        backupPromise = core?.promise ?? .zero
    }

    /// It was made as a member.
    func began(_ epoch: Epoch) {
        promised = epoch
        installed = epoch
        installedEver = max(installedEver, epoch)
    }

    /// The directory is another one now: nothing seen of the one before is true of it.
    func replaced(incarnation: Incarnation? = nil) {
        if let incarnation {
            self.incarnation = incarnation
            backup = nil
        }
        rot = .none
        promised = .zero
        installed = .zero
        applied = []
        zeroed = [:]
        order = Array(repeating: .zero, count: order.count)
        lastWrite = [:]
        isLossy = true
    }
}

extension VolumeRecord {
    /// Whether the replica is a member with the copy it has now.
    func contains(_ host: SimulatedReplica) -> Bool {
        inSync.contains { $0.replica == host.id && $0.incarnation == host.incarnation }
    }
}

extension World {
    /// Makes the replica's files; a power cut may come in between, then they are made again.
    func createReplica(_ host: SimulatedReplica) {
        let identity = ReplicaIdentity(
            volume: volume, name: "sim", replica: host.id, incarnation: host.incarnation,
            size: store.record.size)
        if faults.cutsDuringOpen { host.disk.callsUntilCut = random.below(24) }
        for _ in 0..<2 {
            do throws(StorageError) {
                try ReplicaCore.create(
                    storage: host.disk, identity: identity, logCapacity: ActivityLog.capacityMin)
                host.disk.callsUntilCut = nil
                return host.rebooted(random)
            } catch {
                guard host.disk.callsUntilCut != nil else {
                    return fail("\(host.name) cannot be created: \(error.message)")
                }
                note("\(host.name) loses power while it is made")
                host.disk.callsUntilCut = nil
                host.disk.cutPower(isAlone: true)
            }
        }
    }

    /// Starts the replica's process when the one before has no disk operation left (its lock is
    /// on the descriptors the kernel still uses).
    func startReplica(_ host: SimulatedReplica) {
        guard host.core == nil, !host.isAbsent else { return }
        guard host.disk.operationsInFlight == 0 else {
            timeline.schedule(after: milliseconds(1), .startReplica(host.index))
            return
        }
        if host.disk.hasFailedSync {
            // The kernel has forgotten which pages are not on the disk: only a restart of the host
            // gives the replica a true view of it.
            loseDirectory(host)
        }
        let pool = BufferPool(limits: .init(small: 192, medium: 24, large: 20))
        if faults.cutsDuringOpen && isChaos && host.rot == .none && random.permille(300) {
            host.disk.callsUntilCut = random.below(60)
        }
        do throws(StorageError) {
            var options = ReplicaOptions(
                instance: InstanceID(rawValue: random.next() | 1),
                bootID: BootID(high: host.bootID, low: 1),
                tableCachePagesMax: workload.activeRegionsMax + 64,
                activeRegionsMax: workload.activeRegionsMax, mutations: options.rulesOff)
            options.layersForViews = depth.layersForViews
            if depth.hasFewViews { options.viewsMax = 2 }
            options.layersMax = depth.layersMax
            options.stayingBlocksMin = depth.stayingBlocksMin
            options.risingPercent = depth.risingPercent
            options.hiddenBlocksMin = depth.hiddenBlocksMin
            let core = try ReplicaCore(opening: host.disk, options: options, pool: pool)
            host.disk.callsUntilCut = nil
            host.started(core, pool)
        } catch {
            guard host.disk.callsUntilCut != nil else {
                note("\(host.name) does not open: \(error.message)")
                guard error.code == .damaged, mayBeReplaced(host) else {
                    return fail("\(host.name) does not open: \(error.message)")
                }
                return replaceDamaged(host)
            }
            host.disk.callsUntilCut = nil
            note("\(host.name) is cut off while opening")
            if random.permille(500) {
                if mayLosePower(host) { cutPower(host) } else { loseDirectory(host) }
            }
            host.nextProcess()
            timeline.schedule(
                after: milliseconds(random.between(10, 500)), .startReplica(host.index))
            return
        }
        host.startedAt = timeline.now
        note("\(host.name) starts")
        step(host, .tick)
        timeline.schedule(
            after: milliseconds(random.below(100)),
            .replicaTick(replica: host.index, process: host.process))
    }

    /// The process ends at once; what it asked of the disk goes on.
    func killReplica(_ host: SimulatedReplica, restartAfter milliseconds: Int?) {
        if host.core != nil {
            for connection in host.connections {
                if let connection { network.closeFromReplica(connection) }
            }
            host.stopped()
        }
        guard let milliseconds else { return }
        timeline.schedule(
            after: UInt64(milliseconds) * 1_000_000, .startReplica(host.index))
    }

    /// The host's power fails, for both volumes if there are two. This one's process must have been
    /// stopped.
    func cutPower(_ host: SimulatedReplica) {
        let other = sibling?.hosts[host.index]
        if let sibling, let other {
            sibling.note("\(other.name) loses power with the other volume's")
            sibling.killReplica(other, restartAfter: sibling.random.between(1, 3000))
        }
        host.disk.cutPower()
        lostPower(host)
        if let sibling, let other {
            sibling.lostPower(other)
            sibling.noteLoss()
        }
    }
    /// As if its power failed, for what the other volume has not got.
    func loseDirectory(_ host: SimulatedReplica) {
        host.disk.cutPower(isAlone: true)
        lostPower(host)
    }
    private func lostPower(_ host: SimulatedReplica) {
        host.rebooted(random)
        host.isLossy = true
        host.isMarkedRebooted = true
        host.powerCutAt = timeline.now
    }

    func step(_ host: SimulatedReplica, _ event: ReplicaEvent) {
        guard let core = host.core else { return }
        core.step(event, now: timeline.instant(host.clock))
        while let action = core.actions.popFirst() {
            perform(action, host)
            if host.core !== core { return }
        }
    }

    private func perform(_ action: ReplicaAction, _ host: SimulatedReplica) {
        guard let pool = host.pool else { return }
        switch action {
        case .read, .write, .sync, .punch, .create, .extend, .remove:
            guard let submitted = host.disk.submit(action, pool: pool) else { return }
            traceDisk(host, action)
            observeDiskAction(host, action)
            timeline.schedule(
                after: submitted.delay,
                .disk(
                    replica: host.index, process: host.process, operation: submitted.operation))
        case .reply(let number, let header, let tableBuffer, let buffer, let offset):
            observeReply(host, number, header, tableBuffer)
            if let connection = host.connections[number] {
                network.send(
                    connection, toReplica: false, header: header,
                    table: header.tableLength > 0
                        ? pool.memory(tableBuffer).slice(0, Int(header.tableLength)) : nil,
                    data: header.dataLength > 0
                        ? pool.memory(buffer).slice(offset, Int(header.dataLength)) : nil)
            }
            if tableBuffer != .none { pool.release(tableBuffer) }
            if buffer != .none { pool.release(buffer) }
        case .close(let number):
            guard let connection = host.connections[number] else { return }
            trace("\(host.name) closes connection \(number)")
            network.closeFromReplica(connection)
            pendingReplicaCloses.append((host, number, host.process))
        case .note(let note):
            if case .refusedStale = note { return trace("\(host.name): \(note)") }
            self.note("\(host.name): \(note)")
        case .failed(let failure):
            note("\(host.name) failed: \(failure)")
            observeFailure(host, failure)
            if case .tableUnreadable = failure, mayBeReplaced(host) {
                return replaceDamaged(host)
            }
            killReplica(host, restartAfter: random.between(200, 3000))
        }
    }

    func deliverReplicaCloses() {
        while !pendingReplicaCloses.isEmpty {
            let (host, number, process) = pendingReplicaCloses.removeFirst()
            guard host.process == process, host.connections[number] != nil else { continue }
            host.connections[number] = nil
            host.requests.removeAll { $0.connection == number }
            step(host, .disconnected(connection: number))
        }
    }

    func deliver(
        _ parcel: SimulatedNetwork.Parcel, to host: SimulatedReplica,
        _ connection: SimulatedNetwork.Connection
    ) {
        guard host.process == connection.process, host.core != nil, let pool = host.pool else {
            return
        }
        let number = connection.number
        guard host.connections[number] === connection else { return }
        switch parcel {
        case .opened: break
        case .closed:
            trace("\(host.name) loses connection \(number)")
            network.closeFromReplica(connection)
            host.connections[number] = nil
            host.requests.removeAll { $0.connection == number }
            step(host, .disconnected(connection: number))
        case .frame(let bytes):
            guard let frame = decode(bytes) else {
                return fail("a frame for \(host.name) does not parse")
            }
            var buffer = BufferID.none
            if frame.header.dataLength > 0 {
                guard let free = pool.allocate(Int(frame.header.dataLength)) else {
                    network.putBack(parcel, connection, toReplica: true)
                    return
                }
                buffer = free
                pool.memory(buffer).copy(from: frame.data)
            }
            trace("\(host.name) <- \(engines[connection.engine].name) \(describe(frame.header))")
            observeArrival(
                host, number, frame.header, frame.data, from: engines[connection.engine])
            step(
                host,
                .frame(connection: number, frame.header, table: frame.table, buffer: buffer))
        }
        deliverReplicaCloses()
    }

    /// To the process, or to where it finds it when it goes on.
    func deliver(_ event: ReplicaEvent, to host: SimulatedReplica) {
        if host.pausedUntil > timeline.now { host.hold(event) } else { step(host, event) }
    }
    func resume(_ host: SimulatedReplica) {
        for event in host.resume() { step(host, event) }
        deliverReplicaCloses()
    }

    func diskCompleted(_ host: SimulatedReplica, process: Int, operation: UInt64) {
        let isSame = host.process == process && host.core != nil
        let done = host.disk.complete(operation, pool: isSame ? host.pool : nil)
        checkShared(host)
        guard let done, isSame else { return }
        if done.result < 0 { note("\(host.name): disk error \(done.result)") }
        deliver(.disk(token: done.token, result: done.result), to: host)
        deliverReplicaCloses()
    }
}
