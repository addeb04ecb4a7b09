/// A volume's record found again on its replicas, when the metadata store is lost.
///
/// Nothing is acknowledged in an epoch before every member of its in-sync set has installed its
/// record. So if all members of the newest record found, its joiner, and whom the record after it
/// may have reinstated were looked at, nothing was ever acknowledged in a later epoch: the in-sync
/// sets that follow consist of these alone until one of them has installed a later record.
/// - Who is neither member nor joiner is filled before it is a member, and the joiner is not
///   filled before every member has installed the record that names it.
/// - An engine reinstates one only if some member has installed the record that stands: that is
///   the newest, so it is the next change or none. The members may leave right after it, and the
///   reinstated one go on alone (`mayFollow`).
package struct Reconstruction: Equatable, Sendable {
    package enum Verdict: Equatable, Sendable {
        /// The record is the volume's.
        case certain
        /// A later record may exist on replicas that were not looked at: `missing`.
        case doubtful
        /// No member of it was looked at: its data is elsewhere.
        case useless
    }
    /// The newest record installed anywhere.
    package let newest: VolumeRecord
    package let verdict: Verdict
    /// Members and joiner of it, those that may have been reinstated since, and replicas otherwise
    /// known to exist, that were not looked at.
    package let missing: [ReplicaID]
    /// Out in the newest record, not looked at, and perhaps reinstated since.
    private let mayFollow: [VolumeRecord.Member]

    /// How far the epoch is raised over replicas that were not looked at.
    private static let epochsSkipped: UInt64 = 1 << 16

    /// Nil if no survey has a record, or two differ in one epoch. `surveys` are of one volume;
    /// `known`: replicas that others than the record name, a node's for example.
    package init?(surveys: [ReplicaSurvey], known: [ReplicaID] = []) {
        let records = surveys.compactMap(\.installed)
        guard let newest = records.max(by: { $0.epoch < $1.epoch }),
            records.allSatisfy({
                $0.volume == newest.volume && ($0.epoch < newest.epoch || $0 == newest)
            }), surveys.allSatisfy({ $0.promise <= newest.epoch })
        else { return nil }
        self.newest = newest
        let seen = Set(surveys.map(\.member))
        let seenIDs = Set(seen.map(\.replica))
        mayFollow = Self.mayFollow(newest, surveys).filter { !seen.contains($0) }
        let governing = newest.inSync + (newest.joining.map { [$0] } ?? []) + mayFollow
        let unseen = governing.filter { !seen.contains($0) }.map(\.replica)
        missing = Array(Set(unseen).union(known.filter { !seenIDs.contains($0) })).sorted()
        if !newest.inSync.contains(where: seen.contains) {
            verdict = .useless
        } else {
            verdict = missing.isEmpty ? .certain : .doubtful
        }
    }

    /// Whom the change right after `record` may have reinstated: an engine does that before it
    /// serves, so the record is its claim, or a removal or another reinstatement since. Its proof
    /// is a member that has not promised the removal; once there is a stable point of that epoch
    /// or a later one, every member has.
    private static func mayFollow(
        _ record: VolumeRecord, _ surveys: [ReplicaSurvey]
    ) -> [VolumeRecord.Member] {
        guard [.takeover, .removal, .reinstatement].contains(record.change) else { return [] }
        let stable = surveys.map(\.stable.epoch).max() ?? .zero
        return record.out.filter { $0.isReinstatable && $0.leftEpoch > stable }.map(\.member)
    }

    /// What the new store is to begin with. A certain record is put back as it was: an engine that
    /// outlived the store goes on undisturbed. One that is not is put above any epoch that a
    /// replica not looked at may have promised, with no engine: whoever serves now is fenced. Who
    /// may have gone on since is kept as it is, should it ever return.
    package func record(nonce: UInt64) -> VolumeRecord {
        guard verdict != .certain else { return newest }
        var record = newest
        record.epoch = Epoch(newest.epoch.rawValue + Self.epochsSkipped)
        record.nonce = nonce
        record.engine = .none
        record.engineEndpoint = ""
        record.joining = nil
        record.isClean = false
        record.change = .reconstruction
        for index in record.out.indices where mayFollow.contains(record.out[index].member) {
            record.out[index].isKept = true
        }
        return record
    }
}
