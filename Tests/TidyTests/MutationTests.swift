import Testing

/// Rules of the protocol that can be switched off: each is in a list that somebody goes through.
@Suite struct MutationTests {
    private static func text(of path: String) -> String {
        let file = SourceTree.swift.first { $0.path.hasSuffix(path) }
        return file?.lines.joined(separator: "\n") ?? ""
    }
    private static let lists =
        text(of: "/HapteraCore/Mutations.swift") + text(of: "/HapteraCore/MutationsOnDisk.swift")

    /// A rule in no list can be switched off by nobody but who knows it.
    @Test func everyRuleIsRunnableByName() {
        var bits: [String: String] = [:]
        let declaration = #/static let (\w+) = MutationSet\(rawValue: 1 << (\d+)\)/#
        for rule in Self.lists.matches(of: declaration) {
            let (name, bit) = (String(rule.1), String(rule.2))
            #expect(Self.lists.contains("(\"\(name)\", .\(name)"), "\(name) is in no list")
            #expect(bits.updateValue(name, forKey: bit) == nil, "\(name) has another's bit")
        }
        #expect(bits.count > 70)
    }

    /// The suite named beside a rule switches it off.
    @Test func rulesOfTestsAreSwitchedOffThere() {
        let entry = #/\("(\w+)", \.(\w+), "(\w+)"\)/#
        let entries = Self.lists.matches(of: entry)
        #expect(!entries.isEmpty)
        for rule in entries {
            #expect(rule.1 == rule.2)
            let suite = Self.text(of: "Tests/HapteraCoreTests/\(rule.3).swift")
            #expect(suite.contains(".\(rule.2)"), "\(rule.3) does not judge \(rule.1)")
        }
    }
}
