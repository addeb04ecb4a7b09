/// The leases a replica has given to engines (rule L), by its own clock, in memory only: a process
/// that starts does not know what the one before it gave, and assumes the most.
struct GivenLeases: BitwiseCopyable {
    var holder = InstanceID.none
    /// Until when the holder may rely on this replica.
    var until = Instant.zero
    /// Until when some engine before the holder may.
    var earlierUntil = Instant.zero
    /// Of the installed record.
    var milliseconds: UInt64 = 0
    var isStarted = false
}

extension ReplicaCore {
    /// The first step of this process.
    func startLeases() {
        leases.isStarted = true
        leases.holder = manifest.promisedEngine
        guard let record = manifest.installed else { return }
        leases.milliseconds = UInt64(record.leaseMilliseconds)
        guard !record.releasesLeases, !options.mutations.contains(.restartedReplicaForgetsLease)
        else { return }
        leases.until = now.adding(milliseconds: leases.milliseconds)
        leases.earlierUntil = leases.until
    }

    /// A request of the holder is accepted under the promise.
    func giveLease() {
        leases.until = now.adding(milliseconds: leases.milliseconds)
    }

    /// An Install is let in: from here on no other engine's request is.
    func passLease(to request: InstallRequest) {
        if leases.holder != request.engine {
            // It was known to have ended, or it left in order: it relies on nothing any more.
            if manifest.installed?.releasesLeases ?? true {
                leases.earlierUntil = .zero
            } else if leases.holder != request.ended || leases.holder == .none {
                leases.earlierUntil = max(leases.earlierUntil, leases.until)
            }
            leases.holder = request.engine
            leases.until = .zero
        }
    }

    /// The Install is durable.
    func leaseInstalled() {
        leases.milliseconds = UInt64(manifest.installed?.leaseMilliseconds ?? 0)
        giveLease()
    }

    /// Milliseconds that engines before the holder may still rely on this replica, rounded up.
    var leaseRemainingMilliseconds: UInt32 {
        let left = leases.earlierUntil.nanoseconds(since: now)
        return UInt32(clamping: (left + 999_999) / 1_000_000)
    }
}

extension VolumeRecord {
    /// Nobody serves the volume by this record: its engine left in order, or there was none yet.
    var releasesLeases: Bool { isClean && engine == .none }
}
