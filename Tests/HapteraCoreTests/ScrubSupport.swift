@testable import HapteraCore

extension FakeReplica {
    func adopt(_ header: FrameHeader, _ blocks: Range<UInt64>, in layer: LayerID) -> FrameStatus {
        if let checksum = AdoptRequest.checksum(header.auxiliary) {
            mark(blocks, in: layer, checksum: checksum)
            return .ok
        }
        guard unreadable.isDisjoint(with: blocks) else { return .ioError }
        adopt(blocks, in: layer)
        return .ok
    }
    /// Takes the bytes that are there for data.
    private func adopt(_ blocks: Range<UInt64>, in layer: LayerID) {
        for index in blocks {
            guard let bytes = layers[layer]?[index]?.data, !bytes.isEmpty else { continue }
            put(index, bytes, in: layer)
        }
    }
}

extension FakeReplica {
    /// The entries name data that is not there.
    private func mark(_ blocks: Range<UInt64>, in layer: LayerID, checksum: UInt32) {
        for index in blocks {
            let bytes = layers[layer]?[index]?.data ?? []
            layers[layer, default: [:]][index] = (
                BlockEntry(state: .data, checksum: checksum),
                bytes.isEmpty ? [UInt8](repeating: 0, count: 4096) : bytes
            )
        }
    }
}

extension EngineHarness {
    /// As `ReplicaCore` answers, from dictionaries.
    func verification(
        _ fake: FakeReplica, _ first: UInt64, _ count: UInt64, _ layer: LayerID
    ) -> [UInt8] {
        var result = RegionVerification()
        var layers = fake.layers.keys.filter { $0 <= layer }.sorted()
        while let layer = layers.popLast() {
            var hash: UInt64 = 0
            for index in first..<first + count {
                let (entry, data) = fake.block(index, in: layer, isMerged: false)
                guard entry.state != .absent else { continue }
                hash = (hash ^ index ^ UInt64(entry.checksum) << 20) &* 31 &+ 1
                guard entry.state == .data else { continue }
                result.checked += 1
                if checksum(of: data) != entry.checksum { result.suspect += 1 }
            }
            if hash != 0 { result.add(layer, (hash, hash)) }
            if fake.verifiesByLayer {
                result.next = layers.last ?? .head
                break
            }
        }
        let block = MemoryBlock(count: RegionVerification.size)
        result.encode(to: block.memory)
        return block.memory.bytes()
    }

    func scrub(from region: UInt64 = 0, id: UInt64 = 1) {
        var progress = ScrubProgress()
        progress.id = id
        progress.region = region
        run(.scrub(progress))
    }
    var found: ScrubProgress { core.scrubReport?.progress ?? ScrubProgress() }
    var isScrubbed: Bool { core.scrubReport?.state == .finished }
    /// What is not intact on some replica.
    var damaged: Int {
        fakes.map { fake in
            fake.layers.values.flatMap(\.values).count {
                $0.entry.state == .data && checksum(of: $0.data) != $0.entry.checksum
            }
        }.reduce(0, +)
    }
}
