import Foundation
import Testing

/// Rules of the code that the compiler and the formatter do not hold.
@Suite struct TidyTests {
    static let columnsMax = 100
    static let fileLinesMax = 500
    static let functionLinesMax = 70

    @Test func theTreeIsFound() {
        #expect(SourceTree.swift.contains { $0.path == "Sources/HapteraCore/Geometry.swift" })
    }

    @Test func linesFitTheScreen() {
        for file in SourceTree.swift {
            for (index, line) in file.lines.enumerated() where line.count > Self.columnsMax {
                // A literal that cannot be broken (a URL, a message) may stand alone.
                let isLiteral = file.literals.contains { $0.line == index && $0.text.count > 60 }
                #expect(isLiteral, "\(file.path):\(index + 1): \(line.count) columns")
            }
        }
    }

    @Test func filesHaveOneSubject() {
        for file in SourceTree.swift {
            let count = file.lines.count
            #expect(count <= Self.fileLinesMax, "\(file.path): \(count) lines")
        }
    }

    /// Functions above the bound are listed with their length, and the list may only shrink.
    @Test func functionsFitTheScreen() {
        var listed: [String: Int] = [:]
        for entry in SourceTree.list("long-functions.txt") where entry.count == 3 {
            listed[entry[0] + " " + entry[1]] = Int(entry[2])
        }
        for file in SourceTree.swift {
            for scope in file.scopes where scope.length > Self.functionLinesMax {
                guard let name = scope.functionName else { continue }
                let key = file.path + " " + name
                #expect(
                    listed.removeValue(forKey: key) == scope.length,
                    "\(key) \(scope.length): split it; an entry of long-functions.txt only shrinks")
            }
        }
        #expect(listed.isEmpty, "no longer long; remove from long-functions.txt: \(listed.keys)")
    }

    @Test func nothingIsLeftForLater() {
        let words = ["TO" + "DO", "FIX" + "ME", "X" + "XX", "HA" + "CK"]
        for file in SourceTree.swift {
            for (index, line) in file.comments.enumerated() {
                for word in words where line.contains(word) {
                    Issue.record("\(file.path):\(index + 1): \(word)")
                }
            }
        }
    }

    /// Each use of `unsafe` has its reason: in the declaration it is in or in the lines above it,
    /// or for a whole type among the type's own members.
    @Test func unsafeIsExplained() {
        for file in SourceTree.swift where file.path.hasPrefix("Sources/") {
            for (index, line) in file.code.enumerated()
            where line.firstMatch(of: #/(^|[^\w@.])unsafe\b(?!\()/#) != nil {
                #expect(
                    Self.isExplained(line: index, in: file),
                    "\(file.path):\(index + 1): unsafe without a SAFETY comment")
            }
        }
    }

    static func isExplained(line: Int, in file: SourceFile) -> Bool {
        func explains(_ line: Int) -> Bool {
            file.comments.indices.contains(line) && file.comments[line].contains("SAFETY:")
        }
        func isCommentOrAttribute(_ line: Int) -> Bool {
            guard file.code.indices.contains(line) else { return false }
            let code = file.code[line].trimmingCharacters(in: .whitespaces)
            let hasComment = !file.comments[line].allSatisfy(\.isWhitespace)
            return (code.isEmpty && hasComment) || code.hasPrefix("@")
        }
        func isExplainedAbove(_ start: Int) -> Bool {
            var above = start - 1
            while isCommentOrAttribute(above) {
                if explains(above) { return true }
                above -= 1
            }
            return false
        }
        if explains(line) || isExplainedAbove(line) { return true }
        var current = file.scope(ofLine: line)
        while let index = current {
            let scope = file.scopes[index]
            if isExplainedAbove(scope.headerLine) { return true }
            // In a function any line above counts; in a type only lines between its members do.
            let candidates = scope.headerLine...scope.closeLine
            for candidate in candidates where explains(candidate) {
                let home = file.scope(ofLine: candidate)
                if home == index || (scope.isFunction && candidate < line) { return true }
            }
            current = scope.parent
        }
        return false
    }
}
