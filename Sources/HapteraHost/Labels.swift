/// Labels of volumes and snapshots: keys and values with the syntax of Kubernetes, so that its
/// objects' labels can be carried over unchanged.
package enum Labels {
    package static let countMax = 64
    package static let nameLengthMax = 63
    package static let prefixLengthMax = 253
    /// Keys of this prefix, and of those that end in it, are set by the controller only.
    package static let reservedPrefix = "haptera.io"

    package static let keyRule =
        "1 to 63 letters, digits, '-', '_' and '.', with a letter or digit at either end, after "
        + "an optional prefix as in example.com/"
    package static let valueRule =
        "up to 63 letters, digits, '-', '_' and '.', with a letter or digit at either end"

    package static func isValidKey(_ key: String) -> Bool {
        let parts = key.split(separator: "/", omittingEmptySubsequences: false)
        switch parts.count {
        case 1: return isValidName(key)
        case 2: return isValidPrefix(String(parts[0])) && isValidName(String(parts[1]))
        default: return false
        }
    }

    package static func isValidValue(_ value: String) -> Bool {
        value.isEmpty || isValidName(value)
    }

    package static func isReserved(_ key: String) -> Bool {
        guard let slash = key.firstIndex(of: "/") else { return false }
        let prefix = key[..<slash]
        return prefix == reservedPrefix || prefix.hasSuffix("." + reservedPrefix)
    }

    /// Why these cannot be somebody's labels, or nil.
    package static func objection(to labels: [String: String]) -> String? {
        for (key, value) in labels.sorted(by: { $0.key < $1.key }) {
            if let objection = objection(to: key) { return objection }
            guard isValidValue(value) else {
                return "'\(value.prefix(100))' is no value of label '\(key)': use \(valueRule)"
            }
        }
        return countObjection(labels.count)
    }

    package static func objection(to key: String) -> String? {
        guard isValidKey(key) else {
            return "'\(key.prefix(100))' is no key of a label: use \(keyRule)"
        }
        guard !isReserved(key) else {
            return "label '\(key)' is set by the controller only: choose another prefix than "
                + "\(reservedPrefix)/"
        }
        return nil
    }

    package static func countObjection(_ count: Int) -> String? {
        count <= countMax ? nil : "\(count) labels are too many: at most \(countMax)"
    }

    /// "a=1, b="; for people.
    package static func text(_ labels: [String: String]) -> String {
        labels.sorted { $0.key < $1.key }.map { "\($0.key)=\($0.value)" }.joined(separator: ", ")
    }

    private static func isValidName(_ name: String) -> Bool {
        let bytes = Array(name.utf8)
        guard (1...nameLengthMax).contains(bytes.count), let first = bytes.first,
            let last = bytes.last
        else { return false }
        return isAlphanumeric(first) && isAlphanumeric(last)
            && bytes.allSatisfy { isAlphanumeric($0) || "-_.".utf8.contains($0) }
    }

    /// A DNS subdomain.
    private static func isValidPrefix(_ prefix: String) -> Bool {
        prefix.utf8.count <= prefixLengthMax
            && prefix.split(separator: ".", omittingEmptySubsequences: false)
                .allSatisfy { Names.isValidLabel(String($0)) }
    }

    private static func isAlphanumeric(_ byte: UInt8) -> Bool {
        switch byte {
        case UInt8(ascii: "a")...UInt8(ascii: "z"), UInt8(ascii: "A")...UInt8(ascii: "Z"),
            UInt8(ascii: "0")...UInt8(ascii: "9"):
            true
        default: false
        }
    }
}

/// Why a text is no label, selector or cron expression; in words for whoever typed it.
package struct NotationError: Error, Equatable, Sendable, CustomStringConvertible {
    package var message: String
    package init(_ message: String) { self.message = message }
    package var description: String { message }
}

/// One word of `volume label`: `KEY=VALUE` sets, `KEY-` removes.
package enum LabelChange: Equatable, Sendable {
    case set(String, String)
    case remove(String)

    package init(_ text: String) throws(NotationError) {
        if let equals = text.firstIndex(of: "=") {
            let key = String(text[..<equals])
            let value = String(text[text.index(after: equals)...])
            if let objection = Labels.objection(to: [key: value]) {
                throw NotationError(objection)
            }
            self = .set(key, value)
            return
        }
        guard text.hasSuffix("-") else {
            throw NotationError("'\(text.prefix(100))' is no label: write KEY=VALUE, or KEY-")
        }
        let key = String(text.dropLast())
        if let objection = Labels.objection(to: key) { throw NotationError(objection) }
        self = .remove(key)
    }
}
