import Foundation

/// The package's files, found from this file's own path.
enum SourceTree {
    static let root = URL(filePath: #filePath)
        .deletingLastPathComponent().deletingLastPathComponent().deletingLastPathComponent()

    /// Our Swift files: all but generated ones.
    static let swift: [SourceFile] = paths { $0.hasSuffix(".swift") && !$0.contains("/Generated/") }
        .map { SourceFile(path: $0, text: text(of: $0)) }

    /// Relative paths of files under the package's root, without hidden folders (build products).
    static func paths(where isWanted: (String) -> Bool) -> [String] {
        let walker = FileManager.default.enumerator(
            at: root, includingPropertiesForKeys: [.isRegularFileKey],
            options: [.skipsHiddenFiles])
        var found: [String] = []
        while let url = walker?.nextObject() as? URL {
            let path = String(url.path.dropFirst(root.path.count + 1))
            if isWanted(path) { found.append(path) }
        }
        return found.sorted()
    }

    static func text(of path: String) -> String {
        let data = FileManager.default.contents(atPath: root.appending(path: path).path) ?? Data()
        return String(decoding: data, as: UTF8.self)
    }

    /// A list kept beside the tests: one entry a line, `#` starts a comment.
    static func list(_ name: String) -> [[String]] {
        text(of: "Tests/TidyTests/" + name).split(separator: "\n")
            .map { $0.prefix { $0 != "#" }.split(separator: " ").map(String.init) }
            .filter { !$0.isEmpty }
    }
}
