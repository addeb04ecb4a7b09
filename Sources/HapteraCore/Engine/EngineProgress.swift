// What an operator may ask about a replica being filled, and about a takeover's resolution.

/// How far the filling of a joiner has come since it was chosen.
struct JoinProgress: BitwiseCopyable {
    /// The record knows nothing of it: everything allocated is copied.
    var isNew = false
    var startedAt = Instant.zero
    var bytesCopied: UInt64 = 0
    /// Of the last sample.
    var bytesPerSecond: UInt64 = 0
    private var sampledAt = Instant.zero
    private var sampledBytes: UInt64 = 0
    private static let sampleNanoseconds: UInt64 = 1_000_000_000

    init() {}
    init(isNew: Bool, at now: Instant) {
        self.isNew = isNew
        startedAt = now
        sampledAt = now
    }

    /// Takes a sample if a second has passed.
    mutating func sample(_ now: Instant) {
        let elapsed = now.nanoseconds(since: sampledAt)
        guard elapsed >= Self.sampleNanoseconds else { return }
        bytesPerSecond = (bytesCopied - sampledBytes) * 1000 / (elapsed / 1_000_000)
        sampledAt = now
        sampledBytes = bytesCopied
    }
}

/// A joiner's progress as the control socket reports it.
package struct RebuildReport: Equatable, Sendable {
    package enum Kind: String, Sendable {
        /// What changed while it was away.
        case resync
        /// A new replica, from nothing.
        case rebuild
    }
    package var replica: ReplicaID
    package var kind: Kind
    package var phase: String
    package var regionsDone: Int
    package var regionsTotal: Int
    package var bytesCopied: UInt64
    package var bytesPerSecond: UInt64
    package var elapsedMilliseconds: UInt64
}

extension EngineCore {
    /// Nil while nobody joins.
    package var rebuildReport: RebuildReport? {
        guard let joiner, joinStage != .none else { return nil }
        let elapsed = now.nanoseconds(since: joinProgress.startedAt)
        // A short copy ends before its first sample.
        let average = joinProgress.bytesCopied * 1000 / max(1, elapsed / 1_000_000)
        let isSampled = joinProgress.bytesPerSecond > 0
        return RebuildReport(
            replica: replicas[joiner].id, kind: joinProgress.isNew ? .rebuild : .resync,
            phase: joinStage.text, regionsDone: rebuildProgress.done,
            regionsTotal: neededTotal, bytesCopied: joinProgress.bytesCopied,
            bytesPerSecond: isSampled ? joinProgress.bytesPerSecond : average,
            elapsedMilliseconds: elapsed / 1_000_000)
    }

    /// Of the last takeover: regions made equal, and all there were.
    package var resolveProgress: (done: UInt64, total: UInt64) {
        let open = unresolved.count - damagedRegions.count
        return (regionsResolved, regionsResolved + UInt64(open))
    }

    /// The record has never had this replica, in this making, in the in-sync set.
    func isNewReplica(_ member: VolumeRecord.Member) -> Bool {
        record?.out.contains { $0.member == member } != true
    }
}

extension JoinStage {
    /// As the status says it.
    var text: String {
        switch self {
        case .none: ""
        case .installing: "installing"
        case .mapping: "mapping"
        case .copying: "copying"
        case .flushing: "flushing"
        case .promoting: "promoting"
        }
    }
}
