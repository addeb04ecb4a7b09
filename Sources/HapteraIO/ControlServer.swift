import Glibc
import HapteraCore

/// Answers the verbs of a control socket.
package protocol ControlHandler: AnyObject {
    /// Must call `reply` or `fail` on the request, now or later.
    func control(_ request: ControlRequest)
}

/// One request: a verb and its arguments.
package final class ControlRequest {
    package let verb: String
    package let arguments: [String: String]
    private weak var connection: ControlConnection?

    fileprivate init(line: String, connection: ControlConnection) throws(UsageError) {
        var words = line.split(separator: " ").map(String.init)[...]
        guard let verb = words.popFirst() else { throw UsageError("empty request") }
        var arguments: [String: String] = [:]
        for word in words {
            let parts = word.split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false)
            guard parts.count == 2, !parts[0].isEmpty else {
                throw UsageError("'\(word)' is not key=value")
            }
            guard arguments.updateValue(String(parts[1]), forKey: String(parts[0])) == nil else {
                throw UsageError("'\(parts[0])' is given twice")
            }
        }
        self.verb = verb
        self.arguments = arguments
        self.connection = connection
    }

    /// `ok` and the fields. Ignored if the caller has gone.
    package func reply(_ fields: [(String, String)] = []) {
        var text = "ok\n"
        for (key, value) in fields { text += "\(key)=\(singleLine(value))\n" }
        connection?.answer(text + "\n")
    }
    package func fail(_ message: String) {
        connection?.answer("error \(singleLine(message))\n\n")
    }
    /// Calls `body` when the caller's connection has taken all of the reply, or is gone.
    package func afterReply(_ body: @escaping () -> Void) {
        if let connection { connection.whenSent(body) } else { body() }
    }
}

private func singleLine(_ text: String) -> String {
    text.split(whereSeparator: \.isNewline).joined(separator: " ")
}

/// A Unix socket with a line protocol: request `verb key=value ...\n` (at most 64 KiB), reply
/// `ok\n` or `error MESSAGE\n`, then `key=value\n` lines, then an empty line. Requests of one
/// connection are answered one after the other.
package final class ControlServer {
    package static let requestSizeMax = 64 << 10
    private let listener: Listener

    /// The socket is accessible to its owner only.
    package init(reactor: Reactor, path: String, handler: any ControlHandler) throws(IOError) {
        listener = try Listener.waiting(reactor: reactor, address: .unix(path: path)) {
            [weak handler] fd in
            guard let handler else {
                Glibc.close(fd)
                return
            }
            ControlConnection.start(reactor: reactor, fd: fd, handler: handler)
        }
        // SAFETY: the string outlives the call.
        guard unsafe chmod(path, 0o600) == 0 else {
            throw IOError(errno: errno, "cannot restrict \(path)")
        }
    }
    /// Accepts no more; open connections stay.
    package func close() { listener.close() }
}

/// One caller.
private final class ControlConnection: ConnectionDelegate {
    private weak var handler: (any ControlHandler)?
    private var connection: Connection?
    private var isEnded = false
    private var isAnswering = false
    private var sentCallbacks: [() -> Void] = []

    static func start(reactor: Reactor, fd: Int32, handler: any ControlHandler) {
        let control = ControlConnection(handler)
        control.connection = Connection(reactor: reactor, fd: fd, delegate: control)
    }
    private init(_ handler: any ControlHandler) { self.handler = handler }

    func connection(_ connection: Connection, received memory: RawMemory) -> Int {
        let limit = min(memory.count, ControlServer.requestSizeMax)
        guard let end = (0..<limit).first(where: { memory[$0] == UInt8(ascii: "\n") }) else {
            if memory.count >= ControlServer.requestSizeMax {
                answer("error the request is longer than \(ControlServer.requestSizeMax) bytes\n\n")
                connection.finish()
            }
            return 0
        }
        // One at a time: the next is read when this one is answered.
        isAnswering = true
        connection.pauseReceiving()
        guard let line = String(validating: memory.slice(0, end).bytes(), as: UTF8.self) else {
            answer("error the request is not UTF-8\n\n")
            return end + 1
        }
        do throws(UsageError) {
            let request = try ControlRequest(line: line, connection: self)
            handler?.control(request)
        } catch {
            answer("error \(error.message)\n\n")
        }
        return end + 1
    }

    func answer(_ text: String) {
        guard let connection else { return }
        let bytes = Array(text.utf8)
        let block = MemoryBlock(count: bytes.count)
        block.memory.copy(from: bytes)
        connection.send(copying: block.memory)
        isAnswering = false
        connection.resumeReceiving()
        if isEnded { connection.finish() }
    }

    func whenSent(_ body: @escaping () -> Void) {
        guard let connection else { return body() }
        sentCallbacks.append(body)
        connection.finish()
    }

    func connectionReceivedPayload(_ connection: Connection) {}
    func connectionReceivedEnd(_ connection: Connection) {
        isEnded = true
        if !isAnswering { connection.finish() }
    }
    func connectionClosed(_ connection: Connection, reason: CloseReason) {
        self.connection = nil
        let callbacks = sentCallbacks
        sentCallbacks = []
        for callback in callbacks { callback() }
    }
}
