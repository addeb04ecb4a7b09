import HapteraCore

/// Who proposes a record.
package enum RecordWriter: Sendable {
    case engine
    /// A salvage, or a decision about a replica that is out.
    case administrator
}

/// What a volume's next record may be. Whatever an engine's fault or a stranger's proposal: a
/// replica enters the in-sync set by promotion, by reinstatement or by a recorded salvage, and the
/// losers of a salvage stay as they are.
package struct RecordRules {
    let current: VolumeRecord
    let known: Set<VolumeRecord.Member>

    package init(after current: VolumeRecord, known: Set<VolumeRecord.Member>) {
        self.current = current
        self.known = known
    }

    /// Why nobody can have meant the proposal; nil if there is no such reason.
    package func objection(to proposed: VolumeRecord, by writer: RecordWriter) -> String? {
        if proposed.size != current.size {
            guard writer == .engine, proposed.change == .resize, proposed.size > current.size else {
                return "the record changes the volume's size"
            }
        }
        if proposed.name != current.name { return "the record changes the volume's name" }
        if proposed.clientGeneration < current.clientGeneration {
            return "the record lowers the client generation"
        }
        let named = proposed.inSync + [proposed.joining].compactMap { $0 }
        // A joiner that was given up, and has gone since, stays named until another one joins.
        let isKnown = named.allSatisfy {
            known.contains($0) || $0 == proposed.joining && $0 == current.joining
        }
        if !isKnown { return "the record names an unknown replica" }
        if Set(named.map(\.replica)).count != named.count {
            return "the record names a replica twice"
        }
        switch writer {
        case .engine: return objectionToEngine(proposed)
        case .administrator:
            return proposed.change == .salvage
                ? objectionToSalvage(proposed) : objectionToDecision(proposed)
        }
    }

    private func objectionToEngine(_ proposed: VolumeRecord) -> String? {
        guard proposed.lineage == current.lineage,
            ![.salvage, .reconstruction, .administration].contains(proposed.change)
        else { return "only an administrator salvages" }
        for member in proposed.inSync where !current.inSync.contains(member) {
            let departure = current.out.first { $0.member == member }
            let isReinstated =
                proposed.change == .reinstatement && departure.map { !$0.isKept } ?? false
            guard member == current.joining || isReinstated else {
                return "the record counts in a replica that was not filled"
            }
        }
        guard proposed.change == .snapshot || Self.keepsSnapshots(proposed, current) else {
            return "the record gives up a snapshot"
        }
        // What was deleted since need not be remembered.
        for kept in current.out where kept.isKept && known.contains(kept.member) {
            guard proposed.joining != kept.member,
                proposed.out.contains(where: { $0.member == kept.member && $0.isKept })
            else { return "the record gives up a replica that is kept" }
        }
        return nil
    }

    /// Whatever else goes on, what somebody wanted kept stays.
    private static func keepsSnapshots(_ new: VolumeRecord, _ old: VolumeRecord) -> Bool {
        old.snapshots.allSatisfy(new.snapshots.contains)
    }

    private func objectionToSalvage(_ proposed: VolumeRecord) -> String? {
        guard let survivor = proposed.inSync.first, proposed.inSync.count == 1,
            proposed.joining == nil, !proposed.isClean,
            current.out.contains(where: { $0.member == survivor })
        else { return "a salvage goes on from one replica that is out" }
        guard proposed.lineage.dropLast() == current.lineage[...],
            let fork = proposed.lineage.last, fork.epoch == proposed.epoch,
            fork.survivor == survivor.replica
        else { return "a salvage records its fork" }
        let isEveryLoserKept = current.inSync.allSatisfy { loser in
            proposed.out.contains { $0.member == loser && $0.isKept }
        }
        let isNobodyForgotten = current.out.allSatisfy { old in
            old.member == survivor
                || proposed.out.contains {
                    $0.member == old.member && ($0.isKept || !old.isKept)
                        && $0.partedEpoch <= old.partedEpoch
                }
        }
        return isEveryLoserKept && isNobodyForgotten ? nil : "a salvage keeps its losers"
    }

    /// Only who is out, and whether it is kept, may differ.
    private func objectionToDecision(_ proposed: VolumeRecord) -> String? {
        guard proposed.change == .administration, proposed.inSync == current.inSync,
            proposed.joining == current.joining, proposed.lineage == current.lineage,
            proposed.layers == current.layers, proposed.snapshots == current.snapshots
        else { return "a decision about a replica that is out changes nothing else" }
        let isSubset = proposed.out.allSatisfy { new in
            current.out.contains {
                $0.member == new.member && $0.leftEpoch == new.leftEpoch
                    && $0.partedEpoch == new.partedEpoch && ($0.isKept || !new.isKept)
            }
        }
        return isSubset ? nil : "a decision adds no replica that is out"
    }
}
