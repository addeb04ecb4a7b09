/// The rules for what people type. Checked where it is typed, for a good message, and again by the
/// controller, for everybody else.
package enum Names {
    /// Volumes and nodes: a DNS label, so that every orchestrator can carry it unchanged.
    package static func isValidLabel(_ name: String) -> Bool {
        let bytes = Array(name.utf8)
        guard (1...63).contains(bytes.count), let first = bytes.first, let last = bytes.last else {
            return false
        }
        return bytes.allSatisfy { isAlphanumeric($0) || $0 == UInt8(ascii: "-") }
            && isAlphanumeric(first) && isAlphanumeric(last)
    }

    package static let labelRule =
        "1 to 63 lower-case letters, digits and hyphens, with no hyphen at either end"

    private static func isAlphanumeric(_ byte: UInt8) -> Bool {
        (UInt8(ascii: "a")...UInt8(ascii: "z")).contains(byte)
            || (UInt8(ascii: "0")...UInt8(ascii: "9")).contains(byte)
    }

    /// Splits HOST:PORT; an IPv6 host is in brackets. Port 0 is refused unless `allowZero`.
    package static func hostAndPort(
        _ text: String, allowZero: Bool = false
    ) -> (host: String, port: Int)? {
        guard let colon = text.lastIndex(of: ":") else { return nil }
        var host = String(text[..<colon])
        let digits = text[text.index(after: colon)...]
        guard digits.utf8.allSatisfy({ (48...57).contains($0) }), let port = Int(digits),
            port <= 65535, port > 0 || allowZero
        else { return nil }
        if host.hasPrefix("["), host.hasSuffix("]") {
            host = String(host.dropFirst().dropLast())
        } else if host.contains(":") {
            return nil
        }
        guard !host.isEmpty, host.utf8.count <= 253,
            host.utf8.allSatisfy({ $0 > 32 && $0 < 127 && $0 != UInt8(ascii: "=") })
        else { return nil }
        return (host, port)
    }

    package static func endpoint(host: String, port: Int) -> String {
        host.contains(":") ? "[\(host)]:\(port)" : "\(host):\(port)"
    }
}

/// Sizes of volumes, bytes.
package enum VolumeSize {
    package static let minimum: UInt64 = 1 << 20
    package static let maximum: UInt64 = 1 << 50
    package static let granularity: UInt64 = 4096

    package static func isValid(_ bytes: UInt64) -> Bool {
        (minimum...maximum).contains(bytes) && bytes % granularity == 0
    }

    /// So many percent of it; what is too large to be told is the largest number.
    package static func percent(_ percent: UInt32, of bytes: UInt64) -> UInt64 {
        let (high, low) = bytes.multipliedFullWidth(by: UInt64(percent))
        return high >= 100 ? .max : UInt64(100).dividingFullWidth((high, low)).quotient
    }

    package static let rule = "a multiple of 4096 bytes, from 1MiB to 1PiB"

    /// "10GiB", "512MiB", "1TiB", "1.5GiB", "4GB", "1073741824". A bare "G" means GiB, as in most
    /// storage tools. Nil if it is not a size, or not a whole number of bytes.
    package static func parse(_ text: String) -> UInt64? {
        let digits = text.prefix { $0.isASCII && ($0.isNumber || $0 == ".") }
        let unit = text.dropFirst(digits.count).lowercased()
        guard let multiplier = units[unit] else { return nil }
        let parts = digits.split(separator: ".", omittingEmptySubsequences: false)
        guard (1...2).contains(parts.count), let whole = UInt64(parts[0]) else { return nil }
        let (bytes, overflow) = whole.multipliedReportingOverflow(by: multiplier)
        guard !overflow else { return nil }
        guard parts.count == 2 else { return bytes }
        guard (1...6).contains(parts[1].count), let fraction = UInt64(parts[1]) else { return nil }
        let divisor = (0..<parts[1].count).reduce(UInt64(1)) { product, _ in product * 10 }
        let (scaled, tooLarge) = fraction.multipliedReportingOverflow(by: multiplier)
        guard !tooLarge, scaled % divisor == 0 else { return nil }
        let (sum, sumOverflow) = bytes.addingReportingOverflow(scaled / divisor)
        return sumOverflow ? nil : sum
    }

    /// What is wrong with a volume's size as somebody has typed it; nil: nothing.
    package static func objection(to typed: String) -> String? {
        let text = typed.hasPrefix("-") ? typed.dropFirst() : typed[...]
        let digits = text.prefix { $0.isASCII && ($0.isNumber || $0 == ".") }
        let parts = digits.split(separator: ".", omittingEmptySubsequences: false)
        guard let multiplier = units[text.dropFirst(digits.count).lowercased()],
            (1...2).contains(parts.count), !parts.contains(where: \.isEmpty),
            let whole = Double(parts[0])
        else { return "it is no number with a unit, as in 10GiB" }
        if typed.hasPrefix("-") { return "it is negative" }
        if whole * Double(multiplier) > Double(maximum) {
            return "it is too large: the most is \(self.text(maximum))"
        }
        guard let bytes = parse(typed) else {
            return parts.count == 2 && parts[1].count > 6
                ? "write it with 6 decimals at most" : "it is no whole number of bytes"
        }
        if bytes == 0 { return "it is zero: the least is \(self.text(minimum))" }
        if bytes < minimum { return "it is too small: the least is \(self.text(minimum))" }
        if bytes > maximum { return "it is too large: the most is \(self.text(maximum))" }
        guard bytes % granularity == 0 else {
            let next = (bytes / granularity + 1) * granularity
            return "it is no multiple of \(granularity) bytes; the next one is \(next)"
        }
        return nil
    }

    private static let units: [String: UInt64] = [
        "": 1, "b": 1, "k": 1 << 10, "kib": 1 << 10, "m": 1 << 20, "mib": 1 << 20, "g": 1 << 30,
        "gib": 1 << 30, "t": 1 << 40, "tib": 1 << 40, "p": 1 << 50, "pib": 1 << 50, "kb": 1000,
        "mb": 1_000_000, "gb": 1_000_000_000, "tb": 1_000_000_000_000,
        "pb": 1_000_000_000_000_000,
    ]

    /// The largest binary unit that needs no more than one decimal: "10GiB", "1.5GiB", "4096B".
    package static func text(_ bytes: UInt64) -> String {
        let names = ["PiB", "TiB", "GiB", "MiB", "KiB"]
        for (index, name) in names.enumerated() {
            let unit = UInt64(1) << UInt64(10 * (names.count - index))
            guard bytes >= unit else { continue }
            let tenths = (bytes % unit) * 10 / unit
            return tenths == 0 ? "\(bytes / unit)\(name)" : "\(bytes / unit).\(tenths)\(name)"
        }
        return "\(bytes)B"
    }
}
