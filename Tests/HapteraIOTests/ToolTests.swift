import Glibc
import HapteraCore
import Testing

@testable import HapteraIO

@Suite struct ArgumentsTests {
    @Test func everyForm() throws {
        let arguments = try Arguments(
            [
                "serve", "--dir", "/d", "--size=4GiB", "--replica", "a", "--replica=b=c", "--json",
                "--", "--x",
            ], options: ["dir", "size", "replica"], flags: ["json"])
        #expect(arguments.positional == ["serve", "--x"])
        #expect(try arguments.required("dir") == "/d")
        #expect(arguments.all("replica") == ["a", "b=c"])
        #expect(arguments.has("json"))
        #expect(try arguments.parse("size", "a size", Arguments.byteCount) == 4 << 30)
        #expect(try arguments.value("none") == nil)
    }
    @Test func errorsSayWhat() {
        func message(_ words: [String], _ body: (Arguments) throws -> Void = { _ in }) -> String? {
            let error = #expect(throws: UsageError.self) {
                try body(try Arguments(words, options: ["dir"], flags: ["json"]))
            }
            return error?.message
        }
        #expect(message(["--what"]) == "unknown option '--what'")
        #expect(message(["-d"]) == "unknown option '-d'")
        #expect(message(["--dir"]) == "--dir needs a value")
        #expect(message(["--json=1"]) == "--json takes no value")
        #expect(message([]) { _ = try $0.required("dir") } == "--dir is missing")
        #expect(
            message(["--dir", "a", "--dir", "b"]) { _ = try $0.value("dir") }
                == "--dir is given more than once")
        #expect(
            message(["--dir", "x"]) { _ = try $0.parse("dir", "a size", Arguments.byteCount) }
                == "--dir: 'x' is not a size")
    }
    @Test func sizes() {
        #expect(Arguments.byteCount("1KiB") == 1024)
        #expect(Arguments.byteCount("17") == 17)
        #expect(Arguments.byteCount("99999999TiB") == nil)
        #expect(Arguments.byteCount("-1") == nil)
        #expect(Arguments.byteCount("KiB") == nil)
    }
}

@Suite struct FaultRulesTests {
    @Test func rulesHitWhatTheySay() throws {
        let rules = try FaultRules(
            parsing: "write:data:EIO:every=3;sync:any:delay=5:at=2;any:log:after-ENOSPC:from=2")
        func effect(_ kind: FileOperation.Kind, _ label: String) -> FaultEffect {
            rules.effect(
                of: FileOperation(kind: kind, file: FileID(index: 0), offset: 0, length: 8192),
                label: label)
        }
        #expect(
            (0..<6).map { _ in effect(.write, "data") } == [
                .none, .none, .fail(errno: EIO), .none, .none, .fail(errno: EIO),
            ])
        #expect(effect(.sync, "data") == .none)
        #expect(effect(.sync, "table") == .delay(milliseconds: 5))
        #expect(effect(.read, "log") == .none)
        #expect(effect(.sync, "log") == .failAfter(errno: ENOSPC))
        let short = try FaultRules(parsing: "read:any:short")
        #expect(
            short.effect(
                of: FileOperation(kind: .read, file: FileID(index: 0), offset: 0, length: 8192),
                label: "x") == .short(4096))
    }
    @Test(arguments: [
        "", "write", "write:data", "write::EIO", "erase:data:EIO", "write:data:EWHAT",
        "write:data:delay=x", "write:data:EIO:at=0", "write:data:EIO:often", "a:b:c:d:e",
    ])
    func nonsenseIsRefused(_ text: String) {
        #expect(throws: IOError.self) { try FaultRules(parsing: text) }
    }
}

@Suite struct LogTests {
    @Test func oneLinePerEvent() {
        #expect(Log.timestamp(1_700_000_000_123_456_789) == "2023-11-14T22:13:20.123Z")
        #expect(Log.timestamp(951_782_399_000_000_000) == "2000-02-28T23:59:59.000Z")
        let line = Log.format(
            time: "T", level: .warn, message: "lost\nfound",
            fields: [("a", "1"), ("b", "x y"), ("c", "q\"\\")])
        #expect(line == #"T warn lost found a=1 b="x y" c="q\"\\""# + "\n")
    }
}

@Suite struct BlockHashTests {
    /// FIPS 180-2: SHA-256("abc") begins ba7816bf 8f01cfea 414140de 5dae2223.
    @Test func knownVector() {
        let block = MemoryBlock(count: 3)
        block.memory.copy(from: Array("abc".utf8))
        for _ in 0..<2 {
            let hash = BlockHash.hash(block.memory)
            #expect(hash.low == UInt64(0xba78_16bf_8f01_cfea).byteSwapped)
            #expect(hash.high == UInt64(0x4141_40de_5dae_2223).byteSwapped)
        }
    }
}

@Suite struct SocketAddressTests {
    @Test func parsing() {
        #expect(SocketAddress(tcp: "127.0.0.1:80") == .tcp(host: "127.0.0.1", port: 80))
        #expect(SocketAddress(tcp: "[::1]:80")?.text == "[::1]:80")
        for text in ["", ":80", "host", "host:", "host:99999", "::1:80", "host:-1"] {
            #expect(SocketAddress(tcp: text) == nil, "\(text)")
        }
    }
}

private final class Verbs: ControlHandler {
    var pending: [ControlRequest] = []
    func control(_ request: ControlRequest) {
        switch request.verb {
        case "echo":
            request.reply(request.arguments.sorted { $0.key < $1.key }.map { ($0.key, $0.value) })
        case "later": pending.append(request)
        default: request.fail("unknown verb '\(request.verb)'")
        }
    }
}

/// Sends text and keeps what comes back.
private final class Caller: ConnectionDelegate {
    var text = ""
    var closed: CloseReason?
    func connection(_ connection: Connection, received memory: RawMemory) -> Int {
        text += String(decoding: memory.bytes(), as: UTF8.self)
        return memory.count
    }
    func connectionReceivedPayload(_ connection: Connection) {}
    func connectionClosed(_ connection: Connection, reason: CloseReason) { closed = reason }
}

@Suite(.serialized) struct ControlServerTests {
    private func withCaller(
        _ backend: Backend, _ body: (Reactor, Verbs, Connection, Caller) throws -> Void
    ) throws {
        let directory = TemporaryDirectory()
        try withReactor(backend) { reactor in
            let verbs = Verbs()
            let path = directory.file("control")
            let server = try ControlServer(reactor: reactor, path: path, handler: verbs)
            let caller = Caller()
            var connection: Connection?
            _ = Connector(
                reactor: reactor, address: .unix(path: path), timeoutMilliseconds: 1000
            ) {
                if case .success(let fd) = $0 {
                    connection = Connection(reactor: reactor, fd: fd, delegate: caller)
                }
            }
            reactor.expect("connected") { connection != nil }
            let open = try #require(connection)
            try body(reactor, verbs, open, caller)
            server.close()
            open.close()
            reactor.expect("all closed") { reactor.connectionCount == 0 }
        }
    }
    private func send(_ connection: Connection, _ text: String) {
        let block = MemoryBlock(count: text.utf8.count)
        block.memory.copy(from: Array(text.utf8))
        connection.send(copying: block.memory)
    }

    @Test(arguments: backends) func requestsAreAnsweredInOrder(_ backend: Backend) throws {
        try withCaller(backend) { reactor, verbs, connection, caller in
            send(connection, "later\necho b=2 a=x=y\nwhat\necho x\n")
            reactor.expect("first arrived") { verbs.pending.count == 1 }
            #expect(caller.text == "")
            verbs.pending[0].reply([("k", "two\nlines")])
            let expected =
                "ok\nk=two lines\n\nok\na=x=y\nb=2\n\nerror unknown verb 'what'\n\n"
                + "error 'x' is not key=value\n\n"
            reactor.expect("all answered") { caller.text.utf8.count >= expected.utf8.count }
            #expect(caller.text == expected)
        }
    }
    @Test(arguments: backends) func aRequestHasABound(_ backend: Backend) throws {
        try withCaller(backend) { reactor, _, connection, caller in
            send(connection, String(repeating: "x", count: 70_000))
            reactor.expect("hung up") { caller.closed != nil }
            #expect(caller.text.hasPrefix("error the request is longer"))
        }
    }
    /// The caller of a pending request leaves: the answer is dropped, nothing else happens.
    @Test(arguments: backends) func callerLeaves(_ backend: Backend) throws {
        try withCaller(backend) { reactor, verbs, connection, caller in
            send(connection, "later\n")
            reactor.expect("arrived") { verbs.pending.count == 1 }
            connection.close()
            reactor.expect("closed") { caller.closed != nil }
            var isDone = false
            verbs.pending[0].reply()
            verbs.pending[0].afterReply { isDone = true }
            reactor.expect("told") { isDone }
        }
    }
}
