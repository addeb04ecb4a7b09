import Testing

@testable import HapteraCore

@Suite struct NBDRequestTests {
    private static let size: UInt64 = 1 << 30
    private static let size32M: UInt64 = 32 << 20

    private func harness(
        _ format: NBDReplyFormat = .structured, negotiated: Bool = true, isReadOnly: Bool = false
    ) -> NBDHarness {
        let harness = NBDHarness(size: Self.size, isReadOnly: isReadOnly)
        if format != .simple { harness.feed(NBDBytes.option(.structuredReply)) }
        if format == .extended { harness.feed(NBDBytes.option(.extendedHeaders)) }
        harness.feed(
            NBDBytes.option(.setMetaContext, NBDBytes.queries("vol", ["base:allocation"])))
        harness.feed(NBDBytes.option(.go, NBDBytes.go("vol", negotiated ? [3] : [])))
        return harness
    }

    @Test func compactHeaderIsGolden() {
        let events = harness().feed([
            0x25, 0x60, 0x95, 0x13, 0, 1, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8,
            0, 0, 0, 0, 0, 0, 0x20, 0, 0, 0, 2, 0,
        ])
        let expected = NBDRequest(
            flags: .fua, command: .write, cookie: 0x0102_0304_0506_0708, offset: 8192, length: 512,
            payload: 512)
        #expect(events == [.request(expected)])
    }

    @Test func extendedHeaderIsGolden() {
        let events = harness(.extended).feed([
            0x21, 0xe4, 0x1c, 0x71, 0, 2, 0, 6, 1, 2, 3, 4, 5, 6, 7, 8,
            0, 0, 0, 0, 0, 0, 0x20, 0, 0, 0, 0, 0, 0x3f, 0xff, 0xe0, 0,
        ])
        let expected = NBDRequest(
            flags: .noHole, command: .writeZeroes, cookie: 0x0102_0304_0506_0708, offset: 8192,
            length: (1 << 30) - 8192)
        #expect(events == [.request(expected)])
    }

    @Test func boundsAreCheckedWithoutOverflow() {
        for format: NBDReplyFormat in [.simple, .structured, .extended] {
            let harness = harness(format, negotiated: false)
            let payload: NBDCommandFlags = format == .extended ? .payloadLength : []
            let end = Self.size
            for (offset, length) in [
                (end, 1 as UInt64), (end - 1, 2), (.max, 1), (1 << 63, 512), (.max - 511, 512),
                (UInt64(Int64.max), 4096),
            ] {
                #expect(harness.judge(.read, offset: offset, length: length) == .invalid)
                #expect(harness.judge(.trim, offset: offset, length: length) == .invalid)
                #expect(harness.judge(.cache, offset: offset, length: length) == .invalid)
                #expect(harness.judge(.writeZeroes, offset: offset, length: length) == .noSpace)
                let write = harness.feed(
                    NBDBytes.request(
                        1, flags: payload.rawValue, offset: offset, length: length,
                        isExtended: format == .extended)
                        + [UInt8](repeating: 1, count: Int(length)))
                guard case .request(let request) = write.first else {
                    Issue.record("no request")
                    continue
                }
                #expect(request.error == .noSpace)
            }
            #expect(harness.judge(.read, offset: end - 1, length: 1) == NBDError.none)
            #expect(harness.judge(.read, offset: end, length: 0) == NBDError.none)
        }
        let extended = harness(.extended)
        for length: UInt64 in [1 << 62, .max & ~511, Self.size + 512] {
            #expect(extended.judge(.trim, length: length) == .invalid)
            #expect(extended.judge(.writeZeroes, length: length) == .noSpace)
            #expect(extended.judge(.blockStatus, length: length) == .invalid)
        }
        #expect(extended.judge(.trim, length: Self.size) == NBDError.none)
    }

    @Test func alignmentBindsOnlyThoseWhoAgreed() {
        let agreed = harness()
        let free = harness(negotiated: false)
        for (offset, length) in [(1 as UInt64, 512 as UInt64), (512, 511), (513, 1)] {
            #expect(agreed.judge(.read, offset: offset, length: length) == .invalid)
            #expect(agreed.judge(.writeZeroes, offset: offset, length: length) == .invalid)
            #expect(free.judge(.read, offset: offset, length: length) == NBDError.none)
            #expect(free.judge(.writeZeroes, offset: offset, length: length) == NBDError.none)
        }
        #expect(agreed.judge(.read, offset: 512, length: 1536) == NBDError.none)
    }

    @Test func flagsBelongToCommands() {
        let structured = harness()
        let bare = harness(.simple)
        for command: NBDCommand in [.read, .flush, .trim, .cache, .writeZeroes, .blockStatus] {
            let length: UInt64 = command == .flush ? 0 : 512
            #expect(structured.judge(command, flags: .fua, length: length) == NBDError.none)
            let all: [NBDCommandFlags] = [
                .noHole, .dontFragment, .requestOne, .fastZero, .payloadLength,
                .init(rawValue: 1 << 6), .init(rawValue: 1 << 15),
            ]
            for flag in all {
                let isLegal =
                    command == .read && flag == .dontFragment
                    || command == .blockStatus && flag == .requestOne
                    || command == .writeZeroes && (flag == .noHole || flag == .fastZero)
                let expected: NBDError = isLegal ? .none : .invalid
                #expect(structured.judge(command, flags: flag, length: length) == expected)
            }
        }
        #expect(bare.judge(.read, flags: .dontFragment, length: 512) == .invalid)
        #expect(bare.judge(.blockStatus, length: 512) == .invalid)
        #expect(structured.judge(.blockStatus, length: 0) == .invalid)
        #expect(structured.judge(.flush, offset: 512) == .invalid)
    }

    @Test func unknownCommandsKeepTheStreamInStep() {
        let harness = harness()
        for type: UInt16 in [8, 9, 0xffff] {
            let events = harness.feed(NBDBytes.request(type, length: 1 << 20))
            guard case .request(let request) = events.first else {
                Issue.record("no request")
                continue
            }
            #expect(request.error == .invalid)
            #expect(request.payload == 0)
        }
        #expect(harness.judge(.read, length: 512) == NBDError.none)
    }

    @Test func readsBeyondTheMaximum() {
        #expect(harness(.simple).judge(.read, length: Self.size32M + 512) == .invalid)
        #expect(harness().judge(.read, length: Self.size32M + 512) == .overflow)
        #expect(
            harness().judge(.read, flags: .dontFragment, length: Self.size32M + 512) == .overflow)
        #expect(harness().judge(.read, length: Self.size32M) == NBDError.none)
    }

    @Test func refusedPayloadsAreConsumed() {
        let harness = harness(isReadOnly: true)
        let payload = NBDBytes.request(0, length: 512)  // looks like a request on purpose
        var stream = NBDBytes.request(1, cookie: 1, length: 512)
        stream += (0..<512).map { payload[$0 % payload.count] }
        stream += NBDBytes.request(0, cookie: 2, length: 512)
        let cookies = harness.feed(stream).compactMap { event -> [UInt64]? in
            guard case .request(let request) = event else { return nil }
            return [request.cookie, UInt64(request.error.rawValue)]
        }
        #expect(cookies == [[1, 1], [2, 0]])
        #expect(harness.judge(.trim, length: 512) == .notPermitted)
        #expect(harness.judge(.writeZeroes, length: 512) == .notPermitted)
    }

    /// 4 GiB are announced; nothing is allocated, and everything is counted off.
    @Test func hugeCompactWriteIsCountedOff() {
        let harness = harness(.simple)
        let block = MemoryBlock(count: 1 << 20)
        let header = NBDBytes.request(1, length: UInt64(UInt32.max))
        #expect(harness.feed(header).isEmpty)
        #expect(harness.session.isInsideMessage)
        var left = Int(UInt32.max)
        while left > 0 {
            var consumed = 0
            let event = harness.session.next(block.memory, consumed: &consumed)
            #expect(consumed == min(left, block.memory.count))
            left -= consumed
            if left == 0 {
                guard case .request(let request) = event else {
                    Issue.record("no request")
                    return
                }
                #expect(request.error == .noSpace)
            }
        }
        #expect(harness.judge(.read, length: 512) == NBDError.none)
    }

    @Test func extendedPayloadRules() {
        let harness = harness(.extended)
        #expect(harness.judge(.write, length: 512) == .invalid)
        #expect(harness.judge(.write, flags: .payloadLength, length: 0) == NBDError.none)
        // Unasked-for payload is consumed.
        let events = harness.feed(
            NBDBytes.request(
                0, flags: NBDCommandFlags.payloadLength.rawValue, length: 512, isExtended: true)
                + [UInt8](repeating: 0, count: 512)
                + NBDBytes.request(0, cookie: 9, length: 512, isExtended: true))
        #expect(events.count == 2)
        let bytes = NBDBytes.request(
            1, flags: NBDCommandFlags.payloadLength.rawValue, length: Self.size32M + 1,
            isExtended: true)
        #expect(harness.feed(bytes) == [.hangUp(.badMagic)])
    }

    @Test func wrongMagicHangsUpAtOnce() {
        #expect(harness().feed([0x25, 0x60, 0x95, 0x14]) == [.hangUp(.badMagic)])
        #expect(
            harness().feed(NBDBytes.request(0, isExtended: true)) == [.hangUp(.badMagic)])
        #expect(harness(.extended).feed(NBDBytes.request(0)) == [.hangUp(.badMagic)])
    }

    @Test func disconnectEndsTheStream() {
        let harness = harness()
        let events = harness.feed(NBDBytes.request(2) + NBDBytes.request(0, length: 512))
        #expect(events == [.disconnect])
    }

    @Test func aStoppingServerRefusesRequests() {
        let harness = harness()
        harness.session.export.isStopping = true
        #expect(harness.judge(.read, length: 512) == .shutdown)
        #expect(harness.judge(.flush) == .shutdown)
        #expect(harness.feed(NBDBytes.request(2)) == [.disconnect])
    }

    @Test func slowZeroesAreRefusedWhenTheyMustBeFast() {
        let export = NBDExport(
            name: "vol", size: 1 << 20, isReadOnly: false, zeroesFastWithoutHole: false)
        var agreement = NBDAgreement()
        agreement.format = .structured
        let block = MemoryBlock(count: 32)
        for (flags, expected): (UInt16, NBDError) in [
            (0x12, .notSupported), (0x10, .none), (2, .none),
        ] {
            block.memory.copy(from: NBDBytes.request(6, flags: flags, length: 4096))
            let request = NBDRequest(decoding: block.memory, agreement: agreement, export: export)
            #expect(request?.error == expected)
        }
    }
}
