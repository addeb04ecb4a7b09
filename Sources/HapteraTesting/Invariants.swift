import HapteraCore

// What the world checks while it runs. Numbers are those of docs/replication.md.

extension World {
    // MARK: Requests and replies

    /// An engine sends a frame.
    func observeRequest(
        _ engine: SimulatedEngine, _ connection: SimulatedNetwork.Connection,
        _ header: FrameHeader
    ) {
        let host = hosts[connection.replica]
        if header.kind == .read && header.flags & FrameFlags.resync == 0,
            let record = store.record(at: header.epoch), !record.contains(host.id)
        {
            fail("invariant 11: a read goes to \(host.name), no member in epoch \(header.epoch)")
        }
    }

    /// A frame reaches a replica: remembers what it may change.
    func observeArrival(
        _ host: SimulatedReplica, _ number: Int, _ header: FrameHeader, _ data: RawMemory
    ) {
        if header.kind == .stable && header.flags & FrameFlags.settled != 0
            && header.epoch == host.installed
        {
            host.isLossy = false
            host.isMarkedRebooted = false
        }
        guard header.kind == .write || header.kind == .setState || header.kind == .adopt else {
            return
        }
        let first = header.offset / UInt64(Geometry.blockSize)
        let blocks = first..<first + UInt64(header.length) / UInt64(Geometry.blockSize)
        if header.kind == .adopt { promises.forget(blocks) }
        for other in host.requests
        where other.connection == number && other.blocks.overlaps(blocks)
            && other.epoch == header.epoch
        {
            fail(
                "invariant 22: \(host.name) is given \(describe(header)) while"
                    + " s\(other.sequence.rawValue) on the same blocks is under way")
        }
        var values: [ValueID] = []
        if header.kind == .write {
            for position in stride(from: 0, to: data.count, by: Content.sectorSize) {
                let value = data.load(UInt64.self, position)
                if value != 0 && value != values.last { values.append(value) }
            }
        }
        host.requests.append(
            .init(
                connection: number, tag: header.tag, epoch: header.epoch,
                sequence: header.sequence, blocks: blocks, values: values))
    }

    /// A replica answers.
    func observeReply(
        _ host: SimulatedReplica, _ number: Int, _ header: FrameHeader, _ table: BufferID
    ) {
        // 3: the promise never goes back, over any crash, and never runs ahead of the store. (A
        // refusal may name an epoch that is only about to be promised.)
        if header.status == .ok && header.kind != .hello {
            if header.epoch < host.promised {
                fail(
                    "invariant 3: \(host.name) promised \(host.promised.rawValue), now"
                        + " \(header.epoch.rawValue)"
                )
            }
            if header.epoch > store.record.epoch {
                fail("invariant 3: \(host.name) promises an epoch the store never had")
            }
            host.promised = max(host.promised, header.epoch)
        }
        observeBirth(host, header, table)
        switch header.kind {
        case .install where header.status == .ok: observeInstall(host, header, table)
        case .write, .setState, .adopt:
            guard
                let index = host.requests.firstIndex(where: {
                    $0.connection == number && $0.tag == header.tag
                })
            else { return }
            let request = host.requests.remove(at: index)
            if header.status == .ok { observeApplied(host, request) }
        case .read where header.status == .ok && header.epoch < host.installed:
            fail("invariant 4: \(host.name) answered a read of epoch \(header.epoch.rawValue)")
        default: break
        }
    }

    private func observeInstall(
        _ host: SimulatedReplica, _ header: FrameHeader, _ table: BufferID
    ) {
        let payload = host.pool?.memory(table).slice(0, Int(header.tableLength)).bytes() ?? []
        guard let reply = InstallReply(decoding: payload) else {
            return fail("\(host.name): an Install's reply does not parse")
        }
        host.isMarkedRebooted = reply.isRebooted
        noteLoss()
        for region in reply.activeRegions { host.restamped[region] = header.epoch }
        trace("\(host.name) installed e\(header.epoch.rawValue)")
        host.installed = max(host.installed, header.epoch)
        host.installedAt = timeline.now
        if host.disk.dataWritesInFlight > 0 {
            fail(
                "invariant 4: \(host.name) promised e\(header.epoch.rawValue) with older writes"
                    + " under way"
            )
        }
        // Answers for anything older may not come any more.
        host.requests.removeAll { $0.epoch < header.epoch }
    }

    private func observeApplied(_ host: SimulatedReplica, _ request: SimulatedReplica.DataRequest) {
        if request.epoch < host.installed {
            fail(
                "invariant 4: \(host.name) applied a write of e\(request.epoch.rawValue) after"
                    + " e\(host.installed.rawValue)"
            )
        }
        let point = StablePoint(epoch: request.epoch, sequence: request.sequence)
        for block in request.blocks where Int(block) < host.order.count {
            if request.sequence != .zero && point < host.order[Int(block)] {
                fail(
                    "invariant 22: \(host.name) applied s\(request.sequence.rawValue) to block"
                        + " \(block) out of order"
                )
            }
            host.order[Int(block)] = max(host.order[Int(block)], point)
        }
        for value in request.values { host.applied.insert(value) }
    }

    /// 14: data changes only in regions that are durably in the activity log. (Looked at now and
    /// then: reading the log takes its time.)
    func observeDiskAction(_ host: SimulatedReplica, _ action: ReplicaAction) {
        guard case .write(.data, let offset, _, _, _, _) = action else { return }
        host.dataWriteCount += 1
        guard host.dataWriteCount % 8 == 1 else { return }
        let image = ReplicaImage(host.disk, isDurable: true, sizeBytes: workload.sizeBytes)
        let region = Geometry.region(ofByte: offset)
        if image?.activeRegions.contains(region) != true {
            fail("invariant 14: \(host.name) writes data of region \(region), not durably active")
        }
    }

    /// 16: an Install has raised the birth of every active region.
    private func observeBirth(
        _ host: SimulatedReplica, _ header: FrameHeader, _ table: BufferID
    ) {
        guard header.kind == .digest, header.status == .ok, let pool = host.pool else { return }
        let region = Geometry.region(ofByte: header.offset)
        let birth = Epoch(pool.memory(table).load(UInt64.self, 0))
        if let least = host.restamped[region], birth < least {
            fail(
                "invariant 16: \(host.name) gives region \(region) birth \(birth.rawValue),"
                    + " active at the install of e\(least.rawValue)")
        }
    }

    /// A replica gave itself up.
    func observeFailure(_ host: SimulatedReplica, _ failure: ReplicaFailure) {
        switch failure {
        case .syncFailed where faults.diskErrors: break
        case .manifestWriteFailed where faults.diskErrors: break
        case .tableUnreadable where faults.diskErrors || faults.rot: break
        default: fail("\(host.name) failed without a reason: \(failure)")
        }
    }

    // MARK: Acknowledgements

    /// An engine tells a client that its request is done.
    func observeAcknowledgement(_ operation: ClientOperation, _ engine: SimulatedEngine) {
        if operation.kind != .flush && operation.sectors.isEmpty { return }
        guard let epoch = engine.core.record?.epoch, let record = store.record(at: epoch) else {
            return fail("\(engine.name) answers without a record")
        }
        // 5: only the engine the record names acknowledges anything.
        if record.engine != engine.instance {
            fail("invariant 5: \(engine.name) answers in e\(epoch.rawValue), which is not its own")
        }
        // 12: no engine's answer rests on what it was before another one answered. 5: none follows.
        if operation.startedAfter > epoch {
            fail(
                "invariant 12: \(engine.name) answers \(operation.text) in e\(epoch.rawValue);"
                    + " it began after an answer in e\(operation.startedAfter.rawValue)")
        } else if acknowledgedEpoch > epoch {
            fail(
                "invariant 5: \(engine.name) answers \(operation.text) in e\(epoch.rawValue)"
                    + " after an answer in e\(acknowledgedEpoch.rawValue)")
        }
        acknowledgedEpoch = max(acknowledgedEpoch, epoch)
        guard operation.changesData else { return }
        // 6: every member has promised the epoch and applied the write. While a change of the
        // record waits for its installs, an earlier record may be the one that counts; members of
        // the later ones must have applied the write all the same.
        var index = epoch
        while let record = store.record(at: index), record.engine == engine.instance {
            guard hasApplied(operation, record) else { break }
            if hosts.allSatisfy({ !record.contains($0.id) || $0.installed >= index }) { return }
            index = Epoch(index.rawValue - 1)
        }
        fail(
            "invariant 6: \(operation.text) acknowledged in e\(epoch.rawValue) by \(engine.name)"
                + " without every member of \(names(record))")
    }

    private func hasApplied(_ operation: ClientOperation, _ record: VolumeRecord) -> Bool {
        operation.value == 0
            || hosts.allSatisfy {
                !record.contains($0.id) || $0.applied.contains(operation.value)
            }
    }

    /// 10: a value still on its way is not returned by the engine that has it.
    func observeReadValue(
        _ operation: ClientOperation, _ engine: SimulatedEngine, _ value: ValueID, sector: Int
    ) {
        guard value != 0 else { return }
        guard value <= UInt64(operations.count) else {
            return fail("invariant 27: a value nobody wrote")
        }
        let writer = operations[Int(value) - 1]
        if writer.firstEngine == engine.index, writer.engine == engine.index,
            writer.isOutstanding
        {
            fail("invariant 10: \(operation.text) returned \(writer.text), which is in flight")
        }
    }

    /// A client got an error. Only trouble no member is spared explains one.
    func observeError(_ operation: ClientOperation, _ result: OperationResult) {
        if result == .noSpace && faults.noSpace { return }
        let isPartial = operation.offset % 4096 != 0 || operation.length % 4096 != 0
        if result == .ioError && (faults.diskErrors || faults.rot)
            && (operation.kind == .read || isPartial)
        {
            return
        }
        fail("\(operation.text) failed: \(result)")
    }

    // MARK: Membership

    /// An engine asks for a new record.
    func observeProposal(_ engine: SimulatedEngine) {
        let next = engine.core.proposedRecord
        // The same proposal again, because the first is in doubt: nothing new is decided.
        guard next.nonce != engine.proposedNonce else { return }
        engine.proposedNonce = next.nonce
        // A superseded engine's proposal fails.
        guard next.epoch == store.record.epoch.next else { return }
        let rest = hosts.filter { next.contains($0.id) }
        let gone = hosts.filter { store.record.contains($0.id) && !next.contains($0.id) }
        if engine.servesNewClients && rest.allSatisfy(\.isMarkedRebooted) {
            // Nobody is left who would notice.
            note("loss of unflushed writes is allowed here")
            history.append(.lossAllowed, step: timeline.step)
            promises.lost()
            return
        }
        guard rest.allSatisfy(\.isLossy), gone.contains(where: { !$0.isLossy }) else { return }
        // 9, promise 1: a good copy is not given up for copies known to have lost power.
        let knows = rest.allSatisfy { host in
            guard let slot = engine.core.slot(of: host.id), let link = engine.connections[slot]
            else { return true }
            return link.process == host.process && host.startedAt >= host.powerCutAt
        }
        if knows && promises.acknowledged != promises.flushed {
            fail("\(engine.name) removes the last good member; left: \(names(next))")
        }
    }

    /// A record has landed in the store.
    func observeRecord(_ record: VolumeRecord, before: VolumeRecord) {
        for host in hosts where record.contains(host.id) && !before.contains(host.id) {
            // Filled since it joined, unless its power failed meanwhile.
            if host.powerCutAt < joinStartedAt { host.isLossy = false }
        }
        if record.engine != before.engine,
            let engine = engines.first(where: { $0.instance == record.engine })
        {
            engine.servesNewClients = record.clientGeneration != before.clientGeneration
        }
        if record.joining != nil && record.joining != before.joining {
            joinStartedAt = timeline.now
        }
        note("record e\(record.epoch.rawValue): \(names(record))\(record.isClean ? " clean" : "")")
        noteLoss()
    }

    /// Whether only copies that lost power are left: then, and only then, the volume may refuse.
    func noteLoss() {
        let members = hosts.filter { store.record.contains($0.id) }
        if members.allSatisfy(\.isMarkedRebooted) && !isLossPossible {
            isLossPossible = true
            note("only members that lost power are left")
        }
    }

    /// An engine begins to serve.
    func engineServes(_ engine: SimulatedEngine) {
        engine.hasServed = true
        guard isGenerationUnserved, engine.generation == generation else { return }
        isGenerationUnserved = false
        let members = hosts.filter { store.record.contains($0.id) }
        if members.allSatisfy(\.isMarkedRebooted) {
            // Nobody is left who would notice: what was not flushed may be gone.
            note("loss of unflushed writes is allowed here")
            history.append(.lossAllowed, step: timeline.step)
            promises.lost()
            isLossPossible = false
        }
    }

    /// An engine has made its members equal.
    func observeResolved(_ engine: SimulatedEngine) {
        guard let record = engine.core.record else { return }
        for host in hosts
        where record.contains(host.id) && host.installed == record.epoch
            && host.powerCutAt < host.installedAt
        {
            host.isLossy = false
        }
    }

    func names(_ record: VolumeRecord) -> String {
        var text = "in sync ["
        text += hosts.filter { record.contains($0.id) }.map { String($0.index) }.joined(
            separator: " ")
        text += "]"
        if let joining = record.joining, let host = hosts.first(where: { $0.id == joining.replica })
        {
            text += " joining \(host.index)"
        }
        if let engine = engines.first(where: { $0.instance == record.engine }) {
            text += " \(engine.name)"
        }
        return text
    }
}
