import Testing

@testable import HapteraCore

@Suite struct ReplicaCoreTests {
    private let region = UInt64(Geometry.regionSize)

    @Test func writesAreReadBackAcrossAReopen() throws {
        let bench = try ReplicaBench()
        let installed = try bench.attach()
        #expect(installed?.activeRegions.map(\.region) == [])
        let data = ReplicaBench.pattern(1, blocks: 3)
        let write = bench.write(data, at: 8192, sequence: 2)
        try bench.run()
        #expect(bench.status(write) == .ok)
        let read = bench.send(.read, offset: 4096, length: 5 * 4096)
        try bench.run()
        let reply = try #require(bench.reply(read))
        #expect(reply.header.status == .ok)
        let zero = [UInt8](repeating: 0, count: 4096)
        #expect(reply.data == zero + data + zero)
        #expect(reply.table.count == 40)
        #expect(bench.pool.inUse == 0)

        let again = try ReplicaBench(disk: bench.disk, create: false)
        let active = try again.attach(epoch: 2, engine: 2)
        #expect(active?.activeRegions.map(\.region) == [0])
        let second = again.send(.read, epoch: 2, offset: 8192, length: 3 * 4096)
        try again.run()
        #expect(again.reply(second)?.data == data)
    }

    /// What a clogged link delivers late must not disturb the connection made since (seed 30061).
    @Test func anInstallOfAnEarlierConnectionComesTooLate() throws {
        let bench = try ReplicaBench()
        bench.hello(on: 0, engine: 1)
        #expect(try bench.attach(on: 1) != nil)
        let late = bench.install(on: 0, epoch: 1, engine: 1)
        let write = bench.write(ReplicaBench.pattern(1), at: 0, on: 1)
        try bench.run()
        #expect(bench.status(late) == .notInstalled && bench.status(write) == .ok)
        bench.step(.disconnected(connection: 1))
        #expect(try bench.attach(on: 0) != nil)
    }

    @Test func aPayloadThatDoesNotMatchChangesNothing() throws {
        let bench = try ReplicaBench()
        _ = try bench.attach()
        let data = ReplicaBench.pattern(1)
        let tag = bench.send(
            .write, length: 4096, table: ReplicaBench.checksums(ReplicaBench.pattern(2)),
            data: data)
        try bench.run()
        #expect(bench.status(tag) == .checksumMismatch)
        #expect(bench.core.activeRegionCount == 0)
        #expect(bench.pool.inUse == 0)
    }

    /// AL before data: the data write is not even issued before the log is durable.
    @Test func activationIsDurableBeforeData() throws {
        let bench = try ReplicaBench()
        _ = try bench.attach()
        bench.write(ReplicaBench.pattern(1), at: 0)
        var order: [String] = []
        while !bench.pending.isEmpty {
            switch bench.pending[0] {
            case .write(.data, _, _, _, _, _): order.append("data")
            case .write(.table, _, _, _, _, _): order.append("slots")
            case .sync(.log, _): order.append("log")
            default: order.append("other")
            }
            try bench.performOne()
        }
        #expect(order == ["slots", "log", "data"])
    }

    @Test func anInstallDrainsAndFences() throws {
        let bench = try ReplicaBench()
        _ = try bench.attach()
        let write = bench.write(ReplicaBench.pattern(1), at: 0)
        bench.hello(on: 1, engine: 2)
        let install = bench.install(on: 1, epoch: 2, engine: 2)
        // The old engine is refused at once, though its write is still under way.
        let late = bench.write(ReplicaBench.pattern(2), at: 4096, sequence: 2)
        #expect(bench.status(late) == .staleEpoch)
        #expect(bench.reply(late)?.header.epoch == Epoch(2))
        #expect(bench.reply(install) == nil)
        // What comes behind the Install waits for it.
        let behind = bench.send(.ping, on: 1, epoch: 2)
        #expect(bench.reply(behind) == nil)
        try bench.run()
        #expect(bench.status(write) == .ok)
        #expect(bench.status(install) == .ok)
        #expect(bench.status(behind) == .ok)
        let tags = bench.replies.map { $0.header.tag }
        let writeAt = try #require(tags.firstIndex(of: write))
        let installAt = try #require(tags.firstIndex(of: install))
        #expect(writeAt < installAt)
        #expect(bench.core.promise == Epoch(2))
        // Re-stamped.
        let digest = bench.send(.digest, on: 1, epoch: 2)
        try bench.run()
        let table = try #require(bench.reply(digest)).table
        let memory = MemoryBlock(count: table.count)
        memory.memory.copy(from: table)
        #expect(memory.memory.load(UInt64.self, 0) == 2)
    }

    @Test func equalEpochIsForTheSameEngineAndInstanceOnly() throws {
        let bench = try ReplicaBench()
        _ = try bench.attach()
        #expect(try bench.attach(epoch: 1, on: 1, engine: 1) != nil)
        #expect(try bench.attach(epoch: 1, on: 2, engine: 2) == nil)
        let old = bench.send(.ping, on: 0)
        #expect(bench.status(old) == .notInstalled)
        let restarted = try ReplicaBench(disk: bench.disk, create: false)
        #expect(try restarted.attach(epoch: 1, on: 1, engine: 1) == nil)
        #expect(try restarted.attach(epoch: 2, on: 2, engine: 1) != nil)
    }

    @Test func aFlushWaitsForWritesAndSyncsEverything() throws {
        let bench = try ReplicaBench()
        _ = try bench.attach()
        let write = bench.write(ReplicaBench.pattern(1), at: 0, sequence: 1)
        let flush = bench.send(.flush, sequence: 2)
        var synced: Set<ReplicaFile> = []
        while bench.reply(flush) == nil {
            if case .sync(let file, _) = bench.pending[0], bench.reply(write) != nil {
                synced.insert(file)
            }
            try bench.performOne()
        }
        #expect(bench.status(write) == .ok)
        #expect(synced == [.log, .data(LayerID(rawValue: 1)), .table(LayerID(rawValue: 1))])
        #expect(
            bench.core.flushedPoint
                == StablePoint(epoch: Epoch(1), sequence: SequenceNumber(2)))
    }

    @Test func aFailedSyncIsTheEnd() throws {
        let bench = try ReplicaBench()
        _ = try bench.attach()
        bench.write(ReplicaBench.pattern(1), at: 0)
        try bench.run()
        let flush = bench.send(.flush, sequence: 2)
        bench.fault = { if case .sync(.data, _) = $0 { -5 } else { nil } }
        try bench.run()
        #expect(bench.core.hasFailed)
        #expect(bench.reply(flush) == nil)
        bench.fault = nil
        let ping = bench.send(.ping)
        #expect(bench.reply(ping) == nil)
    }

    @Test func aFailedWriteLeavesTheOldChecksum() throws {
        let bench = try ReplicaBench()
        _ = try bench.attach()
        bench.write(ReplicaBench.pattern(1), at: 0)
        try bench.run()
        bench.fault = { if case .write(.data, _, _, _, _, _) = $0 { -28 } else { nil } }
        let full = bench.write(ReplicaBench.pattern(2), at: 0, sequence: 2)
        try bench.run()
        #expect(bench.status(full) == .noSpace)
        bench.fault = nil
        try bench.disk.memory(.data(LayerID(rawValue: 1)))[100] ^= 1
        let read = bench.send(.read, offset: 0, length: 4096)
        try bench.run()
        #expect(bench.status(read) == .checksumMismatch)
        #expect(bench.reply(read)?.data == [])
        #expect(bench.reply(read)?.table.count == 8)
        let adopt = bench.send(.adopt, offset: 0, length: 4096, sequence: 3)
        try bench.run()
        #expect(bench.status(adopt) == .ok)
        let again = bench.send(.read, offset: 0, length: 4096)
        try bench.run()
        #expect(bench.status(again) == .ok)
        #expect(bench.reply(again)?.data == bench.reply(adopt)?.data)
        #expect(bench.pool.inUse == 0)
    }

    /// An entry that names what is nowhere: nobody reads the block, until it is written.
    @Test func aLostBlockSaysSo() throws {
        let bench = try ReplicaBench()
        _ = try bench.attach()
        bench.write(ReplicaBench.pattern(1), at: 0)
        try bench.run()
        let lost = 1 | UInt64(0x4C4F_5354) << 32
        for auxiliary in [2, lost | 4] {
            let tag = bench.send(
                .adopt, offset: 0, length: 8192, sequence: 2, auxiliary: auxiliary)
            try bench.run()
            #expect(bench.status(tag) == .invalid)
        }
        let tag = bench.send(.adopt, offset: 0, length: 8192, sequence: 3, auxiliary: lost)
        try bench.run()
        #expect(bench.status(tag) == .ok)
        for isReopened in [false, true] {
            if isReopened {
                try bench.reopen()
                _ = try bench.attach(epoch: 2)
            }
            for offset in [0, 4096] as [UInt64] {
                let read = bench.send(
                    .read, epoch: isReopened ? 2 : 1, offset: offset, length: 4096)
                try bench.run()
                #expect(bench.status(read) == .checksumMismatch)
            }
        }
        bench.write(ReplicaBench.pattern(2), at: 4096, epoch: 2, sequence: 4)
        try bench.run()
        #expect(try bench.read(1, 1) == ReplicaBench.pattern(2))
    }

    /// A trimmed block reads zero, and its space goes only after its region has drained.
    @Test func aTrimIsRecordedThenPunched() throws {
        let bench = try ReplicaBench()
        _ = try bench.attach()
        bench.write(ReplicaBench.pattern(1, blocks: 4), at: 0)
        try bench.run()
        let trim = bench.send(
            .setState, offset: 4096, length: 8192, sequence: 2,
            auxiliary: UInt64(BlockState.zero.rawValue))
        let flush = bench.send(.flush, sequence: 3)
        try bench.run()
        #expect(bench.status(trim) == .ok)
        #expect(bench.status(flush) == .ok)
        try bench.tick(milliseconds: 20_000)
        let data = try bench.disk.memory(.data(LayerID(rawValue: 1)))
        #expect(!data.slice(4096, 8192).isZero)
        bench.send(.stable, sequence: 3, auxiliary: 1)
        try bench.tick()
        #expect(bench.core.activeRegionCount == 0)
        try bench.tick()
        #expect(data.slice(4096, 8192).isZero)
        #expect(!data.slice(0, 4096).isZero)
        let read = bench.send(.read, offset: 0, length: 4 * 4096)
        let status = bench.send(.status, offset: 0, length: Int(region) * 2)
        try bench.run()
        let pattern = ReplicaBench.pattern(1, blocks: 4)
        #expect(
            bench.reply(read)?.data
                == [UInt8](pattern[..<4096]) + [UInt8](repeating: 0, count: 8192)
                + [UInt8](pattern[12288...]))
        var reader = ByteReader(bench.reply(status)?.table ?? [])
        var extents: [[UInt64]] = []
        while reader.remaining > 0 {
            extents.append([reader.read(UInt64.self), reader.read(UInt64.self)])
        }
        #expect(extents == [[4096, 1], [8192, 2], [4096, 1], [2 * region - 16384, 0]])
    }

    @Test func requestsThatMakeNoSenseAreRefused() throws {
        let bench = try ReplicaBench()
        _ = try bench.attach()
        let size = bench.core.size
        let bad: [(UInt64, Int)] = [
            (1, 4096), (0, 0), (0, 1), (size, 4096), (region - 4096, 8192),
            (UInt64.max - 4095, 4096), (size - 4096, 8192),
        ]
        for (offset, length) in bad {
            let tag = bench.send(.read, offset: offset, length: length)
            #expect(bench.status(tag) == .invalid)
        }
        let state = bench.send(.setState, length: 4096, auxiliary: 1)
        #expect(bench.status(state) == .invalid)
        let digest = bench.send(.digest, offset: 4096)
        #expect(bench.status(digest) == .invalid)
        let short = bench.send(
            .write, length: 8192, table: [0, 0, 0, 0, 0, 0, 0, 0],
            data: [
                UInt8
            ](repeating: 0, count: 4096))
        #expect(bench.status(short) == .invalid)
        bench.hello(on: 3)
        let before = bench.send(.read, on: 3, length: 4096)
        #expect(bench.status(before) == .notInstalled)
        #expect(bench.pool.inUse == 0)
    }

    @Test func shutdownDrainsAndMarksClean() throws {
        let bench = try ReplicaBench()
        _ = try bench.attach()
        bench.write(ReplicaBench.pattern(1), at: 0)
        bench.write(ReplicaBench.pattern(1), at: region, sequence: 5)
        bench.send(.flush, sequence: 4)
        try bench.run()
        bench.send(.stable, sequence: 4, auxiliary: 1)
        bench.core.beginShutdown(now: bench.now)
        try bench.tick()
        #expect(bench.core.isShutDown)
        let again = try ReplicaBench(
            disk: bench.disk, create: false, options: ReplicaBench.options(boot: 2))
        let reply = try #require(try again.attach(epoch: 2))
        // S did not cover the second write.
        #expect(reply.activeRegions.map(\.region) == [1])
        #expect(!reply.isRebooted)
        let third = try ReplicaBench(
            disk: bench.disk, create: false, options: ReplicaBench.options(boot: 3))
        let rebooted = try #require(try third.attach(epoch: 3))
        #expect(rebooted.isRebooted)
        third.send(.stable, epoch: 3, flags: FrameFlags.settled)
        try third.run()
        let fourth = try ReplicaBench(
            disk: bench.disk, create: false, options: ReplicaBench.options(boot: 3))
        #expect(try fourth.attach(epoch: 4)?.isRebooted == false)
    }

    /// Births come from the table for drained regions and from memory for the others; what the
    /// table does not say for certain counts as written.
    @Test func regionMapTellsWhatWasWrittenSince() throws {
        func map(_ bench: ReplicaBench, since: UInt64) throws -> [UInt8] {
            let tag = bench.send(.regionMap, epoch: 5, length: 8, auxiliary: since)
            try bench.run()
            return try #require(bench.reply(tag)).table
        }
        let first = try ReplicaBench()
        _ = try first.attach()
        for place in [0, 3, 6] as [UInt64] {
            first.write(ReplicaBench.pattern(place), at: place * region, sequence: place + 1)
        }
        let flush = first.send(.flush, sequence: 8)
        try first.run()
        #expect(first.status(flush) == .ok)
        first.send(.stable, sequence: 8, auxiliary: 1)
        first.core.beginShutdown(now: first.now)
        try first.tick()
        #expect(first.core.isShutDown)

        let bench = try ReplicaBench(disk: first.disk, create: false)
        #expect(try bench.attach(epoch: 5)?.activeRegions.map(\.region) == [])
        bench.write(ReplicaBench.pattern(9), at: 3 * region, epoch: 5)
        try bench.run()
        #expect(try map(bench, since: 0) == [0b0100_1001])
        #expect(try map(bench, since: 1) == [0b0100_1001])
        #expect(try map(bench, since: 2) == [0b0000_1000])
        #expect(try map(bench, since: 6) == [0])
        // A page of a region not in the activity log whose other slot is not as it must be.
        let table = try bench.disk.memory(.table(bench.core.headLayer))
        let page = table.slice(6 * TablePage.pairSize, TablePage.size)
        page[100] ^= 1
        #expect(try map(bench, since: 6) == [0b0100_0000])
        #expect(bench.pool.inUse == 0)
    }
}
