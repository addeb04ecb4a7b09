import HapteraCore
import HapteraHost

/// Volume records in words, for people.
struct RecordWords {
    /// Where each replica is, as far as it is known.
    let nodes: [String: String]

    func replica(_ id: ReplicaID) -> String {
        nodes[id.text].map { "replica \(id.text) on \($0)" } ?? "replica \(id.text)"
    }
    private func replicas(_ members: [VolumeRecord.Member]) -> String {
        members.map { replica($0.replica) }.joined(separator: ", ")
    }

    /// What a change of the record was. `before` is the record it replaced; nil if that is not
    /// known any more.
    func text(_ record: VolumeRecord, after before: VolumeRecord?) -> String {
        let known = record.epoch.rawValue == 1 || before != nil
        let left = (before?.inSync ?? []).filter { !record.inSync.contains($0) }
        let came = known ? record.inSync.filter { !(before?.inSync ?? []).contains($0) } : []
        var parts: [String] = []
        switch record.change {
        case .creation: parts.append("created with \(replicas(record.inSync))")
        case .takeover, .reinstatement:
            let endpoint = record.engineEndpoint
            let place = endpoint.isEmpty ? "without clients" : "at \(endpoint)"
            parts.append("engine \(place) took over")
        case .detach: parts.append(record.isClean ? "detached, clean" : "detached")
        case .salvage:
            parts.append(salvage(record))
        case .reconstruction: parts.append("record reconstructed from the replicas")
        case .join:
            if let joining = record.joining {
                parts.append("\(replica(joining.replica)) joins: it is being filled")
            }
        case .removal, .promotion, .administration, .snapshot, .resize, .revert: break
        }
        if record.change != .salvage {
            for member in left {
                let departure = record.out.first { $0.member == member }
                let reason = departure.map { ", because \(Self.words($0.reason))" } ?? ""
                parts.append("removed \(replica(member.replica))\(reason)")
            }
        }
        if record.change != .creation, record.change != .salvage {
            let how =
                record.change == .reinstatement
                ? "counts again: nothing was acknowledged without it" : "is in sync again"
            for member in came { parts.append("\(replica(member.replica)) \(how)") }
        }
        if let before {
            parts += releases(record, before) + snapshots(record, before)
            if record.size > before.size {
                parts.append(
                    "grew from \(VolumeSize.text(before.size)) to \(VolumeSize.text(record.size))")
            }
        }
        // A removal or promotion whose predecessor is forgotten.
        if parts.isEmpty { parts.append("\(record.change)") }
        return parts.joined(separator: "; ")
    }

    private func salvage(_ record: VolumeRecord) -> String {
        guard let fork = record.lineage.last else { return "salvaged" }
        return "salvaged: goes on from \(replica(fork.survivor)), whose history ended at epoch "
            + "\(fork.partedEpoch.rawValue)"
    }

    /// Losers of a salvage that may be filled again or are given up.
    private func releases(_ record: VolumeRecord, _ before: VolumeRecord) -> [String] {
        before.out.filter(\.isKept).compactMap { old in
            guard let now = record.out.first(where: { $0.member == old.member }) else {
                return record.inSync.contains(old.member) || record.joining == old.member
                    ? nil : "gave up \(replica(old.member.replica))"
            }
            return now.isKept ? nil : "\(replica(old.member.replica)) may be filled again"
        }
    }

    private func snapshots(_ record: VolumeRecord, _ before: VolumeRecord) -> [String] {
        let taken = record.snapshots.filter { !before.snapshots.contains($0) }
        let gone = before.snapshots.filter { !record.snapshots.contains($0) }
        // Nobody asked for it when the copy to go on from never had the snapshot.
        let isLost = record.change == .salvage || record.change == .reconstruction
        let end = isLost ? "gave up" : "deleted"
        if record.change == .revert, let kept = taken.first {
            let target = record.reverts.last.flatMap { revert in
                record.snapshots.first { $0.layer == revert.target }
            }
            return [
                "went back to snapshot \(target?.name ?? "?"), kept what was there as \(kept.name)"
            ]
        }
        return taken.map { "took snapshot \($0.name)" }
            + gone.map { "\(end) snapshot \($0.name)" }
    }

    static func words(_ reason: VolumeRecord.DepartureReason) -> String {
        switch reason {
        case .unknown: "of a reason that was not noted"
        case .disconnected: "its connection was closed"
        case .silent: "it did not answer in time"
        case .full: "its disk was full"
        case .ioError: "its disk failed a request"
        case .protocolError: "it broke the protocol"
        case .slow: "it was much slower than the others"
        case .rolledBack: "its files were older than it had said"
        case .unreachable: "it could not be reached at a takeover"
        case .salvaged: "another copy was chosen in a salvage"
        case .administrator: "an administrator removed it"
        }
    }
}

extension VolumeRecord.Change {
    /// As in the API.
    var word: String { "\(self)" }
}
