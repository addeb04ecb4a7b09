import HapteraCore
import Testing

@testable import HapteraTesting

/// Two volumes on the same disks, and what they are made of.
@Suite struct SecondVolumeTests {
    private let layer = LayerID(rawValue: 1)
    private let data = ReplicaFile.data(LayerID(rawValue: 1))

    /// The layer's files in a directory, and an empty one beside it.
    private func directories(_ seed: UInt64) throws -> (SimulatedDisk, SimulatedDisk) {
        let disk = SimulatedDisk(random: RandomSource(seed: seed))
        try disk.createLayer(layer, size: 1 << 20)
        try disk.syncDirectories()
        return (disk, SimulatedDisk(random: RandomSource(seed: seed + 1000), beside: disk))
    }
    private func write(_ disk: SimulatedDisk, at offset: UInt64, _ value: UInt8) throws {
        let block = MemoryBlock(count: 4096)
        block.memory.fill(value)
        try disk.write(data, offset: offset, from: block.memory)
    }
    private func byte(_ disk: SimulatedDisk, at offset: UInt64) throws -> UInt8 {
        let block = MemoryBlock(count: 512)
        _ = try disk.read(data, offset: offset, into: block.memory)
        return block.memory[0]
    }

    @Test func aFileWithTwoNamesIsOneFile() throws {
        let (first, second) = try directories(1)
        #expect(!first.isLinked && !first.isShared(layer))
        second.link([layer], from: first)
        #expect(first.isLinked(layer) && second.isShared(layer))
        try write(second, at: 4096, 7)
        #expect(try byte(first, at: 4096) == 7)
        // A copy from a backup is another file.
        first.restore(first.backup())
        #expect(!first.isLinked(layer) && !second.isShared(layer))
        try write(second, at: 4096, 8)
        #expect(try byte(first, at: 4096) == 7)
        second.delete()
        #expect(throws: StorageError.self) { try second.size(data) }
        #expect(first.neighbour == nil)
    }

    /// The second name is there or not, and never without the file's bytes.
    @Test func aPowerCutMayTakeTheSecondName() throws {
        var found = 0
        for seed in 0..<60 as Range<UInt64> {
            let (first, second) = try directories(seed)
            try write(first, at: 0, 5)
            try first.sync(data)
            second.link([layer], from: first)
            // Of either directory: it is one host.
            (seed % 2 == 0 ? first : second).cutPower()
            #expect(try byte(first, at: 0) == 5)
            guard second.file(data) != nil else { continue }
            found += 1
            #expect(try byte(second, at: 0) == 5)
        }
        #expect(5...55 ~= found)
    }

    /// What one volume has asked for is torn by the power cut of the other.
    @Test func aPowerCutStrikesBothDirectories() throws {
        var lost = 0
        for seed in 0..<60 as Range<UInt64> {
            let (first, second) = try directories(seed)
            try second.createLayer(LayerID(rawValue: 2), size: 1 << 20)
            try second.syncDirectories()
            let block = MemoryBlock(count: 4096)
            block.memory.fill(3)
            try second.write(.data(LayerID(rawValue: 2)), offset: 0, from: block.memory)
            first.cutPower()
            let left = try #require(second.file(.data(LayerID(rawValue: 2))))
            if left.current[0] != 3 { lost += 1 }
        }
        #expect(5...55 ~= lost)
    }

    /// Values of the two volumes are never taken for each other.
    @Test func contentsAreOfOneVolume() {
        let source = Contents()
        let clone = Contents(inherited: [41: 1, 45: 2], from: source)
        let next = Contents(inherited: [2: 1, 46: 2], from: clone)
        let block = MemoryBlock(count: Content.sectorSize)
        source.fill(block.memory, value: 45, sector: 9)
        #expect(source.value(in: block.memory, sector: 9) == 45)
        #expect(clone.value(in: block.memory, sector: 9) == 2)
        #expect(next.value(in: block.memory, sector: 9) == 1)
        source.fill(block.memory, value: 46, sector: 9)
        #expect(clone.value(in: block.memory, sector: 9) == Content.garbage)
        clone.fill(block.memory, value: 46, sector: 9)
        #expect(clone.value(in: block.memory, sector: 9) == 46)
        #expect(source.value(in: block.memory, sector: 9) > 1 << 32)
        #expect(next.value(in: block.memory, sector: 9) == 2)
        next.fill(block.memory, value: 46, sector: 9)
        #expect(next.value(in: block.memory, sector: 9) == 46)
        #expect(clone.value(in: block.memory, sector: 9) == Content.garbage)
        clone.fill(block.memory, value: 0, sector: 9)
        #expect(block.memory.isZero)
        #expect(clone.value(in: block.memory, sector: 9) == 0)
    }

    /// Each of the two is deleted in some world, and the other is whole without it.
    @Test func eitherVolumeOutlivesTheOther() {
        var coverage = Coverage()
        for seed in 1...80 as ClosedRange<UInt64> {
            var options = SimulationOptions()
            options.steps = 3000
            let outcome = simulate(seed: seed, options: options)
            #expect(outcome.failure == nil, "seed \(seed): \(outcome.failure?.what ?? "")")
            coverage.add(outcome.coverage)
            if coverage.count(.sourceDeleted) > 1, coverage.count(.cloneDeleted) > 1 { break }
        }
        #expect(coverage.count(.second) > 1)
        #expect(coverage.count(.sourceDeleted) > 1)
        #expect(coverage.count(.cloneDeleted) > 1)
    }

    /// What outlives its source is cloned in its turn, and either of the two deleted.
    @Test func aCloneIsCloned() {
        for seed in 1...200 as ClosedRange<UInt64> {
            var options = SimulationOptions()
            options.steps = 3000
            options.clonesClones = true
            let outcome = simulate(seed: seed, options: options)
            #expect(outcome.failure == nil, "seed \(seed): \(outcome.failure?.what ?? "")")
            if outcome.coverage.count(.third) > 0 { return }
        }
        Issue.record("no clone was cloned")
    }

    /// A copy that does not look at its files' names when it is opened changes the other volume's.
    /// (In some worlds it is first noticed that it counts them as its own.)
    @Test func whoForgetsThatLayersAreSharedIsCaught() {
        for seed in 1...60 as ClosedRange<UInt64> {
            var options = SimulationOptions()
            options.mutations = .sharedIsForgotten
            let failure = simulate(seed: seed, options: options).failure
            if failure?.what.contains("invariant 35") == true { return }
        }
        Issue.record("nobody noticed")
    }
}
