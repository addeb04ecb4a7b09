import Testing

@testable import HapteraCore

private let one = LayerID(rawValue: 1)
private let two = LayerID(rawValue: 2)
private let three = LayerID(rawValue: 3)

extension EngineHarness {
    fileprivate func delete(_ token: UInt64, _ name: String) {
        run(.deleteSnapshot(token: token, name: name))
    }
}

/// A deletion is one change of the record, after which no request names the layer.
@Suite struct EngineDeleteTests {
    private func block(_ byte: UInt8) -> [UInt8] { [UInt8](repeating: byte, count: 4096) }

    /// With something in each layer.
    private func layered(members: Int = 3) -> EngineHarness {
        let h = EngineHarness.layered(members: members)
        for fake in h.fakes.prefix(members) {
            fake.put(0, block(1), in: one)
            fake.put(1, block(2), in: two)
            fake.put(2, block(3), in: three)
        }
        return h
    }

    @Test func theRecordForgetsNameAndLayer() {
        let h = layered()
        h.start()
        h.delete(5, "b")
        #expect(h.deletions[5] == .ok)
        #expect(h.stored.layers == [one, three] && h.stored.change == .snapshot)
        #expect(h.stored.snapshots.map(\.name) == ["a"])
        #expect(h.fakes.allSatisfy { $0.layers[two] == nil && $0.promise == h.stored.epoch })
        let isNoted = h.notes.contains {
            if case .snapshotDeleted(two, h.stored.epoch) = $0 { true } else { false }
        }
        #expect(isNoted)
        #expect(h.reads[h.read(4096, 4096)] == block(2))
        #expect(h.results[h.read(0, 4096, layer: two)] == .ioError)
        #expect(h.reads[h.read(0, 4096, layer: one)] == block(1))
        // Its name and the one below the head are free again.
        h.delete(6, "a")
        h.run(.takeSnapshot(token: 7, name: "b", created: 3))
        #expect(h.deletions[6] == .ok && h.snapshots[7]?.layer == three)
        #expect(h.stored.layers == [three, LayerID(rawValue: 4)])
    }

    /// A joiner's copy waits for a member's digest, which waits for a merge; then the layer's
    /// snapshot is deleted, the job begins again, and the member refuses what it had not begun. It
    /// was removed for that, though nobody wanted the answer any more.
    @Test func aRefusalOfWhatABeginningAgainHasForgottenIsNoFailure() throws {
        let h = layered(members: 2)
        h.fakes[2].promise = .zero
        let source = h.fakes[0]
        source.mute = [FrameKind.digest.rawValue, FrameKind.read.rawValue]
        h.start()
        h.pass(milliseconds: 500)
        #expect(h.core.joinStage == .copying)
        let asked = try #require(
            source.heard.last { $0.kind == .digest || $0.kind == .read && $0.layer != .head })
        source.isDeaf = true
        h.delete(5, asked.layer == one ? "a" : "b")
        let install = try #require(source.unheard.first { $0.header.kind == .install }).header
        h.refuse(source, asked, .staleEpoch, epoch: install.epoch)
        source.mute = []
        h.hear(source, from: 0)
        h.pass(milliseconds: 4000)
        let isLost = h.notes.contains { if case .replicaLost = $0 { true } else { false } }
        #expect(!isLost && h.stored.inSync.count == 3 && h.deletions[5] == .ok)
    }

    /// Seed 2006411: layer 2, at which a joiner's copy was, is deleted. Its heir is layer 4, made
    /// over it by a revert; layer 3, of another line, was not copied.
    @Test func aCopyLeavesNoLayerOutThatLiesBeforeTheHeir() {
        let h = layered(members: 2)
        let four = LayerID(rawValue: 4)
        h.stored.layers.append(four)
        h.stored.snapshots.append(.init(layer: three, name: "c", created: 3))
        h.stored.reverts = [.init(head: three, target: one), .init(head: four, target: two)]
        for fake in h.fakes.prefix(2) { fake.put(3, block(4), in: four) }
        let joiner = h.fakes[2]
        joiner.promise = .zero
        joiner.mute = [FrameKind.write.rawValue]
        h.start()
        h.pass(milliseconds: 500)
        // It has layer 1, and is at layer 2.
        h.answerMuted(joiner)
        #expect(joiner.layers[two]?[1]?.data == block(2) && joiner.layers[three]?[2] == nil)
        h.delete(5, "b")
        joiner.mute = []
        h.answerMuted(joiner)
        h.pass(milliseconds: 4000)
        #expect(h.deletions[5] == .ok && h.stored.layers == [one, three, four])
        #expect(h.stored.inSync.count == 3)
        #expect(joiner.layers[three]?[2]?.data == block(3))
        #expect(joiner.layers[four]?[3]?.data == block(4))
    }

    /// Seed 2825886: what the deleted layer held, and the joiner had been given of it, was trimmed
    /// in its heir. That is the lowest layer now, where a joiner that holds nothing is not told of
    /// zeroes; this one did, and kept the block.
    @Test func aTrimHidesWhatAJoinerWasGivenOfADeletedLayer() {
        let h = layered(members: 2)
        for fake in h.fakes.prefix(2) {
            fake.put(9, block(1), in: one)
            fake.layers[two]?[9] = (BlockEntry(state: .zero), [])
        }
        let joiner = h.fakes[2]
        joiner.promise = .zero
        joiner.mute = [FrameKind.write.rawValue]
        h.start()
        h.pass(milliseconds: 500)
        #expect(joiner.layers[one]?[9]?.data == block(1) && joiner.layers[two]?[9] == nil)
        h.delete(5, "a")
        joiner.mute = []
        h.answerMuted(joiner)
        h.pass(milliseconds: 4000)
        #expect(h.deletions[5] == .ok && h.stored.layers == [two, three])
        #expect(h.stored.inSync.count == 3)
        #expect(joiner.layers[two]?[9]?.entry.state == .zero)
    }

    @Test func whatIsNotThereOrNotServedIsSaid() {
        let h = layered()
        h.delete(4, "a")
        #expect(h.deletions[4] == .notServing)
        h.start()
        h.delete(5, "c")
        #expect(h.deletions[5] == .notThere)
        h.isStoreDown = true
        h.delete(6, "a")
        h.delete(7, "a")
        #expect(h.deletions[6] == nil)
        // Nobody waits for the store.
        let write = h.write(0, block(9))
        #expect(h.results[write] == .ok)
        h.isStoreDown = false
        h.pass(milliseconds: 300)
        #expect(h.deletions[6] == .ok && h.deletions[7] == .notThere)
        h.run(.detach)
        h.delete(8, "b")
        #expect(h.deletions[8] == .notServing)
    }

    @Test func anEngineThatStopsLeavesItInDoubt() {
        let h = layered()
        h.start()
        h.isStoreDown = true
        h.delete(5, "a")
        h.delete(6, "b")
        h.stored.epoch = Epoch(9)
        h.stored.engine = InstanceID(rawValue: 100)
        h.isStoreDown = false
        h.pass(milliseconds: 300)
        #expect(h.core.stopReason == .fenced)
        #expect(h.deletions[5] == .inDoubt && h.deletions[6] == .notServing)
    }

    /// A write on its way to a frozen layer names it.
    @Test func itWaitsForWritesToFrozenLayers() {
        let h = layered()
        h.start()
        h.fakes[1].mute = [FrameKind.write.rawValue]
        let write = h.write(0, block(7))
        h.run(.takeSnapshot(token: 4, name: "c", created: 3))
        h.delete(5, "a")
        #expect(h.stored.layers.count == 4 && h.deletions[5] == nil)
        h.fakes[1].mute = []
        h.answerMuted(h.fakes[1])
        #expect(h.results[write] == .ok && h.deletions[5] == .ok)
        #expect(h.stored.layers == [two, three, LayerID(rawValue: 4)])
    }

    /// Reads that were there before end; later ones fail and do not hold it up.
    @Test func itWaitsForReadsOfTheSnapshot() {
        let h = layered()
        h.start()
        for fake in h.fakes { fake.isDeaf = true }
        let read = h.read(0, 4096, layer: one)
        h.delete(5, "a")
        #expect(h.deletions[5] == nil && h.stored.layers.count == 3)
        for fake in h.fakes { h.hear(fake, from: 0) }
        #expect(h.reads[read] == block(1) && h.deletions[5] == .ok)
        h.isStoreDown = true
        h.delete(6, "b")
        #expect(h.results[h.read(0, 4096, layer: two)] == .ioError)
        h.isStoreDown = false
        h.pass(milliseconds: 300)
        #expect(h.deletions[6] == .ok)
    }

    /// A copy that has compared one of the two layers compares both as one: what was half of a
    /// comparison says nothing about the whole.
    @Test(arguments: [one, two]) func copiesUnderWayBeginTheHeirAgain(at: LayerID) {
        let h = layered(members: 2)
        let joiner = h.fakes[2]
        joiner.layers = [one: [:], two: [:], three: [:]]
        joiner.put(0, block(8), in: one)
        joiner.put(1, block(9), in: two)
        joiner.mute = [FrameKind.write.rawValue]
        h.start()
        if at == two { h.answerMuted(joiner) }
        let asked = joiner.heard.filter { $0.kind == .digest }
        #expect(h.core.isCopying && asked.last?.layer == at && !joiner.muted.isEmpty)
        h.delete(5, "a")
        #expect(h.deletions[5] == .ok && h.stored.layers == [two, three])
        joiner.mute = []
        h.answerMuted(joiner)
        h.pass(milliseconds: 1000)
        #expect(h.stored.inSync.count == 3 && joiner.layers[one] == nil)
        for layer in [two, three] {
            for place in 0..<3 as Range<UInt64> {
                let mine = joiner.layers[layer]?[place]
                let other = h.fakes[0].layers[layer]?[place]
                #expect(mine?.data ?? [] == other?.data ?? [], "block \(place) of \(layer)")
            }
        }
    }
}
