import Testing

@testable import HapteraCore

/// A volume has as many snapshots as is said, whatever they are called.
@Suite struct RecordSizeTests {
    /// With generated names 633 fitted once.
    @Test func namesOfAnyLengthFitForEverySnapshot() throws {
        var record = Self.sample()
        while record.mayHold(snapshotNamed: Self.name(record.snapshots.count)) {
            for _ in 0..<64 { Self.addSnapshot(&record) }
        }
        #expect(record.snapshots.count == VolumeRecord.snapshotsMax)
        #expect(VolumeRecord(decoding: record.encoded()) == record)
        #expect(!record.mayHold(snapshotNamed: "one"))
    }

    /// All that can be beside them: reverts, layers that only these need, sizes, replicas that are
    /// out, salvages.
    @Test func everythingThatIsBesideThemFits() throws {
        let record = Self.largest()
        let bytes = record.encoded()
        #expect(bytes.count > 100 << 10)
        #expect(VolumeRecord(decoding: bytes) == record)
        #expect(VolumeRecord(decoding: bytes + [0]) == nil)
    }

    /// In the two frames between engine and replica, and in those of the record service; and a
    /// peer that says more is not believed.
    @Test func theLargestFitsFramesThatCarryIt() throws {
        var record = Self.largest()
        let room = VolumeRecord.encodedSizeMax - record.encoded().count
        record.lineage += Array(repeating: record.lineage[0], count: room / 24)
        let install = InstallRequest(engine: InstanceID(rawValue: 1), record: record)
        #expect(InstallRequest(decoding: install.encoded()) == install)
        let hello = HelloReply(
            member: record.inSync[0], instance: InstanceID(rawValue: 1), promise: Epoch(4),
            size: record.size, installed: record)
        #expect(HelloReply(decoding: hello.encoded()) == hello)
        let limit = FrameHeader.recordTableLengthMax
        #expect(
            max(install.encoded().count, hello.encoded().count, record.encoded().count + 24)
                <= limit)
        for kind in [FrameKind.hello, .install, .getRecord, .compareAndSwap] {
            #expect(throws: Never.self) { try Self.decode(kind, table: limit) }
            #expect(throws: FrameError.payloadTooLarge) { try Self.decode(kind, table: limit + 1) }
            #expect(throws: FrameError.payloadTooLarge) {
                try Self.decode(kind, table: FrameHeader.tableLengthMax + 1, data: 4096)
            }
        }
        for kind in [FrameKind.write, .read, .digest, .regionMap, .ping] {
            #expect(throws: FrameError.payloadTooLarge) {
                try Self.decode(kind, table: FrameHeader.tableLengthMax + 1)
            }
        }
    }
    private static func decode(_ kind: FrameKind, table: Int, data: Int = 0) throws {
        var header = FrameHeader(kind: kind)
        header.tableLength = UInt32(table)
        header.dataLength = UInt32(data)
        let block = MemoryBlock(count: FrameHeader.size)
        header.encode(to: block.memory)
        _ = try FrameHeader(decoding: block.memory)
    }

    /// With as many layers as a copy may have, each with a name of its own.
    @Test func theLargestFitsAManifest() {
        var manifest = Manifest(identity: ReplicaBench.identity())
        manifest.installed = Self.largest()
        manifest.layers = (1...UInt32(Manifest.layersMax)).map { LayerID(rawValue: $0 * 2) }
        for layer in manifest.layers.dropLast() {
            manifest.names[layer] = LayerID(rawValue: layer.rawValue + 1)
        }
        #expect(manifest.fits(Manifest.slotSize))
        let file = MemoryBlock(count: Int(Manifest.fileSize))
        for slot in 0...1 {
            file.memory.copy(from: manifest.encoded(), at: slot * Manifest.slotSize)
        }
        guard case .manifest(let found) = Manifest.load(file.memory) else {
            Issue.record("it cannot be read")
            return
        }
        #expect(found == manifest)
    }

    /// `theLargestFitsAManifest` in slots of before: the power fails after any change while the
    /// copy is opened, its newest manifest in either slot and perhaps not in the other yet.
    @Test(arguments: [1, 2] as [UInt64], [false, true])
    func aCopyOfBeforeRecordsGrewOpens(epochs: UInt64, isInOneSlot: Bool) throws {
        for cut in 1... {
            let bench = try ReplicaBench(seed: UInt64(cut))
            for epoch in 1...epochs {
                _ = try bench.attach(epoch: epoch, on: Int(epoch), engine: epoch)
            }
            try narrowManifest(bench, only: isInOneSlot ? Int(bench.core.manifest.slot) : nil)
            bench.disk.changesMax = bench.disk.changeCount + cut
            let isCut = (try? bench.reopen()) == nil
            bench.disk.cutPower(&bench.random, keepPercent: [0, 50, 100][cut % 3])
            try bench.reopen()
            #expect(bench.core.promise == Epoch(epochs))
            #expect(try bench.disk.size(.manifest) == Manifest.fileSize)
            let next = epochs + 1
            _ = try bench.attach(epoch: next, on: Int(next), engine: next)
            for slot in 0...1 {
                let memory = try bench.disk.memory(.manifest)
                let at = slot * Manifest.slotSize + 100
                let byte = memory[at]
                memory[at] = byte ^ 4
                try bench.reopen()
                #expect(bench.core.promise == Epoch(next))
                memory[at] = byte
            }
            if !isCut { return }
        }
    }
    /// The file as it was then.
    private func narrowManifest(_ bench: ReplicaBench, only: Int?) throws {
        let now = try bench.disk.memory(.manifest)
        var bytes: [UInt8] = []
        for slot in 0...1 {
            let length = Manifest.slotSizeBefore
            bytes +=
                only ?? slot == slot
                ? now.slice(slot * Manifest.slotSize, length).bytes()
                : [UInt8](repeating: 0, count: length)
        }
        bench.disk.replace(.manifest, bytes)
    }

    /// Without space for larger slots a copy of before goes on as it was, and says so of a record
    /// that does not fit; when there is space, the next process takes that, too.
    @Test func withoutSpaceForLargerSlotsACopyGoesOn() throws {
        let bench = try ReplicaBench()
        _ = try bench.attach()
        try narrowManifest(bench, only: nil)
        bench.disk.refusesRoom = true
        try bench.reopen()
        #expect(try bench.disk.size(.manifest) == Manifest.fileSizeBefore)
        func install(_ epoch: UInt64, forks: UInt64) throws -> FrameStatus? {
            bench.hello(on: Int(epoch), engine: 1)
            var record = bench.record(epoch: epoch)
            record.lineage = (0..<forks).map {
                VolumeRecord.Fork(
                    epoch: Epoch($0), survivor: ReplicaID(rawValue: 1), partedEpoch: Epoch($0))
            }
            let tag = bench.send(
                .install, on: Int(epoch), epoch: epoch,
                table: InstallRequest(engine: InstanceID(rawValue: 1), record: record).encoded())
            try bench.run()
            return bench.status(tag)
        }
        #expect(try install(2, forks: 2500) == .ok)
        #expect(try install(3, forks: 2750) == .noSpace)
        #expect(bench.core.promise == Epoch(2) && bench.failure == nil)
        bench.disk.refusesRoom = false
        try bench.reopen()
        #expect(try install(4, forks: 2750) == .ok)
        try bench.reopen()
        #expect(bench.core.promise == Epoch(4))
    }

    private static func name(_ number: Int) -> String {
        let digits = String(number)
        return String(repeating: "n", count: VolumeRecord.nameLengthMax - digits.count) + digits
    }
    private static func sample() -> VolumeRecord {
        VolumeRecord(
            volume: ReplicaBench.volume, name: name(0), epoch: Epoch(4), nonce: 1, size: 1 << 40,
            inSync: (1...3).map {
                VolumeRecord.Member(
                    replica: ReplicaID(rawValue: $0), incarnation: Incarnation(rawValue: 1))
            })
    }
    private static func addSnapshot(_ record: inout VolumeRecord) {
        let layer = record.head
        record.layers.append(LayerID(rawValue: layer.rawValue + 1))
        record.snapshots.append(
            VolumeRecord.Snapshot(
                layer: layer, name: name(record.snapshots.count), created: .max))
    }
    private static func largest() -> VolumeRecord {
        var record = sample()
        while record.snapshots.count < VolumeRecord.snapshotsMax { addSnapshot(&record) }
        let head = record.head.rawValue
        record.layers += (1...UInt32(4096 - record.layers.count)).map {
            LayerID(rawValue: head + $0)
        }
        record.engineEndpoint = String(repeating: "e", count: 255)
        record.reverts = (0..<UInt32(VolumeRecord.revertsMax)).map {
            VolumeRecord.Revert(
                head: LayerID(rawValue: 1000 + $0), target: LayerID(rawValue: 1 + $0))
        }
        record.growths = (1...64).map {
            VolumeRecord.Growth(
                head: LayerID(rawValue: UInt32($0) + 1), sizeBefore: UInt64($0) << 30)
        }
        record.out = (4..<64).map {
            VolumeRecord.Departure(
                member: VolumeRecord.Member(
                    replica: ReplicaID(rawValue: $0), incarnation: Incarnation(rawValue: 1)),
                leftEpoch: Epoch(3),
                stablePoint: StablePoint(epoch: Epoch(2), sequence: SequenceNumber(1)))
        }
        record.lineage = (1...256).map {
            VolumeRecord.Fork(
                epoch: Epoch($0), survivor: ReplicaID(rawValue: 1), partedEpoch: Epoch($0))
        }
        return record
    }
}
