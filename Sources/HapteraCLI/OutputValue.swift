/// What a command has to say, before it is decided how: fields keep the order they are given in, so
/// that JSON and YAML read the same way every time.
package indirect enum OutputValue: Equatable, Sendable {
    case object([(String, OutputValue)])
    case list([OutputValue])
    case text(String)
    case number(UInt64)
    case flag(Bool)
    case null

    /// Null for an empty text.
    package static func optional(_ text: String) -> OutputValue {
        text.isEmpty ? .null : .text(text)
    }

    package static func == (a: OutputValue, b: OutputValue) -> Bool {
        a.json(pretty: false) == b.json(pretty: false)
    }

    // MARK: JSON

    package func json(pretty: Bool = true) -> String { json(pretty: pretty, indent: "") }

    private func json(pretty: Bool, indent: String) -> String {
        let inner = indent + "  "
        let separator = pretty ? ",\n" + inner : ","
        let open = pretty ? "\n" + inner : ""
        let close = pretty ? "\n" + indent : ""
        switch self {
        case .object(let fields):
            guard !fields.isEmpty else { return "{}" }
            let body = fields.map { name, value in
                Self.quoted(name) + (pretty ? ": " : ":")
                    + value.json(pretty: pretty, indent: inner)
            }
            return "{" + open + body.joined(separator: separator) + close + "}"
        case .list(let elements):
            guard !elements.isEmpty else { return "[]" }
            let body = elements.map { $0.json(pretty: pretty, indent: inner) }
            return "[" + open + body.joined(separator: separator) + close + "]"
        case .text(let text): return Self.quoted(text)
        case .number(let number): return String(number)
        case .flag(let flag): return flag ? "true" : "false"
        case .null: return "null"
        }
    }

    private static func quoted(_ text: String) -> String {
        var result = "\""
        for scalar in text.unicodeScalars {
            switch scalar {
            case "\"": result += "\\\""
            case "\\": result += "\\\\"
            case "\n": result += "\\n"
            case "\r": result += "\\r"
            case "\t": result += "\\t"
            case _ where scalar.value < 32 || scalar.value == 127:
                let digits = String(scalar.value, radix: 16)
                result += "\\u" + String(repeating: "0", count: 4 - digits.count) + digits
            default: result.unicodeScalars.append(scalar)
            }
        }
        return result + "\""
    }

    // MARK: YAML

    /// Block style; texts are quoted as in JSON, which YAML understands, unless plain words.
    package var yaml: String { yaml(indent: "").joined(separator: "\n") }

    private func yaml(indent: String) -> [String] {
        var lines: [String] = []
        switch self {
        case .object(let fields) where !fields.isEmpty:
            for (name, value) in fields {
                // Keys of labels may be words YAML would take for something else.
                let name = indent + Self.text(name).scalar + ":"
                if value.isNested {
                    lines.append(name)
                    lines += value.yaml(indent: indent + "  ")
                } else {
                    lines.append(name + " " + value.scalar)
                }
            }
        case .list(let elements) where !elements.isEmpty:
            for element in elements {
                // A nested element's first line takes the dash in place of its indentation.
                var nested = element.yaml(indent: indent + "  ")
                nested[0] = indent + "- " + String(nested[0].dropFirst(indent.count + 2))
                lines += nested
            }
        default: lines.append(indent + scalar)
        }
        return lines
    }

    private var isNested: Bool {
        switch self {
        case .object(let fields): !fields.isEmpty
        case .list(let elements): !elements.isEmpty
        default: false
        }
    }

    private var scalar: String {
        guard case .text(let text) = self else { return json(pretty: false) }
        let isWord =
            text.first?.isASCII == true && text.first?.isLetter == true
            && text.utf8.allSatisfy { byte in
                (UInt8(ascii: "a")...UInt8(ascii: "z")).contains(byte | 0x20)
                    || (UInt8(ascii: "0")...UInt8(ascii: "9")).contains(byte)
                    || byte == UInt8(ascii: "-") || byte == UInt8(ascii: "_")
            }
        // Words YAML would take for something else.
        let reserved = ["true", "false", "null", "yes", "no", "on", "off", "y", "n"]
        return isWord && !reserved.contains(text.lowercased()) ? text : Self.quoted(text)
    }
}

/// Columns as wide as they need to be, two spaces apart.
package struct TextTable: Equatable, Sendable {
    package var header: [String]
    package var rows: [[String]]

    package init(_ header: [String], _ rows: [[String]]) {
        self.header = header
        self.rows = rows
    }

    package var text: String {
        let lines = [header] + rows.map { $0.map { $0.isEmpty ? "-" : $0 } }
        let widths = header.indices.map { column in
            lines.map { $0[column].count }.max() ?? 0
        }
        return lines.map { line in
            line.enumerated().map { column, cell in
                column == header.count - 1
                    ? cell : cell + String(repeating: " ", count: widths[column] - cell.count)
            }.joined(separator: "  ")
        }.joined(separator: "\n")
    }
}
