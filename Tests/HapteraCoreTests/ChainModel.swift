import Testing

@testable import HapteraCore

/// Random work on three regions of eight blocks each, and what every layer left must show.
final class ChainModel {
    let bench: ReplicaBench
    /// The pattern of each block, zero if it reads zero, by layer.
    private(set) var views: [UInt32: [UInt64]] = [1: [UInt64](repeating: 0, count: 24)]
    /// The blocks that each layer holds, trimmed ones included. Those of `views`, and such as two
    /// of them were made over.
    private(set) var held: [UInt32: Set<Int>] = [1: []]
    /// What each layer ever made was made over; 0: nothing.
    private var parents: [UInt32: UInt32] = [1: 0]
    private(set) var deletions = 0
    private(set) var reverts = 0
    private(set) var clones: [Clone] = []
    private(set) var clonesMade = 0
    private var head: UInt32 = 1
    private var epoch: UInt64 = 1
    private var sequence: UInt64 = 1

    private let deletes: Bool
    private let isTree: Bool
    private let isCloned: Bool
    /// Installs that the copy has missed.
    private var missed = 0

    /// `isTree`: with reverts, and now and then with several changes in one Install, as for a
    /// replica that was away. `isCloned`: clones come and go.
    init(seed: UInt64, deletes: Bool = true, isTree: Bool = false, isCloned: Bool = false) throws {
        self.isCloned = isCloned
        self.deletes = deletes
        self.isTree = isTree
        var options = ReplicaBench.options()
        // What is larger than a fifth of what the head has stays below it.
        if seed % 2 == 0 { (options.stayingBlocksMin, options.risingPercent) = (0, 20) }
        bench = try ReplicaBench(options: options, seed: seed)
        if isTree { bench.lineage = bench.record(epoch: 1) }
        _ = try bench.attach()
    }

    func act(_ step: Int) throws {
        if isCloned, missed == 0, bench.random.below(12) == 0 { return try changeClones() }
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
            held[head]?.formUnion(first..<first + length)
        case 8..<11:
            bench.send(
                .setState, epoch: epoch, offset: place, length: length * 4096,
                sequence: sequence, auxiliary: 2)
            for index in 0..<length { views[head]?[first + index] = 0 }
            held[head]?.formUnion(first..<first + length)
        case 11..<13:
            bench.send(.flush, epoch: epoch, sequence: sequence)
            bench.send(.stable, epoch: epoch, sequence: sequence, auxiliary: epoch)
        case 13: try bench.tick(milliseconds: 20_000)
        case 14: try bench.tick()
        case 15..<(deletes ? 17 : 19) where views.count < (deletes ? 7 : 9):
            makeHead()
        case 17..<19 where deletes:
            guard let victim = views.keys.filter({ $0 != head }).sorted().randomElement(bench)
            else { return }
            deletions += 1
            views[victim] = nil
            collapse()
            bench.deleted.insert(victim)
            bench.lineage?.deleteSnapshot(of: LayerID(rawValue: victim))
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
    /// Over the head, or over what the volume goes back to.
    private func makeHead() {
        var target = head
        if isTree, bench.random.below(5) < 3,
            let back = views.keys.filter({ $0 != head }).sorted().randomElement(bench)
        {
            target = back
            reverts += 1
        }
        bench.lineage?.freezeHead(
            "s\(head)", created: 1, target: target == head ? nil : LayerID(rawValue: target))
        head += 1
        parents[head] = target
        views[head] = views[target]
        held[head] = []
        install()
    }
    /// From the layer down, as far as they are left.
    private func path(_ layer: UInt32) -> [UInt32] {
        var path: [UInt32] = []
        var next = layer
        while next > 0 {
            if held[next] != nil { path.append(next) }
            next = parents[next] ?? 0
        }
        return path
    }
    /// Layers that are no snapshot's go, unless two lines come from them.
    private func collapse() {
        while true {
            var above: [UInt32: [UInt32]] = [:]
            for layer in held.keys {
                if let below = path(layer).dropFirst().first {
                    above[below, default: []].append(layer)
                }
            }
            let unneeded = held.keys.filter {
                views[$0] == nil && above[$0, default: []].count < 2
            }.max()
            guard let unneeded else { return }
            let blocks = held.removeValue(forKey: unneeded) ?? []
            if let heir = above[unneeded]?.first { held[heir]?.formUnion(blocks) }
        }
    }
    private func install() {
        // The head has to be there: it is written to.
        let isNewHead = bench.core.headLayer.rawValue < head
        if isTree, !isNewHead, missed < 3, bench.random.below(2) == 0 {
            missed += 1
            return
        }
        missed = 0
        epoch += 1
        bench.install(epoch: epoch, layers: Int(head))
    }

    /// A copy that shares layers with this one.
    struct Clone {
        var disk: ReplicaTestDisk
        var layer: UInt32
        var view: [UInt64]
    }
    /// One is made, or one goes.
    private func changeClones() throws {
        if clones.count > 2 || (!clones.isEmpty && bench.random.below(2) == 0) {
            return discardClone(bench.random.below(clones.count))
        }
        guard let layer = views.keys.filter({ $0 != head }).sorted().randomElement(bench),
            let view = views[layer], let record = bench.core.installedRecord
        else { return }
        let (disk, _) = try bench.clone(LayerID(rawValue: layer), of: record) {
            self.sequence += 1
            return self.sequence
        }
        clones.append(Clone(disk: disk, layer: layer, view: view))
        clonesMade += 1
    }
    func discardClone(_ index: Int) {
        clones.remove(at: index).disk.discard()
        for layer in bench.core.sharedLayers where !bench.disk.isShared(layer) {
            bench.core.setShared(layer, false)
        }
    }
    /// Each holds what its snapshot did, whatever has become of that.
    func checkClones(_ step: Int) throws {
        for clone in clones {
            let reader = try ReplicaReader(opening: clone.disk)
            for region in 0..<3 as Range<UInt64> {
                try reader.view(region, from: reader.manifest.head) {
                    (block, verdict, bytes) throws(StorageError) in
                    guard block < 8 else { return }
                    let value = clone.view[Int(region) * 8 + block]
                    let expected = value == 0 ? zero(1) : ReplicaBench.pattern(value)
                    #expect(
                        bytes.bytes() == expected && verdict == (value == 0 ? .zero : .intact),
                        "step \(step), clone of layer \(clone.layer), \(region)/\(block)")
                }
            }
        }
        #expect(bench.disk.violations == [], "step \(step)")
    }

    /// Nothing was missed that changes what a copy says of layers that are left.
    var isInstalled: Bool { missed == 0 }
    func installAll() throws {
        missed = 3
        install()
        try bench.run()
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
        Set(path(top)).symmetricDifference(path(base)).reduce(into: []) {
            $0.formUnion(held[$1] ?? [])
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
