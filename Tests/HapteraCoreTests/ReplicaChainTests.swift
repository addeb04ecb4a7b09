import Testing

@testable import HapteraCore

/// Layers: what is seen through them, and how they come to be.
@Suite struct ReplicaChainTests {
    private let block = 4096
    private func zero(_ blocks: Int) -> [UInt8] { [UInt8](repeating: 0, count: blocks * 4096) }

    /// Snapshots by installing records with ever more layers. Epochs follow layers.
    private func freeze(_ bench: ReplicaBench, layers: Int) throws {
        let tag = bench.install(epoch: UInt64(layers), layers: layers)
        try bench.run()
        #expect(bench.status(tag) == .ok && bench.core.layers.count == layers)
    }
    private func read(
        _ bench: ReplicaBench, _ first: Int, _ count: Int, layer: UInt32 = 0, flags: UInt16 = 0
    ) throws -> (data: [UInt8], states: [UInt8])? {
        let tag = bench.send(
            .read, epoch: bench.core.promise.rawValue, offset: UInt64(first * block),
            length: count * block, flags: flags, layer: layer)
        try bench.run()
        guard let reply = bench.reply(tag), reply.header.status == .ok else { return nil }
        let states = stride(from: 0, to: reply.table.count, by: 8).map { reply.table[$0] }
        return (reply.data.isEmpty ? zero(count) : reply.data, states)
    }
    private func trim(_ bench: ReplicaBench, _ first: Int, _ count: Int) throws {
        let tag = bench.send(
            .setState, epoch: bench.core.promise.rawValue, offset: UInt64(first * block),
            length: count * block, auxiliary: UInt64(BlockState.zero.rawValue))
        try bench.run()
        #expect(bench.status(tag) == .ok)
    }

    /// Blocks 0..<4 of three layers: written below, partly covered, partly trimmed.
    private func three() throws -> (bench: ReplicaBench, lower: [UInt8], middle: [UInt8]) {
        let bench = try ReplicaBench()
        _ = try bench.attach()
        let lower = ReplicaBench.pattern(10, blocks: 4)
        let middle = ReplicaBench.pattern(20)
        bench.write(lower, at: 0)
        try bench.run()
        try freeze(bench, layers: 2)
        bench.write(middle, at: 4096, epoch: 2)
        try bench.run()
        try trim(bench, 2, 1)
        try freeze(bench, layers: 3)
        return (bench, lower, middle)
    }

    @Test func aBlockIsTheUppermostLayersThatHoldsIt() throws {
        let (bench, lower, middle) = try three()
        let seen = lower[0..<4096] + middle + zero(1) + lower[12288...] + zero(1)
        for layer in [0, 2, 3] as [UInt32] {
            let found = try read(bench, 0, 5, layer: layer)
            #expect(found?.data == [UInt8](seen) && found?.states == [1, 1, 2, 1, 0])
        }
        #expect(try read(bench, 0, 5, layer: 1)?.data == lower + zero(1))
        let own = try read(bench, 0, 4, layer: 2, flags: FrameFlags.resync)
        #expect(own?.states == [0, 1, 2, 0])
        #expect(bench.pool.inUse == 0)
    }

    @Test func whatIsWrittenAfterwardsIsInNoSnapshot() throws {
        let (bench, lower, middle) = try three()
        let upper = ReplicaBench.pattern(30, blocks: 4)
        bench.write(upper, at: 0, epoch: 3)
        try bench.run()
        #expect(try read(bench, 0, 4)?.data == upper)
        let before = [UInt8](lower[0..<4096] + middle + zero(1) + lower[12288...])
        #expect(try read(bench, 0, 4, layer: 2)?.data == before)
        #expect(try read(bench, 0, 4, layer: 1)?.data == lower)
    }

    @Test func statusIsSeenThroughTheChain() throws {
        let (bench, _, _) = try three()
        func states(_ layer: UInt32) throws -> [[UInt64]] {
            let tag = bench.send(.status, epoch: 3, length: 8 * 4096, layer: layer)
            try bench.run()
            let table = bench.reply(tag)?.table ?? []
            let copy = MemoryBlock(count: max(table.count, 16))
            copy.memory.copy(from: table)
            return stride(from: 0, to: table.count, by: 16).map {
                [copy.memory.load(UInt64.self, $0) / 4096, copy.memory.load(UInt64.self, $0 + 8)]
            }
        }
        #expect(try states(0) == [[2, 1], [1, 2], [1, 1], [4, 0]])
        #expect(try states(1) == [[4, 1], [4, 0]])
    }

    /// Trimming what only a lower layer holds must be remembered.
    @Test func aTrimCoversWhatIsBelow() throws {
        let (bench, _, _) = try three()
        try trim(bench, 0, 4)
        #expect(try read(bench, 0, 4)?.data == zero(4))
        try bench.reopen()
        _ = try bench.attach(epoch: 4)
        #expect(try read(bench, 0, 4)?.states == [2, 2, 2, 2])
        #expect(try read(bench, 0, 1, layer: 1)?.states == [1])
    }

    @Test func digestsAndBirthsAreALayersOwn() throws {
        let (bench, _, _) = try three()
        func entries(_ layer: UInt32) throws -> [UInt8] {
            let tag = bench.send(.digest, epoch: 3, flags: FrameFlags.resync, layer: layer)
            try bench.run()
            let table = bench.reply(tag)?.table ?? []
            return (0..<4).map { table[8 + $0 * RegionDigest.blockRecordSize] }
        }
        #expect(try entries(1) == [1, 1, 1, 1])
        #expect(try entries(2) == [0, 1, 2, 0])
        #expect(try entries(3) == [0, 0, 0, 0])
        for (since, expected) in [(0, 1), (2, 1), (4, 0)] as [(UInt64, UInt8)] {
            let tag = bench.send(.regionMap, epoch: 3, length: 8, auxiliary: since)
            try bench.run()
            #expect(bench.reply(tag)?.table == [expected])
        }
    }

    /// A write that an Install has passed goes to the layer it was meant for.
    @Test func aFrozenLayerTakesWhatIsSentToIt() throws {
        let (bench, _, _) = try three()
        let late = ReplicaBench.pattern(40)
        let tag = bench.write(late, at: 0, epoch: 3, layer: 1)
        try bench.run()
        #expect(bench.status(tag) == .ok)
        #expect(try read(bench, 0, 1, layer: 1)?.data == late)
        #expect(try read(bench, 0, 1, layer: 3, flags: FrameFlags.resync)?.states == [0])
    }

    @Test func aLayerThatIsNotThereIsRefused() throws {
        let (bench, _, _) = try three()
        let read = bench.send(.read, epoch: 3, length: 4096, layer: 4)
        let write = bench.write(ReplicaBench.pattern(1), at: 0, epoch: 3, layer: 9)
        try bench.run()
        #expect(bench.status(read) == .invalid && bench.status(write) == .invalid)
        // Records that lack the copy's head, or name a layer that it gave up.
        func install(_ epoch: UInt64, _ layers: [UInt32]) throws -> FrameStatus? {
            var record = bench.record(epoch: epoch)
            record.layers = layers.map(LayerID.init)
            record.snapshots = []
            let request = InstallRequest(engine: InstanceID(rawValue: 1), record: record)
            let tag = bench.send(.install, epoch: epoch, table: request.encoded())
            try bench.run()
            return bench.status(tag)
        }
        #expect(try install(5, [1, 2]) == .invalid)
        #expect(try install(6, [1, 3]) == .ok)
        #expect(try install(7, [1, 2, 3]) == .invalid)
    }

    @Test func damageInALowerLayerIsNotServed() throws {
        let (bench, lower, _) = try three()
        try bench.disk.memory(.data(LayerID(rawValue: 1)))[0] ^= 1
        #expect(try read(bench, 0, 1) == nil)
        #expect(try read(bench, 3, 1)?.data == [UInt8](lower[12288...]))
    }

    /// What is written before the Install on its connection is in the frozen layer, what comes
    /// behind it in the new one, however late the disk is.
    @Test func theInstallParts() throws {
        let bench = try ReplicaBench()
        _ = try bench.attach()
        let (before, after) = (ReplicaBench.pattern(1), ReplicaBench.pattern(2))
        bench.write(before, at: 0)
        bench.install(epoch: 2, layers: 2)
        let last = bench.write(after, at: 4096, epoch: 2)
        while !bench.pending.isEmpty { try bench.performOne(anyOrder: true) }
        #expect(bench.status(last) == .ok)
        #expect(try read(bench, 0, 2, layer: 1)?.data == before + zero(1))
        #expect(try read(bench, 0, 2)?.data == before + after)
    }

    /// A full disk costs the Install and nothing else: the copy is as it was, the process too.
    @Test(arguments: [(-28, .noSpace), (-5, .ioError)] as [(Int, FrameStatus)])
    func anInstallWhoseLayerCannotBeMadeIsRefused(error: Int, status: FrameStatus) throws {
        let bench = try ReplicaBench()
        _ = try bench.attach()
        let data = ReplicaBench.pattern(5)
        bench.write(data, at: 0)
        try bench.run()
        bench.fault = { action in
            if case .create = action { error } else { nil }
        }
        let refused = bench.install(epoch: 2, layers: 2)
        let behind = bench.write(data, at: 4096, epoch: 2)
        try bench.run()
        #expect(bench.status(refused) == status && bench.status(behind) == .staleEpoch)
        #expect(bench.failure == nil && bench.core.layers.count == 1)
        #expect(bench.core.promise == Epoch(1) && bench.pool.inUse == 0)
        bench.fault = nil
        let tag = bench.install(epoch: 3, layers: 2)
        try bench.run()
        #expect(bench.status(tag) == .ok && bench.core.layers.count == 2)
        #expect(try read(bench, 0, 2, layer: 1)?.data == data + zero(1))
    }
    /// What the manifest says must be read again: it has no room for any number of layers.
    @Test func anInstallOfOneLayerTooManyIsRefused() throws {
        let bench = try ReplicaBench(regions: 1)
        _ = try bench.attach()
        let most = 2600
        for layer in 2...most {
            bench.deleted.insert(UInt32(layer - 1))
            try bench.installNext(layers: layer)
        }
        #expect(bench.core.layers.count == most && bench.core.retiredLayerCount == most - 1)
        let refused = bench.install(epoch: UInt64(most + 1), layers: most + 1)
        try bench.run()
        #expect(bench.status(refused) == .noSpace && bench.core.layers.count == most)
        try bench.reopen()
        _ = try bench.attach(epoch: UInt64(most + 2))
        try bench.tick()
        let tag = bench.install(epoch: UInt64(most + 3), layers: most + 1)
        try bench.run()
        #expect(bench.status(tag) == .ok && bench.failure == nil)
    }
    /// The engine is told with each answer, before it asks for one too many.
    @Test func thatNoLayerMayBeAddedIsSaid() throws {
        var options = ReplicaBench.options()
        options.layersMax = 3
        let bench = try ReplicaBench(options: options)
        _ = try bench.attach()
        for layers in 1...3 {
            if layers > 1 { try bench.installNext(layers: layers) }
            let ping = bench.send(.ping, epoch: bench.core.promise.rawValue)
            try bench.run()
            let flags = bench.reply(ping)?.header.flags ?? 0
            #expect((flags & FrameFlags.layersFull != 0) == (layers == 3))
        }
        let epoch = bench.core.promise.rawValue + 1
        let refused = bench.install(epoch: epoch, layers: 4)
        try bench.run()
        #expect(bench.status(refused) == .noSpace && bench.core.layers.count == 3)
        bench.deleted.insert(1)
        _ = try bench.attach(epoch: epoch + 1)
        try bench.settle()
        let ping = bench.send(.ping, epoch: bench.core.promise.rawValue)
        try bench.run()
        let flags = bench.reply(ping)?.header.flags
        #expect(flags.map { $0 & FrameFlags.layersFull } == 0)
    }
    enum Return: CaseIterable { case member, memberSalvagedBefore, joiner, survivor }
    /// What a replica has of snapshots that were deleted while it was away it can merge only when
    /// the record has told it so: as a joiner (seed 394), or as the copy that a salvage goes on
    /// from (seed 5601466), it gets more layers than it may keep.
    @Test(arguments: Return.allCases)
    func whoWasAwayMayHaveMoreLayersUntilTheyAreMerged(as role: Return) throws {
        var options = ReplicaBench.options()
        options.layersMax = 3
        let bench = try ReplicaBench(options: options)
        _ = try bench.attach()
        for layers in 2...3 { try bench.installNext(layers: layers) }
        bench.deleted = [1, 2]
        let known = bench.core.promise
        switch role {
        case .member: break
        case .memberSalvagedBefore: bench.salvaged = known
        case .joiner: bench.isJoining = true
        case .survivor: bench.salvaged = known.next
        }
        let isMore = role == .joiner || role == .survivor
        let tag = bench.install(epoch: known.rawValue + 2, layers: 5)
        try bench.run()
        #expect(bench.status(tag) == (isMore ? .ok : .noSpace))
        #expect(bench.core.layers.count == (isMore ? 5 : 3) && bench.failure == nil)
    }
    @Test func aLayerWhoseNameCannotBeSyncedEndsTheReplica() throws {
        let bench = try ReplicaBench()
        _ = try bench.attach()
        bench.fault = { action in
            if case .sync(.layers, _) = action { -28 } else { nil }
        }
        bench.install(epoch: 2, layers: 2)
        try bench.run()
        guard case .layerNotMade(LayerID(rawValue: 2), errno: 28)? = bench.failure else {
            Issue.record("it goes on: \(String(describing: bench.failure))")
            return
        }
    }

    /// The power fails after any change of the disk while a layer is made: the copy opens, with the
    /// layer or without, and a second Install makes it.
    @Test func anyCutWhileALayerIsMadeIsLawful() throws {
        try cutWhileALayerIsMade([])
        #expect(throws: StorageError.self) { try cutWhileALayerIsMade(.layerNamesNotSynced) }
    }
    private func cutWhileALayerIsMade(_ mutations: MutationSet) throws {
        for cut in 1... {
            var options = ReplicaBench.options()
            options.mutations = mutations
            let bench = try ReplicaBench(options: options, seed: UInt64(cut))
            _ = try bench.attach()
            let data = ReplicaBench.pattern(5)
            bench.write(data, at: 0, flags: FrameFlags.fua)
            try bench.run()
            bench.disk.changesMax = bench.disk.changeCount + cut
            bench.install(epoch: 2, layers: 2)
            let isCut = (try? bench.run()) == nil
            bench.disk.cutPower(&bench.random, keepPercent: [0, 50, 100][cut % 3])
            try bench.reopen()
            #expect(bench.core.layers.count <= 2)
            _ = try bench.attach(epoch: 3)
            let tag = bench.install(epoch: 4, layers: 2)
            try bench.run()
            #expect(bench.status(tag) == .ok && bench.core.layers.count == 2)
            #expect(try read(bench, 0, 1, layer: 1)?.data == data)
            if !isCut { return }
        }
    }

    /// Seeds 17 and 269: the power fails, a write's record survives and its data does not. What
    /// lies below, or the trim before, was flushed and is seen again; not so after a mere kill, and
    /// not if a flush has covered data of the layer's own.
    @Test(arguments: [1, 2] as [UInt64], [false, true])
    func aTornWriteUncoversWhatWasFlushed(boot: UInt64, isTrimmed: Bool) throws {
        let (bench, lower, _) = try three()
        if isTrimmed { try trim(bench, 0, 1) }
        let flush = bench.send(.flush, epoch: 3, sequence: 9)
        try bench.run()
        bench.write(ReplicaBench.pattern(50), at: 0, epoch: 3, sequence: 10)
        try bench.run()
        #expect(bench.status(flush) == .ok)
        let head = ReplicaFile.data(LayerID(rawValue: 3))
        try bench.disk.memory(head).slice(0, 4096).fill()
        func reopened() throws -> ReplicaBench {
            let next = try ReplicaBench(
                disk: bench.disk, create: false, options: ReplicaBench.options(boot: boot))
            _ = try next.attach(epoch: next.core.promise.rawValue + 1)
            return next
        }
        let before = isTrimmed ? zero(1) : [UInt8](lower[0..<4096])
        let seen = try read(try reopened(), 0, 1)
        #expect(seen?.data == (boot == 1 ? nil : before))
        // Remembered: the next process finds the same boot.
        #expect(try read(try reopened(), 0, 1)?.data == (boot == 1 ? nil : before))
    }
    /// A log that is as full as writes may make it, of writes that are all torn: the copy opens.
    @Test func manyTornWritesNeedNoRoom() throws {
        let (bench, lower, _) = try three()
        for region in 0..<7 as Range<UInt64> {
            bench.write(
                ReplicaBench.pattern(region, blocks: 100),
                at: region * UInt64(Geometry.regionSize), epoch: 3, sequence: region + 9)
        }
        func isLater(_ action: ReplicaAction) -> Bool {
            if case .sync(let file, _) = action { file != .log } else { false }
        }
        while let next = bench.pending.firstIndex(where: { !isLater($0) }) {
            bench.pending.swapAt(0, next)
            try bench.performOne()
        }
        #expect(bench.core.log.used > 700)
        try bench.disk.memory(.data(LayerID(rawValue: 3))).fill()
        for epoch in [4, 5] as [UInt64] {
            let next = try ReplicaBench(
                disk: bench.disk, create: false, options: ReplicaBench.options(boot: 2))
            _ = try next.attach(epoch: epoch)
            #expect(try read(next, 0, 1)?.data == [UInt8](lower[0..<4096]))
            #expect(try read(next, 6 * Geometry.blocksPerRegion, 100)?.data == zero(100))
        }
    }
    /// A flush without its covered record would promise what a power cut takes back.
    @Test func aFlushWaitsForRoomForItsRecord() throws {
        let (bench, _, _) = try three()
        let fua = bench.write(
            ReplicaBench.pattern(50), at: 0, epoch: 3, sequence: 9, flags: FrameFlags.fua)
        while bench.core.log.reserved == 0 { try bench.performOne() }
        let log = bench.core.log
        let taken = Int(log.capacity - log.used)
        log.reserve(taken)
        try bench.run()
        #expect(bench.status(fua) == nil && !log.hasRoomForCovered)
        log.unreserve(taken)
        for round in 10..<30 as Range<UInt64> where bench.status(fua) == nil {
            bench.write(
                ReplicaBench.pattern(round, blocks: 100), at: UInt64(Geometry.regionSize),
                epoch: 3, sequence: round)
            try bench.run()
            bench.send(.flush, epoch: 3, sequence: round)
            try bench.run()
            bench.send(.stable, epoch: 3, sequence: round, auxiliary: 3)
            try bench.tick(milliseconds: 20_000)
        }
        #expect(bench.status(fua) == .ok)
    }
    /// Seeds 612368 and 1006671: a trimmed block of the only layer, written again and torn, with
    /// bytes of before the trim beneath it. What a flush covered since is not given up. In a log
    /// of format 3 nobody knows what was covered, until a flush is.
    @Test(arguments: [false, true], [3, 4] as [UInt32])
    func aTornWriteDoesNotUndoATrim(isFlushed: Bool, format: UInt32) throws {
        let bench = try ReplicaBench()
        _ = try bench.attach()
        let log = try bench.disk.memory(.log)
        func reopened(boot: UInt64) throws -> ReplicaBench {
            let next = try ReplicaBench(
                disk: bench.disk, create: false, options: ReplicaBench.options(boot: boot))
            _ = try next.attach(epoch: next.core.promise.rawValue + 1)
            return next
        }
        bench.write(ReplicaBench.pattern(1), at: 0)
        try bench.run()
        try trim(bench, 0, 1)
        try bench.flush(5)
        bench.write(ReplicaBench.pattern(2), at: 0, sequence: 6)
        try bench.run()
        if isFlushed { try bench.flush(7) }
        bench.write(ReplicaBench.pattern(3), at: 0, sequence: 8)
        try bench.run()
        let torn = isFlushed ? ReplicaBench.pattern(2) : ReplicaBench.pattern(1)
        try bench.disk.memory(.data(LayerID(rawValue: 1))).copy(from: torn)
        for slot in [log.slice(0, 512), log.slice(4096, 512)] where format == 3 {
            slot.store(format, 4)
            slot.store(CRC32C.checksum(slot.slice(0, 64)), 64)
        }
        let next = try reopened(boot: 2)
        #expect(next.core.log.coversLowest == (format == 4))
        let isUndone = format == 4 && !isFlushed
        #expect(try read(next, 0, 1)?.data == (isUndone ? zero(1) : nil))
        try next.flush(20)
        #expect(next.core.log.coversLowest)
    }

    /// Also if the block's first data was written by a process before (seed 200511).
    @Test(arguments: [false, true])
    func aTornRewriteOfFlushedDataIsDoubtful(isKilled: Bool) throws {
        let (bench, _, _) = try three()
        if isKilled {
            bench.write(ReplicaBench.pattern(49), at: 0, epoch: 3, sequence: 8)
            try bench.run()
            try bench.reopen()
            _ = try bench.attach(epoch: 4)
        }
        let epoch = bench.core.promise.rawValue
        bench.write(
            ReplicaBench.pattern(50), at: 0, epoch: epoch, sequence: 9, flags: FrameFlags.fua)
        try bench.run()
        bench.write(ReplicaBench.pattern(51), at: 0, epoch: epoch, sequence: 10)
        try bench.run()
        let torn = try bench.disk.memory(.data(LayerID(rawValue: 3)))
        torn.copy(from: [UInt8](ReplicaBench.pattern(50)[0..<512]))
        let next = try ReplicaBench(
            disk: bench.disk, create: false, options: ReplicaBench.options(boot: 2))
        _ = try next.attach(epoch: 5)
        #expect(try read(next, 0, 1) == nil)
    }

    /// Writes, trims, snapshots, flushes, kills and idle times in any order against a model: every
    /// layer's view, after every restart.
    @Test(arguments: 1...12 as ClosedRange<UInt64>)
    func everySnapshotStaysAsItWas(seed: UInt64) throws {
        let model = try ChainModel(seed: seed, deletes: false)
        for step in 0..<160 {
            try model.act(step)
            if step % 8 == 0 { try model.check(step) }
        }
        #expect(model.bench.pool.inUse == 0 && model.bench.failure == nil)
    }
}
