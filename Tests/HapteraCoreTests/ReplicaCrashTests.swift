import Testing

@testable import HapteraCore

/// A value written to a block; `id` tells zeroes apart.
private struct Version: Equatable {
    static let doubt = UInt64.max
    var id: UInt64
    /// Zero: reads zero.
    var value: UInt64
}

/// A client's view of one block: which values a crash may leave.
private struct BlockHistory {
    /// The durable version first, then everything written since, in order.
    var possible = [Version(id: 0, value: 0)]
    /// The last acknowledged.
    var current = Version(id: 0, value: 0)
    var inFlight: Version?
}

/// An engine and its clients in front of one replica, which is killed or loses power at any disk
/// operation, with its unsynced sectors kept or lost at random.
private final class CrashWorld {
    static let regions = 6
    static let blocksUsed = 8
    let bench: ReplicaBench
    var random: TestRandom
    var blocks: [BlockHistory]
    var epoch: UInt64 = 0
    var boot: UInt64 = 1
    var sequence: UInt64 = 0
    var lastID: UInt64 = 0
    /// By tag: the blocks and values of a write under way.
    var writes: [UInt64: (blocks: [Int], sequence: UInt64)] = [:]
    /// By tag: each block's current value when the flush was sent.
    var flushes: [UInt64: (versions: [Version], sequence: UInt64)] = [:]
    var taken = 0

    init(seed: UInt64) throws {
        random = TestRandom(seed: seed)
        bench = try ReplicaBench(
            regions: Self.regions, options: ReplicaBench.options(active: 3), seed: seed)
        blocks = Array(
            repeating: BlockHistory(), count: Self.regions * Self.blocksUsed)
    }

    func offset(_ block: Int) -> UInt64 {
        UInt64(block / Self.blocksUsed * Geometry.regionSize + block % Self.blocksUsed * 4096)
    }

    // MARK: life

    /// Takes over: reads everything, compares with what may be there, rewrites what is doubtful.
    func attach(mayLoseUnflushed: Bool) throws {
        epoch += 1
        sequence = 0
        writes = [:]
        flushes = [:]
        bench.replies = []
        taken = 0
        let installed = try bench.attach(epoch: epoch, engine: epoch)
        let active = Set(try #require(installed).activeRegions)
        for block in blocks.indices {
            let found = try observe(block)
            let history = blocks[block]
            let lawful =
                mayLoseUnflushed
                ? history.possible : [history.current] + [history.inFlight].compactMap { $0 }
            let isLawful =
                lawful.contains { $0.value == found }
                || (found == Version.doubt
                    && (mayLoseUnflushed
                        ? history.possible.count > 1 : history.inFlight != nil))
            #expect(
                isLawful,
                "block \(block) holds \(found), lawful is \(lawful)")
            if found != history.current.value || found == Version.doubt {
                // What may differ from other copies is in the activity log.
                #expect(active.contains { $0.region == UInt64(block / Self.blocksUsed) })
            }
            let version = lawful.last { $0.value == found } ?? Version(id: newID(), value: found)
            if mayLoseUnflushed {
                blocks[block].possible = [version]
            } else if !history.possible.contains(version) {
                blocks[block].possible.append(version)
            }
            blocks[block].current = version
            blocks[block].inFlight = nil
        }
        for block in blocks.indices where blocks[block].current.value == Version.doubt {
            write(block, count: 1)
            try settle()
        }
        flush()
        try settle()
    }

    private func newID() -> UInt64 {
        lastID += 1
        return lastID
    }

    private func observe(_ block: Int) throws -> UInt64 {
        let tag = bench.send(.read, epoch: epoch, offset: offset(block), length: 4096)
        try bench.run()
        let reply = try #require(bench.reply(tag))
        if reply.header.status == .checksumMismatch { return Version.doubt }
        #expect(reply.header.status == .ok)
        guard reply.header.dataLength > 0 else { return 0 }
        let version = blocks[block].possible.first {
            $0.value != Version.doubt && ReplicaBench.pattern($0.value) == reply.data
        }
        return try #require(version, "bytes nobody wrote").value
    }

    // MARK: requests

    func write(_ block: Int, count: Int) {
        let range = Array(block..<block + count)
        guard range.allSatisfy({ blocks[$0].inFlight == nil }) else { return }
        sequence += 1
        let isTrim = count > 1 && random.chance(40)
        let flags = random.chance(10) ? FrameFlags.fua : 0
        for place in range {
            let id = newID()
            let version = Version(id: id, value: isTrim ? 0 : id)
            blocks[place].inFlight = version
            blocks[place].possible.append(version)
        }
        let tag: UInt64
        if isTrim {
            tag = bench.send(
                .setState, epoch: epoch, offset: offset(block), length: count * 4096,
                sequence: sequence, auxiliary: UInt64(BlockState.zero.rawValue), flags: flags)
        } else {
            let data = ReplicaBench.pattern(blocks[block].inFlight?.value ?? 0, blocks: count)
            tag = bench.write(
                data, at: offset(block), epoch: epoch, sequence: sequence, flags: flags)
        }
        writes[tag] = (range, sequence)
        take()
    }

    func flush() {
        sequence += 1
        let versions = blocks.map(\.current)
        let tag = bench.send(.flush, epoch: epoch, sequence: sequence)
        flushes[tag] = (versions, sequence)
        take()
    }

    /// Looks at the replies that have come.
    func take() {
        while taken < bench.replies.count {
            let header = bench.replies[taken].header
            taken += 1
            if let ended = writes.removeValue(forKey: header.tag) {
                #expect(header.status == .ok)
                for block in ended.blocks {
                    if let version = blocks[block].inFlight { blocks[block].current = version }
                    blocks[block].inFlight = nil
                }
            } else if let ended = flushes.removeValue(forKey: header.tag) {
                #expect(header.status == .ok)
                for block in blocks.indices {
                    // Durable: nothing older can come back.
                    let place = blocks[block].possible.firstIndex(of: ended.versions[block])
                    blocks[block].possible.removeFirst(place ?? 0)
                }
                // S covers what was answered before; here also what was sent before.
                guard writes.values.allSatisfy({ $0.sequence > ended.sequence }) else { continue }
                bench.send(.stable, epoch: epoch, sequence: ended.sequence, auxiliary: epoch)
            }
        }
    }
    func settle() throws {
        while !bench.pending.isEmpty {
            try bench.performOne(anyOrder: true)
            take()
        }
        // Parked writes need a flush, a stable point and a tick.
        for _ in 0..<20 where !writes.isEmpty {
            flush()
            try bench.run()
            take()
            try bench.tick()
            take()
        }
        #expect(writes.isEmpty && flushes.isEmpty)
    }

    /// Random requests and disk operations.
    func work(_ steps: Int) throws {
        for _ in 0..<steps {
            switch random.below(100) {
            case 0..<30:
                let region = random.below(Self.regions)
                let count = 1 + random.below(3)
                let first = random.below(Self.blocksUsed - count + 1)
                write(region * Self.blocksUsed + first, count: count)
            case 30..<36: flush()
            case 36..<42:
                bench.now = bench.now.adding(milliseconds: random.chance(20) ? 20_000 : 100)
                bench.step(.tick)
                take()
            default:
                guard !bench.pending.isEmpty else { continue }
                try bench.performOne(anyOrder: true)
                take()
            }
        }
    }

    /// The end of the process, or of the machine. Operations under way are done in part.
    func crash(power: Bool) throws {
        for action in bench.pending where random.chance(50) {
            switch action {
            case .write(let file, let offset, let length, let buffer, let at, _):
                let kept = power ? (1 + random.below(length / 512)) * 512 : length
                try bench.disk.write(
                    file, offset: offset, from: bench.pool.memory(buffer).slice(at, kept))
            case .punch(let file, let offset, let length, _):
                try bench.disk.punch(file, offset: offset, length: length)
            default: break
            }
        }
        bench.pending = []
        if power {
            bench.disk.cutPower(&random, keepPercent: [0, 30, 70, 100][random.below(4)])
            boot += 1
        }
        try bench.reopen(boot: boot)
        try attach(mayLoseUnflushed: power)
    }
}

@Suite struct ReplicaCrashTests {
    /// Whatever the moment: it opens, what was flushed is there, what cannot be trusted is not
    /// served, and what may differ from other copies is in the activity log.
    @Test(arguments: 1...40 as ClosedRange<UInt64>)
    func anyCutLeavesALawfulCopy(seed: UInt64) throws {
        let world = try CrashWorld(seed: seed)
        try world.attach(mayLoseUnflushed: false)
        for _ in 0..<6 {
            try world.work(20 + world.random.below(250))
            try world.crash(power: world.random.chance(60))
        }
        try world.settle()
        #expect(world.bench.failure == nil)
    }

    /// Each step of making a directory: afterwards it is made anew or complete.
    @Test func creationCanBeCutAnywhere() throws {
        let whole = ReplicaTestDisk()
        try ReplicaCore.create(
            storage: whole, identity: ReplicaBench.identity(), logCapacity: ActivityLog.capacityMin)
        for cut in 0...whole.changeCount {
            for keep in [0, 50, 100] {
                let disk = ReplicaTestDisk()
                disk.changesMax = cut
                try? ReplicaCore.create(
                    storage: disk, identity: ReplicaBench.identity(),
                    logCapacity: ActivityLog.capacityMin)
                var random = TestRandom(seed: UInt64(cut * 3 + keep))
                disk.cutPower(&random, keepPercent: keep)
                let bench = try ReplicaBench(disk: disk)
                #expect(try bench.attach() != nil)
            }
        }
    }

    /// A drain, with everything that belongs to it, cut after each of its disk operations.
    @Test func drainingCanBeCutAnywhere() throws {
        var operations = 0
        var isDone = false
        while !isDone {
            for keep in [0, 50, 100] {
                let bench = try ReplicaBench()
                _ = try bench.attach()
                let data = ReplicaBench.pattern(5, blocks: 2)
                bench.write(data, at: 4096, sequence: 1)
                bench.send(.flush, sequence: 2)
                try bench.run()
                bench.send(.stable, sequence: 2, auxiliary: 1)
                bench.now = bench.now.adding(milliseconds: 20_000)
                bench.step(.tick)
                for _ in 0..<operations where !bench.pending.isEmpty { try bench.performOne() }
                isDone = bench.pending.isEmpty
                var random = TestRandom(seed: UInt64(operations * 7 + keep))
                bench.disk.cutPower(&random, keepPercent: keep)
                bench.pending = []
                try bench.reopen()
                let reply = try #require(try bench.attach(epoch: 2))
                let regions = reply.activeRegions.map(\.region)
                #expect(regions == [] || (!isDone && regions == [0]))
                let read = bench.send(.read, epoch: 2, offset: 4096, length: 8192)
                try bench.run()
                #expect(bench.reply(read)?.data == data)
            }
            operations += 1
        }
        #expect(operations > 2)
    }

    /// An Install cut after each of its disk operations: the old promise or the new, never none.
    @Test func installingCanBeCutAnywhere() throws {
        for operations in 0...2 {
            for keep in [0, 30, 70, 100] {
                let bench = try ReplicaBench()
                _ = try bench.attach()
                bench.hello(on: 1, engine: 2)
                let install = bench.install(on: 1, epoch: 2, engine: 2)
                for _ in 0..<operations { try bench.performOne() }
                let isAnswered = bench.reply(install) != nil
                var random = TestRandom(seed: UInt64(operations * 11 + keep))
                bench.disk.cutPower(&random, keepPercent: keep)
                bench.pending = []
                try bench.reopen()
                #expect(isAnswered == (operations == 2))
                #expect(
                    bench.core.promise == Epoch(2)
                        || (!isAnswered && bench.core.promise == Epoch(1)))
            }
        }
    }

    /// A small log under far more writes than it holds: renewed, drained, never full for ever.
    @Test func theLogTurnsOverWithoutAStablePoint() throws {
        let bench = try ReplicaBench(options: ReplicaBench.options(active: 8))
        _ = try bench.attach()
        for round in 0..<80 as Range<UInt64> {
            let tag = bench.write(
                ReplicaBench.pattern(round, blocks: 64),
                at: (round % 8) * UInt64(Geometry.regionSize), sequence: round + 1)
            try bench.tick()
            #expect(bench.status(tag) == .ok)
        }
        // No S was ever announced: all regions are still active, in a log of 1024 records.
        #expect(bench.core.activeRegionCount == 8)
        try bench.reopen()
        _ = try bench.attach(epoch: 2)
        for region in 0..<8 as Range<UInt64> {
            let read = bench.send(
                .read, epoch: 2, offset: region * UInt64(Geometry.regionSize), length: 64 * 4096)
            try bench.run()
            #expect(
                bench.reply(read)?.data == ReplicaBench.pattern(72 + region, blocks: 64))
        }
    }

    /// Damage outside the activity log is an error, not an older page.
    @Test func aRottenPageOfAQuietRegionIsNotReplacedByAnOlderOne() throws {
        let bench = try ReplicaBench()
        _ = try bench.attach()
        bench.write(ReplicaBench.pattern(1), at: 0, sequence: 1)
        bench.send(.flush, sequence: 2)
        try bench.run()
        bench.send(.stable, sequence: 2, auxiliary: 1)
        bench.core.beginShutdown(now: bench.now)
        try bench.tick()
        #expect(bench.core.isShutDown)
        // Version 2 is in slot 0.
        try bench.disk.memory(.table(LayerID(rawValue: 1)))[70] ^= 1
        try bench.reopen()
        _ = try bench.attach(epoch: 2)
        let read = bench.send(.read, epoch: 2, offset: 0, length: 4096)
        try bench.run()
        #expect(bench.reply(read) == nil)
        #expect(bench.failure != nil)
    }
}
