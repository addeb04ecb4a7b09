import HapteraCore

/// One request on a control socket: `verb key=value ...`.
package struct ControlRequest: Equatable, Sendable {
    package var verb: String
    package var arguments: [String: String]

    /// Nil if there is no verb, or an argument is not `key=value` or given twice.
    package init?(line: String) {
        let words = line.split(separator: " ", omittingEmptySubsequences: true)
        guard let first = words.first, !first.contains("=") else { return nil }
        verb = String(first)
        arguments = [:]
        for word in words.dropFirst() {
            guard let equals = word.firstIndex(of: "="), equals != word.startIndex else {
                return nil
            }
            let key = String(word[..<equals])
            guard arguments[key] == nil else { return nil }
            arguments[key] = String(word[word.index(after: equals)...])
        }
    }
}

/// Serves a process's control socket: one line in, `ok` or `error MESSAGE`, `key=value` lines and an
/// empty line out. Requests of one connection are answered in order, one at a time.
package final class ControlServer {
    package static let lineLengthMax = 64 << 10
    private let reactor: Reactor
    private var listener: Listener?

    /// `onRequest` answers, now or later, through the session it is given.
    package init(
        reactor: Reactor, path: String,
        onRequest: @escaping (ControlRequest, ControlSession) -> Void
    ) throws(IOError) {
        self.reactor = reactor
        listener = try Listener(reactor: reactor, address: .unix(path: path)) { fd in
            ControlSession.serve(reactor, fd, onRequest)
        }
    }
    package func close() {
        listener?.close()
        listener = nil
    }
}

/// One client of a control socket.
package final class ControlSession: ConnectionDelegate {
    private var connection: Connection?
    private let onRequest: (ControlRequest, ControlSession) -> Void
    private var isAnswering = false

    private init(_ onRequest: @escaping (ControlRequest, ControlSession) -> Void) {
        self.onRequest = onRequest
    }
    static func serve(
        _ reactor: Reactor, _ fd: Int32,
        _ onRequest: @escaping (ControlRequest, ControlSession) -> Void
    ) {
        let session = ControlSession(onRequest)
        session.connection = Connection(reactor: reactor, fd: fd, delegate: session)
    }

    package func reply(_ fields: [(key: String, value: String)] = []) {
        answer("ok", fields)
    }
    package func fail(_ message: String) { answer("error " + message, []) }

    private func answer(_ first: String, _ fields: [(key: String, value: String)]) {
        guard isAnswering else { return }
        isAnswering = false
        guard let connection, !connection.isClosing else { return }
        var text = Self.oneLine(first) + "\n"
        for field in fields { text += Self.oneLine("\(field.key)=\(field.value)") + "\n" }
        text += "\n"
        let bytes = [UInt8](text.utf8)
        let block = MemoryBlock(count: bytes.count)
        block.memory.copy(from: bytes)
        connection.send(copying: block.memory)
        connection.resumeReceiving()
    }
    private static func oneLine(_ text: String) -> String {
        text.split(whereSeparator: \.isNewline).joined(separator: " ")
    }

    package func connection(_ connection: Connection, received memory: RawMemory) -> Int {
        var start = 0
        var at = 0
        while at < memory.count, !connection.isPaused, !connection.isClosing {
            if memory[at] != UInt8(ascii: "\n") {
                at += 1
                continue
            }
            let line = memory.slice(start, at - start).bytes()
            at += 1
            start = at
            take(line, connection)
        }
        if at - start > ControlServer.lineLengthMax {
            isAnswering = true
            fail("a request is one line of at most \(ControlServer.lineLengthMax) bytes")
            connection.finish()
            return memory.count
        }
        return start
    }

    private func take(_ line: [UInt8], _ connection: Connection) {
        isAnswering = true
        // The next request waits for this one's answer, which resumes.
        connection.pauseReceiving()
        guard line.count <= ControlServer.lineLengthMax,
            let text = String(validating: line, as: UTF8.self),
            let request = ControlRequest(line: text)
        else { return fail("a request is: verb key=value ...") }
        onRequest(request, self)
    }

    package func connectionReceivedPayload(_ connection: Connection) {}
    /// A client may close its side and still read the answer.
    package func connectionReceivedEnd(_ connection: Connection) {
        if !isAnswering { connection.finish() }
    }
    package func connectionClosed(_ connection: Connection, reason: CloseReason) {
        self.connection = nil
    }
}
