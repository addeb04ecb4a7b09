import HapteraCore

package struct CrashReplayOptions: Sendable {
    /// Crash images to make and open.
    package var images = 2000
    package var mutations = MutationSet()
    package init() {}
}

package struct CrashReplayOutcome: Equatable, Sendable {
    package var images = 0
    package var failure: String?
    /// Events (writes, stores, landings, syncs) that could have been the last before a crash.
    package var events = 0
    package var crashes = 0
}

/// A real replica core over a recorded disk, with an engine that keeps it busy. After every change
/// of what the disk holds, what a crash at that moment could leave is built, opened by the real
/// core, and compared with what was promised. Now and then the crash happens, and work goes on from
/// what it left. Everything comes from one seed.
package final class CrashReplay {
    /// What a run does most.
    enum Profile: Int, CaseIterable {
        case mixed
        /// Installs, settling, shutdowns.
        case manifest
        /// Many records: the log turns over.
        case wrap
        /// Regions that come and go.
        case drain
        /// A disk that is full now and then.
        case full
        /// Trims, and space given back.
        case punch
        /// Snapshots taken and deleted.
        case layers
    }
    let options: CrashReplayOptions
    let random: RandomSource
    let profile: Profile
    let disk = CrashDisk()
    var oracle = CrashOracle()
    var outcome = CrashReplayOutcome()
    var host: CrashHost?
    private let samplePermille: Int

    // Work.
    var pending: [ReplicaAction] = []
    var identities: [UInt64: (file: ReplicaFile, id: Int)] = [:]
    var replies: [UInt64: CrashHost.Reply] = [:]
    var sequence: UInt64 = 0
    var writes: [UInt64: CrashWrite] = [:]
    var flushTags: [UInt64: Int] = [:]
    var now = Instant(rawValue: 1_000_000_000)
    var boot: UInt64 = 1
    /// The power failed, and nobody has looked yet at what is left.
    var isUnsurveyed = false
    var isFull = false
    /// On their way into the core: it may answer within the step.
    var nextWrite: CrashWrite?
    var nextFlush: Int?
    var wantsSettled = false
    /// Blocks of writes that failed.
    var unsettled: Set<Int> = []

    init(seed: UInt64, options: CrashReplayOptions) {
        self.options = options
        random = RandomSource(seed: RandomSource.mix(seed))
        profile = Profile(rawValue: Int(seed % UInt64(Profile.allCases.count))) ?? .mixed
        // So that a small number of images is spread over several lives, too.
        samplePermille = max(20, min(1000, options.images / 6))
    }

    package static func run(seed: UInt64, options: CrashReplayOptions) -> CrashReplayOutcome {
        let replay = CrashReplay(seed: seed, options: options)
        replay.begin()
        return replay.outcome
    }

    var isOver: Bool { outcome.failure != nil || outcome.images >= options.images }
    func fail(_ text: String) {
        if outcome.failure == nil { outcome.failure = "event \(outcome.events): \(text)" }
    }

    private func begin() {
        disk.onChange = { [unowned self] in changed() }
        defer {
            disk.onChange = {}
            host = nil
        }
        do throws(StorageError) {
            try ReplicaCore.create(
                storage: disk, identity: CrashHost.identity, logCapacity: CrashDisk.records)
            oracle.isCreated = true
            while !isOver {
                try live()
                guard !isOver else { return }
                try crash()
            }
        } catch { fail(error.message) }
    }

    // MARK: images

    /// Something that a crash may leave or take has changed.
    private func changed() {
        outcome.events += 1
        guard !isOver, random.permille(samplePermille) else { return }
        sample()
    }

    /// The images of this moment.
    func sample() {
        let files = disk.order.count
        let dirty = disk.order.indices.filter {
            !(disk.files[disk.order[$0]]?.writes ?? []).isEmpty
        }
        if oracle.isCreated {
            examine(Array(repeating: .everything, count: files), isPower: isUnsurveyed)
        }
        // Each file kept whole or not at all: the order between files.
        let isWhole = random.permille(250)
        for choice in 0..<(isWhole ? 1 << dirty.count : 1) {
            var keep = Array(repeating: CrashKeep.nothing, count: files)
            for (bit, file) in dirty.enumerated() where choice >> bit & 1 == 1 {
                keep[file] = .everything
            }
            examine(keep, isPower: true)
        }
        for _ in 0..<2 {
            examine(randomKeep(), isPower: true)
        }
    }
    private func randomKeep() -> [CrashKeep] {
        let chances = [50, 300, 500, 500, 700, 950]
        let common = random.pick(chances)
        return disk.order.map { _ in
            switch random.below(10) {
            case 0: .nothing
            case 1: .everything
            case 2, 3, 4: .some(permille: random.pick(chances))
            default: .some(permille: common)
            }
        }
    }
    private func examine(_ keep: [CrashKeep], isPower: Bool) {
        guard !isOver else { return }
        outcome.images += 1
        let image = CrashImage(disk, keep: keep, random)
        let judge = CrashJudge(
            oracle: oracle, isPower: isPower, boot: isPower ? random.next() | 1 : boot,
            random: random, mutations: options.mutations)
        let wrong = judge.examine(image)
        image.discard()
        guard let wrong else { return }
        let kept = zip(disk.order, keep).map { "\($0): \($1)" }.joined(separator: ", ")
        fail("\(isPower ? "power cut" : "kill"), image \(outcome.images) [\(kept)]: \(wrong)")
    }

    // MARK: lives

    /// A process from its start to its end.
    private func live() throws(StorageError) {
        let host = try CrashHost(
            opening: disk, instance: random.next() | 1, boot: boot, mutations: options.mutations,
            limits: .init(small: 300, medium: 48, large: 8))
        self.host = host
        host.now = now
        host.stepped = { [unowned self] in disk.noteStores() }
        host.perform = { [unowned self] in submit($0) }
        host.replied = { [unowned self] in take($0) }
        try install()
        guard !isOver else { return }
        try work(random.between(150, 500))
        guard !isOver, random.permille(profile == .manifest ? 600 : 200) else { return }
        try finishWrites()
        if random.permille(700) { try settle() }
        // There are images enough: what is not answered yet would be refused.
        guard !isOver else { return }
        host.beginShutdown()
        for _ in 0..<2000 where !isOver && !host.core.isShutDown {
            if pending.isEmpty { advance(milliseconds: 100) } else { try performOne() }
        }
        if !isOver, !host.core.isShutDown, host.failure == nil { fail("does not shut down") }
    }

    private func crash() throws(StorageError) {
        outcome.crashes += 1
        if let host { now = host.now }
        pending = []
        identities = [:]
        replies = [:]
        writes = [:]
        flushTags = [:]
        unsettled = []
        isFull = false
        guard random.permille(600) else {
            disk.endProcess()
            host = nil
            return
        }
        disk.noteStores()
        host = nil
        boot = random.next() | 1
        let keep =
            random.permille(200)
            ? Array(repeating: CrashKeep.nothing, count: disk.order.count) : randomKeep()
        disk.become(CrashImage(disk, keep: keep, random))
        isUnsurveyed = true
        for index in oracle.flushes.indices { oracle.flushes[index].versions = [] }
    }
}
