import CHaptera
import Glibc
import HapteraCore
import Testing

@testable import HapteraIO

/// Every test of the reactor runs on both.
let backends: [Backend] = [.uring, .aio]

/// The reactors of these tests are few at a time: each holds kernel memory.
func withReactor(
    _ backend: Backend, limits: BufferPool.Limits = .init(small: 512, medium: 32, large: 16),
    _ body: (Reactor) throws -> Void
) throws {
    let reactor = try Reactor(backend: backend, pool: BufferPool(limits: limits))
    try body(reactor)
    // Nothing of a finished test may be left: buffers, connections.
    #expect(reactor.pool.inUse == 0)
    #expect(reactor.connectionCount == 0)
}

extension Reactor {
    /// Runs until the condition holds; a failure instead of a hang after 20 s.
    func expect(
        _ what: Comment, _ location: SourceLocation = #_sourceLocation, _ condition: () -> Bool
    ) {
        let limit = Clock.monotonic().adding(milliseconds: 20_000)
        let handler = register(Ignoring())
        let wake = timer(everyMilliseconds: 100, handler: handler, token: 0)
        run(until: { condition() || Clock.monotonic() > limit })
        cancel(wake)
        unregister(handler)
        #expect(condition(), what, sourceLocation: location)
    }
}

final class Ignoring: CompletionHandler {
    func completed(token: UInt64, result: Int) {}
}

/// Records completions by token.
final class Recorder: CompletionHandler {
    var results: [UInt64: [Int]] = [:]
    var count = 0
    func completed(token: UInt64, result: Int) {
        results[token, default: []].append(result)
        count += 1
    }
    func last(_ token: UInt64) -> Int? { results[token]?.last }
}

/// A connected pair of blocking stream sockets.
func socketPair() -> (Int32, Int32) {
    var pair: [Int32] = [0, 0]
    let result = unsafe socketpair(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0, &pair)
    precondition(result == 0)
    return (pair[0], pair[1])
}

/// Descriptors this process has open.
func openDescriptors() -> Int {
    var count = 0
    for fd in 0..<Int32(4096) where fcntl(fd, F_GETFD) >= 0 { count += 1 }
    return count
}

final class TemporaryDirectory {
    let path: String
    init() {
        path = "/var/tmp/haptera-io-\(hexadecimal(randomUInt64()))"
        precondition(unsafe mkdir(path, 0o700) == 0)
    }
    func file(_ name: String) -> String { "\(path)/\(name)" }
    deinit {
        if let directory = unsafe opendir(path) {
            while let entry = unsafe readdir(directory) {
                let name = unsafe withUnsafePointer(to: &entry.pointee.d_name) {
                    unsafe $0.withMemoryRebound(to: CChar.self, capacity: 256) {
                        unsafe String(cString: $0)
                    }
                }
                _ = unsafe unlink(file(name))
            }
            unsafe closedir(directory)
        }
        _ = unsafe rmdir(path)
    }
}

func fill(_ memory: RawMemory, seed: UInt64) {
    var state = seed | 1
    var at = 0
    while at + 8 <= memory.count {
        state ^= state << 13
        state ^= state >> 7
        state ^= state << 17
        memory.store(state, at)
        at += 8
    }
}

/// A name server, or a disk, that is silent until it is told to answer, once for each `release`.
final class SilentServer: Sendable {
    private let pipe: (read: Int32, write: Int32)
    init() {
        var ends: [Int32] = [0, 0]
        let result = unsafe Glibc.pipe(&ends)
        precondition(result == 0)
        pipe = (ends[0], ends[1])
    }
    deinit {
        close(pipe.read)
        close(pipe.write)
    }
    func release() {
        let written = unsafe write(pipe.write, [1], 1)
        precondition(written == 1)
    }
    func wait() {
        var byte: UInt8 = 0
        let got = unsafe read(pipe.read, &byte, 1)
        precondition(got == 1)
    }
    /// Every name is the host's own, when it answers.
    func resolver(_ answer: Result<String, IOError> = .success("127.0.0.1")) -> NameResolver {
        NameResolver { [self] _ in
            wait()
            return answer
        }
    }
}
