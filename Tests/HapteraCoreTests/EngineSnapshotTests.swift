import Testing

@testable import HapteraCore

private let one = LayerID(rawValue: 1)
private let two = LayerID(rawValue: 2)
private let three = LayerID(rawValue: 3)

extension EngineHarness {
    fileprivate func take(_ token: UInt64, _ name: String) {
        run(.takeSnapshot(token: token, name: name, created: 7))
    }
    fileprivate func result(_ token: UInt64) -> SnapshotResult? { snapshots[token]?.result }
}

/// Rule S: the freeze lies between the same two writes on every member, and no client waits for it.
@Suite struct EngineSnapshotTests {
    private func block(_ byte: UInt8) -> [UInt8] { [UInt8](repeating: byte, count: 4096) }
    private let writes = FrameKind.write.rawValue
    private let flushes = FrameKind.flush.rawValue

    @Test func aSnapshotFreezesTheHead() {
        let h = EngineHarness()
        h.start()
        h.write(0, block(1))
        h.take(5, "first")
        #expect(h.snapshots[5]?.layer == one && h.result(5) == .ok)
        #expect(h.stored.layers == [one, two] && h.stored.change == .snapshot)
        #expect(h.stored.snapshots == [.init(layer: one, name: "first", created: 7)])
        h.write(0, block(2))
        h.write(100, [9])
        for fake in h.fakes {
            #expect(fake.layers[one]?[0]?.data == block(1))
            #expect(fake.layers[two]?[0]?.data[0] == 2 && fake.layers[two]?[0]?.data[100] == 9)
        }
        let isNoted = h.notes.contains {
            if case .snapshotTaken(one, h.stored.epoch) = $0 { true } else { false }
        }
        #expect(isNoted)
        h.take(6, "second")
        #expect(h.snapshots[6]?.layer == two && h.stored.layers == [one, two, three])
    }

    @Test func aSnapshotIsReadAndAskedAboutByItsLayer() {
        let h = EngineHarness()
        h.start()
        h.write(0, block(1))
        h.take(5, "first")
        h.write(0, block(2))
        let live = h.read(0, 4096)
        let old = h.read(0, 4096, layer: one)
        #expect(h.reads[live] == block(2))
        #expect(h.reads[old] == block(1))
        // Neither the head itself nor anything that was never frozen is a snapshot.
        for layer in [two, three] {
            #expect(h.results[h.read(0, 4096, layer: layer)] == .ioError)
        }
        guard let buffer = h.pool.allocate(4096) else { return }
        h.submit(.status, 0, 4096, buffer, layer: one)
        let asked = h.fakes.flatMap(\.heard).filter { $0.kind == .status }
        #expect(asked.allSatisfy { $0.layer == one } && !asked.isEmpty)
        #expect(h.stored.inSync.count == 3)
    }

    @Test func writesOnTheWayAreBeforeTheFreezeOnAllMembersAlike() {
        let h = EngineHarness()
        h.start()
        h.fakes[1].mute = [writes]
        let before = h.write(0, block(1))
        h.take(5, "first")
        let behind = h.write(1 << 20, block(2))
        #expect(h.stored.layers == [one, two] && h.result(5) == nil)
        h.fakes[1].mute = []
        h.answerMuted(h.fakes[1])
        #expect(h.results[before] == .ok && h.results[behind] == .ok && h.result(5) == .ok)
        for fake in h.fakes {
            #expect(fake.layers[one]?[0]?.data == block(1) && fake.layers[two]?[0] == nil)
            #expect(fake.layers[two]?[256]?.data == block(2) && fake.layers[one]?[256] == nil)
        }
    }

    @Test func aWriteSentAgainAfterTheFreezeGoesWhereTheOthersHaveIt() {
        for mutation in [[], .snapshotWritesUnlayered] as [MutationSet] {
            let h = EngineHarness()
            h.core.mutations = mutation
            h.start()
            h.fakes[1].isDeaf = true
            let write = h.write(0, block(1))
            h.take(5, "first")
            let waiting = h.fakes[1].unheard
            #expect(waiting.map(\.header.kind) == [.write, .install])
            h.refuse(
                h.fakes[1], waiting[0].header, .staleEpoch, epoch: waiting[1].header.epoch)
            h.hear(h.fakes[1], from: 1)
            #expect(h.results[write] == .ok && h.result(5) == .ok)
            #expect(h.fakes[0].layers[one]?[0]?.data == block(1))
            let isEqual = h.fakes[1].layers[one]?[0]?.data == block(1)
            #expect(isEqual == mutation.isEmpty)
        }
    }

    @Test func itIsAnsweredWhenWhatItHoldsIsDurable() {
        for mutation in [[], .snapshotBeforeFlush] as [MutationSet] {
            let h = EngineHarness()
            h.core.mutations = mutation
            h.start()
            h.write(0, block(1))
            h.fakes[2].mute = [flushes]
            h.take(5, "first")
            #expect((h.result(5) == nil) == mutation.isEmpty)
            h.fakes[2].mute = []
            h.answerMuted(h.fakes[2])
            #expect(h.result(5) == .ok)
        }
    }

    @Test func noRequestOfAClientWaitsForTheStore() {
        let h = EngineHarness()
        h.start()
        h.isStoreDown = true
        h.take(5, "first")
        let write = h.write(0, block(1))
        let read = h.read(0, 4096)
        let flush = h.submit(.flush)
        #expect(h.results[write] == .ok && h.results[flush] == .ok)
        #expect(h.reads[read] == block(1) && h.result(5) == nil)
        h.isStoreDown = false
        h.pass(milliseconds: 300)
        #expect(h.result(5) == .ok && h.fakes[0].layers[one]?[0]?.data == block(1))
    }

    @Test func aMemberThatDiesBetweenTheRecordAndItsPromiseIsGoneWithoutWriters() {
        let h = EngineHarness()
        h.start()
        h.losesStoreReplies = true
        h.take(5, "first")
        #expect(h.stored.layers == [one, two])
        // The engine does not know yet: it writes to the old head.
        let write = h.write(0, block(1))
        h.kill(h.fakes[2])
        h.losesStoreReplies = false
        let late = h.write(1 << 20, block(2))
        #expect(h.results[write] == .ok && h.results[late] == nil && h.result(5) == nil)
        h.pass(milliseconds: 300)
        #expect(h.result(5) == .ok && h.results[late] == .ok && h.stored.inSync.count == 2)
        for fake in h.fakes.prefix(2) {
            #expect(fake.layers[one]?[0]?.data == block(1))
            #expect(fake.layers[one]?[256]?.data == block(2))
        }
        h.connect(h.fakes[2])
        h.pass(milliseconds: 5000)
        #expect(h.stored.inSync.count == 3)
        #expect(h.fakes[2].layers[one]?[256]?.data == block(2))
    }

    @Test func aNameThatIsThereIsAnsweredOnceItIsFinished() {
        let h = EngineHarness()
        h.stored.layers = [one, two]
        h.stored.snapshots = [.init(layer: one, name: "old", created: 1)]
        h.start()
        // Whoever took it may have died before the flush.
        h.fakes[0].mute = [flushes]
        h.take(5, "old")
        #expect(h.result(5) == nil)
        h.fakes[0].mute = []
        h.answerMuted(h.fakes[0])
        #expect(h.result(5) == .exists && h.snapshots[5]?.layer == one)
        h.take(6, "old")
        #expect(h.result(6) == .exists && h.stored.layers == [one, two])
    }

    @Test func whatTheRecordCannotHoldIsRefused() {
        let h = EngineHarness()
        func name(_ number: UInt32) -> String {
            String(repeating: "n", count: 50) + String(number)
        }
        var number: UInt32 = 1
        while h.stored.mayHold(snapshotNamed: name(number)) {
            h.stored.snapshots.append(
                .init(layer: h.stored.head, name: name(number), created: 1))
            number += 1
            h.stored.layers.append(LayerID(rawValue: number))
        }
        h.start()
        #expect(h.core.phase == .serving)
        h.take(5, name(number))
        #expect(h.result(5) == .tooMany)
        // What must never fail still fits: as many that leave as there may be, and an endpoint.
        var record = h.stored
        record.engineEndpoint = String(repeating: "e", count: 255)
        record.out = (0..<64).map {
            .init(
                member: .init(
                    replica: ReplicaID(rawValue: 100 + $0), incarnation: Incarnation(rawValue: 1)),
                leftEpoch: record.epoch, stablePoint: .zero)
        }
        #expect(VolumeRecord(decoding: record.encoded()) == record)
    }

    /// Members that have as many layers as they can would refuse the record, and the volume stand
    /// still: they are not asked.
    @Test func noLayerIsAddedThatAMemberWouldRefuse() {
        for full in [[0, 1, 2], [1]] {
            let h = EngineHarness()
            for fake in full { h.fakes[fake].layersMax = 2 }
            h.start()
            h.take(5, "first")
            #expect(h.result(5) == .ok)
            h.take(6, "second")
            h.run(.revert(token: 7, target: "first", kept: "kept", created: 7))
            #expect(h.result(6) == .tooManyLayers && h.result(7) == .tooManyLayers)
            let write = h.write(0, block(1))
            #expect(h.results[write] == .ok && h.stored.layers == [one, two])
            #expect(h.stored.inSync.count == 3 && h.core.phase == .serving)
            // A layer is merged, and the next answer says so.
            for fake in full { h.fakes[fake].layersMax = 3 }
            h.pass(milliseconds: 3000)
            h.take(8, "third")
            #expect(h.result(8) == .ok && h.stored.inSync.count == 3)
        }
    }

    @Test func aFewWaitForTheOneUnderWay() {
        let h = EngineHarness()
        h.start()
        h.isStoreDown = true
        for token in 0..<17 as Range<UInt64> { h.take(token, "s\(token == 16 ? 3 : token)") }
        #expect(h.snapshots.isEmpty)
        h.take(17, "late")
        #expect(h.result(17) == .notServing && h.snapshots.count == 1)
        h.isStoreDown = false
        h.pass(milliseconds: 5000)
        #expect((0..<16).allSatisfy { h.result($0) == .ok })
        #expect((0..<16).allSatisfy { h.snapshots[$0]?.layer.rawValue == UInt32($0) + 1 })
        #expect(h.result(16) == .exists && h.snapshots[16]?.layer.rawValue == 4)
        #expect(h.stored.layers.count == 17)
    }

    @Test func namesAreWords() {
        let longest = String(repeating: "a", count: 63)
        for name in ["a", "2024-01-01.daily_7", "_", longest] {
            #expect(VolumeRecord.isValidSnapshotName(name))
        }
        for name in ["", ".a", "-a", "a b", "a/b", "a:b", "a=b", "ä", "a\n", longest + "a"] {
            #expect(!VolumeRecord.isValidSnapshotName(name))
        }
    }

    /// Simulated by no seed: an Install makes files, and there may be no room for them.
    @Test func aMemberWithoutSpaceForANewLayerLeaves() {
        let h = EngineHarness()
        h.start()
        h.fakes[1].errors = [FrameKind.install.rawValue: .noSpace]
        h.take(5, "first")
        #expect(h.result(5) == .ok && h.stored.out.first?.reason == .full)
        #expect(h.core.phase == .serving && h.stored.inSync.count == 2)
    }

    @Test func noneIsBegunWhileNobodyHasSpace() {
        let h = EngineHarness()
        h.start()
        for fake in h.fakes { fake.errors = [writes: .noSpace] }
        h.write(0, block(1))
        h.take(5, "first")
        h.pass(milliseconds: 3000)
        #expect(h.result(5) == nil && h.stored.layers == [one])
        for fake in h.fakes { fake.errors = [:] }
        h.pass(milliseconds: 3000)
        #expect(h.result(5) == .ok && h.fakes[0].layers[one]?[0]?.data == block(1))
    }

    // MARK: stalls and ends

    @Test func itOutlivesAStall() {
        for isRecorded in [true, false] {
            let h = EngineHarness()
            h.start()
            h.write(0, block(1))
            for fake in h.fakes { fake.mute = [flushes] }
            h.isStoreDown = !isRecorded
            h.take(5, "first")
            for fake in h.fakes { h.kill(fake) }
            h.take(6, "second")
            h.isStoreDown = false
            h.pass(milliseconds: 300)
            #expect(h.core.phase == .stalled && h.result(5) == nil)
            h.take(7, "third")
            #expect(h.result(7) == .notServing)
            for fake in h.fakes {
                (fake.mute, fake.muted) = ([], [])
                h.connect(fake)
            }
            h.pass(milliseconds: 4000)
            #expect(h.result(5) == .ok && h.snapshots[5]?.layer == one)
            // Asked for while the stall was not known to be one, or refused.
            #expect(h.result(6) == (isRecorded ? .notServing : .ok))
            #expect(h.stored.snapshots.first?.name == "first")
        }
    }

    @Test func anEngineThatEndsSaysWhatItKnows() {
        let h = EngineHarness()
        h.start()
        h.isStoreDown = true
        h.take(5, "first")
        h.take(6, "second")
        h.stored.epoch = Epoch(99)
        h.stored.nonce = 4
        h.isStoreDown = false
        h.pass(milliseconds: 300)
        #expect(h.core.stopReason == .fenced)
        #expect(h.result(5) == .inDoubt && h.result(6) == .notServing)
        h.take(7, "third")
        #expect(h.result(7) == .notServing)
    }

    @Test func aDetachWaitsForTheOneUnderWayOnly() {
        let h = EngineHarness()
        h.start()
        for fake in h.fakes { fake.mute = [flushes] }
        h.take(5, "first")
        h.take(6, "second")
        h.run(.detach)
        #expect(h.result(6) == .notServing && h.result(5) == nil)
        h.take(7, "third")
        #expect(h.result(7) == .notServing && h.core.phase == .serving)
        for fake in h.fakes { fake.mute = [] }
        for fake in h.fakes { h.answerMuted(fake) }
        h.pass(milliseconds: 500)
        #expect(h.result(5) == .ok && h.core.stopReason == .detached && h.stored.isClean)
    }

    @Test func belowTheLeastNumberOfMembersItWaitsAsWritesDo() {
        let h = EngineHarness(replicas: 2) { $0.minInSync = 2 }
        h.start()
        h.kill(h.fakes[1])
        h.pass(milliseconds: 500)
        h.take(5, "first")
        h.pass(milliseconds: 6000)
        #expect(h.stored.layers == [one, two] && h.result(5) == nil)
        let before = h.core.stablePoint
        h.write(0, block(1))
        h.pass(milliseconds: 6000)
        #expect(h.core.stablePoint > before)
        h.connect(h.fakes[1])
        h.pass(milliseconds: 3000)
        #expect(h.result(5) == .ok && h.stored.inSync.count == 2)
    }

    /// What no member has space for is sent again, to the head there is then; what the attempt left
    /// in the frozen layer is made equal before the snapshot counts.
    @Test func aWriteHeldForSpaceOverTheFreezeLeavesTheFrozenLayerEqual() {
        let h = EngineHarness()
        h.start()
        for fake in h.fakes {
            fake.errors = [writes: .noSpace]
            fake.mute = [writes]
        }
        let write = h.write(0, block(1))
        h.fakes[2].put(0, block(1), in: one)
        h.take(5, "first")
        #expect(h.stored.layers == [one, two] && h.result(5) == nil)
        for fake in h.fakes { fake.mute = [] }
        for fake in h.fakes { h.answerMuted(fake) }
        #expect(h.result(5) == .ok && h.results[write] == nil)
        let isEqual = h.fakes.allSatisfy {
            $0.layers[one]?[0]?.entry.state != .data
        }
        #expect(isEqual)
        for fake in h.fakes { fake.errors = [:] }
        h.pass(milliseconds: 1500)
        #expect(h.results[write] == .ok)
        #expect(h.fakes.allSatisfy { $0.layers[two]?[0]?.data == block(1) })
    }
}
