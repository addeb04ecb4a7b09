import Foundation

/// One Swift file, split into code, comments and string literals, with the braces of its code
/// matched. A scanner, not a parser: enough to hold the rules of `TidyTests`.
struct SourceFile {
    /// Path from the package's root, such as "Sources/HapteraCore/Geometry.swift".
    let path: String
    let lines: [String]
    /// The lines with comments and string literals blanked.
    let code: [String]
    /// The lines with everything but comments blanked.
    let comments: [String]
    /// Each string literal's line (from 0) and raw text; an interpolation reads as "\()".
    let literals: [(line: Int, text: String)]
    /// Innermost last; a scope's parent precedes it.
    let scopes: [Scope]

    /// A pair of braces and what introduces it.
    struct Scope {
        /// The line the declaration or statement starts on, the brace's line, the closing line.
        let headerLine: Int
        let openLine: Int
        var closeLine: Int
        let parent: Int?
        /// The code before the brace, from the end of the statement before it.
        let header: String

        /// The name, if this is the body of a function, initialiser, subscript or deinitialiser.
        var functionName: String? {
            let pattern =
                #/(?:^|\s)(?:func\s+([^\s(<]+)|(init|subscript)[?!]?\s*[(<]|(deinit)\s*$)/#
            guard let match = header.firstMatch(of: pattern) else { return nil }
            return String(match.output.1 ?? match.output.2 ?? match.output.3 ?? "")
        }
        var isFunction: Bool { functionName != nil }
        var isType: Bool {
            header.firstMatch(of: #/(?:^|\s)(class|struct|enum|extension|protocol|actor)\s/#) != nil
                && !isFunction
        }
        /// Lines from the declaration's first to its closing brace.
        var length: Int { closeLine - headerLine + 1 }
    }

    init(path: String, text: String) {
        self.path = path
        lines = text.split(separator: "\n", omittingEmptySubsequences: false).map(String.init)
        var scanner = Scanner(bytes: Array(text.utf8))
        scanner.run()
        code = Self.split(scanner.code)
        comments = Self.split(scanner.comments)
        literals = scanner.literals
        scopes = Self.scopes(of: code)
    }

    /// The innermost scope around a line, seen from the line's end.
    func scope(ofLine line: Int) -> Int? {
        scopes.indices.last { scopes[$0].openLine <= line && line <= scopes[$0].closeLine }
    }

    private static func split(_ bytes: [UInt8]) -> [String] {
        String(decoding: bytes, as: UTF8.self)
            .split(separator: "\n", omittingEmptySubsequences: false).map(String.init)
    }

    private static func scopes(of code: [String]) -> [Scope] {
        var scopes: [Scope] = []
        var open: [Int] = []
        // The code since the last brace, by line.
        var pending: [(line: Int, text: String)] = []
        for (number, line) in code.enumerated() {
            pending.append((number, ""))
            for character in line {
                switch character {
                case "{":
                    let (headerLine, header) = header(endOf: pending)
                    scopes.append(
                        Scope(
                            headerLine: headerLine ?? number, openLine: number, closeLine: number,
                            parent: open.last, header: header))
                    open.append(scopes.count - 1)
                    pending = [(number, "")]
                case "}":
                    if let last = open.popLast() { scopes[last].closeLine = number }
                    pending = [(number, "")]
                default:
                    pending[pending.count - 1].text.append(character)
                }
            }
        }
        return scopes
    }

    /// The statement or declaration that ends the pending lines: the last line, and the ones above
    /// it while parentheses are open or the line below goes on with a signature.
    private static func header(endOf pending: [(line: Int, text: String)]) -> (Int?, String) {
        var first: Int?
        var header = ""
        for (index, (line, text)) in pending.enumerated().reversed() {
            let trimmed = text.trimmingCharacters(in: .whitespaces)
            if trimmed.isEmpty && !header.isEmpty { continue }
            header = header.isEmpty ? trimmed : trimmed + " " + header
            if !header.isEmpty { first = line }
            let depth = header.reduce(0) {
                $0 + ("([".contains($1) ? 1 : ")]".contains($1) ? -1 : 0)
            }
            let goesOn = ["->", "where ", "throws", ")", "else", "."].contains {
                header.hasPrefix($0)
            }
            let above = index > 0 ? pending[index - 1].text : ""
            let isUnfinished = ["where", ",", "->", "=", "&&", "||"].contains {
                above.hasSuffix($0)
            }
            if depth >= 0 && !goesOn && !isUnfinished && !header.isEmpty { break }
        }
        return (first, header)
    }
}

/// Splits Swift source into code, comments and string literals, all of the source's length.
private struct Scanner {
    let bytes: [UInt8]
    var code: [UInt8]
    var comments: [UInt8]
    var literals: [(line: Int, text: String)] = []
    private var at = 0
    private var line = 0

    init(bytes: [UInt8]) {
        self.bytes = bytes
        let blank = bytes.map { $0 == 10 ? $0 : UInt8(ascii: " ") }
        code = blank
        comments = blank
    }

    mutating func run() {
        while at < bytes.count {
            if starts("//") {
                while at < bytes.count, bytes[at] != 10 { keep(in: \.comments) }
            } else if starts("/*") {
                scanBlockComment()
            } else if let hashes = literalStart() {
                scanLiteral(hashes: hashes)
            } else {
                keep(in: \.code)
            }
        }
    }

    private func starts(_ text: StaticString) -> Bool {
        bytes[at...].starts(with: Array(text.description.utf8))
    }
    private mutating func keep(in target: WritableKeyPath<Scanner, [UInt8]>) {
        self[keyPath: target][at] = bytes[at]
        skip()
    }
    private mutating func skip() {
        if bytes[at] == 10 { line += 1 }
        at += 1
    }

    private mutating func scanBlockComment() {
        var depth = 0
        repeat {
            if starts("/*") { depth += 1 } else if starts("*/") { depth -= 1 }
            let pair = starts("/*") || starts("*/")
            keep(in: \.comments)
            if pair { keep(in: \.comments) }
        } while depth > 0 && at < bytes.count
    }

    /// The number of `#` in front of a literal that starts here, or nil if none does.
    private func literalStart() -> Int? {
        var end = at
        while end < bytes.count, bytes[end] == UInt8(ascii: "#") { end += 1 }
        guard end < bytes.count, bytes[end] == UInt8(ascii: "\"") else { return nil }
        return end - at
    }

    private mutating func scanLiteral(hashes: Int) {
        let startLine = line
        let fence = [UInt8](repeating: UInt8(ascii: "#"), count: hashes)
        let quote = UInt8(ascii: "\"")
        at += hashes
        let isLong = bytes[at...].starts(with: [quote, quote, quote])
        let close = [UInt8](repeating: quote, count: isLong ? 3 : 1) + fence
        at += isLong ? 3 : 1
        var text: [UInt8] = []
        while at < bytes.count, !bytes[at...].starts(with: close) {
            if bytes[at...].starts(with: [UInt8(ascii: "\\")] + fence) {
                text.append(bytes[at])
                at += 1 + hashes
                guard at < bytes.count else { break }
                if bytes[at] == UInt8(ascii: "(") {
                    skipInterpolation()
                    text += Array("()".utf8)
                    continue
                }
            }
            text.append(bytes[at])
            skip()
        }
        at = min(at + close.count, bytes.count)
        literals.append((startLine, String(decoding: text, as: UTF8.self)))
    }

    private mutating func skipInterpolation() {
        var depth = 0
        repeat {
            if let hashes = literalStart() {
                scanLiteral(hashes: hashes)
                continue
            }
            if bytes[at] == UInt8(ascii: "(") { depth += 1 }
            if bytes[at] == UInt8(ascii: ")") { depth -= 1 }
            skip()
        } while depth > 0 && at < bytes.count
    }
}
