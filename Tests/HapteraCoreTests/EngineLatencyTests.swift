import Testing

@testable import HapteraCore

/// Slow but living replicas.
@Suite struct EngineLatencyTests {
    private let one = [UInt8](repeating: 1, count: 4096)

    private func write(_ h: EngineHarness, times: Int) {
        for _ in 0..<times {
            h.write(0, one)
            h.pass(milliseconds: 100)
        }
    }

    @Test func aMemberMuchSlowerThanTheOthersLeavesForAWhile() {
        let h = EngineHarness()
        h.start()
        h.fakes[2].delayMilliseconds = 300
        write(h, times: 45)
        #expect(h.stored.inSync.count == 3)
        write(h, times: 15)
        #expect(h.stored.inSync == h.fakes.prefix(2).map(\.member))
        #expect(h.stored.out.map(\.reason) == [.slow])
        #expect(h.core.writeLatency(h.slot(h.fakes[2])).average >= 100_000)
        h.connect(h.fakes[2])
        h.fakes[2].delayMilliseconds = 0
        write(h, times: 60)
        #expect(h.stored.inSync.count == 2, "it stays away")
        write(h, times: 60)
        #expect(h.stored.inSync.count == 3)
    }

    @Test func redundancyIsNotGivenUpForSpeed() {
        let h = EngineHarness(replicas: 2)
        h.start()
        h.fakes[1].delayMilliseconds = 300
        write(h, times: 80)
        #expect(h.stored.inSync.count == 2)
    }

    @Test func whoIsSlowTogetherStays() {
        let h = EngineHarness()
        h.start()
        for fake in h.fakes.dropFirst() { fake.delayMilliseconds = 300 }
        write(h, times: 80)
        #expect(h.stored.inSync.count == 3)
    }

    @Test func readsGoToWhoAnswersFirst() {
        let h = EngineHarness()
        h.start()
        h.write(0, one)
        h.fakes[0].delayMilliseconds = 100
        let before = h.fakes[0].seen.count { $0 == .read }
        for _ in 0..<50 {
            h.read(0, 4096)
            h.pass(milliseconds: 100)
        }
        #expect(h.fakes[0].seen.count { $0 == .read } - before < 15)
        #expect(h.pool.inUse == h.core.ownBuffers)
    }

    @Test func aReadThatIsLateIsAskedOfAnotherMember() {
        let h = EngineHarness()
        h.start()
        h.write(0, one)
        for _ in 0..<64 { h.read(0, 4096) }
        h.fakes[0].delayMilliseconds = 1000
        var ids: [UInt64] = []
        for _ in 0..<3 { ids.append(h.read(0, 4096)) }
        h.pass(milliseconds: 200)
        #expect(ids.allSatisfy { h.reads[$0] == one })
        #expect(h.core.hedgedReads == 1)
        // The buffer that the late reply may be arriving in is not given to anybody else; a write
        // is not held up by it, and in the end nothing stays behind.
        #expect(h.pool.inUse == h.core.ownBuffers + 1)
        #expect(h.results[h.submit(.trim, 0, 4096)] == .ok)
        h.pass(milliseconds: 1500)
        #expect(h.pool.inUse == h.core.ownBuffers)
        #expect(h.stored.inSync.count == 3)
    }

    @Test func hedgesAreDroppedWithTheMembersAsked() {
        let h = EngineHarness()
        h.start()
        for _ in 0..<64 { h.read(0, 4096) }
        for fake in h.fakes { fake.delayMilliseconds = 1000 }
        let id = h.read(0, 4096)
        h.pass(milliseconds: 200)
        #expect(h.core.hedgedReads == 1)
        for fake in h.fakes { h.kill(fake) }
        #expect(h.results[id] == nil)
        for fake in h.fakes {
            fake.delayMilliseconds = 0
            h.connect(fake)
        }
        h.pass(milliseconds: 2000)
        #expect(h.results[id] == .ok)
        #expect(h.pool.inUse == h.core.ownBuffers)
    }
}
