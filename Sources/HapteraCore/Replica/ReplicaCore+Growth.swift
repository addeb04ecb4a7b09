// The volume grows: room in the head's files first, then the record, then its Install.
//
// 1. asked for by `prepareSize`, or by an Install that comes without it, both files of the head are
//    made longer and synced                                  -> longer files, the old size
// 2. the Install's manifest says the new size                -> old or new
// Nothing is beyond the old size in the file of any layer but the head's, and in that not before 2:
// a frozen layer keeps the size it was frozen at, and longer files than they must be say nothing.

struct GrowthState {
    /// Bytes the head's files have durable room for.
    var prepared: UInt64
    /// What they are being made to have room for.
    var target: UInt64?
    var operationsLeft = 0
    /// Requests that wait for it.
    var waiting = SlotQueue()
}

extension ReplicaCore {
    func prepareSize(_ slot: Int32) {
        guard requests[Int(slot)].header.offset > growth.prepared else { return finish(slot, .ok) }
        push(slot, &growth.waiting)
        extendHead(to: requests[Int(slot)].header.offset)
    }

    /// Whether the head, as this Install finds it, is as long as the record wants it.
    func hasRoom(for record: VolumeRecord) -> Bool {
        let size = record.size(of: chain.head)
        guard size > growth.prepared else { return true }
        extendHead(to: size)
        return false
    }

    private func extendHead(to size: UInt64) {
        guard growth.target == nil else { return }
        growth.target = size
        let token = startOperation(.growthExtend, index: 0)
        actions.append(.extend(chain.head, size: size, token: token))
    }

    func growthStepEnded(_ operation: DiskOperation, _ result: Int) {
        guard operation.kind == .growthExtend else {
            // What a sync has failed to make durable is not known any more.
            guard result == 0 else { return fail(.syncFailed(errno: Int32(-result))) }
            growth.operationsLeft -= 1
            if growth.operationsLeft == 0 { growthEnded(.ok) }
            return
        }
        guard result >= 0 else { return growthEnded(status(ofError: result)) }
        guard !options.mutations.contains(.growthNotSynced) else { return growthEnded(.ok) }
        for file in [ReplicaFile.data(chain.head), .table(chain.head)] {
            growth.operationsLeft += 1
            actions.append(.sync(file, token: startOperation(.growthSync, index: 0)))
        }
    }

    private func growthEnded(_ status: FrameStatus) {
        guard let target = growth.target else { return }
        growth.target = nil
        if status == .ok { growth.prepared = max(growth.prepared, target) }
        var waiting = growth.waiting
        growth.waiting = SlotQueue()
        while let slot = pop(&waiting) {
            if status != .ok, requests[Int(slot)].header.offset >= target {
                finish(slot, status)
            } else {
                resume(slot)
            }
        }
        // Nothing has changed yet: with another place to live the next Install makes them.
        if status != .ok, currentInstall >= 0, startedCount == 0 { endInstall(refusing: status) }
    }

    /// The manifest says the size: from here on requests may be about all of it.
    func adoptSize(_ made: Manifest) {
        growth.prepared =
            made.head > chain.head ? made.size : max(growth.prepared, made.size(of: made.head))
        if made.size > size {
            size = made.size
            regionCount = Geometry.regionCount(size: size)
            chain.grow(regionCount: regionCount)
        }
        growCache(layers: made.layers.count)
    }

    /// With layers and regions, to half as much again at least: snapshots come one by one.
    private func growCache(layers: Int) {
        let most = options.framesMax
        let needed = Self.frameCount(most: most, regions: regionCount, layers: layers)
        guard needed > cache.frames.count else { return }
        cache.grow(frameCount: min(most, max(needed, cache.frames.count / 2 * 3)))
    }

    /// Enough for all there is, and for some layers that are still to come.
    static func frameCount(most: Int, regions: UInt64, layers: Int) -> Int {
        Int(min(UInt64(most), regions * UInt64(layers + 8) + 64))
    }
}
