import HapteraCore

/// How a world's volume becomes as large as it is at the end.
struct SimulatedGrowth {
    /// Sizes still to come, bytes, ascending; the last is the workload's.
    var sizes: [UInt64]
    let first: UInt64
    /// Asked for, and not answered yet.
    var asked: (engine: Int, size: UInt64)?
    private let random: RandomSource

    /// A third of the worlds begin smaller. `seed` is the world's: what else it draws stays as it
    /// is. `first`: what it begins with; nil: drawn.
    init(seed: UInt64, size: UInt64, first: UInt64? = nil, mutations: MutationSet) {
        random = RandomSource(seed: RandomSource.mix(seed ^ 0x6772_6f77))
        if let first {
            self.first = first
            sizes = first < size ? [size] : []
            return
        }
        sizes = []
        var first = size
        let isDrawn = random.below(3) == 0
        if isDrawn || !mutations.isDisjoint(with: .rulesOfGrowth) {
            for _ in 0..<random.between(1, 3) where first > 64 * 4096 {
                sizes.insert(first, at: 0)
                let blocks = Int(first) / Geometry.blockSize
                // Often by whole regions.
                let less = random.permille(500) ? random.below(blocks - 32) + 1 : 256
                first = UInt64(max(blocks - less, 16)) * UInt64(Geometry.blockSize)
            }
        }
        self.first = first
    }
    func pause() -> UInt64 { milliseconds(random.between(100, 5000)) }
}

// The volume grows under everything else.
extension World {
    /// Whether clients may ask the engine for it: they know the size it told them.
    func isWithin(_ engine: SimulatedEngine, _ offset: UInt64, _ length: Int) -> Bool {
        offset + UInt64(length) <= max(growth.first, engine.core.size)
    }

    func requestGrowth() {
        guard isChaos, !growth.sizes.isEmpty else { return }
        timeline.schedule(after: growth.pause(), .growth)
        guard let current = currentEngine else { return }
        grow(engines[current])
    }

    func grow(_ engine: SimulatedEngine) {
        if let asked = growth.asked, engines[asked.engine].isRunning { return }
        guard let size = growth.sizes.first, engine.isRunning,
            engine.pausedUntil <= timeline.now, trueHistory == nil
        else { return }
        note("growth to \(size) bytes is asked of \(engine.name)")
        growth.asked = (engine.index, size)
        step(engine, .resize(token: size, size: size))
        deliverDisconnects()
    }

    func resized(_ engine: SimulatedEngine, _ size: UInt64, _ result: ResizeResult) {
        note("\(engine.name): growth to \(size) bytes: \(result)")
        growth.asked = nil
        guard result == .ok || result == .exists || result == .smaller, trueHistory == nil else {
            return
        }
        growth.sizes.removeAll { $0 <= store.record.size }
        coverage.took(.growth)
        check(1, store.record.size >= size, "the record says \(store.record.size) bytes")
        for host in hosts
        where store.record.contains(host) && !host.isRolledBack && host.core != nil
            && host.rot == .none
        {
            check(
                1, host.core?.size == store.record.size,
                "\(host.name) has \(host.core?.size ?? 0) of \(store.record.size) bytes")
        }
    }
}
