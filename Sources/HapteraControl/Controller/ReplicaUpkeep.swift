import HapteraAPI
import HapteraCore
import HapteraHost

/// What the controller does by itself about one volume's replicas. Pure: decides from what is
/// stored and what the nodes say; the controller performs it.
package struct ReplicaUpkeep: Sendable {
    package enum Step: Equatable, Sendable {
        /// The record does without it now, or its engine does, whatever the record says of a
        /// joiner: its data can go.
        case finishLeaving(String)
        /// The replacement is in sync, and so is everybody else the volume needs.
        case finishReplacement(by: String)
        /// A replacement nobody needs any more, or that went away itself.
        case giveUp(String, why: String)
        case replace(String, on: String, why: String)
        /// Would replace the replica, but cannot.
        case cannotReplace(String, why: String)
        /// As many replicas as the volume is meant to have are in sync without the temporary ones.
        case finishFilling
        /// They are not any more, and a temporary one is still a member.
        case resumeFilling
    }

    let stored: StoredVolume
    let nodes: [String: ObservedNode]
    let rooms: [String: NodeRoom]
    /// Since when replicas are away, milliseconds since 1970.
    let awaySince: [String: Int64]
    let now: Int64
    private let view: VolumeView
    private let states: [String: Haptera_V1_ReplicaState]

    package init(
        _ stored: StoredVolume, nodes: [String: ObservedNode], rooms: [String: NodeRoom],
        awaySince: [String: Int64], now: Int64
    ) {
        self.stored = stored
        self.nodes = nodes
        self.rooms = rooms
        self.awaySince = awaySince
        self.now = now
        view = VolumeView(stored, nodes: nodes)
        let replicas = view.message.replicas
        states = Dictionary(uniqueKeysWithValues: replicas.map { ($0.id, $0.state) })
    }

    /// The engine cannot reach it, and it is not one that only waits for its turn to be filled.
    package func isAway(_ row: ReplicaRow) -> Bool {
        guard !stored.isMember(row), !view.isBeingFilled(row) else { return false }
        let word = view.engine?.replicas.first { $0.replicaID == row.id }?.state
        let isUnreachable = view.isEngineUp && (word == nil || word == "absent")
        guard let node = nodes[row.node], node.isReady else {
            return isUnreachable || !view.isEngineUp
        }
        guard node.replica(row.id)?.state == .running else { return true }
        return isUnreachable && !stored.replicas.contains(where: view.isBeingFilled)
    }

    package var step: Step? {
        guard stored.volume.phase == .ready else { return nil }
        let leaving = stored.replicas.first {
            $0.phase == .leave && view.isLetGo($0)
        }
        if let leaving { return .finishLeaving(leaving.id) }
        if stored.hasLeftTooEarly { return .resumeFilling }
        if stored.volume.isFilling, inSyncCount(without: nil) >= stored.volume.replicaCount {
            return .finishFilling
        }
        if let new = stored.replicas.first(where: { $0.replaces != nil }) { return next(for: new) }
        return replacement
    }

    /// In sync by the record and in the eyes of its engine, without `other`.
    private func inSyncCount(without other: String?) -> Int {
        stored.replicas.count {
            $0.id != other && !$0.isTemporary && $0.phase == .run && stored.isMember($0)
                && states[$0.id] == .inSync
        }
    }

    private func next(for new: ReplicaRow) -> Step? {
        guard let old = stored.replicas.first(where: { $0.id == new.replaces }) else {
            return stored.isMember(new) ? .finishReplacement(by: new.id) : nil
        }
        let wanted = stored.volume.replicaCount
        if stored.isMember(new) {
            guard inSyncCount(without: old.id) >= wanted, !stored.isKept(old) else { return nil }
            return .finishReplacement(by: new.id)
        }
        if new.isAutomatic, !view.isBeingFilled(new), stored.isMember(old),
            inSyncCount(without: new.id) >= wanted
        {
            return .giveUp(new.id, why: "replica \(old.id), which it should replace, is back")
        }
        if let since = awaySince[new.id], let timeout, now - since > timeout {
            let time = Durations.rough(UInt64(now - since))
            return .giveUp(new.id, why: "its node \(new.node) is away for \(time)")
        }
        return nil
    }

    /// Nil: replicas are not replaced without being asked for.
    private var timeout: Int64? {
        let timeout = stored.volume.staleReplicaTimeoutMilliseconds
        return timeout > 0 ? timeout : nil
    }

    private var isServed: Bool {
        view.engine?.state == .serving && view.state == .attached
            && nodes[stored.volume.attachedNode ?? ""]?.isReady == true
    }

    /// It is not attached, and gets an engine to be filled by.
    private var canBeFilled: Bool {
        stored.volume.isFilling && stored.volume.clientNode == nil
            && stored.replicas.contains { row in
                guard stored.isMember(row), let node = nodes[row.node] else { return false }
                return node.isReady && node.replica(row.id)?.state == .running
            }
    }

    private var replacement: Step? {
        guard let timeout, isServed || canBeFilled else { return nil }
        let stale = stored.replicas.filter { row in
            guard row.phase == .run, !row.isTemporary, !stored.isKept(row),
                let since = awaySince[row.id]
            else {
                return false
            }
            return now - since > timeout
        }
        guard
            let oldest = stale.min(by: {
                awaySince[$0.id, default: 0] < awaySince[$1.id, default: 0]
            })
        else { return nil }
        let why = "away for \(Durations.rough(UInt64(now - (awaySince[oldest.id] ?? now))))"
        do {
            return .replace(oldest.id, on: try nodeInPlaceOf(oldest), why: why)
        } catch {
            let limit = Durations.text(UInt64(timeout))
            return .cannotReplace(
                oldest.id, why: "away for more than \(limit), and cannot be replaced: \(error)")
        }
    }

    /// What a new replica is filled with: what the largest of the others takes.
    package var dataBytes: UInt64 {
        stored.replicas.compactMap { nodes[$0.node]?.replica($0.id)?.allocatedBytes }.max() ?? 0
    }

    package var anotherNode: String {
        get throws(ControlError) {
            try Placement.chooseAnother(
                occupied: Set(stored.replicas.map(\.node)), need: need, candidates: candidates)
        }
    }
    private var need: ReplicaNeed {
        ReplicaNeed(
            volume: stored.volume.name, sizeBytes: UInt64(stored.volume.sizeBytes),
            dataBytes: dataBytes)
    }
    private var candidates: [Placement.Candidate] {
        rooms.values.filter { nodes[$0.limits.node]?.isReady == true }
            .map { Placement.Candidate($0) }
    }

    /// Another node, or, where there is none, the replica's own if only its copy is bad.
    private func nodeInPlaceOf(_ row: ReplicaRow) throws(ControlError) -> String {
        do {
            return try anotherNode
        } catch {
            guard isUnusable(row) else { throw error }
            let others = Set(stored.replicas.map(\.node)).subtracting([row.node])
            let own = candidates.filter { $0.name == row.node }
            do {
                return try Placement.chooseAnother(occupied: others, need: need, candidates: own)
            } catch let own {
                throw ControlError(.precondition, "\(error.message); \(own.message)")
            }
        }
    }
    /// Its node is there and has its directory, but no process of it stays: a page, a record or a
    /// file is damaged. Not one whose directory is gone: its disk may only not be mounted.
    private func isUnusable(_ row: ReplicaRow) -> Bool {
        guard let node = nodes[row.node], node.isReady, let replica = node.replica(row.id) else {
            return false
        }
        return replica.state == .waiting || replica.state == .created
    }
}

/// Since when replicas are away. Kept in memory: a new controller counts anew.
package struct AwayTimes: Sendable {
    /// Time in which nobody looked does not count: the nodes could not be heard.
    static let roundMaxMilliseconds: Int64 = 10_000
    package private(set) var since: [String: Int64] = [:]
    private var lastRound: Int64?

    package init() {}

    package mutating func beginRound(now: Int64) {
        defer { lastRound = now }
        guard let lastRound, !(0...Self.roundMaxMilliseconds).contains(now - lastRound) else {
            return
        }
        since = since.mapValues { $0 + (now - lastRound) }
    }

    package mutating func note(_ replica: String, isAway: Bool, now: Int64) {
        if !isAway {
            since[replica] = nil
        } else if since[replica] == nil {
            since[replica] = now
        }
    }

    package mutating func keepOnly(_ replicas: Set<String>) {
        since = since.filter { replicas.contains($0.key) }
    }
}

extension Controller {
    /// One round over all volumes: starts, finishes and gives up replacements.
    package func upkeep() async throws {
        let now = store.clock()
        awayTimes.beginRound(now: now)
        let volumes = try await store.volumes()
        let replicas = volumes.flatMap(\.replicas)
        awayTimes.keepOnly(Set(replicas.map(\.id)))
        let names = Set(volumes.map(\.volume.name))
        problems = problems.filter { names.contains($0.key) }
        let nodes = observedNodes
        let rooms = try await store.rooms(spaces)
        for stored in volumes {
            let look = ReplicaUpkeep(stored, nodes: nodes, rooms: rooms, awaySince: [:], now: now)
            for row in stored.replicas {
                awayTimes.note(row.id, isAway: look.isAway(row), now: now)
            }
            let step =
                ReplicaUpkeep(
                    stored, nodes: nodes, rooms: rooms, awaySince: awayTimes.since, now: now
                ).step
            try await perform(step, on: stored, dataBytes: look.dataBytes)
        }
    }

    private func perform(
        _ step: ReplicaUpkeep.Step?, on stored: StoredVolume, dataBytes: UInt64
    ) async throws {
        let name = stored.volume.name
        try await Caller.$current.withValue(.controller) {
            var problem: String?
            switch step {
            case nil: break
            case .cannotReplace(let id, let why):
                problem =
                    "replica \(id) is \(why); a node is chosen by hand with: "
                    + "storagectl replica replace \(name) \(id) --node NODE"
            case .finishFilling: try await store.finishFilling(name)
            case .resumeFilling: try await store.resumeFilling(name)
            case .finishLeaving(let id):
                try await store.finishLeaving(id, of: name, after: stored.record?.epoch)
            case .finishReplacement(let id): try await store.finishReplacement(by: id, of: name)
            case .giveUp(let id, let why):
                _ = try await store.discardReplica(id, of: name, why: why)
            case .replace(let id, let node, let why):
                do {
                    _ = try await store.replaceReplica(
                        id, of: name, node: node, isAutomatic: true, why: why,
                        dataBytes: dataBytes, spaces: spaces)
                } catch let error as ControlError where error.code == .precondition {
                    // Somebody else has taken what was left of the room, or is as quick.
                    problem = "replica \(id) is \(why), and cannot be replaced: \(error)"
                }
            }
            let isNews = problems[name] != problem
            problems[name] = problem
            if isNews, let problem {
                try await store.addEvent(
                    "ReplicaNotReplaced", "volume/\(name)", problem, by: .controller)
            }
            if isNews || (step != nil && problem == nil) { changes.notify() }
        }
    }

    // MARK: On request

    package func replace(
        _ id: String, of name: String, node: String?
    ) async throws -> Haptera_V1_Volume {
        let stored = try await store.volume(named: name)
        _ = try stored.replica(id)
        let nodes = observedNodes
        let look = ReplicaUpkeep(
            stored, nodes: nodes, rooms: try await store.rooms(spaces), awaySince: [:],
            now: store.clock())
        if let node, nodes[node]?.isReady != true {
            throw ControlError(
                .precondition, "node \(node) is not known or not ready; see 'storagectl node list'")
        }
        let target: String
        if let node {
            target = node
        } else if let running = stored.replicas.first(where: { $0.replaces == id }) {
            target = running.node
        } else {
            do {
                target = try look.anotherNode
            } catch {
                throw ControlError(
                    .precondition,
                    "\(error.message); --node puts it on one that holds another replica of it")
            }
        }
        return try changed(
            await store.replaceReplica(
                id, of: name, node: target, isAutomatic: false, why: "on request",
                dataBytes: look.dataBytes, spaces: spaces))
    }

    package func deleteReplica(
        _ id: String, of name: String, discardKept: Bool
    ) async throws -> Haptera_V1_Volume {
        // Without a member within reach, any copy may be the one to go on from.
        let stored = try await store.volume(named: name)
        let look = Explanation(stored, history: [], nodes: observedNodes, inspections: [:])
        guard !look.isWithoutMembers else {
            throw ControlError(
                .precondition,
                "no replica of the in-sync set of '\(name)' can be reached: this copy may be "
                    + "needed; see 'storagectl volume why \(name)'")
        }
        return try changed(await store.deleteReplica(id, of: name, discardKept: discardKept))
    }
}
