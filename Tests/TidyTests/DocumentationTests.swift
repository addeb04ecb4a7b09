import Foundation
import Testing

@Suite struct DocumentationTests {
    private static let documents = SourceTree.paths { $0.hasSuffix(".md") }

    @Test func theReadmeIsFound() {
        #expect(Self.documents.contains("README.md"))
    }

    /// A relative link names a file of the project, and its fragment one of that file's headings.
    @Test func linksResolve() {
        for document in Self.documents {
            let folder = URL(filePath: "/" + document).deletingLastPathComponent()
            for match in SourceTree.text(of: document).matches(of: #/\]\(([^)\s]+)\)/#) {
                let link = String(match.output.1)
                if link.contains("://") || link.hasPrefix("mailto:") { continue }
                let parts = link.split(
                    separator: "#", maxSplits: 1, omittingEmptySubsequences: false)
                let path =
                    parts[0].isEmpty
                    ? document
                    : String(folder.appending(path: String(parts[0])).standardized.path.dropFirst())
                let absolute = SourceTree.root.appending(path: path).path
                #expect(
                    FileManager.default.fileExists(atPath: absolute), "\(document): \(link)")
                if parts.count == 2, path.hasSuffix(".md") {
                    #expect(
                        Self.anchors(of: path).contains(String(parts[1])), "\(document): \(link)")
                }
            }
        }
    }

    /// A link whose text is a function, to a Swift file, names a function of that file.
    @Test func functionsExist() {
        var checked = 0
        for document in Self.documents {
            let folder = URL(filePath: "/" + document).deletingLastPathComponent()
            let pattern = #/\[`\w+\.(\w+)`\]\(([^)\s]+\.swift)\)/#
            for match in SourceTree.text(of: document).matches(of: pattern) {
                let path = folder.appending(path: String(match.output.2)).standardized.path
                let source = SourceTree.text(of: String(path.dropFirst()))
                let isThere = source.contains("func \(match.output.1)(")
                #expect(isThere, "\(document): \(match.output.1) in \(match.output.2)")
                checked += 1
            }
        }
        #expect(checked > 0)
    }

    /// Commands the documents tell a reader to run name scripts that are there and can be run.
    @Test func scriptsExist() {
        for document in Self.documents where document != "CHANGELOG.md" {
            let text = SourceTree.text(of: document)
            let pattern = #/(?:^|[\s`])((?:scripts|bench|\.ci|Tests)\/[\w\/-]+)(?=[\s`]|$)/#
            for match in text.matches(of: pattern) {
                let path = SourceTree.root.appending(path: String(match.output.1)).path
                #expect(
                    FileManager.default.fileExists(atPath: path), "\(document): \(match.output.1)")
            }
        }
    }

    /// Each kind of event that the control plane adds, and none else in the table of them. Other
    /// texts of that form, it has none.
    @Test func everyEventIsInTheOperationsManual() {
        var emitted: Set<Substring> = []
        for path in SourceTree.paths(where: { $0.hasPrefix("Sources/HapteraControl/") }) {
            let pattern = #/"([A-Z][a-z]+(?:[A-Z][a-z]+)+)"/#
            emitted.formUnion(SourceTree.text(of: path).matches(of: pattern).map(\.output.1))
        }
        #expect(emitted.contains("VolumeAttached") && emitted.count > 50)
        let manual = SourceTree.text(of: "docs/operations.md")
        let pattern = #/`([A-Z][a-z]+(?:[A-Z][a-z]+)+)`/#
        let documented = Set(manual.matches(of: pattern).map(\.output.1))
        #expect(emitted.subtracting(documented).isEmpty)
        let table = manual.split(separator: "## Events\n").last ?? ""
        #expect(Set(table.matches(of: pattern).map(\.output.1)).subtracting(emitted).isEmpty)
    }

    /// Fragments the way hosting sites derive them from headings.
    private static func anchors(of document: String) -> Set<String> {
        var anchors: Set<String> = []
        for line in SourceTree.text(of: document).split(separator: "\n") where line.hasPrefix("#") {
            let heading = line.drop { $0 == "#" }.trimmingCharacters(in: .whitespaces)
            let kept = heading.lowercased().filter {
                $0.isLetter || $0.isNumber || "-_ ".contains($0)
            }
            anchors.insert(kept.replacing(" ", with: "-"))
        }
        return anchors
    }
}
