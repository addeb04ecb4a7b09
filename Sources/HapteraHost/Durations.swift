/// Lengths of time as people write them, in milliseconds.
package enum Durations {
    private static let units: [String: UInt64] = [
        "ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000,
    ]

    /// "500ms", "3s", "30m", "2h", "7d"; a bare number is seconds. Nil if it is none of these.
    package static func parse(_ text: String) -> UInt64? {
        let digits = text.prefix { ("0"..."9").contains($0) }
        let unit = String(text.dropFirst(digits.count))
        guard let count = UInt64(digits), let scale = unit.isEmpty ? 1000 : units[unit] else {
            return nil
        }
        let (milliseconds, overflow) = count.multipliedReportingOverflow(by: scale)
        return overflow ? nil : milliseconds
    }

    package static let rule = "write it as in 500ms, 3s, 30m, 2h or 7d"

    /// In the largest unit that needs no fraction: "500ms", "30m"; "0s".
    package static func text(_ milliseconds: UInt64) -> String {
        guard milliseconds > 0 else { return "0s" }
        for (name, scale) in [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000)]
        where milliseconds % UInt64(scale) == 0 {
            return "\(milliseconds / UInt64(scale))\(name)"
        }
        return "\(milliseconds)ms"
    }

    /// For a length that was measured: the two largest units, whole seconds: "1h 5m", "42s".
    package static func rough(_ milliseconds: UInt64) -> String {
        let seconds = milliseconds / 1000
        switch seconds {
        case ..<60: return "\(seconds)s"
        case ..<3600:
            return seconds % 60 == 0 ? "\(seconds / 60)m" : "\(seconds / 60)m \(seconds % 60)s"
        case ..<86_400: return "\(seconds / 3600)h \(seconds % 3600 / 60)m"
        default: return "\(seconds / 86_400)d \(seconds % 86_400 / 3600)h"
        }
    }
}
