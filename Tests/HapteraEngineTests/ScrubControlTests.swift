import HapteraCore
import Testing

@testable import HapteraEngine

@Suite struct ScrubControlTests {
    private func progress(_ from: String) -> ScrubProgress? {
        ScrubProgress(arguments: ["from": from])
    }

    @Test func whatTheStatusSaysIsTaken() {
        #expect(progress("1:0:0:0:0:0:0")?.id == 1)
        let text = "\(UInt64.max):7:6:5:4:3:2"
        #expect(progress(text)?.text == text)
        let most = "1" + String(repeating: ":\(ScrubProgress.countMax)", count: 6)
        #expect(progress(most)?.text == most)
    }

    /// The regression: the engine went on counting from it, and stopped at the overflow.
    @Test(arguments: 1...6) func countsThatWouldOverflowAreRefused(field: Int) {
        for count in [ScrubProgress.countMax + 1, UInt64.max] {
            var fields = Array(repeating: "0", count: 7)
            fields[0] = "1"
            fields[field] = String(count)
            #expect(progress(fields.joined(separator: ":")) == nil)
        }
    }

    @Test func nothingElseIsTaken() {
        for text in ["", "1", "0:0:0:0:0:0:0", "1:0:0:0:0:0", "1:0:0:0:0:0:-1"] {
            #expect(progress(text) == nil)
        }
        #expect(ScrubProgress(arguments: [:]) == nil)
        #expect(ScrubProgress(arguments: ["from": "1:0:0:0:0:0:0", "to": "2"]) == nil)
        // The speed the core makes of the most that may be given.
        let product = ScrubProgress.countMax.multipliedReportingOverflow(by: 4096 * 1000)
        #expect(!product.overflow)
    }
}
