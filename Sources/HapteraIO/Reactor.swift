import CHaptera
import Glibc
import HapteraCore

/// Names a registered handler.
package struct HandlerID: BitwiseCopyable, Equatable, Sendable {
    var index: Int32
    var generation: UInt32
    package static let none = HandlerID(index: -1, generation: 0)
}

/// Names a file registered with a reactor.
package struct FileID: BitwiseCopyable, Hashable, Sendable {
    var index: Int32
}

/// Is told of what it asked the reactor for.
package protocol CompletionHandler: AnyObject {
    /// `token` is the one the operation was started with. `result`: bytes transferred, poll events,
    /// 0 for a sync, punch or timer, or a negative errno.
    func completed(token: UInt64, result: Int)
}

/// Is told when all completions of a turn have been handled; now and then once more in the same
/// turn.
package protocol TurnHandler: AnyObject {
    /// Before what was sent in this turn goes to the kernel.
    func turnEnded()
}

/// One thread's event loop: files, sockets, timers and messages from other threads, over io_uring
/// or over libaio and epoll. Everything but `mailbox` belongs to the thread that made it: it must
/// be made on the thread that runs it.
///
/// A turn: flush connections that have something to send -> submit and wait -> handle every
/// completion -> messages, timers, turn hooks -> again. Nothing is allocated per I/O.
///
/// Handlers are called from the loop only, never from within the call that started an operation.
package final class Reactor {
    package struct Options: Sendable {
        package var backend = Backend.automatic
        /// Bytes at the start of the pool that are registered (and thereby pinned). The pool hands
        /// buffers out last-in first-out, so these are the warm ones.
        package var registeredBytesMax = 4 << 20
        package init(backend: Backend = .automatic) { self.backend = backend }
    }
    /// Operations in flight at once, over all files and sockets; a file's users keep to half of it.
    package static let operationsMax = 4096
    /// Connections and listeners at once; a listener stops accepting at this number.
    package static let connectionsMax = 512

    package let pool: BufferPool
    /// Safe to use from any thread.
    package let mailbox: Mailbox
    /// When the current turn began.
    package internal(set) var now: Instant
    /// Consulted before each file operation, if set.
    package var completionFault: (any CompletionFault)?

    let driver: Driver
    let slab: OperationSlab
    let timers: TimerQueue
    let batches = SendBatchPool()
    private struct HandlerEntry {
        var handler: (any CompletionHandler)?
        var generation: UInt32
    }
    private var handlers: [HandlerEntry] = []
    private var freeHandlers: [Int32] = []
    private var turnHooks: [any TurnHandler] = []
    /// Operations that ended without the kernel, delivered in the next turn.
    let ended = ValueQueue<Completion>()
    let held = ValueQueue<Completion>()
    var files: [FileEntry] = []
    /// Connections with something to send, and those that want to go on receiving.
    private var dirty: [Connection] = []
    private var resumable: [Connection] = []
    private var poolWaiters: [Connection] = []
    private var isStopped = false
    private var needsTurn = false
    private(set) var connectionCount = 0

    package convenience init(backend: Backend = .automatic, pool: BufferPool = BufferPool())
        throws(IOError)
    {
        try self.init(options: Options(backend: backend), pool: pool)
    }
    package init(options: Options, pool: BufferPool) throws(IOError) {
        self.pool = pool
        mailbox = try Mailbox()
        driver = try Driver(backend: options.backend, operations: Self.operationsMax)
        slab = OperationSlab(capacity: Self.operationsMax)
        timers = try TimerQueue()
        now = Clock.monotonic()
        dirty.reserveCapacity(Self.connectionsMax)
        resumable.reserveCapacity(Self.connectionsMax)
        driver.register(
            buffer: pool.whole.slice(0, min(options.registeredBytesMax, pool.whole.count)))
        let mailboxHandler = MailboxHandler(self)
        mailboxHandler.id = register(mailboxHandler)
        mailboxHandler.arm()
        let timerHandler = TimerHandler(self)
        timerHandler.id = register(timerHandler)
        timerHandler.arm()
    }

    /// "uring" or "aio".
    package var backendName: String { driver.name }

    // MARK: Running

    /// Runs until `stop`. What is still in flight then is abandoned: close connections and let file
    /// operations complete before stopping, or end the process.
    package func run() {
        isStopped = false
        while !isStopped { turn(block: true) }
    }
    /// Runs until the condition, tested after each turn, holds.
    package func run(until condition: () -> Bool) {
        while !condition() { turn(block: true) }
    }
    package func stop() { isStopped = true }
    /// Runs `message` on the reactor's thread.
    package func post(_ message: @escaping Mailbox.Message) { mailbox.post(message) }

    private func turn(block: Bool) {
        flush()
        timers.arm()
        let canWait =
            block && !needsTurn && ended.isEmpty && resumable.isEmpty && dirty.isEmpty
        needsTurn = false
        var count = driver.wait(block: canWait)
        now = Clock.monotonic()
        for _ in 0..<ended.count {
            if let completion = ended.popFirst() { deliver(completion) }
        }
        while count > 0 {
            for index in 0..<count { handle(driver.completion(index)) }
            count = count == Driver.batchMax ? driver.wait(block: false) : 0
        }
        if !resumable.isEmpty { resume() }
        for hook in turnHooks { hook.turnEnded() }
        if !poolWaiters.isEmpty {
            retryPoolWaiters()
            for hook in turnHooks { hook.turnEnded() }
        }
    }

    private func handle(_ completion: Completion) {
        let id = OperationID(rawValue: completion.userData)
        let slot = slab.slot(id)
        if slot.fault != .none, !apply(slot.fault, to: completion) { return }
        deliver(completion)
    }

    /// Ends the operation and tells its handler.
    func deliver(_ completion: Completion) {
        let id = OperationID(rawValue: completion.userData)
        let slot = slab.slot(id)
        slab.free(id)
        guard let handler = handler(slot.handler) else { return }
        var result = completion.result
        if case .failAfter(let number) = slot.fault { result = -Int(number) }
        handler.completed(token: slot.token, result: result)
    }

    private func flush() {
        // A connection may close here, which makes it dirty again: handled in the next turn.
        let count = dirty.count
        for index in 0..<count { dirty[index].flush() }
        dirty.removeFirst(count)
    }
    private func resume() {
        let count = resumable.count
        for index in 0..<count { resumable[index].resumeNow() }
        resumable.removeFirst(count)
    }
    /// Buffers are released only within turns, so the end of each is the time to try again.
    private func retryPoolWaiters() {
        let count = poolWaiters.count
        for index in 0..<count { poolWaiters[index].resumeReceiving() }
        poolWaiters.removeFirst(count)
        resume()
    }
    func waitForPool(_ connection: Connection) { poolWaiters.append(connection) }
    /// The connection has something to send or to tear down at the end of this turn.
    func markDirty(_ connection: Connection) { dirty.append(connection) }
    /// The connection wants `resumeNow` in the next turn.
    func markResumable(_ connection: Connection) { resumable.append(connection) }
    func connectionOpened() { connectionCount += 1 }
    func connectionClosed() {
        connectionCount -= 1
        // Its owner was told after this turn's hooks had run.
        needsTurn = true
        // It may have given buffers back.
        for connection in poolWaiters { connection.resumeReceiving() }
        poolWaiters.removeAll(keepingCapacity: true)
    }

    // MARK: Handlers

    /// The reactor keeps the handler until `unregister`.
    package func register(_ handler: any CompletionHandler) -> HandlerID {
        if let index = freeHandlers.popLast() {
            handlers[Int(index)].handler = handler
            return HandlerID(index: index, generation: handlers[Int(index)].generation)
        }
        handlers.append(HandlerEntry(handler: handler, generation: 0))
        return HandlerID(index: Int32(handlers.count - 1), generation: 0)
    }
    /// Completions still to come for it are dropped; memory they use must outlive them.
    package func unregister(_ id: HandlerID) {
        guard handler(id) != nil else { return }
        handlers[Int(id.index)].handler = nil
        handlers[Int(id.index)].generation &+= 1
        freeHandlers.append(id.index)
    }
    func handler(_ id: HandlerID) -> (any CompletionHandler)? {
        guard id.index >= 0, handlers[Int(id.index)].generation == id.generation else {
            return nil
        }
        return handlers[Int(id.index)].handler
    }
    /// Called once per turn, in the order they were added, for the reactor's life.
    package func addTurnHook(_ handler: any TurnHandler) { turnHooks.append(handler) }

    // MARK: Timers

    /// Calls the handler with result 0 every `milliseconds`. A late turn skips what it missed.
    @discardableResult
    package func timer(everyMilliseconds: Int, handler: HandlerID, token: UInt64) -> TimerID {
        precondition(everyMilliseconds > 0)
        return timers.add(
            after: everyMilliseconds, period: everyMilliseconds, handler: handler, token: token,
            now: Clock.monotonic())
    }
    /// Calls the handler with result 0 once.
    @discardableResult
    package func timer(afterMilliseconds: Int, handler: HandlerID, token: UInt64) -> TimerID {
        timers.add(
            after: afterMilliseconds, period: 0, handler: handler, token: token,
            now: Clock.monotonic())
    }
    /// After this the timer's handler is not called again. A timer that has ended is ignored.
    package func cancel(_ timer: TimerID) { timers.remove(timer) }

    // MARK: Sockets and other descriptors

    /// Waits once until `fd` is ready for `events` (POLLIN or POLLOUT).
    @discardableResult
    func poll(_ fd: Int32, events: Int32, handler: HandlerID, token: UInt64) -> OperationID {
        var operation = haptera_operation()
        operation.kind = HAPTERA_POLL.rawValue
        operation.mode = UInt32(events)
        return start(&operation, fd: fd, handler: handler, token: token)
    }

    /// Starts a socket operation.
    func start(
        _ operation: inout haptera_operation, fd: Int32, handler: HandlerID, token: UInt64
    ) -> OperationID {
        let id = slab.allocate(OperationSlot(state: .socket, handler: handler, token: token))
        operation.fd = fd
        operation.file_index = -1
        operation.buffer_index = -1
        operation.user_data = id.rawValue
        driver.prepare(&operation)
        return id
    }

    /// Asks for an early end of a socket operation; its completion (-ECANCELED or its real result)
    /// still arrives.
    func cancel(_ id: OperationID, fd: Int32) {
        var operation = haptera_operation()
        operation.kind = HAPTERA_CANCEL.rawValue
        operation.fd = fd
        operation.offset = id.rawValue
        operation.file_index = -1
        operation.buffer_index = -1
        operation.user_data = UInt64.max
        driver.prepare(&operation)
    }

    /// A polled descriptor goes to a new owner.
    func driverForget(_ fd: Int32) { driver.forget(fd) }
    /// Closes a descriptor that was polled or used by a connection.
    func closeDescriptor(_ fd: Int32) {
        driver.forget(fd)
        close(fd)
    }
}

/// Runs the mailbox's messages.
private final class MailboxHandler: CompletionHandler {
    private unowned let reactor: Reactor
    var id = HandlerID.none
    init(_ reactor: Reactor) { self.reactor = reactor }
    func arm() { reactor.poll(reactor.mailbox.event, events: POLLIN, handler: id, token: 0) }
    func completed(token: UInt64, result: Int) {
        for message in reactor.mailbox.take() { message(reactor) }
        arm()
    }
}

/// Fires due timers.
private final class TimerHandler: CompletionHandler {
    private unowned let reactor: Reactor
    var id = HandlerID.none
    init(_ reactor: Reactor) { self.reactor = reactor }
    func arm() { reactor.poll(reactor.timers.descriptor, events: POLLIN, handler: id, token: 0) }
    func completed(token: UInt64, result: Int) {
        reactor.timers.acknowledge()
        while let due = reactor.timers.popDue(now: reactor.now) {
            reactor.handler(due.handler)?.completed(token: due.token, result: 0)
        }
        arm()
    }
}
