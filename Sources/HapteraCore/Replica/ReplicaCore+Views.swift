// What many layers cost a read, and what is done about it: the view of a region (`LayerViews`) is
// asked in place of the frozen layers, and where there is none yet, the pages of layers further
// down are read together.

extension ReplicaCore {
    // MARK: views

    /// True: the request's blocks were asked for here, and the rest of the layers is to be asked.
    func takeView(_ slot: Int32, _ place: Int, into table: RawMemory) -> Bool {
        let index = Int(slot)
        let region = requests[index].region
        guard views.top(region) == chain.id(place), !isFold(slot) else { return false }
        // The next layer has left, and nothing of the region was in it.
        guard views.next(region) == .head || chain.index(of: views.next(region)) != nil else {
            views.drop(region)
            return false
        }
        raiseView(slot, region, to: place)
        let blocks = requests[index].blocks
        var isComplete = true
        for block in blocks where owner(table, block - blocks.lowerBound) == 0 {
            guard let (entry, layer) = views.entry(region, block) else {
                isComplete = false
                continue
            }
            guard let owner = chain.index(of: layer) else {
                precondition(
                    options.mutations.contains(.viewOutlivesChange),
                    "a view names a layer that is gone")
                isComplete = false
                continue
            }
            entry.encode(to: table, at: (block - blocks.lowerBound) * BlockEntry.size)
            setOwner(table, block - blocks.lowerBound, owner + 1)
        }
        let next = chain.index(of: views.next(region)) ?? -1
        // Still to be asked: the view's own layers are behind.
        requests[index].layersLeft = isComplete ? 0 : Int32(next + 1)
        return true
    }

    /// The layer has been asked: with that page, or, as it holds nothing of the region, without.
    func keepView(_ slot: Int32, _ place: Int, _ page: RawMemory?) {
        let layer = chain.id(place)
        guard layer != chain.head, !isFold(slot), chain.count > options.layersForViews
        else { return }
        let region = requests[Int(slot)].region
        let top = views.top(region)
        // What the head shows is read most: what snapshots show takes no other's place.
        if top == .head || isOutOfPlace(slot, top, under: place) {
            views.begin(region, top: layer)
        }
        guard views.next(region) == layer else { return }
        let below = chain.below(place)
        views.putUnder(region, page, then: below < 0 ? .head : chain.id(below))
    }
    /// The head does not show what the view does, any more.
    private func isOutOfPlace(_ slot: Int32, _ top: LayerID, under place: Int) -> Bool {
        let name = requests[Int(slot)].header.layer
        guard name == chain.head, place == chain.below(chain.count - 1) else { return false }
        var lower = place
        while lower >= 0, chain.id(lower) > top { lower = chain.below(lower) }
        return lower < 0 || chain.id(lower) != top
    }

    /// Snapshots have been taken since: what their layers hold is put on top, as far as it is in
    /// memory.
    private func raiseView(_ slot: Int32, _ region: UInt64, to place: Int) {
        guard requests[Int(slot)].header.layer == chain.head else { return }
        var above = chain.below(chain.count - 1)
        guard above > place else { return }
        placesAsked.removeAll(keepingCapacity: true)
        while above > place {
            placesAsked.append(above)
            above = chain.below(above)
        }
        guard above == place else { return }
        for upper in placesAsked.reversed() {
            let layer = chain.id(upper)
            guard chain.mayHold(upper, region) else {
                views.putOver(region, nil, of: layer)
                continue
            }
            guard let frame = cache.find(layer, region),
                cache.frames[Int(frame)].state != .loading
            else { return }
            views.putOver(region, cache.entries(frame), of: layer)
        }
    }

    /// An entry of the region is about to change, or has just been.
    func entriesChange(_ layer: LayerID, _ region: UInt64) {
        guard layer != chain.head, !options.mutations.contains(.viewOutlivesChange) else { return }
        views.drop(region)
    }

    // MARK: pages

    /// The page of the layer at `place` is on its way: those further down that will probably be
    /// asked for next are read beside it, more each time.
    func loadAhead(_ slot: Int32, below place: Int) {
        guard !isFold(slot) else { return }
        let index = Int(slot)
        var left = requests[index].loads
        requests[index].loads = min(Self.loadsAheadMax, 2 * left + 1)
        var next = Int(placeBelow(slot, place)) - 1
        while next >= 0, left > 0, freeOperationCount > ReplicaLimits.diskOperationsMax / 2 {
            let (layer, region) = (chain.id(next), requests[index].region)
            if chain.mayHold(next, region), cache.find(layer, region) == nil {
                guard let frame = bringIn(layer, region) else { return }
                cache.frames[Int(frame)].isAhead = true
                left -= 1
            }
            next = Int(placeBelow(slot, next)) - 1
        }
    }
    private static let loadsAheadMax: Int32 = 15
}
