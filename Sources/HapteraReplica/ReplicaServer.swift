import Glibc
import HapteraCore
import HapteraIO

/// The process around `ReplicaCore`: feeds it frames, completions and time, and performs its
/// actions. One reactor, one thread.
package final class ReplicaServer: CompletionHandler, FrameDelegate, TurnHandler,
    ControlHandler
{
    private enum Token { static let tick = UInt64.max }
    private static let tickMilliseconds = 100
    private static let stopMilliseconds: UInt64 = 20_000

    private let reactor: Reactor
    private let storage: DirectoryStorage
    private let core: ReplicaCore
    private var id = HandlerID.none
    private let log: FileID
    private let manifest: FileID
    private var layerFiles: [ReplicaFile: FileID] = [:]
    private var lastFile: (name: ReplicaFile, id: FileID)
    private var listener: Listener?
    private var control: ControlServer?
    private var connections: [FrameConnection?] = Array(
        repeating: nil, count: ReplicaLimits.connectionsMax)
    private var isCoreFull = false
    private var counters = ReplicaCounters()
    private var isStopped = false
    private var shutdownRequests: [ControlRequest] = []
    private var stopDeadline: Instant?
    private let sharing: LayerSharing
    /// What could be logged very often is logged once a second.
    private var quietUntil = Instant.zero
    private let hostBoot: BootID
    /// Nil: none may be caused.
    private var faults: ReplicaFaults?
    package private(set) var failure: String?

    /// Opens the copy (waiting for the lock of an earlier process) and begins to listen.
    package init(
        reactor: Reactor, directory: String, listen: SocketAddress, control path: String,
        allowsFaults: Bool = false
    ) throws {
        self.reactor = reactor
        faults = allowsFaults ? ReplicaFaults() : nil
        storage = DirectoryStorage(directory: directory, mode: .serve)
        // The first is on no disk, so nothing keeps it waiting, but a container may have one of its
        // own; the second is usually on the copy's own disk, but lasts if that is another.
        storage.markPlaces = [DirectoryStorage.markMemory, Self.folder(of: path)]
        // Before anything is read: the lock of every file that I/O goes to.
        for file in [ReplicaFile.manifest, .log] { _ = try storage.descriptor(file) }
        try storage.refuseMarked()
        hostBoot = try HostBoot.read()
        var options = ReplicaOptions(
            instance: InstanceID(rawValue: randomUInt64() | 1),
            bootID: try storage.bootAfterFailedSyncs(hostBoot))
        options.hash = BlockHash.hash
        storage.markBusErrors(hostBoot)
        core = try storage.open(options: options, pool: reactor.pool, boot: hostBoot)
        storage.releaseLogPages()
        sharing = LayerSharing(core: core, storage: storage)
        log = reactor.register(file: try storage.descriptor(.log), label: "log")
        manifest = reactor.register(file: try storage.descriptor(.manifest), label: "manifest")
        lastFile = (.log, log)
        layerFiles[.layers] = reactor.register(
            file: try storage.descriptor(.layers), label: "layers")
        id = reactor.register(self)
        for layer in core.layerFiles { try register(layer) }
        listener = try Listener.waiting(reactor: reactor, address: listen) { [unowned self] fd in
            self.accepted(fd)
        }
        control = try ControlServer(reactor: reactor, path: path, handler: self)
        reactor.addTurnHook(self)
        reactor.timer(
            everyMilliseconds: Self.tickMilliseconds, handler: id, token: Token.tick)
        Log.info(
            "serving", ("replica", core.identity.replica.text),
            ("volume", core.identity.volume.text), ("listen", listener?.address.text ?? ""),
            ("io", reactor.backendName), ("activeRegions", String(core.activeRegionCount)))
    }

    package var address: SocketAddress? { listener?.address }

    private static func folder(of path: String) -> String {
        guard let slash = path.lastIndex(of: "/") else { return "." }
        return slash == path.startIndex ? "/" : String(path[..<slash])
    }

    // MARK: events

    private func accepted(_ fd: Int32) {
        guard let free = connections.firstIndex(where: { $0 == nil }), stopDeadline == nil else {
            Glibc.close(fd)
            return
        }
        let connection = FrameConnection(reactor: reactor, fd: fd, delegate: self)
        connection.context = free
        connections[free] = connection
        if isDeaf { connection.pauseReceiving() }
        step(.connected(connection: free))
    }

    package func frameTarget(_ connection: FrameConnection, _ header: FrameHeader) -> FrameTarget {
        core.canAccept ? .allocate : .wait
    }

    package func received(
        _ connection: FrameConnection, _ header: FrameHeader, table: RawMemory, buffer: BufferID,
        offset: Int
    ) {
        precondition(offset == 0)
        step(.frame(connection: connection.context, header, table: table, buffer: buffer))
        let isBacklogged = connection.queuedSendBytes > Connection.sendQueueHigh
        if !core.canAccept || isBacklogged || isDeaf { connection.pauseReceiving() }
        if !core.canAccept { isCoreFull = true }
    }

    package func frameConnectionCanSend(_ connection: FrameConnection) {
        if !isDeaf { connection.resumeReceiving() }
    }

    package func frameConnectionClosed(_ connection: FrameConnection, reason: CloseReason) {
        if case .badFrame(let error) = reason {
            Log.warn("connection closed: it sent a bad frame", ("error", "\(error)"))
        }
        connections[connection.context] = nil
        step(.disconnected(connection: connection.context))
    }

    package func completed(token: UInt64, result: Int) {
        if token == Token.tick, let stopDeadline, reactor.now > stopDeadline {
            // A crash at any moment is harmless: better now than never.
            Log.warn("stopping without draining: it takes too long")
            reactor.stop()
        }
        if token == Token.tick {
            endFaults()
            sharing.claim(now: reactor.now)
        }
        step(token == Token.tick ? .tick : .disk(token: token, result: result))
    }

    package func turnEnded() {
        // A send that ended may have given back the buffer somebody waits for.
        if core.isShortOfResources { step(.tick) }
        if isCoreFull, core.canAccept, !isDeaf {
            isCoreFull = false
            resumeReceiving()
        }
        sharing.advance(now: reactor.now, isStopping: stopDeadline != nil)
        if core.isShutDown { finishStopping() }
    }

    private func resumeReceiving() {
        for case .some(let connection) in connections
        where connection.queuedSendBytes <= Connection.sendQueueHigh {
            connection.resumeReceiving()
        }
    }

    private func step(_ event: ReplicaEvent) {
        // Not the time the turn began: a lease counts from when the request was received.
        core.step(event, now: Clock.monotonic())
        perform()
    }

    // MARK: actions

    private func perform() {
        while let action = core.actions.popFirst() {
            switch action {
            case .read(let file, let offset, let length, let buffer, let at, let token):
                let memory = reactor.pool.memory(buffer).slice(at, length)
                reactor.read(
                    fileID(file), into: memory, offset: offset, handler: id, token: token)
            case .write(let file, let offset, let length, let buffer, let at, let token):
                let memory = reactor.pool.memory(buffer).slice(at, length)
                reactor.write(
                    fileID(file), from: memory, offset: offset, handler: id, token: token)
            case .sync(let file, let token):
                reactor.sync(fileID(file), handler: id, token: token)
            case .create(let layer, let size, let token): create(layer, size, token)
            case .extend(let layer, let size, let token): extend(layer, size, token)
            case .remove(let layer, let token): remove(layer, token)
            case .punch(let file, let offset, let length, let token):
                reactor.punch(
                    fileID(file), offset: offset, length: length, handler: id, token: token)
            case .reply(let connection, let header, let table, let buffer, let offset):
                reply(connection, header, table, buffer, offset)
            case .close(let connection): connections[connection]?.close()
            case .note(let note): report(note)
            case .failed(let reason): fail(reason)
            }
        }
    }

    /// Registered when the process starts, or when the layer was made.
    private func fileID(_ file: ReplicaFile) -> FileID {
        switch file {
        case .manifest: return manifest
        case .log: return log
        case .data, .table, .layers:
            // Nearly always the head's.
            if file == lastFile.name { return lastFile.id }
            guard let id = layerFiles[file] else {
                preconditionFailure("\(file) was never made")
            }
            lastFile = (file, id)
            return id
        }
    }
    private func register(_ layer: LayerID) throws(StorageError) {
        // Labels are what faults are told by, whatever the layer.
        for (file, label) in [(ReplicaFile.data(layer), "data"), (.table(layer), "table")]
        where layerFiles[file] == nil {
            layerFiles[file] = reactor.register(
                file: try storage.descriptor(file), label: label)
        }
    }
    /// Empty files, no byte of which is written: quick enough not to be an operation of the ring.
    private func create(_ layer: LayerID, _ size: UInt64, _ token: UInt64) {
        var result = 0
        do throws(StorageError) {
            try storage.createLayer(layer, size: size)
            try register(layer)
        } catch {
            Log.error(error.message, ("layer", String(layer.rawValue)))
            result = error.result
        }
        step(.disk(token: token, result: result))
    }

    /// Nothing but numbers changes: as quick.
    private func extend(_ layer: LayerID, _ size: UInt64, _ token: UInt64) {
        var result = 0
        do throws(StorageError) {
            try storage.extendLayer(layer, size: size)
            Log.info("room for a larger volume", ("size", String(size)))
        } catch {
            Log.error(error.message, ("layer", String(layer.rawValue)))
            result = error.result
        }
        step(.disk(token: token, result: result))
    }

    /// What they held is gone from them region by region: as quick.
    private func remove(_ layer: LayerID, _ token: UInt64) {
        for file in [ReplicaFile.data(layer), .table(layer)] {
            guard let id = layerFiles.removeValue(forKey: file) else { continue }
            if lastFile.name == file { lastFile = (.log, log) }
            reactor.unregister(id)
        }
        do throws(StorageError) {
            try storage.remove(layer)
            Log.info("layer deleted", ("layer", String(layer.rawValue)))
        } catch {
            Log.warn(error.message, ("layer", String(layer.rawValue)))
        }
        step(.disk(token: token, result: 0))
    }

    private func reply(
        _ connection: Int, _ header: FrameHeader, _ tableBuffer: BufferID, _ buffer: BufferID,
        _ offset: Int
    ) {
        counters.count(header)
        if faults?.isMute == true, let connection = connections[connection] {
            faults?.held.append(
                .init(
                    connection: connection, header: header, table: tableBuffer, buffer: buffer,
                    offset: offset))
            return
        }
        send(connections[connection], header, tableBuffer, buffer, offset)
    }

    private func send(
        _ connection: FrameConnection?, _ header: FrameHeader, _ tableBuffer: BufferID,
        _ buffer: BufferID, _ offset: Int
    ) {
        let pool = reactor.pool
        let table = tableBuffer == .none ? nil : pool.memory(tableBuffer)
        connection?.send(header, table: table, buffer: buffer, offset: offset)
        if tableBuffer != .none { pool.release(tableBuffer) }
        if buffer != .none { pool.release(buffer) }
    }

    private func report(_ note: ReplicaNote) {
        if case .installed(let epoch) = note {
            return Log.info("promised", ("epoch", String(epoch.rawValue)))
        }
        if case .checksumMismatch = note { counters.mismatches += 1 }
        guard reactor.now >= quietUntil else { return }
        quietUntil = reactor.now.adding(milliseconds: 1000)
        switch note {
        case .installed: break
        case .refusedStale(_, let epoch):
            Log.warn("refused an engine of another epoch", ("epoch", String(epoch.rawValue)))
        case .checksumMismatch(let offset):
            Log.warn("a block does not match its checksum", ("offset", String(offset)))
        case .sharedLayerDiffers(let offset):
            Log.error(
                "a block of a layer that clones share is not what the other members have; "
                    + "replace this replica", ("offset", String(offset)))
        case .logFull: Log.info("writes wait for room in the activity log")
        }
    }

    func fail(_ reason: ReplicaFailure) {
        let text =
            switch reason {
            case .syncFailed(let number):
                "a sync failed: \(errorText(number)); what is durable is unknown"
            case .tableUnreadable(let region): noteDamage(region)
            case .manifestWriteFailed(let number):
                "the manifest cannot be written: \(errorText(number))"
            case .layerNotMade(let layer, let number):
                "the files of layer \(layer.rawValue) cannot be made: \(errorText(number))"
            }
        failure = text
        if case .tableUnreadable = reason {} else { storage.noteFailedSync(hostBoot) }
        Log.error("replica failed", ("reason", text))
        reactor.stop()
    }

    /// The next process knows before it is filled. Returns what to say.
    private func noteDamage(_ region: UInt64) -> String {
        let damage = "the table page of region \(region) is damaged"
        storage.noteDamage(damage, of: core.identity.member)
        return ReplicaCommand.damage(
            damage, of: core.identity, in: storage.directory,
            isAlone: VolumeRecord.isAlone(core.identity.replica, in: core.installedRecord))
    }

    // MARK: control

    package func control(_ request: ControlRequest) {
        switch request.verb {
        case "ping": request.reply([("pid", String(getpid()))])
        case "status": request.reply(status())
        case "metrics": request.reply(counters.fields())
        case "shutdown":
            shutdownRequests.append(request)
            shutdown("control socket")
        case "share":
            sharing.begin(request, now: reactor.now)
            step(.tick)
        case "fault" where faults != nil: causeFault(request)
        default:
            request.fail("unknown verb '\(request.verb)': ping, status, metrics, share, shutdown")
        }
    }

    private func status() -> [(key: String, value: String)] {
        [
            ("pid", String(getpid())), ("replica", core.identity.replica.text),
            ("volume", core.identity.volume.text), ("name", core.identity.name),
            ("epoch", String(core.promise.rawValue)), ("size", String(core.size)),
            ("activeRegions", String(core.activeRegionCount)),
            ("logUsedPercent", String(core.logUsedPercent)),
            ("layers", String(core.layers.count)),
            ("retiredLayers", String(core.unmergedLayerCount)),
            ("stayingLayers", core.isLayerStaying ? "1" : "0"),
            ("mergedRegions", String(core.mergedRegions)),
            ("mergedBytes", String(core.mergedBytes)),
            ("state", stopDeadline == nil ? "serving" : "stopping"),
            ("address", listener?.address.text ?? ""),
            ("directory", storage.directory), ("io", reactor.backendName),
        ] + SpaceStatus(core, storage).fields(sharedBytes: sharing.bytes)
    }

    // MARK: faults

    private var isDeaf: Bool { faults?.isDeaf ?? false }

    private func causeFault(_ request: ControlRequest) {
        do throws(IOError) {
            let (fault, milliseconds) = try ReplicaFaults.parse(request.arguments)
            let end = reactor.now.adding(milliseconds: milliseconds)
            switch fault {
            case .link(let isDeaf, let isMute):
                guard faults?.isCut == false else { throw IOError("it is cut off already") }
                faults?.cut(isDeaf: isDeaf, isMute: isMute, until: end)
                if isDeaf { for connection in connections { connection?.pauseReceiving() } }
            case .files(let rules):
                reactor.completionFault = rules
                faults?.harmFiles(until: end)
            }
            let words = request.arguments.sorted { $0.key < $1.key }
            let text = words.map { "\($0.key)=\($0.value)" }.joined(separator: " ")
            Log.warn("a fault was asked for", ("fault", text))
            request.reply()
        } catch {
            request.fail("\(error)")
        }
    }

    private func endFaults() {
        guard let ended = faults?.ended(now: reactor.now) else { return }
        if ended.files { reactor.completionFault = nil }
        guard ended.link else { return }
        let held = faults?.held ?? []
        faults?.held = []
        for reply in held {
            send(reply.connection, reply.header, reply.table, reply.buffer, reply.offset)
        }
        if core.canAccept { resumeReceiving() } else { isCoreFull = true }
    }

    // MARK: stopping

    /// Drains what can be and stops the reactor when done; at once if something takes too long.
    package func shutdown(_ cause: String) {
        guard stopDeadline == nil else { return }
        Log.info("stopping", ("cause", cause))
        stopDeadline = reactor.now.adding(milliseconds: Self.stopMilliseconds)
        listener?.close()
        core.beginShutdown(now: reactor.now)
        perform()
    }

    private func finishStopping() {
        guard !isStopped else { return }
        isStopped = true
        Log.info("stopped", ("activeRegions", String(core.activeRegionCount)))
        // Not left to the end of the process: a kernel may keep its sockets for seconds, and its
        // engines would wait as long.
        for connection in connections { connection?.close() }
        for request in shutdownRequests { request.reply() }
        control?.close()
        guard let last = shutdownRequests.last else { return reactor.stop() }
        shutdownRequests = []
        last.afterReply { [reactor] in reactor.stop() }
    }
}

/// What a replica answered, for `metrics`.
struct ReplicaCounters {
    private var answered: [UInt64] = Array(repeating: 0, count: 16)
    private var failed: UInt64 = 0
    private var bytesRead: UInt64 = 0
    private var bytesWritten: UInt64 = 0
    var mismatches: UInt64 = 0

    mutating func count(_ header: FrameHeader) {
        let kind = Int(header.kind.rawValue)
        if kind < answered.count { answered[kind] += 1 }
        guard header.status == .ok else {
            failed += 1
            return
        }
        if header.kind == .read { bytesRead += UInt64(header.length) }
        if header.kind == .write { bytesWritten += UInt64(header.length) }
    }

    func fields() -> [(key: String, value: String)] {
        let kinds: [FrameKind] = [
            .hello, .install, .write, .setState, .read, .flush, .digest, .status, .regionMap,
            .ping, .adopt,
        ]
        var fields = kinds.map {
            ("haptera_replica_\($0)_requests_total", String(answered[Int($0.rawValue)]))
        }
        fields += [
            ("haptera_replica_failed_requests_total", String(failed)),
            ("haptera_replica_read_bytes_total", String(bytesRead)),
            ("haptera_replica_written_bytes_total", String(bytesWritten)),
            ("haptera_replica_checksum_mismatches_total", String(mismatches)),
        ]
        return fields
    }
}

/// Which boot of this host it is.
package enum HostBoot {
    package static func read() throws(IOError) -> BootID {
        let fd = try FileDescriptors.open("/proc/sys/kernel/random/boot_id", flags: O_RDONLY)
        defer { close(fd) }
        var bytes = [UInt8](repeating: 0, count: 64)
        // SAFETY: the array has the bytes given.
        let count = unsafe Glibc.read(fd, &bytes, bytes.count)
        let digits = bytes.prefix(max(count, 0)).filter {
            $0 != UInt8(ascii: "-") && $0 != UInt8(ascii: "\n")
        }
        guard digits.count == 32, let high = parseHexadecimal(digits.prefix(16)),
            let low = parseHexadecimal(digits.suffix(16))
        else { throw IOError("the kernel's boot id is not one") }
        return BootID(high: high, low: low)
    }
}
