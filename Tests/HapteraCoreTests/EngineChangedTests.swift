import Testing

@testable import HapteraCore

private let one = LayerID(rawValue: 1)
private let two = LayerID(rawValue: 2)
private let three = LayerID(rawValue: 3)

extension EngineHarness {
    /// Asks what changed since `base`.
    fileprivate func ask(since base: LayerID, in layer: LayerID = .head) -> UInt64 {
        guard let buffer = pool.allocate(4096) else { preconditionFailure() }
        return submit(.status, 0, 1 << 20, buffer, layer: layer, base: base)
    }
    fileprivate var asked: [FrameHeader] {
        fakes.flatMap(\.heard).filter { $0.kind == .status }
    }
}

/// Questions about what changed since a snapshot.
@Suite struct EngineChangedTests {
    private func block(_ byte: UInt8) -> [UInt8] { [UInt8](repeating: byte, count: 4096) }

    @Test func theBaseIsAskedOfAMember() {
        let h = EngineHarness.layered()
        h.start()
        for (base, layer) in [(one, LayerID.head), (two, .head), (one, two), (two, two)] {
            let before = h.asked.count
            #expect(h.results[h.ask(since: base, in: layer)] == .ok)
            #expect(h.asked.count == before + 1)
            #expect(h.asked.contains { $0.auxiliary == UInt64(base.rawValue) && $0.layer == layer })
        }
        _ = h.ask(since: .head)
        #expect(h.asked.contains { $0.auxiliary == 0 })
    }

    /// Neither the head, nor what is above the layer asked about, nor what is not there.
    @Test func aBaseThatIsNoSnapshotBelowIsAnError() {
        let h = EngineHarness.layered()
        h.start()
        for (base, layer) in [(three, LayerID.head), (LayerID(rawValue: 4), .head), (two, one)] {
            #expect(h.results[h.ask(since: base, in: layer)] == .ioError)
        }
        #expect(h.asked.isEmpty && h.stored.inSync.count == 3)
    }

    @Test func aDeletionWaitsForIt() {
        let h = EngineHarness.layered()
        h.start()
        for fake in h.fakes { fake.isDeaf = true }
        let asked = h.ask(since: one)
        h.run(.deleteSnapshot(token: 5, name: "a"))
        #expect(h.deletions[5] == nil && h.stored.layers.count == 3)
        for fake in h.fakes { h.hear(fake, from: 0) }
        #expect(h.results[asked] == .ok && h.deletions[5] == .ok)
        #expect(h.results[h.ask(since: one)] == .ioError)
    }

    /// What was sent before the freeze is in the snapshot, so nobody may be told that it is not.
    @Test func aSnapshotIsAskedWhenItsWritesAreThere() {
        let h = EngineHarness.layered()
        h.start()
        h.fakes[1].mute = [FrameKind.write.rawValue]
        let write = h.write(0, block(1))
        h.run(.takeSnapshot(token: 5, name: "c", created: 7))
        #expect(h.stored.layers.count == 4)
        let (changed, lower) = (h.ask(since: one, in: three), h.ask(since: one, in: two))
        #expect(h.results[changed] == nil && h.results[lower] == .ok)
        #expect(!h.asked.contains { $0.layer == three })
        #expect(h.results[h.ask(since: one)] == .ok, "the live volume waits for nothing")
        h.fakes[1].mute = []
        h.answerMuted(h.fakes[1])
        #expect(h.results[write] == .ok && h.results[changed] == .ok)
        #expect(h.asked.contains { $0.layer == three })
    }

    @Test func aClientThatLeavesAsksNoMore() {
        let h = EngineHarness.layered()
        h.start()
        h.fakes[1].mute = [FrameKind.write.rawValue]
        h.write(0, block(1))
        h.run(.takeSnapshot(token: 5, name: "c", created: 7))
        guard let buffer = h.pool.allocate(4096) else { return }
        let changed = h.submit(.status, 0, 4096, buffer, session: 9, layer: three, base: one)
        h.run(.cancel(session: 9))
        #expect(h.results[changed] == .cancelled)
    }
}
