import Foundation
import Testing

/// One word per thing: the words the glossary rejects appear in no identifier, option or metric of
/// ours, except where `glossary.txt` gives the reason.
@Suite struct GlossaryTests {
    /// The rejected word and the one to use.
    static let rejected: [String: String] = [
        "lun": "volume", "nexus": "engine", "upstairs": "engine", "downstairs": "replica",
        "mirror": "replica", "child": "replica or joiner", "checkpoint": "snapshot",
        "sector": "block", "page": "block", "extent": "region", "chunk": "region",
        "segment": "region", "generation": "epoch", "term": "epoch", "quorum": "in-sync set",
        "unhealthy": "degraded", "bitmap": "activity log", "wal": "activity log",
        "resilver": "rebuild", "heal": "repair", "failover": "takeover", "delta": "layer",
        "diff": "layer", "controller": "engine", "src": "source",
        "dst": "target", "mount": "attach", "validate": "scrub",
    ]

    @Test func wordsAreOurs() {
        let entries = SourceTree.list("glossary.txt").filter { $0.count >= 3 }
        var unused = Set(entries.map { $0[0] + " " + $0[1] })
        for file in SourceTree.swift {
            for (line, name) in Self.names(in: file) {
                for word in Self.words(of: name) {
                    guard let better = Self.rejected[word] else { continue }
                    let entry = entries.first { $0[0] == word && file.path.hasPrefix($0[1]) }
                    if let entry {
                        unused.remove(entry[0] + " " + entry[1])
                    } else {
                        Issue.record(
                            "\(file.path):\(line + 1): '\(word)' in '\(name)': say \(better)")
                    }
                }
            }
        }
        #expect(unused.isEmpty, "entries of glossary.txt that nothing needs: \(unused)")
    }

    @Test func aWordIsFoundInsideAName() {
        #expect(Self.words(of: "diskMirrorsMax") == ["disk", "mirror", "max"])
        #expect(Self.words(of: "haptera_wal_bytes") == ["haptera", "wal", "byte"])
    }

    /// Names we declare, and option, key and metric names (string literals without a space).
    private static func names(in file: SourceFile) -> [(line: Int, name: String)] {
        let declaration =
            #/\b(?:class|struct|enum|protocol|func|let|var|case|typealias)\s+([A-Za-z_]\w*)/#
        var names: [(Int, String)] = []
        for (index, line) in file.code.enumerated() {
            for match in line.matches(of: declaration) {
                names.append((index, String(match.output.1)))
            }
        }
        let isProduct = file.path.hasPrefix("Sources/")
        for literal in file.literals
        where isProduct && literal.text.wholeMatch(of: #/[-\w.]{3,}=?/#) != nil {
            names.append((literal.line, literal.text))
        }
        return names
    }

    /// A name's words in lower case, a plural's "s" dropped.
    private static func words(of name: String) -> [String] {
        var words: [String] = []
        for part in name.split(whereSeparator: { !$0.isLetter }) {
            for match in part.matches(of: #/[A-Z]+(?![a-z])|[A-Z]?[a-z]+/#) {
                let word = match.output.lowercased()
                let isPlural = word.count > 3 && word.hasSuffix("s") && !word.hasSuffix("ss")
                words.append(isPlural ? String(word.dropLast()) : word)
            }
        }
        return words
    }
}
