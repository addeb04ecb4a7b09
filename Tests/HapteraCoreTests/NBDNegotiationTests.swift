import Testing

@testable import HapteraCore

@Suite struct NBDNegotiationTests {
    @Test func greetingIsGolden() {
        let harness = NBDHarness(clientFlags: nil)
        var session = NBDSession(export: harness.session.export)
        var consumed = 0
        let nothing = MemoryBlock(count: 1).memory.slice(0, 0)
        #expect(session.next(nothing, consumed: &consumed) == .reply)
        #expect(session.output.bytes() == Array("NBDMAGICIHAVEOPT".utf8) + [0, 3])
    }

    @Test func unknownClientFlagsHangUp() {
        for flags in [4, 7, 0x8000_0000 as UInt32] {
            let harness = NBDHarness(clientFlags: nil)
            var bytes = NBDBytes()
            bytes.put(flags)
            #expect(harness.feed(bytes.bytes) == [.hangUp(.unknownClientFlags)])
        }
    }

    @Test func exportNameIsGolden() {
        let harness = NBDHarness(size: 0x1234_5600)
        #expect(harness.feed(NBDBytes.option(.exportName, Array("vol".utf8))) == [.transmission])
        #expect(harness.sent == [0, 0, 0, 0, 0x12, 0x34, 0x56, 0, 0x0d, 0x6d])
        #expect(!harness.session.agreement.isBlockSizeNegotiated)
    }

    @Test func exportNamePadsForOldClients() {
        let harness = NBDHarness(clientFlags: 1)
        #expect(harness.feed(NBDBytes.option(.exportName)) == [.transmission])
        #expect(harness.sent.count == 134)
        #expect(harness.sent.suffix(124).allSatisfy { $0 == 0 })
    }

    @Test func exportNameThatIsNotServedHangsUp() {
        for name in ["volt", "vo", "VOL", String(repeating: "v", count: 5000)] {
            let harness = NBDHarness()
            let events = harness.feed(NBDBytes.option(.exportName, Array(name.utf8)))
            #expect(events == [.hangUp(.refused)])
            #expect(harness.sent.isEmpty)
        }
    }

    @Test func plainNewstyleKnowsOnlyExportName() {
        let harness = NBDHarness(clientFlags: 0)
        #expect(harness.feed(NBDBytes.option(.list)) == [.hangUp(.refused)])
        let other = NBDHarness(clientFlags: 0)
        #expect(other.feed(NBDBytes.option(.exportName)) == [.transmission])
    }

    @Test func wrongOptionMagicHangsUp() {
        let harness = NBDHarness()
        #expect(harness.feed([UInt8](repeating: 0x4e, count: 16)) == [.hangUp(.badMagic)])
    }

    @Test func abortIsAnsweredBeforeTheEnd() {
        let harness = NBDHarness()
        let events = harness.feed(NBDBytes.option(.abort, [1, 2, 3]))
        #expect(events == [.hangUp(.aborted)])
        #expect(
            harness.sent == [
                0, 3, 0xe8, 0x89, 4, 0x55, 0x65, 0xa9, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 0,
            ])
    }

    @Test func listNamesTheExport() {
        let harness = NBDHarness()
        let replies = harness.ask(.list)
        #expect(replies.map(\.0) == [.server, .ack])
        #expect(replies.first?.1 == [0, 0, 0, 3] + Array("vol".utf8))
        #expect(harness.ask(.list, [0]).map(\.0) == [.errorInvalid])
    }

    @Test func unknownOptionsAreUnsupported() {
        let harness = NBDHarness()
        for option: UInt32 in [0, 4, 5, 12, 0x7fff_ffff, .max] {
            #expect(harness.ask(option, [9]).map(\.0) == [.errorUnsupported])
        }
    }

    @Test func infoTellsSizeFlagsNameAndBlockSizes() {
        let harness = NBDHarness(size: 1 << 20)
        let replies = harness.ask(.info, NBDBytes.go("", [3, 1, 0x7777]))
        #expect(replies.map(\.0) == [.info, .info, .info, .ack])
        #expect(replies[0].1 == [0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0x0d, 0x6d])
        #expect(replies[1].1 == [0, 1] + Array("vol".utf8))
        #expect(replies[2].1 == [0, 3, 0, 0, 2, 0, 0, 0, 0x10, 0, 2, 0, 0, 0])
        #expect(harness.session.isNegotiating)
        #expect(!harness.session.agreement.isBlockSizeNegotiated)
    }

    @Test func goEntersTransmission() {
        let harness = NBDHarness()
        #expect(harness.feed(NBDBytes.option(.go, NBDBytes.go("vol", [3]))) == [.transmission])
        #expect(harness.session.agreement.isBlockSizeNegotiated)
        let other = NBDHarness()
        #expect(other.feed(NBDBytes.option(.go, NBDBytes.go("vol"))) == [.transmission])
        #expect(!other.session.agreement.isBlockSizeNegotiated)
    }

    @Test func goRefusesWhatIsWrongAndGoesOn() {
        let harness = NBDHarness()
        #expect(harness.ask(.go, NBDBytes.go("other")).map(\.0) == [.errorUnknown])
        let longest = String(repeating: "x", count: 4096)
        #expect(harness.ask(.go, NBDBytes.go(longest)).map(\.0) == [.errorUnknown])
        #expect(harness.ask(.go, NBDBytes.go(longest + "x")).map(\.0) == [.errorInvalid])
        let good = NBDBytes.go("vol", [0, 1])
        for count in 0..<good.count {
            #expect(harness.ask(.go, Array(good.prefix(count))).map(\.0) == [.errorInvalid])
        }
        #expect(harness.ask(.go, good + [0]).map(\.0) == [.errorInvalid])
        #expect(harness.ask(.go, [0xff, 0xff, 0xff, 0xff, 0, 0]).map(\.0) == [.errorInvalid])
        #expect(harness.feed(NBDBytes.option(.go, good)) == [.transmission])
    }

    @Test func longOptionDataIsConsumedAndRefused() {
        let harness = NBDHarness()
        let data = [UInt8](repeating: 0x49, count: (64 << 10) + 1)
        #expect(harness.ask(.go, data).map(\.0) == [.errorTooBig])
        #expect(harness.ask(99, Array(data.dropLast())).map(\.0) == [.errorUnsupported])
        #expect(harness.ask(.list).map(\.0) == [.server, .ack])
    }

    @Test func endlessOptionsHangUp() {
        let harness = NBDHarness()
        for _ in 0..<NBDLimits.optionsMax { #expect(harness.ask(.list).count == 2) }
        #expect(harness.feed(NBDBytes.option(.list)) == [.hangUp(.tooManyOptions)])
    }

    @Test func replyFormatsAreNegotiated() {
        let harness = NBDHarness()
        #expect(harness.ask(.structuredReply, [1]).map(\.0) == [.errorInvalid])
        #expect(harness.session.agreement.format == .simple)
        #expect(harness.ask(.structuredReply).map(\.0) == [.ack])
        #expect(harness.session.agreement.format == .structured)
        #expect(harness.ask(.extendedHeaders, [1]).map(\.0) == [.errorInvalid])
        #expect(harness.ask(.extendedHeaders).map(\.0) == [.ack])
        #expect(harness.session.agreement.format == .extended)
        #expect(harness.ask(.structuredReply).map(\.0) == [.errorExtendedHeadersRequired])
        // DF is offered now, and EXPORT_NAME no longer is.
        #expect(harness.ask(.info, NBDBytes.go("vol")).first?.1.suffix(2) == [0x0d, 0xed])
        #expect(harness.feed(NBDBytes.option(.exportName)) == [.hangUp(.refused)])
    }

    @Test func readOnlyFlags() {
        let harness = NBDHarness(isReadOnly: true)
        #expect(harness.ask(.info, NBDBytes.go("vol")).first?.1.suffix(2) == [0x05, 0x0f])
    }

    @Test func metaContexts() {
        let harness = NBDHarness()
        let allocation = Array("base:allocation".utf8)
        let ask = NBDBytes.queries("vol", ["x-unknown:thing", "base:allocation", "nocolon"])
        #expect(harness.ask(.setMetaContext, ask).map(\.0) == [.errorInvalid])
        harness.feed(NBDBytes.option(.structuredReply))

        let set = harness.ask(.setMetaContext, ask)
        #expect(set.map(\.0) == [.metaContext, .ack])
        #expect(set.first?.1 == [0, 0, 0, 1] + allocation)
        #expect(harness.session.agreement.contextCount == 1)

        for queries in [[], ["base:"], ["base:allocation", "base:allocation"]] {
            let list = harness.ask(.listMetaContext, NBDBytes.queries("", queries))
            #expect(list.map(\.0) == [.metaContext, .ack])
            #expect(list.first?.1 == [0, 0, 0, 0] + allocation)
        }
        let other = NBDBytes.queries("", ["base:other", "qemu:"])
        #expect(harness.ask(.listMetaContext, other).map(\.0) == [.ack])
        #expect(harness.session.agreement.contextCount == 1)

        // A SET that selects nothing, or fails, undoes the one before.
        for queries in [[], ["base:"], ["base:other"]] {
            harness.feed(NBDBytes.option(.setMetaContext, ask))
            #expect(
                harness.ask(.setMetaContext, NBDBytes.queries("vol", queries)).map(\.0) == [.ack])
            #expect(harness.session.agreement.contextCount == 0)
        }
        harness.feed(NBDBytes.option(.setMetaContext, ask))
        let unknown = NBDBytes.queries("other", ["base:allocation"])
        #expect(harness.ask(.setMetaContext, unknown).map(\.0) == [.errorUnknown])
        #expect(harness.session.agreement.contextCount == 0)
        for count in 0..<ask.count {
            let part = Array(ask.prefix(count))
            #expect(harness.ask(.setMetaContext, part).map(\.0) == [.errorInvalid])
        }
        #expect(harness.session.agreement.contextCount == 0)
    }

    @Test func aStoppingServerRefusesOptions() {
        let harness = NBDHarness()
        harness.session.export.isStopping = true
        #expect(harness.ask(.go, NBDBytes.go("vol")).map(\.0) == [.errorShutdown])
        #expect(harness.ask(.list).map(\.0) == [.errorShutdown])
        #expect(harness.feed(NBDBytes.option(.abort)) == [.hangUp(.aborted)])
    }
}
