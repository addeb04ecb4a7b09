import Testing

@testable import HapteraCore

@Suite struct EngineCoreTests {
    private func block(_ byte: UInt8, count: Int = 4096) -> [UInt8] {
        [UInt8](repeating: byte, count: count)
    }

    @Test func servesAfterEveryMemberPromised() {
        let h = EngineHarness()
        h.start()
        #expect(h.core.phase == .serving)
        #expect(h.stored.epoch == Epoch(2))
        #expect(h.stored.engine == InstanceID(rawValue: 99))
        #expect(!h.stored.isClean)
        #expect(h.fakes.allSatisfy { $0.promise == Epoch(2) })
    }

    @Test func writeReachesEveryMemberBeforeItIsAcknowledged() {
        let h = EngineHarness()
        h.start()
        h.fakes[2].mute = [FrameKind.write.rawValue]
        let id = h.write(8192, block(7))
        #expect(h.results[id] == nil)
        #expect(h.fakes.allSatisfy { $0.blocks[2]?.data == block(7) })
        let other = h.read(0, 4096)
        #expect(h.reads[other] == block(0))
    }

    @Test func partialBlocksAreCompletedFromVerifiedData() {
        let h = EngineHarness()
        h.start()
        h.write(0, block(1, count: 12288))
        let id = h.write(4000, block(2, count: 5000))
        #expect(h.results[id] == .ok)
        let read = h.read(0, 12288)
        let expected = block(1, count: 4000) + block(2, count: 5000) + block(1, count: 3288)
        #expect(h.reads[read] == expected)
        #expect(h.core.actions.isEmpty)
    }

    @Test func unalignedZeroesChangeExactlyTheirRange() {
        let h = EngineHarness()
        h.start()
        h.write(0, block(1, count: 8192))
        #expect(h.results[h.submit(.writeZeroes, 100, 5000)] == .ok)
        let read = h.read(0, 8192)
        #expect(
            h.reads[read] == block(1, count: 100) + block(0, count: 5000) + block(1, count: 3092))
        #expect(h.results[h.submit(.trim, 100, 8000)] == .ok)
        #expect(h.fakes[0].entry(1).state == .data, "no whole block was inside the trim")
        #expect(h.results[h.submit(.trim, 0, 8192)] == .ok)
        #expect(h.fakes[0].entry(1).state == .zero)
        #expect(h.pool.inUse == h.core.ownBuffers)
    }

    /// D: the client hears of the write only when the removal is recorded and installed.
    @Test func lostMemberLeavesTheInSyncSetBeforeTheAcknowledgement() {
        let h = EngineHarness()
        h.start()
        h.fakes[2].mute = [FrameKind.write.rawValue]
        let id = h.write(0, block(3))
        h.isStoreDown = true
        h.kill(h.fakes[2])
        #expect(h.results[id] == nil)
        h.pass(milliseconds: 1000)
        #expect(h.results[id] == nil, "the store has not recorded the removal")
        h.fakes[1].mute = [FrameKind.install.rawValue]
        h.isStoreDown = false
        h.pass(milliseconds: 500)
        #expect(h.stored.inSync.count == 2)
        #expect(h.results[id] == nil, "a survivor has not installed the removal")
        h.fakes[1].mute = []
        h.kill(h.fakes[1])
        h.pass(milliseconds: 500)
        #expect(h.results[id] == .ok)
        #expect(h.stored.inSync == [h.fakes[0].member])
        #expect(h.stored.out.count == 2)
    }

    @Test func anUnansweredSwapIsRepeatedUntilItsOutcomeIsKnown() {
        let h = EngineHarness()
        h.start()
        h.losesStoreReplies = true
        h.kill(h.fakes[0])
        let epoch = h.stored.epoch
        h.pass(milliseconds: 1000)
        #expect(h.stored.epoch == epoch, "repeating the change does not apply it twice")
        h.losesStoreReplies = false
        h.pass(milliseconds: 500)
        #expect(h.results[h.write(0, block(1))] == .ok)
        #expect(h.core.record == h.stored)
    }

    @Test func silentMemberIsRemovedAfterItsDeadline() {
        let h = EngineHarness()
        h.start()
        h.fakes[1].mute = [FrameKind.write.rawValue, FrameKind.ping.rawValue]
        let id = h.write(0, block(1))
        h.pass(milliseconds: 2900)
        #expect(h.results[id] == nil)
        h.pass(milliseconds: 300)
        #expect(h.results[id] == .ok)
        #expect(!h.stored.inSync.contains(h.fakes[1].member))
    }

    @Test func damagedBlockIsReadFromAnotherMember() {
        let h = EngineHarness()
        h.start()
        h.write(0, block(5))
        for fake in h.fakes.dropLast() { fake.blocks[0]?.data = block(6) }
        for _ in 0..<4 { #expect(h.reads[h.read(0, 4096)] == block(5)) }
        #expect(h.fakes.allSatisfy { $0.blocks[0]?.data == block(5) }, "repaired in place")
        #expect(h.core.blocksRepaired > 0)
        for fake in h.fakes { fake.blocks[0]?.data = block(6) }
        #expect(h.results[h.read(0, 4096)] == .ioError, "no copy is intact")
        #expect(h.results[h.read(4096, 4096)] == .ok)
        #expect(h.results[h.write(0, block(7))] == .ok, "a write makes it good")
        #expect(h.reads[h.read(0, 4096)] == block(7))
    }

    @Test func returningReplicaIsFilledAndPromoted() {
        let h = EngineHarness()
        h.start()
        h.write(0, block(1, count: 8192))
        h.kill(h.fakes[1])
        h.write(4096, block(2))
        h.submit(.trim, 0, 4096)
        h.write(2 << 20, block(9))
        h.fakes[1].blocks[700] = (
            BlockEntry(state: .data, checksum: checksum(of: block(4))), block(4)
        )
        h.connect(h.fakes[1])
        h.pass(milliseconds: 2000)
        #expect(h.stored.inSync.count == 3)
        #expect(h.stored.joining == nil && h.stored.out.isEmpty)
        for index in [0, 1, 512, 700] as [UInt64] {
            #expect(h.fakes[1].lowestEntry(index) == h.fakes[0].lowestEntry(index))
        }
        h.fakes[1].mute = [FrameKind.write.rawValue]
        #expect(h.results[h.write(0, block(3))] == nil, "its reply counts again")
    }

    /// A rebuild once took a round trip for every block that differed: 16 s for 166 MiB of random
    /// writes. Exactly what differs is sent, and nothing waits for the answer to another block.
    @Test func scatteredDifferencesAreCopiedAtOnce() {
        let h = EngineHarness(replicas: 2)
        h.start()
        h.write(0, block(1, count: 65536))
        h.submit(.trim, 40960, 4096)
        h.kill(h.fakes[1])
        for index in [0, 3, 7, 9, 12] as [UInt64] { h.write(index * 4096, block(2)) }
        h.fakes[1].seen = []
        h.fakes[1].mute = [FrameKind.write.rawValue]
        h.connect(h.fakes[1])
        h.pass(milliseconds: 2000)
        #expect(h.fakes[1].seen.filter { $0 == .write }.count == 5)
        h.fakes[1].mute = []
        h.kill(h.fakes[1])
        h.connect(h.fakes[1])
        h.pass(milliseconds: 3000)
        #expect(h.stored.inSync.count == 2)
        for index in 0..<16 as Range<UInt64> {
            #expect(h.fakes[1].lowestEntry(index) == h.fakes[0].lowestEntry(index))
        }
    }

    /// A region the joiner holds nothing of is fetched and written, not compared.
    @Test func emptyJoinerIsFilledWithoutDigests() {
        let h = EngineHarness(replicas: 2, members: 1)
        for index in 0..<16 as Range<UInt64> {
            h.fakes[0].blocks[index] = (
                BlockEntry(state: .data, checksum: checksum(of: block(4))), block(4)
            )
        }
        h.fakes[0].blocks[20] = (BlockEntry(state: .zero), [])
        h.start()
        h.pass(milliseconds: 2000)
        #expect(h.stored.inSync.count == 2)
        #expect(!h.fakes[1].seen.contains(.digest))
        #expect(h.fakes[1].seen.filter { $0 == .write }.count == 1)
        for index in 0..<256 as Range<UInt64> {
            #expect(h.fakes[1].lowestEntry(index) == h.fakes[0].lowestEntry(index))
        }
    }

    /// The joiner's flush is a condition of its promotion.
    @Test func unflushedJoinerIsNotPromoted() {
        let h = EngineHarness(replicas: 2, members: 1)
        h.write(0, block(1))
        h.fakes[1].mute = [FrameKind.flush.rawValue]
        h.start()
        h.pass(milliseconds: 1000)
        #expect(h.stored.inSync.count == 1)
        #expect(h.fakes[1].entry(0).state == .data)
        #expect(h.results[h.write(4096, block(2))] == .ok)
    }

    @Test func everyMemberGoneStallsAndTakesOverAgain() {
        let h = EngineHarness(replicas: 2)
        h.start()
        h.fakes[0].mute = [FrameKind.write.rawValue]
        h.fakes[1].mute = [FrameKind.write.rawValue]
        let id = h.write(0, block(8))
        h.isStoreDown = true
        h.kill(h.fakes[0])
        h.kill(h.fakes[1])
        h.isStoreDown = false
        h.pass(milliseconds: 1000)
        #expect(h.core.phase == .stalled)
        #expect(!h.stored.inSync.isEmpty)
        for fake in h.fakes {
            fake.mute = []
            fake.active = [0]
        }
        h.fakes[1].blocks[0] = nil
        h.connect(h.fakes[1])
        h.connect(h.fakes[0])
        h.pass(milliseconds: 8000)
        #expect(h.core.phase == .serving)
        #expect(h.results[id] == .ok)
        #expect(h.reads[h.read(0, 4096)] == block(8))
        #expect(h.fakes[0].entry(0) == h.fakes[1].entry(0))
    }

    @Test func takeoverMakesActiveRegionsEqual() {
        let h = EngineHarness(generation: 0)
        h.stored.isClean = false
        let old = BlockEntry(state: .data, checksum: checksum(of: block(1)))
        let new = BlockEntry(state: .data, checksum: checksum(of: block(2)))
        h.fakes[0].blocks[3] = (old, block(1))
        h.fakes[1].blocks[3] = (new, block(2))
        h.fakes[1].active = [0]
        h.fakes[2].blocks[3] = (old, block(2))  // doubtful: data and entry do not match
        h.start()
        #expect(h.core.unresolvedCount == 0)
        let values = Set(h.fakes.map { $0.blocks[3]?.data.first })
        #expect(values.count == 1)
        #expect(h.reads[h.read(3 * 4096, 4096)]?.first == values.first ?? nil)
        #expect(h.core.stablePoint > .zero)
    }

    @Test func rebootedMemberIsNotTheSource() {
        let h = EngineHarness(generation: 0)
        h.stored.isClean = false
        h.fakes[0].isRebooted = true
        h.fakes[0].active = [0]
        for fake in h.fakes.dropFirst() {
            fake.blocks[3] = (
                BlockEntry(state: .data, checksum: checksum(of: block(2))), block(2)
            )
        }
        h.start()
        #expect(h.fakes[0].blocks[3]?.data == block(2))
    }

    @Test func onlyRebootedMembersAndASurvivingClientIsRefused() {
        let h = EngineHarness(generation: 0)
        h.stored.isClean = false
        for fake in h.fakes { fake.isRebooted = true }
        h.start()
        h.pass(milliseconds: 5000)
        #expect(h.core.phase == .installing && h.core.isRefusing)
    }

    @Test func anotherEngineStopsThisOne() {
        let h = EngineHarness()
        h.start()
        h.stored.epoch = Epoch(3)
        h.stored.engine = InstanceID(rawValue: 100)
        for fake in h.fakes { fake.promise = Epoch(3) }
        let id = h.write(0, block(1))
        #expect(h.core.phase == .stopped && h.core.stopReason == .fenced)
        #expect(h.results[id] == .shuttingDown)
    }

    @Test func replicaWithALaterPromiseThanTheStoreStopsTheEngine() {
        let h = EngineHarness()
        h.fakes[1].promise = Epoch(9)
        h.start()
        #expect(h.core.stopReason == .recordOlderThanReplica)
    }

    /// A store restored from an old copy has come to the epoch that the replicas promised, with
    /// another record. (`sameEpochIsSameRecord`: it is served.)
    @Test func anotherRecordOfThePromisedEpochStopsTheEngine() {
        for (isCareless, isOther) in [(false, true), (false, false), (true, true)] {
            let h = EngineHarness()
            if isCareless { h.core.mutations = .sameEpochIsSameRecord }
            h.fakes[1].promise = h.stored.epoch
            h.fakes[1].installed = h.stored
            if isOther { h.fakes[1].installed?.nonce += 1 }
            let before = h.stored
            h.start()
            if isOther, !isCareless {
                #expect(h.core.stopReason == .recordOlderThanReplica && h.stored == before)
            } else {
                #expect(h.core.phase == .serving)
            }
        }
    }

    /// A restored store agrees with every claim: engines that claim and stop, one after the other,
    /// would pass the promises in the end.
    @Test(arguments: [2, 3]) func nothingIsClaimedBeforeTheReplicasWereHeard(members: Int) {
        let h = EngineHarness(members: members)
        h.fakes[2].promise = Epoch(9)
        h.fakes[2].isUp = false
        let before = h.stored
        h.start()
        h.pass(milliseconds: 200)
        #expect(h.core.phase == .hearing && h.stored == before)
        h.connect(h.fakes[2])
        #expect(h.core.stopReason == .recordOlderThanReplica && h.stored == before)
    }

    @Test func whoDoesNotAnswerCostsNoMoreThanItsTime() {
        let absent = EngineHarness(members: 2)
        absent.fakes[2].isUp = false
        absent.start()
        absent.pass(milliseconds: 300)
        #expect(absent.core.phase == .serving)
        let lost = EngineHarness()
        lost.fakes[2].isUp = false
        lost.start()
        lost.pass(milliseconds: 2900)
        #expect(lost.core.phase == .hearing)
        lost.pass(milliseconds: 200)
        #expect(lost.core.phase == .serving && lost.stored.inSync.count == 2)
    }

    @Test func whoLeftLongAgoIsForgotten() {
        let h = EngineHarness()
        h.stored.out = (1...40).map {
            VolumeRecord.Departure(
                member: .init(
                    replica: ReplicaID(rawValue: 1000 + $0), incarnation: .init(rawValue: 1)),
                leftEpoch: Epoch(1), stablePoint: .zero)
        }
        h.stored.out[0].isKept = true
        h.start()
        #expect(h.core.phase == .serving && h.stored.out.count == 16)
        #expect(h.stored.out[0].isKept && h.stored.out.last?.member.replica.rawValue == 1040)
    }

    @Test func failedFlushRemovesTheReplica() {
        let h = EngineHarness()
        h.start()
        h.write(0, block(1))
        h.fakes[0].errors = [FrameKind.flush.rawValue: .ioError]
        #expect(h.results[h.submit(.flush)] == .ok)
        #expect(!h.stored.inSync.contains(h.fakes[0].member))
    }

    @Test func detachLeavesACleanRecord() {
        let h = EngineHarness()
        h.start()
        h.write(0, block(1))
        h.run(.detach)
        h.pass(milliseconds: 500)
        #expect(h.core.stopReason == .detached)
        #expect(h.stored.isClean && h.stored.engine == .none)
        #expect(h.fakes.allSatisfy { $0.promise == h.stored.epoch })
        #expect(h.pool.inUse == h.core.ownBuffers)
    }

    @Test func overlappingWritesRunOneAfterTheOther() {
        let h = EngineHarness(replicas: 1)
        h.start()
        h.fakes[0].mute = [FrameKind.write.rawValue]
        h.write(0, block(1, count: 8192))
        h.write(4096, block(2, count: 8192))
        h.read(8192, 4096)
        let elsewhere = h.read(65536, 4096)
        #expect(h.fakes[0].seen.filter { $0 == .write }.count == 1)
        #expect(h.results[elsewhere] == .ok)
    }
}
