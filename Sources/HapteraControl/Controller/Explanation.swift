import HapteraAPI
import HapteraCore

/// Why a volume is as it is: the chain of its epochs, who is out, and what it waits for.
package struct Explanation {
    package static let changesDefault = 20

    let stored: StoredVolume
    let history: [HistoryEntry]
    let nodes: [String: ObservedNode]
    let inspections: [String: InspectionOutcome]

    package init(
        _ stored: StoredVolume, history: [HistoryEntry], nodes: [String: ObservedNode],
        inspections: [String: InspectionOutcome]
    ) {
        self.stored = stored
        self.history = history
        self.nodes = nodes
        self.inspections = inspections
    }

    private var places: [String: String] {
        Dictionary(stored.replicas.map { ($0.id, $0.node) }) { $1 }
    }

    /// Epochs of the changes that say why a replica is out, however long ago.
    static func relevantEpochs(_ record: VolumeRecord?) -> [Epoch] {
        guard let record else { return [] }
        return record.out.map(\.leftEpoch) + record.lineage.map(\.epoch)
    }

    package var message: Haptera_V1_VolumeExplanation {
        var message = Haptera_V1_VolumeExplanation()
        message.name = stored.volume.name
        message.id = stored.volume.id
        message.epoch = stored.record?.epoch.rawValue ?? 0
        message.changes = changes
        message.away = away
        message.waitsFor = waitsFor
        if isWithoutMembers { message.choices = Salvage(self)?.choices ?? [] }
        message.advice = advice
        return message
    }

    private var changes: [Haptera_V1_VolumeChange] {
        let words = RecordWords(nodes: places)
        var previous: VolumeRecord?
        return history.map { entry in
            let record = entry.record
            let isNext = previous.map { $0.epoch.next == record.epoch } ?? false
            defer { previous = record }
            var change = Haptera_V1_VolumeChange()
            change.epoch = record.epoch.rawValue
            change.timeUnixMilliseconds = entry.timeMilliseconds
            change.kind = record.change.word
            change.text = words.text(record, after: isNext ? previous : nil)
            change.inSync = record.inSync.map(\.replica.text)
            return change
        }
    }

    // MARK: Replicas that are out

    private var away: [Haptera_V1_ReplicaAway] {
        guard let record = stored.record else { return [] }
        // The record goes on to name one whose filling has failed, and which may have gone.
        let view = VolumeView(stored, nodes: nodes)
        let joining = stored.replicas.first(where: view.isBeingFilled)?.member
        var list = record.out.map { departure in
            var replica = self.away(departure.member)
            replica.leftEpoch = departure.leftEpoch.rawValue
            replica.leftUnixMilliseconds = time(of: departure.leftEpoch)
            replica.reason = RecordWords.words(departure.reason)
            replica.kept = departure.isKept
            replica.joining = departure.member == joining
            return replica
        }
        if let joining, !record.out.contains(where: { $0.member == joining }) {
            var replica = self.away(joining)
            replica.joining = true
            list.append(replica)
        }
        return list
    }

    static let unknownPlace =
        "no node is known to hold it: it was replaced or deleted, or its node was away when the "
        + "store was rebuilt"

    private func away(_ member: VolumeRecord.Member) -> Haptera_V1_ReplicaAway {
        var replica = Haptera_V1_ReplicaAway()
        replica.replicaID = member.replica.text
        replica.node = places[member.replica.text] ?? ""
        switch inspections[member.replica.text] {
        case .found(let found) where found.member == member:
            replica.inspected = true
            replica.promisedEpoch = found.promise
            replica.flushedEpoch = found.flushedEpoch ?? 0
        case .found: replica.problem = "its directory holds another making of it"
        case .failed(let reason): replica.problem = reason
        case nil: replica.problem = Self.unknownPlace
        }
        return replica
    }

    func time(of epoch: Epoch) -> Int64 {
        history.first { $0.record.epoch == epoch }?.timeMilliseconds ?? 0
    }

    // MARK: What it waits for

    /// A replica whose process answers, as far as its node is believed.
    func isReachable(_ row: ReplicaRow) -> Bool {
        guard let node = nodes[row.node], node.isReady else { return false }
        return node.replica(row.id)?.state == .running
    }

    private var engineReason: String {
        guard let node = stored.volume.attachedNode else { return "" }
        return nodes[node]?.engine(stored.volume)?.reason ?? ""
    }

    private var isOlderThanReplicas: Bool {
        StopReason.standing(in: engineReason, against: stored.record) == .recordOlderThanReplica
    }

    /// A member of the in-sync set that can be reached.
    var reachableMember: ReplicaRow? {
        guard let record = stored.record else { return nil }
        return stored.replicas.first { row in
            row.member.map(record.inSync.contains) == true && isReachable(row)
        }
    }
    var isWithoutMembers: Bool { stored.record != nil && reachableMember == nil }

    private var waitsFor: String {
        guard let record = stored.record else {
            return stored.volume.phase == .creating ? "its replicas to be created" : ""
        }
        if isOlderThanReplicas { return "a record as new as its replicas" }
        guard isWithoutMembers else { return engineReason }
        let missing = record.inSync.map { member -> String in
            let id = member.replica.text
            let words = RecordWords(nodes: places).replica(member.replica)
            guard let row = stored.replicas.first(where: { $0.id == id }) else { return words }
            guard let node = nodes[row.node], node.isReady else {
                return "\(words) (its node is not heard of)"
            }
            let reason = node.replica(id)?.reason ?? ""
            return reason.isEmpty ? words : "\(words) (\(reason))"
        }
        return (missing.count > 1 ? "one of: " : "") + missing.joined(separator: ", ")
    }

    private var advice: String {
        let name = stored.volume.name
        if isOlderThanReplicas {
            return "the metadata store is older than the replicas; it takes what they know with: "
                + "storagectl store reconstruct --volume \(name)"
        }
        if isWithoutMembers, stored.record != nil {
            return "bring back a replica it waits for; if none ever returns, choose another copy, "
                + "and lose what only they had, with: storagectl volume salvage \(name)"
        }
        if let kept = stored.record?.out.first(where: \.isKept) {
            let id = kept.member.replica.text
            return "replica \(id) keeps what a salvage gave up; when you need it no more: "
                + "storagectl replica rejoin \(name) \(id), or "
                + "storagectl replica delete \(name) \(id) --discard-kept"
        }
        return ""
    }
}

extension Controller {
    package func explain(_ name: String, all: Bool) async throws -> Haptera_V1_VolumeExplanation {
        try await explanation(name, all: all).message
    }

    /// Looks into the replicas that are out; into members too if none of them answers, for what a
    /// salvage would lose.
    func explanation(
        _ name: String, all: Bool = false, inspectingAll: Bool = false
    ) async throws -> Explanation {
        let stored = try await store.volume(named: name)
        let history = try await store.history(
            of: stored.volume.id,
            limit: all ? MetadataStore.historyMax : Explanation.changesDefault,
            also: Explanation.relevantEpochs(stored.record))
        let isStranded = Explanation(stored, history: [], nodes: observedNodes, inspections: [:])
            .isWithoutMembers
        let members = Set((stored.record?.inSync ?? []).map(\.replica.text))
        let wanted = stored.replicas.filter {
            inspectingAll || isStranded || !members.contains($0.id)
        }
        let inspections = await inspect(wanted.map { (node: $0.node, replica: $0.id) })
        return Explanation(
            stored, history: history, nodes: observedNodes, inspections: inspections)
    }
}
