import HapteraCore

/// The metadata store and the way to it: requests and replies are late or lost, a swap may arrive
/// long after its sender gave up on it, and may arrive twice.
final class SimulatedStore {
    private struct Request {
        var engine: Int
        /// Nil: a get.
        var swap: (expected: Epoch, record: VolumeRecord)?
        var outcome = StoreOutcome.unavailable
        var isAnswered = false
        /// Drawn when it arrives: that a repetition is refused says nothing of the first.
        var isRefused: Bool?
    }

    private let timeline: Timeline
    private let random: RandomSource
    private var requests: [Request] = []
    /// The first request made to the host that is there now.
    private var heardFrom = 0
    /// Every record that ever stood, by epoch, from the first.
    private(set) var history: [VolumeRecord]
    private(set) var isDown = false
    private struct Cut {
        var engine: Int
        var requests: Bool
        var replies: Bool
        var until: UInt64
    }
    private var cuts: [Cut] = []

    // Per thousand.
    var requestLoss = 0
    var replyLoss = 0
    var lateArrival = 0
    var duplicates = 0
    /// Refuses changes now and then, if there is one.
    var refusals: RandomSource?

    init(record: VolumeRecord, timeline: Timeline, random: RandomSource) {
        history = [record]
        self.timeline = timeline
        self.random = random
    }

    var record: VolumeRecord { history[history.count - 1] }
    func record(at epoch: Epoch) -> VolumeRecord? {
        guard let first = history.first, epoch >= first.epoch, epoch <= record.epoch else {
            return nil
        }
        return history[Int(epoch.rawValue - first.epoch.rawValue)]
    }

    func setDown(_ down: Bool) { isDown = down }

    /// One engine's requests, or their answers, or both are lost until `until`.
    func cutOff(engine: Int, requests: Bool, replies: Bool, until: UInt64) {
        cuts.append(Cut(engine: engine, requests: requests, replies: replies, until: until))
    }
    func reconnectAll() { cuts = [] }
    private func isCut(_ engine: Int, _ direction: (Cut) -> Bool) -> Bool {
        cuts.contains { $0.engine == engine && $0.until > timeline.now && direction($0) }
    }
    /// Who waits for the answer; nil: it has one.
    func asker(_ id: Int) -> Int? { requests[id].isAnswered ? nil : requests[id].engine }

    /// Puts an old copy back: the last `count` changes never happened, and what was on its way to
    /// the host before is gone with its connections.
    func forget(_ count: Int) { replaceHistory(Array(history.dropLast(count))) }
    /// What an administrator puts there instead.
    func replaceHistory(_ records: [VolumeRecord]) {
        history = records
        heardFrom = requests.count
    }
    func append(_ record: VolumeRecord) { history.append(record) }

    func get(engine: Int) { send(Request(engine: engine, swap: nil)) }
    func compareAndSwap(engine: Int, expected: Epoch, record: VolumeRecord) {
        send(Request(engine: engine, swap: (expected, record)))
    }

    private func send(_ request: Request) {
        let id = requests.count
        requests.append(request)
        let timeout = milliseconds(1000)
        timeline.schedule(after: timeout, .storeReply(request: id, isTimeout: true))
        guard !isDown, !random.permille(requestLoss), !isCut(request.engine, \.requests) else {
            return
        }
        var delay = random.delay(microseconds: 100, 5000)
        if random.permille(lateArrival) { delay += milliseconds(random.below(4000)) }
        timeline.schedule(after: delay, .storeArrival(request: id))
        if request.swap != nil && random.permille(duplicates) {
            timeline.schedule(
                after: delay + milliseconds(random.below(8000)), .storeArrival(request: id))
        }
    }

    /// A request reaches the store. Returns a violation of invariants 1 and 2, if there is one.
    func arrived(_ id: Int) -> String? {
        guard !isDown, id >= heardFrom else { return nil }
        var violation: String?
        if let swap = requests[id].swap {
            if swap.expected == record.epoch, isRefused(id) {
                requests[id].outcome = .refused("for once")
            } else if swap.expected == record.epoch {
                violation = check(swap.record)
                history.append(swap.record)
                requests[id].outcome = .record(swap.record)
            } else {
                requests[id].outcome = .conflict(record)
            }
        } else {
            requests[id].outcome = .record(record)
        }
        if !random.permille(replyLoss), !isCut(requests[id].engine, \.replies) {
            timeline.schedule(
                after: random.delay(microseconds: 100, 5000),
                .storeReply(request: id, isTimeout: false))
        }
        return violation
    }

    private func isRefused(_ id: Int) -> Bool {
        let isRefused = requests[id].isRefused ?? refusals?.permille(100) ?? false
        requests[id].isRefused = isRefused
        return isRefused
    }

    private func check(_ new: VolumeRecord) -> String? {
        if new.epoch != record.epoch.next {
            return "invariant 1: epoch \(record.epoch.rawValue) followed by \(new.epoch.rawValue)"
        }
        if new.inSync.isEmpty { return "invariant 2: empty in-sync set" }
        if new.volume != record.volume || new.size < record.size {
            return "invariant 1: the volume's identity changed, or it shrank"
        }
        if VolumeRecord(decoding: new.encoded()) != new {
            return "record does not survive encoding"
        }
        return nil
    }

    /// The answer (or the time-out) gets to the engine: whichever is first counts.
    func answer(_ id: Int, isTimeout: Bool) -> (engine: Int, outcome: StoreOutcome)? {
        guard !requests[id].isAnswered else { return nil }
        requests[id].isAnswered = true
        return (requests[id].engine, isTimeout ? .unavailable : requests[id].outcome)
    }
}
