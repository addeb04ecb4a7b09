import HapteraCore

/// What clients were promised about each sector, for comparison with the replicas' disks.
struct Promises {
    /// The last write acknowledged, and the last one a completed flush covers; 0: none.
    var acknowledged: [Int]
    var flushed: [Int]
    /// When each operation was acknowledged, counting acknowledgements.
    private(set) var order: [Int: Int] = [:]
    /// `acknowledged` as it was when a flush under way began.
    private var snapshots: [Int: [Int]] = [:]

    init(sectorCount: Int) {
        acknowledged = Array(repeating: 0, count: sectorCount)
        flushed = acknowledged
    }

    mutating func began(_ operation: ClientOperation) {
        if operation.kind == .flush { snapshots[operation.id] = acknowledged }
    }
    mutating func ended(_ operation: ClientOperation) {
        order[operation.id] = order.count + 1
        for sector in operation.sectors where operation.changesData {
            acknowledged[sector] = operation.id
            if operation.flags.contains(.fua) { flushed[sector] = operation.id }
        }
        guard let snapshot = snapshots.removeValue(forKey: operation.id) else { return }
        for sector in snapshot.indices where isLater(snapshot[sector], flushed[sector]) {
            flushed[sector] = snapshot[sector]
        }
    }
    /// Unflushed writes may be gone: only what was flushed is still promised.
    mutating func lost() {
        acknowledged = flushed
        for operation in snapshots.keys { snapshots[operation] = flushed }
    }

    /// Bytes were kept that no entry vouches for: what was trimmed before a torn write may show.
    mutating func forget(_ blocks: Range<UInt64>) {
        for sector in Int(blocks.lowerBound) * 8..<Int(blocks.upperBound) * 8 {
            acknowledged[sector] = 0
            flushed[sector] = 0
        }
        for operation in snapshots.keys { snapshots[operation] = flushed }
    }

    private func isLater(_ a: Int, _ b: Int) -> Bool { order[a, default: 0] > order[b, default: 0] }
    /// Whether a copy that holds the outcome of `held` keeps the promise `promised`.
    func covers(_ held: ClientOperation, _ promised: Int) -> Bool {
        held.id == promised || order[held.id] == nil || isLater(held.id, promised)
    }
}

extension World {
    /// Looks at the members' disks: invariants 7, 8 and 13.
    func audit() {
        let members = hosts.filter { store.record.contains($0.id) }
        let current = members.map {
            ReplicaImage($0.disk, isDurable: false, sizeBytes: workload.sizeBytes)
        }
        let durable = members.map {
            ReplicaImage($0.disk, isDurable: true, sizeBytes: workload.sizeBytes)
        }
        for index in members.indices {
            guard let now = current[index], let kept = durable[index] else {
                return fail("\(members[index].name): the files do not make sense")
            }
            if kept.promise < members[index].installed {
                fail(
                    "invariant 6: \(members[index].name) promised"
                        + " e\(members[index].installed.rawValue), but not durably"
                )
            }
            if !members[index].isLossy {
                compare(members[index], now, promises.acknowledged, "7", "lacks acknowledged")
            }
            compare(members[index], kept, promises.flushed, "8", "would lose flushed")
        }
        compareMembers(members, current.compactMap { $0 }, "current")
        compareMembers(members, durable.compactMap { $0 }, "durable")
    }

    private func compare(
        _ host: SimulatedReplica, _ image: ReplicaImage, _ promised: [Int], _ invariant: String,
        _ what: String
    ) {
        for sector in hotSectors where promised[sector] != 0 {
            let value = image.value(sector: sector, scratch: sectorBlock.memory)
            let operation = operations[promised[sector] - 1]
            // Bytes under a torn write: what was trimmed before may still lie there.
            guard
                isAcceptable(value, sector, promised[sector])
                    || image.isDoubtful(sector / Content.sectorsPerBlock)
                        && isAcceptable(0, sector, promised[sector])
            else {
                return fail(
                    "invariant \(invariant): \(host.name) \(what) \(operation.text) at sector"
                        + " \(sector): holds \(value == Content.garbage ? "garbage" : "#\(value)")")
            }
        }
    }

    private func isAcceptable(_ value: ValueID, _ sector: Int, _ promised: Int) -> Bool {
        if value == Content.garbage { return faults.rot }
        if value != 0 {
            return value <= UInt64(operations.count)
                && promises.covers(operations[Int(value) - 1], promised)
        }
        if operations[promised - 1].value == 0 { return true }
        // Zero, by any operation that makes zeroes and may have come later.
        return operations[promised...].contains {
            $0.changesData && $0.value == 0 && $0.sectors.contains(sector)
        }
            || operations[..<promised].contains {
                $0.changesData && $0.value == 0 && $0.sectors.contains(sector)
                    && promises.covers($0, promised)
            }
    }

    /// 13: where two members differ, at least one of them has the region in its activity log.
    private func compareMembers(
        _ members: [SimulatedReplica], _ images: [ReplicaImage], _ kind: String
    ) {
        guard images.count == members.count, !faults.rot else { return }
        for sector in hotSectors {
            let block = sector / Content.sectorsPerBlock
            let region = UInt64(block / Geometry.blocksPerRegion)
            let unlisted = members.indices.filter {
                !images[$0].activeRegions.contains(region)
            }
            guard unlisted.count > 1 else { continue }
            let first = images[unlisted[0]].value(sector: sector, scratch: sectorBlock.memory)
            for index in unlisted.dropFirst() {
                let other = images[index].value(sector: sector, scratch: sectorBlock.memory)
                if other == first { continue }
                return fail(
                    "invariant 13: \(kind) images of \(members[unlisted[0]].name) and"
                        + " \(members[index].name) differ at sector \(sector) (#\(first),"
                        + " #\(other)),"
                        + " which neither activity log covers")
            }
        }
    }

    /// After a detach everything is equal, verified and drained.
    func auditAtRest() {
        audit()
        let images = hosts.map {
            ReplicaImage($0.disk, isDurable: true, sizeBytes: workload.sizeBytes)
        }
        for (host, image) in zip(hosts, images) where store.record.contains(host.id) {
            guard let image else { return fail("\(host.name): the files do not make sense") }
            for block in image.entries.indices where image.isDoubtful(block) {
                if !faults.rot { return fail("\(host.name): block \(block) is damaged at rest") }
            }
            for sector in hotSectors {
                let mine = image.value(sector: sector, scratch: sectorBlock.memory)
                let first = images[0]?.value(sector: sector, scratch: sectorBlock.memory) ?? mine
                if mine != first && !faults.rot {
                    return fail(
                        "invariant 13: at rest \(host.name) holds #\(mine) at sector \(sector),"
                            + " \(hosts[0].name) #\(first)")
                }
            }
        }
    }
}
