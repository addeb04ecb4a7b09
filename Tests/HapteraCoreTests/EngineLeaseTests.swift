import Testing

@testable import HapteraCore

/// Rule L, and what becomes of operations whose client is gone.
@Suite struct EngineLeaseTests {
    private let one = [UInt8](repeating: 1, count: 4096)

    /// An engine's clock may be slower than a replica's: it stops a 64th of a lease before the end.
    @Test func aLeaseIsNotCountedToItsEnd() {
        let h = EngineHarness()
        #expect(h.core.countedLease(640) == 630_000_000)
        h.core.mutations = .noLeaseMargin
        #expect(h.core.countedLease(640) == 640_000_000)
    }

    /// A read served by one member needs the lease of the others: they may have been taken over.
    /// (`noLeaseCheck`: it is answered without.)
    @Test func readsWaitForTheLeaseOfEveryMember() {
        let careless = EngineHarness()
        careless.core.mutations = .noLeaseCheck
        #expect(readWithoutLeases(careless) == .ok)
        let h = EngineHarness()
        #expect(readWithoutLeases(h) == nil)
        h.write(4096, one)
        #expect(h.results.values.allSatisfy { $0 == .ok }, "the replies renewed the leases")
    }
    private func readWithoutLeases(_ h: EngineHarness) -> OperationResult? {
        h.start()
        h.write(0, one)
        for fake in h.fakes.dropFirst() { fake.mute = [FrameKind.ping.rawValue] }
        h.pass(milliseconds: 400)
        let early = h.read(0, 4096)
        #expect(h.results[early] == .ok)
        h.pass(milliseconds: 200)
        #expect(!h.core.isLeased(at: h.now))
        return h.results[h.read(0, 4096)]
    }

    @Test func whatIsReadyWithoutALeaseIsHeldAndThenAnswered() {
        let h = EngineHarness()
        h.start()
        h.write(0, one)
        let silent = h.fakes[2]
        silent.mute = [FrameKind.ping.rawValue, FrameKind.read.rawValue]
        h.pass(milliseconds: 600)
        var held: [UInt64] = []
        // Whoever is asked, the others' answers are there and may not be told.
        for _ in 0..<3 { held.append(h.read(0, 4096)) }
        #expect(held.allSatisfy { h.results[$0] == nil })
        // The same range is locked meanwhile.
        let over = h.write(0, [UInt8](repeating: 2, count: 4096))
        #expect(h.results[over] == nil)
        // D: removed after its deadline, and everything is answered.
        h.pass(milliseconds: 3200)
        #expect(h.stored.inSync.count == 2)
        #expect(held.allSatisfy { h.reads[$0] == one })
        #expect(h.results[over] == .ok)
        #expect(h.pool.inUse == h.core.ownBuffers)
    }

    /// Pings keep an idle volume's leases, and those of a member that gets no requests.
    @Test func idleMembersAreAskedForASignOfLife() {
        let h = EngineHarness()
        h.start()
        for _ in 0..<20 {
            h.pass(milliseconds: 100)
            #expect(h.core.isLeased(at: h.now))
        }
        let pings = h.fakes[1].seen.count { $0 == .ping }
        #expect((5...20).contains(pings))
    }

    @Test func aTakeoverWaitsForTheLeasesBefore() {
        let h = EngineHarness()
        h.stored.isClean = false
        h.stored.engine = InstanceID(rawValue: 42)
        h.fakes[1].leaseRemaining = 450
        h.start()
        #expect(h.core.phase == .serving)
        let read = h.read(0, 4096)
        let write = h.write(0, one)
        h.pass(milliseconds: 400)
        #expect(h.results[read] == nil && h.results[write] == nil)
        h.pass(milliseconds: 100)
        #expect(h.results[read] == .ok && h.results[write] == .ok)
    }

    @Test func nobodyWaitsForAnEngineThatLeftInOrder() {
        let h = EngineHarness()
        h.fakes[1].leaseRemaining = 450
        h.start()
        #expect(h.results[h.read(0, 4096)] == .ok)
    }

    /// Between the request to mark the volume clean and its answer nothing is served: whoever
    /// reads that record waits for no lease.
    @Test func nothingIsServedOnceTheVolumeIsBeingMarkedClean() {
        let h = EngineHarness()
        h.start()
        h.write(0, one)
        h.losesStoreReplies = true
        h.run(.detach)
        #expect(h.stored.isClean)
        let read = h.read(0, 4096)
        let write = h.write(0, [UInt8](repeating: 2, count: 4096))
        #expect(h.results[read] == nil && h.results[write] == nil)
        #expect(h.fakes[0].blocks[0]?.data == one)
        h.losesStoreReplies = false
        h.pass(milliseconds: 500)
        #expect(h.core.stopReason == .detached)
        #expect(h.results[read] == .shuttingDown && h.results[write] == .shuttingDown)
    }

    // MARK: - Sessions

    @Test func cancelledBeforeTheVolumeIsServed() {
        let h = EngineHarness()
        let id = h.read(0, 4096, session: 7)
        let other = h.read(0, 4096, session: 8)
        h.run(.cancel(session: 7))
        #expect(h.results[id] == .cancelled)
        h.start()
        #expect(h.results[other] == .ok)
        #expect(h.pool.inUse == h.core.ownBuffers)
    }

    /// In flight when its client died, held when the last member went: released, not sent again.
    @Test func aStalledVolumeHoldsNothingForTheDead() {
        let h = EngineHarness()
        h.start()
        for fake in h.fakes { fake.mute = [FrameKind.read.rawValue] }
        let dead = h.read(0, 4096, session: 7)
        let waiting = h.submit(.writeZeroes, 100, 50, session: 7)
        let alive = h.read(4096, 4096, session: 8)
        h.run(.cancel(session: 7))
        #expect(h.results[dead] == nil, "a replica has it: it ends as it may")
        #expect(h.results[waiting] == .cancelled)
        for fake in h.fakes { h.kill(fake) }
        #expect(h.core.phase == .stalled)
        #expect(h.results[dead] == .cancelled)
        #expect(h.results[alive] == nil)
        for fake in h.fakes {
            fake.mute = []
            h.connect(fake)
        }
        #expect(h.results[alive] == .ok)
        #expect(h.pool.inUse == h.core.ownBuffers)
    }

    // MARK: - Time-out

    /// Trap 22: the client hears of an error in time; the range stays locked until the copies of it
    /// are equal.
    @Test func aWriteThatTakesTooLongStaysLockedUntilItIsEverywhere() {
        let h = EngineHarness { $0.ioTimeoutMilliseconds = 1000 }
        h.start()
        h.fakes[2].mute = [FrameKind.write.rawValue, FrameKind.ping.rawValue]
        let late = h.write(0, one)
        h.pass(milliseconds: 900)
        #expect(h.results[late] == nil)
        h.pass(milliseconds: 100)
        #expect(h.results[late] == .ioError)
        h.core.set(ioTimeoutMilliseconds: 0)
        let next = h.write(0, [UInt8](repeating: 2, count: 4096))
        let writes = h.fakes[0].seen.count { $0 == .write }
        h.pass(milliseconds: 1500)
        #expect(h.fakes[0].seen.count { $0 == .write } == writes, "the range is still locked")
        h.pass(milliseconds: 1000)
        #expect(h.stored.inSync.count == 2)
        #expect(h.results[next] == .ok)
        #expect(h.fakes[0].blocks[0]?.data == h.fakes[1].blocks[0]?.data)
        #expect(h.pool.inUse == h.core.ownBuffers)
    }

    @Test func aReadThatTakesTooLongKeepsItsBufferWhileAReplyMayArriveInIt() {
        let h = EngineHarness { $0.ioTimeoutMilliseconds = 1000 }
        h.start()
        for fake in h.fakes { fake.mute = [FrameKind.read.rawValue] }
        let read = h.read(0, 4096)
        let edges = h.write(100, [1, 2, 3])
        h.pass(milliseconds: 1000)
        #expect(h.results[read] == .ioError && h.results[edges] == .ioError)
        #expect(h.pool.inUse == h.core.ownBuffers + 1)
        for fake in h.fakes { h.kill(fake) }
        #expect(h.pool.inUse == h.core.ownBuffers)
    }

    @Test func aVolumeThatIsNotServedAnswersWithErrorsInTime() {
        let h = EngineHarness { $0.ioTimeoutMilliseconds = 500 }
        h.isStoreDown = true
        h.start()
        let ids = [h.read(0, 4096), h.write(0, one), h.submit(.flush)]
        h.pass(milliseconds: 600)
        #expect(ids.allSatisfy { h.results[$0] == .ioError })
        #expect(h.pool.inUse == h.core.ownBuffers)
    }
}
