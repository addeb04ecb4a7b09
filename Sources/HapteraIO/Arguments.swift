import Glibc
import HapteraCore

/// What a user typed wrong; ends a process with status 2.
package struct UsageError: Error, Equatable, Sendable {
    package var message: String
    package init(_ message: String) { self.message = message }
}

/// A parsed command line: `--name value`, `--name=value`, `--flag`, and positional words. `--` ends
/// the options.
package struct Arguments: Sendable {
    package private(set) var positional: [String] = []
    private var values: [String: [String]] = [:]
    private var flags: Set<String> = []

    /// `options` take a value (and may be repeated), `flags` take none; names without the dashes.
    package init(_ words: some Sequence<String>, options: Set<String>, flags: Set<String> = [])
        throws(UsageError)
    {
        var rest = Array(words)[...]
        while let word = rest.popFirst() {
            guard word.hasPrefix("--") else {
                if word.hasPrefix("-") && word != "-" {
                    throw UsageError("unknown option '\(word)'")
                }
                positional.append(word)
                continue
            }
            if word == "--" {
                positional.append(contentsOf: rest)
                break
            }
            let parts = word.dropFirst(2).split(
                separator: "=", maxSplits: 1, omittingEmptySubsequences: false)
            let name = String(parts[0])
            if flags.contains(name) {
                guard parts.count == 1 else { throw UsageError("--\(name) takes no value") }
                self.flags.insert(name)
            } else if options.contains(name) {
                guard let value = parts.count == 2 ? String(parts[1]) : rest.popFirst() else {
                    throw UsageError("--\(name) needs a value")
                }
                values[name, default: []].append(value)
            } else {
                throw UsageError("unknown option '--\(name)'")
            }
        }
    }

    package func has(_ flag: String) -> Bool { flags.contains(flag) }
    /// All values of an option, in order.
    package func all(_ name: String) -> [String] { values[name] ?? [] }
    /// The value of an option that may be given at most once.
    package func value(_ name: String) throws(UsageError) -> String? {
        guard let list = values[name] else { return nil }
        guard list.count == 1 else { throw UsageError("--\(name) is given more than once") }
        return list[0]
    }
    package func required(_ name: String) throws(UsageError) -> String {
        guard let value = try value(name) else { throw UsageError("--\(name) is missing") }
        return value
    }
    /// Parses an option's value; `expected` describes it in the error ("16 hexadecimal digits").
    package func parse<T>(_ name: String, _ expected: String, _ body: (String) -> T?)
        throws(UsageError) -> T?
    {
        guard let text = try value(name) else { return nil }
        return try Self.parsed(name, text, expected, body)
    }
    package func parseRequired<T>(_ name: String, _ expected: String, _ body: (String) -> T?)
        throws(UsageError) -> T
    {
        try Self.parsed(name, try required(name), expected, body)
    }
    package static func parsed<T>(
        _ name: String, _ text: String, _ expected: String, _ body: (String) -> T?
    ) throws(UsageError) -> T {
        guard let parsed = body(text) else {
            throw UsageError("--\(name): '\(text)' is not \(expected)")
        }
        return parsed
    }

    /// Bytes: a number, optionally with KiB, MiB, GiB or TiB.
    package static func byteCount(_ text: String) -> UInt64? {
        let units: [(String, Int)] = [("KiB", 10), ("MiB", 20), ("GiB", 30), ("TiB", 40)]
        for (unit, shift) in units where text.hasSuffix(unit) {
            guard let count = UInt64(text.dropLast(3)), count <= UInt64.max >> UInt64(shift) else {
                return nil
            }
            return count << UInt64(shift)
        }
        return UInt64(text)
    }

    /// Says what is wrong and how it is used, and exits with status 2.
    package static func exit(usage: String, _ error: UsageError) -> Never {
        printError("\(error.message)\n\(usage)")
        Glibc.exit(2)
    }
}

/// Writes a line to standard error.
package func printError(_ text: String) {
    let bytes = Array((text + "\n").utf8)
    // SAFETY: the array's memory is valid during the call.
    unsafe bytes.withUnsafeBytes { _ = unsafe write(2, $0.baseAddress, $0.count) }
}
