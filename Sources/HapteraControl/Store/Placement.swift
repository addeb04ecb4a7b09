import HapteraHost

/// Chooses nodes for replicas.
package struct Placement: Equatable, Sendable {
    package struct Candidate: Equatable, Sendable {
        package var name: String
        package var replicas: Int { room.replicas }
        package var room: NodeRoom
        package init(name: String, replicas: Int) {
            self.init(NodeRoom(limits: NodeLimits(node: name), space: nil))
            room.replicas = replicas
        }
        package init(_ room: NodeRoom) {
            name = room.limits.node
            self.room = room
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
    /// nodes that are ready. Never where there is no room for `need`.
    package static func choose(
        replicas: Int, requested: [String], candidates: [Candidate], sources: [Source] = [],
        need: ReplicaNeed
    ) throws(ControlError) -> [Place] {
        try requireReady(requested, among: candidates)
        var rooms = Rooms(candidates, need)
        if requested.count == replicas {
            var left = sources
            var places: [Place] = []
            for node in requested {
                let index = left.firstIndex { $0.node == node }
                let source = index.map { left.remove(at: $0).replica }
                if let why = rooms.take(node, isShared: source != nil) {
                    throw ControlError(.precondition, why)
                }
                places.append(Place(node: node, source: source))
            }
            return places
        }
        guard requested.count <= replicas || Set(requested).count == requested.count else {
            throw ControlError(
                .invalid,
                "\(requested.count) nodes are named for \(replicas) replicas, some of them more than "
                    + "once: name as many as replicas, or each node to choose from once")
        }
        let allowed =
            candidates
            .filter { requested.isEmpty || requested.contains($0.name) }
            .sorted { ($0.replicas, $0.name) < ($1.replicas, $1.name) }
        var places: [Place] = []
        for source in spread(sources, over: allowed.map(\.name)) where places.count < replicas {
            guard rooms.take(source.node, isShared: true) == nil else { continue }
            places.append(Place(node: source.node, source: source.replica))
        }
        let used = Set(places.map(\.node))
        for node in allowed.map(\.name) where places.count < replicas && !used.contains(node) {
            if rooms.take(node) == nil { places.append(Place(node: node)) }
        }
        guard places.count == replicas else {
            let usable = allowed.count { rooms.refusals[$0.name] == nil || used.contains($0.name) }
            throw ControlError(
                .precondition,
                "\(replicas) replicas need \(replicas) nodes, and \(usable) can be used; "
                    + rooms.refusalWords
                    + "ask for fewer with --replicas, or name a node for each replica with --node "
                    + "(repeats put several on one node)")
        }
        return places
    }

    /// Up to `max` places that share, each on another node, those with the fewest replicas first.
    /// `refusals`: why not on others, in words.
    static func share(
        _ sources: [Source], candidates: [Candidate], need: ReplicaNeed, max: Int
    ) -> (places: [Place], refusals: String) {
        var rooms = Rooms(candidates, need)
        var places: [Place] = []
        let nodes = candidates.sorted { ($0.replicas, $0.name) < ($1.replicas, $1.name) }
        for node in nodes.map(\.name) where places.count < max {
            guard let source = sources.first(where: { $0.node == node }),
                rooms.take(node, isShared: true) == nil
            else { continue }
            places.append(Place(node: node, source: source.replica))
        }
        return (places, String(rooms.refusalWords.dropLast(2)))
    }

    /// What is left on each node while replicas of one volume are placed.
    private struct Rooms {
        private var rooms: [String: NodeRoom]
        private let need: ReplicaNeed
        /// Why there was none, by node.
        private(set) var refusals: [String: String] = [:]
        private static let refusalsSaidMax = 3

        init(_ candidates: [Candidate], _ need: ReplicaNeed) {
            rooms = Dictionary(uniqueKeysWithValues: candidates.map { ($0.name, $0.room) })
            self.need = need
        }

        mutating func take(_ node: String, isShared: Bool = false) -> String? {
            let why = rooms[node]?.take(isShared ? need.withoutData : need)
            if let why { refusals[node] = why }
            return why
        }

        var refusalWords: String {
            let said = refusals.sorted { $0.key < $1.key }.prefix(Self.refusalsSaidMax).map(\.value)
            let more = refusals.count - said.count
            return said.map { $0 + "; " }.joined()
                + (more > 0 ? "and \(more) more have no room; " : "")
        }
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

    /// A node for one more replica of a volume that has some on `occupied`: another one, with room
    /// for it, the one with the fewest replicas.
    package static func chooseAnother(
        occupied: Set<String>, need: ReplicaNeed, candidates: [Candidate]
    ) throws(ControlError) -> String {
        let others = candidates.filter { !occupied.contains($0.name) }
        guard !others.isEmpty else {
            throw ControlError(.precondition, "every ready node holds a replica of it already")
        }
        var rooms = Rooms(others, need)
        let best = others.sorted { ($0.replicas, $0.name) < ($1.replicas, $1.name) }
            .first { rooms.take($0.name) == nil }
        guard let best else {
            throw ControlError(
                .precondition,
                "no other ready node has room: " + String(rooms.refusalWords.dropLast(2)))
        }
        return best.name
    }
}
