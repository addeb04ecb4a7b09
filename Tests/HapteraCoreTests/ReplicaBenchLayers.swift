import Testing

@testable import HapteraCore

/// What tests of several layers ask of a bench.
extension ReplicaBench {
    static let block = Geometry.blockSize
    static func pattern(_ value: UInt64, blocks: Int = 1) -> [UInt8] {
        var bytes: [UInt8] = []
        bytes.reserveCapacity(blocks * Geometry.blockSize)
        for block in 0..<UInt64(blocks) {
            let seed = (value &+ block &+ 1) &* 0x9E37_79B9_7F4A_7C15
            for place in 0..<UInt64(Geometry.blockSize) {
                bytes.append(UInt8(truncatingIfNeeded: seed >> (place % 8 * 8) &+ place / 8) | 1)
            }
        }
        return bytes
    }
    static func zero(_ blocks: Int) -> [UInt8] { [UInt8](repeating: 0, count: blocks * block) }

    /// Blocks of a layer (0: the head's), as it is seen; nil: it is refused.
    func read(
        _ first: Int, _ count: Int, layer: UInt32 = 0, flags: UInt16 = 0
    ) throws -> [UInt8]? {
        let tag = send(
            .read, epoch: core.promise.rawValue, offset: UInt64(first * Self.block),
            length: count * Self.block, flags: flags, layer: layer)
        try run()
        guard let reply = reply(tag), reply.header.status == .ok else { return nil }
        return reply.data.isEmpty ? Self.zero(count) : reply.data
    }
    /// The birth that a layer's region is told to have.
    func birth(layer: UInt32 = 1, region: UInt64 = 0) throws -> UInt64 {
        let tag = send(
            .digest, epoch: core.promise.rawValue, offset: region * UInt64(Geometry.regionSize),
            length: Geometry.regionSize, layer: layer)
        try run()
        return Self.birth(inDigest: try #require(reply(tag)?.table))
    }
    static func birth(inDigest table: [UInt8]) -> UInt64 {
        table.prefix(8).reversed().reduce(0) { $0 << 8 | UInt64($1) }
    }
    /// The next record, with that many layers if they are more than there are.
    func installNext(layers: Int = 0) throws {
        let tag = install(epoch: core.promise.rawValue + 1, layers: layers)
        try run()
        #expect(status(tag) == .ok)
    }
    /// The next record is the one before with that change.
    func installChanged(_ change: (inout VolumeRecord) -> Void) throws {
        var record = try #require(lineage)
        change(&record)
        record.epoch = core.promise.next
        record.engine = InstanceID(rawValue: 1)
        lineage = record
        let tag = send(
            .install, epoch: record.epoch.rawValue,
            table: InstallRequest(engine: record.engine, record: record).encoded())
        try run()
        #expect(status(tag) == .ok)
    }
    /// A flush, and that it is stable.
    func flush(_ sequence: UInt64) throws {
        let epoch = core.promise.rawValue
        let tag = send(.flush, epoch: epoch, sequence: sequence)
        try run()
        #expect(status(tag) == .ok)
        send(.stable, epoch: epoch, sequence: sequence, auxiliary: epoch)
        try run()
    }
    /// Until nothing is left to drain or to merge: one layer after the other may go over to the one
    /// below.
    func settle() throws {
        for round in 0..<60 as Range<UInt64> where round < 8 || core.isMergeDue {
            try flush(500 + round)
            try tick(milliseconds: 20_000)
        }
    }

    /// Blocks 0..<8 in layer 1, 2..<4 again in layer 2, 3..<5 again in layer 3, 1 trimmed there;
    /// and what each shows. `isUpperLarger`: layer 2 knows more regions than layer 1, so that that
    /// one goes over to it.
    static func threeLayers(
        regions: Int = 8, isUpperLarger: Bool = false
    ) throws -> (bench: ReplicaBench, seen: [UInt32: [UInt8]]) {
        let bench = try ReplicaBench(regions: regions)
        _ = try bench.attach()
        var view = pattern(10, blocks: 8)
        var seen: [UInt32: [UInt8]] = [:]
        func put(_ data: [UInt8], _ first: Int) throws {
            bench.write(data, at: UInt64(first * block), epoch: bench.core.promise.rawValue)
            try bench.run()
            view.replaceSubrange(first * block..<first * block + data.count, with: data)
        }
        try put(view, 0)
        seen[1] = view
        try bench.installNext(layers: 2)
        try put(pattern(30, blocks: 2), 2)
        if isUpperLarger {
            bench.write(pattern(9), at: UInt64(Geometry.regionSize), epoch: 2)
            try bench.run()
        }
        seen[2] = view
        try bench.installNext(layers: 3)
        try put(pattern(50, blocks: 2), 3)
        bench.send(
            .setState, epoch: 3, offset: UInt64(block), length: block, sequence: 2,
            auxiliary: UInt64(BlockState.zero.rawValue))
        try bench.run()
        view.replaceSubrange(block..<2 * block, with: zero(1))
        seen[3] = view
        return (bench, seen)
    }
}
