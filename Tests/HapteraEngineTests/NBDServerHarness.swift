import Glibc
import HapteraCore
import HapteraIO

@testable import HapteraEngine

/// A device that does nothing until it is told to.
final class HeldDevice: BlockDevice {
    let name = "vol"
    var size: UInt64 = 1 << 40
    let isReadOnly = false
    var snapshots: [VolumeRecord.Snapshot] = []
    let zeroesFastWithoutHole = true
    let pool: BufferPool
    var operationsMax = Int.max
    weak var frontend: (any BlockDeviceFrontend)?
    private(set) var held: [Operation] = []
    /// Every operation ever submitted.
    private(set) var seen: [Operation] = []

    init(pool: BufferPool) { self.pool = pool }
    var canSubmit: Bool { held.count < operationsMax }
    func submit(_ operation: Operation) {
        held.append(operation)
        seen.append(operation)
    }
    func completeReady() -> Bool { false }
    private(set) var cancelled: [UInt32] = []
    func cancel(session: UInt32) { cancelled.append(session) }

    /// Completes the held operation at `index`.
    func complete(
        _ index: Int = 0, _ result: OperationResult = .ok, isHole: Bool = false,
        extents: [(UInt64, BlockState)] = []
    ) {
        let operation = held.remove(at: index)
        for (index, extent) in extents.enumerated() {
            pool.memory(operation.buffer).store(extent.0, index * 16)
            pool.memory(operation.buffer).store(UInt64(extent.1.rawValue), index * 16 + 8)
        }
        frontend?.complete(
            userData: operation.userData, result: result, buffer: operation.buffer,
            tableLength: Int32(extents.count * 16), isHole: isHole)
    }
    func completeAll() {
        while !held.isEmpty { complete() }
    }
}

/// A server on a reactor that runs in the test's own thread, and its clients' ends of socket pairs.
final class NBDServerHarness {
    let reactor: Reactor
    let device: HeldDevice
    let server: NBDServer
    private var ends: [Int32] = []

    init(
        limits: NBDServer.Limits = .init(), pool: BufferPool.Limits = .init(),
        backend: Backend = .automatic, offersLive: Bool = true
    ) throws {
        reactor = try Reactor(backend: backend, pool: BufferPool(limits: pool))
        device = HeldDevice(pool: reactor.pool)
        server = NBDServer(
            reactor: reactor, device: device, limits: limits, offersLive: offersLive)
    }
    deinit { for end in ends { close(end) } }

    /// A client that has sent its flags and nothing else.
    func connect() -> Int32 {
        var pair: [Int32] = [-1, -1]
        // SAFETY: room for two descriptors, as socketpair wants.
        let result = unsafe socketpair(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0, &pair)
        precondition(result == 0)
        let flags = fcntl(pair[0], F_GETFL)
        _ = fcntl(pair[0], F_SETFL, flags | O_NONBLOCK)
        ends.append(pair[0])
        server.accept(pair[1])
        send(pair[0], [0, 0, 0, 3])
        return pair[0]
    }
    /// A client in transmission, its greeting read. `export`: empty for the live volume.
    func join(structured: Bool = true, export: String = "") -> Int32 {
        let end = connect()
        var expected = 18
        if structured {
            send(end, NBDBytes.option(8))
            expected += 20
        }
        send(end, NBDBytes.option(1, Array(export.utf8)))
        _ = receive(end, expected + 10)
        return end
    }

    /// All of `bytes`, as far as the server still listens.
    func send(_ end: Int32, _ bytes: [UInt8]) {
        var sent = 0
        run("nothing is read") {
            let rest = [UInt8](bytes[sent...])
            // SAFETY: the array's memory is valid during the call.
            let count = unsafe Glibc.send(end, rest, rest.count, Int32(MSG_NOSIGNAL))
            if count < 0 && errno == EPIPE { return true }
            sent += max(count, 0)
            return sent == bytes.count
        }
    }
    /// Exactly `count` bytes.
    func receive(_ end: Int32, _ count: Int) -> [UInt8] {
        var bytes: [UInt8] = []
        run("only \(bytes.count) of \(count) bytes came") {
            bytes += self.available(end, count - bytes.count)
            return bytes.count == count
        }
        return bytes
    }
    /// What is there now, up to `count` bytes.
    func available(_ end: Int32, _ count: Int = 1 << 20) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: count)
        // SAFETY: the array has room for `count` bytes.
        let got = unsafe recv(end, &bytes, count, 0)
        return [UInt8](bytes.prefix(max(got, 0)))
    }
    /// Throws away what is there now; returns how much.
    func drain(_ end: Int32) -> Int {
        // SAFETY: the block has room for the bytes asked for.
        max(0, unsafe recv(end, sink.memory.base, sink.memory.count, 0))
    }
    private let sink = MemoryBlock(count: 1 << 20)
    /// Whether the server's end of the stream came, after whatever else it sent.
    func isClosed(_ end: Int32) -> Bool {
        var byte: UInt8 = 0
        while true {
            // SAFETY: one byte, valid during the call.
            let got = unsafe recv(end, &byte, 1, 0)
            if got == 0 || got < 0 && errno == ECONNRESET { return true }
            if got < 0 { return false }
        }
    }
    func disconnect(_ end: Int32) {
        ends.removeAll { $0 == end }
        close(end)
    }

    /// Runs turns until the condition holds; stops the test after half a minute.
    func run(_ failure: @autoclosure () -> String, until condition: () -> Bool) {
        if condition() { return }
        let limit = Clock.monotonic().adding(milliseconds: 30_000)
        let waker = Waker()
        let id = reactor.register(waker)
        let timer = reactor.timer(everyMilliseconds: 1, handler: id, token: 0)
        reactor.run { condition() || Clock.monotonic() > limit }
        reactor.cancel(timer)
        reactor.unregister(id)
        guard Clock.monotonic() <= limit else { fatalError("timed out: \(failure())") }
    }
    func runUntilHeld(_ count: Int) {
        run("\(device.held.count) operations, not \(count)") { device.held.count == count }
    }
    /// Everything the server had to do is done: nothing new happens in a few turns.
    func settle() {
        var turns = 0
        run("never") {
            turns += 1
            return turns > 5
        }
    }
}

private final class Waker: CompletionHandler {
    func completed(token: UInt64, result: Int) {}
}

enum NBDBytes {
    private static func bigEndian<T: FixedWidthInteger>(_ value: T) -> [UInt8] {
        stride(from: T.bitWidth - 8, through: 0, by: -8).map {
            UInt8(truncatingIfNeeded: value >> $0)
        }
    }
    static func option(_ option: UInt32, _ data: [UInt8] = []) -> [UInt8] {
        bigEndian(NBDMagic.option) + bigEndian(option) + bigEndian(UInt32(data.count)) + data
    }
    /// SET_META_CONTEXT of base:allocation.
    static func allocationContext(_ export: String) -> [UInt8] {
        contexts(export, ["base:allocation"])
    }
    static func contexts(_ export: String, _ queries: [String]) -> [UInt8] {
        var data = bigEndian(UInt32(export.utf8.count)) + export.utf8
        data += bigEndian(UInt32(queries.count))
        for query in queries { data += bigEndian(UInt32(query.utf8.count)) + query.utf8 }
        return option(10, data)
    }
    static func go(_ export: String) -> [UInt8] {
        option(7, bigEndian(UInt32(export.utf8.count)) + export.utf8 + [0, 0])
    }
    static func request(
        _ command: NBDCommand, offset: UInt64 = 0, length: Int = 0, flags: NBDCommandFlags = [],
        cookie: UInt64 = 1
    ) -> [UInt8] {
        bigEndian(NBDMagic.request) + bigEndian(flags.rawValue) + bigEndian(command.rawValue)
            + bigEndian(cookie) + bigEndian(offset) + bigEndian(UInt32(length))
    }
    static func simple(_ error: NBDError = .none, cookie: UInt64 = 1) -> [UInt8] {
        bigEndian(NBDMagic.simpleReply) + bigEndian(error.rawValue) + bigEndian(cookie)
    }
}
