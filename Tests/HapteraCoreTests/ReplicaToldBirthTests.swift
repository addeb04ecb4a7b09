import Testing

@testable import HapteraCore

/// What a replica has told of births, against what it tells later: whatever is written, flushed,
/// installed, deleted and merged meanwhile, and however its process ends, no birth gets older.
private final class BirthWorld {
    static let regions = 3
    let bench: ReplicaBench
    var random: TestRandom
    var boot: UInt64 = 1
    var epoch: UInt64 = 0
    var sequence: UInt64 = 0
    var layersMade: UInt32 = 1
    /// By layer's name and region.
    var told: [LayerRegion: UInt64] = [:]
    /// By tag: which one, and what was told of it before.
    var asked: [UInt64: (LayerRegion, UInt64)] = [:]
    var maps: [UInt64: (since: UInt64, expected: Set<UInt64>)] = [:]
    var flushes: [UInt64: UInt64] = [:]
    var taken = 0
    var violations: [String] = []
    let mayFail: Bool

    init(seed: UInt64, mayFail: Bool) throws {
        random = TestRandom(seed: seed)
        self.mayFail = mayFail
        bench = try ReplicaBench(regions: Self.regions, seed: seed)
        try attach()
    }
    func attach() throws {
        asked = [:]
        maps = [:]
        flushes = [:]
        bench.replies = []
        taken = 0
        epoch = bench.core.promise.rawValue + 1
        sequence = 0
        _ = try bench.attach(epoch: epoch)
        look()
    }
    var names: [UInt32] {
        (1...layersMade).filter { !bench.deleted.contains($0) }
    }
    func look() {
        while taken < bench.replies.count {
            let reply = bench.replies[taken]
            taken += 1
            let tag = reply.header.tag
            if let point = flushes.removeValue(forKey: tag), reply.header.status == .ok,
                random.chance(80)
            {
                bench.send(.stable, epoch: epoch, sequence: point, auxiliary: epoch)
            }
            guard reply.header.status == .ok else { continue }
            if let (which, before) = asked.removeValue(forKey: tag) {
                let birth = ReplicaBench.birth(inDigest: reply.table)
                if birth < before {
                    violations.append("\(which): \(birth), was \(before)")
                }
                told[which] = max(told[which] ?? 0, birth)
            }
            if let (since, expected) = maps.removeValue(forKey: tag) {
                for region in expected where reply.table[0] & 1 << UInt8(region) == 0 {
                    violations.append("map since \(since): no \(region)")
                }
            }
        }
    }
    func ask() {
        for name in names {
            for region in 0..<UInt64(Self.regions) where random.chance(60) {
                let which = LayerRegion(LayerID(rawValue: name), region)
                let tag = bench.send(
                    .digest, epoch: epoch, offset: region * UInt64(Geometry.regionSize),
                    length: Geometry.regionSize, layer: name)
                asked[tag] = (which, told[which] ?? 0)
            }
        }
        let since = max(1, epoch + 1 - UInt64(random.below(Int(min(4, epoch)) + 1)))
        let named = Set(names)
        let expected = told.filter { named.contains($0.key.layer.rawValue) && $0.value >= since }
        let tag = bench.send(
            .regionMap, epoch: epoch, length: Self.regions, auxiliary: since)
        maps[tag] = (since, Set(expected.map(\.key.region)))
    }
    func perform(_ count: Int) throws {
        for _ in 0..<count where !bench.pending.isEmpty && bench.failure == nil {
            try bench.performOne(anyOrder: random.chance(50))
            look()
        }
    }
    func change() {
        sequence += 1
        let isResync = random.chance(30)
        let layer = isResync ? names[random.below(names.count)] : 0
        let block = UInt64(random.below(Self.regions) * 256 + random.below(4))
        if random.chance(60) {
            bench.write(
                ReplicaBench.pattern(UInt64(random.below(1000))), at: block * 4096, epoch: epoch,
                sequence: sequence, flags: isResync ? FrameFlags.resync : 0, layer: layer)
        } else {
            let state = isResync && random.chance(50) ? BlockState.absent : .zero
            bench.send(
                .setState, epoch: epoch, offset: block * 4096, length: 4096, sequence: sequence,
                auxiliary: UInt64(state.rawValue), flags: isResync ? FrameFlags.resync : 0,
                layer: layer)
        }
    }
    func install() throws {
        let before = epoch
        if random.chance(40), names.count < 5 { layersMade += 1 }
        if random.chance(40), names.count > 1 {
            bench.deleted.insert(names[random.below(names.count - 1)])
        }
        // What a deleted name was told of is its heir's.
        for (which, birth) in told where bench.deleted.contains(which.layer.rawValue) {
            guard let heir = names.first(where: { $0 > which.layer.rawValue }) else { continue }
            let key = LayerRegion(LayerID(rawValue: heir), which.region)
            told[key] = max(told[key] ?? 0, birth)
            told[which] = nil
        }
        let tag = bench.install(epoch: before + 1, layers: Int(layersMade))
        var rounds = 0
        while bench.reply(tag) == nil, bench.failure == nil, rounds < 5000 {
            rounds += 1
            if bench.pending.isEmpty { bench.step(.tick) }
            try perform(1)
        }
        epoch = before + 1
        look()
    }
    func crash() throws {
        bench.fault = nil
        if random.chance(50) {
            try perform(random.below(3))
        }
        if random.chance(40) {
            boot += 1
            bench.disk.cutPower(&random, keepPercent: [0, 50, 90][random.below(3)])
        }
        try bench.reopen(boot: boot)
        try attach()
    }
    func run(_ steps: Int) throws {
        for _ in 0..<steps where bench.failure == nil {
            if mayFail { fail() }
            switch random.below(100) {
            case ..<30: change()
            case ..<45:
                sequence += 1
                flushes[bench.send(.flush, epoch: epoch, sequence: sequence)] = sequence
            case ..<60: ask()
            case ..<75:
                bench.now = bench.now.adding(milliseconds: random.chance(50) ? 20_000 : 100)
                bench.step(.tick)
            case ..<85: try perform(1000)
            case ..<93: try install()
            case ..<96: try crash()
            default: break
            }
            look()
            try perform(random.below(12))
        }
    }
    private func fail() {
        bench.fault = { [self] action in
            guard
                case .write(.table(let layer), let offset, let length, let buffer, let at, _) =
                    action, length == TablePage.size, random.chance(20)
            else { return nil }
            if random.chance(50) {
                try? bench.disk.write(
                    .table(layer), offset: offset,
                    from: bench.pool.memory(buffer).slice(at, length))
            }
            return -5
        }
    }
}

@Suite struct ReplicaToldBirthTests {
    /// A region that was merged downwards was told to be as young as what was left of it in the
    /// upper layer, an empty page that leaves with its files. Here the lower layer's page has
    /// drained, the upper one's is in the log yet when an Install raises its birth. An engine
    /// that fills this copy and finds the region equal does not stamp it, and the copy, a member by
    /// then, keeps the region from whoever lacks what was written in between.
    @Test func whatIsToldOfAnAbsorbedRegionIsKept() throws {
        let (bench, _) = try ReplicaBench.threeLayers(regions: 2)
        bench.deleted = [1]
        try bench.installNext()
        // The upper layer's page does not get to the disk; all else goes its way.
        bench.fault = { action in
            if case .write(.table(LayerID(rawValue: 2)), _, _, _, _, _) = action { -5 } else { nil }
        }
        for round in 0..<8 as Range<UInt64> {
            try bench.flush(500 + round)
            try bench.tick(milliseconds: 20_000)
        }
        #expect(bench.core.chain.isAbsorbed(1, 0))
        try bench.installNext()
        let told = try bench.birth(layer: 2)
        bench.fault = nil
        try bench.settle()
        #expect(bench.core.layerFiles.map(\.rawValue) == [1, 3])
        let kept = try bench.birth(layer: 2)
        #expect(kept >= told)
        try bench.reopen()
        _ = try bench.attach(epoch: bench.core.promise.rawValue + 1)
        #expect(try bench.birth(layer: 2) >= told)
    }

    /// Seeds 260 and 369 showed the defect above. With the digest mended alone, 88, 232, 900, 1094
    /// and 1362 showed that neither of the two layers speaks for a region that went both ways.
    @Test(arguments: [false, true])
    func noBirthGetsOlder(mayFail: Bool) throws {
        for seed in Array(80...100) + Array(225...270) + [369, 900, 1094, 1362] as [UInt64] {
            let world = try BirthWorld(seed: seed, mayFail: mayFail)
            try world.run(120)
            #expect(world.bench.failure == nil, "seed \(seed)")
            #expect(world.violations.isEmpty, "seed \(seed): \(world.violations)")
        }
    }
}
