import Testing

@testable import HapteraCore

@Suite struct NBDReplyTests {
    private let block = MemoryBlock(count: NBDBlockStatus.replySizeMax)
    private let tables = Tables()
    private final class Tables { var blocks: [MemoryBlock] = [] }
    private let cookie: [UInt8] = [1, 2, 3, 4, 5, 6, 7, 8]

    private func reply(_ format: NBDReplyFormat) -> NBDReply {
        NBDReply(format: format, cookie: 0x0102_0304_0506_0708, offset: 0x1000)
    }
    private func bytes(_ count: Int) -> [UInt8] { block.memory.slice(0, count).bytes() }

    @Test func simpleIsGolden() {
        #expect(
            bytes(reply(.simple).simple(.noSpace, to: block.memory))
                == [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 28] + cookie)
    }

    @Test func chunksAreGolden() {
        let header: [UInt8] = [0x66, 0x8e, 0x33, 0xef]
        let r = reply(.structured)
        #expect(bytes(r.done(to: block.memory)) == header + [0, 1, 0, 0] + cookie + [0, 0, 0, 0])
        #expect(
            bytes(r.data(at: 0x2000, length: 0x200, isLast: false, to: block.memory))
                == header + [0, 0, 0, 1] + cookie + [0, 0, 2, 8] + [0, 0, 0, 0, 0, 0, 0x20, 0])
        #expect(
            bytes(r.hole(at: 0x2000, length: 0x200, isLast: true, to: block.memory))
                == header + [0, 1, 0, 2] + cookie + [0, 0, 0, 12] + [0, 0, 0, 0, 0, 0, 0x20, 0]
                + [0, 0, 2, 0])
        let text = Array("invalid request".utf8)
        #expect(
            bytes(r.failure(.invalid, to: block.memory))
                == header + [0, 1, 0x80, 1] + cookie + [0, 0, 0, 21] + [0, 0, 0, 22, 0, 15] + text)
    }

    @Test func extendedChunksAreGolden() {
        #expect(
            bytes(reply(.extended).data(at: 0x2000, length: 0x200, isLast: true, to: block.memory))
                == [0x6e, 0x8a, 0x27, 0x8c, 0, 1, 0, 1] + cookie + [0, 0, 0, 0, 0, 0, 0x10, 0]
                + [0, 0, 0, 0, 0, 0, 2, 8] + [0, 0, 0, 0, 0, 0, 0x20, 0])
    }

    /// Which layout a reply without data takes.
    @Test func statusFollowsTheFormat() {
        func magic(_ format: NBDReplyFormat, _ error: NBDError, _ command: NBDCommand) -> UInt32 {
            let count = reply(format).status(error, command, to: block.memory)
            #expect(count <= NBDReply.headerSizeMax)
            return block.memory.loadBigEndian(UInt32.self, 0)
        }
        #expect(magic(.simple, .none, .write) == NBDMagic.simpleReply)
        #expect(magic(.simple, .io, .read) == NBDMagic.simpleReply)
        #expect(magic(.structured, .none, .write) == NBDMagic.simpleReply)
        #expect(magic(.structured, .io, .write) == NBDMagic.structuredReply)
        #expect(magic(.structured, .none, .read) == NBDMagic.structuredReply)
        #expect(magic(.extended, .none, .write) == NBDMagic.extendedReply)
        for error: NBDError in [
            .notPermitted, .io, .invalid, .noSpace, .overflow, .notSupported, .shutdown,
        ] {
            #expect(magic(.extended, error, .write) == NBDMagic.extendedReply)
        }
    }

    private func table(_ extents: [(UInt64, BlockState)]) -> RawMemory {
        let block = MemoryBlock(count: 4096)
        tables.blocks.append(block)
        let memory = block.memory
        for (index, extent) in extents.enumerated() {
            memory.store(extent.0, index * 16)
            memory.store(UInt32(extent.1.rawValue), index * 16 + 8)
        }
        return memory.slice(0, extents.count * 16)
    }

    /// (length, flags) of a reply's extents.
    private func extents(
        _ status: NBDBlockStatus, _ table: RawMemory, _ format: NBDReplyFormat
    ) -> [[UInt64]] {
        let count = status.encode(table: table, reply: reply(format), to: block.memory)
        let isExtended = format == .extended
        let start = isExtended ? 32 : 20
        let type = block.memory.loadBigEndian(UInt16.self, 6)
        #expect(type == (isExtended ? 6 : 5))
        #expect(block.memory.loadBigEndian(UInt16.self, 4) == NBDChunk.done)
        #expect(block.memory.loadBigEndian(UInt32.self, start) == 1)
        var result: [[UInt64]] = []
        var at = start + (isExtended ? 8 : 4)
        while at < count {
            if isExtended {
                result.append([
                    block.memory.loadBigEndian(UInt64.self, at),
                    block.memory.loadBigEndian(UInt64.self, at + 8),
                ])
                at += 16
            } else {
                result.append([
                    UInt64(block.memory.loadBigEndian(UInt32.self, at)),
                    UInt64(block.memory.loadBigEndian(UInt32.self, at + 4)),
                ])
                at += 8
            }
        }
        #expect(at == count)
        if isExtended {
            #expect(block.memory.loadBigEndian(UInt32.self, start + 4) == UInt32(result.count))
            #expect(block.memory.loadBigEndian(UInt64.self, 24) == UInt64(count - start))
        } else {
            #expect(block.memory.loadBigEndian(UInt32.self, 16) == UInt32(count - start))
        }
        return result
    }

    @Test func statusTellsTheStatesApart() {
        let table = table([
            (4096, .data), (4096, .absent), (8192, .zero), (4096, .zeroAllocated), (1 << 20, .data),
        ])
        for format: NBDReplyFormat in [.structured, .extended] {
            let whole = NBDBlockStatus(offset: 0, length: 32768, tableOffset: 0, isOne: false)
            #expect(
                extents(whole, table, format)
                    == [[4096, 0], [12288, 3], [4096, 2], [12288, 0]])
            let part = NBDBlockStatus(offset: 4608, length: 1024, tableOffset: 4096, isOne: false)
            #expect(extents(part, self.table([(4096, .zero)]), format) == [[1024, 3]])
            let one = NBDBlockStatus(offset: 4096, length: 16384, tableOffset: 0, isOne: true)
            #expect(extents(one, table, format) == [[12288, 3]])
        }
    }

    @Test func whatMayHaveChangedIsDirty() {
        let states = table([(4096, .data), (4096, .zero), (4096, .zeroAllocated), (8192, .absent)])
        for kind in [NBDContext.Kind.changed, .dirty] {
            let context = NBDContext(kind, base: LayerID(rawValue: 1))
            let ask = NBDBlockStatus(
                offset: 0, length: 20480, tableOffset: 0, isOne: false, context: context,
                contextID: 1)
            for format: NBDReplyFormat in [.structured, .extended] {
                #expect(extents(ask, states, format) == [[12288, 1], [8192, 0]])
                #expect(extents(ask, table([]), format) == [[20480, 1]])
            }
        }
    }

    @Test(arguments: [NBDReplyFormat.structured, .extended])
    func aChunkOfSeveralNamesItsContextAndIsNotTheLast(_ format: NBDReplyFormat) {
        let ask = NBDBlockStatus(
            offset: 0, length: 4096, tableOffset: 0, isOne: true, context: .allocation,
            contextID: 7)
        _ = ask.encode(
            table: table([(4096, .data)]), reply: reply(format), isLast: false, to: block.memory)
        #expect(block.memory.loadBigEndian(UInt16.self, 4) == 0)
        #expect(block.memory.loadBigEndian(UInt32.self, format == .extended ? 32 : 20) == 7)
    }

    @Test func nonsenseIsReportedAsData() {
        let bad = table([(0, .zero)])
        let worse = table([(.max, .zero)])
        let unknown = table([(4096, .zero)])
        unknown.store(UInt32(77), 8)
        let ask = NBDBlockStatus(offset: 4096, length: 4096, tableOffset: 4096, isOne: false)
        for memory in [bad, worse, unknown, table([])] {
            #expect(extents(ask, memory, .structured) == [[4096, 0]])
        }
    }

    @Test func aFullTableFits() {
        let states: [BlockState] = [.data, .zero]
        let full = table((0..<256).map { (4096, states[$0 % 2]) })
        let ask = NBDBlockStatus(offset: 0, length: 1 << 20, tableOffset: 0, isOne: false)
        #expect(extents(ask, full, .extended).count == 256)
        #expect(extents(ask, full, .structured).count == 256)
    }
}
