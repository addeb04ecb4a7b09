import Testing

@testable import HapteraCore

/// What changed since a snapshot: what the layers above it hold, whatever became of deleted ones.
@Suite struct ReplicaChangedTests {
    @Test(arguments: 1...4 as ClosedRange<UInt64>)
    func everyPairOfLayersIsAsTheModelHasIt(seed: UInt64) throws {
        let model = try ChainModel(seed: seed)
        for step in 0..<100 {
            try model.act(step)
            guard step % 10 == 9 else { continue }
            for (base, top) in model.pairs {
                let tag = model.ask(since: base, in: top)
                try model.bench.run()
                let changed = model.answer(tag)
                #expect(
                    changed == model.changed(since: base, in: top),
                    "step \(step), since \(base) in \(top)")
            }
        }
        #expect(model.deletions > 0)
    }

    /// Asked before what each step does, answered while it happens: nothing that had changed is
    /// left out, and nothing is told that has not changed by then.
    @Test(arguments: 21...26 as ClosedRange<UInt64>)
    func whatIsAskedMeanwhileIsSound(seed: UInt64) throws {
        let model = try ChainModel(seed: seed)
        var answered = 0
        for step in 0..<80 {
            var asked: [(tag: UInt64, base: UInt32, top: UInt32, before: Set<Int>)] = []
            for (base, top) in model.pairs {
                let before = model.changed(since: base, in: top)
                asked.append((model.ask(since: base, in: top), base, top, before))
            }
            try model.act(step)
            try model.bench.run()
            for query in asked {
                // The snapshot may have been deleted meanwhile: asked before, answered before.
                guard let changed = model.answer(query.tag) else { continue }
                answered += 1
                #expect(changed.isSuperset(of: query.before), "step \(step), \(query)")
                let isThere = model.views[query.base] != nil && model.views[query.top] != nil
                let after = model.changed(since: query.base, in: query.top)
                #expect(!isThere || changed.isSubset(of: after), "step \(step), \(query)")
            }
        }
        #expect(answered > 100)
    }

    @Test func aBaseMustBeALayerAtOrBelow() throws {
        let bench = try ReplicaBench()
        _ = try bench.attach()
        for layers in 2...3 { bench.install(epoch: UInt64(layers), layers: layers) }
        try bench.run()
        func status(_ base: UInt64, _ layer: UInt32) throws -> FrameStatus? {
            let tag = bench.send(.status, epoch: 3, length: 4096, auxiliary: base, layer: layer)
            try bench.run()
            return bench.status(tag)
        }
        for (base, layer) in [(1, 0), (2, 0), (3, 0), (1, 2), (2, 2), (1, 1)] as [(UInt64, UInt32)]
        { #expect(try status(base, layer) == .ok) }
        for (base, layer) in [(4, 0), (3, 2), (2, 1), (1 << 32 | 1, 0), (.max, 0)]
            as [(UInt64, UInt32)]
        { #expect(try status(base, layer) == .invalid) }
        // A retired layer is no base any more.
        bench.deleted.insert(2)
        bench.install(epoch: 4, layers: 3)
        try bench.run()
        let tag = bench.send(.status, epoch: 4, length: 4096, auxiliary: 2)
        try bench.run()
        #expect(bench.status(tag) == .invalid && bench.pool.inUse == 0)
    }
}
