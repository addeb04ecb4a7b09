import Testing

@testable import HapteraCore

/// What a replica answers when it is asked to verify a region of its copy.
@Suite struct ReplicaVerifyTests {
    private func install(_ bench: ReplicaBench, layers: Int = 0) throws {
        let tag = bench.install(epoch: bench.core.promise.rawValue + 1, layers: layers)
        try bench.run()
        #expect(bench.status(tag) == .ok)
    }
    private func verify(
        _ bench: ReplicaBench, region: UInt64 = 0, layer: UInt32 = 0
    ) throws -> RegionVerification? {
        let tag = bench.send(
            .verify, epoch: bench.core.promise.rawValue, offset: region << 20, length: 1 << 20,
            layer: layer)
        try bench.run()
        guard let reply = bench.reply(tag), reply.header.status == .ok else { return nil }
        let block = MemoryBlock(count: max(1, reply.table.count))
        block.memory.copy(from: reply.table)
        return RegionVerification(decoding: block.memory)
    }
    private func put(_ bench: ReplicaBench, _ value: UInt64, _ first: Int, _ blocks: Int) throws {
        let tag = bench.write(
            ReplicaBench.pattern(value, blocks: blocks), at: UInt64(first * 4096),
            epoch: bench.core.promise.rawValue)
        try bench.run()
        #expect(bench.status(tag) == .ok)
    }
    /// 100 blocks in layer 1, 20 of them again in layer 2, 3 in the head.
    private func three() throws -> ReplicaBench {
        let bench = try ReplicaBench()
        _ = try bench.attach()
        try put(bench, 10, 8, 100)
        try install(bench, layers: 2)
        try put(bench, 400, 20, 20)
        try install(bench, layers: 3)
        try put(bench, 700, 0, 3)
        return bench
    }

    @Test func everyLayerIsReadHiddenBlocksToo() throws {
        let bench = try three()
        let good = try #require(try verify(bench))
        #expect(good.checked == 123 && good.suspect == 0 && good.next == .head)
        #expect(try verify(bench, layer: 2)?.checked == 120)
        let empty = try #require(try verify(bench, region: 5))
        #expect(empty == RegionVerification())
        for (layer, block) in [(1, 8), (1, 107), (2, 30), (3, 0)] as [(UInt32, Int)] {
            let place = block * 4096 + 5
            try bench.disk.memory(.data(LayerID(rawValue: layer)))[place] ^= 1
            let bad = try #require(try verify(bench))
            #expect(bad.suspect == 1 && bad.checked == 123 && bad.isSame(as: good))
            try bench.disk.memory(.data(LayerID(rawValue: layer)))[place] ^= 1
        }
        try put(bench, 1, 0, 1)
        #expect(try verify(bench)?.isSame(as: good) == false)
        #expect(bench.pool.inUse == 0 && bench.failure == nil)
    }

    /// A sector that cannot be read is found, and costs nobody anything.
    @Test func whatCannotBeReadIsSuspect() throws {
        let bench = try three()
        bench.fault = { action in
            guard case .read(.data(let layer), let offset, let length, _, _, _) = action,
                layer.rawValue == 1
            else { return nil }
            return (offset..<offset + UInt64(length)).contains(90 * 4096) ? -5 : nil
        }
        let found = try #require(try verify(bench))
        #expect(found.checked == 123 && (1...32).contains(found.suspect))
        #expect(bench.failure == nil && bench.pool.inUse == 0)
    }

    /// No answer takes long: the rest of the layers is asked for separately.
    @Test func aLongAnswerComesInPieces() throws {
        let bench = try ReplicaBench()
        _ = try bench.attach()
        for layer in 1...4 {
            if layer > 1 { try install(bench, layers: layer) }
            try put(bench, UInt64(layer * 1000), 0, 200)
        }
        let first = try #require(try verify(bench))
        #expect(first.checked == 400 && first.next == LayerID(rawValue: 2))
        let second = try #require(try verify(bench, layer: 2))
        #expect(second.checked == 400 && second.next == .head)
    }

    /// A deleted layer's blocks are its heir's: they are merged first, and then verified.
    @Test func aDeletedLayerIsMergedFirst() throws {
        let bench = try three()
        bench.deleted = [1]
        try install(bench)
        try bench.disk.memory(.data(LayerID(rawValue: 1)))[8 * 4096] ^= 1
        let tag = bench.send(.verify, epoch: bench.core.promise.rawValue, length: 1 << 20)
        for _ in 0..<50 where bench.reply(tag) == nil {
            let flush = bench.send(.flush, epoch: bench.core.promise.rawValue, sequence: 9)
            try bench.run()
            #expect(bench.status(flush) == .ok)
            try bench.tick()
        }
        #expect(bench.status(tag) == .ok)
        let found = try #require(try verify(bench))
        #expect(found.checked == 103 && found.suspect == 1, "damage goes along with a merge")
        #expect(try verify(bench, layer: 1) == nil, "it can't be meant")
    }

    /// A write under way makes a block suspect at most, and is not held up.
    @Test func itLocksNothing() throws {
        let bench = try three()
        let good = try #require(try verify(bench))
        let verification = bench.send(.verify, epoch: 3, length: 1 << 20)
        let write = bench.write(ReplicaBench.pattern(5), at: 30 * 4096, epoch: 3)
        while bench.status(write) == nil || bench.status(verification) == nil {
            try bench.performOne(anyOrder: true)
        }
        #expect(bench.status(write) == .ok)
        let again = try #require(try verify(bench))
        #expect(again.suspect == 0 && again.checked == 124 && !again.isSame(as: good))
    }

    @Test func malformedRequestsAreRefused() throws {
        let bench = try three()
        let tags = [
            bench.send(.verify, epoch: 3, offset: 4096, length: 1 << 20),
            bench.send(.verify, epoch: 3, offset: 8 << 20, length: 1 << 20),
            bench.send(.verify, epoch: 3, length: 1 << 20, layer: 9),
        ]
        try bench.run()
        #expect(tags.allSatisfy { bench.status($0) == .invalid })
        let block = MemoryBlock(count: RegionVerification.size)
        block.memory.store(UInt32(1), 4)
        #expect(RegionVerification(decoding: block.memory) == nil, "more bad than looked at")
        block.memory.fill()
        block.memory.store(UInt32(1), 12)
        #expect(RegionVerification(decoding: block.memory) == nil, "reserved")
        #expect(RegionVerification(decoding: block.memory.slice(0, 31)) == nil)
    }
}
