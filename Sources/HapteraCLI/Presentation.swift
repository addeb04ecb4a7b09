import Foundation
import HapteraAPI
import HapteraHost

/// Objects of the API as the CLI shows them. The JSON fields are documented in docs/cli.md and held
/// by golden tests: they are an interface.
package enum Presentation {
    // MARK: Volumes

    package static func value(_ volume: Haptera_V1_Volume) -> OutputValue {
        .object([
            ("name", .text(volume.name)),
            ("id", .text(volume.id)),
            ("sizeBytes", .number(volume.sizeBytes)),
            ("state", .text(word(volume.state))),
            ("robustness", .text(word(volume.robustness))),
            ("reason", .optional(volume.reason)),
            ("conditions", .list(volume.conditions.map { .text(word($0)) })),
            ("epoch", .number(volume.epoch)),
            ("engine", volume.hasEngine ? value(volume.engine) : .null),
            ("replicas", .list(volume.replicas.map { value($0) })),
            ("replicaCount", .number(UInt64(volume.replicaCount))),
            ("snapshotCount", .number(UInt64(volume.snapshotCount))),
            ("allocatedBytes", volume.hasAllocatedBytes ? .number(volume.allocatedBytes) : .null),
            ("exclusiveBytes", volume.hasExclusiveBytes ? .number(volume.exclusiveBytes) : .null),
            (
                "reclaimableBytes",
                volume.hasReclaimableBytes ? .number(volume.reclaimableBytes) : .null
            ),
            ("stuckBytes", volume.hasStuckBytes ? .number(volume.stuckBytes) : .null),
            ("originVolume", .optional(volume.originVolume)),
            ("originSnapshot", .optional(volume.originSnapshot)),
            ("filling", volume.hasFilling ? value(volume.filling) : .null),
            ("settings", value(volume.settings)),
            ("labels", value(volume.labels)),
        ])
    }

    /// Nil: not every replica has said what it takes.
    private static func space(_ volume: Haptera_V1_Volume) -> String? {
        guard volume.hasAllocatedBytes else { return nil }
        var text = "\(VolumeSize.text(volume.allocatedBytes)) on all replicas"
        if volume.exclusiveBytes < volume.allocatedBytes {
            text += ", \(VolumeSize.text(volume.exclusiveBytes)) not shared"
        }
        if volume.reclaimableBytes > 0 {
            text += ", \(VolumeSize.text(volume.reclaimableBytes)) being given back"
        }
        if volume.stuckBytes > 0 {
            text += ", \(VolumeSize.text(volume.stuckBytes)) kept for clones"
        }
        return text
    }

    /// VOLUME@SNAPSHOT; nil: it was made empty.
    private static func origin(_ volume: Haptera_V1_Volume) -> String? {
        volume.originVolume.isEmpty ? nil : "\(volume.originVolume)@\(volume.originSnapshot)"
    }

    /// What `volume create` answers.
    package static func creation(_ volume: Haptera_V1_Volume) -> String {
        let from = origin(volume).map { " from \($0)" } ?? ""
        let nodes = volume.replicas.filter { !$0.temporary }.map(\.node)
        return "volume \(volume.name) created\(from): \(VolumeSize.text(volume.sizeBytes)), "
            + "replicas on \(nodes.joined(separator: ", "))"
    }

    private static func value(_ filling: Haptera_V1_Filling) -> OutputValue {
        .object([
            ("replicasDone", .number(UInt64(filling.replicasDone))),
            ("replicasTotal", .number(UInt64(filling.replicasTotal))),
            ("regionsDone", .number(filling.regionsDone)),
            ("regionsTotal", .number(filling.regionsTotal)),
            ("percent", .number(percent(filling))),
        ])
    }

    /// Of all replicas, 0...100; 100 when only what is temporary has to go.
    package static func percent(_ filling: Haptera_V1_Filling) -> UInt64 {
        let total = UInt64(filling.replicasTotal)
        guard total > 0, filling.replicasDone < filling.replicasTotal else { return 100 }
        let whole = UInt64(filling.replicasDone) * 100
        guard filling.regionsTotal > 0 else { return whole / total }
        let done = min(filling.regionsDone, filling.regionsTotal)
        return (whole + UInt64(Double(done) / Double(filling.regionsTotal) * 100)) / total
    }

    private static func line(_ filling: Haptera_V1_Filling) -> String {
        "\(percent(filling))%, \(filling.replicasDone) of \(filling.replicasTotal) replicas in sync"
    }

    private static func value(_ settings: Haptera_V1_VolumeSettings) -> OutputValue {
        .object([
            ("minInSync", .number(UInt64(settings.minInSync))),
            ("ioTimeoutMilliseconds", .number(settings.ioTimeoutMilliseconds)),
            ("leaseMilliseconds", .number(settings.leaseMilliseconds)),
            ("removalDeadlineMilliseconds", .number(settings.removalDeadlineMilliseconds)),
            (
                "staleReplicaTimeoutMilliseconds",
                .number(settings.staleReplicaTimeoutMilliseconds)
            ),
            ("detectZeroes", .flag(settings.detectZeroes)),
        ])
    }

    package static func line(_ settings: Haptera_V1_VolumeSettings) -> String {
        let ioTimeout = settings.ioTimeoutMilliseconds
        let stale = settings.staleReplicaTimeoutMilliseconds
        return [
            "min in sync \(settings.minInSync)",
            "I/O timeout " + (ioTimeout == 0 ? "none" : Durations.text(ioTimeout)),
            "lease \(Durations.text(settings.leaseMilliseconds))",
            "removal deadline \(Durations.text(settings.removalDeadlineMilliseconds))",
            "stale replica timeout " + (stale == 0 ? "never" : Durations.text(stale)),
            "detect zeroes " + (settings.detectZeroes ? "on" : "off"),
        ].joined(separator: ", ")
    }

    /// What accepting the loss means for this volume.
    package static func lossExplanation(_ volume: Haptera_V1_Volume) -> String {
        func list(_ replicas: [Haptera_V1_Replica]) -> String {
            replicas.map { "\($0.id) on node \($0.node)" }.joined(separator: ", ")
        }
        let members = volume.replicas.filter(\.inSync)
        let reachable = members.filter { $0.state == .inSync || $0.pid > 0 }
        let missing = members.filter { member in !reachable.contains { $0.id == member.id } }
        var lines = [
            "Volume \(volume.name) (epoch \(volume.epoch)) waits: \(volume.reason)",
            "Its hosts have restarted: \(list(reachable)).",
            "Writes that were acknowledged there and not flushed may be missing. Everything that a "
                + "FLUSH or FUA has answered for is there.",
        ]
        if !missing.isEmpty {
            lines.append(
                "Not reachable, and perhaps better: \(list(missing)). If one of them can come back, "
                    + "wait for it instead: it then resumes by itself, and nothing is lost.")
        } else {
            lines.append("No other replica was in sync: there is none to wait for.")
        }
        return lines.joined(separator: "\n")
    }

    private static func value(_ engine: Haptera_V1_Engine) -> OutputValue {
        .object([
            ("pid", pid(engine.pid)),
            ("node", .text(engine.node)),
            ("uri", .optional(engine.uri)),
            ("unixURI", .optional(engine.unixUri)),
            ("connections", .number(UInt64(engine.connections))),
            ("rebuildDone", .number(engine.rebuildDone)),
            ("rebuildTotal", .number(engine.rebuildTotal)),
            ("restarts", .number(UInt64(engine.restarts))),
        ])
    }

    /// What `volume attach` answers: where to connect.
    package static func attachment(_ volume: Haptera_V1_Volume) -> OutputValue {
        .object([
            ("name", .text(volume.name)),
            ("node", .text(volume.engine.node)),
            ("pid", pid(volume.engine.pid)),
            ("uri", .optional(volume.engine.uri)),
            ("unixURI", .optional(volume.engine.unixUri)),
        ])
    }

    static func pid(_ pid: Int32) -> OutputValue {
        pid > 0 ? .number(UInt64(pid)) : .null
    }

    package static func table(_ volumes: [Haptera_V1_Volume], wide: Bool) -> TextTable {
        let header = ["NAME", "SIZE", "STATE", "ROBUSTNESS", "NODE", "REPLICAS"]
        let rows = volumes.map { volume in
            let inSync = volume.replicas.count { $0.state == .inSync && !$0.temporary }
            let row = [
                volume.name, VolumeSize.text(volume.sizeBytes), word(volume.state),
                word(volume.robustness), volume.engine.node, "\(inSync)/\(volume.replicaCount)",
            ]
            let more = [
                "\(volume.epoch)", "\(volume.snapshotCount)", volume.engine.uri, volume.id,
                Labels.text(volume.labels),
            ]
            return wide ? row + more : row
        }
        let more = ["EPOCH", "SNAPSHOTS", "URI", "ID", "LABELS"]
        return TextTable(wide ? header + more : header, rows)
    }

    package static func details(_ volume: Haptera_V1_Volume, wide: Bool) -> String {
        var lines = [
            "name:        \(volume.name)", "id:          \(volume.id)",
            "size:        \(VolumeSize.text(volume.sizeBytes)) (\(volume.sizeBytes) bytes)",
            "state:       \(word(volume.state))", "robustness:  \(word(volume.robustness))",
        ]
        if !volume.reason.isEmpty { lines.append("reason:      \(volume.reason)") }
        lines += volume.conditions.map { "condition:   \(explanation($0, volume.name))" }
        if volume.hasScrub, volume.scrub.state != .finished {
            lines.append(
                "scrub:       \(word(volume.scrub.state)), \(volume.scrub.regionsDone) of "
                    + "\(volume.scrub.regionsTotal) MiB"
                    + (volume.scrub.reason.isEmpty ? "" : ": \(volume.scrub.reason)"))
        }
        if let origin = origin(volume) { lines.append("origin:      \(origin)") }
        if volume.hasFilling { lines.append("filling:     \(line(volume.filling))") }
        lines.append("epoch:       \(volume.epoch)")
        if volume.snapshotCount > 0 { lines.append("snapshots:   \(volume.snapshotCount)") }
        if let space = space(volume) { lines.append("space:       \(space)") }
        if !volume.labels.isEmpty { lines.append("labels:      \(Labels.text(volume.labels))") }
        lines.append("settings:    \(line(volume.settings))")
        if volume.hasEngine {
            let engine = volume.engine
            lines.append(
                "engine:      node \(engine.node), "
                    + (engine.pid > 0 ? "pid \(engine.pid)" : "not running"))
            if !engine.uri.isEmpty { lines.append("uri:         \(engine.uri)") }
            if !engine.unixUri.isEmpty { lines.append("unix uri:    \(engine.unixUri)") }
            if engine.rebuildTotal > engine.rebuildDone {
                lines.append(
                    "rebuild:     \(engine.rebuildDone) of \(engine.rebuildTotal) regions")
            }
        }
        return lines.joined(separator: "\n") + "\n\n" + table(volume.replicas, wide: wide).text
    }

    // MARK: Replicas

    package static func value(
        _ replica: Haptera_V1_Replica, withVolume: Bool = false
    ) -> OutputValue {
        var fields: [(String, OutputValue)] = [
            ("id", .text(replica.id)),
            ("node", .text(replica.node)),
            ("state", .text(word(replica.state))),
            ("inSync", .flag(replica.inSync)),
            ("pid", pid(replica.pid)),
            ("address", .optional(replica.address)),
            ("directory", .optional(replica.directory)),
            ("allocatedBytes", .number(replica.allocatedBytes)),
            ("restarts", .number(UInt64(replica.restarts))),
            ("reason", .optional(replica.reason)),
            ("replaces", .optional(replica.replaces)),
            ("leaving", .flag(replica.leaving)),
            ("temporary", .flag(replica.temporary)),
        ]
        if withVolume { fields.insert(("volume", .text(replica.volume)), at: 1) }
        return .object(fields)
    }

    package static func table(_ replicas: [Haptera_V1_Replica], wide: Bool) -> TextTable {
        let header = ["REPLICA", "VOLUME", "NODE", "STATE", "IN SYNC", "ADDRESS"]
        let rows = replicas.map { replica in
            let row = [
                replica.id, replica.volume, replica.node,
                word(replica.state) + (replica.leaving ? " (leaving)" : "")
                    + (replica.replaces.isEmpty ? "" : " (new)")
                    + (replica.temporary ? " (temporary)" : ""),
                replica.inSync ? "yes" : "no", replica.address,
            ]
            let pid = replica.pid > 0 ? "\(replica.pid)" : ""
            return wide ? row + [pid, replica.directory, replica.reason] : row
        }
        return TextTable(wide ? header + ["PID", "DIRECTORY", "REASON"] : header, rows)
    }

    // MARK: Events and status

    package static func value(_ event: Haptera_V1_Event) -> OutputValue {
        .object([
            ("id", .number(event.id)),
            ("time", time(event.timeUnixMilliseconds)),
            ("kind", .text(event.kind)),
            ("subject", .text(event.subject)),
            ("message", .text(event.message)),
            ("actor", .text(event.actor)),
            ("peer", .optional(event.peer)),
        ])
    }

    package static func line(_ event: Haptera_V1_Event, wide: Bool) -> String {
        guard case .text(let time) = time(event.timeUnixMilliseconds) else { return "" }
        let line = "\(time)  \(event.kind)  \(event.subject)  \(event.message)"
        return wide ? "\(line)  [\(event.actor) \(event.peer)]" : line
    }

    package static func value(_ status: Haptera_V1_ClusterStatus, server: String) -> OutputValue {
        .object([
            ("server", .text(server)),
            ("clusterID", .text(status.clusterID)),
            ("version", .text(status.version)),
            ("nodes", .number(UInt64(status.nodes))),
            ("nodesReady", .number(UInt64(status.nodesReady))),
            ("volumes", .number(UInt64(status.volumes))),
            ("volumesAttached", .number(UInt64(status.volumesAttached))),
            ("volumesHealthy", .number(UInt64(status.volumesHealthy))),
            ("volumesDegraded", .number(UInt64(status.volumesDegraded))),
            ("volumesStalled", .number(UInt64(status.volumesStalled))),
            ("volumesFaulted", .number(UInt64(status.volumesFaulted))),
            ("replicas", .number(UInt64(status.replicas))),
            ("replicasInSync", .number(UInt64(status.replicasInSync))),
        ])
    }

    package static func details(_ status: Haptera_V1_ClusterStatus, server: String) -> String {
        """
        server:    \(server) (version \(status.version))
        cluster:   \(status.clusterID)
        nodes:     \(status.nodesReady) of \(status.nodes) ready
        volumes:   \(status.volumes), \(status.volumesAttached) attached; \
        \(status.volumesHealthy) healthy, \(status.volumesDegraded) degraded, \
        \(status.volumesStalled) stalled, \(status.volumesFaulted) faulted
        replicas:  \(status.replicasInSync) of \(status.replicas) in sync
        """
    }

    /// UTC, to the millisecond, as in RFC 3339; null for never.
    static func time(_ milliseconds: Int64) -> OutputValue {
        guard milliseconds > 0 else { return .null }
        // The fraction by hand: as a floating-point number it would be off by one at times.
        let seconds = Date(timeIntervalSince1970: Double(milliseconds / 1000))
        let fraction = String(String(milliseconds % 1000 + 1000).dropFirst())
        return .text(seconds.formatted(.iso8601).dropLast() + "." + fraction + "Z")
    }

    // MARK: Words

    package static func word(_ state: Haptera_V1_VolumeState) -> String {
        switch state {
        case .creating: "creating"
        case .detached: "detached"
        case .attaching: "attaching"
        case .attached: "attached"
        case .detaching: "detaching"
        case .deleting: "deleting"
        case .unspecified, .UNRECOGNIZED: "unknown"
        }
    }

    package static func word(_ robustness: Haptera_V1_Robustness) -> String {
        switch robustness {
        case .healthy: "healthy"
        case .degraded: "degraded"
        case .stalled: "stalled"
        case .faulted: "faulted"
        case .unspecified, .UNRECOGNIZED: "unknown"
        }
    }

    private static func word(_ condition: Haptera_V1_VolumeCondition) -> String {
        switch condition {
        case .lostBlocks: "lostBlocks"
        case .unspecified, .UNRECOGNIZED: "unknown"
        }
    }

    /// What it means, and what to do.
    private static func explanation(
        _ condition: Haptera_V1_VolumeCondition, _ volume: String
    ) -> String {
        guard condition == .lostBlocks else { return word(condition) }
        return "lostBlocks: no replica in sync has a good copy of some blocks, and reads of them "
            + "fail; 'storagectl events' says where (BlocksLost). Write them anew or restore them, "
            + "then 'storagectl volume scrub \(volume)' tells whether any are left"
    }

    package static func word(_ state: Haptera_V1_ReplicaState) -> String {
        switch state {
        case .inSync: "inSync"
        case .joining: "joining"
        case .absent: "absent"
        case .full: "full"
        case .failed: "failed"
        case .unspecified, .UNRECOGNIZED: "unknown"
        }
    }
}
