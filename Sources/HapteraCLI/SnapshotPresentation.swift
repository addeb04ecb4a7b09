import Foundation
import HapteraAPI
import HapteraHost

/// Snapshots as the CLI shows them.
extension Presentation {
    package static func value(_ snapshot: Haptera_V1_Snapshot) -> OutputValue {
        .object([
            ("name", .text(snapshot.name)),
            ("volume", .text(snapshot.volume)),
            ("created", time(snapshot.createdUnixMilliseconds)),
            ("layer", .number(UInt64(snapshot.layer))),
            ("sizeBytes", .number(snapshot.sizeBytes)),
            ("ownBytes", snapshot.hasOwnBytes ? .number(snapshot.ownBytes) : .null),
            (
                "exclusiveBytes",
                snapshot.hasExclusiveBytes ? .number(snapshot.exclusiveBytes) : .null
            ),
            (
                "cumulativeBytes",
                snapshot.hasCumulativeBytes ? .number(snapshot.cumulativeBytes) : .null
            ),
            ("parent", .optional(snapshot.parent)),
            ("isVolumeParent", .flag(snapshot.isVolumeParent)),
            ("uri", .optional(snapshot.uri)),
            ("unixURI", .optional(snapshot.unixUri)),
            ("labels", value(snapshot.labels)),
        ])
    }

    package static func table(
        _ snapshots: [Haptera_V1_Snapshot], now: Date, wide: Bool
    ) -> TextTable {
        // Each after the one before it, and the volume after the last: nobody has to be told.
        let isChain =
            zip(snapshots, [""] + snapshots.map(\.name)).allSatisfy { $0.parent == $1 }
            && snapshots.last?.isVolumeParent != false
        let header = [
            "NAME", "CREATED", "AGE", "LAYER", "SIZE", "OWN", "EXCLUSIVE", "CUMULATIVE",
        ]
        var rows = snapshots.map { snapshot in
            var row = [
                snapshot.name, created(snapshot), age(snapshot, now), "\(snapshot.layer)",
                VolumeSize.text(snapshot.sizeBytes), own(snapshot), exclusive(snapshot),
                cumulative(snapshot),
            ]
            if !isChain { row.append(snapshot.parent.isEmpty ? "-" : snapshot.parent) }
            return wide ? row + [snapshot.uri, Labels.text(snapshot.labels)] : row
        }
        let columns = isChain ? header : header + ["PARENT"]
        let names = wide ? columns + ["URI", "LABELS"] : columns
        guard !isChain else { return TextTable(names, rows) }
        let parent = snapshots.first(where: \.isVolumeParent)?.name ?? "-"
        let dashes = [String](repeating: "-", count: header.count - 1)
        rows.append(["(volume)"] + dashes + [parent] + (wide ? ["", ""] : []))
        // Of a part of them, the last column alone says what came after what.
        guard let tree = SnapshotTree(snapshots) else { return TextTable(names, rows) }
        return TextTable(
            names, tree.lines.map { [$0.branches + rows[$0.index][0]] + rows[$0.index].dropFirst() }
        )
    }

    package static func details(_ snapshot: Haptera_V1_Snapshot, now: Date) -> String {
        var lines = [
            "name:        \(snapshot.name)", "volume:      \(snapshot.volume)",
            "created:     \(created(snapshot)) (\(age(snapshot, now)) ago)",
            "layer:       \(snapshot.layer)",
            "size:        \(VolumeSize.text(snapshot.sizeBytes)) (\(snapshot.sizeBytes) bytes)",
        ]
        if snapshot.hasOwnBytes {
            lines.append("own:         \(own(snapshot)), \(cumulative(snapshot)) with those below")
        }
        if snapshot.hasExclusiveBytes {
            lines.append("exclusive:   \(exclusive(snapshot)), which deleting it gives back")
        }
        if !snapshot.parent.isEmpty { lines.append("parent:      \(snapshot.parent)") }
        if !snapshot.labels.isEmpty {
            lines.append("labels:      \(Labels.text(snapshot.labels))")
        }
        if snapshot.uri.isEmpty, snapshot.unixUri.isEmpty {
            lines.append(
                "attach the volume to read it: storagectl volume attach \(snapshot.volume)")
        }
        if !snapshot.uri.isEmpty { lines.append("uri:         \(snapshot.uri)") }
        if !snapshot.unixUri.isEmpty { lines.append("unix uri:    \(snapshot.unixUri)") }
        return lines.joined(separator: "\n")
    }

    /// What `snapshot create` says. `before`: what had the name before it was asked for.
    package static func taken(
        _ snapshot: Haptera_V1_Snapshot, before: Haptera_V1_Snapshot? = nil
    ) -> String {
        let wasThere = before?.layer == snapshot.layer
        return "snapshot \(snapshot.name) of volume \(snapshot.volume) "
            + (wasThere ? "was there already, taken " : "is taken: ")
            + "\(created(snapshot)), layer \(snapshot.layer)"
    }

    /// What `snapshot delete` says.
    package static func deleted(_ name: String, of volume: String) -> String {
        "snapshot \(name) of volume \(volume) deleted"
    }

    package static func deletion(_ name: String, of volume: String) -> OutputValue {
        .object([("name", .text(name)), ("volume", .text(volume)), ("deleted", .flag(true))])
    }

    private static func own(_ snapshot: Haptera_V1_Snapshot) -> String {
        snapshot.hasOwnBytes ? VolumeSize.text(snapshot.ownBytes) : "-"
    }
    private static func exclusive(_ snapshot: Haptera_V1_Snapshot) -> String {
        snapshot.hasExclusiveBytes ? VolumeSize.text(snapshot.exclusiveBytes) : "-"
    }
    private static func cumulative(_ snapshot: Haptera_V1_Snapshot) -> String {
        snapshot.hasCumulativeBytes ? VolumeSize.text(snapshot.cumulativeBytes) : "-"
    }

    /// UTC, whole seconds: for people.
    private static func created(_ snapshot: Haptera_V1_Snapshot) -> String {
        Date(timeIntervalSince1970: Double(snapshot.createdUnixMilliseconds / 1000))
            .formatted(.iso8601)
    }

    /// Clocks of two hosts differ: what was taken a moment ago may seem to lie ahead.
    private static func age(_ snapshot: Haptera_V1_Snapshot, _ now: Date) -> String {
        let milliseconds = Int64(now.timeIntervalSince1970 * 1000)
        return Durations.rough(
            UInt64(clamping: milliseconds - snapshot.createdUnixMilliseconds))
    }
}
