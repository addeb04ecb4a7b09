import HapteraAPI
import HapteraHost

/// One rebuild, resync or resolution as the CLI shows it.
package struct RebuildRow: Sendable {
    let volume: String
    let rebuild: Haptera_V1_Rebuild

    package init(volume: String, rebuild: Haptera_V1_Rebuild) {
        self.volume = volume
        self.rebuild = rebuild
    }

    var name: String { rebuild.replicaID.isEmpty ? volume : rebuild.replicaID }

    var kind: String {
        switch rebuild.kind {
        case .resync: "resync"
        case .rebuild: "rebuild"
        case .resolve: "resolve"
        case .unspecified, .UNRECOGNIZED: "unknown"
        }
    }

    /// 0...100; nil while it is not known how much there is.
    package var percent: UInt64? {
        guard rebuild.regionsTotal > 0 else { return nil }
        return min(rebuild.regionsDone, rebuild.regionsTotal) * 100 / rebuild.regionsTotal
    }

    /// By the regions done so far; nil before there are any, and when all are.
    package var etaMilliseconds: UInt64? {
        let done = rebuild.regionsDone
        guard done > 0, rebuild.elapsedMilliseconds > 0, rebuild.regionsTotal > done else {
            return nil
        }
        let left = Double(rebuild.regionsTotal - done) / Double(done)
        return UInt64(left * Double(rebuild.elapsedMilliseconds))
    }

    package var value: OutputValue {
        .object([
            ("volume", .text(volume)),
            ("replica", .optional(rebuild.replicaID)),
            ("node", .optional(rebuild.node)),
            ("kind", .text(kind)),
            ("phase", .optional(rebuild.phase)),
            ("regionsDone", .number(rebuild.regionsDone)),
            ("regionsTotal", .number(rebuild.regionsTotal)),
            ("percent", percent.map { .number($0) } ?? .null),
            ("bytesCopied", .number(rebuild.bytesCopied)),
            ("bytesPerSecond", .number(rebuild.bytesPerSecond)),
            ("elapsedMilliseconds", .number(rebuild.elapsedMilliseconds)),
            ("etaMilliseconds", etaMilliseconds.map { .number($0) } ?? .null),
        ])
    }

    package static func table(_ rows: [RebuildRow]) -> TextTable {
        TextTable(
            [
                "VOLUME", "REPLICA", "NODE", "KIND", "PHASE", "DONE", "TOTAL", "PERCENT", "BYTES",
                "RATE", "ELAPSED", "ETA",
            ], rows.map(\.columns))
    }

    private var columns: [String] {
        [
            volume, rebuild.replicaID, rebuild.node, kind, rebuild.phase, "\(rebuild.regionsDone)",
            "\(rebuild.regionsTotal)", percent.map { "\($0)%" } ?? "",
            VolumeSize.text(rebuild.bytesCopied), rate,
            Durations.rough(rebuild.elapsedMilliseconds), eta,
        ]
    }

    private var rate: String { "\(VolumeSize.text(rebuild.bytesPerSecond))/s" }
    private var eta: String { etaMilliseconds.map { Durations.rough($0) } ?? "" }

    /// "vol 0123456789abcdef resync copying [#####.....] 52% 1.2GiB 310MiB/s, 12s left"
    package func bar(width: Int) -> String {
        let filled = Int((percent ?? 0) * UInt64(width) / 100)
        let bar =
            String(repeating: "#", count: filled) + String(repeating: ".", count: width - filled)
        let what = [volume, rebuild.replicaID, kind, rebuild.phase].filter { !$0.isEmpty }
        let left = eta.isEmpty ? "" : ", \(eta) left"
        return "\(what.joined(separator: " ")) [\(bar)] \(percent ?? 0)% "
            + "\(VolumeSize.text(rebuild.bytesCopied)) \(rate)\(left)"
    }
}
