/// The layers of a copy, ascending; the last is the head, all others are frozen. A block that a
/// layer does not hold is that of the layer below it, which is the next lower one unless the volume
/// was reverted (`LayerTree`); below the lowest, everything reads zero.
///
/// A layer whose snapshot was deleted is retired: the record does not name it any more, and what it
/// holds belongs to the next layer above that is not, its heir. The two count as one, whether a
/// region has been merged (`ReplicaCore+Merge`) or not. One without an heir holds nothing any more.
///
/// A layer has a name, which is the engine's for it, and a number, by which its files, the log and
/// everything here know it. They are the same until a layer is merged downwards: then its name goes
/// over to the lower one, whose number is smaller. Both ascend along the chain.
///
/// A layer whose files are another copy's as well (`ReplicaCore+Sharing`) stays as it is: a retired
/// one that has to do with such a layer is stuck, and is merged when the files are this copy's own.
///
/// Of the retired layers right below the head the largest stays where it is while that is less to
/// move than what lies above it (`staying`): the ones below it go over to it.
///
/// In memory a layer costs a bit per region, a retired one two: 128 KiB per TiB.
struct LayerChain {
    private struct Layer {
        /// A bit per region: 1 if the layer's table or the log may know it.
        var map: FixedArray<UInt64>
        /// Written since the last sync of the file began, perhaps by an earlier process.
        var isDataUnsynced = true
        var isTableUnsynced = true
        /// Retired: a bit per region, 1 if nothing of it is left here.
        var merged: FixedArray<UInt64>?
        /// The place of the layer that it was made over; -1: of none.
        var below = -1
        /// The place of what its content belongs to: its own, its heir's, or -1.
        var heir = -1
        /// Its files are another copy's as well.
        var isShared = false
        /// Retired, and not to be merged at present.
        var isStuck = false
        /// Retired: the layer right above it that is merged into it, being the smaller one: its
        /// heir, or another retired one of the same heir.
        var taken: LayerID?
        var name: LayerID
        /// Regions that its files have room for, at least.
        var room: UInt64
        /// Regions that it may hold anything of, by the record that named it last.
        var extent: UInt64
        /// Merged downwards: a bit per region, 1 if nothing of it is left here.
        var absorbed: FixedArray<UInt64>?
    }
    private(set) var ids: [LayerID] = []
    private var layers: [Layer] = []
    private(set) var retiredCount = 0
    private var regionCount: UInt64
    private(set) var head: LayerID
    /// Counts changes of what layers there are, what lies over what, and what is shared.
    private(set) var revision: UInt64 = 0

    /// `retired`: those of `ids` that are. `names`, `rooms`: of all of them; nil: their numbers,
    /// the whole volume.
    init(
        _ ids: [LayerID], regionCount: UInt64, retired: [LayerID] = [],
        tree: LayerTree = LayerTree(), names: [LayerID]? = nil, rooms: [UInt64]? = nil
    ) {
        self.regionCount = regionCount
        head = .head
        change(tree) { chain in
            for id in ids { chain.append(id) }
            for place in ids.indices {
                chain.layers[place].name = names?[place] ?? ids[place]
                chain.layers[place].room = rooms?[place] ?? regionCount
            }
            for id in retired { chain.retire(id) }
        }
        // What they hold is not known yet: nothing has begun.
        for place in ids.indices {
            layers[place].taken = nil
            layers[place].absorbed = nil
        }
        downCount = 0
    }

    var count: Int { ids.count }
    func id(_ index: Int) -> LayerID { ids[index] }

    /// Layers come and go: what `body` does counts as one change. `record`: by which they have
    /// their sizes.
    mutating func change(
        _ tree: LayerTree, _ record: VolumeRecord? = nil, _ body: (inout LayerChain) -> Void
    ) {
        body(&self)
        if let record {
            for place in ids.indices where !isRetired(place) {
                layers[place].extent = Geometry.regionCount(
                    size: record.size(of: layers[place].name))
            }
        }
        let names = names
        let left = ids.indices.filter { layers[$0].merged == nil }.map { names[$0] }
        for place in ids.indices {
            layers[place].below = tree.below(place, in: names) ?? -1
            guard isRetired(place) else {
                layers[place].heir = place
                continue
            }
            layers[place].heir =
                tree.heir(of: names[place], in: left).flatMap { names.index(ofLayer: $0) } ?? -1
            guard layers[place].heir < 0 else { continue }
            layers[place].merged = FixedArray(repeating: ~0, count: layers[place].map.count)
        }
        decide()
    }

    var names: [LayerID] { layers.map(\.name) }
    func name(_ index: Int) -> LayerID { layers[index].name }
    /// Nil: none of the chain's has that name.
    func place(named name: LayerID) -> Int? {
        if name == head { return count - 1 }
        var (low, high) = (0, count)
        while low < high {
            let middle = (low + high) / 2
            if layers[middle].name < name { low = middle + 1 } else { high = middle }
        }
        return low < count && layers[low].name == name ? low : nil
    }

    /// A new, empty head. As the two that follow: only within `change`.
    mutating func append(_ id: LayerID) {
        precondition(id > head)
        ids.append(id)
        layers.append(
            Layer(
                map: FixedArray(repeating: 0, count: Int((regionCount + 63) / 64)), name: id,
                room: regionCount, extent: regionCount))
        head = id
    }

    /// The volume has this many regions now, not fewer than before.
    mutating func grow(regionCount: UInt64) {
        self.regionCount = regionCount
        revision += 1
        let words = wordCount
        for index in 0..<layers.count where layers[index].map.count < words {
            layers[index].map = layers[index].map.extended(to: words, with: 0)
            layers[index].absorbed = layers[index].absorbed?.extended(to: words, with: 0)
            if let merged = layers[index].merged {
                let isDiscarded = layers[index].heir < 0
                layers[index].merged = merged.extended(to: words, with: isDiscarded ? ~0 : 0)
            }
        }
    }

    // MARK: retired layers

    mutating func retire(_ id: LayerID) {
        let index = existing(id)
        precondition(id < head && layers[index].merged == nil)
        layers[index].merged = FixedArray(repeating: 0, count: layers[index].map.count)
        retiredCount += 1
    }
    /// Nothing of it is left, in files or in memory.
    mutating func remove(_ id: LayerID) {
        let index = existing(id)
        precondition(layers[index].merged != nil)
        // What it held may be in the layer that took it, wherever that goes next.
        if index > 0, layers[index - 1].taken == id {
            layers[index - 1].extent = max(layers[index - 1].extent, layers[index].extent)
        }
        ids.remove(at: index)
        layers.remove(at: index)
        retiredCount -= 1
    }
    /// All that the layer held is in the one below it, which has its name from here on, and is not
    /// retired any more.
    mutating func removeAbsorbed(_ id: LayerID) {
        let index = existing(id)
        precondition(isRetired(index - 1) && !isRetired(index))
        layers[index - 1].name = layers[index].name
        layers[index - 1].merged = nil
        ids.remove(at: index)
        layers.remove(at: index)
        retiredCount -= 1
    }
    func isRetired(_ index: Int) -> Bool { layers[index].merged != nil }
    /// The place of the layer that what this one holds belongs to: its own, if it is not retired;
    /// nil: to none, it was discarded.
    func heirPlace(_ index: Int) -> Int? { layers[index].heir < 0 ? nil : layers[index].heir }
    /// The place of the layer whose blocks are seen through this one's; -1: there is none.
    func below(_ index: Int) -> Int { layers[index].below }
    /// The nearest retired layer of which the one at `index` is heir that still holds something of
    /// the region.
    func unmerged(under index: Int, _ region: UInt64) -> Int? {
        guard retiredCount > 0 else { return nil }
        var lower = below(index)
        while lower >= 0, isRetired(lower) {
            if mayHold(lower, region) { return lower }
            lower = below(lower)
        }
        return nil
    }
    func markMerged(_ id: LayerID, _ region: UInt64) {
        layers[existing(id)].merged?[Int(region / 64)] |= 1 << (region % 64)
    }
    /// The first region, at `start` or later, that a retired layer may still hold something of.
    func nextUnmerged(_ index: Int, from start: UInt64) -> UInt64? {
        guard let merged = layers[index].merged else { return nil }
        return next(in: layers[index].map, without: merged, from: start)
    }
    private func next(
        in map: FixedArray<UInt64>, without gone: FixedArray<UInt64>, from start: UInt64
    ) -> UInt64? {
        var word = Int(start / 64)
        var mask = ~UInt64(0) << (start % 64)
        while word < gone.count {
            let left = map[word] & ~gone[word] & mask
            if left != 0 { return UInt64(word * 64 + left.trailingZeroBitCount) }
            mask = ~0
            word += 1
        }
        return nil
    }

    /// The layer's place, nil if it is none of the chain's.
    func index(of id: LayerID) -> Int? {
        id == head ? count - 1 : ids.index(ofLayer: id)
    }
    private func existing(_ id: LayerID) -> Int {
        guard let index = index(of: id) else { preconditionFailure("no such layer") }
        return index
    }

    // MARK: shared layers

    private(set) var sharedCount = 0
    func isShared(_ index: Int) -> Bool { layers[index].isShared }
    /// Retired, and shared itself, or its heir is, or one between the two.
    func isStuck(_ index: Int) -> Bool { layers[index].isStuck }
    mutating func setShared(_ ids: [LayerID], _ isShared: Bool) {
        for id in ids { layers[existing(id)].isShared = isShared }
        decide()
    }
    /// What is to be merged, and which way.
    private mutating func decide() {
        revision += 1
        sharedCount = layers.count { $0.isShared }
        for place in ids.indices { layers[place].isStuck = false }
        if sharedCount > 0 { findStuck() }
        let before = layers.map(\.taken)
        for place in ids.indices { layers[place].taken = nil }
        // What has begun goes on, though the heir be deleted meanwhile: with deletions that come
        // faster than merges end, nothing would ever end otherwise.
        for place in ids.indices where mayTake(place) && before[place] == ids[place + 1] {
            layers[place].taken = before[place]
        }
        for place in ids.indices where mayTake(place) && isSmallerAbove(place) {
            layers[place].taken = ids[place + 1]
        }
        downCount = layers.count { $0.taken != nil }
        for place in ids.indices {
            guard place > 0, isDown(place - 1) else {
                layers[place].absorbed = nil
                continue
            }
            // Of an earlier time it may say that something is gone which has come since.
            guard before[place - 1] != ids[place] || layers[place].absorbed == nil else { continue }
            layers[place].absorbed = FixedArray(repeating: 0, count: layers[place].map.count)
        }
        candidate = findCandidate()
    }
    /// Whether the layer right above it may be merged into the one at `place`. Not the head: it is
    /// written to, and would never be empty.
    private func mayTake(_ place: Int) -> Bool {
        let upper = place + 1
        guard isRetired(place), upper < count - 1, layers[upper].below == place,
            !layers[place].isStuck, !layers[upper].isStuck, layers[place].heir >= upper,
            isDown(place) || !isDown(upper) && (place == 0 || !isDown(place - 1))
        else { return false }
        guard layers[place].heir == upper || layers[upper].heir == layers[place].heir else {
            return false
        }
        // As large as its files have to be, whatever is in them.
        return layers[upper].extent <= layers[place].room
    }
    /// Of two that are retired the lower one is then to take their heir as well.
    private func isSmallerAbove(_ place: Int) -> Bool {
        let heir = layers[place].heir
        return heir < count - 1 && known(place + 1) <= known(place) && known(heir) <= known(place)
    }
    /// How many regions the layer may know.
    private func known(_ place: Int) -> Int {
        var count = 0
        for word in 0..<layers[place].map.count { count += layers[place].map[word].nonzeroBitCount }
        return count
    }
    private mutating func findStuck() {
        for heir in ids.indices where !isRetired(heir) {
            var isStuck = layers[heir].isShared
            var place = below(heir)
            while place >= 0, isRetired(place) {
                isStuck = isStuck || layers[place].isShared
                layers[place].isStuck = isStuck
                place = below(place)
            }
        }
    }

    // MARK: merging downwards

    private(set) var downCount = 0
    /// What a region of the heir gets from below it has to wait: some is stuck, or goes down.
    func isHeldUp(_ heir: Int) -> Bool {
        let below = layers[heir].below
        return below >= 0 && isStuck(below) || isDown(under: heir)
    }
    func isDown(_ index: Int) -> Bool { layers[index].taken != nil }
    /// What is under the layer is answered with it, not merged first.
    func isFoldDue(_ index: Int) -> Bool {
        isHeldUp(index) || index == count - 1 && staying != nil
    }
    /// Of what the layer at `index` is heir of, something is merged downwards, or it is itself.
    func isDown(under index: Int) -> Bool {
        guard downCount > 0 else { return false }
        var lower = below(index)
        while lower >= 0, isRetired(lower) {
            if isDown(lower) { return true }
            lower = below(lower)
        }
        return false
    }

    // MARK: the layer that stays

    /// The one that may stay below the head; nil: there is none.
    private(set) var candidate: LayerID?
    /// It is not more than what lies above it, and goes over to the head like any other.
    var isRising = false
    var staying: LayerID? { isRising ? nil : candidate }

    /// The largest of the head's retired layers, the lowest of those that know as many regions. Not
    /// one that is on its way down, and not if those below it have no room in it.
    private func findCandidate() -> LayerID? {
        guard retiredCount > 0 else { return nil }
        var found: (place: Int, known: Int)?
        var place = below(count - 1)
        while place >= 0, isRetired(place), layers[place].heir == count - 1 {
            defer { place = below(place) }
            guard !layers[place].isStuck, place == 0 || !isDown(place - 1) else { continue }
            let known = known(place)
            if known >= found?.known ?? 0 { found = (place, known) }
        }
        guard let found else { return nil }
        place = below(found.place)
        while place >= 0, isRetired(place), !layers[place].isStuck {
            guard layers[place].extent <= layers[found.place].room else { return nil }
            place = below(place)
        }
        return ids[found.place]
    }
    /// The place of the layer that what the retired one at `index` holds goes over to, upwards: its
    /// heir, or the one that stays below the head. Nil: nowhere, or it is the one that stays.
    func placeAbove(_ index: Int) -> Int? {
        guard let heir = heirPlace(index) else { return nil }
        guard heir == count - 1, let staying, let place = self.index(of: staying), index <= place
        else { return heir }
        return index < place ? place : nil
    }

    /// Nothing of the region is left in the layer, which is merged downwards.
    func markAbsorbed(_ id: LayerID, _ region: UInt64) {
        layers[existing(id)].absorbed?[Int(region / 64)] |= 1 << (region % 64)
    }
    func isAbsorbed(_ index: Int, _ region: UInt64) -> Bool {
        guard let absorbed = layers[index].absorbed else { return false }
        return absorbed[Int(region / 64)] >> (region % 64) & 1 != 0
    }
    /// What is known to be gone of the region may come again.
    func willHold(_ id: LayerID, _ region: UInt64) {
        guard retiredCount > 0 else { return }
        let index = existing(id)
        layers[index].absorbed?[Int(region / 64)] &= ~(1 << (region % 64))
        layers[index].merged?[Int(region / 64)] &= ~(1 << (region % 64))
    }
    /// The first region, at `start` or later, that the layer may still hold something of.
    func nextToAbsorb(_ index: Int, from start: UInt64) -> UInt64? {
        guard let absorbed = layers[index].absorbed else { return nil }
        return next(in: layers[index].map, without: absorbed, from: start)
    }

    /// The layer and all that is seen through it, ascending.
    func seen(from index: Int) -> [LayerID] {
        var (seen, place) = ([LayerID](), index)
        while place >= 0 {
            seen.append(ids[place])
            place = below(place)
        }
        return seen.reversed()
    }

    // MARK: which regions a layer may know

    func mayHold(_ index: Int, _ region: UInt64) -> Bool {
        let word = Int(region / 64)
        guard let merged = layers[index].merged else {
            return layers[index].map[word] >> (region % 64) & 1 != 0
        }
        return layers[index].map[word] & ~merged[word] & 1 << (region % 64) != 0
    }
    /// Whether there may be a page of the region, if only for its birth.
    func mayKnow(_ index: Int, _ region: UInt64) -> Bool {
        layers[index].map[Int(region / 64)] >> (region % 64) & 1 != 0
    }
    func mayHold(_ id: LayerID, _ region: UInt64) -> Bool { mayHold(existing(id), region) }
    func mayKnow(_ id: LayerID, _ region: UInt64) -> Bool { mayKnow(existing(id), region) }
    /// Any layer.
    func mayHold(_ region: UInt64) -> Bool {
        for index in 0..<count where mayHold(index, region) { return true }
        return false
    }
    /// The volume's regions, in words of 64.
    var wordCount: Int { Int((regionCount + 63) / 64) }
    /// The regions of a word that the layer may hold anything of, a bit each.
    func held(_ index: Int, _ word: Int) -> UInt64 {
        let gone = (layers[index].merged?[word] ?? 0) | (layers[index].absorbed?[word] ?? 0)
        return layers[index].map[word] & ~gone
    }
    /// Those that there may be a page of.
    func pages(_ index: Int, _ word: Int) -> UInt64 { layers[index].map[word] }
    func mark(_ id: LayerID, _ region: UInt64) {
        layers[existing(id)].map[Int(region / 64)] |= 1 << (region % 64)
    }

    // MARK: what is not synced

    mutating func dataWritten(_ id: LayerID) { layers[existing(id)].isDataUnsynced = true }
    mutating func tableWritten(_ id: LayerID) { layers[existing(id)].isTableUnsynced = true }
    /// The next layer at `index` or above whose file has to be synced; it counts as being so.
    /// The head's always has: nobody has to ask whether there is one at all.
    mutating func nextUnsynced(isData: Bool, from index: Int) -> Int? {
        for index in min(index, layers.count)..<layers.count {
            let isUnsynced = isData ? layers[index].isDataUnsynced : layers[index].isTableUnsynced
            guard isUnsynced || index == layers.count - 1 else { continue }
            if isData {
                layers[index].isDataUnsynced = false
            } else {
                layers[index].isTableUnsynced = false
            }
            return index
        }
        return nil
    }
}
