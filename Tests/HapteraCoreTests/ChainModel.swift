import Testing

@testable import HapteraCore

/// Random work on three regions of eight blocks each, and what every layer left must show.
final class ChainModel {
    let bench: ReplicaBench
    /// The pattern of each block, zero if it reads zero, by layer.
    private(set) var views: [UInt32: [UInt64]] = [1: [UInt64](repeating: 0, count: 24)]
    /// The blocks that each layer holds, trimmed ones included.
    private var held: [UInt32: Set<Int>] = [:]
    private(set) var deletions = 0
    private var head: UInt32 = 1
    private var epoch: UInt64 = 1
    private var sequence: UInt64 = 1

    private let deletes: Bool

    init(seed: UInt64, deletes: Bool = true) throws {
        self.deletes = deletes
        bench = try ReplicaBench(seed: seed)
        _ = try bench.attach()
    }

    func act(_ step: Int) throws {
        sequence += 1
        let first = bench.random.below(22)
        let length = min(1 + bench.random.below(3), 8 - first % 8)
        let place = UInt64(first / 8 * Geometry.regionSize + first % 8 * 4096)
        switch bench.random.below(20) {
        case 0..<8:
            let value = UInt64(step * 10 + 1)
            bench.write(
                ReplicaBench.pattern(value, blocks: length), at: place, epoch: epoch,
                sequence: sequence)
            for index in 0..<length { views[head]?[first + index] = value + UInt64(index) }
            held[head, default: []].formUnion(first..<first + length)
        case 8..<11:
            bench.send(
                .setState, epoch: epoch, offset: place, length: length * 4096,
                sequence: sequence, auxiliary: 2)
            for index in 0..<length { views[head]?[first + index] = 0 }
            held[head, default: []].formUnion(first..<first + length)
        case 11..<13:
            bench.send(.flush, epoch: epoch, sequence: sequence)
            bench.send(.stable, epoch: epoch, sequence: sequence, auxiliary: epoch)
        case 13: try bench.tick(milliseconds: 20_000)
        case 14: try bench.tick()
        case 15..<(deletes ? 17 : 19) where views.count < (deletes ? 7 : 9):
            let view = views[head]
            head += 1
            views[head] = view
            install()
        case 17..<19 where deletes:
            guard let victim = views.keys.filter({ $0 != head }).sorted().randomElement(bench)
            else { return }
            deletions += 1
            views[victim] = nil
            if let heir = views.keys.filter({ $0 > victim }).min() {
                held[heir, default: []].formUnion(held.removeValue(forKey: victim) ?? [])
            }
            bench.deleted.insert(victim)
            install()
        case 19:
            for _ in 0..<bench.random.below(12) where !bench.pending.isEmpty {
                try bench.performOne(anyOrder: true)
            }
            // What was not answered may be done or not: only with everything done is it known.
            try bench.run()
            try bench.reopen()
            epoch += 1
            _ = try bench.attach(epoch: epoch)
        default: break
        }
        while !bench.pending.isEmpty { try bench.performOne(anyOrder: true) }
        while !bench.core.parked.isEmpty {
            // Under pressure an engine flushes.
            sequence += 1
            bench.send(.flush, epoch: epoch, sequence: sequence)
            try bench.run()
            bench.send(.stable, epoch: epoch, sequence: sequence, auxiliary: epoch)
            try bench.tick()
        }
        let refused = bench.replies.filter { $0.header.status != .ok }.map(\.header)
        #expect(refused.isEmpty && bench.failure == nil, "step \(step)")
    }
    private func install() {
        epoch += 1
        bench.install(epoch: epoch, layers: Int(head))
    }

    /// Every block of every layer left.
    func check(_ step: Int) throws {
        for (layer, view) in views {
            for region in 0..<3 {
                let tag = bench.send(
                    .read, epoch: bench.core.promise.rawValue,
                    offset: UInt64(region * Geometry.regionSize), length: 8 * 4096, layer: layer)
                try bench.run()
                let reply = bench.reply(tag)
                let data = reply?.data.isEmpty == false ? reply?.data : zero(8)
                let wrong = (0..<8).filter { place in
                    let value = view[region * 8 + place]
                    let expected = value == 0 ? zero(1) : ReplicaBench.pattern(value)
                    return data.map { [UInt8]($0[place * 4096..<(place + 1) * 4096]) } != expected
                }
                #expect(
                    reply?.header.status == .ok && wrong == [],
                    "step \(step), layer \(layer), region \(region)")
            }
        }
    }
    /// Pairs of layers left, the lower first; one may be both.
    var pairs: [(base: UInt32, top: UInt32)] {
        views.keys.flatMap { top in
            views.keys.filter { $0 <= top }.map { (base: $0, top: top) }
        }
    }
    /// What a query for all that the layers above `base` hold, up to `top`, must say.
    func changed(since base: UInt32, in top: UInt32) -> Set<Int> {
        held.filter { $0.key > base && $0.key <= top }.values.reduce(into: []) {
            $0.formUnion($1)
        }
    }
    /// Asks for it; `answer` has it when everything was performed.
    func ask(since base: UInt32, in top: UInt32) -> UInt64 {
        bench.send(
            .status, epoch: bench.core.promise.rawValue, length: 3 * Geometry.regionSize,
            auxiliary: UInt64(base), layer: top)
    }
    /// Nil: no answer, because the replica was restarted.
    func answer(_ tag: UInt64) -> Set<Int>? {
        guard let reply = bench.reply(tag) else { return nil }
        let table = MemoryBlock(count: max(reply.table.count, 16))
        table.memory.copy(from: reply.table)
        var changed: Set<Int> = []
        var block = 0
        for at in stride(from: 0, to: reply.table.count, by: 16) {
            let next = block + Int(table.memory.load(UInt64.self, at)) / 4096
            if table.memory.load(UInt64.self, at + 8) != 0 {
                changed.formUnion((block..<next).map { $0 / 256 * 8 + $0 % 256 })
            }
            block = next
        }
        #expect(reply.header.status == .ok && block == 3 * Geometry.blocksPerRegion)
        return changed
    }
    private func zero(_ blocks: Int) -> [UInt8] { [UInt8](repeating: 0, count: blocks * 4096) }
}

extension [UInt32] {
    fileprivate func randomElement(_ bench: ReplicaBench) -> UInt32? {
        isEmpty ? nil : self[bench.random.below(count)]
    }
}
