import HapteraAPI
import HapteraHost

/// Nodes, and the room they have.
extension Presentation {
    package static func value(_ node: Haptera_V1_Node) -> OutputValue {
        .object([
            ("name", .text(node.name)),
            ("ready", .flag(node.ready)),
            ("conditions", .list(node.conditions.map { .text(word($0)) })),
            ("address", .text(node.address)),
            ("directory", .text(node.directory)),
            ("version", .text(node.version)),
            ("pid", pid(node.pid)),
            ("capacityBytes", .number(node.capacityBytes)),
            ("availableBytes", .number(node.availableBytes)),
            ("allocatedBytes", .number(node.allocatedBytes)),
            ("promisedBytes", .number(node.promisedBytes)),
            (
                "overcommitPercent",
                node.overcommitPercent == 0 ? .null : .number(UInt64(node.overcommitPercent))
            ),
            ("reserveBytes", .number(node.reserveBytes)),
            ("replicas", .number(UInt64(node.replicas))),
            ("engines", .number(UInt64(node.engines))),
            ("lastSeen", time(node.lastSeenUnixMilliseconds)),
        ])
    }

    private static func word(_ condition: Haptera_V1_NodeCondition) -> String {
        switch condition {
        case .lowSpace: "lowSpace"
        case .unspecified, .UNRECOGNIZED: "unknown"
        }
    }

    private static func overcommit(_ node: Haptera_V1_Node) -> String {
        node.overcommitPercent == 0 ? "none" : "\(node.overcommitPercent)%"
    }

    package static func limits(_ node: Haptera_V1_Node) -> String {
        "overcommit \(overcommit(node)), reserve \(VolumeSize.text(node.reserveBytes))"
    }

    package static func table(_ nodes: [Haptera_V1_Node], wide: Bool) -> TextTable {
        let header = [
            "NAME", "READY", "CONDITIONS", "ADDRESS", "REPLICAS", "ENGINES", "CAPACITY",
            "AVAILABLE", "ALLOCATED", "PROMISED",
        ]
        let rows = nodes.map { node in
            let row = [
                node.name, node.ready ? "yes" : "no",
                node.conditions.map(word).joined(separator: ","),
                node.address, "\(node.replicas)", "\(node.engines)",
                VolumeSize.text(node.capacityBytes), VolumeSize.text(node.availableBytes),
                VolumeSize.text(node.allocatedBytes), VolumeSize.text(node.promisedBytes),
            ]
            let more = [
                overcommit(node), VolumeSize.text(node.reserveBytes), "\(node.pid)", node.version,
                node.directory,
            ]
            return wide ? row + more : row
        }
        let more = ["OVERCOMMIT", "RESERVE", "PID", "VERSION", "DIRECTORY"]
        return TextTable(wide ? header + more : header, rows)
    }

    package static func details(_ node: Haptera_V1_Node) -> String {
        let promised = VolumeSize.text(node.promisedBytes)
        let most = VolumeSize.percent(node.overcommitPercent, of: node.capacityBytes)
        let limit = node.overcommitPercent == 0 ? "" : " of at most \(VolumeSize.text(most))"
        let conditions = node.conditions.map(word).joined(separator: ", ")
        return """
            name:        \(node.name)
            ready:       \(node.ready ? "yes" : "no")
            conditions:  \(conditions.isEmpty ? "none" : conditions)
            address:     \(node.address)
            directory:   \(node.directory)
            version:     \(node.version), pid \(node.pid)
            capacity:    \(VolumeSize.text(node.capacityBytes)), \
            \(VolumeSize.text(node.availableBytes)) available
            allocated:   \(VolumeSize.text(node.allocatedBytes)) by \(node.replicas) replicas
            promised:    \(promised)\(limit)
            limits:      \(limits(node))
            engines:     \(node.engines)
            """
    }
}
