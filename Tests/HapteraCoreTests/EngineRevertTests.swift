import Testing

@testable import HapteraCore

private let one = LayerID(rawValue: 1)
private let two = LayerID(rawValue: 2)
private let three = LayerID(rawValue: 3)

extension EngineHarness {
    fileprivate func revert(_ token: UInt64, to target: String, keeping kept: String) {
        run(.revert(token: token, target: target, kept: kept, created: 9))
    }
    fileprivate func result(_ token: UInt64) -> SnapshotResult? { snapshots[token]?.result }
}

/// Rule S: a revert is a freeze whose new head is made over an older layer, and which clients wait
/// for.
@Suite struct EngineRevertTests {
    private func block(_ byte: UInt8) -> [UInt8] { [UInt8](repeating: byte, count: 4096) }

    /// Snapshot "a" holds 1 in block 0; the volume holds 2.
    private func written() -> EngineHarness {
        let h = EngineHarness()
        h.start()
        h.write(0, block(1))
        h.run(.takeSnapshot(token: 1, name: "a", created: 7))
        h.write(0, block(2))
        return h
    }

    @Test func theVolumeIsWhatTheSnapshotHolds() {
        let h = written()
        h.revert(5, to: "a", keeping: "kept")
        #expect(h.snapshots[5]?.layer == two && h.result(5) == .ok)
        #expect(h.stored.layers == [one, two, three] && h.stored.change == .revert)
        #expect(h.stored.reverts == [.init(head: three, target: one)])
        #expect(h.stored.snapshots.last == .init(layer: two, name: "kept", created: 9))
        #expect(h.reads[h.read(0, 4096)] == block(1))
        #expect(h.reads[h.read(0, 4096, layer: two)] == block(2))
        h.write(0, block(3))
        #expect(h.reads[h.read(0, 4096)] == block(3))
        #expect(h.fakes.allSatisfy { $0.layers[three]?[0]?.data == block(3) })
        let isNoted = h.notes.contains {
            if case .reverted(to: one, _) = $0 { true } else { false }
        }
        #expect(isNoted)
        // And back.
        h.revert(6, to: "kept", keeping: "other")
        #expect(h.result(6) == .ok && h.reads[h.read(0, 4096)] == block(2))
    }

    @Test func askedForAgainItIsThere() {
        let h = written()
        h.revert(5, to: "a", keeping: "kept")
        h.write(0, block(3))
        h.revert(6, to: "a", keeping: "kept")
        #expect(h.result(6) == .exists && h.stored.layers.count == 3)
        #expect(h.reads[h.read(0, 4096)] == block(3))
    }

    @Test func whatCannotBeIsSaid() {
        let h = written()
        h.revert(5, to: "b", keeping: "kept")
        h.revert(6, to: "a", keeping: "a")
        #expect(h.result(5) == .notThere && h.result(6) == .nameTaken)
        #expect(h.stored.layers == [one, two])
        h.run(.detach)
        h.revert(7, to: "a", keeping: "kept")
        #expect(h.result(7) == .notServing)
    }

    /// Whoever comes meanwhile has not asked before it.
    @Test func requestsWaitAndFindItReverted() {
        let h = written()
        h.isStoreDown = true
        h.revert(5, to: "a", keeping: "kept")
        let read = h.read(0, 4096)
        let write = h.write(4096, block(4))
        let old = h.read(0, 4096, layer: one)
        #expect(h.reads[read] == nil && h.results[write] == nil && h.result(5) == nil)
        #expect(h.reads[old] == block(1), "a snapshot's readers are not concerned")
        h.isStoreDown = false
        h.pass(milliseconds: 300)
        #expect(h.result(5) == .ok && h.reads[read] == block(1) && h.results[write] == .ok)
        #expect(h.fakes.allSatisfy { $0.layers[three]?[1]?.data == block(4) })
    }

    @Test func whatWasAskedBeforeIsKept() {
        let h = written()
        h.fakes[1].mute = [FrameKind.write.rawValue]
        let write = h.write(0, block(3))
        h.revert(5, to: "a", keeping: "kept")
        #expect(h.stored.layers == [one, two], "its turn has not come")
        h.fakes[1].mute = []
        h.answerMuted(h.fakes[1])
        #expect(h.results[write] == .ok && h.result(5) == .ok)
        #expect(h.reads[h.read(0, 4096)] == block(1))
        #expect(h.reads[h.read(0, 4096, layer: two)] == block(3))
    }

    /// Nothing waits any more when it cannot be.
    @Test func aRefusalLetsRequestsGo() {
        let h = written()
        h.isStoreDown = true
        h.run(.deleteSnapshot(token: 4, name: "a"))
        h.revert(5, to: "a", keeping: "kept")
        let read = h.read(0, 4096)
        #expect(h.reads[read] == nil)
        h.isStoreDown = false
        h.pass(milliseconds: 300)
        #expect(h.deletions[4] == .ok && h.result(5) == .notThere)
        #expect(h.reads[read] == block(2))
    }

    @Test func aReplicaThatWasAwayGetsTheTree() {
        let h = written()
        h.kill(h.fakes[2])
        h.pass(milliseconds: 300)
        h.revert(5, to: "a", keeping: "kept")
        h.write(4096, block(5))
        h.run(.deleteSnapshot(token: 6, name: "kept"))
        #expect(h.result(5) == .ok && h.deletions[6] == .ok)
        #expect(h.stored.layers == [one, three])
        h.connect(h.fakes[2])
        h.pass(milliseconds: 5000)
        #expect(h.stored.inSync.count == 3)
        #expect(h.fakes[2].layers[two] == nil && h.fakes[2].layers[one]?[0]?.data == block(1))
        #expect(h.fakes[2].block(0, in: three, isMerged: true).data == block(1))
        #expect(h.fakes[2].layers[three]?[1]?.data == block(5))
    }

    @Test func anEngineThatStopsLeavesItInDoubt() {
        let h = written()
        h.isStoreDown = true
        h.revert(5, to: "a", keeping: "kept")
        h.stored.epoch = Epoch(99)
        h.stored.nonce = 1
        h.isStoreDown = false
        h.pass(milliseconds: 300)
        #expect(h.core.phase == .stopped && h.result(5) == .inDoubt)
    }
}
