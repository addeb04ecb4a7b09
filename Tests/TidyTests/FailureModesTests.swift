import Foundation
import Testing

/// `docs/failure-modes.md` promises a test for every failure.
@Suite struct FailureModesTests {
    private static let rows = SourceTree.text(of: "docs/failure-modes.md")
        .split(separator: "\n").filter { $0.hasPrefix("| ") }.dropFirst()
        .map { $0.split(separator: "|").map { $0.trimmingCharacters(in: .whitespaces) } }
    /// The column `shown by`.
    private static let column = 4

    /// Every test there is: functions of the Python suites and of Swift's.
    private static let tests: Set<Substring> = {
        var names: Set<Substring> = []
        for path in SourceTree.paths(where: { $0.hasPrefix("Tests/") }) {
            let text = SourceTree.text(of: path)
            if path.hasPrefix("Tests/System/test_"), path.hasSuffix(".py") {
                names.formUnion(text.matches(of: #/(?m)^def (test_\w+)\(/#).map(\.output.1))
            } else if path.hasSuffix("Tests.swift") {
                let pattern = #/@Test[^{]*?func (\w+)\(/#
                names.formUnion(text.matches(of: pattern).map(\.output.1))
            }
        }
        return names
    }()

    @Test func everyRowNamesTestsThatExist() {
        #expect(Self.rows.count > 20)
        for row in Self.rows {
            guard row.count == 6 else {
                Issue.record("a row of \(row.count) columns: \(row.first ?? "")")
                continue
            }
            let named = row[Self.column].matches(of: #/`(\w+)`/#).map(\.output.1)
            #expect(!named.isEmpty, "no test: \(row[0])")
            for name in named {
                #expect(Self.tests.contains(name), "\(row[0]): there is no test \(name)")
            }
        }
    }
}
