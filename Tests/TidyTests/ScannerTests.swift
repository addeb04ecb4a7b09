import Testing

/// The scanner itself, since every rule stands on it.
@Suite struct ScannerTests {
    private let sample = SourceFile(
        path: "Sample.swift",
        text: #"""
            import A // TO come
            /* block /* nested */ { */
            struct S {
                let x = "a { \(f("}")) b"
                func long(
                    a: Int
                ) -> Int where
                    T == U
                {
                    if a == 1 {
                        unsafe g()
                    }
                    return 2
                }
                init?(b: Int) { }
            }
            """#)

    @Test func commentsAndLiteralsAreNotCode() {
        #expect(sample.code[0].contains("import A"))
        #expect(!sample.code[0].contains("TO"))
        #expect(sample.comments[0].contains("TO come"))
        #expect(!sample.code[1].contains("{"))
        #expect(!sample.code[3].contains("a {"))
        #expect(sample.literals.map(\.text).contains(#"a { \() b"#))
    }

    @Test func functionsHaveNamesAndLengths() throws {
        let functions = sample.scopes.filter(\.isFunction)
        #expect(functions.map(\.functionName) == ["long", "init"])
        #expect(functions.first?.length == 10)
        #expect(sample.scopes.filter(\.isType).count == 1)
    }

    @Test func aReasonMustBeInReach() {
        #expect(!TidyTests.isExplained(line: 10, in: sample))
        for (text, expected) in [
            ("// SAFETY: why\nfunc f() {\nunsafe g()\n}", true),
            ("func f() {\n// SAFETY: why\nif x {\nunsafe g()\n}\n}", true),
            ("struct S {\n// SAFETY: why\nlet p: P\nfunc f() { unsafe g() }\n}", true),
            ("func h() {\n// SAFETY: why\n}\nfunc f() {\nunsafe g()\n}", false),
            ("struct S {\nfunc h() {\n// SAFETY: why\n}\nfunc f() {\nunsafe g()\n}\n}", false),
        ] {
            let file = SourceFile(path: "T.swift", text: text)
            let line = file.code.firstIndex { $0.contains("unsafe") } ?? 0
            #expect(TidyTests.isExplained(line: line, in: file) == expected, "\(text)")
        }
    }
}
