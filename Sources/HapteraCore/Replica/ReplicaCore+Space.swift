// What deleting a snapshot would give back, and what will come back by itself, of this copy.
//
// Counted are blocks with data that others hide (`LayerGroups`), in the background, from the
// tables: 64 regions of one group at a time, and again only where something has changed since. A
// change (`statesChanged`) marks its 64 regions stale, nothing more; in passes over all groups,
// with a pause between two, what is stale is counted anew:
// 1. the mark is taken back
// 2. each layer's pages are read, but for regions in memory; what these say counts
// 3. a change that came meanwhile has set the mark again: what was counted wrongly will be counted
//    once more
// 4. when a pass has come to the end of a group, the group's counts are known
// Layers that come, go, or are shared mark what they hold. Nothing of it is on disk: a process
// begins with everything stale that can hide anything.

/// What counting has on its way.
struct SpaceState {
    /// Layers of 64 regions looked at, for which 512 KiB may have to be read, and words done, per
    /// tick (100 ms).
    static let perIdleTick = 48
    static let perBusyTick = 3
    static let pauseIdleMilliseconds: UInt64 = 1000
    static let pauseBusyMilliseconds: UInt64 = 5000
    /// Words of 64 regions in which there was nothing to read.
    static let emptyPerTick = 4096

    var groups = LayerGroups()
    var budget = 0
    /// The group that the pass is at, by its name, which is how far it has come if it has gone.
    var cursor = LayerID.head
    var group: LayerGroup?
    var word = 0
    /// Nothing of the group could not be read.
    var isSound = true
    /// No pass before this.
    var notBefore = Instant.zero

    // The 64 regions at hand.
    var isCounting = false
    var isReading = false
    /// They were another group's.
    var isVoid = false
    var interest: UInt64 = 0
    /// The next layer of those that hide, and then of the group's own.
    var step = 0
    /// What is being read, regions.
    var span: Range<UInt64> = 0..<0
    var hidden: (UInt16, UInt16) = (0, 0)
    var rest = LayerGroup.Rest()
    /// For each of the regions: the blocks that each of the two covers, and what is above in the
    /// group, hold. Four words of 64 blocks.
    let masks = FixedArray<UInt64>(repeating: 0, count: 3 * 64 * 4)
    static let own = 2
    func mask(_ which: Int, _ place: Int, _ part: Int) -> Int { (which * 64 + place) * 4 + part }
}

/// What deleting a snapshot gives back on one copy.
package struct SnapshotSpace: Equatable, Sendable {
    /// The name of its layer.
    package var layer: LayerID
    /// Blocks; nil: not counted yet.
    package var blocks: UInt64?
    /// Beside these: files that are deleted as they are.
    package var files: [LayerID] = []
}

/// Of 64 blocks of a region: those that are not absent, those with data, and those that take space.
private struct BlockStates {
    var (held, data, space): (UInt64, UInt64, UInt64) = (0, 0, 0)

    init(_ entries: RawMemory, _ part: Int) {
        for block in 0..<64 {
            let state = entries[(part * 64 + block) * BlockEntry.size]
            let bit: UInt64 = 1 << UInt64(block)
            if state != BlockState.absent.rawValue { held |= bit }
            if state == BlockState.data.rawValue { data |= bit }
            if state == BlockState.zeroAllocated.rawValue { space |= bit }
        }
        space |= data
    }
}

extension ReplicaCore {
    // MARK: changes

    /// Of a block in the layer, from one state to the other.
    func stateChanged(_ layer: LayerID, _ region: UInt64, _ old: BlockState, _ new: BlockState) {
        guard (old == .absent) != (new == .absent) || (old == .data) != (new == .data) else {
            return
        }
        statesChanged(layer, region)
    }
    func statesChanged(_ layer: LayerID, _ region: UInt64) {
        guard chain.count > 1, !options.mutations.contains(.spaceNotRecounted) else { return }
        followChain()
        guard let place = chain.index(of: layer) else { return }
        space.groups.markStale(place, region)
    }
    func followChain() {
        guard !space.groups.isCurrent(chain) else { return }
        if space.isCounting {
            space.group?.markStale(space.word)
            if space.isReading { space.isVoid = true } else { space.isCounting = false }
        }
        space.groups.follow(chain)
    }

    // MARK: passes

    func tickSpace() {
        guard chain.count > 1, shutdown == .none else { return }
        followChain()
        space.budget = merge.isBusy ? SpaceState.perBusyTick : SpaceState.perIdleTick
        pumpSpace()
    }
    private func pumpSpace() {
        guard !hasFailed, shutdown == .none, !space.isReading else { return }
        var empty = 0
        while space.budget > 0, empty < SpaceState.emptyPerTick {
            if space.isCounting {
                guard countLayers() else { return }
                continue
            }
            guard now >= space.notBefore, let word = nextWord() else { return }
            begin(word)
            if !space.isCounting { empty += 1 }
        }
    }
    /// Nil: the pass has come to its end.
    private func nextWord() -> Int? {
        while let group = space.groups.next(from: space.cursor) {
            if space.group !== group {
                space.group = group
                space.word = 0
                space.isSound = true
            }
            space.cursor = group.name
            if let word = group.nextStale(from: space.word) { return word }
            if space.isSound { group.isKnown = true }
            group.unsoundPasses = space.isSound ? 0 : group.unsoundPasses + 1
            space.cursor = LayerID(rawValue: group.name.rawValue + 1)
        }
        space.cursor = .head
        space.group = nil
        let pause =
            merge.isBusy ? SpaceState.pauseBusyMilliseconds : SpaceState.pauseIdleMilliseconds
        space.notBefore = now.adding(milliseconds: pause)
        return nil
    }

    // MARK: 64 regions

    private func begin(_ word: Int) {
        guard let group = space.group else { return }
        group.clearStale(word)
        space.word = word
        space.interest = group.interest(word, in: chain)
        guard space.interest != 0 else {
            group.set(word, hidden: (0, 0), .init())
            space.word += 1
            return
        }
        space.isCounting = true
        space.step = 0
        space.hidden = (0, 0)
        space.rest = .init()
        for at in 0..<space.masks.count { space.masks[at] = 0 }
    }

    /// The layer of a step; for those that hide, which of the two covers it belongs to.
    private func layer(ofStep step: Int, _ group: LayerGroup) -> (layer: LayerID, cover: Int?)? {
        var rest = step
        for cover in group.covers.indices {
            let files = group.covers[cover].files
            if rest < files.count { return (files[rest], cover) }
            rest -= files.count
        }
        return rest < group.files.count ? (group.files[rest], nil) : nil
    }

    /// Layer by layer; false: one is being read, or there is no buffer now.
    private func countLayers() -> Bool {
        guard let group = space.group else { preconditionFailure("there is a group at hand") }
        while let (layer, cover) = layer(ofStep: space.step, group) {
            guard let regions = regions(of: layer) else {
                abandon()
                return true
            }
            let missing = (0..<64).filter { place in
                regions >> UInt64(place) & 1 != 0 && entriesInMemory(layer, place) == nil
            }
            if let first = missing.first, let last = missing.last {
                read(layer, first...last)
                return false
            }
            count(regions, layer, cover, group) { entriesInMemory(layer, $0) }
            if regions != 0 { space.budget -= 1 }
            space.step += 1
        }
        group.set(space.word, hidden: space.hidden, space.rest)
        space.isCounting = false
        space.word += 1
        space.budget -= 1
        return true
    }
    /// Of the 64, those that something may be hidden in and that the layer may hold anything of.
    private func regions(of layer: LayerID) -> UInt64? {
        chain.index(of: layer).map { space.interest & chain.held($0, space.word) }
    }
    private func entriesInMemory(_ layer: LayerID, _ place: Int) -> RawMemory? {
        guard let frame = cache.find(layer, UInt64(space.word * 64 + place)),
            cache.frames[Int(frame)].state != .loading
        else { return nil }
        return cache.entries(frame)
    }
    /// Counted again in the next pass.
    private func abandon() {
        space.group?.markStale(space.word)
        space.isSound = false
        space.isCounting = false
        space.word += 1
        space.budget -= 1
    }

    // MARK: reading

    private func read(_ layer: LayerID, _ places: ClosedRange<Int>) {
        let length = places.count * TablePage.pairSize
        // Otherwise with the next tick.
        guard space.budget > 0, hasOperationForRequests, let buffer = pool.allocate(length) else {
            return
        }
        space.budget -= 1
        let first = UInt64(space.word * 64 + places.lowerBound)
        space.span = first..<first + UInt64(places.count)
        space.isReading = true
        let token = startOperation(.spaceRead, index: 0, buffer: buffer, length: length)
        actions.append(
            .read(
                .table(layer), offset: TablePage.pairOffset(region: first), length: length,
                buffer: buffer, bufferOffset: 0, token: token))
    }

    func spaceRead(_ operation: DiskOperation, _ result: Int) {
        defer { pool.release(operation.buffer) }
        space.isReading = false
        if !space.isVoid { followChain() }
        guard !space.isVoid, space.isCounting, let group = space.group,
            let (layer, cover) = layer(ofStep: space.step, group), let regions = regions(of: layer)
        else {
            space.isVoid = false
            space.isCounting = false
            return pumpSpace()
        }
        let memory = pool.memory(operation.buffer)
        let isWhole = count(regions, layer, cover, group) { place in
            if let entries = entriesInMemory(layer, place) { return entries }
            let region = UInt64(space.word * 64 + place)
            guard result == operation.length, space.span.contains(region) else { return nil }
            let at = Int(region - space.span.lowerBound) * TablePage.pairSize
            return TablePage.entries(
                ofPair: memory.slice(at, TablePage.pairSize), layer: layer, region: region)
        }
        if isWhole { space.step += 1 } else { abandon() }
        pumpSpace()
    }

    // MARK: counting

    /// False: the entries of a region are not to be had now.
    @discardableResult
    private func count(
        _ regions: UInt64, _ layer: LayerID, _ cover: Int?, _ group: LayerGroup,
        _ entries: (_ place: Int) -> RawMemory?
    ) -> Bool {
        var left = regions
        while left != 0 {
            let place = left.trailingZeroBitCount
            left &= left - 1
            guard let entries = entries(place) else { return false }
            for part in 0..<4 {
                let states = BlockStates(entries, part)
                if let cover {
                    space.masks[space.mask(cover, place, part)] |= states.held
                } else {
                    countOwn(place, part, states, group)
                }
            }
        }
        return true
    }
    private func countOwn(
        _ place: Int, _ part: Int, _ states: BlockStates, _ group: LayerGroup
    ) {
        let data = states.data
        let depth = space.step - group.coverFilesCount
        let above = space.masks[space.mask(SpaceState.own, place, part)]
        let isMerging = depth < group.mergingCount
        // Of a layer that is alone it is asked only when nobody shares it.
        if isMerging || group.files.count == 1 {
            let seen = data & ~above
            let first = seen & space.masks[space.mask(0, place, part)]
            let second = seen & space.masks[space.mask(1, place, part)]
            space.hidden.0 += UInt16(first.nonzeroBitCount)
            space.hidden.1 += UInt16(second.nonzeroBitCount)
        }
        if let weighed = group.weighed {
            weigh(
                group.files[depth], weighed, place, seen: data & ~above,
                hidden: states.space & above)
        }
        let hidden = UInt32((data & above).nonzeroBitCount)
        if isMerging { space.rest.unmerged += hidden } else { space.rest.stuck += hidden }
        if !isMerging, options.mutations.contains(.stuckIsPunched), data & above != 0 {
            let block = part * 64 + (data & above).trailingZeroBitCount
            let region = UInt64(space.word * 64 + place) * UInt64(Geometry.regionSize)
            punchAtOnce(
                group.files[depth], region + UInt64(block * Geometry.blockSize),
                UInt32(Geometry.blockSize))
        }
        space.masks[space.mask(SpaceState.own, place, part)] |= states.held
    }
    /// The blocks of one layer below the head, or of the head, against those of the one that may
    /// stay there.
    private func weigh(
        _ layer: LayerID, _ weighed: LayerID, _ place: Int, seen: UInt64, hidden: UInt64
    ) {
        if layer > weighed { space.rest.above += UInt32(seen.nonzeroBitCount) }
        guard layer == weighed else { return }
        space.rest.kept += UInt32(seen.nonzeroBitCount)
        guard hidden != 0 else { return }
        space.rest.hidden += UInt32(hidden.nonzeroBitCount)
        space.rest.hiddenRegions |= 1 << UInt64(place)
    }
}

extension TablePage {
    /// The entries that a region's two slots say; nil unless both are as they must be when no write
    /// of a page was cut. All zero, as entries of a region never written are, if so are the slots.
    static func entries(ofPair memory: RawMemory, layer: LayerID, region: UInt64) -> RawMemory? {
        guard let slot = newestSlot(ofPair: memory, layer: layer, region: region) else {
            return nil
        }
        return memory.slice(slot * size + entriesOffset, entriesSize)
    }
}
