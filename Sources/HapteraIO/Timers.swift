import CHaptera
import Glibc
import HapteraCore

/// The operating system's clocks and randomness.
package enum Clock {
    /// CLOCK_BOOTTIME: never steps, and counts the time a host is suspended.
    package static func monotonic() -> Instant { Instant(rawValue: read(CLOCK_BOOTTIME)) }
    /// Nanoseconds since 1970, UTC: for people, never for decisions.
    package static func wallNanoseconds() -> UInt64 { read(CLOCK_REALTIME) }

    private static func read(_ clock: clockid_t) -> UInt64 {
        var time = timespec()
        // SAFETY: `time` is a local that outlives the call; both clocks always exist.
        unsafe clock_gettime(clock, &time)
        return UInt64(time.tv_sec) * 1_000_000_000 + UInt64(time.tv_nsec)
    }
}

/// 64 random bits from the kernel.
package func randomUInt64() -> UInt64 { haptera_random() }

/// Names a timer.
package struct TimerID: BitwiseCopyable, Equatable, Sendable {
    var rawValue: UInt64
    package static let none = TimerID(rawValue: 0)
}

/// A reactor's timers: few, so a plain list. One timerfd is armed for the earliest.
final class TimerQueue {
    struct Entry {
        var id: TimerID
        var deadline: Instant
        var periodMilliseconds: Int
        var handler: HandlerID
        var token: UInt64
    }
    let descriptor: Int32
    private var entries: [Entry] = []
    private var nextID: UInt64 = 1
    private var armed: Instant?
    private var isChanged = false

    init() throws(IOError) {
        descriptor = haptera_timerfd()
        guard descriptor >= 0 else { throw IOError(errno: -descriptor, "cannot make a timerfd") }
    }
    deinit { close(descriptor) }

    func add(after: Int, period: Int, handler: HandlerID, token: UInt64, now: Instant) -> TimerID {
        precondition(after >= 0 && period >= 0)
        let id = TimerID(rawValue: nextID)
        nextID += 1
        entries.append(
            Entry(
                id: id, deadline: now.adding(milliseconds: UInt64(after)),
                periodMilliseconds: period, handler: handler, token: token))
        isChanged = true
        return id
    }

    func remove(_ id: TimerID) {
        guard let index = entries.firstIndex(where: { $0.id == id }) else { return }
        entries.swapAt(index, entries.count - 1)
        entries.removeLast()
        isChanged = true
    }

    /// Takes one timer that is due and re-arms it if it is periodic.
    func popDue(now: Instant) -> Entry? {
        guard let index = entries.firstIndex(where: { $0.deadline <= now }) else { return nil }
        let entry = entries[index]
        if entry.periodMilliseconds > 0 {
            entries[index].deadline = now.adding(milliseconds: UInt64(entry.periodMilliseconds))
        } else {
            entries.swapAt(index, entries.count - 1)
            entries.removeLast()
        }
        isChanged = true
        return entry
    }

    /// The timerfd has fired: its count is read away.
    func acknowledge() {
        haptera_drain(descriptor)
        armed = nil
        isChanged = true
    }

    /// Sets the timerfd to the earliest deadline, if that changed.
    func arm() {
        guard isChanged else { return }
        isChanged = false
        let earliest = entries.min { $0.deadline < $1.deadline }?.deadline
        guard earliest != armed else { return }
        armed = earliest
        // Zero would disarm it.
        haptera_timerfd_set(descriptor, earliest.map { max($0.rawValue, 1) } ?? 0)
    }
}
