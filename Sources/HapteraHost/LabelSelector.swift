/// Which objects are meant, by their labels: requirements that must all hold, with commas between.
/// Notation and meaning are those of Kubernetes, so that its selectors can be carried over.
///
///     selector    = requirement { "," requirement }
///     requirement = KEY | "!" KEY
///                 | KEY ( "=" | "==" | "!=" ) [ VALUE ]
///                 | KEY ( "in" | "notin" ) "(" [ VALUE ] { "," [ VALUE ] } ")"
///
/// White space may stand around words. A value that is left out is the empty one, but `()` is
/// refused. `in` and `notin` are keys and values too where one is due.
package struct LabelSelector: Equatable, Sendable {
    package enum Requirement: Equatable, Sendable {
        /// There is such a key, with one of these values.
        case isOneOf(String, Set<String>)
        /// Also of an object that has no such key.
        case isNoneOf(String, Set<String>)
        case exists(String)
        case isAbsent(String)
    }
    package static let requirementsMax = 64
    /// In one pair of parentheses.
    package static let valuesMax = 256
    package let requirements: [Requirement]

    package static let rule =
        "KEY=VALUE, KEY!=VALUE, 'KEY in (A,B)', 'KEY notin (A,B)', KEY or !KEY, with commas between"

    /// Everything, if the text is empty.
    package init(_ text: String) throws(NotationError) {
        guard !text.isEmpty else {
            requirements = []
            return
        }
        var parser = SelectorParser(text)
        requirements = try parser.selector()
    }

    package func matches(_ labels: [String: String]) -> Bool {
        requirements.allSatisfy { requirement in
            switch requirement {
            case .isOneOf(let key, let values): labels[key].map(values.contains) ?? false
            case .isNoneOf(let key, let values): !(labels[key].map(values.contains) ?? false)
            case .exists(let key): labels[key] != nil
            case .isAbsent(let key): labels[key] == nil
            }
        }
    }
}

/// Reads a selector from left to right; what it refuses, it names with its place.
private struct SelectorParser {
    private struct Word {
        /// A mark, or what stands between marks and white space; empty: the end of the selector.
        var text: String
        /// Characters, from 1.
        var place: Int
        var isName: Bool {
            text.first.map { !SelectorParser.marks.contains($0) } ?? false
        }
    }
    private static let marks: Set<Character> = [",", "(", ")", "!", "="]
    private static let spaces: Set<Character> = [" ", "\t", "\n", "\r", "\r\n"]

    private let words: [Word]
    private var position = 0

    init(_ text: String) {
        var words: [Word] = []
        var rest = Array(text)[...]
        while let first = rest.first {
            let place = rest.startIndex + 1
            let length: Int
            if Self.spaces.contains(first) {
                rest = rest.dropFirst()
                continue
            } else if Self.marks.contains(first) {
                let isPair = "!=".contains(first) && rest.dropFirst().first == "="
                length = isPair ? 2 : 1
            } else {
                length = rest.prefix { !Self.marks.contains($0) && !Self.spaces.contains($0) }.count
            }
            words.append(Word(text: String(rest.prefix(length)), place: place))
            rest = rest.dropFirst(length)
        }
        words.append(Word(text: "", place: rest.endIndex + 1))
        self.words = words
    }

    mutating func selector() throws(NotationError) -> [LabelSelector.Requirement] {
        var found = [try requirement()]
        while true {
            let word = take()
            if word.text.isEmpty { return found }
            guard word.text == "," else { throw misplaced(word, "',' or the end") }
            guard found.count < LabelSelector.requirementsMax else {
                throw error(
                    word, "more than \(LabelSelector.requirementsMax) requirements are too many")
            }
            found.append(try requirement())
        }
    }

    private mutating func requirement() throws(NotationError) -> LabelSelector.Requirement {
        if next.text == "!" {
            _ = take()
            return .isAbsent(try key())
        }
        let key = try key()
        let mark = next
        switch mark.text {
        case "", ",": return .exists(key)
        case "=", "==", "!=":
            _ = take()
            let value = try value()
            guard value != nil || [",", ""].contains(next.text) else {
                throw misplaced(next, "a value")
            }
            return mark.text == "!="
                ? .isNoneOf(key, [value ?? ""]) : .isOneOf(key, [value ?? ""])
        case "in", "notin":
            _ = take()
            let values = try values()
            return mark.text == "in" ? .isOneOf(key, values) : .isNoneOf(key, values)
        default: throw misplaced(mark, "'=', '==', '!=', 'in', 'notin', ',' or the end")
        }
    }

    private mutating func key() throws(NotationError) -> String {
        let word = take()
        guard word.isName else { throw misplaced(word, "a key") }
        guard Labels.isValidKey(word.text) else {
            throw error(word, "'\(word.text.prefix(100))' is no key of a label: \(Labels.keyRule)")
        }
        return word.text
    }

    /// Nil: there is none, which stands for the empty one.
    private mutating func value() throws(NotationError) -> String? {
        guard next.isName else { return nil }
        let word = take()
        guard Labels.isValidValue(word.text) else {
            throw error(
                word, "'\(word.text.prefix(100))' is no value of a label: \(Labels.valueRule)")
        }
        return word.text
    }

    private mutating func values() throws(NotationError) -> Set<String> {
        let open = take()
        guard open.text == "(" else { throw misplaced(open, "'('") }
        guard next.text != ")" else { throw error(next, "there is no value between '(' and ')'") }
        var values: Set<String> = []
        while true {
            let value = try value()
            values.insert(value ?? "")
            let mark = take()
            if mark.text == ")" { return values }
            guard mark.text == "," else {
                throw misplaced(mark, value == nil ? "a value, ',' or ')'" : "',' or ')'")
            }
            guard values.count < LabelSelector.valuesMax else {
                throw error(mark, "more than \(LabelSelector.valuesMax) values are too many")
            }
        }
    }

    private var next: Word { words[position] }

    /// The end may be taken again and again.
    private mutating func take() -> Word {
        let word = next
        if position < words.count - 1 { position += 1 }
        return word
    }

    private func misplaced(_ word: Word, _ expected: String) -> NotationError {
        error(
            word,
            word.text.isEmpty
                ? "it ends where \(expected) should be"
                : "'\(word.text.prefix(100))' stands where \(expected) should be")
    }

    private func error(_ word: Word, _ what: String) -> NotationError {
        NotationError("selector, character \(word.place): \(what)")
    }
}
