import Glibc
import HapteraCore
import HapteraIO

/// The process around one engine: its NBD server, control socket and signals.
final class EngineProcess: ControlHandler, CompletionHandler {
    private let options: EngineOptions
    /// Looked up before the loop runs, which must not wait for a name server.
    private let nbdAddress: SocketAddress?
    private let reactor: Reactor
    private let shell: EngineShell
    private let snapshots: SnapshotControl
    private let resizes: ResizeControl
    private var server: NBDServer?
    private var control: ControlServer?
    private var signals: SignalWatcher?
    private var detaching: [ControlRequest] = []
    private var isLeaving = false
    private var exitStatus: Int32 = 0
    private var uri = ""
    private var unixURI = ""
    private var id = HandlerID.none
    private var listenUntil: Instant?
    private enum Token { static let leave: UInt64 = 0, listen: UInt64 = 1 }
    /// A detach that cannot finish (replicas away, a client that keeps writing) is cut short.
    private static let detachMilliseconds = 10_000

    /// Serves until detached, fenced or told to stop; the process's exit status.
    static func run(_ options: EngineOptions) throws(IOError) -> Int32 {
        // The log may be on a disk of a replica: one that hangs must not keep the engine from
        // going on without that replica.
        Log.writeInBackground()
        let process = try EngineProcess(options)
        try process.start()
        process.reactor.run()
        return process.exitStatus
    }

    private init(_ options: EngineOptions) throws(IOError) {
        self.options = options
        nbdAddress = options.nbd?.resolved()
        reactor = try Reactor(backend: Backend.fromEnvironment())
        shell = EngineShell(reactor: reactor, options: options)
        snapshots = SnapshotControl(shell: shell)
        resizes = ResizeControl(shell: shell)
    }

    private func start() throws(IOError) {
        id = reactor.register(self)
        signals = try SignalWatcher(reactor: reactor) { [unowned self] _ in leave() }
        if let path = options.controlPath {
            control = try ControlServer(reactor: reactor, path: path, handler: self)
        }
        shell.onServing = { [unowned self] isServing in
            if isServing, server == nil, options.listens { listen() }
        }
        shell.onStopped = { [unowned self] reason in stopped(reason) }
        Log.info(
            "engine started", ("volume", options.volumeName), ("io", reactor.backendName),
            ("instance", shell.core.configuration.instance.rawValue.description))
        shell.start()
    }

    /// Clients are let in when the volume is served for the first time; later they wait. In a
    /// maintenance only readers of snapshots are: whatever else is done meets no client.
    private func listen() {
        let server =
            server
            ?? NBDServer(reactor: reactor, device: shell, offersLive: !options.isMaintenance)
        self.server = server
        snapshots.userCount = { [unowned server] in server.userCount(of: $0) }
        let now = Clock.monotonic()
        let limit = listenUntil ?? now.adding(milliseconds: Listener.takenMilliseconds)
        listenUntil = limit
        do throws(IOError) {
            if let address = nbdAddress, uri.isEmpty {
                let bound = try server.listen(on: address)
                let named = options.nbd?.host.map { bound.at($0) } ?? bound
                uri = "nbd://\(named.text)/\(options.volumeName)"
            }
            if let path = options.nbdUnixPath {
                _ = try server.listen(on: .unix(path: path))
                unixURI = "nbd+unix:///\(options.volumeName)?socket=\(path)"
            }
            Log.info("volume served", ("volume", options.volumeName), ("uri", uri))
        } catch {
            if error.errno == EADDRINUSE, now < limit {
                // The loop goes on meanwhile: leases must be renewed.
                reactor.timer(
                    afterMilliseconds: Listener.takenRetryMilliseconds, handler: id,
                    token: Token.listen)
                return
            }
            Log.error(
                "cannot serve the volume", ("volume", options.volumeName),
                ("reason", error.message))
            exitStatus = 1
            reactor.stop()
        }
    }

    // MARK: - Leaving

    /// Detach: clients first, then what is on the way, then the record.
    private func leave() {
        guard !isLeaving else { return }
        isLeaving = true
        reactor.timer(
            afterMilliseconds: Self.detachMilliseconds, handler: id, token: Token.leave)
        guard let server else {
            shell.detach()
            return
        }
        server.stop { [unowned self] in shell.detach() }
    }

    func completed(token: UInt64, result: Int) {
        if token == Token.listen {
            if !isLeaving { listen() }
            return
        }
        Log.warn("detach did not finish in time; leaving as it is", ("volume", shell.name))
        end(StopReason.left.rawValue)
    }

    /// Status 0 is for whoever was told to leave and did, clean or not: nobody starts it again.
    private func stopped(_ reason: StopReason) {
        switch reason {
        case .detached:
            Log.info("volume detached", ("volume", shell.name))
            end(nil)
        case .left:
            Log.warn(
                "\(reason.rawValue): the next one waits for leases to run out, and compares what "
                    + "may differ", ("volume", shell.name))
            end(reason.rawValue)
        default:
            Log.error(
                "engine stops", ("volume", shell.name), ("reason", shell.core.stopText),
                ("advice", reason.advice(volume: shell.name)))
            exitStatus = 1
            end(shell.core.stopText)
        }
    }

    /// Answers whoever waits for the detach, then stops.
    private func end(_ failure: String?) {
        snapshots.abandon(failure ?? "the engine stopped")
        resizes.abandon(failure ?? "the engine stopped")
        server?.abandon()
        let waiting = detaching
        detaching = []
        guard let last = waiting.last else {
            reactor.stop()
            return
        }
        for request in waiting {
            if let failure { request.fail(failure) } else { request.reply() }
        }
        last.afterReply { [unowned self] in reactor.stop() }
    }

    // MARK: - Control socket

    func control(_ request: ControlRequest) {
        switch request.verb {
        case "ping": request.reply()
        case "status": request.reply(status())
        case "metrics":
            request.reply(
                shell.metricLines().map { ($0.key, $0.value) } + [
                    ("haptera_engine_connections", String(clientCount)),
                    ("haptera_engine_snapshot_readers", String(server?.readerCount ?? 0)),
                ])
        case "replicas":
            guard let text = request.arguments["list"], let list = ReplicaEndpoint.list(text) else {
                return request.fail("replicas needs list=HEX16=HOST:PORT,... with 1 to 8 entries")
            }
            shell.configure(list)
            request.reply()
        case "settings": set(request)
        case "accept-loss":
            guard shell.core.isRefusing else {
                return request.fail(
                    "volume '\(shell.name)' does not wait for such a decision: it is "
                        + shell.stateWord)
            }
            shell.run(.acceptLoss)
            request.reply()
        case "snapshot": snapshots.take(request)
        case "scrub": scrub(request, shell)
        case "revert": snapshots.revert(request)
        case "release": snapshots.release(request)
        case "delete-snapshot": snapshots.delete(request)
        case "resize": resizes.resize(request)
        case "detach":
            detaching.append(request)
            leave()
        default:
            request.fail("unknown verb '\(request.verb)'")
        }
    }

    /// `settings io-timeout=MS removal-deadline=MS detect-zeroes=on|off`, each optional: all of it
    /// or nothing.
    private func set(_ request: ControlRequest) {
        var (deadline, timeout): (UInt64?, UInt64?)
        var detectsZeroes: Bool?
        for (key, value) in request.arguments {
            switch key {
            case "removal-deadline":
                deadline = EngineSettings.removalDeadline(value)
                guard let deadline else {
                    return request.fail("\(key) takes \(EngineSettings.removalDeadlineText)")
                }
                guard deadline >= shell.core.configuration.leaseMilliseconds else {
                    return request.fail(
                        "\(key) must not be less than the lease, "
                            + "\(shell.core.configuration.leaseMilliseconds) milliseconds")
                }
            case "io-timeout":
                timeout = EngineSettings.ioTimeout(value)
                guard timeout != nil else {
                    return request.fail("\(key) takes \(EngineSettings.ioTimeoutText)")
                }
            case "detect-zeroes":
                detectsZeroes = EngineSettings.flag(value)
                guard detectsZeroes != nil else {
                    return request.fail("\(key) takes \(EngineSettings.switchText)")
                }
            default: return request.fail("settings knows no '\(key)'")
            }
        }
        shell.core.set(
            removalDeadlineMilliseconds: deadline, ioTimeoutMilliseconds: timeout,
            detectsZeroes: detectsZeroes)
        Log.info(
            "settings changed", ("volume", shell.name),
            ("removalDeadline", String(shell.core.configuration.removalDeadlineMilliseconds)),
            ("ioTimeout", String(shell.core.configuration.ioTimeoutMilliseconds)),
            ("detectZeroes", EngineSettings.text(shell.core.configuration.detectsZeroes)))
        request.reply()
    }

    /// Connections to the volume, and those that have yet to say what they want.
    private var clientCount: Int { server.map { $0.connectionCount - $0.readerCount } ?? 0 }

    private func status() -> [(String, String)] {
        [
            ("pid", String(getpid())), ("uri", uri), ("unixURI", unixURI),
            ("io", reactor.backendName),
            ("connections", String(clientCount)),
            ("snapshotReaders", String(server?.readerCount ?? 0)),
            ("remoteClients", String(server?.remoteClients ?? 0)),
        ] + shell.statusLines().map { ($0.key, $0.value) }
    }
}
