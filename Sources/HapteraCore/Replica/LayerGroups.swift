/// A layer of the record with the retired ones whose heir it is, and how many of their blocks are
/// hidden: what docs/snapshots.md calls exclusive and reclaimable is made of these counts.
///
/// Counted are blocks with data, 64 regions at a time (`ReplicaCore+Space`). In memory that is two
/// bytes and a bit per 64 regions and layer, 34 KiB per TiB; with retired ones 32 bytes more.
final class LayerGroup {
    /// Another group that was made right over this one: the layers of a volume that was reverted
    /// are a tree.
    struct Cover {
        var name: LayerID
        var files: [LayerID]
        /// By 64 regions: blocks that are seen through this group and not through both, so that
        /// they go when the two become one.
        fileprivate(set) var hidden: FixedArray<UInt16>
        fileprivate(set) var total: UInt64 = 0
    }
    /// Blocks of retired layers that the ones above them in the group hide.
    struct Rest: BitwiseCopyable {
        /// They go when the layers are merged.
        var unmerged: UInt32 = 0
        /// They stay for as long as another copy shares a layer.
        var stuck: UInt32 = 0
        /// Blocks that show, of the layer that may stay below the head and of those above it.
        var kept: UInt32 = 0
        var above: UInt32 = 0
        /// Blocks of that layer that take space and are hidden; a bit for each of their regions.
        var hidden: UInt32 = 0
        var hiddenRegions: UInt64 = 0

        fileprivate var isEmpty: Bool { unmerged | stuck | kept | above | hidden == 0 }
    }
    /// The record's for the layer.
    let name: LayerID
    /// The numbers of their files, the uppermost first.
    let files: [LayerID]
    /// How many, from the top, are to become one: those above the first that is shared.
    let mergingCount: Int
    fileprivate(set) var covers: [Cover]
    /// Nil: there are no retired ones.
    private var rests: FixedArray<Rest>?
    private(set) var unmerged: UInt64 = 0
    private(set) var stuck: UInt64 = 0
    /// The layer that may stay below the head (`LayerChain.candidate`), which was counted as such.
    let weighed: LayerID?
    private(set) var kept: UInt64 = 0
    private(set) var above: UInt64 = 0
    /// As counted, or fewer: a region's are taken off when its turn was.
    private(set) var hiddenBlocks: UInt64 = 0
    /// Passes one after the other that could not read all of it. One read may fail for a moment.
    var unsoundPasses = 0
    static let unsoundPassesMax = 3
    /// Counted since the layers of the group are these: may lag behind what they hold.
    var isKnown: Bool
    /// A bit per 64 regions: what was counted may not be true any more.
    private var stale: FixedArray<UInt64>
    private(set) var staleCount = 0
    private let wordCount: Int

    /// Where the layers are in the chain, and those right over them.
    fileprivate var places: [Int] = []
    fileprivate var placesOver: [Int] = []

    /// What one that is made anew has to do with `before`, of the same name, it takes over.
    fileprivate init(_ shape: LayerGroups.Shape, before: LayerGroup?, in chain: LayerChain) {
        name = shape.name
        files = shape.places.map(chain.id)
        mergingCount = shape.mergingCount
        weighed = shape.weighed
        wordCount = chain.wordCount
        stale = FixedArray(repeating: 0, count: (chain.wordCount + 63) / 64)
        isKnown = before?.isKnown ?? true
        // Of another shape: it gets a pass of its own.
        unsoundPasses = min(before?.unsoundPasses ?? 0, Self.unsoundPassesMax - 1)
        let words = chain.wordCount
        // The one that was there before may have been deleted, and this one be its heir.
        let isOnly = shape.covers.count == 1 && before?.covers.count == 1
        let sources = shape.covers.map { cover in
            before?.covers.first { $0.name == cover.name } ?? (isOnly ? before?.covers[0] : nil)
        }
        covers = zip(shape.covers, sources).map { cover, source in
            let hidden =
                source?.hidden.extended(to: words, with: 0)
                ?? FixedArray(repeating: 0, count: words)
            return Cover(
                name: cover.name, files: cover.places.map(chain.id), hidden: hidden,
                total: source?.total ?? 0)
        }
        if files.count > 1 {
            rests =
                before?.rests?.extended(to: words, with: Rest())
                ?? FixedArray(repeating: Rest(), count: words)
            unmerged = before?.unmerged ?? 0
            stuck = before?.stuck ?? 0
            kept = before?.kept ?? 0
            above = before?.above ?? 0
            hiddenBlocks = before?.hiddenBlocks ?? 0
        }
        take(shape)
        markChanged(since: before, sources, in: chain)
    }
    fileprivate func take(_ shape: LayerGroups.Shape) {
        places = shape.places
        placesOver = shape.covers.flatMap(\.places)
    }

    /// Only where a layer that has come or gone holds something can a count have changed.
    private func markChanged(
        since before: LayerGroup?, _ sources: [Cover?], in chain: LayerChain
    ) {
        guard let before else {
            for word in 0..<wordCount
            where held(places, word, chain) != 0 && interest(word, in: chain) != 0 {
                isKnown = false
                markStale(word)
            }
            return
        }
        let ownChanged = Difference(files, before.files, in: chain)
        let coverChanged = zip(covers, sources).map {
            Difference($0.files, $1?.files ?? [], in: chain)
        }
        // What is stuck is not counted with the rest: where it begins decides everywhere.
        let isOther =
            weighed != before.weighed
            || !(isAllCounted && before.isAllCounted)
                && (files != before.files || mergingCount != before.mergingCount)
        for word in 0..<wordCount {
            let held = held(places, word, chain)
            let isChanged =
                ownChanged.holds(word, chain)
                || held != 0 && (isOther || coverChanged.contains { $0.holds(word, chain) })
            if isChanged, interest(word, in: chain) != 0 || isCounted(word) {
                isKnown = false
                markStale(word)
            } else if word < before.wordCount, before.isStale(word) {
                markStale(word)
            }
        }
    }
    /// Alone, a layer is counted as if nobody shared it: while somebody does, nobody asks.
    fileprivate var isAllCounted: Bool { files.count == 1 || mergingCount == files.count }
    /// Something is counted of the word that may have to go.
    private func isCounted(_ word: Int) -> Bool {
        covers.contains { $0.hidden[word] != 0 }
            || rests.map { !$0[word].isEmpty } ?? false
    }
    private func held(_ places: [Int], _ word: Int, _ chain: LayerChain) -> UInt64 {
        var held: UInt64 = 0
        for place in places { held |= chain.held(place, word) }
        return held
    }
    /// Regions of the word in which anything can be hidden.
    func interest(_ word: Int, in chain: LayerChain) -> UInt64 {
        let own = held(places, word, chain)
        guard own != 0 else { return 0 }
        return files.count > 1 ? own : own & held(placesOver, word, chain)
    }

    /// Layers that are in one of two lists only. Of one that has left the chain nothing was left;
    /// one that belongs to none any more is taken for what it was.
    private struct Difference {
        private var places: [Int] = []
        private var discarded: [Int] = []

        init(_ now: [LayerID], _ before: [LayerID], in chain: LayerChain) {
            guard now != before else { return }
            for file in Set(now).symmetricDifference(before) {
                guard let place = chain.index(of: file) else { continue }
                if chain.heirPlace(place) == nil {
                    discarded.append(place)
                } else {
                    places.append(place)
                }
            }
        }
        func holds(_ word: Int, _ chain: LayerChain) -> Bool {
            places.contains { chain.held($0, word) != 0 }
                || discarded.contains { chain.pages($0, word) != 0 }
        }
    }

    fileprivate func isAs(_ shape: LayerGroups.Shape, in chain: LayerChain) -> Bool {
        wordCount == chain.wordCount && files == shape.places.map(chain.id)
            && (files.count == 1 || mergingCount == shape.mergingCount)
            && weighed == shape.weighed && covers.count == shape.covers.count
            && zip(covers, shape.covers).allSatisfy {
                $0.name == $1.name && $0.files == $1.places.map(chain.id)
            }
    }

    /// Layers of `covers`.
    var coverFilesCount: Int { placesOver.count }

    // MARK: counts

    private func isStale(_ word: Int) -> Bool { stale[word / 64] >> UInt64(word % 64) & 1 != 0 }
    func markStale(_ word: Int) {
        guard !isStale(word) else { return }
        stale[word / 64] |= 1 << UInt64(word % 64)
        staleCount += 1
    }
    func clearStale(_ word: Int) {
        guard isStale(word) else { return }
        stale[word / 64] &= ~(1 << UInt64(word % 64))
        staleCount -= 1
    }
    /// The first word, at `start` or later, that has to be counted.
    func nextStale(from start: Int) -> Int? {
        guard staleCount > 0 else { return nil }
        var at = start / 64
        var mask = ~UInt64(0) << UInt64(start % 64)
        while at < stale.count {
            let left = stale[at] & mask
            if left != 0 { return at * 64 + left.trailingZeroBitCount }
            mask = ~0
            at += 1
        }
        return nil
    }
    func set(_ word: Int, hidden: (UInt16, UInt16), _ rest: Rest) {
        for index in covers.indices {
            let now = index == 0 ? hidden.0 : hidden.1
            let before = covers[index].hidden[word]
            covers[index].total = covers[index].total - UInt64(before) + UInt64(now)
            covers[index].hidden[word] = now
        }
        guard let rests else { return }
        unmerged = unmerged - UInt64(rests[word].unmerged) + UInt64(rest.unmerged)
        stuck = stuck - UInt64(rests[word].stuck) + UInt64(rest.stuck)
        kept = kept - UInt64(rests[word].kept) + UInt64(rest.kept)
        above = above - UInt64(rests[word].above) + UInt64(rest.above)
        hiddenBlocks = hiddenBlocks - UInt64(rests[word].hidden) + UInt64(rest.hidden)
        rests[word] = rest
    }

    // MARK: what is hidden of the layer that stays

    /// The first region, at `start` or later, of which something was hidden when it was counted.
    func nextHidden(from start: UInt64) -> UInt64? {
        guard let rests, hiddenBlocks > 0 else { return nil }
        var word = Int(start / 64)
        var mask = ~UInt64(0) << (start % 64)
        while word < rests.count {
            let left = rests[word].hiddenRegions & mask
            if left != 0 { return UInt64(word * 64 + left.trailingZeroBitCount) }
            mask = ~0
            word += 1
        }
        return nil
    }
    func clearHidden(_ region: UInt64) {
        let (word, bit) = (Int(region / 64), 1 << (region % 64) as UInt64)
        guard let rests, word < rests.count, rests[word].hiddenRegions & bit != 0 else { return }
        // Which of the word's blocks were this region's is not known.
        let regions = UInt32(rests[word].hiddenRegions.nonzeroBitCount)
        let gone = regions == 1 ? rests[word].hidden : rests[word].hidden / regions
        rests[word].hiddenRegions &= ~bit
        rests[word].hidden -= gone
        hiddenBlocks -= UInt64(gone)
    }
}

/// The groups of a chain, each in the place of the layer that it is named after.
struct LayerGroups {
    /// More groups right over one are not counted: its snapshot's deletion gives nothing back.
    static let coversMax = 2

    fileprivate struct Shape {
        var name: LayerID
        /// The uppermost first.
        var places: [Int]
        var mergingCount: Int
        var weighed: LayerID?
        var covers: [(name: LayerID, places: [Int])] = []
    }

    /// By place; nil: the layer is retired.
    private(set) var groups: [LayerGroup?] = []
    private var revision: UInt64 = .max
    /// By place: of the group that the layer is of; of the group, of the one right below; -1: none.
    private var owners: [Int] = []
    private var below: [Int] = []

    /// How many groups lie right over the one at `place`, and one of them.
    private(set) var overCounts: [Int] = []
    func isCurrent(_ chain: LayerChain) -> Bool { revision == chain.revision }
    func below(_ place: Int) -> Int? { below[place] < 0 ? nil : below[place] }
    var head: LayerGroup? { groups.last ?? nil }

    /// Layers have come, gone, or are shared, or are not any more.
    mutating func follow(_ chain: LayerChain) {
        var shapes = shapes(of: chain)
        revision = chain.revision
        overCounts = [Int](repeating: 0, count: chain.count)
        for place in shapes.indices where below[place] >= 0 { overCounts[below[place]] += 1 }
        for place in shapes.indices {
            guard below[place] >= 0, overCounts[below[place]] <= Self.coversMax,
                let shape = shapes[place]
            else { continue }
            shapes[below[place]]?.covers.append((shape.name, shape.places))
        }
        var before: [LayerID: LayerGroup] = [:]
        for case .some(let group) in groups { before[group.name] = group }
        groups = shapes.map { shape in
            guard let shape else { return nil }
            if let same = before[shape.name], same.isAs(shape, in: chain) {
                same.take(shape)
                return same
            }
            return LayerGroup(shape, before: before[shape.name], in: chain)
        }
    }

    private mutating func shapes(of chain: LayerChain) -> [Shape?] {
        owners = (0..<chain.count).map { chain.heirPlace($0) ?? -1 }
        below = [Int](repeating: -1, count: chain.count)
        return (0..<chain.count).map { place in
            guard !chain.isRetired(place) else { return nil }
            var places = [place]
            var next = chain.below(place)
            while next >= 0, chain.isRetired(next), owners[next] == place {
                places.append(next)
                next = chain.below(next)
            }
            below[place] = next < 0 ? -1 : owners[next]
            return Shape(
                name: chain.name(place), places: places,
                mergingCount: places.prefix { !chain.isShared($0) }.count,
                weighed: place == chain.count - 1 ? chain.candidate : nil)
        }
    }

    /// What the layer at `place` holds of the region has changed.
    func markStale(_ place: Int, _ region: UInt64) {
        let owner = owners[place]
        guard owner >= 0 else { return }
        let word = Int(region / 64)
        groups[owner]?.markStale(word)
        if below[owner] >= 0 { groups[below[owner]]?.markStale(word) }
    }
    /// The first group of that name or a later one.
    func next(from name: LayerID) -> LayerGroup? {
        for case .some(let group) in groups where group.name >= name { return group }
        return nil
    }
    func group(named name: LayerID) -> LayerGroup? {
        for case .some(let group) in groups where group.name == name { return group }
        return nil
    }
}
