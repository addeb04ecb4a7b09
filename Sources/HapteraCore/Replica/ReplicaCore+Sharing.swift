// Layers whose files another copy has as well: a clone of a snapshot begins with links to them, in
// a directory of its own, which a process of its own serves.
//
// What such a layer holds and its table stay as they are, for as long as its files have two names:
// nothing is merged into it or out of it, and no page of its table is written. (Space of blocks
// that hold no data may be given back: the table says so to both.) So both processes may read it,
// and need not know of each other.
//
// To begin (`beginSharing`), what the copy has in memory of the layer and of all that is seen
// through it must be in the tables: regions drain, merges under way end (`layersToLink`). Then the
// shell links the files, and the clone's directory is made (`ReplicaCore.createClone`). A crash
// before leaves nothing, a crash after it files with two names, which opening finds.
//
// A retired layer that cannot be merged is stuck. To the engine it and its heir are one layer all
// the same: what is asked of that one is answered from their fold, each block from the uppermost of
// them that holds it. So it is while the heir goes over to the layer, and while the layer stays
// below the head (ReplicaCore+Merge).
//
// What the engine writes into such a layer, a repair or a copy to a joiner, can only be what is
// there by its entries: then the bytes are written in place. Anything else is refused.

/// Why a layer can't be shared.
package enum SharingRefusal: Error, Equatable, Sendable {
    /// No layer of a snapshot is there by that number.
    case noSuchLayer
    /// The copy is not in sync, or is about to end.
    case notInSync
    case epochTooLow
    /// Those that are deleted stay while clones have them: the manifest must hold them all.
    case tooManyLayers

    /// In the text of a replica's refusal if, and only if, the same request may be granted later
    /// without anybody's doing.
    package static let notYetText = "not yet"
}

extension ReplicaCore {
    // MARK: beginning and end

    /// The layer of a snapshot is to be shared with a clone that begins at `epoch`: from here on
    /// it and what is seen through it stay as they are. Returns these, ascending.
    package func beginSharing(_ top: LayerID, epoch: Epoch) throws(SharingRefusal) -> [LayerID] {
        guard let record = manifest.installed, record.inSync.contains(identity.member),
            shutdown == .none, !hasFailed
        else { throw .notInSync }
        guard let place = chain.place(named: top), !chain.isRetired(place), top != chain.head else {
            throw .noSuchLayer
        }
        guard max(promise, admittedEpoch) < epoch else { throw .epochTooLow }
        guard chain.count <= Self.layersForSharingMax else { throw .tooManyLayers }
        let layers = chain.seen(from: place)
        for layer in layers {
            if chain.index(of: layer).map(chain.isShared) == false { unlinked.insert(layer) }
            sharing[layer, default: 0] += 1
        }
        if !options.mutations.contains(.sharedIsMerged) {
            chain.setShared(layers, true)
        }
        upkeep.isTickDue = true
        return layers
    }
    static let layersForSharingMax = 2000
    /// Those of the layers that are to be linked, now; one of which nothing was left may have gone.
    /// Nil: not everything is in their files yet.
    package func layersToLink(_ layers: [LayerID]) -> [LayerID]? {
        isInFiles(layers) ? layers.filter { chain.index(of: $0) != nil } : nil
    }
    private func isInFiles(_ layers: [LayerID]) -> Bool {
        if options.mutations.contains(.sharedBeforeDrained) { return true }
        let layers = Set(layers)
        for job in 0..<mergeJobs.count
        where mergeJobs[job].stage != .free
            && (layers.contains(mergeJobs[job].layer) || layers.contains(mergeJobs[job].heir))
        {
            return false
        }
        for frame in 0..<cache.frames.count where layers.contains(cache.frames[frame].layer) {
            switch cache.frames[frame].state {
            case .free, .loading, .clean: continue
            case .activating, .active, .draining, .punching: return false
            }
        }
        return true
    }
    /// Those of `linked` are, the others will not be: a layer that nobody else has is told so with
    /// `setShared`.
    package func endSharing(_ layers: [LayerID], linked: [LayerID]) {
        unlinked.subtract(linked)
        chain.setShared(linked.filter { chain.index(of: $0) != nil }, true)
        for layer in layers {
            let left = (sharing[layer] ?? 1) - 1
            sharing[layer] = left > 0 ? left : nil
        }
    }
    package func isSharing(_ layer: LayerID) -> Bool { sharing[layer] != nil }
    /// Has the layer's files another name than this copy's? While one is about to be made it counts
    /// as if.
    package func setShared(_ layer: LayerID, _ isShared: Bool) {
        guard chain.index(of: layer) != nil, isShared || !isSharing(layer),
            isShared || !options.mutations.contains(.sharedForEver)
        else { return }
        chain.setShared([layer], isShared)
        if !isShared {
            unlinked.remove(layer)
            merge.notBefore = now
        }
    }
    package var sharedLayers: [LayerID] {
        guard chain.sharedCount > 0 else { return [] }
        return (0..<chain.count).filter(chain.isShared).map(chain.id)
    }
    /// Where a clone's log begins: pages that it shares name records below.
    package var logNextIndex: UInt64 {
        options.mutations.contains(.cloneLogAtZero) ? 0 : log.nextIndex
    }

    // MARK: the fold of a layer and what is stuck under it

    /// What the request is about cannot be merged: it is answered from the fold.
    func isFolded(_ slot: Int32) -> Bool {
        let region = requests[Int(slot)].region
        let isUnreadable = merge.unreadable.contains(region)
        guard chain.sharedCount + chain.downCount > 0 || chain.staying != nil || isUnreadable,
            let place = chain.place(named: requests[Int(slot)].header.layer),
            !options.mutations.contains(.foldIgnored)
        else { return false }
        // Also where there is nothing under it yet: what is in it may go there any moment.
        if chain.isDown(under: place) { return true }
        guard let lower = chain.unmerged(under: place, region) else { return false }
        if chain.isStuck(lower) || isUnreadable { return true }
        return place == chain.count - 1 && chain.staying != nil
            && !options.mutations.contains(.unmergedIsAnswered)
    }
    /// Only a client's read sees through the layers below.
    func isFold(_ slot: Int32) -> Bool {
        let header = requests[Int(slot)].header
        return header.kind != .read || header.flags & FrameFlags.resync != 0
    }
    /// The place of the next layer to be asked, counted from one; zero: there is none.
    func placeBelow(_ slot: Int32, _ place: Int) -> Int32 {
        let below = chain.below(place)
        guard below >= 0, !isFold(slot) || chain.isRetired(below) else { return 0 }
        return Int32(below + 1)
    }

    static let foldTableOffset = 64
    /// Of the reply's table, which holds the entries while layers are asked.
    func chainTableNeeded(_ slot: Int32) -> Int {
        switch requests[Int(slot)].header.kind {
        case .digest: RegionDigest.size
        case .verify: Self.foldTableOffset + TablePage.entriesSize
        default: requests[Int(slot)].blocks.count * BlockEntry.size
        }
    }
    func chainTable(_ slot: Int32) -> RawMemory {
        let offset = requests[Int(slot)].header.kind == .verify ? Self.foldTableOffset : 0
        return pool.memory(requests[Int(slot)].table).slice(
            offset, requests[Int(slot)].blocks.count * BlockEntry.size)
    }

    /// The digest's table holds the entries, without owners. Each makes way for its block's record,
    /// which is behind those that are still needed.
    func answerFoldedDigest(_ slot: Int32) {
        let index = Int(slot)
        let table = pool.memory(requests[index].table)
        for block in (0..<Geometry.blocksPerRegion).reversed() {
            let entry = BlockEntry(decoding: table, at: block * BlockEntry.size) ?? .absent
            RegionDigest.encode(digest(slot, block, entry), index: block, to: table)
        }
        table.store(requests[index].birth.rawValue, 0)
        finish(slot, .ok, table: takeTable(slot), tableLength: RegionDigest.size)
    }

    // MARK: mutations

    /// True: the change is about a layer that stays as it is, or about what one would show.
    func isAboutShared(_ slot: Int32) -> Bool {
        let header = requests[Int(slot)].header
        guard let place = chain.place(named: header.layer),
            !options.mutations.contains(.sharedIsChanged)
        else { return false }
        let isFixed = isFixed(place)
        guard requests[Int(slot)].extents >= 0 || isFixed else { return false }
        let isReveal =
            header.kind == .setState && header.auxiliary == UInt64(BlockState.absent.rawValue)
        // To take the bytes that are there, they must be this layer's.
        let isOwn = header.kind == .adopt && header.auxiliary == AdoptRequest.keep
        guard isFixed || (isReveal || isOwn) && isFolded(slot)
        else { return false }
        resumeChainRead(slot)
        return true
    }

    /// Shared, and what the snapshot's flush has yet to cover can't come any more.
    private func isFixed(_ place: Int) -> Bool {
        chain.isShared(place) && !unlinked.contains(chain.id(place))
    }

    /// Bytes of a layer that the named one goes over to, or that is stuck under it, are to be kept
    /// (seed 5152174: before an engine came, doubtful blocks had gone over). They are there, and
    /// of an active region, whose page is in memory. False: not of one such layer alone.
    private func adoptBeneath(_ slot: Int32, _ table: RawMemory) -> Bool {
        let index = Int(slot)
        let header = requests[index].header
        guard header.kind == .adopt, header.auxiliary == AdoptRequest.keep else { return false }
        let place = owner(table, 0) - 1
        let isOne = (0..<requests[index].blocks.count).allSatisfy { owner(table, $0) == place + 1 }
        guard isOne, place >= 0, chain.isRetired(place), !isFixed(place),
            let frame = cache.find(chain.id(place), requests[index].region),
            cache.frames[Int(frame)].state == .active
        else { return false }
        if cache.frames[Int(frame)].isMerging {
            requests[index].extents = 0
            wait(slot, on: frame)
        } else {
            perform(slot, frame)
        }
        return true
    }

    /// What is there by the entries of the fold is known.
    func compareWithShared(_ slot: Int32, _ table: RawMemory) {
        let index = Int(slot)
        let header = requests[index].header
        guard let place = chain.place(named: header.layer) else { return finish(slot, .invalid) }
        let count = requests[index].blocks.count
        let isFixed = isFixed(place)
        if !isFixed, adoptBeneath(slot, table) { return }
        // Below the lowest layer everything reads zero: copies differ in which of the two they say.
        let isLowest = header.layer == manifest.installed?.layers.first
        let isZero: (UInt8) -> Bool = {
            $0 == BlockState.absent.rawValue || $0 == BlockState.zero.rawValue
        }
        let isSame = (0..<count).allSatisfy { block in
            // Not decoded as an entry: its owner is in it.
            let state = state(table, block)
            switch header.kind {
            case .write:
                let checksum = table.load(UInt32.self, block * BlockEntry.size + 4)
                return state == BlockState.data.rawValue
                    && checksum == payloadChecksum(slot, block)
            case .setState where isFixed:
                return UInt64(state) == header.auxiliary
                    || isLowest && isZero(state) && isZero(UInt8(header.auxiliary))
            case .setState:
                return state == BlockState.absent.rawValue || owner(table, block) == place + 1
                    || isLowest && isZero(state)
            default: return !isFixed && owner(table, block) == place + 1
            }
        }
        guard isSame else {
            actions.append(.note(.sharedLayerDiffers(offset: header.offset)))
            return finish(slot, .ioError)
        }
        guard isFixed else {
            requests[index].extents = -1
            return resumeMutation(slot)
        }
        guard header.kind == .write else { return finishDurably(slot) }
        rewrite(slot, table)
    }

    /// The same bytes again, where they were.
    private func rewrite(_ slot: Int32, _ table: RawMemory) {
        let index = Int(slot)
        let count = requests[index].blocks.count
        guard freeOperationCount > Self.operationsForUpkeep + count else {
            return push(slot, &awaitingResources)
        }
        var next = 0
        while let run = nextRun(table, from: next, count: count) {
            next = run.upperBound
            let layer = chain.id(owner(table, run.lowerBound) - 1)
            let length = run.count * Geometry.blockSize
            requests[index].operationsLeft += 1
            let token = startOperation(.rewrite, index: slot, length: length)
            operations[Int(token & 0xffff_ffff)].layer = layer
            let position = run.lowerBound * Geometry.blockSize
            actions.append(
                .write(
                    .data(layer), offset: requests[index].header.offset + UInt64(position),
                    length: length, buffer: requests[index].buffer, bufferOffset: position,
                    token: token))
        }
    }
    func rewritten(_ operation: DiskOperation, _ result: Int) {
        let slot = operation.index
        syncs[FileSync.data].written += 1
        if chain.index(of: operation.layer) != nil { chain.dataWritten(operation.layer) }
        if result != operation.length { requests[Int(slot)].status = status(ofError: result) }
        requests[Int(slot)].operationsLeft -= 1
        guard requests[Int(slot)].operationsLeft == 0 else { return }
        guard requests[Int(slot)].status == .ok else {
            return finish(slot, requests[Int(slot)].status)
        }
        finishDurably(slot)
    }
}
