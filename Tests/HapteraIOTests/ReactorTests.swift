import CHaptera
import Glibc
import HapteraCore
import Testing

@testable import HapteraIO

@Suite(.serialized) struct ReactorTests {
    @Test(arguments: backends) func timers(_ backend: Backend) throws {
        try withReactor(backend) { reactor in
            let recorder = Recorder()
            let handler = reactor.register(recorder)
            let start = Clock.monotonic()
            reactor.timer(afterMilliseconds: 30, handler: handler, token: 2)
            let periodic = reactor.timer(everyMilliseconds: 5, handler: handler, token: 1)
            let never = reactor.timer(afterMilliseconds: 10, handler: handler, token: 3)
            reactor.cancel(never)
            reactor.run(until: { recorder.last(2) != nil })
            #expect(Clock.monotonic().nanoseconds(since: start) >= 30_000_000)
            #expect(recorder.results[1, default: []].count >= 2)
            reactor.cancel(periodic)
            let count = recorder.count
            reactor.timer(afterMilliseconds: 20, handler: handler, token: 4)
            reactor.run(until: { recorder.last(4) != nil })
            #expect(recorder.count == count + 1)
            #expect(recorder.last(3) == nil)
        }
    }

    /// 10,000 messages from two threads arrive in each thread's order, on the reactor's thread.
    @Test(arguments: backends) func mailbox(_ backend: Backend) throws {
        try withReactor(backend) { reactor in
            let sums = Sums()
            for thread in 0..<2 { sums.start(thread, reactor.mailbox) }
            reactor.run()
            #expect(sums.isOrdered)
            #expect(sums.total == 10_000)
        }
    }

    @Test(arguments: backends) func turnHookRunsAfterCompletions(_ backend: Backend) throws {
        try withReactor(backend) { reactor in
            let recorder = Recorder()
            let hook = Hook(recorder)
            reactor.addTurnHook(hook)
            reactor.timer(
                afterMilliseconds: 1, handler: reactor.register(recorder), token: 7)
            reactor.run(until: { hook.seen > 0 })
            #expect(recorder.last(7) == 0)
        }
    }

    @Test func backendIsChosenByName() throws {
        #expect(try Reactor(backend: .uring).backendName == "uring")
        #expect(try Reactor(backend: .aio).backendName == "aio")
    }

    /// A handler that was unregistered hears nothing, even if its place is taken by another.
    @Test(arguments: backends) func unregisteredHandlerHearsNothing(_ backend: Backend) throws {
        try withReactor(backend) { reactor in
            let gone = Recorder()
            let other = Recorder()
            let id = reactor.register(gone)
            reactor.timer(afterMilliseconds: 1, handler: id, token: 1)
            reactor.unregister(id)
            let successor = reactor.register(other)
            reactor.timer(afterMilliseconds: 5, handler: successor, token: 2)
            reactor.run(until: { other.count > 0 })
            #expect(gone.count == 0)
            #expect(other.results == [2: [0]])
        }
    }

    @Test(arguments: backends) func signals(_ backend: Backend) throws {
        try withReactor(backend) { reactor in
            var seen: [Int32] = []
            let watcher = try SignalWatcher(reactor: reactor, signals: [SIGUSR2]) {
                seen.append($0)
            }
            // To this thread only: others of the test process have not blocked it.
            pthread_kill(pthread_self(), SIGUSR2)
            reactor.expect("signal seen") { seen == [SIGUSR2] }
            withExtendedLifetime(watcher) {}
        }
    }
}

private final class Hook: TurnHandler {
    let recorder: Recorder
    var seen = 0
    init(_ recorder: Recorder) { self.recorder = recorder }
    func turnEnded() { seen = recorder.count }
}

/// Touched on the reactor's thread only; the threads just post.
private final class Sums: @unchecked Sendable {
    // SAFETY: `last`, `total` and `isOrdered` are used by messages, on the reactor's thread.
    var last = [-1, -1]
    var total = 0
    var isOrdered = true

    func start(_ thread: Int, _ mailbox: Mailbox) {
        Task.detached {
            for index in 0..<5000 {
                mailbox.post { reactor in
                    if self.last[thread] != index - 1 { self.isOrdered = false }
                    self.last[thread] = index
                    self.total += 1
                    if self.total == 10_000 { reactor.stop() }
                }
            }
        }
    }
}
