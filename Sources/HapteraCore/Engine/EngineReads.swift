// Reads, flushes and status requests (rules R and F).

extension EngineCore {
    /// A member to read from that this operation has not tried: the one that should answer first.
    /// When all were tried in vain, the client gets an error.
    func chooseReader(_ index: Int) -> ReplicaSlot? {
        var candidates = liveMembers.subtracting(slots[index].tried)
        if mutations.contains(.readFromJoiner), let joiner, isLive(joiner), joinStage == .copying {
            candidates = SlotSet(joiner)
        }
        guard var best = candidates.first else {
            // No member in contact at all: wait, the volume is about to stall or to change.
            if slots[index].tried.isEmpty || liveMembers.isEmpty || awaitsRepair(index) {
                dropEdges(index)
                slots[index].phase = .waiting
                slots[index].tried = SlotSet()
                dropOrphan(index)
                return nil
            }
            completeClient(index, .ioError)
            release(index)
            return nil
        }
        while let slot = candidates.popFirst() {
            if readCost(slot) < readCost(best) { best = slot }
        }
        slots[index].source = Int8(best)
        return best
    }

    /// No member has all of the blocks: each of them may be good on another one. They are repaired
    /// from each other first, once, as after a read that one of them could answer. Not for one that
    /// was asked for in vain a moment ago: it reads the whole region on every member.
    private func awaitsRepair(_ index: Int) -> Bool {
        let (first, end) = (slots[index].firstBlock, slots[index].endBlock)
        guard slots[index].operation.kind != .status, members.count > 1 else { return false }
        let request = BlocksOfLayer(
            layer: slots[index].operation.layer, first: first, count: end - first)
        if slots[index].wasRepaired {
            if lostReads.count >= Self.lostReadsMax { lostReads = [:] }
            lostReads[request] = now.adding(milliseconds: Self.lostReadMilliseconds)
            return false
        }
        if let until = lostReads[request], now < until { return false }
        slots[index].wasRepaired = true
        repair(first / UInt64(Geometry.blocksPerRegion))
        return true
    }
    static let lostReadMilliseconds: UInt64 = 10_000
    static let lostReadsMax = 1024

    /// A snapshot is read like the volume itself, lock included: the frozen layer may still be
    /// written to, by what was sent before the freeze or to make members equal. False if there is
    /// no such snapshot: then the client has an error.
    private func isLayerThere(_ index: Int) -> Bool {
        let (layer, base) = (slots[index].operation.layer, slots[index].operation.base)
        if layer == .head || isFrozenLayer(layer),
            base == .head || isFrozenLayer(base) && (layer == .head || base <= layer)
        {
            return true
        }
        completeClient(index, .ioError)
        release(index)
        return false
    }

    private func isFrozenLayer(_ layer: LayerID) -> Bool {
        layer < head && layer != deletedLayer && record?.layers.index(ofLayer: layer) != nil
    }

    func sendRead(_ index: Int) {
        guard isLayerThere(index) else { return }
        slots[index].phase = .inFlight
        slots[index].sentAt = now
        guard let source = chooseReader(index) else { return }
        var header = FrameHeader(kind: .read)
        header.tag = tag(index)
        header.offset = slots[index].firstBlock * UInt64(Geometry.blockSize)
        header.length =
            UInt32(slots[index].endBlock - slots[index].firstBlock)
            * UInt32(Geometry.blockSize)
        header.layer = slots[index].operation.layer
        replicas[source].reads += 1
        send(source, header)
    }

    /// Holds no range: what is being written meanwhile may be told of or not. But of a snapshot,
    /// what was sent before the freeze must be there: see `advanceStatus`.
    func sendStatus(_ index: Int) {
        guard isLayerThere(index) else { return }
        guard !isResolving, !isBeingWritten(slots[index].operation.layer) else {
            slots[index].phase = .waiting
            hasWaitingStatus = true
            dropOrphan(index)
            return
        }
        slots[index].phase = .inFlight
        slots[index].sentAt = now
        guard let source = chooseReader(index) else { return }
        var header = FrameHeader(kind: .status)
        header.tag = tag(index)
        header.offset = slots[index].operation.offset
        header.length = UInt32(min(slots[index].operation.length, EngineLimits.statusLengthMax))
        header.layer = slots[index].operation.layer
        header.auxiliary = UInt64(slots[index].operation.base.rawValue)
        send(source, header)
    }
    /// Whether a write that the frozen layer, or one below it, will hold is on the way.
    private func isBeingWritten(_ layer: LayerID) -> Bool {
        guard layer != .head, layer > finishedLayer else { return false }
        for index in 0..<slotsUsed where slots[index].use == .client {
            if slots[index].isChanging, slots[index].layer <= layer { return true }
        }
        return false
    }
    /// After every event, while a status waits for writes to the layer it is about.
    func advanceStatus() {
        guard phase == .serving else { return }
        hasWaitingStatus = false
        for index in 0..<slotsUsed
        where slots[index].use == .client && slots[index].operation.kind == .status {
            tryStart(index)
        }
    }

    /// F: covers every write acknowledged so far; goes to every member and to a joiner.
    func sendFlush(_ index: Int) {
        sequence = SequenceNumber(sequence.rawValue + 1)
        slots[index].phase = .inFlight
        slots[index].sequence = sequence
        slots[index].epoch = epoch
        slots[index].sentAt = now
        slots[index].sent = SlotSet()
        slots[index].replied = SlotSet()
        slots[index].isPartial = false
        slots[index].mayStabilise =
            isTakeoverResolved || mutations.contains(.stableBeforeResolved)
        flushDueAt = nil
        isLogPressed = false
        pressedFlushAfter = now.adding(milliseconds: Self.pressedFlushMilliseconds)
        var targets = liveMembers
        if let joiner, isLive(joiner), joinStage != .installing, joinStage != .none {
            targets.insert(SlotSet(joiner))
        }
        sendFlush(index, to: targets)
    }
    private func sendFlush(_ index: Int, to targets: SlotSet) {
        var header = FrameHeader(kind: .flush)
        header.tag = tag(index)
        header.sequence = slots[index].sequence
        slots[index].sent.formUnion(targets)
        var rest = targets
        while let slot = rest.popFirst() {
            probeMark(slot, header.sequence)
            send(slot, header)
        }
    }

    func settleFlush(_ index: Int) {
        if slots[index].use == .flush, slots[index].operation.userData == Self.joinFlush {
            guard slots[index].sent.isSubset(of: slots[index].replied) else { return }
            // What the flush did not wait for may have been acknowledged without the joiner.
            isJoinFlushed = !slots[index].isPartial
            if slots[index].isPartial { joinStage = .copying }
            release(index)
            return
        }
        // Somebody whose reply counts now was not asked yet: a joiner that became required.
        var missing = SlotSet()
        var rest = required.subtracting(slots[index].sent)
        while let slot = rest.popFirst() {
            if isLive(slot) { missing.insert(SlotSet(slot)) }
        }
        if !missing.isEmpty { sendFlush(index, to: missing) }
        // A flush of the engine's own answers nobody: the stable point moves though members are
        // missing, or logs would fill, the joiner's first, and none could come back.
        let isSnapshots =
            slots[index].use == .flush && slots[index].operation.userData == Self.snapshotFlush
        let mayEnd =
            slots[index].use == .client || isSnapshots
            ? mayAcknowledge(slots[index].replied)
            : isEverywhere(slots[index].replied) && mayAnswer()
        guard mayEnd else { return }
        if slots[index].mayStabilise {
            let point = StablePoint(epoch: slots[index].epoch, sequence: slots[index].sequence)
            if point > stablePoint {
                passFull(index)
                // The joiner nearly always answers later than the last member. It goes by its own
                // syncs as well; without the point its activity log would never drain.
                var told = slots[index].replied
                if let joiner { told.insert(SlotSet(joiner)) }
                leaveOut(point, to: told)
                announce(point, to: told)
            }
        }
        if slots[index].use == .client {
            completeClient(index, .ok)
        } else if isSnapshots {
            finishSnapshot()
        } else {
            isFlushInFlight = false
        }
        release(index)
    }

    /// Regions that stay active everywhere though the point is stable: not every member holds
    /// durably what was written to them before it.
    private func leaveOut(_ point: StablePoint, to replied: SlotSet) {
        guard !passed.isEmpty || !erroredRegions.isEmpty else { return }
        // Not their other layers: what is frozen would stay in the logs for as long as there are
        // writes to the head (seed 200142).
        var regions: Set<LayerRegion> = []
        for region in erroredRegions.keys {
            for layer in suspectLayers[region] ?? [head] {
                regions.insert(LayerRegion(layer, region))
            }
        }
        for (flush, region) in passed where flush == point.sequence {
            regions.insert(region)
            // Should nothing else be written, they would be in the logs for ever, and what is
            // merged into them or out of them, too (seed 1403677).
            wantFlush()
        }
        passed.removeAll { $0.flush <= point.sequence }
        if mutations.contains(.passedWritesNotLeftOut) { return }
        var header = FrameHeader(kind: .stable)
        header.auxiliary = point.epoch.rawValue
        header.sequence = point.sequence
        header.length = UInt32(Geometry.regionSize)
        for region in regions.sorted(by: { $0.packed < $1.packed }) {
            header.layer = region.layer
            header.offset = region.region * UInt64(Geometry.regionSize)
            var rest = replied
            while let slot = rest.popFirst() {
                if isLive(slot) { send(slot, header, expectsReply: false) }
            }
        }
    }

    /// The replica let the flush pass by writes that wait for room in its activity log: perhaps all
    /// that it has not answered.
    func flushPassed(_ index: Int, at slot: ReplicaSlot) {
        slots[index].isPartial = true
        for other in 0..<slotsUsed where slots[other].isChanging {
            let isLater = slots[other].sequence > slots[index].sequence
            guard !isLater, !slots[other].replied.contains(slot) else { continue }
            pass(index, layerWritten(other), slots[other].firstBlock)
        }
    }
    /// A member that had no space for a write answers a flush behind it all the same. Until the
    /// record does without that member the write's region stays active: the Install of that record
    /// raises its birth, or the delta with which the member returns would lack it (seed 5604269).
    private func passFull(_ flush: Int) {
        guard !mutations.contains(.passedWritesNotLeftOut) else { return }
        for other in 0..<slotsUsed
        where slots[other].isChanging && !slots[other].full.isEmpty
            && slots[other].sequence < slots[flush].sequence
        {
            pass(flush, layerWritten(other), slots[other].firstBlock)
        }
    }
    /// The replica comes to the write of this header only now: flushes that it has not answered
    /// may have passed it.
    func writePassed(_ header: FrameHeader, at slot: ReplicaSlot) {
        let layer = slotIndex(ofTag: header.tag).map(layerWritten) ?? head
        for index in 0..<slotsUsed
        where (slots[index].use == .flush || slots[index].use == .client && slots[index].isFlush)
            && slots[index].sent.contains(slot) && !slots[index].replied.contains(slot)
            && slots[index].sequence > header.sequence
        {
            slots[index].isPartial = true
            pass(index, layer, header.offset / UInt64(Geometry.blockSize))
        }
    }
    /// Which layer the slot's writes on the way are for.
    private func layerWritten(_ index: Int) -> LayerID {
        guard slots[index].use == .job else {
            return slots[index].layer == .head ? head : slots[index].layer
        }
        let layer = jobs[Int(slots[index].operation.userData)].layer
        return layer == .head ? head : layer
    }
    private func pass(_ flush: Int, _ layer: LayerID, _ block: UInt64) {
        let region = LayerRegion(layer, block / UInt64(Geometry.blocksPerRegion))
        let sequence = slots[flush].sequence
        if !passed.contains(where: { $0.flush == sequence && $0.region == region }) {
            passed.append((sequence, region))
        }
    }

    /// S moved: replicas may forget what it covers. Never relabelled with a later epoch.
    private func announce(_ point: StablePoint, to replied: SlotSet) {
        stablePoint = point
        var header = FrameHeader(kind: .stable)
        header.auxiliary = point.epoch.rawValue
        header.sequence = point.sequence
        learnMarks(upTo: point)
        // Should nothing else be written, nobody would know of what this one has marked. A mark of
        // this epoch tells, when the store is lost, that nobody who left was taken back.
        if markedPoint.epoch < epoch { wantFlush() }
        header.offset = markedPoint.epoch.rawValue
        header.tag = markedPoint.sequence.rawValue
        var rest = replied
        while let slot = rest.popFirst() {
            guard isLive(slot) else { continue }
            header.flags = members.contains(slot) ? FrameFlags.settled : 0
            if members.contains(slot) { replicas[slot].isRebooted = false }
            send(slot, header, expectsReply: false)
        }
    }
}
