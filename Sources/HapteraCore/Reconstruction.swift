/// A volume's record found again on its replicas, when the metadata store is lost.
///
/// Nothing is acknowledged in an epoch before every member of its in-sync set has installed its
/// record. So if all members of the newest record found, and its joiner, were looked at, nothing
/// was ever acknowledged in a later epoch: a later in-sync set consists of these alone, and one of
/// them would have installed it.
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
    /// Members and joiner of it, and replicas otherwise known to exist, that were not looked at.
    package let missing: [ReplicaID]

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
        let governing = newest.inSync + (newest.joining.map { [$0] } ?? [])
        let unseen = governing.filter { !seen.contains($0) }.map(\.replica)
        missing = Array(Set(unseen).union(known.filter { !seenIDs.contains($0) })).sorted()
        if !newest.inSync.contains(where: seen.contains) {
            verdict = .useless
        } else {
            verdict = missing.isEmpty ? .certain : .doubtful
        }
    }

    /// What the new store is to begin with. A certain record is put back as it was: an engine that
    /// outlived the store goes on undisturbed. One that is not is put above any epoch that a
    /// replica not looked at may have promised, with no engine: whoever serves now is fenced.
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
        return record
    }
}
