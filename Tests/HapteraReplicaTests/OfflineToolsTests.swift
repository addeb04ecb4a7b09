import Glibc
import HapteraCore
import HapteraIO
import Testing

@testable import HapteraReplica

/// A directory on a real disk, removed afterwards.
final class TestDirectory {
    let path: String
    init() throws {
        path = "\(environment("TMPDIR") ?? "/var/tmp")/haptera-\(hexadecimal(randomUInt64()))"
        // SAFETY: the string outlives the call.
        try #require(unsafe mkdir(path, 0o700) == 0)
    }
    deinit { Self.remove(path) }
    private static func remove(_ path: String) {
        // SAFETY: the string outlives the calls.
        if unsafe unlink(path) == 0 || errno == ENOENT { return }
        for name in DirectoryStorage.names(in: path) ?? [] where name != "." && name != ".." {
            remove("\(path)/\(name)")
        }
        _ = unsafe rmdir(path)
    }
}

@Suite struct OfflineToolsTests {
    private static let size = UInt64(3 * Geometry.regionSize + 8192)
    private let identity = ReplicaIdentity(
        volume: VolumeID(high: 1, low: 2), name: "volume", replica: ReplicaID(rawValue: 3),
        incarnation: Incarnation(rawValue: 4), size: size)

    /// A replica whose region 1 has two blocks of data, drained, and whose last block is active.
    private func fill(_ directory: String) throws {
        try ReplicaCore.create(
            storage: DirectoryStorage(directory: directory, mode: .serve), identity: identity)
        let storage = DirectoryStorage(directory: directory, mode: .serve)
        let layer = LayerID(rawValue: 1)
        let block = MemoryBlock(count: 8192)
        for place in 0..<8192 { block.memory[place] = UInt8(place % 249) }
        let first = UInt64(Geometry.regionSize)
        try storage.write(.data(layer), offset: first, from: block.memory)
        let entries = MemoryBlock(count: TablePage.entriesSize)
        for index in 0..<2 {
            let bytes = block.memory.slice(index * 4096, 4096)
            BlockEntry(state: .data, checksum: CRC32C.checksum(bytes))
                .encode(to: entries.memory, at: index * 8)
        }
        let page = MemoryBlock(count: TablePage.size)
        TablePage(layer: layer, region: 1, version: 0, birth: Epoch(1), logIndex: 0)
            .encode(entries: entries.memory, to: page.memory)
        try storage.write(
            .table(layer), offset: TablePage.pairOffset(region: 1), from: page.memory)

        let last = Self.size - 4096
        try storage.write(.data(layer), offset: last, from: block.memory.slice(0, 4096))
        let log = try ActivityLog(opening: storage.mapLog(size: Int(try storage.size(.log))))
        let point = StablePoint(epoch: Epoch(1), sequence: SequenceNumber(7))
        log.append(.flushed(point.next))
        log.append(.stable(point))
        log.append(.activate(layer: layer, region: 3))
        log.append(
            .entry(
                layer: layer, block: last / 4096, count: 1,
                BlockEntry(
                    state: .data, checksum: CRC32C.checksum(block.memory.slice(0, 4096)))))
        try storage.sync(.log)
    }

    private func damage(_ directory: String, at offset: UInt64) throws {
        let storage = DirectoryStorage(directory: directory, mode: .serve)
        let block = MemoryBlock(count: 4096)
        let file = ReplicaFile.data(LayerID(rawValue: 1))
        _ = try storage.read(file, offset: offset, into: block.memory)
        block.memory[17] ^= 1
        try storage.write(file, offset: offset, from: block.memory)
    }

    /// A record of the activity log that rots while the host runs on: nobody may take what is left
    /// for all there was.
    @Test func aDamagedRecordIsToldBeforeTheHostRestarts() throws {
        let directory = try TestDirectory()
        try fill(directory.path)
        try promise(directory.path, boot: HostBoot.read())
        #expect(try OfflineTools.verify(directory: directory.path).isDamaged == false)
        do {
            let storage = DirectoryStorage(directory: directory.path, mode: .serve)
            let log = try storage.mapLog(size: Int(try storage.size(.log)))
            log[ActivityLog.ringOffset + LogRecord.size + 9] ^= 1
            try storage.sync(.log)
        }
        let image = directory.path + "/image"
        #expect(throws: StorageError.self) { try OfflineTools.verify(directory: directory.path) }
        #expect(throws: StorageError.self) {
            try OfflineTools.export(directory: directory.path, output: image)
        }
        #expect(throws: StorageError.self) { try InspectReport(directory: directory.path) }
        // Of another boot it cannot be told from one that a power cut has taken.
        try promise(directory.path, boot: BootID(high: 1, low: 2))
        _ = try OfflineTools.verify(directory: directory.path)
        try OfflineTools.export(directory: directory.path, output: image)
    }
    private func promise(_ directory: String, boot: BootID) throws {
        let storage = DirectoryStorage(directory: directory, mode: .serve)
        guard case .manifest(var manifest) = try ReplicaCore.loadManifest(storage) else {
            throw StorageError(.damaged, "no manifest")
        }
        manifest.boot = boot
        manifest.counter += 1
        let bytes = manifest.encoded()
        let memory = MemoryBlock(count: bytes.count)
        memory.memory.copy(from: bytes)
        try storage.write(.manifest, offset: manifest.slotOffset(), from: memory.memory)
        try storage.sync(.manifest)
    }

    @Test func verifyTellsDoubtFromDamage() throws {
        let directory = try TestDirectory()
        try fill(directory.path)
        var report = try OfflineTools.verify(directory: directory.path)
        #expect(report.dataBlocks == 3)
        #expect(!report.isDamaged && report.doubtful == 0)
        try damage(directory.path, at: Self.size - 4096)
        report = try OfflineTools.verify(directory: directory.path)
        #expect(!report.isDamaged && report.doubtful == 1)
        try damage(directory.path, at: UInt64(Geometry.regionSize) + 4096)
        report = try OfflineTools.verify(directory: directory.path)
        #expect(report.mismatches == 1 && report.doubtful == 1)
        #expect(report.details.first?.offset == UInt64(Geometry.regionSize) + 4096)
        #expect(ReplicaCommand.run(["verify", "--dir", directory.path, "--json"]) == 1)
        #expect(ReplicaCommand.run(["verify", "--help"]) == 0)
        #expect(ReplicaCommand.run(["help"]) == 2)
    }

    /// A sector that cannot be read costs its block, and nothing if no block's data is there.
    @Test func whatCannotBeReadIsDamagedAndNothingElse() throws {
        let directory = try TestDirectory()
        try fill(directory.path)
        let storage = DirectoryStorage(
            directory: directory.path, mode: .inspect(waitMilliseconds: 0))
        let reader = try ReplicaReader(opening: storage)
        let layer = LayerID(rawValue: 1)
        for (bad, expected) in [
            (1, [.intact, .damaged, .zero]), (2, [.intact, .intact, .zero]),
        ] as [(Int, [ReplicaReader.BlockVerdict])] {
            let offset = UInt64(Geometry.regionSize + bad * 4096)
            storage.readFault = { file, range in
                file == .data(layer) && range.contains(offset) ? EIO : nil
            }
            var verdicts: [ReplicaReader.BlockVerdict] = []
            var first: [UInt8] = []
            try reader.view(1, from: layer) { (block, verdict, bytes) throws(StorageError) in
                verdicts.append(verdict)
                if block == 0 { first = bytes.bytes() }
            }
            #expect([ReplicaReader.BlockVerdict](verdicts.prefix(3)) == expected)
            #expect(first == (0..<4096).map { UInt8($0 % 249) })
        }
        storage.readFault = { file, range in
            file == .table(layer) && range.contains(TablePage.pairOffset(region: 1)) ? EIO : nil
        }
        let error = #expect(throws: StorageError.self) { try reader.region(1, layer: layer) }
        #expect(error?.code == .damaged)
        // Whenever it was written: as of a damaged page.
        #expect(try reader.births().values.reduce(0, +) == 2)
    }

    @Test func inspectTellsOfTheMark() throws {
        let directory = try TestDirectory()
        try fill(directory.path)
        #expect(try !InspectReport(directory: directory.path).json.contains("\"damaged\""))
        DirectoryStorage(directory: directory.path, mode: .peek)
            .noteDamage("the page of region 1", of: identity.member)
        #expect(
            try InspectReport(directory: directory.path).json
                .contains("\"damaged\":\"the page of region 1\""))
        let text = try InspectReport(directory: directory.path).text
        #expect(text.contains("damaged: the page of region 1\n"))
    }

    @Test func exportIsTheRawImageAndSparse() throws {
        let directory = try TestDirectory()
        try fill(directory.path)
        let image = "\(directory.path)/image"
        try OfflineTools.export(directory: directory.path, output: image)
        let fd = try FileDescriptors.open(image, flags: O_RDONLY)
        defer { close(fd) }
        var status = stat()
        // SAFETY: `status` is a local that outlives the call.
        unsafe fstat(fd, &status)
        #expect(UInt64(status.st_size) == Self.size)
        #expect(status.st_blocks * 512 < 128 << 10)
        let block = MemoryBlock(count: 8192)
        // SAFETY: the block has the bytes asked for.
        let count = unsafe pread(fd, block.memory.base, 8192, off_t(Geometry.regionSize))
        #expect(count == 8192)
        #expect(block.memory[100] == 100 && block.memory[8191] == UInt8(8191 % 249))

        let damaged = Self.size - 4096
        try damage(directory.path, at: damaged)
        let error = #expect(throws: StorageError.self) {
            try OfflineTools.export(directory: directory.path, output: image)
        }
        #expect(error?.message.contains("offset \(damaged)") == true)
    }

    @Test func aDirectoryInUseIsRefused() throws {
        let directory = try TestDirectory()
        try fill(directory.path)
        let serving = DirectoryStorage(directory: directory.path, mode: .serve)
        _ = try serving.descriptor(.manifest)
        let looking = DirectoryStorage(
            directory: directory.path, mode: .inspect(waitMilliseconds: 0))
        let error = #expect(throws: StorageError.self) { try looking.size(.manifest) }
        #expect(error?.code == .inUse)
    }

    @Test(arguments: [false, true]) func inspectTellsWhatASalvageNeeds(isServed: Bool) throws {
        let directory = try TestDirectory()
        try fill(directory.path)
        var storage: DirectoryStorage? = DirectoryStorage(
            directory: directory.path, mode: .serve)
        var record = VolumeRecord(
            volume: identity.volume, name: "volume", epoch: Epoch(5), nonce: 6, size: Self.size,
            inSync: [identity.member])
        record.engine = InstanceID(rawValue: 8)
        var manifest = Manifest(identity: identity)
        manifest.counter = 1
        manifest.promise = record.epoch
        manifest.installed = record
        manifest.isClean = false
        manifest.settledBoot = try HostBoot.read()
        let slot = MemoryBlock(count: manifest.encoded().count)
        slot.memory.copy(from: manifest.encoded())
        try storage?.write(.manifest, offset: manifest.slotOffset(), from: slot.memory)

        if !isServed { storage = nil }
        let json = try InspectReport(directory: directory.path).json
        let hex = record.encoded().map { hexadecimal(UInt64($0)).suffix(2) }.joined()
        for part in [
            "\"inUse\":\(isServed)", "\"sizeBytes\":\(Self.size)", "\"promise\":5",
            "\"record\":\"\(hex)\"", "\"flushedEpoch\":1", "\"flushedSequence\":8",
            "\"stableEpoch\":1", "\"stableSequence\":7", "\"isRebooted\":false",
            // Region 1 is as its page says; region 3 is active, so written in any epoch up to now.
            "\"activeRegions\":1", "\"olderRegions\":0",
            "\"births\":[{\"epoch\":5,\"regions\":1},{\"epoch\":1,\"regions\":1}]",
        ] { #expect(json.contains(part), "\(part) in \(json)") }
        storage = nil
    }

    @Test func makingItTwiceIsOneReplicaAndAnotherIsRefused() throws {
        let directory = try TestDirectory()
        let words = [
            "create", "--dir", directory.path, "--volume-id", identity.volume.text, "--volume",
            "volume", "--replica-id", identity.replica.text, "--incarnation",
            "0000000000000004", "--size",
        ]
        #expect(ReplicaCommand.run(words + ["2097152"]) == 0)
        #expect(ReplicaCommand.run(words + ["2097152"]) == 0)
        // The volume has grown since; it does not shrink.
        #expect(ReplicaCommand.run(words + ["3145728"]) == 0)
        #expect(ReplicaCommand.run(words + ["1048576"]) == 1)
        #expect(ReplicaCommand.run(words + ["1000"]) == 2)
        #expect(ReplicaCommand.run(["create", "--dir", directory.path]) == 2)
        #expect(ReplicaCommand.run(["inspect", "--dir", directory.path, "--no"]) == 2)
        #expect(ReplicaCommand.run([]) == 2)
        #expect(ReplicaCommand.run(["inspect", "--dir", "\(directory.path)/none"]) == 1)
    }
}
