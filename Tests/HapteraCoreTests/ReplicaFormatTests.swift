import Testing

@testable import HapteraCore

private func memory(_ count: Int) -> MemoryBlock { MemoryBlock(count: count) }

private func hexadecimalText(_ bytes: [UInt8]) -> String {
    bytes.map { String(hexadecimal(UInt64($0)).suffix(2)) }.joined()
}

@Suite struct ActivityLogTests {
    private let layer = LayerID(rawValue: 2)

    @Test func goldenRecord() {
        let block = memory(32)
        var record = LogRecord.entry(
            layer: layer, block: 0x0102, count: 1,
            BlockEntry(state: .data, checksum: 0xaabb_ccdd))
        record.index = 5
        record.encode(to: block.memory, at: 0)
        #expect(
            hexadecimalText(block.memory.slice(4, 28).bytes())
                == "02010100" + "0500000000000000" + "02000000" + "ddccbbaa" + "0201000000000000")
        #expect(block.memory.load(UInt32.self, 0) == CRC32C.checksum(block.memory.slice(4, 28)))
        #expect(LogRecord(decoding: block.memory, at: 0) == record)
    }

    @Test func everyBitFlipOfARecordIsNoticed() {
        let block = memory(32)
        for bit in 0..<256 {
            LogRecord.activate(layer: layer, region: 9).encode(to: block.memory, at: 0)
            block.memory[bit / 8] ^= 1 << UInt8(bit % 8)
            #expect(LogRecord(decoding: block.memory, at: 0) == nil)
        }
    }

    private func makeLog() throws -> (ActivityLog, MemoryBlock) {
        let block = memory(Int(ActivityLog.fileSize(capacity: ActivityLog.capacityMin)))
        ActivityLog.format(block.memory, capacity: ActivityLog.capacityMin)
        let log = try ActivityLog(opening: block.memory)
        return (log, block)
    }
    private func replayed(_ block: MemoryBlock) throws -> [UInt64] {
        let log = try ActivityLog(opening: block.memory)
        var indices: [UInt64] = []
        try log.replay { (record) throws(StorageError) in indices.append(record.index) }
        return indices
    }

    @Test func replayGivesWhatWasAppendedFromTheTailOn() throws {
        let (log, block) = try makeLog()
        try log.replay { (_) throws(StorageError) in Issue.record("a new log is empty") }
        for region in 0..<10 as Range<UInt64> {
            log.append(.activate(layer: layer, region: region))
        }
        #expect(try replayed(block) == Array(0..<10))
        let (flushed, stable) = (point(3, 8), point(3, 7))
        log.storeHeader(tail: 4, flushed: flushed, stable: stable)
        log.tailBecameDurable(4)
        #expect(try replayed(block) == Array(4..<10))
        let again = try ActivityLog(opening: block.memory)
        #expect(again.flushed == flushed && again.stable == stable)
        // The newer header is torn: the older one still finds everything.
        block.memory[4096 + 20] ^= 1
        #expect(try replayed(block) == Array(0..<10))
    }

    private func point(_ epoch: UInt64, _ sequence: UInt64) -> StablePoint {
        StablePoint(epoch: Epoch(epoch), sequence: SequenceNumber(sequence))
    }

    @Test func marksAreFoundInRecordsToo() throws {
        let (log, block) = try makeLog()
        for mark in [point(2, 9), point(3, 1)] { log.append(.flushed(mark)) }
        log.append(.stable(point(2, 9)))
        let again = try ActivityLog(opening: block.memory)
        try again.replay { (_) throws(StorageError) in Issue.record("a mark is about no region") }
        #expect(again.flushed == point(3, 1) && again.stable == point(2, 9))
        #expect(again.nextIndex == 3)
    }

    @Test func aHeaderOfFormat1IsRead() throws {
        let (_, block) = try makeLog()
        let slot = block.memory.slice(0, 512)
        slot.store(1 as UInt32, 4)
        slot.store(5 as UInt64, 32)
        slot.store(6 as UInt64, 40)
        slot.store(CRC32C.checksum(slot.slice(0, 48)), 48)
        slot.store(0 as UInt32, 64)
        let log = try ActivityLog(opening: block.memory)
        #expect(log.flushed == point(5, 6) && log.stable == .zero)
    }

    @Test func theRingTurnsAndLeavesOldRecordsBehind() throws {
        let (log, block) = try makeLog()
        let capacity = log.capacity
        for turn in 0..<3 as Range<UInt64> {
            for _ in 0..<capacity {
                if log.nextIndex - log.durableTail == capacity {
                    log.storeHeader(tail: log.nextIndex - 10, flushed: .zero, stable: .zero)
                    log.tailBecameDurable(log.nextIndex - 10)
                }
                log.append(.activate(layer: layer, region: turn))
            }
        }
        #expect(try replayed(block) == Array(log.durableTail..<log.nextIndex))
        #expect(log.nextIndex == 3 * capacity)
    }

    @Test func aGapIsPassedOver() throws {
        let (log, block) = try makeLog()
        for region in 0..<5 as Range<UInt64> { log.append(.activate(layer: layer, region: region)) }
        block.memory[ActivityLog.ringOffset + 2 * LogRecord.size + 9] ^= 1
        #expect(try replayed(block) == [0, 1, 3, 4])
    }

    @Test func bothHeadersDamagedIsAnError() throws {
        let (_, block) = try makeLog()
        block.memory[0] ^= 1
        #expect(throws: StorageError.self) { try ActivityLog(opening: block.memory) }
    }

    @Test func reservedRoomIsKept() throws {
        let (log, block) = try makeLog()
        let room = Int(log.capacity - log.margin)
        #expect(log.hasRoom(room))
        log.reserve(room)
        #expect(!log.hasRoom(1))
        #expect(log.hasRoomForUpkeep)
        // Upkeep leaves something to covered records, which end flushes.
        while log.hasRoomForUpkeep { log.reserve(1) }
        #expect(log.hasRoomForCovered && log.capacity - log.used == log.margin / 4)
        log.unreserve(Int(log.used) - room)
        log.appendReserved(.activate(layer: layer, region: 1))
        log.unreserve(room - 1)
        #expect(log.used == 1)
        #expect(try replayed(block) == [0])
    }
}

@Suite struct TablePageTests {
    private let layer = LayerID(rawValue: 1)

    private func page(_ version: UInt64, _ pair: MemoryBlock, region: UInt64 = 5) {
        let entries = memory(TablePage.entriesSize)
        BlockEntry(state: .data, checksum: UInt32(version)).encode(to: entries.memory, at: 0)
        let page = TablePage(
            layer: layer, region: region, version: version, birth: Epoch(7), logIndex: 99)
        page.encode(
            entries: entries.memory,
            to: pair.memory.slice(Int(version % 2) * TablePage.size, TablePage.size))
    }
    private func load(_ pair: MemoryBlock) -> TablePage.Pair {
        TablePage.loadPair(pair.memory, layer: layer, region: 5)
    }
    private func version(_ pair: TablePage.Pair) -> [UInt64] {
        guard case .page(let page, let isWhole) = pair else { return [] }
        return [page.version, isWhole ? 1 : 0]
    }

    @Test func goldenHeader() {
        let pair = memory(TablePage.pairSize)
        page(2, pair)
        #expect(
            hexadecimalText(pair.memory.slice(0, 48).bytes())
                == "48505442" + "01000000" + "01000000" + "00000000" + "0500000000000000"
                + "0200000000000000" + "0700000000000000" + "6300000000000000")
        #expect(hexadecimalText(pair.memory.slice(64, 8).bytes()) == "0100000002000000")
    }

    @Test func theNewerValidSlotCounts() {
        let pair = memory(TablePage.pairSize)
        #expect(load(pair) == .neverWritten)
        page(0, pair)
        #expect(version(load(pair)) == [0, 1])
        page(1, pair)
        #expect(version(load(pair)) == [1, 1])
        page(2, pair)
        #expect(version(load(pair)) == [2, 1])
        // Torn: the other one, but not as if nothing had happened.
        pair.memory[3000] ^= 1
        #expect(version(load(pair)) == [1, 0])
        pair.memory[TablePage.size + 100] ^= 1
        #expect(load(pair) == .damaged)
    }

    @Test func aPageOfAnotherRegionOrSlotIsNoPage() {
        let pair = memory(TablePage.pairSize)
        page(2, pair, region: 6)
        #expect(load(pair) == .damaged)
        page(2, pair)
        pair.memory.copy(from: pair.memory.slice(0, TablePage.size), at: TablePage.size)
        pair.memory.slice(0, TablePage.size).fill()
        #expect(load(pair) == .damaged)
    }

    @Test func everyBitFlipIsNoticed() {
        let pair = memory(TablePage.pairSize)
        page(2, pair)
        for bit in 0..<TablePage.size * 8 {
            pair.memory[bit / 8] ^= 1 << UInt8(bit % 8)
            #expect(load(pair) == .damaged)
            pair.memory[bit / 8] ^= 1 << UInt8(bit % 8)
        }
    }

    /// Only its first sector is not zero, so a torn write onto a hole leaves all or nothing.
    @Test func anEmptyPageFitsOneSector() {
        let page = memory(TablePage.size)
        TablePage(layer: layer, region: 5, version: 0, birth: .zero, logIndex: 0)
            .encode(entries: nil, to: page.memory)
        #expect(page.memory.slice(512, TablePage.size - 512).isZero)
    }
}

@Suite struct TableCacheTests {
    private static let layer = LayerID(rawValue: 1)

    @Test func layersOfARegionAreApart() throws {
        let cache = TableCache(frameCount: 8)
        let lower = try #require(cache.allocate(Self.layer, 3))
        let upper = try #require(cache.allocate(LayerID(rawValue: 2), 3))
        #expect(lower != upper && cache.find(Self.layer, 3) == lower)
        cache.release(lower)
        #expect(cache.find(Self.layer, 3) == nil)
        #expect(cache.find(LayerID(rawValue: 2), 3) == upper)
    }
    /// Against a dictionary, under insertions and evictions that keep runs of buckets full.
    @Test func findsWhatIsThereAndNothingElse() throws {
        let cache = TableCache(frameCount: 64)
        var random = TestRandom(seed: 3)
        var known: [UInt64: Int32] = [:]
        for _ in 0..<5000 {
            let region = UInt64(random.below(200))
            #expect(cache.find(Self.layer, region) == known[region])
            if let frame = known[region] {
                cache.release(frame)
                known[region] = nil
            } else if let frame = cache.allocate(Self.layer, region) {
                known = known.filter { $0.value != frame }
                known[region] = frame
                cache.frames[Int(frame)].state = .clean
                cache.move(frame, to: .clean)
            }
        }
        #expect(known.count > 20)
    }

    @Test func evictsTheOneUsedLongestAgo() throws {
        let cache = TableCache(frameCount: 2)
        for region in 0..<2 as Range<UInt64> {
            let frame = try #require(cache.allocate(Self.layer, region))
            cache.frames[Int(frame)].state = .clean
            cache.move(frame, to: .clean)
        }
        let first = try #require(cache.find(Self.layer, 0))
        cache.move(first, to: .clean)
        let third = try #require(cache.allocate(Self.layer, 2))
        #expect(cache.find(Self.layer, 1) == nil)
        #expect(cache.find(Self.layer, 0) == first)
        cache.move(first, to: .none)
        #expect(cache.allocate(Self.layer, 3) == nil)
        #expect(cache.find(Self.layer, 2) == third)
    }

    @Test func renewedRegionsKeepTheLogListInOrder() throws {
        let cache = TableCache(frameCount: 8)
        var frames: [Int32] = []
        for region in 0..<4 as Range<UInt64> {
            let frame = try #require(cache.allocate(Self.layer, region))
            frames.append(frame)
            cache.enterLog(frame, firstIndex: region * 10)
        }
        cache.renewInLog(frames[0], firstIndex: 25)
        cache.leaveLog(frames[1])
        var order: [UInt64] = []
        var frame = cache.oldestActive
        while frame >= 0 {
            order.append(cache.frames[Int(frame)].firstIndex)
            frame = cache.nextActive(frame)
        }
        #expect(order == [20, 25, 30])
        #expect(cache.activeCount == 3)
    }
}

@Suite struct ManifestTests {
    private func sample() -> Manifest {
        var manifest = Manifest(identity: ReplicaBench.identity())
        manifest.counter = 3
        manifest.promise = Epoch(4)
        manifest.promisedEngine = InstanceID(rawValue: 5)
        manifest.settledBoot = BootID(high: 6, low: 7)
        manifest.isClean = false
        manifest.installed = VolumeRecord(
            volume: ReplicaBench.volume, name: "vol", epoch: Epoch(4), nonce: 1, size: 1 << 20,
            inSync: [manifest.identity.member])
        return manifest
    }
    private func file(_ manifests: Manifest...) -> MemoryBlock {
        let block = memory(Int(Manifest.fileSize))
        for manifest in manifests {
            block.memory.copy(from: manifest.encoded(), at: Int(manifest.slotOffset()))
        }
        return block
    }
    private func counter(_ block: MemoryBlock) -> UInt64? {
        guard case .manifest(let found) = Manifest.load(block.memory) else { return nil }
        return found.counter
    }

    @Test func roundTrip() throws {
        let block = file(sample())
        guard case .manifest(let found) = Manifest.load(block.memory) else {
            Issue.record("not found")
            return
        }
        #expect(found == sample())
        #expect(sample().encoded().count % 4096 == 0)
    }

    /// What a slot has room for is read, too.
    @Test func aManifestOfManyLayersIsRead() {
        var manifest = sample()
        manifest.layers = (1...5000).map(LayerID.init)
        let block = file(manifest)
        if case .manifest(let found) = Manifest.load(block.memory) {
            #expect(found == manifest)
        } else {
            Issue.record("it cannot be read")
        }
    }

    @Test func theNewerValidSlotCounts() {
        var newer = sample()
        newer.counter = 4
        let block = file(sample(), newer)
        #expect(counter(block) == 4)
        block.memory[40] ^= 1
        #expect(counter(block) == 3)
        block.memory[Manifest.slotSize + 40] ^= 1
        #expect(counter(block) == nil)
        if case .damaged = Manifest.load(block.memory) {} else { Issue.record("not damaged") }
        block.memory.fill()
        if case .neverWritten = Manifest.load(block.memory) {} else { Issue.record("not new") }
    }

    @Test func everyBitFlipIsNoticed() {
        let block = file(sample())
        let start = Manifest.slotSize
        let length = 24 + Int(block.memory.load(UInt32.self, start + 16))
        for bit in 0..<length * 8 {
            block.memory[start + bit / 8] ^= 1 << UInt8(bit % 8)
            #expect(counter(block) == nil)
            block.memory[start + bit / 8] ^= 1 << UInt8(bit % 8)
        }
    }
}
