import Testing

@testable import HapteraCore

/// Writes of nothing but zeroes, where the volume is told to look for them.
@Suite struct EngineZeroTests {
    private func block(_ byte: UInt8, count: Int = 1) -> [UInt8] {
        [UInt8](repeating: byte, count: count * Geometry.blockSize)
    }
    private func harness(_ detectsZeroes: Bool = true) -> EngineHarness {
        let h = EngineHarness { $0.detectsZeroes = detectsZeroes }
        h.start()
        return h
    }

    @Test func zeroesTakeNoSpace() {
        let h = harness()
        let inUse = h.pool.inUse
        h.write(0, block(7, count: 4))
        let zeroes = h.write(4096, block(0, count: 2))
        #expect(h.results[zeroes] == .ok)
        for fake in h.fakes {
            #expect((0..<4).map { fake.entry($0).state } == [.data, .zero, .zero, .data])
        }
        let read = h.read(0, 4 * Geometry.blockSize)
        #expect(h.reads[read] == block(7) + block(0, count: 2) + block(7))
        #expect(h.pool.inUse == inUse)
    }

    @Test func oneOtherByteIsData() {
        let h = harness()
        for place in [0, 8191] {
            var bytes = block(0, count: 2)
            bytes[place] = 1
            let write = h.write(8192, bytes)
            #expect(h.results[write] == .ok)
            #expect(h.fakes.allSatisfy { $0.entry(2).state == .data && $0.entry(3).state == .data })
            let read = h.read(8192, 8192)
            #expect(h.reads[read] == bytes)
        }
    }

    /// The last part of a block that is not zero yet: then the whole of it is.
    @Test func aPartCompletesTheBlock() {
        let h = harness()
        h.write(0, [UInt8](repeating: 0, count: 2048) + [UInt8](repeating: 5, count: 2048))
        h.write(512, [UInt8](repeating: 0, count: 512))
        #expect(h.fakes.allSatisfy { $0.entry(0).state == .data })
        h.write(2048, [UInt8](repeating: 0, count: 2048))
        #expect(h.fakes.allSatisfy { $0.entry(0).state == .zero })
        let read = h.read(0, 4096)
        #expect(h.reads[read] == block(0))
    }

    @Test func theFlagGoesWithIt() throws {
        let h = harness()
        let buffer = try #require(h.pool.allocate(4096))
        h.pool.memory(buffer).fill()
        let write = h.submit(.write, 0, 4096, buffer, flags: .fua)
        #expect(h.results[write] == .ok)
        #expect(
            h.fakes.allSatisfy {
                $0.heard.last?.kind == .setState && $0.heard.last?.flags == FrameFlags.fua
            })
    }

    /// Space that was asked for is kept, whatever the switch says.
    @Test func zeroesThatKeepSpaceDoSo() {
        let h = harness()
        h.submit(.writeZeroes, 0, 4096, flags: .noHole)
        #expect(h.fakes.allSatisfy { $0.entry(0).state == .zeroAllocated })
    }

    @Test func offAndChangedWhileItRuns() {
        let h = harness(false)
        h.write(0, block(0))
        #expect(h.fakes.allSatisfy { $0.entry(0).state == .data })
        h.core.set(detectsZeroes: true)
        h.write(0, block(0))
        #expect(h.fakes.allSatisfy { $0.entry(0).state == .zero })
        h.core.set(detectsZeroes: false)
        h.write(0, block(0))
        #expect(h.fakes.allSatisfy { $0.entry(0).state == .data })
    }

    /// A full disk has room for what takes none.
    @Test func zeroesFitAFullDisk() {
        let h = harness()
        for fake in h.fakes { fake.errors = [FrameKind.write.rawValue: .noSpace] }
        let data = h.write(0, block(3))
        let zeroes = h.write(4096, block(0))
        h.pass(milliseconds: 2000)
        #expect(h.results[data] == nil && h.results[zeroes] == .ok)
    }
}
