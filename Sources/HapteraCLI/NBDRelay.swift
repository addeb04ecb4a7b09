import Foundation
import Glibc
import HapteraCore
import HapteraHost
import Synchronization

/// Serves one snapshot on a private Unix socket, out of whichever engine serves it at the moment.
/// When that one leaves, because the volume is attached, detached or moved, its reader waits for
/// the next one and what it has asked is asked again: a snapshot does not change.
final class NBDRelay: Sendable {
    /// Readers at a time.
    static let connectionsMax = 16

    let directory: String
    let path: String
    /// What has its name at `path`.
    let export: String
    private let source: SnapshotSource
    private let listener: Int32
    private let connections = Mutex<[ObjectIdentifier: NBDRelayConnection]>([:])
    private let isStopping = Mutex(false)

    /// `temporary`: where its directory goes; ends with a slash.
    init(_ source: SnapshotSource, temporary: String = NSTemporaryDirectory()) throws {
        self.source = source
        export = source.export
        directory =
            temporary + "haptera-\(getpid())-" + hexadecimal(UInt64.random(in: .min ... .max))
        path = directory + "/nbd.sock"
        // SAFETY: a Swift string passed as a C string is valid during the call.
        guard unsafe mkdir(directory, 0o700) == 0 else {
            let failure = HostFiles.failure("make a directory in", temporary)
            throw CommandFailure(.failed, "\(failure); set TMPDIR to another one")
        }
        do {
            listener = try NBDSocket.listen(path: path)
        } catch {
            try? FileManager.default.removeItem(atPath: directory)
            throw error
        }
    }

    var uri: String { "nbd+unix:///\(export)?socket=\(path)" }

    func start() {
        let thread = Thread { [self] in
            while true {
                let descriptor = NBDSocket.accept(listener)
                guard descriptor >= 0, !isStopping.withLock({ $0 }) else { break }
                serve(NBDSocket(accepted: descriptor))
            }
            close(listener)
        }
        thread.start()
    }

    private func serve(_ client: NBDSocket) {
        let connection = NBDRelayConnection(client, source)
        let isAdmitted = connections.withLock { known in
            guard known.count < Self.connectionsMax else { return false }
            known[ObjectIdentifier(connection)] = connection
            return true
        }
        guard isAdmitted else { return client.hangUp() }
        let thread = Thread { [self] in
            connection.run()
            connections.withLock { $0[ObjectIdentifier(connection)] = nil }
        }
        thread.start()
    }

    /// Hangs up on whoever reads.
    func stop() {
        isStopping.withLock { $0 = true }
        shutdown(listener, Int32(SHUT_RDWR))
        connections.withLock { for connection in $0.values { connection.end() } }
        try? FileManager.default.removeItem(atPath: directory)
    }
}

/// One reader. Two threads: one takes its requests, the other the engine's replies, and looks for
/// another engine when they end.
final class NBDRelayConnection: Sendable {
    private struct Request {
        var bytes: [UInt8]
        var command: UInt16
        var length: Int
    }
    private struct State {
        /// Asked and not answered, by cookie, in the order they were asked.
        var outstanding: [(cookie: UInt64, request: Request)] = []
        /// Nil while another one is looked for.
        var engine: NBDSocket?
        var isOver = false
    }
    private static let outstandingMax = 1024
    /// An engine that owes an answer for so long counts as lost.
    private static let silenceMaxMilliseconds: Int32 = 120_000

    private let client: NBDSocket
    private let source: SnapshotSource
    private let state = Mutex(State())
    /// Held while requests go to the engine.
    private let sending = Mutex(())

    init(_ client: NBDSocket, _ source: SnapshotSource) {
        self.client = client
        self.source = source
    }

    func end() {
        let engine = state.withLock { state in
            state.isOver = true
            return state.engine
        }
        client.hangUp()
        engine?.hangUp()
    }
    private var isOver: Bool { state.withLock { $0.isOver } }

    func run() {
        defer { end() }
        do {
            var script = NBDScript(export: source.export)
            let engine = try connect { socket in try script.negotiate(client, socket) }
            guard let engine, script.isEntered else { return }
            state.withLock { $0.engine = engine }
            let agreed = script
            let replies = Thread { [self] in
                defer { end() }
                try? passReplies(from: engine, agreed)
            }
            replies.start()
            try takeRequests()
        } catch {
            // Whoever reads sees that the connection has ended; the source knows why.
        }
    }

    /// The first engine that is found, and the snapshot in it. Nil: the reader has left.
    private func connect(_ greet: (NBDSocket) throws -> Void) throws -> NBDSocket? {
        let since = ContinuousClock.now
        while !isOver {
            do {
                let engine = try source.open()
                try greet(engine)
                // It may have been deleted, and taken again under its name, before it was opened;
                // from then on it cannot be.
                try source.confirm()
                return engine
            } catch let error as NBDScript.Broken {
                throw error
            } catch {
                try source.wait(after: error, since: since)
            }
        }
        return nil
    }

    // MARK: From the reader

    private func takeRequests() throws {
        while true {
            let bytes = try client.receive(28)
            let number = NBDSocket.number
            guard number(bytes[0..<4]) == UInt64(NBDMagic.request) else { return }
            let command = UInt16(number(bytes[6..<8]))
            // What would change something has a payload, and no business here.
            let known: [NBDCommand] = [.read, .blockStatus, .cache, .flush]
            guard known.contains(where: { $0.rawValue == command }) else { return }
            let request = Request(
                bytes: bytes, command: command, length: Int(number(bytes[24..<28])))
            try sending.withLock { _ in
                let engine = try state.withLock { state in
                    guard state.outstanding.count < Self.outstandingMax else {
                        throw HostError("the reader asks for too much at a time")
                    }
                    state.outstanding.append((number(bytes[8..<16]), request))
                    return state.engine
                }
                // What is lost is asked again.
                if let engine { try? engine.send(bytes) }
            }
        }
    }

    // MARK: From the engine

    private func passReplies(from first: NBDSocket, _ script: NBDScript) throws {
        var engine = first
        while true {
            do {
                while true { try passReply(engine) }
            } catch let error as ReaderLeft {
                throw error
            } catch {
                state.withLock { $0.engine = nil }
                engine.hangUp()
                guard !isOver, let next = try connect({ try script.repeated(to: $0) }) else {
                    return
                }
                engine = next
                sending.withLock { _ in
                    let lost = state.withLock { state in
                        state.engine = next
                        return state.outstanding.map(\.request.bytes)
                    }
                    for bytes in lost { try? next.send(bytes) }
                }
            }
        }
    }

    private struct ReaderLeft: Error {}

    /// One reply, or one part of it, whole or not at all.
    private func passReply(_ engine: NBDSocket) throws {
        // One that is asked nothing has nothing to say, for as long as that may be.
        while !engine.isReadable(withinMilliseconds: Self.silenceMaxMilliseconds) {
            guard state.withLock({ $0.outstanding.isEmpty }) else {
                throw HostError("the engine does not answer")
            }
        }
        let number = NBDSocket.number
        var header = try engine.receive(16)
        let cookie = number(header[8..<16])
        guard
            let request = state.withLock({ state in
                state.outstanding.first { $0.cookie == cookie }?.request
            })
        else { throw HostError("the engine's reply is out of step") }
        var isLast = true
        var payload: [UInt8] = []
        switch UInt32(number(header[0..<4])) {
        case NBDMagic.simpleReply:
            let error = UInt32(number(header[4..<8]))
            try requireServing(error)
            if error == 0, request.command == NBDCommand.read.rawValue {
                payload = try engine.receive(request.length)
            }
        case NBDMagic.structuredReply:
            header += try engine.receive(4)
            let length = Int(number(header[16..<20]))
            guard length <= NBDLimits.payloadMax + 64 else {
                throw HostError("the engine's reply is too long")
            }
            payload = try engine.receive(length)
            isLast = header[5] & UInt8(NBDChunk.done) != 0
            if number(header[6..<8]) == UInt64(NBDChunk.error), payload.count >= 4 {
                try requireServing(UInt32(number(payload[0..<4])))
            }
        default: throw HostError("the engine's reply is out of step")
        }
        if isLast {
            state.withLock { state in state.outstanding.removeAll { $0.cookie == cookie } }
        }
        do {
            try client.send(header + payload)
        } catch {
            throw ReaderLeft()
        }
    }
    /// One that leaves says so; the next one is asked.
    private func requireServing(_ error: UInt32) throws {
        guard error != NBDError.shutdown.rawValue else { throw HostError("the engine leaves") }
    }
}
