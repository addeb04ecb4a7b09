// Slow but living replicas: how long each takes to answer, who is read from, and who leaves the
// in-sync set by choice.

/// How long a replica takes to answer, nanoseconds: averages that forget with every answer.
struct Latency: BitwiseCopyable {
    var average: UInt64 = 0
    /// The longest of this window and of the one before.
    var worst: UInt64 = 0
    var worstBefore: UInt64 = 0
    var answeredAt = Instant.zero

    mutating func add(_ nanoseconds: UInt64, now: Instant) {
        average =
            average == 0 ? nanoseconds : average - average / 16 + nanoseconds / 16
        worst = max(worst, nanoseconds)
        answeredAt = now
    }
    var worstRecent: UInt64 { max(worst, worstBefore) }
}

extension EngineCore {
    /// A member this much slower than the others, and than the floor, for so long, leaves.
    private static let slowFactor: UInt64 = 8
    private static let slowFloorNanoseconds: UInt64 = 100_000_000
    private static let slowNanoseconds: UInt64 = 5_000_000_000
    /// How long it stays away: doubled every time, forgotten after a good while in the set.
    private static let slowPauseMilliseconds: (first: UInt64, most: UInt64) = (10_000, 600_000)
    private static let windowNanoseconds: UInt64 = 5_000_000_000

    func countAnswer(_ index: Int, _ slot: ReplicaSlot) {
        let taken = now.nanoseconds(since: slots[index].sentAt)
        if slots[index].isRead {
            replicas[slot].readLatency.add(taken, now: now)
        } else if !slots[index].isFlush {
            replicas[slot].writeLatency.add(taken, now: now)
        }
    }

    /// For status: average and recent worst of its writes, microseconds.
    package func writeLatency(_ slot: ReplicaSlot) -> (average: UInt64, worst: UInt64) {
        let latency = replicas[slot].writeLatency
        return (latency.average / 1000, latency.worstRecent / 1000)
    }

    /// Whom to read from: the least expected time, by how many reads it has and how long they take.
    func readCost(_ slot: ReplicaSlot) -> UInt64 {
        UInt64(replicas[slot].reads + 1) &* (replicas[slot].readLatency.average / 1024 + 1)
    }

    /// Every tick.
    func watchLatencies() {
        let isNewWindow = now.nanoseconds(since: latencyWindowAt) >= Self.windowNanoseconds
        if isNewWindow { latencyWindowAt = now }
        for slot in 0..<replicas.count where replicas[slot].link != .down {
            if isNewWindow {
                replicas[slot].writeLatency.worstBefore = replicas[slot].writeLatency.worst
                replicas[slot].writeLatency.worst = 0
            }
            // Who is not read from is tried again after a while.
            if now.nanoseconds(since: replicas[slot].readLatency.answeredAt) > 200_000_000 {
                replicas[slot].readLatency.average -= replicas[slot].readLatency.average / 32
            }
        }
        guard phase == .serving else { return }
        var rest = members
        while let slot = rest.popFirst() {
            guard isSlow(slot) else {
                replicas[slot].slowSince = .zero
                if now.nanoseconds(since: replicas[slot].joinAfter) > 600_000_000_000 {
                    replicas[slot].slowPause = 0
                }
                continue
            }
            if replicas[slot].slowSince == .zero { replicas[slot].slowSince = now }
            guard now.nanoseconds(since: replicas[slot].slowSince) >= Self.slowNanoseconds,
                mayLeave(slot)
            else { continue }
            replicas[slot].slowSince = .zero
            replicas[slot].slowPause = min(
                max(Self.slowPauseMilliseconds.first, replicas[slot].slowPause * 2),
                Self.slowPauseMilliseconds.most)
            replicas[slot].joinAfter = now.adding(milliseconds: replicas[slot].slowPause)
            note(.replicaSlow(slot))
            failReplica(slot, .slow)
            return
        }
    }

    private func isSlow(_ slot: ReplicaSlot) -> Bool {
        let own = replicas[slot].writeLatency
        guard own.average > Self.slowFloorNanoseconds,
            now.nanoseconds(since: own.answeredAt) < 1_000_000_000
        else { return false }
        // The median of the others; of two the larger: those who are all slow are the measure.
        var others = members.subtracting(SlotSet(slot))
        let half = others.count / 2
        var median: UInt64 = 0
        while let candidate = others.popFirst() {
            let value = replicas[candidate].writeLatency.average
            var below = 0
            var equal = 0
            var rest = members.subtracting(SlotSet(slot))
            while let other = rest.popFirst() {
                if replicas[other].writeLatency.average < value { below += 1 }
                if replicas[other].writeLatency.average == value { equal += 1 }
            }
            if below <= half && half < below + equal { median = value }
        }
        return own.average > median * Self.slowFactor
    }

    /// Redundancy allows it: enough are left, nothing else is going on, and not only copies that
    /// may have lost something.
    private func mayLeave(_ slot: ReplicaSlot) -> Bool {
        let left = members.subtracting(SlotSet(slot))
        return left.count >= max(2, minInSync) && isSettled && !isResolving && !isStoreBusy
            && left.isSubset(of: liveMembers) && mayRemoveOthers(left)
    }
}
