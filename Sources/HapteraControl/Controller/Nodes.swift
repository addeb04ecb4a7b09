import HapteraAPI
import HapteraCore
import HapteraHost

/// Nodes as users see them, and the room they have.
extension Controller {
    /// Of nodes that have said what their disks have; of silent ones, what they said last.
    var spaces: NodeSpaces {
        observedNodes.compactMapValues { Self.space($0.report) }
    }

    private static func space(_ report: Haptera_V1_NodeReport) -> NodeSpace? {
        guard report.capacityBytes > 0 else { return nil }
        return NodeSpace(
            capacityBytes: report.capacityBytes, availableBytes: report.availableBytes,
            allocated: Dictionary(
                report.replicas.map { ($0.replicaID, $0.allocatedBytes) }
            ) { max($0, $1) })
    }

    /// True: it has begun or ceased to run short of space.
    func noteSpace(of node: String) async throws -> Bool {
        guard let space = observedNodes[node].flatMap({ Self.space($0.report) }) else {
            return false
        }
        return try await store.noteSpace(space, of: node)
    }

    /// A controller that has just started does not know what is left where.
    func requireKnownSpaces(_ name: String) async throws {
        let nodes = Set(try await store.volume(named: name).replicas.map(\.node))
        let known = observedNodes
        guard !nodes.allSatisfy({ known[$0] != nil }) else { return }
        guard try await knowsNodes else {
            throw ControlError(
                .unavailable,
                "the controller has just started; some nodes with replicas of volume '\(name)' "
                    + "have yet to report")
        }
    }

    package func nodes() async throws -> [Haptera_V1_Node] {
        let now = observedNodes
        let rooms = try await store.rooms(spaces)
        return try await store.nodes().map { row in
            var node = Haptera_V1_Node()
            node.name = row.name
            node.address = row.address
            node.directory = row.directory
            node.version = row.version
            node.pid = row.pid
            if let seen = now[row.name] {
                node.ready = seen.isReady
                node.lastSeenUnixMilliseconds = seen.lastSeenMilliseconds
                node.capacityBytes = seen.report.capacityBytes
                node.availableBytes = seen.report.availableBytes
                node.allocatedBytes = seen.report.replicas.reduce(0) {
                    saturating($0, $1.allocatedBytes)
                }
                node.replicas = UInt32(seen.report.replicas.count { $0.state == .running })
                node.engines = UInt32(seen.report.engines.count { $0.state != .detached })
            }
            if let room = rooms[row.name] {
                node.promisedBytes = room.promisedBytes
                node.overcommitPercent = UInt32(clamping: room.limits.overcommitPercent)
                node.reserveBytes =
                    room.space.map(room.limits.reserve) ?? UInt64(room.limits.reserveBytes)
                if room.limits.isLow { node.conditions.append(.lowSpace) }
            }
            return node
        }
    }

    package func node(named name: String) async throws -> Haptera_V1_Node {
        guard let node = try await nodes().first(where: { $0.name == name }) else {
            throw MetadataStore.noNode(name)
        }
        return node
    }

    package func updateNode(
        _ request: Haptera_V1_UpdateNodeRequest
    ) async throws -> Haptera_V1_Node {
        try await store.updateNode(request)
        _ = try await noteSpace(of: request.name)
        changes.notify()
        return try await node(named: request.name)
    }
}
