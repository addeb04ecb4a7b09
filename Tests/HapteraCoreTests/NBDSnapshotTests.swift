import Testing

@testable import HapteraCore

/// Exports of snapshots: found when a client asks, read-only, and apart from the live volume.
@Suite struct NBDSnapshotTests {
    private func name(_ reply: (NBDOptionReply, [UInt8])) -> String {
        String(decoding: reply.1.dropFirst(4), as: UTF8.self)
    }
    private func text(_ replies: [(NBDOptionReply, [UInt8])]) -> String {
        String(decoding: replies.first?.1 ?? [], as: UTF8.self)
    }

    @Test func listNamesTheVolumeThenItsSnapshots() {
        let harness = NBDHarness(snapshots: ["monday", "a@b"])
        let replies = harness.ask(.list)
        #expect(replies.map(\.0) == [.server, .server, .server, .ack])
        #expect(replies[1].1.prefix(4) == [0, 0, 0, 10])
        #expect(replies.dropLast().map(name) == ["vol", "vol@monday", "vol@a@b"])
    }

    @Test func theLongestListFits() {
        let names = (0..<VolumeRecord.snapshotsMax).map {
            let digits = String($0)
            return String(repeating: "s", count: 63 - digits.count) + digits
        }
        let exports = NBDFixedExports(
            live: NBDExport(
                name: String(repeating: "v", count: 63), size: 4096, isReadOnly: false),
            snapshots: names.enumerated().map {
                .init(layer: LayerID(rawValue: UInt32($0.offset + 1)), name: $0.element, created: 0)
            })
        let output = MemoryBlock(count: NBDNegotiation.answerMax)
        var negotiation = NBDNegotiation(exports: exports, output: output.memory)
        negotiation.isFixedNewstyle = true
        let nothing = output.memory.slice(0, 0)
        _ = negotiation.handle(option: NBDOption.list.rawValue, data: nothing)
        #expect(negotiation.outputCount == 24 + 63 + names.count * (24 + 127) + 20)
        // More than a record holds: the list ends early, but it ends.
        exports.snapshots += exports.snapshots
        negotiation.resetOutput()
        _ = negotiation.handle(option: NBDOption.list.rawValue, data: nothing)
        #expect(negotiation.outputCount <= output.memory.count)
        let last = output.memory.slice(negotiation.outputCount - 20, 20)
        #expect(last.loadBigEndian(UInt32.self, 12) == NBDOptionReply.ack.rawValue)
    }

    @Test func goEntersASnapshot() {
        let harness = NBDHarness(size: 1 << 20, snapshots: ["monday", "tuesday"])
        let info = harness.ask(.info, NBDBytes.go("vol@tuesday", [1, 3]))
        #expect(info.map(\.0) == [.info, .info, .info, .ack])
        // HAS_FLAGS, READ_ONLY, CAN_MULTI_CONN, and nothing that is sent.
        #expect(info[0].1 == [0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0x01, 0x03])
        #expect(info[1].1 == [0, 1] + Array("vol@tuesday".utf8))
        #expect(info[2].1 == [0, 3, 0, 0, 2, 0, 0, 0, 0x10, 0, 2, 0, 0, 0])
        #expect(!harness.session.export.isSnapshot, "INFO enters nothing")
        harness.feed(NBDBytes.option(.structuredReply))
        let flags = harness.ask(.info, NBDBytes.go("vol@tuesday")).first?.1.suffix(2)
        #expect(flags == [0x01, 0x83])
        let events = harness.feed(NBDBytes.option(.go, NBDBytes.go("vol@tuesday", [3])))
        #expect(events == [.transmission])
        #expect(harness.session.export.layer == LayerID(rawValue: 2))
        #expect(harness.session.export.isSnapshot && harness.session.export.isReadOnly)
        #expect(harness.session.agreement.isBlockSizeNegotiated)
    }

    @Test func exportNameEntersASnapshot() {
        let harness = NBDHarness(size: 0x1234_5600, snapshots: ["monday"])
        let name = Array("vol@monday".utf8)
        #expect(harness.feed(NBDBytes.option(.exportName, name)) == [.transmission])
        #expect(harness.sent == [0, 0, 0, 0, 0x12, 0x34, 0x56, 0, 0x01, 0x03])
        #expect(harness.session.export.layer == LayerID(rawValue: 1))
        let other = NBDHarness(snapshots: ["monday"])
        let unknown = NBDBytes.option(.exportName, Array("vol@sunday".utf8))
        #expect(other.feed(unknown) == [.hangUp(.refused)])
    }

    /// While the volume is not attached, its snapshots are served and it is not, by any name.
    @Test func snapshotsWithoutTheirVolume() {
        let harness = NBDHarness(snapshots: ["monday"])
        harness.exports.offersLive = false
        #expect(harness.ask(.list).dropLast().map(name) == ["vol@monday"])
        harness.feed(NBDBytes.option(.structuredReply))
        for live in ["", "vol"] {
            for option: NBDOption in [.info, .go] {
                let refused = harness.ask(option, NBDBytes.go(live))
                #expect(refused.map(\.0) == [.errorPolicy])
                #expect(
                    text(refused)
                        == "volume 'vol' is not attached: only its snapshots can be read, as "
                        + "'vol@SNAPSHOT'; LIST names them")
            }
            for option: NBDOption in [.setMetaContext, .listMetaContext] {
                let refused = harness.ask(option, NBDBytes.queries(live, ["base:allocation"]))
                #expect(refused.map(\.0) == [.errorPolicy])
            }
            let other = NBDHarness(snapshots: ["monday"])
            other.exports.offersLive = false
            let entering = NBDBytes.option(.exportName, Array(live.utf8))
            #expect(other.feed(entering) == [.hangUp(.refused)])
        }
        #expect(harness.ask(.info, NBDBytes.go("vol@friday")).map(\.0) == [.errorUnknown])
        let selected = harness.ask(
            .setMetaContext, NBDBytes.queries("vol@monday", ["haptera:changed:monday"]))
        #expect(selected.map(\.0) == [.metaContext, .ack])
        let events = harness.feed(NBDBytes.option(.go, NBDBytes.go("vol@monday")))
        #expect(events == [.transmission] && harness.session.export.isSnapshot)
    }

    @Test func theEmptyNameIsTheLiveVolume() {
        let harness = NBDHarness(snapshots: ["monday"])
        #expect(harness.feed(NBDBytes.option(.go, NBDBytes.go(""))) == [.transmission])
        #expect(harness.session.export === harness.exports.live)
        #expect(harness.session.export.layer == .head)
    }

    @Test func whatIsNotThereIsNamedInTheAnswer() {
        let harness = NBDHarness(snapshots: ["monday"])
        for name in ["vol@", "vol@mon", "vol@mondays", "VOL@monday", "@monday", "monday", "vo@l"] {
            for option in [NBDOption.info, .go] {
                let replies = harness.ask(option, NBDBytes.go(name))
                #expect(replies.map(\.0) == [.errorUnknown])
                let shown = name.hasPrefix("vol@") ? String(name.dropFirst(4)) : name
                #expect(text(replies).contains("'\(shown)'"))
            }
        }
        let told = text(harness.ask(.go, NBDBytes.go("vol@sunday")))
        #expect(told == "no snapshot 'sunday' of this volume; LIST names those there are")
        // What a client sends comes back as plain text, and not all of it.
        let long = "vol@\u{1b}[2J" + String(repeating: "x", count: 4000)
        let shown = text(harness.ask(.go, NBDBytes.go(long)))
        #expect(shown.contains("'?[2Jxxx") && shown.count < 300)
    }

    @Test func snapshotsAreLookedUpWhenAskedFor() {
        let harness = NBDHarness()
        #expect(harness.ask(.list).count == 2)
        #expect(harness.ask(.info, NBDBytes.go("vol@new")).map(\.0) == [.errorUnknown])
        harness.exports.snapshots = [.init(layer: LayerID(rawValue: 9), name: "new", created: 0)]
        #expect(harness.ask(.list).count == 3)
        #expect(harness.ask(.info, NBDBytes.go("vol@new")).map(\.0) == [.info, .ack])
        harness.exports.snapshots = []
        #expect(harness.ask(.go, NBDBytes.go("vol@new")).map(\.0) == [.errorUnknown])
    }

    /// Selected for one export, entered another: nothing is selected.
    @Test(arguments: ["", "vol", "vol@monday", "vol@tuesday"])
    func contextsBelongToTheirExport(entered: String) {
        for selected in ["", "vol", "vol@monday", "vol@tuesday"] {
            let harness = NBDHarness(snapshots: ["monday", "tuesday"])
            harness.feed(NBDBytes.option(.structuredReply))
            let ask = NBDBytes.queries(selected, ["base:allocation"])
            #expect(harness.ask(.setMetaContext, ask).map(\.0) == [.metaContext, .ack])
            #expect(harness.feed(NBDBytes.option(.go, NBDBytes.go(entered))) == [.transmission])
            let isSame = selected == entered || selected + entered == "vol"
            #expect(harness.session.agreement.contextCount == (isSame ? 1 : 0))
            #expect(harness.judge(.blockStatus, length: 512) == (isSame ? NBDError.none : .invalid))
        }
        let unknown = NBDBytes.queries("vol@sunday", ["base:allocation"])
        let harness = NBDHarness(snapshots: ["monday"])
        harness.feed(NBDBytes.option(.structuredReply))
        #expect(harness.ask(.listMetaContext, unknown).map(\.0) == [.errorUnknown])
    }

    @Test func readersAreAdmittedWhileThereIsRoom() {
        let harness = NBDHarness(snapshots: ["monday"])
        harness.exports.admitsReader = false
        #expect(harness.ask(.info, NBDBytes.go("vol@monday")).map(\.0) == [.info, .ack])
        #expect(harness.ask(.go, NBDBytes.go("vol@monday")).map(\.0) == [.errorPolicy])
        #expect(harness.feed(NBDBytes.option(.go, NBDBytes.go("vol"))) == [.transmission])
        let old = NBDHarness(snapshots: ["monday"])
        old.exports.admitsReader = false
        let named = NBDBytes.option(.exportName, Array("vol@monday".utf8))
        #expect(old.feed(named) == [.hangUp(.refused)])
    }

    @Test(arguments: [NBDReplyFormat.simple, .structured, .extended])
    func changesAreNotPermittedAndTheirPayloadIsConsumed(_ format: NBDReplyFormat) {
        let harness = NBDHarness(snapshots: ["monday"])
        if format == .structured { harness.feed(NBDBytes.option(.structuredReply)) }
        if format == .extended { harness.feed(NBDBytes.option(.extendedHeaders)) }
        harness.feed(NBDBytes.option(.go, NBDBytes.go("vol@monday")))
        let isExtended = format == .extended
        let flags: UInt16 = isExtended ? NBDCommandFlags.payloadLength.rawValue : 0
        let write = NBDBytes.request(1, flags: flags, length: 4096, isExtended: isExtended)
        let read = NBDBytes.request(0, cookie: 9, length: 512, isExtended: isExtended)
        let events = harness.feed(write + [UInt8](repeating: 0x25, count: 4096) + read)
        #expect(events.count == 2)
        guard case .request(let refused) = events[0], case .request(let next) = events[1] else {
            Issue.record("\(events)")
            return
        }
        #expect(refused.error == .notPermitted && refused.command == .write)
        #expect(next.error == .none && next.cookie == 9)
        #expect(harness.judge(.trim, length: 4096) == .notPermitted)
        #expect(harness.judge(.writeZeroes, length: 4096) == .notPermitted)
        #expect(harness.judge(.writeZeroes, flags: .fua, length: 4096) == .notPermitted)
        #expect(harness.judge(.flush) == NBDError.none)
        #expect(harness.judge(.read, offset: 1 << 30, length: 512) == .invalid)
    }

    @Test func aServerThatStopsStopsItsSnapshots() {
        let harness = NBDHarness(snapshots: ["monday"])
        harness.feed(NBDBytes.option(.go, NBDBytes.go("vol@monday")))
        harness.exports.live.isStopping = true
        #expect(harness.judge(.read, length: 512) == .shutdown)
        let other = NBDHarness(snapshots: ["monday"])
        other.exports.live.isStopping = true
        #expect(other.ask(.go, NBDBytes.go("vol@monday")).map(\.0) == [.errorShutdown])
    }
}
