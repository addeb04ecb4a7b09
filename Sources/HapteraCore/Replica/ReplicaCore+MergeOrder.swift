// What is merged next, and whether the layer right below the head stays (ReplicaCore+Merge).

/// A region that is to be merged, and how.
struct MergeTask {
    enum Way {
        /// Upwards, because it is in order or because a request waits for it.
        case up
        case awaited
        case down
        /// Only what the head hides of the layer that stays goes.
        case hide
    }
    var heir: LayerID
    var region: UInt64
    var way: Way
    init(_ heir: LayerID, _ region: UInt64, _ way: Way) {
        self.heir = heir
        self.region = region
        self.way = way
    }
}

extension ReplicaCore {
    // MARK: which layer stays

    /// The largest layer below the head goes up to it if that is little to move, or no more than
    /// what is above it. While that is not known it stays: to count takes a pass over the pages.
    func weighStaying() {
        guard let candidate = chain.candidate else { return chain.isRising = false }
        followChain()
        guard let group = space.groups.head, group.weighed == candidate else {
            return chain.isRising = false
        }
        let isUncountable = group.unsoundPasses >= LayerGroup.unsoundPassesMax
        guard group.isKnown || isUncountable else {
            chain.isRising = false
            // The last pass did not know of it.
            if space.group == nil, group.unsoundPasses == 0 {
                space.notBefore = min(space.notBefore, now)
            }
            return
        }
        // Merging a page that cannot be read tells that it is damaged.
        let little = max(
            group.above * options.risingPercent / 100, UInt64(options.stayingBlocksMin))
        chain.isRising = !group.isKnown || group.kept <= little
    }
    /// One layer is known to stay below the head, and nothing of it is to be given back now.
    package var isLayerStaying: Bool {
        guard chain.staying != nil, let group = space.groups.head else { return false }
        return group.isKnown && !(group.hiddenBlocks > 0 && isHidingDue(group))
    }
    /// Regions of which the head hid something that has gone, since the process started.
    package var hiddenRegions: UInt64 { merge.regionsHidden }
    /// Layers of deleted snapshots that are still there, but for one that stays.
    package var unmergedLayerCount: Int { chain.retiredCount - (isLayerStaying ? 1 : 0) }

    // MARK: what is next

    /// Those that have not begun do not any more; what they hold in memory drains.
    func endWaitingMerges() {
        for job in 0..<mergeJobs.count where mergeJobs[job].stage == .waiting { end(job) }
    }
    func mayBegin() -> Bool {
        let running = runningJobs
        guard
            merge.budget > 0
                || merge.isBusy && merge.throttle.mayBegin(now, running: running)
        else { return false }
        return running * Geometry.blocksPerRegion + merge.owedBlocks < merge.owedBlocksMax
    }
    /// By turns, what the head hides and all else: neither keeps the other waiting. On a full disk
    /// what is hidden needs no space, and gives some back.
    func nextToMerge() -> MergeTask? {
        merge.isHideTurn.toggle()
        if merge.isHideTurn, let task = nextToHide() { return task }
        return nextToMove() ?? (merge.isHideTurn ? nil : nextToHide())
    }
    private func nextToMove() -> MergeTask? {
        // Of many layers one after the other have the same heir.
        var known = -1
        var isKnownHeldUp = false
        for from in merge.cursor > 0 ? [merge.cursor, 0] : [0] {
            for index in 0..<chain.count where chain.isRetired(index) && !chain.isStuck(index) {
                guard let heir = chain.heirPlace(index) else { continue }
                let isDown = chain.isDown(index)
                // What else the heir gets waits for those that go down.
                if known != heir { (known, isKnownHeldUp) = (heir, chain.isHeldUp(heir)) }
                if !isDown, isKnownHeldUp { continue }
                guard let upper = isDown ? index + 1 : chain.placeAbove(index) else { continue }
                var start = from
                while start < regionCount,
                    let region = isDown
                        ? chain.nextToAbsorb(upper, from: start)
                        : chain.nextUnmerged(index, from: start)
                {
                    if !isMerging(region) {
                        return MergeTask(chain.id(upper), region, isDown ? .down : .up)
                    }
                    start = region + 1
                }
            }
        }
        return nil
    }
    /// Of the layer that stays. Where one above it holds something, that has to go first.
    private func nextToHide() -> MergeTask? {
        guard !merge.isHidingIdle, let staying = chain.staying,
            let index = chain.index(of: staying), let group = space.groups.head,
            group.weighed == staying, isHidingDue(group), !chain.isHeldUp(chain.count - 1)
        else { return nil }
        for from in merge.cursor > 0 ? [merge.cursor, 0] : [0] {
            var start = from
            while let region = group.nextHidden(from: start) {
                if !isMerging(region), chain.unmerged(under: chain.count - 1, region) == index {
                    return MergeTask(chain.head, region, .hide)
                }
                start = region + 1
            }
        }
        merge.isHidingIdle = true
        return nil
    }
    /// Each client's write may hide another block, and its region would be looked at for that one.
    /// Beside requests it waits until it is worth it, or the space is needed; and for one minute of
    /// ten it does not wait: others on this disk may need it.
    private func isHidingDue(_ group: LayerGroup) -> Bool {
        !merge.isBusy || now < merge.fullUntil
            || group.hiddenBlocks >= max(UInt64(options.hiddenBlocksMin), group.kept / 16)
            || now.rawValue / 60_000_000_000 % 10 == 9
    }
}
