import Testing

@testable import HapteraCore

/// What neither the simulator nor the other suites arrange: missing members, stuck requests, blocks
/// that cannot be read.
@Suite struct EngineEndgameTests {
    private func block(_ byte: UInt8) -> [UInt8] { [UInt8](repeating: byte, count: 4096) }
    private func write(
        _ h: EngineHarness, _ offset: UInt64, _ byte: UInt8, session: UInt32
    ) -> UInt64 {
        guard let buffer = h.pool.allocate(4096) else { preconditionFailure("pool") }
        h.pool.memory(buffer).copy(from: block(byte))
        return h.submit(.write, offset, 4096, buffer, session: session)
    }

    @Test func writesHeldForWantOfMembersDoNotKeepOneFromReturning() {
        let h = EngineHarness(replicas: 2) { $0.minInSync = 2 }
        h.start()
        h.write(1 << 20, block(1))
        h.fakes[1].mute = [FrameKind.write.rawValue]
        let first = h.write(0, block(2))
        h.kill(h.fakes[1])
        #expect(h.stored.inSync.count == 1)
        h.fakes[1].mute = []
        let second = h.write(0, block(3))
        let third = h.write(1 << 20, block(4))
        let read = h.read(0, 4096)
        for _ in 0..<60 {
            if h.core.replicas[h.slot(h.fakes[1])].link == .down { h.connect(h.fakes[1]) }
            h.pass(milliseconds: 1000)
        }
        #expect(h.stored.inSync.count == 2)
        #expect(h.results[first] == .ok && h.results[second] == .ok && h.results[third] == .ok)
        let isRead = h.reads[read] == block(3)
        #expect(isRead)
        let isThere = h.fakes[1].blocks[0]?.data == block(3)
        #expect(isThere)
    }

    /// A write that every member there is had done kept its range after its time-out, and so kept
    /// the member it lacked from being filled (simulator seed 77).
    @Test func writesTimedOutForWantOfMembersLetGo() {
        let h = EngineHarness(replicas: 2) {
            $0.minInSync = 2
            $0.ioTimeoutMilliseconds = 500
        }
        h.start()
        h.kill(h.fakes[1])
        let late = write(h, 0, 1, session: 1)
        h.pass(milliseconds: 1000)
        #expect(h.results[late] == .ioError)
        for _ in 0..<20 {
            if h.core.replicas[h.slot(h.fakes[1])].link == .down { h.connect(h.fakes[1]) }
            h.pass(milliseconds: 1000)
        }
        #expect(h.stored.inSync.count == 2)
    }

    /// Seed 1302205: flushes that had timed out waited for the missing member for ever. They kept
    /// the volume attached, and all were sent to the member when it was back.
    @Test(arguments: [false, true])
    func flushesTimedOutForWantOfMembersAreOver(isBack: Bool) {
        let h = EngineHarness(replicas: 2) {
            $0.minInSync = 2
            $0.ioTimeoutMilliseconds = 500
        }
        h.start()
        h.kill(h.fakes[1])
        for _ in 0..<20 {
            let flush = h.submit(.flush)
            h.pass(milliseconds: 600)
            #expect(h.results[flush] == .ioError)
        }
        guard isBack else { return detach(h) }
        h.fakes[1].seen = []
        for _ in 0..<20 {
            if h.core.replicas[h.slot(h.fakes[1])].link == .down { h.connect(h.fakes[1]) }
            h.pass(milliseconds: 1000)
        }
        #expect(h.stored.inSync.count == 2)
        #expect(h.fakes[1].seen.count { $0 == .flush } < 10)
    }
    private func detach(_ h: EngineHarness) {
        h.run(.detach)
        h.pass(milliseconds: 10_000)
        #expect(h.core.stopReason == .detached && h.stored.isClean)
    }

    /// A whole cluster is told to end: the engine once said that the volume was detached, though
    /// nobody was left to flush, and the record did not say so.
    @Test(arguments: [false, true]) func leavingWithoutMembersIsNoDetach(isStalled: Bool) {
        let h = EngineHarness(replicas: 2)
        h.start()
        h.write(0, [UInt8](repeating: 1, count: 4096))
        if !isStalled {
            for fake in h.fakes { fake.mute = [FrameKind.flush.rawValue] }
            h.run(.detach)
        }
        for fake in h.fakes { h.kill(fake) }
        if isStalled { h.run(.detach) }
        h.pass(milliseconds: 500)
        #expect(h.core.stopReason == .left && !h.stored.isClean)
        #expect(StopReason.standing(in: h.core.stopText, against: h.stored) == nil)
    }

    /// Whoever is told to leave before it has taken the volume over leaves the record as it is.
    @Test(arguments: [false, true]) func leavingBeforeTheClaimChangesNothing(isClean: Bool) {
        let h = EngineHarness(replicas: 2)
        h.stored.isClean = isClean
        for fake in h.fakes { fake.isUp = false }
        let before = h.stored
        h.start()
        h.run(.detach)
        #expect(h.core.stopReason == (isClean ? .detached : .left) && h.stored == before)
    }

    /// What a client that is gone had asked for waits for no member.
    @Test func theDeadWaitForNoMember() {
        let h = EngineHarness(replicas: 2) { $0.minInSync = 2 }
        h.start()
        h.kill(h.fakes[1])
        let late = write(h, 0, 1, session: 1)
        let flush = h.submit(.flush, session: 1)
        h.pass(milliseconds: 4000)
        #expect(h.results[late] == nil && h.results[flush] == nil)
        h.run(.cancel(session: 1))
        h.pass(milliseconds: 1000)
        #expect(h.results[late] == .ioError && h.results[flush] == .cancelled)
        detach(h)
    }

    @Test func theStablePointMovesWhileMembersAreMissing() {
        let h = EngineHarness(replicas: 2) { $0.minInSync = 2 }
        h.start()
        h.write(0, block(1))
        h.kill(h.fakes[1])
        let before = h.core.stablePoint
        h.pass(milliseconds: 12_000)
        #expect(h.core.stablePoint > before)
    }

    /// A client's flush takes the place of the engine's own. When it had timed out, or its client
    /// was gone, nobody flushed any more until something was written: acknowledged writes stayed
    /// unflushed, logs full, deleted layers where they were (seed 2536763).
    @Test(arguments: [false, true])
    func aFlushGivenUpIsMadeUpFor(isCancelled: Bool) {
        let h = EngineHarness(replicas: 2) {
            $0.minInSync = 2
            if !isCancelled { $0.ioTimeoutMilliseconds = 500 }
        }
        h.start()
        h.write(0, block(1))
        h.kill(h.fakes[1])
        let before = h.core.stablePoint
        let flush = h.submit(.flush, session: 1)
        #expect(h.core.flushDueAt == nil)
        if isCancelled { h.run(.cancel(session: 1)) }
        h.pass(milliseconds: 600)
        #expect(h.results[flush] == (isCancelled ? .cancelled : .ioError))
        h.pass(milliseconds: 12_000)
        #expect(h.core.stablePoint > before)
    }

    @Test func aWriteOfTheDeadDoesNotWaitForSpace() {
        let h = EngineHarness()
        h.start()
        for fake in h.fakes {
            fake.errors = [FrameKind.write.rawValue: .noSpace]
            fake.mute = [FrameKind.write.rawValue]
        }
        let dead = write(h, 0, 1, session: 7)
        h.run(.cancel(session: 7))
        #expect(h.results[dead] == nil)
        for fake in h.fakes { fake.mute = [] }
        for fake in h.fakes { h.answerMuted(fake) }
        h.pass(milliseconds: 5000)
        #expect(h.results[dead] == .cancelled)
    }

    @Test func whatAFlushPassedIsNotStable() {
        let h = EngineHarness(replicas: 2) { $0.removalDeadlineMilliseconds = 60_000 }
        h.start()
        for fake in h.fakes {
            fake.mute = [FrameKind.write.rawValue, FrameKind.flush.rawValue]
        }
        let write = h.write(1 << 20, block(1))
        let flush = h.submit(.flush)
        for index in h.fakes[1].muted.indices where h.fakes[1].muted[index].kind == .write {
            h.fakes[1].muted[index].auxiliary = MutationReply.wasParked
        }
        for fake in h.fakes { fake.mute = [] }
        for fake in h.fakes { h.answerMuted(fake) }
        #expect(h.results[write] == .ok && h.results[flush] == .ok)
        for fake in h.fakes { h.kill(fake) }
        for fake in h.fakes {
            fake.isRebooted = true
            fake.blocks = [:]
            fake.active = [1]
            h.connect(fake)
        }
        h.pass(milliseconds: 5000)
        #expect(h.core.isRefusing)
    }

    @Test func aLateReplyStillHasItsPlace() {
        let h = EngineHarness()
        h.start()
        h.write(0, block(1))
        for _ in 0..<64 { h.read(0, 4096) }
        h.fakes[0].delayMilliseconds = 1000
        for _ in 0..<3 { h.read(0, 4096) }
        h.pass(milliseconds: 200)
        #expect(h.core.hedgedReads == 1)
        var found = 0
        for index in 0..<h.core.slotsUsed where h.core.slots[index].use == .client {
            var header = FrameHeader(kind: .read)
            header.tag = h.core.tag(index)
            header.length = 4096
            var reply = header.reply(.ok, epoch: h.core.epoch)
            reply.dataLength = 4096
            found += 1
            #expect(h.core.readTarget(reply, from: Int(h.core.slots[index].source)) != nil)
        }
        #expect(found == 1)
    }

    @Test func aReplicaThatStopsInOrderBreaksNoProtocol() {
        let h = EngineHarness()
        h.start()
        for fake in h.fakes.prefix(2) { fake.errors = [FrameKind.read.rawValue: .unavailable] }
        let read = h.read(0, 4096)
        #expect(h.results[read] == .ok)
        #expect(h.stored.out.allSatisfy { $0.reason == .disconnected })
    }

    /// Seed 1007653: it rebooted, its clients are new, and before anything was settled its
    /// connection broke. A process that lives has lost nothing since; another one may have.
    @Test(arguments: [false, true])
    func whatWasAcceptedIsNotAskedAgain(isRestarted: Bool) {
        let h = EngineHarness(replicas: 1, generation: 2)
        h.stored.isClean = false
        h.stored.clientGeneration = 1
        h.fakes[0].isRebooted = true
        h.fakes[0].active = [0]
        h.fakes[0].mute = [FrameKind.digest.rawValue]
        h.start()
        #expect(h.core.phase == .serving && !h.core.isRefusing)
        h.kill(h.fakes[0])
        h.pass(milliseconds: 1000)
        if isRestarted { h.fakes[0].process = 8 }
        h.connect(h.fakes[0])
        h.pass(milliseconds: 1000)
        #expect(h.core.isRefusing == isRestarted)
        #expect((h.core.phase == .serving) != isRestarted)
    }

    /// The only member has a block that cannot be read.
    @Test func anUnreadableBlockIsNoLostVolume() {
        let h = EngineHarness(replicas: 1)
        h.stored.isClean = false
        h.fakes[0].blocks[3] = (BlockEntry(state: .data, checksum: 77), block(9))
        h.fakes[0].active = [0]
        h.fakes[0].errors = [FrameKind.adopt.rawValue: .ioError]
        h.start()
        for _ in 0..<20 {
            if h.core.replicas[h.slot(h.fakes[0])].link == .down { h.connect(h.fakes[0]) }
            h.pass(milliseconds: 1000)
        }
        #expect(h.core.phase == .serving && h.core.unresolvedCount == 0)
        #expect(h.results[h.write(0, block(1))] == .ok)
    }

    /// Nor may bytes that an older intact copy is there for be passed over.
    @Test func anIntactOlderCopyIsNotLetThrough() {
        let h = EngineHarness(replicas: 2)
        h.stored.isClean = false
        h.stored.clientGeneration = 1
        h.fakes[0].blocks[3] = (BlockEntry(state: .data, checksum: 77), block(9))
        let older = block(8)
        h.fakes[1].blocks[3] = (BlockEntry(state: .data, checksum: checksum(of: older)), older)
        h.fakes[1].isRebooted = true
        h.fakes[0].active = [0]
        h.fakes[0].errors = [FrameKind.adopt.rawValue: .ioError]
        h.start()
        let read = h.read(3 * 4096, 4096)
        for _ in 0..<20 {
            for fake in h.fakes where h.core.replicas[h.slot(fake)].link == .down {
                h.connect(fake)
            }
            h.pass(milliseconds: 1000)
        }
        #expect(h.results[read] == nil)
    }

    @Test func anUnreadableBlockDoesNotStallAVolumeThatIsFilled() {
        let h = EngineHarness(replicas: 2, members: 1)
        let data = block(9)
        h.fakes[0].blocks[3] = (BlockEntry(state: .data, checksum: checksum(of: data)), data)
        h.fakes[0].errors = [FrameKind.read.rawValue: .ioError]
        h.start()
        for _ in 0..<20 {
            for fake in h.fakes where h.core.replicas[h.slot(fake)].link == .down {
                h.connect(fake)
            }
            h.pass(milliseconds: 1000)
        }
        let stalls = h.notes.count { if case .stalled = $0 { true } else { false } }
        #expect(stalls == 0)
    }

    @Test func aRequestThatIsStuckAmongAnswersFailsItsReplica() {
        let h = EngineHarness()
        h.start()
        h.fakes[1].mute = [FrameKind.write.rawValue]
        let stuck = h.write(0, block(1))
        h.fakes[1].mute = []
        for _ in 0..<600 {
            h.write(1 << 20, block(2))
            h.pass(milliseconds: 100)
        }
        #expect(h.results[stuck] == .ok)
    }
}
