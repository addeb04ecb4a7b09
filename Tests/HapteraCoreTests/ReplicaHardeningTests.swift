import Testing

@testable import HapteraCore

/// Weak spots found by replaying crashes, or by thinking about them.
@Suite struct ReplicaHardeningTests {
    private let layer = LayerID(rawValue: 1)

    /// Seed 2006002: whoever makes a replica is killed before the manifest is synced, and it is
    /// made again, which finds it there. A power cut must not take it away any more.
    @Test func whatIsFoundToBeMadeIsDurable() throws {
        func make(on disk: ReplicaTestDisk) throws(StorageError) {
            try ReplicaCore.create(
                storage: disk, identity: ReplicaBench.identity(),
                logCapacity: ActivityLog.capacityMin)
        }
        let whole = ReplicaTestDisk()
        try make(on: whole)
        let disk = ReplicaTestDisk()
        disk.changesMax = whole.changeCount - 1
        #expect(throws: StorageError.self) { try make(on: disk) }
        disk.changesMax = .max
        try make(on: disk)
        var random = TestRandom(seed: 3)
        disk.cutPower(&random, keepPercent: 0)
        let bench = try ReplicaBench(disk: disk, create: false)
        #expect(try bench.attach() != nil)
    }

    /// Cut right after the page of a region was written that was activated and never written to:
    /// its other slot, made shortly before, may be gone.
    @Test func aRegionDrainsOnlyWhenItsSlotsAreDurable() throws {
        for seed in 1...30 as ClosedRange<UInt64> {
            let bench = try ReplicaBench(seed: seed)
            _ = try bench.attach()
            bench.write(ReplicaBench.pattern(1), at: 0, sequence: 1)
            // Slots and activation, but the engine is gone before the write begins.
            try bench.performOne()
            bench.step(.disconnected(connection: 0))
            try bench.run()
            bench.now = bench.now.adding(milliseconds: 20_000)
            bench.step(.tick)
            while let next = bench.pending.first {
                try bench.performOne()
                if case .write(.table, _, _, _, _, _) = next { break }
            }
            var random = TestRandom(seed: seed)
            bench.disk.cutPower(&random, keepPercent: 50)
            try bench.reopen()
            #expect(try bench.attach(epoch: 2) != nil)
        }
    }

    /// A killed process leaves a page written and not synced; the log's tail must not pass the
    /// records that page replaces.
    @Test func aPageOfAKilledProcessIsSyncedBeforeTheTailMoves() throws {
        let bench = try ReplicaBench()
        _ = try bench.attach()
        let data = ReplicaBench.pattern(7, blocks: 100)
        bench.write(data, at: 0, sequence: 1)
        bench.send(.flush, sequence: 2)
        try bench.run()
        bench.send(.stable, sequence: 2, auxiliary: 1)
        bench.now = bench.now.adding(milliseconds: 20_000)
        bench.step(.tick)
        while let next = bench.pending.first {
            try bench.performOne()
            if case .write(.table, _, _, _, _, _) = next { break }
        }
        try bench.reopen()
        for _ in 0..<3 { try bench.tick() }
        var random = TestRandom(seed: 1)
        bench.disk.cutPower(&random, keepPercent: 0)
        try bench.reopen()
        _ = try bench.attach(epoch: 2)
        let read = bench.send(.read, epoch: 2, offset: 0, length: data.count)
        try bench.run()
        #expect(bench.reply(read)?.data == data)
    }

    /// At rest each slot of the manifest holds the newest: rot in one takes no promise back.
    @Test(arguments: [0, 1])
    func aRottenManifestSlotTakesNoPromiseBack(slot: Int) throws {
        for epochs in 1...2 as ClosedRange<UInt64> {
            let bench = try ReplicaBench()
            for epoch in 1...epochs {
                _ = try bench.attach(epoch: epoch, on: Int(epoch), engine: epoch)
            }
            try bench.disk.memory(.manifest)[slot * Manifest.slotSize + 100] ^= 4
            try bench.reopen()
            #expect(bench.core.promise == Epoch(epochs))
        }
    }

    /// A write fails, and its bytes are on the disk all the same: where the entries name none, the
    /// space comes back when the region has drained.
    @Test func whatAFailedWriteLeavesIsGivenBack() throws {
        let bench = try ReplicaBench()
        _ = try bench.attach()
        bench.write(ReplicaBench.pattern(1), at: 0)
        try bench.run()
        bench.fault = { [unowned bench] action in
            guard
                case .write(.data(let file), let offset, let length, let buffer, let at, _) = action
            else { return nil }
            let bytes = bench.pool.memory(buffer).slice(at, length)
            try? bench.disk.write(.data(file), offset: offset, from: bytes)
            return -5
        }
        let write = bench.write(ReplicaBench.pattern(2, blocks: 3), at: 0, sequence: 2)
        try bench.run()
        #expect(bench.status(write) == .ioError)
        bench.fault = nil
        // One that comes before that keeps its space.
        bench.write(ReplicaBench.pattern(7), at: 2 * 4096, sequence: 3)
        try bench.run()
        #expect(bench.core.unneededBlocks == 1)
        try bench.flush(4)
        try bench.tick(milliseconds: 20_000)
        try bench.tick()
        #expect(bench.core.activeRegionCount == 0 && bench.core.unneededBlocks == 0)
        let memory = try bench.disk.memory(.data(layer))
        #expect(memory.slice(4096, 4096).isZero)
        let read = bench.send(.read, offset: 2 * 4096, length: 4096)
        try bench.run()
        #expect(bench.reply(read)?.data == ReplicaBench.pattern(7))
    }

    /// A trim whose region drained, and then the process ended before the space was given back.
    @Test func spaceOwedByATrimComesBackAfterACrash() throws {
        let bench = try ReplicaBench()
        _ = try bench.attach()
        bench.write(ReplicaBench.pattern(3, blocks: 4), at: 0, sequence: 1)
        try bench.run()
        bench.send(
            .setState, length: 3 * 4096, sequence: 2, auxiliary: UInt64(BlockState.zero.rawValue))
        try bench.run()
        for isDrained in [false, true] {
            if isDrained {
                bench.send(.flush, epoch: 2, sequence: 3)
                try bench.run()
                bench.send(.stable, epoch: 2, sequence: 3, auxiliary: 2)
                bench.now = bench.now.adding(milliseconds: 20_000)
                bench.step(.tick)
                while bench.core.activeRegionCount > 0 { try bench.performOne() }
            }
            #expect(try bench.disk.nextAllocated(.data(layer), from: 0)?.lowerBound == 0)
            try bench.reopen()
            _ = try bench.attach(epoch: isDrained ? 3 : 2)
        }
        try bench.tick()
        // The one block that holds data is all that is left.
        #expect(try bench.disk.nextAllocated(.data(layer), from: 0)?.lowerBound == 3 * 4096)
        let read = bench.send(.read, epoch: 3, offset: 3 * 4096, length: 4096)
        try bench.run()
        #expect(bench.reply(read)?.data == ReplicaBench.pattern(6))
    }

    /// A power cut leaves a region active whose slots in the table it has taken; then the region
    /// drains, and a second cut tears its first page.
    @Test func aRegionWithoutSlotsDrainsAfterAPowerCut() throws {
        for seed in 1...30 as ClosedRange<UInt64> {
            let bench = try ReplicaBench(seed: seed)
            _ = try bench.attach()
            bench.write(ReplicaBench.pattern(1), at: 0, sequence: 1)
            // Slots and the activation's sync.
            for _ in 0..<2 { try bench.performOne() }
            var random = TestRandom(seed: seed)
            bench.disk.cutPower(&random, keepPercent: 0)
            try bench.reopen()
            let reply = try bench.attach(epoch: 2)
            #expect(reply?.activeRegions.map(\.region) == [0])
            bench.write(ReplicaBench.pattern(2), at: 100 * 4096, epoch: 2, sequence: 1)
            bench.send(.flush, epoch: 2, sequence: 2)
            try bench.run()
            bench.send(.stable, epoch: 2, sequence: 2, auxiliary: 2)
            bench.now = bench.now.adding(milliseconds: 20_000)
            bench.step(.tick)
            while let next = bench.pending.first {
                try bench.performOne()
                if case .write(.table, _, _, _, _, _) = next { break }
            }
            bench.disk.cutPower(&random, keepPercent: 50)
            try bench.reopen()
            #expect(try bench.attach(epoch: 3) != nil)
        }
    }

    /// A log that fills before the first flush renews regions whose slots no sync has covered.
    @Test func aRegionIsRenewedOnlyWhenItsSlotsAreDurable() throws {
        for seed in 1...30 as ClosedRange<UInt64> {
            let bench = try ReplicaBench(seed: seed)
            _ = try bench.attach()
            try renewAndCutPower(bench, seed)
        }
    }

    /// The disk has said that a region's first slots were not written, and they were. When memory
    /// was wanted for other regions, they are found in the table, and no sync has covered them.
    @Test func slotsOfAFailedWriteAreNotDurable() throws {
        for seed in 1...30 as ClosedRange<UInt64> {
            let bench = try ReplicaBench(seed: seed)
            _ = try bench.attach()
            bench.fault = { [unowned bench] action in
                guard
                    case .write(let file, let offset, TablePage.pairSize, let buffer, _, _) = action
                else { return nil }
                let pair = bench.pool.memory(buffer).slice(0, TablePage.pairSize)
                try? bench.disk.write(file, offset: offset, from: pair)
                return -5
            }
            let write = bench.write(ReplicaBench.pattern(1), at: 0)
            try bench.run()
            #expect(bench.status(write) == .ioError)
            bench.fault = nil
            bench.core.cache.release(try #require(bench.core.cache.find(layer, 0)))
            try renewAndCutPower(bench, seed)
        }
    }

    /// Writes until the log is full and the first page is written to renew a region; what follows
    /// does not damage the copy.
    private func renewAndCutPower(_ bench: ReplicaBench, _ seed: UInt64) throws {
        var pages = 0
        for round in 0..<8 as Range<UInt64> where pages == 0 {
            bench.write(
                ReplicaBench.pattern(round, blocks: 100),
                at: round * UInt64(Geometry.regionSize), sequence: round + 1)
            while pages == 0, !bench.pending.isEmpty {
                // Syncs of the table take longer than all else.
                let first = bench.pending.firstIndex {
                    if case .sync(.table, _) = $0 { false } else { true }
                }
                let next = bench.pending.remove(at: first ?? 0)
                bench.pending.insert(next, at: 0)
                try bench.performOne()
                if case .write(.table, _, TablePage.size, _, _, _) = next { pages += 1 }
            }
        }
        #expect(pages == 1)
        var random = TestRandom(seed: seed)
        bench.disk.cutPower(&random, keepPercent: 50)
        try bench.reopen()
        #expect(try bench.attach(epoch: 2) != nil)
    }

    /// A trimmed block was written again, and a log that fills has the region's page written before
    /// the data is durable: after a power cut the page must not name what is not there, with the
    /// bytes of before the trim beneath it.
    @Test func aRenewedPageDoesNotUndoATrim() throws {
        let bench = try ReplicaBench()
        _ = try bench.attach()
        bench.write(ReplicaBench.pattern(1), at: 0)
        try bench.run()
        bench.send(.setState, length: 4096, auxiliary: UInt64(BlockState.zero.rawValue))
        try bench.run()
        try bench.flush(5)
        let page = ReplicaFile.table(layer)
        var pages = 0
        bench.write(ReplicaBench.pattern(2), at: 0, sequence: 6)
        for round in 1..<8 as Range<UInt64> {
            bench.write(
                ReplicaBench.pattern(round, blocks: 100),
                at: round * UInt64(Geometry.regionSize), sequence: round + 6)
            while let next = bench.pending.first {
                try bench.performOne()
                if case .write(page, let offset, TablePage.size, _, _, _) = next,
                    offset < TablePage.pairSize
                {
                    pages += 1
                }
            }
        }
        #expect(pages > 0, "the region was renewed")
        var random = TestRandom(seed: 1)
        bench.disk.cutPower(&random, keepPercent: 0)
        try bench.reopen(boot: 2)
        _ = try bench.attach(epoch: 2)
        let seen = try bench.read(0, 1)
        #expect(seen == ReplicaBench.zero(1) || seen == ReplicaBench.pattern(2))
    }

    /// A page that a power cut has torn belongs to an active region, though the log may tell of
    /// more other regions than there is memory for before it comes to the activation.
    @Test func aTornPageIsJudgedWhenTheWholeLogIsRead() throws {
        let others = InstallReply.activeRegionsMax + 100
        let storage = try LogStorage(regions: others + 1, records: 16_384)
        let log = try ActivityLog(opening: storage.log.memory)
        // Region 0: drained, activated again, and cut while its next page was written.
        log.append(.activate(layer: layer, region: 0))
        log.append(.drained(layer: layer, region: 0))
        for region in 1...UInt64(others) { log.append(.drained(layer: layer, region: region)) }
        log.append(.activate(layer: layer, region: 0))
        var page = TablePage(
            layer: layer, region: 0, version: 2, birth: Epoch(1), logIndex: 1)
        page.encode(entries: nil, to: storage.table.memory.slice(0, TablePage.size))
        storage.table.memory[TablePage.size + 100] = 1
        let options = ReplicaOptions(
            instance: InstanceID(rawValue: 1), tableCachePagesMax: 128, activeRegionsMax: 16)
        let opened = try OpenedReplica(storage: storage, options: options, isReadOnly: true)
        #expect(opened.cache.activeCount == 1)

        // Without the activation it is damage, as ever.
        page.logIndex = log.nextIndex
        page.encode(entries: nil, to: storage.table.memory.slice(0, TablePage.size))
        #expect(throws: StorageError.self) {
            try OpenedReplica(storage: storage, options: options, isReadOnly: true)
        }
    }

    enum Sector: CaseIterable { case ofTheOnlyCopy, besideOthers, ofADiskThatIsAway }
    /// A page of the table on a bad sector: nobody can tell what is in the region. Beside other
    /// copies the replica gives up, so as to be made anew, once a second attempt has failed later.
    /// A disk that is away altogether may come back, with all of its copies.
    @Test(arguments: Sector.allCases) func aPageThatStaysUnreadableIsDamaged(_ sector: Sector)
        throws
    {
        let bench = try ReplicaBench()
        bench.isJoining = sector != .ofTheOnlyCopy
        _ = try bench.attach()
        bench.write(ReplicaBench.pattern(1), at: 0)
        try bench.run()
        try bench.flush(5)
        bench.core.beginShutdown(now: bench.now)
        try bench.tick()
        try bench.reopen()
        _ = try bench.attach(epoch: 2)
        func read(failing isFailing: Bool) throws -> FrameStatus? {
            bench.fault = { action in
                if isFailing, case .read(.table, _, _, _, _, _) = action { -5 } else { nil }
            }
            let tag = bench.send(.digest, epoch: 2)
            try bench.run()
            return bench.status(tag)
        }
        for seconds in [0, 5, 20] as [UInt64] {
            bench.now = bench.now.adding(milliseconds: seconds * 1000)
            if seconds > 0, sector != .ofADiskThatIsAway {
                bench.write(
                    ReplicaBench.pattern(2), at: UInt64(Geometry.regionSize), epoch: 2,
                    sequence: seconds)
                try bench.run()
            }
            #expect(bench.failure == nil)
            let isLost = seconds == 20 && sector == .besideOthers
            #expect(try read(failing: true) == (isLost ? nil : .ioError))
        }
        if sector == .besideOthers {
            guard case .tableUnreadable(region: 0) = bench.failure else {
                Issue.record("it ended with \(String(describing: bench.failure))")
                return
            }
        } else {
            #expect(bench.failure == nil)
            #expect(try read(failing: false) == .ok)
        }
    }

    /// What the disk cannot read is as good as damaged: it is repaired from another copy by writing
    /// it anew, and costs nobody's membership.
    @Test func whatCannotBeReadCountsAsDamaged() throws {
        let bench = try ReplicaBench()
        _ = try bench.attach()
        bench.write(ReplicaBench.pattern(1, blocks: 3), at: 4096, sequence: 1)
        try bench.run()
        // Block 2 is on a bad sector.
        bench.fault = { action in
            guard case .read(.data, let offset, let length, _, _, _) = action else { return nil }
            return offset <= 8192 && offset + UInt64(length) > 8192 ? -5 : nil
        }
        let read = bench.send(.read, offset: 4096, length: 3 * 4096)
        let digest = bench.send(.digest, offset: 0)
        try bench.run()
        #expect(bench.status(read) == .checksumMismatch)
        #expect(bench.reply(read)?.table.count == 3 * BlockEntry.size)
        #expect(bench.reply(read)?.data == [])
        #expect(bench.status(digest) == .ok)
        let block = MemoryBlock(count: RegionDigest.size)
        block.memory.copy(from: bench.reply(digest)?.table ?? [])
        for index in 0..<5 {
            let found = try #require(RegionDigest.decode(index: index, from: block.memory))
            #expect(found.isDoubtful == (index == 2))
            #expect((found.hashLow != 0) == (index == 1 || index == 3))
        }
        #expect(bench.pool.inUse == 0)
    }

    /// An Install's reply speaks of a mark that a power cut does not take, also when the promise is
    /// not new: the engine tells other copies of it, and they would take this one for an old one.
    @Test func anInstallMadeAgainMakesTheMarkDurable() throws {
        let bench = try ReplicaBench()
        _ = try bench.attach()
        bench.write(ReplicaBench.pattern(1), at: 0, sequence: 1)
        bench.send(.flush, sequence: 2)
        try bench.run()
        let reply = try #require(try bench.attach(on: 1))
        #expect(reply.flushed == StablePoint(epoch: Epoch(1), sequence: SequenceNumber(2)))
        var random = TestRandom(seed: 1)
        bench.disk.cutPower(&random, keepPercent: 0)
        try bench.reopen()
        #expect(bench.core.flushedPoint >= reply.flushed)
    }

    /// One stable point may have to free everything an engine has under way.
    @Test func theActivityLogHoldsAllRegionsOfAnEngine() {
        #expect(ReplicaOptions.activeRegionsDefault > EngineCore.outstandingMax)
    }
}

/// The files of a large copy, as far as opening looks at them.
private final class LogStorage: ReplicaStorage {
    let log: MemoryBlock
    let table: MemoryBlock
    private let manifest = MemoryBlock(count: Int(Manifest.fileSize))
    private let identity: ReplicaIdentity

    init(regions: Int, records: UInt64) throws {
        identity = ReplicaBench.identity(regions: regions)
        log = MemoryBlock(count: Int(ActivityLog.fileSize(capacity: records)))
        table = MemoryBlock(count: regions * TablePage.pairSize)
        ActivityLog.format(log.memory, capacity: records)
        manifest.memory.copy(from: Manifest(identity: identity).encoded())
    }
    func read(_ file: ReplicaFile, offset: UInt64, into memory: RawMemory) throws(StorageError)
        -> Int
    {
        let source = file == .manifest ? manifest.memory : table.memory
        memory.copy(from: source.slice(Int(offset), memory.count))
        return memory.count
    }
    func size(_ file: ReplicaFile) throws(StorageError) -> UInt64 {
        switch file {
        case .manifest: Manifest.fileSize
        case .log: UInt64(log.memory.count)
        case .data: identity.size
        case .table: UInt64(table.memory.count)
        case .layers: 0
        }
    }
    func nextAllocated(_ file: ReplicaFile, from offset: UInt64) throws(StorageError) -> Range<
        UInt64
    >? {
        offset < UInt64(table.memory.count) ? offset..<UInt64(table.memory.count) : nil
    }
    func mapLog(size: Int) throws(StorageError) -> RawMemory { log.memory }
    func write(_ file: ReplicaFile, offset: UInt64, from memory: RawMemory) throws(StorageError) {}
    func sync(_ file: ReplicaFile) throws(StorageError) {}
    func create(_ file: ReplicaFile, size: UInt64) throws(StorageError) {}
    func syncDirectories() throws(StorageError) {}
}
