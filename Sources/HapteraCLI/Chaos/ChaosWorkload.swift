import Dispatch
import Foundation
import Glibc
import HapteraHost
import HapteraTesting
import Synchronization

/// A block that says what it is: every 16 bytes hold its number and the value written, so that a
/// torn, misplaced or foreign block shows by itself.
enum SelfDescribingBlock {
    static let size = 4096

    static func bytes(_ number: UInt64, _ value: UInt64) -> [UInt8] {
        let word = (0..<8).map { UInt8(truncatingIfNeeded: number >> ($0 * 8)) }
        let tail = (0..<8).map { UInt8(truncatingIfNeeded: value >> ($0 * 8)) }
        return Array(repeatElement(word + tail, count: size / 16).joined())
    }

    /// Its value, 0 for a block of zeroes; nil if it is neither.
    static func value(_ number: UInt64, _ bytes: [UInt8]) -> UInt64? {
        let value = bytes[8..<16].reversed().reduce(UInt64(0)) { $0 << 8 | UInt64($1) }
        if value == 0 { return bytes.allSatisfy { $0 == 0 } ? 0 : nil }
        return bytes == Self.bytes(number, value) ? value : nil
    }
}

/// Everything clients asked for and were told, per block, in one order.
final class ChaosHistory: Sendable {
    private struct State {
        var events: [UInt64: [RegisterEvent]] = [:]
        var operations = 0
        var acknowledged = 0
        var violations: [String] = []
        var longestPause = Duration.zero
    }
    private let state = Mutex(State())
    /// Values of earlier runs, should they come back, are not taken for this one's.
    private let base = UInt64(Date().timeIntervalSince1970 * 1000) << 24

    /// A new value for the block, and the operation that writes it.
    func writeInvoked(_ block: UInt64) -> (operation: Int, value: UInt64) {
        state.withLock { state in
            state.operations += 1
            let value = base + UInt64(state.operations)
            state.events[block, default: []].append(
                RegisterEvent(.writeInvoked(value), operation: state.operations))
            return (state.operations, value)
        }
    }
    func writeReturned(_ block: UInt64, _ operation: Int) {
        state.withLock { state in
            state.acknowledged += 1
            state.events[block]?.append(
                RegisterEvent(.writeReturned(isDurable: false), operation: operation))
        }
    }
    /// What it returns is filled in later: a read that never returns says nothing.
    func readInvoked(_ block: UInt64) -> (operation: Int, index: Int) {
        state.withLock { state in
            state.operations += 1
            state.events[block, default: []].append(
                RegisterEvent(.readInvoked(0), operation: state.operations))
            return (state.operations, (state.events[block]?.count ?? 0) - 1)
        }
    }
    func readReturned(_ block: UInt64, _ read: (operation: Int, index: Int), _ value: UInt64?) {
        state.withLock { state in
            guard let value else {
                state.violations.append("block \(block): what was read is no block ever written")
                return
            }
            state.acknowledged += 1
            state.events[block]?[read.index] = RegisterEvent(
                .readInvoked(value), operation: read.operation)
            state.events[block]?.append(RegisterEvent(.readReturned, operation: read.operation))
        }
    }
    func failed(_ block: UInt64, _ error: NBDRequestError) {
        state.withLock {
            $0.violations.append("block \(block): a client was told of error \(error.number)")
        }
    }

    var counts: (operations: Int, acknowledged: Int) {
        state.withLock { ($0.operations, $0.acknowledged) }
    }

    /// A client had no answer for so long.
    func paused(_ time: Duration) {
        state.withLock { $0.longestPause = max($0.longestPause, time) }
    }
    var longestPauseMilliseconds: UInt64 {
        UInt64(state.withLock { $0.longestPause } / .milliseconds(1))
    }

    /// What no order of the operations explains.
    func judge() -> [String] {
        let (events, violations) = state.withLock { ($0.events, $0.violations) }
        return violations
            + events.sorted { $0.key < $1.key }.compactMap { block, events in
                var checker = RegisterChecker()
                let index = checker.check(events)
                if checker.gaveUp {
                    return "block \(block): too many possible histories to be judged"
                }
                guard let index else { return nil }
                let event = events[index]
                return "block \(block): operation \(event.operation) (\(event.kind)), number "
                    + "\(index) of its history, cannot be explained"
            }
    }
}

/// Clients that write, read and flush until told to stop. Each reconnects when its connection is
/// lost; what it had asked for then may happen or not.
final class ChaosWorkload: Sendable {
    static let blocksDefault: UInt64 = 512
    /// Between two requests of a client: bounds the history of a long run.
    static let pauseMicroseconds: UInt32 = 1000
    let history = ChaosHistory()
    private let path: String
    private let export: String
    private let blocks: UInt64
    private let stride: UInt64
    private let isStopping = Atomic(false)
    private let group = DispatchGroup()

    /// Uses so many blocks, evenly spread.
    init(
        path: String, export: String, sizeBytes: UInt64,
        blocks: UInt64 = ChaosWorkload.blocksDefault
    ) {
        self.path = path
        self.blocks = blocks
        self.export = export
        stride = max(sizeBytes / UInt64(SelfDescribingBlock.size) / blocks, 1)
    }

    func start(
        workers: Int, seed: UInt64, pauseMicroseconds: UInt32 = ChaosWorkload.pauseMicroseconds
    ) {
        for number in 0..<workers {
            group.enter()
            let thread = Thread { [self] in
                work(
                    RandomSource(seed: RandomSource.mix(seed &+ UInt64(number))), pauseMicroseconds)
                group.leave()
            }
            thread.start()
        }
    }

    func stop() {
        isStopping.store(true, ordering: .relaxed)
        group.wait()
    }

    private func work(_ random: RandomSource, _ pauseMicroseconds: UInt32) {
        var socket: NBDSocket?
        var answered = ContinuousClock.now
        while !isStopping.load(ordering: .relaxed) {
            guard let connection = socket ?? (try? NBDSocket(path: path, export: export)) else {
                usleep(50_000)
                continue
            }
            socket = connection
            usleep(pauseMicroseconds)
            let block = UInt64(random.below(Int(blocks)))
            do {
                switch random.below(20) {
                case 0: _ = try connection.request(.flush)
                case 1...8: try read(connection, block)
                default: try write(connection, block)
                }
                let now = ContinuousClock.now
                history.paused(now - answered)
                answered = now
            } catch let error as NBDRequestError {
                history.failed(block, error)
            } catch {
                socket = nil
            }
        }
    }

    private func offset(_ block: UInt64) -> UInt64 {
        block * stride * UInt64(SelfDescribingBlock.size)
    }

    private func write(_ connection: NBDSocket, _ block: UInt64) throws {
        let (operation, value) = history.writeInvoked(block)
        _ = try connection.request(
            .write, offset: offset(block), data: SelfDescribingBlock.bytes(block, value))
        history.writeReturned(block, operation)
    }

    private func read(_ connection: NBDSocket, _ block: UInt64) throws {
        let read = history.readInvoked(block)
        let bytes = try connection.request(
            .read, offset: offset(block), length: SelfDescribingBlock.size)
        history.readReturned(block, read, SelfDescribingBlock.value(block, bytes))
    }

    /// Gives every block a value of this run.
    func fill() throws {
        let connection = try NBDSocket(path: path, export: export)
        for block in 0..<blocks { try write(connection, block) }
    }

    /// Reads every block once more.
    func readAll() throws {
        let connection = try NBDSocket(path: path, export: export)
        for block in 0..<blocks { try read(connection, block) }
    }
}
