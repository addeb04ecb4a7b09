import Testing

@testable import HapteraCore

private let one = LayerID(rawValue: 1)
private let two = LayerID(rawValue: 2)
private let three = LayerID(rawValue: 3)

/// Members and joiners are made equal layer by layer.
@Suite struct EngineLayerTests {
    private func block(_ byte: UInt8) -> [UInt8] { [UInt8](repeating: byte, count: 4096) }

    private func set(_ fake: FakeReplica, _ layer: LayerID, _ block: UInt64, _ state: BlockState) {
        fake.layers[layer, default: [:]][block] = (BlockEntry(state: state), [])
    }
    /// Every layer of both holds the same, absent being different from zero.
    private func areEqual(_ a: FakeReplica, _ b: FakeReplica) -> Bool {
        a.layers.keys.sorted() == b.layers.keys.sorted()
            && a.layers.keys.allSatisfy { layer in
                (0..<EngineHarness.size / 4096).allSatisfy {
                    let (x, y) = (
                        a.block($0, in: layer, isMerged: false),
                        b.block($0, in: layer, isMerged: false)
                    )
                    let areZero =
                        layer == a.layers.keys.min()
                        && [x, y].allSatisfy { [.absent, .zero].contains($0.entry.state) }
                    return areZero || x.entry == y.entry && x.data == y.data
                }
            }
    }

    @Test func aTakeoverResolvesTheLayersThatLogsName() {
        let h = EngineHarness.layered()
        h.stored.isClean = false
        h.fakes[1].activeAbove = [LayerRegion(two, 1)]
        h.fakes[0].put(256, block(1), in: two)
        h.fakes[2].put(257, block(2), in: two)
        h.start()
        h.pass(milliseconds: 200)
        #expect(h.core.unresolvedCount == 0 && areEqual(h.fakes[0], h.fakes[2]))
        let digests = h.fakes[0].heard.filter { $0.kind == .digest }
        #expect(digests.map(\.layer) == [two])
        // The member that is the source holds it absent in the frozen layer: shown through.
        #expect(h.fakes[2].layers[two]?[257]?.entry.state == .absent)
        let isExplicit = h.fakes.flatMap(\.heard).allSatisfy {
            $0.layer == two || $0.kind != .read && $0.kind != .write && $0.kind != .setState
        }
        #expect(isExplicit)
    }

    @Test func severalLayersOfARegionAreResolvedInOrder() {
        let h = EngineHarness.layered()
        h.stored.isClean = false
        h.fakes[0].activeAbove = [LayerRegion(three, 0)]
        h.fakes[1].active = [0]
        h.fakes[0].put(3, block(1), in: one)
        h.fakes[0].put(3, block(2), in: three)
        h.start()
        h.pass(milliseconds: 200)
        #expect(h.fakes[1].heard.filter { $0.kind == .digest }.map(\.layer) == [one, three])
        #expect(areEqual(h.fakes[0], h.fakes[1]) && areEqual(h.fakes[0], h.fakes[2]))
        #expect(h.core.lastTakeover.regions == 1 && h.core.lastTakeover.blocks == 2)
    }

    /// What reads the same from the head, and not from every snapshot.
    private func fill(_ fake: FakeReplica) {
        for index in 0..<4 as Range<UInt64> { fake.put(index, block(1), in: one) }
        set(fake, two, 0, .zero)
        fake.put(1, block(2), in: two)
        set(fake, two, 2, .zeroAllocated)
        fake.put(2, block(3), in: three)
        set(fake, three, 1, .zero)
        fake.put(700, block(4), in: three)
    }

    @Test func aJoinerWithAShorterChainGetsAllLayers() {
        for holdsSomething in [true, false] {
            let h = EngineHarness.layered(members: 2)
            for fake in h.fakes.prefix(2) { fill(fake) }
            if holdsSomething {
                h.fakes[2].put(3, block(9), in: one)
                h.fakes[2].put(300, block(8), in: one)
            }
            h.start()
            h.pass(milliseconds: 3000)
            #expect(h.stored.inSync.count == 3)
            #expect(areEqual(h.fakes[0], h.fakes[2]))
            #expect(h.fakes[2].heard.contains { $0.kind == .digest } == holdsSomething)
            // Nothing is written for the birth of what a layer does not hold.
            let above = h.fakes[2].heard.filter { $0.kind == .setState && $0.layer != one }
            #expect(above.allSatisfy { $0.auxiliary != UInt64(BlockState.absent.rawValue) })
        }
    }

    @Test func absentAndZeroOverDataAreToldApart() {
        let h = EngineHarness.layered(members: 2)
        for fake in h.fakes.prefix(2) { fill(fake) }
        h.fakes[2].layers = h.fakes[0].layers
        // Data and zero where the members show through, and the other way round.
        h.fakes[2].put(3, block(7), in: two)
        set(h.fakes[2], three, 3, .zero)
        h.fakes[2].layers[two]?[0] = nil
        h.fakes[2].layers[three]?[1] = nil
        h.start()
        h.pass(milliseconds: 3000)
        #expect(h.stored.inSync.count == 3 && areEqual(h.fakes[0], h.fakes[2]))
        #expect(h.fakes[2].layers[two]?[3]?.entry.state == .absent)
        #expect(h.fakes[2].layers[three]?[3]?.entry.state == .absent)
    }

    @Test func aDamagedBlockOfAFrozenLayerIsRepairedThere() {
        let h = EngineHarness.layered()
        for fake in h.fakes {
            fill(fake)
            fake.verifies = true
        }
        h.fakes[0].layers[one]?[3]?.data = block(66)
        h.start()
        for _ in 0..<6 {
            let read = h.read(3 * 4096, 4096)
            #expect(h.reads[read] == block(1))
        }
        #expect(h.core.blocksRepaired == 1 && areEqual(h.fakes[0], h.fakes[1]))
        let written = h.fakes[0].heard.filter { $0.kind == .write }
        #expect(written.map(\.layer) == [one])
        #expect(h.core.unresolvedCount == 0)
    }

    /// A write that is acknowledged cannot be sent again: its region is copied once more.
    @Test func aSnapshotDoesNotCostTheJoinerThatParkedAnAcknowledgedWrite() {
        let h = EngineHarness.layered(members: 2)
        for fake in h.fakes.prefix(2) { fill(fake) }
        let joiner = h.fakes[2]
        joiner.mute = [FrameKind.write.rawValue]
        h.start()
        #expect(h.core.isCopying && !joiner.muted.isEmpty)
        joiner.isDeaf = true
        let write = h.write(1 << 20, block(5))
        #expect(h.results[write] == .ok)
        h.run(.takeSnapshot(token: 5, name: "c", created: 3))
        let waiting = joiner.unheard
        #expect(waiting.map(\.header.kind) == [.write, .install])
        h.refuse(joiner, waiting[0].header, .staleEpoch, epoch: waiting[1].header.epoch)
        joiner.mute = []
        h.hear(joiner, from: 1)
        h.answerMuted(joiner)
        h.pass(milliseconds: 1000)
        #expect(!h.notes.contains { if case .joinFailed = $0 { true } else { false } })
        #expect(h.stored.inSync.count == 3 && areEqual(h.fakes[0], joiner))
        #expect(joiner.layers[three]?[256]?.data == block(5))
        #expect(h.snapshots[5]?.result == .ok)
    }

    /// The copy has a layer more to do than when it began, and the joiner is not lost over it:
    /// an Install of the engine's own passed writes that waited for room in its activity log.
    @Test func aSnapshotWhileAJoinerIsFilledDoesNotInterruptIt() {
        let h = EngineHarness.layered(members: 2)
        for fake in h.fakes.prefix(2) { fill(fake) }
        h.fakes[2].mute = [FrameKind.write.rawValue]
        h.start()
        let joiner = h.fakes[2]
        #expect(h.core.isCopying && !joiner.muted.isEmpty)
        joiner.isDeaf = true
        h.run(.takeSnapshot(token: 5, name: "c", created: 3))
        // The joiner does not hold up what members have done.
        #expect(h.snapshots[5]?.result == .ok || h.snapshots[5] == nil)
        let four = LayerID(rawValue: 4)
        #expect(h.stored.head == four)
        let (refused, waiting) = (joiner.muted, joiner.unheard)
        (joiner.muted, joiner.mute) = ([], [])
        let epoch = waiting.first { $0.header.kind == .install }?.header.epoch
        for header in refused { h.refuse(joiner, header, .staleEpoch, epoch: epoch) }
        h.hear(joiner, from: 0)
        h.write(0, block(5))
        h.pass(milliseconds: 1000)
        #expect(!h.notes.contains { if case .joinFailed = $0 { true } else { false } })
        #expect(h.stored.inSync.count == 3 && areEqual(h.fakes[0], joiner))
        #expect(h.snapshots[5]?.result == .ok)
        #expect(joiner.layers[four]?[0]?.data == block(5))
    }
}
