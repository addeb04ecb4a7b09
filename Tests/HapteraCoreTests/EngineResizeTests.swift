import Testing

@testable import HapteraCore

/// A volume grows when every copy has room, and nobody serves what is new before it is recorded.
@Suite struct EngineResizeTests {
    private let old = EngineHarness.size
    private let new = EngineHarness.size + 3 * UInt64(Geometry.regionSize) / 2
    private func block(_ byte: UInt8) -> [UInt8] { [UInt8](repeating: byte, count: 4096) }

    private func started(
        replicas: Int = 3, members: Int? = nil, configure: (EngineHarness) -> Void = { _ in }
    ) -> EngineHarness {
        let h = EngineHarness(replicas: replicas, members: members)
        configure(h)
        h.start()
        return h
    }
    private func resize(_ h: EngineHarness, _ token: UInt64, _ size: UInt64) -> ResizeResult? {
        h.run(.resize(token: token, size: size))
        return h.resizes[token]?.result
    }

    @Test func allHaveRoomBeforeTheRecordSaysSo() {
        let h = started()
        #expect(resize(h, 5, new) == .ok)
        #expect(h.stored.size == new && h.stored.change == .resize && h.core.size == new)
        #expect(h.fakes.allSatisfy { $0.room == new && $0.size == new })
        for fake in h.fakes {
            // Room, then the Install.
            let kinds = fake.heard.map(\.kind)
            let asked = kinds.firstIndex(of: .prepareSize)
            let installed = kinds.lastIndex(of: .install)
            #expect(asked != nil && installed != nil && (asked ?? 0) < (installed ?? 0))
        }
        let write = h.write(new - 4096, block(7))
        #expect(h.results[write] == .ok)
        #expect(h.reads[h.read(new - 4096, 4096)] == block(7))
        #expect(resize(h, 6, new) == .exists)
        #expect(resize(h, 7, old) == .smaller)
        #expect(h.stored.size == new)
    }

    @Test(arguments: [FrameStatus.noSpace, .ioError, .invalid])
    func aCopyThatCannotKeepsTheSize(_ status: FrameStatus) {
        let h = started()
        h.fakes[1].errors[FrameKind.prepareSize.rawValue] = status
        #expect(resize(h, 5, new) == (status == .noSpace ? .noSpace : .refused))
        #expect(h.resizes[5]?.by == h.slot(h.fakes[1]))
        // Nobody left for it, and nothing is promised.
        #expect(h.stored.size == old && h.stored.inSync.count == 3 && h.core.size == old)
        h.fakes[1].errors = [:]
        #expect(resize(h, 6, new) == .ok)
    }

    /// Without asking, the record would promise what a copy cannot have.
    @Test func whatNobodyWasAskedAboutIsPromisedUnderTheMutation() {
        let h = started { $0.core.mutations = .growthUnprepared }
        h.fakes[1].errors[FrameKind.prepareSize.rawValue] = .noSpace
        #expect(resize(h, 5, new) == .ok && h.stored.size == new)
    }

    @Test func aMemberThatLeavesIsNotWaitedFor() {
        let h = started()
        h.fakes[2].mute = [FrameKind.prepareSize.rawValue]
        #expect(resize(h, 5, new) == nil)
        h.kill(h.fakes[2])
        #expect(h.resizes[5]?.result == .ok)
        #expect(h.stored.inSync.count == 2 && h.stored.size == new)
        // Back, and as large as the others.
        h.fakes[2].mute = []
        h.connect(h.fakes[2])
        h.pass(milliseconds: 3000)
        #expect(h.fakes[2].size == new && h.stored.inSync.count == 3)
    }

    @Test func anAnswerInDoubtIsSaidToBe() {
        let h = started()
        h.isStoreDown = true
        #expect(resize(h, 5, new) == nil)
        // What is there is served meanwhile.
        #expect(h.results[h.write(0, block(1))] == .ok)
        h.stored.epoch = Epoch(9)
        h.stored.engine = InstanceID(rawValue: 1234)
        h.isStoreDown = false
        h.pass(milliseconds: 1000)
        #expect(h.resizes[5]?.result == .inDoubt)
        #expect(resize(h, 6, new) == .notServing)
    }

    @Test func aJoinerGrowsWithTheOthers() {
        let h = EngineHarness(members: 2)
        for region in 0..<4 as Range<UInt64> {
            for fake in h.fakes.prefix(2) {
                fake.put(region * 256, block(UInt8(region + 1)), in: LayerID(rawValue: 1))
            }
        }
        h.fakes[2].promise = .zero
        h.fakes[2].mute = [FrameKind.write.rawValue]
        h.start()
        h.pass(milliseconds: 500)
        #expect(h.core.joinStage == .copying)
        #expect(resize(h, 5, new) == .ok)
        #expect(h.fakes[2].room == new && h.fakes[2].size == new)
        // It is sent what is written to what is new.
        let write = h.write(old, block(9))
        #expect(h.results[write] == .ok && h.fakes[2].entry(old / 4096).state == .data)
        h.fakes[2].mute = []
        h.answerMuted(h.fakes[2])
        h.pass(milliseconds: 2000)
        #expect(h.stored.inSync.count == 3)
    }

    /// The engine closes the joiner's connection: no answer comes any more (seed 606094: the growth
    /// waited for one for ever).
    @Test func aJoinerThatDropsOutIsAskedAgain() {
        let h = EngineHarness(members: 1)
        h.fakes[2].isUp = false
        h.fakes[0].put(0, block(1), in: LayerID(rawValue: 1))
        h.fakes[1].promise = .zero
        h.fakes[1].mute = [FrameKind.write.rawValue, FrameKind.prepareSize.rawValue]
        h.start()
        h.pass(milliseconds: 500)
        #expect(h.core.joinStage == .copying)
        #expect(resize(h, 5, new) == nil)
        // The volume stalls, and the joiner is let go.
        h.kill(h.fakes[0])
        #expect(h.core.phase == .stalled)
        h.fakes[1].mute = []
        h.fakes[1].muted = []
        h.connect(h.fakes[1])
        h.connect(h.fakes[0])
        h.pass(milliseconds: 3000)
        #expect(h.resizes[5]?.result == .ok && h.stored.size == new)
        #expect(h.stored.inSync.count == 2)
    }

    /// A snapshot's layer ends where the volume did: a copy sends it nothing behind that, not even
    /// when the region was last written (seed 403123: the file grew, not durably, and the copy did
    /// not open after a power cut).
    @Test func nothingIsCopiedBehindTheEndOfALayer() {
        let h = EngineHarness(members: 2)
        h.start()
        h.write(0, block(1))
        h.run(.takeSnapshot(token: 1, name: "small", created: 1))
        #expect(resize(h, 5, new) == .ok)
        h.write(old, block(2))
        h.pass(milliseconds: 5000)
        #expect(h.stored.inSync.count == 3)
        let lower = LayerID(rawValue: 1)
        let isBehind = h.fakes[2].heard.contains {
            $0.layer == lower && $0.offset >= old && ($0.kind == .write || $0.kind == .setState)
        }
        #expect(!isBehind && h.fakes[2].entry(old / 4096).state == .data)
        #expect(h.fakes[2].layers[lower]?[0]?.data == block(1))
    }

    /// The last region was partial when a job took it.
    @Test func aJobAtTheEndTakesWhatIsNewToo() {
        let h = EngineHarness(members: 2)
        let partial = old - UInt64(Geometry.regionSize) / 2
        h.stored.size = partial
        for fake in h.fakes { fake.size = partial }
        let last = partial / 4096 - 1
        for fake in h.fakes.prefix(2) { fake.put(last, block(3), in: LayerID(rawValue: 1)) }
        h.fakes[2].mute = [FrameKind.digest.rawValue, FrameKind.write.rawValue]
        h.start()
        h.pass(milliseconds: 500)
        #expect(h.core.joinStage == .copying)
        #expect(resize(h, 5, old) == .ok)
        let write = h.write(old - 4096, block(4))
        h.fakes[2].mute = []
        h.answerMuted(h.fakes[2])
        h.pass(milliseconds: 3000)
        #expect(h.results[write] == .ok && h.stored.inSync.count == 3)
        for fake in h.fakes {
            #expect(fake.blocks[last]?.data == block(3))
            #expect(fake.blocks[old / 4096 - 1]?.data == block(4))
        }
    }
}

/// What a record knows of sizes.
@Suite struct VolumeSizeTests {
    private func record() -> VolumeRecord {
        VolumeRecord(
            volume: VolumeID(high: 1, low: 2), name: "v", epoch: Epoch(1), nonce: 1, size: 4096,
            inSync: [
                .init(replica: ReplicaID(rawValue: 1), incarnation: Incarnation(rawValue: 1))
            ])
    }
    private func layers(_ ids: UInt32...) -> [LayerID] { ids.map { LayerID(rawValue: $0) } }

    @Test func aLayerKeepsTheSizeItWasFrozenAt() {
        var record = record()
        record.grow(to: 8192)
        // Nothing is below.
        #expect(record.growths == [])
        record.layers = layers(1, 2)
        record.grow(to: 12288)
        record.grow(to: 16384)
        record.layers = layers(1, 2, 3)
        record.grow(to: 20480)
        #expect((1...3).map { record.size(of: LayerID(rawValue: $0)) } == [8192, 16384, 20480])
        #expect(VolumeRecord(decoding: record.encoded()) == record)
        // Deleted: of what a size was known is gone.
        record.layers = layers(2, 3)
        record.forgetGrowths()
        #expect(record.growths.map(\.sizeBefore) == [16384])
        record.layers = layers(3)
        record.forgetGrowths()
        #expect(record.growths == [] && record.size == 20480)
    }

    @Test func growthsThatMakeNoSenseAreRefused() {
        for growth in [
            VolumeRecord.Growth(head: LayerID(rawValue: 3), sizeBefore: 4096),
            .init(head: LayerID(rawValue: 2), sizeBefore: 8192),
            .init(head: LayerID(rawValue: 2), sizeBefore: 4095),
            .init(head: LayerID(rawValue: 2), sizeBefore: 0),
        ] {
            var record = record()
            record.size = 8192
            record.layers = layers(1, 2)
            record.growths = [growth]
            #expect(VolumeRecord(decoding: record.encoded()) == nil)
        }
    }

    @Test func thereIsALimit() {
        var record = record()
        for number in 1...64 as ClosedRange<UInt32> {
            record.layers.append(LayerID(rawValue: number + 1))
            #expect(record.mayGrow)
            record.grow(to: record.size + 4096)
        }
        record.layers.append(LayerID(rawValue: 66))
        #expect(!record.mayGrow && VolumeRecord(decoding: record.encoded()) == record)
    }

    /// Who knows of no growths reads records without.
    @Test func onlyARecordWithGrowthsIsOfTheLaterVersion() {
        var record = record()
        record.grow(to: 8192)
        #expect(record.encoded()[4] == 3)
        record.layers = layers(1, 2)
        record.grow(to: 12288)
        #expect(record.encoded()[4] == 4)
        // Version 4 without any is no record.
        record.growths = []
        var bytes = [UInt8](record.encoded().dropLast(4))
        bytes[4] = 4
        bytes += [0, 0, 0, 0]
        var writer = ByteWriter()
        writer.append(raw: bytes)
        writer.append(checksum(of: bytes))
        #expect(VolumeRecord(decoding: writer.bytes) == nil)
    }
}
