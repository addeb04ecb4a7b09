import CAllocations
import Glibc
import HapteraCore
import Testing

@testable import HapteraIO

/// A reactor with one O_DIRECT file of 1 MiB, and two 64 KiB buffers.
private final class Setting {
    let reactor: Reactor
    let file: DirectFile
    let id: FileID
    let recorder = Recorder()
    let handler: HandlerID
    let source = MemoryBlock(count: 64 << 10)
    let target = MemoryBlock(count: 64 << 10)

    init(_ reactor: Reactor, path: String) throws {
        self.reactor = reactor
        file = try DirectFile(path: path, create: true)
        try file.resize(1 << 20)
        id = reactor.register(file: file.descriptor, label: "data")
        handler = reactor.register(recorder)
        fill(source.memory, seed: 99)
    }
    func wait(_ token: UInt64) -> Int? {
        let before = recorder.results[token]?.count ?? 0
        reactor.expect("completion") { (recorder.results[token]?.count ?? 0) > before }
        return recorder.last(token)
    }
    func write(_ offset: UInt64 = 0, token: UInt64 = 1) {
        reactor.write(id, from: source.memory, offset: offset, handler: handler, token: token)
    }
    func read(_ offset: UInt64 = 0, token: UInt64 = 2) {
        reactor.read(id, into: target.memory, offset: offset, handler: handler, token: token)
    }
}

/// Answers with a list of effects, then none.
private final class Script: CompletionFault {
    var effects: [FaultEffect]
    var seen: [FileOperation] = []
    init(_ effects: [FaultEffect]) { self.effects = effects }
    func effect(of operation: FileOperation, label: String) -> FaultEffect {
        #expect(label == "data")
        seen.append(operation)
        return effects.isEmpty ? .none : effects.removeFirst()
    }
}

@Suite(.serialized) struct FileTests {
    private func withFile(_ backend: Backend, _ body: (Setting) throws -> Void) throws {
        let directory = TemporaryDirectory()
        try withReactor(backend) { reactor in
            let setting = try Setting(reactor, path: directory.file("data"))
            try body(setting)
            reactor.unregister(setting.id)
        }
    }

    @Test(arguments: backends) func roundTrip(_ backend: Backend) throws {
        try withFile(backend) { file in
            file.write(128 << 10)
            #expect(file.wait(1) == 64 << 10)
            file.reactor.sync(file.id, handler: file.handler, token: 3)
            #expect(file.wait(3) == 0)
            file.read(128 << 10)
            #expect(file.wait(2) == 64 << 10)
            #expect(file.target.memory.equals(file.source.memory))
            file.reactor.punch(
                file.id, offset: 128 << 10, length: 32 << 10, handler: file.handler, token: 4)
            #expect(file.wait(4) == 0)
            file.read(128 << 10)
            #expect(file.wait(2) == 64 << 10)
            #expect(file.target.memory.slice(0, 32 << 10).isZero)
            #expect(!file.target.memory.slice(32 << 10, 32 << 10).isZero)
            file.read((1 << 20) - (32 << 10))
            #expect(file.wait(2) == 32 << 10, "short at the end")
            file.reactor.zero(
                file.id, offset: 128 << 10, length: 64 << 10, handler: file.handler, token: 5)
            #expect(file.wait(5) == 0)
            file.read(128 << 10)
            #expect(file.wait(2) == 64 << 10)
            #expect(file.target.memory.isZero)
        }
    }

    /// 1000 operations in one turn, from registered and other memory.
    @Test(arguments: backends) func manyAtOnce(_ backend: Backend) throws {
        try withFile(backend) { file in
            let pool = file.reactor.pool
            let buffer = try #require(pool.allocate(4096))
            fill(pool.memory(buffer), seed: 5)
            for index in 0..<1000 {
                let memory =
                    index % 2 == 0 ? pool.memory(buffer) : file.source.memory.slice(0, 4096)
                file.reactor.write(
                    file.id, from: memory, offset: UInt64(index % 256) * 4096,
                    handler: file.handler, token: 1)
            }
            file.reactor.expect("all written") { file.recorder.count == 1000 }
            #expect(file.recorder.results[1] == Array(repeating: 4096, count: 1000))
            pool.release(buffer)
        }
    }

    @Test(arguments: backends) func realErrorsArrive(_ backend: Backend) throws {
        try withFile(backend) { file in
            let readOnly = try DirectFile(path: file.file.path, access: .readOnly)
            let id = file.reactor.register(file: readOnly.descriptor, label: "data")
            file.reactor.write(
                id, from: file.source.memory, offset: 0, handler: file.handler, token: 1)
            #expect(file.wait(1) == -Int(EBADF))
            file.reactor.write(
                file.id, from: file.source.memory.slice(0, 100), offset: 1,
                handler: file.handler, token: 1)
            #expect(file.wait(1) == -Int(EINVAL))
            file.reactor.unregister(id)
        }
    }

    @Test(arguments: backends) func injectedFaults(_ backend: Backend) throws {
        try withFile(backend) { file in
            let script = Script([.fail(errno: EIO), .failAfter(errno: ENOSPC), .short(4096 + 100)])
            file.reactor.completionFault = script
            file.write()
            #expect(file.wait(1) == -Int(EIO))
            file.write(64 << 10)
            #expect(file.wait(1) == -Int(ENOSPC))
            file.write(128 << 10)
            #expect(file.wait(1) == 4096)
            file.read()
            #expect(file.wait(2) == 64 << 10)
            #expect(file.target.memory.isZero, "a failed write does not reach the disk")
            file.read(64 << 10)
            #expect(file.wait(2) == 64 << 10)
            #expect(file.target.memory.equals(file.source.memory), "this one did")
            file.read(128 << 10)
            #expect(file.wait(2) == 64 << 10)
            #expect(!file.target.memory.slice(0, 4096).isZero)
            #expect(file.target.memory.slice(4096, 4096).isZero, "the rest was not written")
            #expect(script.seen.first?.kind == .write)
            #expect(script.seen.count == 6)
        }
    }

    @Test(arguments: backends) func lateCompletions(_ backend: Backend) throws {
        try withFile(backend) { file in
            file.reactor.completionFault = Script([.delay(milliseconds: 30), .hold])
            let start = Clock.monotonic()
            file.write()
            #expect(file.wait(1) == 64 << 10)
            #expect(Clock.monotonic().nanoseconds(since: start) >= 30_000_000)
            file.reactor.sync(file.id, handler: file.handler, token: 3)
            file.read()
            #expect(file.wait(2) == 64 << 10)
            file.reactor.expect("held") { file.reactor.heldCount == 1 }
            #expect(file.recorder.last(3) == nil)
            file.reactor.releaseHeld()
            #expect(file.wait(3) == 0)
        }
    }

    /// After warm-up a write costs no allocation, whatever it did before.
    @Test(arguments: backends) func steadyStateAllocatesNothing(_ backend: Backend) throws {
        try #require(haptera_counts_allocations() == 1)
        let directory = TemporaryDirectory()
        try withReactor(backend) { reactor in
            let writer = try Writer(reactor, path: directory.file("data"))
            for _ in 0..<16 { writer.next() }
            reactor.run(until: { writer.done >= 2000 })
            let before = haptera_thread_allocations()
            reactor.run(until: { writer.done >= 6000 })
            #expect(haptera_thread_allocations() - before == 0)
            writer.isStopped = true
            reactor.run(until: { writer.inFlight == 0 })
            #expect(writer.failures == 0)
        }
    }
}

private final class Writer: CompletionHandler {
    let reactor: Reactor
    let file: DirectFile
    let id: FileID
    var handler = HandlerID.none
    let memory = MemoryBlock(count: 4096)
    var done = 0
    var inFlight = 0
    var failures = 0
    var isStopped = false
    init(_ reactor: Reactor, path: String) throws {
        self.reactor = reactor
        file = try DirectFile(path: path, create: true)
        try file.allocate(offset: 0, length: 1 << 20)
        id = reactor.register(file: file.descriptor, label: "data")
        handler = reactor.register(self)
    }
    func next() {
        inFlight += 1
        reactor.write(
            id, from: memory.memory, offset: UInt64(done % 256) * 4096, handler: handler, token: 0)
    }
    func completed(token: UInt64, result: Int) {
        done += 1
        inFlight -= 1
        if result != 4096 { failures += 1 }
        if !isStopped { next() }
    }
}

@Suite struct DirectFileTests {
    private let directory = TemporaryDirectory()

    @Test func createReadWrite() throws {
        let path = directory.file("a")
        let file = try DirectFile(path: path, create: true)
        #expect(throws: StorageError.self) { try DirectFile(path: path, create: true) }
        try file.resize(64 << 10)
        let block = MemoryBlock(count: 8192)
        fill(block.memory, seed: 3)
        try file.write(from: block.memory, offset: 16 << 10)
        try file.sync()
        let back = MemoryBlock(count: 8192)
        #expect(try file.read(into: back.memory, offset: 16 << 10) == 8192)
        #expect(back.memory.equals(block.memory))
        #expect(try file.read(into: back.memory, offset: 60 << 10) == 4096)
        #expect(try file.size() == 64 << 10)
        #expect(try file.nextAllocated(from: 0) == 16384..<24576)
        #expect(try file.nextAllocated(from: 24576) == nil)
        try file.punch(offset: 16 << 10, length: 8192)
        #expect(try file.nextAllocated(from: 0) == nil)
        try DirectFile.syncDirectory(directory.path)
    }

    @Test func errorsNameThePath() {
        let path = directory.file("missing")
        let error = #expect(throws: StorageError.self) { try DirectFile(path: path) }
        #expect(error?.code == .notFound)
        #expect(error?.message.contains(path) == true)
        #expect(error?.message.contains("ENOENT") == true)
    }

    @Test func theLockIsOnTheDescriptor() throws {
        let path = directory.file("locked")
        var first: DirectFile? = try DirectFile(path: path, create: true)
        try first?.lock(waitMilliseconds: 0)
        let second = try DirectFile(path: path)
        let error = #expect(throws: StorageError.self) { try second.lock(waitMilliseconds: 30) }
        #expect(error?.code == .inUse)
        first = nil
        try second.lock(waitMilliseconds: 0)
    }

    @Test func mappedStoresAreInTheFile() throws {
        let file = try DirectFile(path: directory.file("log"), create: true)
        #expect(throws: StorageError.self) { try MappedFile(file, size: 8192) }
        try file.resize(8192)
        let map = try MappedFile(file, size: 8192)
        map.memory.store(UInt64(0x1234), 4096)
        try file.sync()
        let block = MemoryBlock(count: 4096)
        #expect(try file.read(into: block.memory, offset: 4096) == 4096)
        #expect(block.memory.load(UInt64.self, 0) == 0x1234)
    }

    @Test func theBootHasAName() throws {
        let first = try bootID()
        let second = try bootID()
        #expect(first == second)
        #expect(first.high != 0 || first.low != 0)
    }
}
