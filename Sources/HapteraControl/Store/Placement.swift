import HapteraHost

/// Chooses nodes for replicas.
package struct Placement: Equatable, Sendable {
    package struct Candidate: Equatable, Sendable {
        package var name: String
        package var replicas: Int
        package var availableBytes: UInt64
        package init(name: String, replicas: Int, availableBytes: UInt64 = .max) {
            self.name = name
            self.replicas = replicas
            self.availableBytes = availableBytes
        }
    }

    /// A replica that a new one on its node may begin as.
    package struct Source: Equatable, Sendable {
        package var replica: String
        package var node: String
        package init(replica: String, node: String) {
            self.replica = replica
            self.node = node
        }
    }
    /// Where a new replica goes, and what it begins as; nil: it is made empty.
    package struct Place: Equatable, Sendable {
        package var node: String
        package var source: String?
        package init(node: String, source: String? = nil) {
            self.node = node
            self.source = source
        }
    }

    /// `requested` with as many names as replicas: exactly there, repeats allowed. Otherwise it
    /// limits the choice (empty: all candidates): first one for each of `sources`, on its node,
    /// then one on each other node, those with the fewest replicas first. `candidates` are the
    /// nodes that are ready.
    package static func choose(
        replicas: Int, requested: [String], candidates: [Candidate], sources: [Source] = []
    ) throws(ControlError) -> [Place] {
        try requireReady(requested, among: candidates)
        if requested.count == replicas {
            var left = sources
            return requested.map { node in
                let index = left.firstIndex { $0.node == node }
                return Place(node: node, source: index.map { left.remove(at: $0).replica })
            }
        }
        guard requested.count <= replicas || Set(requested).count == requested.count else {
            throw ControlError(.invalid, "\(requested.count) nodes named for \(replicas) replicas")
        }
        let allowed =
            candidates
            .filter { requested.isEmpty || requested.contains($0.name) }
            .sorted { ($0.replicas, $0.name) < ($1.replicas, $1.name) }
        let shared = spread(sources, over: allowed.map(\.name)).prefix(replicas)
        let used = Set(shared.map(\.node))
        let others = allowed.map(\.name).filter { !used.contains($0) }
        guard shared.count + others.count >= replicas else {
            throw ControlError(
                .precondition,
                "\(replicas) replicas need \(replicas) nodes, and \(allowed.count) can be used; "
                    + "ask for fewer with --replicas, or name a node for each replica with --node "
                    + "(repeats put several on one node)")
        }
        return shared.map { Place(node: $0.node, source: $0.replica) }
            + others.prefix(replicas - shared.count).map { Place(node: $0) }
    }

    static func requireReady(
        _ requested: [String], among candidates: [Candidate]
    ) throws(ControlError) {
        let ready = Set(candidates.map(\.name))
        for name in requested where !ready.contains(name) {
            throw ControlError(
                .precondition, "node \(name) is not known or not ready; see 'storagectl node list'")
        }
    }

    /// Those on the nodes, in their order: one of each node before a second one of any.
    private static func spread(_ sources: [Source], over nodes: [String]) -> [Source] {
        var rounds: [[Source]] = []
        for node in nodes {
            for (round, source) in sources.filter({ $0.node == node }).enumerated() {
                if round == rounds.count { rounds.append([]) }
                rounds[round].append(source)
            }
        }
        return rounds.flatMap { $0 }
    }

    /// A node for one more replica of a volume that has some on `occupied`: another one, with space
    /// for `neededBytes`, the one with the fewest replicas.
    package static func chooseAnother(
        occupied: Set<String>, neededBytes: UInt64, candidates: [Candidate]
    ) throws(ControlError) -> String {
        let others = candidates.filter { !occupied.contains($0.name) }
        guard !others.isEmpty else {
            throw ControlError(.precondition, "every ready node holds a replica of it already")
        }
        let spacious = others.filter { $0.availableBytes >= neededBytes }
            .sorted { ($0.replicas, $0.name) < ($1.replicas, $1.name) }
        guard let best = spacious.first else {
            throw ControlError(
                .precondition,
                "no other ready node has \(VolumeSize.text(neededBytes)) available")
        }
        return best.name
    }
}
