import Testing

@testable import HapteraCore

/// The contexts that tell what changed since a snapshot: which there are, and who may have them.
@Suite struct NBDContextTests {
    private let days = ["monday", "tuesday"]

    private func harness(_ snapshots: [String]? = nil) -> NBDHarness {
        let harness = NBDHarness(snapshots: snapshots ?? days)
        harness.feed(NBDBytes.option(.structuredReply))
        return harness
    }
    /// Ids and names, without the closing acknowledgement.
    private func contexts(
        _ harness: NBDHarness, _ option: NBDOption, _ export: String, _ queries: [String]
    ) -> [String]? {
        let replies = harness.ask(option, NBDBytes.queries(export, queries))
        guard replies.last?.0 == .ack else { return nil }
        return replies.dropLast().map { reply in
            let id = reply.1.prefix(4).reduce(0) { $0 << 8 | UInt32($1) }
            return "\(id) " + String(decoding: reply.1.dropFirst(4), as: UTF8.self)
        }
    }

    @Test func listNamesThoseBelowWhatIsRead() {
        let harness = harness()
        let changed = days.map { "0 haptera:changed:\($0)" }
        let ofQemu = days.map { "0 qemu:dirty-bitmap:\($0)" }
        func list(_ queries: [String], _ export: String = "vol") -> [String]? {
            contexts(harness, .listMetaContext, export, queries)
        }
        #expect(list([]) == ["0 base:allocation"] + changed + ofQemu)
        #expect(list(["qemu:"]) == ofQemu && list(["qemu:dirty-bitmap:"]) == ofQemu)
        #expect(list(["haptera:"]) == changed && list(["haptera:changed:"]) == changed)
        #expect(list(["haptera:changed:tuesday", "haptera:"]) == [changed[1], changed[0]])
        #expect(list(["qemu:dirty-bitmap:sunday", "haptera:x", "qemu", "haptera:changed"]) == [])
        // Of itself, too: that nothing has changed is what a chain's first link wants to know.
        #expect(list(["haptera:"], "vol@monday") == [changed[0]])
        #expect(list(["haptera:"], "vol@tuesday") == changed)
        #expect(list([], "vol@sunday") == nil)
        #expect(harness.session.agreement.contextCount == 0)
    }

    @Test func severalAreSelectedAtOnce() {
        let harness = harness()
        let selected = contexts(
            harness, .setMetaContext, "vol",
            [
                "qemu:dirty-bitmap:tuesday", "x:y", "base:allocation", "haptera:changed:monday",
                "haptera:changed:sunday", "base:allocation", "haptera:changed:", "qemu:",
            ])
        #expect(
            selected == [
                "1 qemu:dirty-bitmap:tuesday", "2 base:allocation", "3 haptera:changed:monday",
            ])
        #expect(
            harness.session.contexts == [
                NBDContext(.dirty, base: LayerID(rawValue: 2)), .allocation,
                NBDContext(.changed, base: LayerID(rawValue: 1)),
            ])
        #expect(harness.feed(NBDBytes.option(.go, NBDBytes.go("vol"))) == [.transmission])
        #expect(harness.judge(.blockStatus, length: 512) == NBDError.none)
        #expect(harness.session.contexts.count == 3)
    }

    @Test(arguments: ["vol@monday", "vol@tuesday"])
    func theyBelongToTheExportTheyWereSelectedFor(export: String) {
        let harness = harness()
        let selected = contexts(
            harness, .setMetaContext, export, days.map { "haptera:changed:\($0)" })
        #expect(selected?.count == (export == "vol@monday" ? 1 : 2))
        harness.feed(NBDBytes.option(.go, NBDBytes.go("vol")))
        #expect(harness.session.contexts.isEmpty)
        #expect(harness.judge(.blockStatus, length: 512) == .invalid)
    }

    /// One more than a client may have: none, and those before are gone.
    @Test func theirNumberIsBounded() {
        let names = (0...NBDContext.selectedMax).map { "s\($0)" }
        let harness = harness(names)
        let queries = names.map { "haptera:changed:\($0)" }
        #expect(
            contexts(harness, .setMetaContext, "vol", queries.dropLast())?.count
                == NBDContext.selectedMax)
        #expect(Int(harness.session.agreement.contextCount) == NBDContext.selectedMax)
        let refused = harness.ask(.setMetaContext, NBDBytes.queries("vol", queries))
        #expect(refused.map(\.0) == [.errorTooBig])
        #expect(harness.session.contexts.isEmpty && harness.session.agreement.contextCount == 0)
        let most = [String](repeating: "x:y", count: NBDContext.queriesMax)
        for option in [NBDOption.listMetaContext, .setMetaContext] {
            #expect(contexts(harness, option, "vol", most) == [])
            let more = harness.ask(option, NBDBytes.queries("vol", most + ["base:allocation"]))
            #expect(more.map(\.0) == [.errorTooBig])
        }
    }

    @Test func theLongestListFits() {
        let names = (0..<VolumeRecord.snapshotsMax).map {
            let digits = String($0)
            return String(repeating: "s", count: 63 - digits.count) + digits
        }
        let harness = harness(names)
        let list = contexts(harness, .listMetaContext, "", [])
        #expect(list?.count == 1 + 2 * names.count)
        #expect(list?.last == "0 qemu:dirty-bitmap:\(names[names.count - 1])")
    }
}
