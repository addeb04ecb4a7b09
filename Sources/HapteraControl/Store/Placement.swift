import HapteraHost

/// Chooses nodes for a new volume's replicas.
package struct Placement: Equatable, Sendable {
    package struct Candidate: Equatable, Sendable {
        package var name: String
        package var replicas: Int
        package init(name: String, replicas: Int) {
            self.name = name
            self.replicas = replicas
        }
    }

    /// `requested` with as many names as replicas: exactly there, repeats allowed. Otherwise it
    /// limits the choice (empty: all candidates), one replica on each, those with the fewest
    /// replicas first. `candidates` are the nodes that are ready.
    package static func choose(
        replicas: Int, requested: [String], candidates: [Candidate]
    ) throws(ControlError) -> [String] {
        let ready = Set(candidates.map(\.name))
        for name in requested where !ready.contains(name) {
            throw ControlError(
                .precondition, "node \(name) is not known or not ready; see 'storagectl node list'")
        }
        if requested.count == replicas { return requested }
        guard requested.count <= replicas || Set(requested).count == requested.count else {
            throw ControlError(.invalid, "\(requested.count) nodes named for \(replicas) replicas")
        }
        let allowed =
            candidates
            .filter { requested.isEmpty || requested.contains($0.name) }
            .sorted { ($0.replicas, $0.name) < ($1.replicas, $1.name) }
        guard allowed.count >= replicas else {
            throw ControlError(
                .precondition,
                "\(replicas) replicas need \(replicas) nodes, and \(allowed.count) can be used; "
                    + "ask for fewer with --replicas, or name a node for each replica with --node "
                    + "(repeats put several on one node)")
        }
        return allowed.prefix(replicas).map(\.name)
    }
}
