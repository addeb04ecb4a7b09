import HapteraHost
import Testing

/// Notation and meaning of Kubernetes' label selectors.
@Suite struct LabelSelectorTests {
    private static let labels = ["app": "db", "tier": "prod", "empty": "", "example.com/x": "1"]

    @Test(arguments: [
        "", "app=db", "app==db", "app=db,tier=prod", "app=db, tier!=test", "none!=x", "app",
        "!none", "empty", "empty=", " app = db , ! none ", "tier == prod", "example.com/x=1",
        "tier!=test,!none,app", "none!=", "\tapp\n=\r\ndb ",
        // Sets.
        "app in (db)", "app in (web,db)", "app in ( web , db )", "app in(db)", "app  in  (db,db)",
        "app notin (web)", "app notin(web,cache)", "none notin (x)", "none notin (,)",
        "app in (db),tier notin (test,old),!none", "app,tier in (x,prod)", "app in (db) ,tier",
        "example.com/x in (1,2)",
        // Left out between commas: the empty value.
        "empty in (,)", "empty in (,a)", "empty in (a,)", "empty in (a,,b)", "app notin (,)",
    ])
    func matches(_ text: String) throws {
        #expect(try LabelSelector(text).matches(Self.labels))
    }

    @Test(arguments: [
        "app=web", "app=DB", "app!=db", "none", "!app", "none=", "app=db,tier=test", "none=x",
        "empty!=",
        // Who has no such key has none of its values, not even the empty one.
        "none in (x)", "none in (,)", "app in (web,cache)", "app in (DB)", "app in (,)",
        "app notin (db)", "app notin (web,db)", "empty notin (,)", "empty notin (a,)",
        "app in (db),tier notin (prod)", "app in (db,web),none",
    ])
    func doesNotMatch(_ text: String) throws {
        #expect(try !LabelSelector(text).matches(Self.labels))
    }

    @Test func requirementsAreWhatIsWritten() throws {
        #expect(
            try LabelSelector("a in (x, y),b notin (,z),c=1,d==,e!=2,f,!g").requirements == [
                .isOneOf("a", ["x", "y"]), .isNoneOf("b", ["", "z"]), .isOneOf("c", ["1"]),
                .isOneOf("d", [""]), .isNoneOf("e", ["2"]), .exists("f"), .isAbsent("g"),
            ])
        #expect(try LabelSelector("").requirements.isEmpty)
    }

    /// Only where an operator is due are they one.
    @Test func operatorsAreWordsToo() throws {
        #expect(try LabelSelector("in").requirements == [.exists("in")])
        #expect(try LabelSelector("!notin").requirements == [.isAbsent("notin")])
        #expect(try LabelSelector("in=notin").requirements == [.isOneOf("in", ["notin"])])
        #expect(try LabelSelector("in,notin").requirements == [.exists("in"), .exists("notin")])
        #expect(
            try LabelSelector("in in (in,notin)").requirements
                == [.isOneOf("in", ["in", "notin"])])
        #expect(
            try LabelSelector("notin notin (in)").requirements == [.isNoneOf("notin", ["in"])])
    }

    @Test(
        arguments: [
            (",", 1, "',' stands where a key should be"), (" ", 2, "it ends where a key should be"),
            ("a,", 3, "it ends where a key should be"), ("a,,b", 3, "',' stands where a key"),
            ("=x", 1, "'=' stands where a key"), ("a, in (b)", 7, "'(' stands where '=', '==',"),
            ("!", 2, "it ends where a key"), ("!!a", 2, "'!' stands where a key"),
            ("!=a", 1, "'!=' stands where a key"), ("(a)", 1, "'(' stands where a key"),
            ("!a=b", 3, "'=' stands where ',' or the end should be"),
            ("!a in (b)", 4, "'in' stands where ',' or the end"),
            ("a=b=c", 4, "'=' stands where ',' or the end"),
            ("a=b c", 5, "'c' stands where ',' or the end"),
            ("a=(b)", 3, "'(' stands where a value should be"), ("a=!b", 3, "'!' stands where a"),
            ("a===b", 4, "'=' stands where a value should be"),
            ("a!b", 2, "'!' stands where '=', '==', '!=', 'in', 'notin', ',' or the end should"),
            ("a b", 3, "'b' stands where '=', '==', '!=', 'in', 'notin', ',' or the end"),
            ("a IN (b)", 3, "'IN' stands where '=', '==',"), ("a not in (b)", 3, "'not' stands"),
            ("a in", 5, "it ends where '(' should be"),
            ("a in b", 6, "'b' stands where '(' should"),
            ("a in,b", 5, "',' stands where '('"), ("a notin =b", 9, "'=' stands where '('"),
            ("a in ()", 7, "there is no value between '(' and ')'"),
            ("a notin ( )", 11, "there is no value between"),
            ("a in (", 7, "it ends where a value, ',' or ')' should be"),
            ("a in (b", 8, "it ends where ',' or ')' should be"),
            ("a in (b,", 9, "it ends where a value, ',' or ')'"),
            ("a in (b c)", 9, "'c' stands where ',' or ')' should be"),
            ("a in (b=c)", 8, "'=' stands where ',' or ')'"),
            ("a in ((b))", 7, "'(' stands where a value, ',' or ')'"),
            ("a in (!b)", 7, "'!' stands where a value,"),
            ("a in (b))", 9, "')' stands where ',' or the end should be"),
            ("a in (b)c", 9, "'c' stands where ',' or the end"), ("a)", 2, "')' stands where '='"),
            ("-a", 1, "'-a' is no key of a label: 1 to 63 letters"),
            ("b,a/b/c in (d)", 3, "'a/b/c' is no key of a label"), ("a>1", 1, "'a>1' is no key"),
            ("é=1", 1, "'é' is no key"), ("a,é", 3, "'é' is no key"),
            ("a=-", 3, "'-' is no value of a label: up to 63 letters"),
            ("a in (b, c/d)", 10, "'c/d' is no value of a label"),
        ] as [(String, Int, String)])
    func whatIsWrongIsSaidWithItsPlace(_ text: String, _ place: Int, _ words: String) {
        let error = #expect(throws: NotationError.self) { try LabelSelector(text) }
        let message = error?.message ?? ""
        #expect(message.hasPrefix("selector, character \(place): \(words)"), "\(message)")
    }

    @Test func notTooMuch() throws {
        let keys = Array(repeating: "a", count: 64).joined(separator: ",")
        #expect(try LabelSelector(keys).requirements.count == 64)
        let error = #expect(throws: NotationError.self) { try LabelSelector(keys + ",a") }
        #expect(
            error?.message == "selector, character 128: more than 64 requirements are too many")
        let values = (100..<356).map { "\($0)" }.joined(separator: ",")
        #expect(try LabelSelector("a in (\(values))").matches(["a": "355"]))
        let second = #expect(throws: NotationError.self) { try LabelSelector("a in (\(values),b)") }
        #expect(second?.message == "selector, character 1030: more than 256 values are too many")
        // A word without end is not repeated without end.
        let long = #expect(throws: NotationError.self) {
            try LabelSelector(String(repeating: "k", count: 10_000))
        }
        #expect((long?.message.count ?? 10_000) < 400)
    }
}
