// Regions in which members may differ: after a takeover, after a write that ended differently on
// them, after a read that found a damaged block. Who resolves them is in EngineJobs.

/// What writes that ended with an error may have left half done in a region. All else that no copy
/// has intact is damage: it is not made good by calling it what was written.
struct ErroredBlocks {
    private var blocks = BlockSet()
    private var lowest = LayerID.max

    mutating func add(_ layer: LayerID, _ added: Range<Int>) {
        for block in added { blocks[block] = true }
        lowest = min(lowest, layer)
    }
    /// Perhaps in the layer's heir, if that was deleted since.
    func mayBeTorn(_ layer: LayerID, _ block: Int) -> Bool { layer >= lowest && blocks[block] }
}

extension EngineCore {
    /// T3: what the members' activity logs name.
    func collectUnresolved(_ record: VolumeRecord) {
        let regions = Geometry.regionCount(size: record.size)
        var rest = members
        while let slot = rest.popFirst() {
            for active in installReplies[slot]?.activeRegions ?? [] where active.region < regions {
                unresolved.insert(active.region)
                if let layer = remaining(active.layer) {
                    suspect(active.region, layer)
                } else {
                    // Replicas name layers that they have installed, which are these. Should one
                    // name another, all are looked at: slow, not wrong.
                    for layer in record.layers { suspect(active.region, layer) }
                }
            }
        }
    }
    func suspect(_ region: UInt64, _ layer: LayerID) {
        var layers = suspectLayers[region] ?? []
        let at = layers.firstIndex { $0 >= layer } ?? layers.count
        if at < layers.count, layers[at] == layer { return }
        layers.insert(layer, at: at)
        suspectLayers[region] = layers
    }
    func forgetUnresolved() {
        unresolved = []
        suspectLayers = [:]
        damagedRegions = []
        erroredRegions = [:]
        isResolving = false
    }

    /// A write of these blocks to this layer failed on every member and may be applied differently:
    /// the region is made equal before anyone touches it again.
    func addUnresolved(_ region: UInt64, _ layer: LayerID, _ blocks: Range<Int>) {
        // The head too: where the write goes when it is sent the next time.
        suspect(region, layer)
        suspect(region, head)
        if damagedRegions.remove(region) != nil {
            // The damage may be in any layer.
            suspectLayers[region] = record?.layers
            erroredRegions[region] = ErroredBlocks()
            for job in 0..<jobsMax where jobs[job].kind == .repair {
                if jobs[job].region == region { jobs[job].kind = .resolve }
            }
        }
        let isNew = unresolved.insert(region).inserted
        if isNew { erroredRegions[region] = ErroredBlocks() }
        // (Of one that a takeover has found active, anything may be half done.)
        erroredRegions[region]?.add(layer, blocks)
        guard isNew else { return }
        unresolvedQueue.append(region)
        isResolving = true
    }
    /// What a takeover found active is equal. What came later does not keep a point from being
    /// stable: its region is left out, and a write that waits for room may be what it waits for.
    var isTakeoverResolved: Bool {
        unresolved.count == damagedRegions.count + erroredRegions.count
    }

    /// A read had to go to another member: the damaged copy is rewritten under the region's lock.
    func repair(_ region: UInt64) {
        guard members.count > 1, unresolved.insert(region).inserted else { return }
        damagedRegions.insert(region)
        unresolvedQueue.append(region)
        isResolving = true
    }

    func regionRepaired(_ region: UInt64, blocks: UInt64) {
        blocksRepaired += blocks
        damagedRegions.remove(region)
        unresolved.remove(region)
        suspectLayers[region] = nil
        note(.repaired(region: region, blocks: blocks))
        if unresolved.isEmpty {
            isResolving = false
            noteResolved()
        }
        startAll()
    }

    func regionResolved(_ region: UInt64, blocks: UInt64) {
        unresolved.remove(region)
        suspectLayers[region] = nil
        erroredRegions[region] = nil
        regionsResolved += 1
        blocksResolved += blocks
        guard unresolved.isEmpty else { return }
        isResolving = false
        unresolvedQueue.removeAll(keepingCapacity: true)
        unresolvedPosition = 0
        noteResolved()
        flushDueAt = now
        startAll()
    }

    /// The next region to resolve that no job has yet: those requests wait for come first.
    func nextUnresolved() -> UInt64? {
        while let region = urgentRegions.popFirst() {
            if unresolved.contains(region), !hasJob(region) { return region }
        }
        // What is being copied to a joiner keeps its place: its turn comes after the copy. (Seed
        // 110367. A copy that only waits may wait for what waits for this: seed 110362.)
        for at in unresolvedPosition..<max(unresolvedPosition, unresolvedQueue.count) {
            let region = unresolvedQueue[at]
            let isOpen = unresolved.contains(region)
            if isOpen, isBeingCopied(region) { continue }
            unresolvedQueue.swapAt(at, unresolvedPosition)
            unresolvedPosition += 1
            if isOpen, !hasJob(region) { return region }
        }
        return nil
    }

    // MARK: - What nobody can read

    /// Bytes to be kept that cannot be read, of blocks that no member has intact.
    func isUnreadable(_ job: Int) -> Bool {
        let run = jobs[job].run
        guard run.action == .adopt else { return false }
        var rest = jobs[job].participants
        while let slot = rest.popFirst() {
            for block in run.blocks {
                let its = content(job, slot, block)
                guard its?.isDoubtful == true else { return false }
            }
        }
        return true
    }

    /// The one block of the run stays what its source's entry says, and all say so: it is read
    /// again when its disk can, or somebody returns with exactly that (seed 1403455: a disk that
    /// failed for a moment had cost a block that was flushed).
    func agreeOnEntry(_ job: Int) {
        let run = jobs[job].run
        guard let entry = content(job, ReplicaSlot(run.source), run.first)?.entry else {
            return restart(job)
        }
        jobs[job].run.targets = []
        var rest = jobs[job].participants
        while let slot = rest.popFirst() {
            let its = content(job, slot, run.first)
            if its?.entry != entry { jobs[job].run.targets.insert(SlotSet(slot)) }
        }
        var header = jobHeader(job, .adopt, run.blocks)
        header.auxiliary = AdoptRequest.naming(entry.checksum)
        sendRun(job, &header, buffer: .none)
    }
}
