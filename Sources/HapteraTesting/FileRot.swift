import HapteraCore

// Rot of what says what the data is: pages of tables, records of activity logs, manifests. Drawn
// from a source of their own, in worlds where other bytes rot too: there one replica, which nothing
// happens to, has everything. A replica that comes to need what is damaged ends, or does not open,
// and is made anew by who looks after it.

/// What has rotted of a replica's directory beside its data.
enum FileRot {
    case none
    /// One of two slots that held the same, until they hold something newer.
    case manifestSlot
    /// Something that nothing else in the directory can replace.
    case lost
}

extension FaultPlan.Kind {
    static let ofFiles: [Self] = [.rotTable, .rotLog, .rotManifest]
}

extension World {
    /// Whether a replica may come to need what has rotted.
    private var rotsFiles: Bool {
        [self, sibling].contains { world in
            world.map { !Set($0.faults.kinds).isDisjoint(with: FaultPlan.Kind.ofFiles) } ?? false
        }
    }
    /// The replica is to be made anew, which no other may miss. (Seed 8: what it shared had rotted
    /// in a volume that was deleted since.)
    func mayBeReplaced(_ host: SimulatedReplica) -> Bool {
        faults.rot && (rotsFiles || host.rot == .lost) && host.index != keeper
    }

    func injectFileRot(_ kind: FaultPlan.Kind) {
        let victims = hosts.filter { $0.index != keeper }
        guard !victims.isEmpty else { return }
        let host = random.pick(victims)
        guard store.record.contains(host), isKeeperThere, host.core != nil, host.rot == .none else {
            return
        }
        switch kind {
        case .rotTable: rotTable(host)
        case .rotLog: rotLog(host)
        default: rotManifest(host)
        }
    }

    /// A page of a region that is not in the activity log: of one that is, what cannot be read is
    /// taken for torn.
    private func rotTable(_ host: SimulatedReplica) {
        guard
            let image = ReplicaImage(
                host.disk, isDurable: false, sizeBytes: workload.sizeBytes, record: trueRecord)
        else { return }
        let layer = random.pick(image.layers)
        guard !host.disk.isShared(layer.file), let table = host.disk.file(.table(layer.file)) else {
            return
        }
        let regions = layer.logIndex.indices.filter { region in
            let pair = Int(TablePage.pairOffset(region: UInt64(region)))
            return pair + TablePage.pairSize <= table.size && table.allocated[pair / 4096]
                && !layer.activeRegions.contains(UInt64(region))
        }
        guard !regions.isEmpty else { return }
        let region = random.pick(regions)
        note("fault: a page of region \(region) of \(host.name) rots")
        host.rot = .lost
        table.rot(
            byte: Int(TablePage.pairOffset(region: UInt64(region)))
                + random.below(TablePage.pairSize),
            bit: random.below(8))
    }

    /// A record that others follow: that the last one is missing, nothing tells. The process ends
    /// with it, since only the next one reads the log. Or the host restarts: then one that was
    /// covered, since any other may have been lost so.
    private func rotLog(_ host: SimulatedReplica) {
        guard let log = host.disk.file(.log), records(of: log).count > 1 else { return }
        let isRestart = random.permille(400) && mayLosePower(host)
        note(
            "fault: a record of the activity log of \(host.name) rots"
                + (isRestart ? ", its power fails" : ""))
        killReplica(host, restartAfter: random.between(1, 2000))
        if isRestart {
            cutPower(host)
            noteLoss()
        }
        let records = records(of: log)
        let covered = records.filter { $0.record.kind == .covered }.map(\.record.position).max()
        let end = isRestart ? covered ?? 0 : records.last?.record.index ?? 0
        let victims = records.filter { $0.record.index < end }
        guard !victims.isEmpty else { return }
        host.rot = .lost
        log.rot(
            byte: random.pick(victims).offset + random.below(LogRecord.size), bit: random.below(8))
        // As if it were as good as the others when the next engine makes them equal.
        if options.mutations.contains(.damagedRecordIsGap), let current = currentEngine {
            restartEngine(losesClients: false, after: current)
        }
    }
    private func records(of log: SimulatedFile) -> [(record: LogRecord, offset: Int)] {
        guard let (tail, capacity) = ReplicaImage.header(log.current) else { return [] }
        return (tail..<tail + capacity).compactMap { index in
            let offset = ActivityLog.ringOffset + Int(index % capacity) * LogRecord.size
            guard let record = LogRecord(decoding: log.current, at: offset),
                record.index == index
            else { return nil }
            return (record, offset)
        }
    }

    private func rotManifest(_ host: SimulatedReplica) {
        guard let file = host.disk.file(.manifest), host.disk.operationsInFlight == 0 else {
            return
        }
        let counters = (0..<2).map {
            Manifest(decoding: file.current.slice($0 * Manifest.slotSize, Manifest.slotSize))?
                .counter
        }
        // While one is being written, the other is all there is.
        guard counters[0] == counters[1] else { return }
        var slots = [0, 1]
        if random.permille(600) { slots.remove(at: random.below(2)) }
        note("fault: the manifest of \(host.name) rots in \(slots.count) of 2 slots")
        host.rot = slots.count == 2 ? .lost : .manifestSlot
        for slot in slots {
            file.rot(
                byte: slot * Manifest.slotSize + random.below(80),
                bit: random.below(8))
        }
        killReplica(host, restartAfter: random.between(1, 2000))
    }

    /// Who looks after the replica gives its directory up.
    func replaceDamaged(_ host: SimulatedReplica) {
        note("\(host.name) is damaged and made anew")
        coverage.took(.damagedReplaced)
        killReplica(host, restartAfter: random.between(1, 3000))
        host.disk.replace()
        loseLinks(host)
        host.replaced(incarnation: Incarnation(rawValue: random.next() | 1))
        loseDirectory(host)
        createReplica(host)
        noteLoss()
    }
}
