import HapteraCore

/// What clients were promised about each sector, for comparison with the replicas' disks.
struct Promises {
    /// The last write acknowledged, and the last one a completed flush covers; 0: none.
    var acknowledged: [Int]
    var flushed: [Int]
    /// When each operation was acknowledged, counting acknowledgements; 0: not yet. By its number.
    private var order: [Int] = [0]
    private(set) var acknowledgements = 0
    /// `acknowledgements` when something promised was last lost.
    private(set) var lossAt = 0
    /// Times something promised was lost legally.
    private(set) var losses = 0
    /// `acknowledged` as it was when a flush under way began.
    private var snapshots: [Int: [Int]] = [:]

    init(sectorCount: Int) {
        acknowledged = Array(repeating: 0, count: sectorCount)
        flushed = acknowledged
    }

    mutating func began(_ operation: ClientOperation) {
        order.append(0)
        if operation.kind == .flush { snapshots[operation.id] = acknowledged }
    }
    mutating func ended(_ operation: ClientOperation) {
        acknowledgements += 1
        order[operation.id] = acknowledgements
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
        losses += 1
        lossAt = acknowledgements
        acknowledged = flushed
        for operation in snapshots.keys { snapshots[operation] = flushed }
    }

    /// The volume is another from here on.
    mutating func restart() {
        losses += 1
        acknowledgements += 1
        lossAt = acknowledgements
        snapshots = [:]
    }
    /// Counts as acknowledged just now.
    mutating func promoted(_ operation: Int) { order[operation] = acknowledgements }

    /// Nothing is promised any more but what will be.
    mutating func salvaged() {
        losses += 1
        lossAt = acknowledgements
        for sector in acknowledged.indices {
            acknowledged[sector] = 0
            flushed[sector] = 0
        }
        snapshots = [:]
    }

    /// Bytes were kept that no entry vouches for: what was trimmed before a torn write may show.
    mutating func forget(_ blocks: Range<UInt64>) {
        for sector in Int(blocks.lowerBound) * 8..<Int(blocks.upperBound) * 8 {
            acknowledged[sector] = 0
            flushed[sector] = 0
        }
        for operation in snapshots.keys { snapshots[operation] = flushed }
    }

    /// When the operation was acknowledged, counting acknowledgements; 0: it was not.
    func acknowledgedAt(_ operation: ClientOperation) -> Int { order[operation.id] }
    private func isLater(_ a: Int, _ b: Int) -> Bool { order[a] > order[b] }
    /// Whether a copy that holds the outcome of `held` keeps the promise `promised`.
    func covers(_ held: ClientOperation, _ promised: Int) -> Bool {
        held.id == promised || order[held.id] == 0 || isLater(held.id, promised)
    }
}

extension World {
    /// Looks at the members' disks: invariants 7, 8 and 13.
    func audit() {
        // What the store says is not true.
        guard trueHistory == nil else { return }
        let members = hosts.filter {
            store.record.contains($0) && !$0.isRolledBack && $0.rot == .none
        }
        let current = members.map {
            ReplicaImage(
                $0.disk, isDurable: false, sizeBytes: workload.sizeBytes,
                record: trueRecord)
        }
        let durable = members.map {
            ReplicaImage(
                $0.disk, isDurable: true, sizeBytes: workload.sizeBytes,
                record: trueRecord)
        }
        for index in members.indices {
            guard let now = current[index], let kept = durable[index] else {
                return fail("\(members[index].name): the files do not make sense")
            }
            let host = members[index]
            check(
                6, kept.promise >= host.installed,
                "\(host.name) promised e\(host.installed.rawValue), but not durably")
            check(
                29, kept.installed == nil || kept.installed == store.record(at: kept.promise),
                "\(host.name) keeps another record of e\(kept.promise.rawValue)")
            if !host.isLossy {
                compare(host, now, promises.acknowledged, 7, "lacks acknowledged")
            }
            compare(host, kept, promises.flushed, 8, "would lose flushed")
            checkBirths(host, now)
            for (key, epoch) in host.lastWrite {
                guard let layer = kept.layer(key.layer), !layer.activeRegions.contains(key.region)
                else { continue }
                let birth = layer.birth(key.region, promise: kept.promise)
                check(
                    17, birth >= epoch,
                    "\(host.name) keeps birth \(birth.rawValue) for region \(key.region) of layer"
                        + " \(key.layer.rawValue), written in e\(epoch.rawValue)")
            }
        }
        compareMembers(members, current.compactMap { $0 }, "current")
        compareMembers(members, durable.compactMap { $0 }, "durable")
        compareDrained(members, current.compactMap { $0 }, durable.compactMap { $0 })
        compareSnapshots(members, durable.compactMap { $0 })
    }

    /// 15: what was acknowledged is durable on every member once one of them has let the region
    /// go from its activity log.
    private func compareDrained(
        _ members: [SimulatedReplica], _ current: [ReplicaImage], _ durable: [ReplicaImage]
    ) {
        guard current.count == members.count, durable.count == members.count else { return }
        let active = zip(members, current).compactMap { host, image in
            isNewcomer(host) ? nil : Set(image.activeRegions)
        }
        guard let first = active.first else { return }
        let common = active.dropFirst().reduce(first) { $0.intersection($1) }
        for (host, image) in zip(members, durable) {
            compare(host, image, promises.acknowledged, 15, "could lose, though let go elsewhere,")
            {
                !common.contains(UInt64($0 / Geometry.blocksPerRegion))
            }
        }
    }

    /// Promoted, and no point was stable since: a region that was found equal on it has never been
    /// in its log. It is in the logs of those that may still lose something of it.
    private func isNewcomer(_ host: SimulatedReplica) -> Bool {
        let before = store.history.last { !$0.contains(host) }
        guard let before, before.epoch > store.history[0].epoch else { return false }
        return (host.core?.knownStable.epoch ?? .zero) <= before.epoch
    }

    func compare(
        _ host: SimulatedReplica, _ image: ReplicaImage, _ promised: [Int], _ invariant: Int,
        _ what: String, _ concerns: (_ block: Int) -> Bool = { _ in true }
    ) {
        coverage.evaluated(invariant)
        for sector in hotSectors
        where promised[sector] != 0 && concerns(sector / Content.sectorsPerBlock) {
            let value = image.value(sector: sector, contents)
            let operation = operations[promised[sector] - 1]
            // Bytes under a torn write: what was trimmed before may still lie there. And a block
            // known to be damaged is repaired from another copy.
            guard
                isAcceptable(value, sector, promised[sector])
                    || image.isDoubtful(sector / Content.sectorsPerBlock)
                        && (faults.rot || host.marked.contains(sector / Content.sectorsPerBlock)
                            || isAcceptable(0, sector, promised[sector]))
            else {
                return fail(
                    "invariant \(invariant): \(host.name) \(what) \(operation.text) at sector"
                        + " \(sector): holds \(value == Content.garbage ? "garbage" : "#\(value)")")
            }
        }
    }

    func isAcceptable(_ value: ValueID, _ sector: Int, _ promised: Int) -> Bool {
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
        coverage.evaluated(13)
        for sector in hotSectors {
            let block = sector / Content.sectorsPerBlock
            let region = UInt64(block / Geometry.blocksPerRegion)
            let unlisted = members.indices.filter {
                !images[$0].activeRegions.contains(region)
            }
            guard unlisted.count > 1 else { continue }
            let first = images[unlisted[0]].value(sector: sector, contents)
            for index in unlisted.dropFirst() {
                let other = images[index].value(sector: sector, contents)
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
            ReplicaImage(
                $0.disk, isDurable: true, sizeBytes: workload.sizeBytes,
                record: trueRecord)
        }
        // One may have left once more, slow without any trouble left.
        let members = hosts.indices.filter {
            store.record.contains(hosts[$0]) && hosts[$0].rot == .none
        }
        let model = members[0]
        for member in members {
            let host = hosts[member]
            let image = images[member]
            guard let image else { return fail("\(host.name): the files do not make sense") }
            for block in image.entries.indices where image.isDoubtful(block) {
                if !faults.rot { return fail("\(host.name): block \(block) is damaged at rest") }
            }
            for sector in hotSectors {
                let mine = image.value(sector: sector, contents)
                let first =
                    images[model]?.value(sector: sector, contents) ?? mine
                if mine != first && !faults.rot {
                    return fail(
                        "invariant 13: at rest \(host.name) holds #\(mine) at sector \(sector),"
                            + " \(hosts[model].name) #\(first)")
                }
            }
        }
    }
}
