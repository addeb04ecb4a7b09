// Leases (rule L): reads and acknowledgements need the word of every replica that counts that no
// other engine has been served since.
//
// A replica that accepts a request under its promise gives a lease: the record's
// `leaseMilliseconds` from when it was received. The engine counts a little less, from when the
// request was sent, which is earlier. A new engine waits for what the replicas report to be left.

extension EngineCore {
    /// An engine relies on 63/64 of a lease. Its clock, the replica's and the next engine's then
    /// need to agree on the length of a second to 0.78 % each: (63/64) / (1 - x) <= 1 / (1 + x).
    /// Clocks that are being slewed are within 0.05 %.
    func countedLease(_ milliseconds: UInt32) -> UInt64 {
        let whole = UInt64(milliseconds) * 1_000_000
        return mutations.contains(.noLeaseMargin) ? whole : whole - whole / 64
    }

    /// Whether reads may be answered and writes acknowledged at this moment.
    var isLeased: Bool {
        now >= serveAfter && !hasReleased
            && (now < leaseUntil || mutations.contains(.noLeaseCheck) && !required.isEmpty)
    }
    /// For status: the same at a time of the shell's.
    package func isLeased(at time: Instant) -> Bool {
        phase == .serving && time >= serveAfter && time < leaseUntil && !hasReleased
    }
    /// Whether what is ready may be answered now; if not, it is looked at again when it may.
    func mayAnswer() -> Bool {
        if isLeased { return true }
        hasHeld = true
        return false
    }

    /// The replica has answered a request sent then, or later.
    func renewLease(_ slot: ReplicaSlot, sentAt: Instant) {
        let until = Instant(rawValue: sentAt.rawValue + leaseNanoseconds)
        let before = replicas[slot].leaseUntil
        guard until > before else { return }
        replicas[slot].leaseUntil = until
        // Only who held the engine back can let it go further.
        if before <= leaseUntil { updateLease() }
    }
    /// The shortest lease of those that count.
    func updateLease() {
        var least = required.isEmpty ? Instant.zero : Instant(rawValue: .max)
        var rest = required
        while let slot = rest.popFirst() { least = min(least, replicas[slot].leaseUntil) }
        leaseUntil = least
    }

    /// Asks who has not renewed its lease for a while for a sign of life: an idle volume, and a
    /// member that gets no requests while others do.
    func renewLeases() {
        let renewal = configuration.renewMilliseconds * 1_000_000
        let deadline = configuration.removalDeadlineMilliseconds * 1_000_000
        for slot in 0..<replicas.count where replicas[slot].installedEpoch != .zero {
            if replicas[slot].isPinging {
                if now.nanoseconds(since: replicas[slot].pingSentAt) >= deadline {
                    failReplica(slot, .silent)
                }
                continue
            }
            let age = now.rawValue + leaseNanoseconds
            guard age >= replicas[slot].leaseUntil.rawValue + renewal else { continue }
            replicas[slot].isPinging = true
            replicas[slot].pingSentAt = now
            // Not counted as owed: its answer must not cover for requests that are stuck.
            send(slot, FrameHeader(kind: .ping), expectsReply: false)
        }
    }

    /// The leases are there again: what was ready meanwhile is answered.
    func answerHeld() {
        hasHeld = false
        recheckAll()
    }
    /// A read, a status or the edges of a write that had arrived and only waited for a lease.
    func answerReady(_ index: Int) {
        guard slots[index].isReady, mayAnswer() else { return }
        if slots[index].phase == .readingEdges {
            slots[index].isReady = false
            mergeEdges(index)
        } else if slots[index].isRead {
            finishRead(index)
        } else {
            completeClient(index, .ok, tableLength: Int(slots[index].readyLength))
            release(index)
        }
    }

    // MARK: - Takeover

    /// What a replica reports to be left of the leases of engines before this one. Only those of
    /// replicas that were reached count: an engine needs the lease of *every* member, so whoever
    /// has promised here gives none any more, and those that were not reached make no difference.
    func waitOut(_ reply: InstallReply) {
        guard phase == .installing, !hasServed, !mutations.contains(.noLeaseWait) else { return }
        // Whoever marked it clean had stopped serving before.
        guard recordBefore?.isClean != true else { return }
        serveAfter = max(
            serveAfter, now.adding(milliseconds: UInt64(reply.leaseRemainingMilliseconds)))
    }
    /// A lease is shortened only where none is out: replicas count by the record they installed.
    func nextLease(after record: VolumeRecord) -> UInt32 {
        record.isClean
            ? configuration.leaseMilliseconds
            : max(configuration.leaseMilliseconds, record.leaseMilliseconds)
    }
}
