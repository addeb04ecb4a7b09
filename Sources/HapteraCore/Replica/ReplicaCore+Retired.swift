// Retired layers beside their merges (ReplicaCore+Merge): requests that wait until a region is
// merged, and layers that leave when nothing of them is left.

extension ReplicaCore {
    /// Changes when something that a read through the chain relies on does.
    func chainSerial(_ region: UInt64) -> UInt64 {
        UInt64(merge.removals) << 32 | UInt64(merge.serials[Int(region % 256)])
    }

    // MARK: requests that wait

    /// True: the request waits until its region is merged.
    func awaitsMerge(_ slot: Int32) -> Bool {
        guard chain.retiredCount > 0, !options.mutations.contains(.unmergedIsAnswered) else {
            return false
        }
        let header = requests[Int(slot)].header
        let isOwn =
            header.kind == .digest || header.kind == .adopt || header.kind == .verify
            || header.flags & FrameFlags.resync != 0
        guard isOwn || isMutation(header.kind), let place = chain.place(named: header.layer)
        else { return false }
        // A client's write, too, that was sent before its layer was frozen, and comes again.
        if !isLeaving(place) {
            guard isOwn, let lower = chain.unmerged(under: place, requests[Int(slot)].region),
                !chain.isStuck(lower), !mayPassUnreadable(slot),
                isMutation(header.kind) || !chain.isFoldDue(place)
            else { return false }
        }
        guard currentInstall < 0, shutdown == .none else {
            finish(slot, shutdown == .none ? .staleEpoch : .unavailable)
            return true
        }
        setAside(slot)
        push(slot, &merge.waiting)
        return true
    }
    private func isMutation(_ kind: FrameKind) -> Bool {
        kind == .write || kind == .setState || kind == .adopt
    }
    /// All that the layer held is in the one below it, and the manifest is about to say so.
    private func isLeaving(_ place: Int) -> Bool {
        !merge.leaving.isEmpty && merge.leaving.contains(chain.id(place))
    }
    func refuseAwaitingMerge(_ status: FrameStatus) {
        while let slot = pop(&merge.waiting) { refuse(slot, status) }
    }
    /// Those whose region is merged go on; the others wait again.
    func retryAwaitingMerge() {
        var waiting = merge.waiting
        merge.waiting = SlotQueue()
        while let slot = pop(&waiting) { resume(slot) }
    }
    func refuseAwaitingMerge(of region: UInt64, _ status: FrameStatus) {
        var waiting = merge.waiting
        merge.waiting = SlotQueue()
        while let slot = pop(&waiting) {
            if requests[Int(slot)].region == region {
                if mayPassUnreadable(slot) { resume(slot) } else { refuse(slot, status) }
            } else {
                push(slot, &merge.waiting)
            }
        }
    }

    // MARK: what cannot be read

    func readFailed(_ job: Int) {
        if merge.unreadable.count < MergeState.unreadableMax {
            merge.unreadable.insert(mergeJobs[job].region)
        }
        fail(job, .ioError)
    }
    func countMerged(_ region: UInt64) {
        merge.regionsMerged += 1
        merge.serials[Int(region % 256)] &+= 1
        merge.unreadable.remove(region)
    }
    /// Something of the region cannot be read, and the request does not need it to be merged: one
    /// bad sector must not cost the copy its other blocks, nor the replica its membership. Only
    /// what would show what is below has to wait.
    private func mayPassUnreadable(_ slot: Int32) -> Bool {
        let header = requests[Int(slot)].header
        let isReveal =
            header.kind == .setState && header.auxiliary == UInt64(BlockState.absent.rawValue)
        return !isReveal && merge.unreadable.contains(requests[Int(slot)].region)
    }

    // MARK: space that is taken twice

    /// The region was emptied, and its blocks are elsewhere.
    func owe(_ layer: LayerID, _ region: UInt64, _ blocks: Int) {
        let before = merge.owedBlocks
        merge.owed.append(LayerRegion(layer, region))
        merge.owedBlocks += blocks
        // Merges will have to wait for it, or whoever waits for merges takes more than they may.
        for limit in [merge.owedBlocksMax / 2, merge.owedBlocksMax]
        where before < limit && merge.owedBlocks >= limit { merge.isDrainDue = true }
    }
    /// What has yet to be given back. Not by those that can't drain before a point that is to come
    /// is stable: who was written to so lately is not many, and the point may be long in coming.
    func countOwed() {
        guard !merge.owed.isEmpty else { return merge.owedBlocks = 0 }
        var blocks = 0
        merge.owed.removeAll { owed in
            guard let frame = cache.find(owed.layer, owed.region),
                cache.frames[Int(frame)].state != .clean
                    || !cache.frames[Int(frame)].unneeded.isEmpty
            else { return true }
            if cache.frames[Int(frame)].state == .active,
                cache.frames[Int(frame)].lastWrite > stablePoint
            {
                return true
            }
            blocks += cache.frames[Int(frame)].unneeded.count
            return false
        }
        merge.owedBlocks = blocks
    }

    // MARK: layers that are empty

    func removeLayers() {
        deleteFiles()
        guard merge.isRemovalDue, merge.leaving.isEmpty, currentInstall < 0, !isManifestBusy,
            shutdown == .none
        else { return }
        merge.isRemovalDue = false
        let empty = emptyLayers()
        guard !empty.isEmpty else { return }
        var proposal = manifest
        for layer in empty { proposal.remove(layer, of: chain) }
        writeManifest(proposal, .removal)
        // Nil: no buffer at present.
        guard manifestProposal != nil else { return }
        merge.leaving = empty
        for layer in empty { forgetFrames(of: layer) }
    }

    /// Retired layers of which nothing is left: no region, and none in memory that must drain.
    private func emptyLayers() -> [LayerID] {
        var empty: [LayerID] = []
        for index in 0..<chain.count where chain.isRetired(index) {
            let layer = chain.id(index)
            // It may have gone over to the one below, and upwards as well.
            if empty.last == layer { continue }
            if chain.nextUnmerged(index, from: 0) == nil, isForgettable(layer) {
                empty.append(layer)
            } else if chain.isDown(index), chain.nextToAbsorb(index + 1, from: 0) == nil,
                isForgettable(chain.id(index + 1))
            {
                empty.append(chain.id(index + 1))
            }
        }
        return empty
    }
    private func isForgettable(_ layer: LayerID) -> Bool {
        for frame in 0..<cache.frames.count
        where cache.frames[frame].layer == layer && cache.frames[frame].state != .free {
            let list = cache.list(of: Int32(frame))
            guard cache.frames[frame].state == .clean, cache.frames[frame].pins == 0,
                list == .clean || list == .punch
            else { return false }
        }
        return true
    }
    /// Space that they have yet to give back goes with the files. So not before the layer is on its
    /// way out: one that stays after all is filled again, and nobody would know of it any more.
    private func forgetFrames(of layer: LayerID) {
        for frame in 0..<cache.frames.count
        where cache.frames[frame].layer == layer && cache.frames[frame].state != .free {
            cache.release(Int32(frame))
        }
    }

    /// The manifest does not name it any more.
    func layerLeaves(_ layer: LayerID) {
        guard let index = chain.index(of: layer) else { return }
        merge.removals &+= 1
        unlinked.remove(layer)
        for file in [FileSync.data, FileSync.table] where syncs[file].nextLayer > index {
            syncs[file].nextLayer -= 1
        }
        var barrier: [UInt64] = []
        for operation in 0..<operations.count where operations[operation].kind != .free {
            barrier.append(
                UInt64(operation) | UInt64(operations[operation].generation) << 32)
        }
        merge.deletions.append((layer, barrier))
    }

    private func deleteFiles() {
        guard !merge.isDeleting, let first = merge.deletions.first, freeOperationCount > 8 else {
            return
        }
        merge.deletions[0].barrier.removeAll { token in
            let id = Int(token & 0xffff_ffff)
            return operations[id].kind == .free
                || UInt64(operations[id].generation) != token >> 32
        }
        guard merge.deletions[0].barrier.isEmpty else { return }
        merge.isDeleting = true
        let token = startOperation(.layerRemove, index: 0)
        actions.append(.remove(first.layer, token: token))
    }
    /// Files that could not be deleted are, when the copy is opened the next time.
    func layerRemoved() {
        merge.isDeleting = false
        merge.deletions.removeFirst()
    }

    /// Some retired layer is neither stuck nor the one that stays.
    package var isMergeDue: Bool {
        let staying = isLayerStaying ? chain.staying : nil
        return (0..<chain.count).contains {
            chain.isRetired($0) && !chain.isStuck($0) && chain.id($0) != staying
        }
    }
    /// What is left to merge, and why it may not get on: for logs.
    package var mergeText: String {
        var stages: [String] = []
        for job in 0..<mergeJobs.count where mergeJobs[job].stage != .free {
            let frames = [mergeJobs[job].source, mergeJobs[job].target].map { frame in
                frame < 0 ? "none" : "\(cache.frames[Int(frame)].state)"
            }
            stages.append(
                "\(mergeJobs[job].stage) \(mergeJobs[job].region) \(frames.joined(separator: "/"))")
        }
        return "\(chain.retiredCount) retired layers, log \(logUsedPercent) %, "
            + "\(cache.activeCount) active of \(activeRegionsMax), \(stages)"
    }
}

extension Manifest {
    /// A retired layer that is empty, or one whose content, and so whose name, is the next lower
    /// one's.
    fileprivate mutating func remove(_ layer: LayerID, of chain: LayerChain) {
        guard let place = chain.index(of: layer) else { return }
        if !chain.isRetired(place) {
            names[chain.id(place - 1)] = chain.name(place)
        }
        names[layer] = nil
        layers.removeAll { $0 == layer }
    }
}
