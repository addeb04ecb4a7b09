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
