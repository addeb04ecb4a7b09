import HapteraAPI
import HapteraCore

/// What the nodes hold, whether or not the store knows of it.
struct NodeScan: Sendable {
    struct Found: Equatable, Sendable {
        var node: String
        var directory: String
        var inspection: DirectoryInspection
    }
    /// By replica id.
    var replicas: [String: Found] = [:]
    struct Engine: Equatable, Sendable {
        var node: String
        var generation: UInt64
        /// It lets no client in.
        var isMaintenance = false
    }
    /// By volume id, the engines that run.
    var engines: [String: Engine] = [:]
    var problems: [String] = []

    mutating func add(_ found: Found) {
        let id = found.inspection.replica
        guard let other = replicas[id] else {
            replicas[id] = found
            return
        }
        // A copied directory: the one that went on is the replica.
        problems.append("replica \(id) is on \(other.node) and on \(found.node)")
        if found.inspection.promise > other.inspection.promise { replicas[id] = found }
    }
}

/// One volume as its replicas remember it.
struct ReconstructionCandidate {
    let id: String
    let name: String
    let found: [NodeScan.Found]
    let stored: StoredVolume?
    let wasDeleted: Bool
    /// Nil: no record was found, or the replicas contradict each other.
    let plan: Reconstruction?

    init(id: String, found: [NodeScan.Found], stored: StoredVolume?, wasDeleted: Bool) {
        self.id = id
        self.found = found.sorted { $0.inspection.replica < $1.inspection.replica }
        self.stored = stored
        self.wasDeleted = wasDeleted
        name = stored?.volume.name ?? found[0].inspection.name
        plan = Reconstruction(
            surveys: found.compactMap(\.inspection.survey),
            known: (stored?.replicas ?? []).compactMap { ReplicaID($0.id) })
    }

    /// The store is as new as the replicas, and knows all of them.
    var isCurrent: Bool {
        guard let stored, let record = stored.record else { return false }
        // Made and never attached: replicas have no record then.
        if plan == nil, found.allSatisfy({ $0.inspection.promise == 0 }) { return true }
        guard let plan else { return false }
        let known = Set(stored.replicas.compactMap(\.member))
        let named = record.inSync + record.out.map(\.member)
        return record.epoch >= plan.newest.epoch
            && found.compactMap(\.inspection.member).filter(named.contains)
                .allSatisfy(known.contains)
    }

    func objection(force: Bool, takenNames: [String: String]) -> String? {
        if wasDeleted { return "it was deleted" }
        if let stored, stored.volume.phase != .ready {
            return "it is \(stored.volume.phase.rawValue)"
        }
        guard let plan else {
            return found.allSatisfy { $0.inspection.promise == 0 }
                ? "it was never attached, so it holds nothing: create it again"
                : "its replicas hold different records of one epoch, or none"
        }
        if let other = takenNames[name], other != id {
            return "another volume has its name"
        }
        switch plan.verdict {
        case .certain: return nil
        case .useless: return "no member of its in-sync set was found: its data is elsewhere"
        case .doubtful:
            return force
                ? nil
                : "replicas that were not found may know more; bring their nodes back, or, if they "
                    + "are gone for good, use --force"
        }
    }

    /// The record to begin with. In-sync replicas nobody found are out, and kept: should one ever
    /// return, it may hold writes no other has.
    func record(nonce: UInt64) -> VolumeRecord? {
        guard let plan else { return nil }
        var record = plan.record(nonce: nonce)
        let seen = Set(found.compactMap(\.inspection.member))
        let absent = record.inSync.filter { !seen.contains($0) }
        guard !absent.isEmpty else { return record }
        record.inSync.removeAll { absent.contains($0) }
        record.out += absent.map {
            VolumeRecord.Departure(
                member: $0, leftEpoch: record.epoch, stablePoint: .zero,
                partedEpoch: plan.newest.epoch, reason: .administrator, isKept: true)
        }
        return record
    }

    func message(force: Bool, takenNames: [String: String]) -> Haptera_V1_ReconstructedVolume {
        var message = Haptera_V1_ReconstructedVolume()
        message.id = id
        message.name = name
        message.found = found.map { "\($0.inspection.replica) on \($0.node)" }
        message.storedEpoch = stored?.record?.epoch.rawValue ?? 0
        message.current = isCurrent
        if !isCurrent {
            message.objection = objection(force: force, takenNames: takenNames) ?? ""
        }
        guard let plan else { return message }
        message.sizeBytes = plan.newest.size
        message.epoch = plan.newest.epoch.rawValue
        message.newestOn = found.filter { $0.inspection.installed?.epoch == plan.newest.epoch }
            .map { "\($0.inspection.replica) on \($0.node)" }
        message.missing = plan.missing.map(\.text)
        message.safe = plan.verdict == .certain
        return message
    }
}

extension Controller {
    /// Looks at every replica directory of every node, and with `act` makes the store know what
    /// they say.
    package func reconstruct(
        _ request: Haptera_V1_ReconstructStoreRequest
    ) async throws -> Haptera_V1_ReconstructStoreResponse {
        let scan = try await scanNodes()
        let candidates = try await candidates(scan).filter {
            request.volume.isEmpty || $0.name == request.volume
        }
        guard request.volume.isEmpty || !candidates.isEmpty else {
            throw ControlError(
                .notFound, "no node holds a replica of a volume '\(request.volume)'")
        }
        var response = Haptera_V1_ReconstructStoreResponse()
        response.problems = scan.problems
        for candidate in candidates {
            let names = try await store.volumes().map { ($0.volume.name, $0.volume.id) }
            let taken = Dictionary(names) { $1 }
            var message = candidate.message(force: request.force, takenNames: taken)
            if request.act, !message.current, message.objection.isEmpty,
                let record = candidate.record(nonce: UInt64.random(in: 1 ... .max))
            {
                try await store.reconstruct(
                    record, candidate.found, engine: scan.engines[candidate.id])
                message.newEpoch = record.epoch.rawValue
            }
            response.volumes.append(message)
        }
        if request.act { changes.notify() }
        return response
    }

    private func candidates(_ scan: NodeScan) async throws -> [ReconstructionCandidate] {
        let byVolume = Dictionary(grouping: scan.replicas.values, by: \.inspection.volume)
        let stored = try await store.volumes()
        let deleted = try await store.deletedVolumeIDs()
        return byVolume.map { id, found in
            ReconstructionCandidate(
                id: id, found: found, stored: stored.first { $0.volume.id == id },
                wasDeleted: deleted.contains(id))
        }.sorted { ($0.name, $0.id) < ($1.name, $1.id) }
    }

    private func scanNodes() async throws -> NodeScan {
        var scan = NodeScan()
        for node in try await store.nodes().map(\.name) {
            do {
                // Without ids: only their names, and the engines.
                let answer = try await tasks.ask(node) { $0.inspect.replicaIds = [] }
                for engine in answer.engines {
                    scan.engines[engine.volumeID] = .init(
                        node: node, generation: engine.clientGeneration,
                        isMaintenance: engine.maintenance)
                }
                let directories = Dictionary(
                    answer.replicas.map { ($0.replicaID, $0.directory) }
                ) { $1 }
                let outcomes = await inspect(
                    directories.keys.sorted().map { (node: node, replica: $0) })
                for (id, outcome) in outcomes.sorted(by: { $0.key < $1.key }) {
                    let directory = directories[id] ?? ""
                    switch outcome {
                    case .found(let found) where found.replica == id:
                        scan.add(.init(node: node, directory: directory, inspection: found))
                    case .found(let found):
                        scan.problems.append(
                            "\(directory) on \(node) holds replica \(found.replica)")
                    case .failed(let reason):
                        scan.problems.append("\(directory) on \(node): \(reason)")
                    }
                }
            } catch {
                scan.problems.append("\(error)")
            }
        }
        return scan
    }
}
