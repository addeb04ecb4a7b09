import HapteraCore

/// What mutated input led to. That it led anywhere, without a trap, is the point.
package struct FuzzTally: Equatable, Sendable {
    package var accepted = 0
    package var rejected = 0
    package init() {}
    mutating func count(_ isAccepted: Bool) {
        if isAccepted { accepted += 1 } else { rejected += 1 }
    }
}

/// Mutation fuzzers for what a replica reads: frames, and its files. The same seed gives the same
/// inputs. Half of the inputs get their checksum put right after the mutation, so that what is
/// behind the checksum is tried as well.
package enum ReplicaFuzzer {
    package static let names = ["frame", "manifest", "table", "log", "directory", "core"]

    /// Nil: there is no such fuzzer.
    package static func run(_ name: String, seed: UInt64, iterations: Int) -> FuzzTally? {
        let random = RandomSource(seed: seed)
        switch name {
        case "frame": return frames(random, iterations)
        case "manifest": return manifests(random, iterations)
        case "table": return pages(random, iterations)
        case "log": return logs(random, iterations)
        case "directory": return directories(random, iterations)
        case "core": return cores(random, iterations)
        default: return nil
        }
    }

    /// One to eight changes: bits, bytes, words that tend to hurt, copies within.
    static func mutate(_ memory: RawMemory, _ random: RandomSource) {
        let hurtful: [UInt64] = [0, 1, .max, 1 << 63, 1 << 62, 0xffff_ffff, 4096, 1 << 20]
        for _ in 0..<random.between(1, 8) {
            let at = random.below(memory.count)
            switch random.below(5) {
            case 0: memory[at] ^= 1 << UInt8(random.below(8))
            case 1: memory[at] = UInt8(truncatingIfNeeded: random.next())
            case 2 where memory.count >= 8:
                memory.store(random.pick(hurtful), min(at & ~3, memory.count - 8))
            case 3 where memory.count >= 4:
                let value = UInt32(truncatingIfNeeded: random.pick(hurtful))
                memory.store(value, min(at & ~3, memory.count - 4))
            default:
                let length = min(random.between(1, 64), memory.count - at)
                let from = random.below(memory.count - length + 1)
                memory.copy(from: memory.slice(from, length), at: at)
            }
        }
    }

    // MARK: frames

    static func frame(_ random: RandomSource) -> FrameHeader {
        let kinds: [FrameKind] = [
            .hello, .install, .write, .setState, .read, .flush, .stable, .digest, .status,
            .regionMap, .ping, .adopt, .getRecord, .compareAndSwap,
        ]
        var header = FrameHeader(kind: random.pick(kinds))
        header.flags = random.permille(200) ? UInt16(random.below(32)) & ~FrameFlags.reply : 0
        header.epoch = Epoch(random.permille(900) ? 1 : random.next())
        header.tag = random.next()
        header.sequence = SequenceNumber(random.permille(900) ? 1 : random.next())
        let block = UInt64(random.below(4 * Geometry.blocksPerRegion))
        header.offset = random.permille(900) ? block * 4096 : random.next()
        header.length = UInt32(
            random.permille(900) ? random.between(1, 4) * 4096 : random.below(1 << 31))
        header.auxiliary = random.permille(900) ? UInt64(random.below(4)) : random.next()
        return header
    }

    private static func frames(_ random: RandomSource, _ iterations: Int) -> FuzzTally {
        var tally = FuzzTally()
        let memoryBlock = MemoryBlock(count: FrameHeader.size)
        let memory = memoryBlock.memory
        for _ in 0..<iterations {
            frame(random).encode(to: memory)
            mutate(memory, random)
            if random.permille(500) { memory.store(CRC32C.checksum(memory.slice(0, 68)), 68) }
            do throws(FrameError) {
                let header = try FrameHeader(decoding: memory)
                precondition(header.payloadLength <= (64 << 10) + Geometry.regionSize)
                precondition(
                    header.tableLength <= 64 << 10
                        || header.tableLength <= 127 << 10 + 64 && header.dataLength == 0)
                header.encode(to: memory)
                let again = try FrameHeader(decoding: memory)
                precondition(again == header)
                tally.count(true)
            } catch {
                tally.count(false)
            }
        }
        return tally
    }

    // MARK: files

    private static let identity = ReplicaIdentity(
        volume: VolumeID(high: 1, low: 2), name: "volume", replica: ReplicaID(rawValue: 3),
        incarnation: Incarnation(rawValue: 4), size: UInt64(4 * Geometry.regionSize))

    private static func manifest() -> Manifest {
        var manifest = Manifest(identity: identity)
        var record = VolumeRecord(
            volume: identity.volume, name: "volume", epoch: Epoch(7), nonce: 1,
            size: identity.size, inSync: [identity.member])
        record.engine = InstanceID(rawValue: 9)
        manifest.promise = Epoch(7)
        manifest.installed = record
        return manifest
    }

    private static func sealManifest(_ slot: RawMemory) {
        let length = Int(slot.load(UInt32.self, 16))
        guard length <= slot.count - 24 else { return }
        let head = CRC32C.checksum(slot.slice(0, 20))
        slot.store(CRC32C.checksum(slot.slice(24, length), continuing: head), 20)
    }

    private static func manifests(_ random: RandomSource, _ iterations: Int) -> FuzzTally {
        var tally = FuzzTally()
        let bytes = manifest().encoded()
        let memoryBlock = MemoryBlock(count: Manifest.slotSize)
        let memory = memoryBlock.memory
        for _ in 0..<iterations {
            memory.slice(0, bytes.count).copy(from: bytes)
            mutate(memory.slice(0, 512), random)
            if random.permille(500) { sealManifest(memory) }
            guard let found = Manifest(decoding: memory) else {
                tally.count(false)
                continue
            }
            let again = MemoryBlock(count: Manifest.slotSize)
            again.memory.copy(from: found.encoded())
            precondition(Manifest(decoding: again.memory) == found)
            tally.count(true)
        }
        return tally
    }

    private static func sealPage(_ page: RawMemory) {
        let head = CRC32C.checksum(page.slice(0, 48))
        page.store(CRC32C.checksum(page.slice(52, 4044), continuing: head), 48)
    }

    private static func pages(_ random: RandomSource, _ iterations: Int) -> FuzzTally {
        var tally = FuzzTally()
        let layer = LayerID(rawValue: 1)
        let pairBlock = MemoryBlock(count: TablePage.pairSize)
        let pair = pairBlock.memory
        let entriesBlock = MemoryBlock(count: TablePage.entriesSize)
        let entries = entriesBlock.memory
        for _ in 0..<iterations {
            for version in 0..<2 as Range<UInt64> {
                let page = TablePage(
                    layer: layer, region: 3, version: version + 6, birth: Epoch(5), logIndex: 9)
                page.encode(entries: entries, to: pair.slice(Int(version) * 4096, 4096))
            }
            let place = random.below(2) * 4096
            mutate(pair.slice(place, random.permille(500) ? 64 : 4096), random)
            if random.permille(500) { sealPage(pair.slice(place, 4096)) }
            switch TablePage.loadPair(pair, layer: layer, region: 3) {
            case .page(let page, let isWhole):
                precondition(page.region == 3 && page.layer == layer)
                tally.count(isWhole)
            case .neverWritten, .damaged: tally.count(false)
            }
        }
        return tally
    }

    private static func sealRecord(_ memory: RawMemory, _ index: Int) {
        let record = memory.slice(
            ActivityLog.ringOffset + index * LogRecord.size, LogRecord.size)
        record.store(CRC32C.checksum(record.slice(4, 28)), 0)
    }
    private static func sealHeader(_ memory: RawMemory) {
        memory.store(CRC32C.checksum(memory.slice(0, 48)), 48)
    }

    /// Fills a new log with some records of each kind.
    private static func fillLog(_ memory: RawMemory) {
        ActivityLog.format(memory, capacity: ActivityLog.capacityMin)
        guard let log = try? ActivityLog(opening: memory) else {
            preconditionFailure("a new log does not open")
        }
        let layer = LayerID(rawValue: 1)
        for region in 0..<4 as Range<UInt64> {
            log.append(.activate(layer: layer, region: region))
            for block in 0..<8 as Range<UInt64> {
                let entry = BlockEntry(state: .data, checksum: UInt32(block))
                log.append(
                    .entry(layer: layer, block: region * 256 + block, count: 1, entry))
            }
            log.append(
                .entry(
                    layer: layer, block: region * 256 + 10, count: 20, BlockEntry(state: .zero)))
        }
        log.append(.flushed(StablePoint(epoch: Epoch(1), sequence: SequenceNumber(9))))
    }

    private static func mutateLog(_ memory: RawMemory, _ random: RandomSource) {
        if random.permille(200) {
            mutate(memory.slice(0, 64), random)
            if random.permille(500) { sealHeader(memory) }
        }
        for _ in 0..<random.between(1, 4) {
            let index = random.below(48)
            mutate(
                memory.slice(ActivityLog.ringOffset + index * LogRecord.size, LogRecord.size),
                random)
            if random.permille(700) { sealRecord(memory, index) }
        }
    }

    private static func logs(_ random: RandomSource, _ iterations: Int) -> FuzzTally {
        var tally = FuzzTally()
        let size = Int(ActivityLog.fileSize(capacity: ActivityLog.capacityMin))
        let memoryBlock = MemoryBlock(count: size)
        let memory = memoryBlock.memory
        for _ in 0..<iterations {
            memory.slice(0, ActivityLog.ringOffset + 64 * LogRecord.size).fill()
            fillLog(memory)
            mutateLog(memory, random)
            do throws(StorageError) {
                let log = try ActivityLog(opening: memory)
                var last: UInt64?
                try log.replay { (record) throws(StorageError) in
                    precondition(record.index >= log.durableTail)
                    if let last { precondition(record.index > last) }
                    last = record.index
                }
                tally.count(true)
            } catch {
                tally.count(false)
            }
        }
        return tally
    }

    // MARK: whole directories, and a core on them

    /// Opens copies of a good directory, each with damage in one file.
    private static func directories(_ random: RandomSource, _ iterations: Int) -> FuzzTally {
        var tally = FuzzTally()
        let original = FuzzFiles()
        do throws(StorageError) {
            try ReplicaCore.create(
                storage: original, identity: identity, logCapacity: ActivityLog.capacityMin)
        } catch { preconditionFailure(error.message) }
        fillLog(original.memory(.log))
        let pool = BufferPool(limits: .init(small: 64, medium: 16, large: 2))
        let options = ReplicaOptions(
            instance: InstanceID(rawValue: 1), tableCachePagesMax: 80, activeRegionsMax: 16)
        for _ in 0..<iterations {
            let files = original.copy()
            for region in 0..<4 where random.permille(500) {
                let page = TablePage(
                    layer: LayerID(rawValue: 1), region: UInt64(region), version: 0,
                    birth: Epoch(1), logIndex: UInt64(random.below(64)))
                page.encode(
                    entries: nil,
                    to: files.memory(.table(LayerID(rawValue: 1))).slice(region * 8192, 4096))
            }
            switch random.below(3) {
            case 0:
                let slot = files.memory(.manifest).slice(0, Manifest.slotSize)
                mutate(slot.slice(0, 256), random)
                sealManifest(slot)
            case 1: mutateLog(files.memory(.log), random)
            default:
                let table = files.memory(.table(LayerID(rawValue: 1)))
                let page = table.slice(random.below(8) * 4096, 4096)
                mutate(page.slice(0, 128), random)
                if random.permille(500) { sealPage(page) }
            }
            do throws(StorageError) {
                let core = try ReplicaCore(opening: files, options: options, pool: pool)
                core.step(.tick, now: Instant(rawValue: 1))
                tally.count(true)
            } catch {
                precondition(!error.message.isEmpty)
                tally.count(false)
            }
        }
        return tally
    }

    /// Frames with any fields, in any order, from several connections, at a core on good files.
    /// Accepted: answered ok.
    private static func cores(_ random: RandomSource, _ iterations: Int) -> FuzzTally {
        var tally = FuzzTally()
        var done = 0
        while done < iterations {
            let host = FuzzHost(identity)
            let length = min(2000, iterations - done)
            for _ in 0..<length { host.feed(random, frame(random)) }
            host.finish()
            tally.accepted += host.answered
            tally.rejected += host.refused
            done += length
        }
        return tally
    }
}
