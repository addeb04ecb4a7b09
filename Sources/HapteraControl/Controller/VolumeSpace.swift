import HapteraAPI

/// What a volume takes, on all of its replicas: sums of what each has said of itself. A sum of
/// which a part is missing would be wrong, so it is nil until all have. What a node said last
/// counts while it is silent.
struct VolumeSpace: Equatable {
    /// What the replicas' files take.
    private(set) var allocated: UInt64?
    /// Of that, what no other volume has as well: what deleting this one gives back.
    private(set) var exclusive: UInt64?
    /// What nothing of the volume shows any more: comes back by itself.
    private(set) var reclaimable: UInt64?
    /// The same, when no clone shares it any more.
    private(set) var stuck: UInt64?

    /// Of each replica; nil: its node has not been heard of.
    init(_ reports: [Haptera_V1_ReplicaReport?]) {
        // The data of one that has been removed is gone.
        let reports = reports.filter { $0?.state != .removed }
        func sum(_ value: (Haptera_V1_ReplicaReport) -> UInt64?) -> UInt64? {
            reports.isEmpty
                ? nil
                : reports.reduce(0 as UInt64?) { sum, report in
                    guard let sum, let report, let value = value(report) else { return nil }
                    return sum + value
                }
        }
        // Whoever says what it shares has said what it takes.
        allocated = sum { $0.hasSharedBytes ? $0.allocatedBytes : nil }
        exclusive = sum {
            $0.hasSharedBytes ? $0.allocatedBytes - min($0.allocatedBytes, $0.sharedBytes) : nil
        }
        reclaimable = sum { $0.hasReclaimableBytes ? $0.reclaimableBytes : nil }
        stuck = sum { $0.hasStuckBytes ? $0.stuckBytes : nil }
    }

    func fill(_ message: inout Haptera_V1_Volume) {
        if let allocated { message.allocatedBytes = allocated }
        if let exclusive { message.exclusiveBytes = exclusive }
        if let reclaimable { message.reclaimableBytes = reclaimable }
        if let stuck { message.stuckBytes = stuck }
    }
}
