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
        switch header.kind {
        case .adopt where header.auxiliary != AdoptRequest.keep: break
        case .read, .status, .adopt:
            let isMember = store.record(at: header.epoch)?.contains(host.id) ?? true
            if let reader = engine.core.clientUserData(ofTag: header.tag) {
                check(11, isMember, "a read goes to \(host.name), no member in \(header.epoch)")
                let region = Geometry.region(ofByte: header.offset)
                // A region also becomes unresolved for what fails in it, and is made equal when
                // nothing is on the way in it. A read that began before in another place of it goes
                // on, with another member if need be (seeds 2205250, 2411671).
                let isUnresolved =
                    engine.unresolvedBefore.contains(region)
                    && engine.core.unresolvedRegions.contains(region)
                if !isUnresolved { engine.attempts[Int(reader)].readsSince = engine.servings }
                check(
                    11,
                    header.kind == .status || !isUnresolved
                        || engine.attempts[Int(reader)].readsSince == engine.servings,
                    "\(engine.name) reads region \(region), which is not resolved")
            } else {
                check(23, isMember, "\(host.name) is copied from, no member in \(header.epoch)")
            }
        default: break
        }
    }

    /// A frame reaches a replica: remembers what it may change.
    func observeArrival(
        _ host: SimulatedReplica, _ number: Int, _ header: FrameHeader, _ data: RawMemory,
        from engine: SimulatedEngine
    ) {
        if header.kind == .stable && header.flags & FrameFlags.settled != 0
            && header.epoch == host.installed
        {
            host.isLossy = false
            host.isMarkedRebooted = false
        }
        if header.kind == .digest { host.digestLayers[header.tag] = header.layer }
        guard header.kind == .write || header.kind == .setState || header.kind == .adopt else {
            return
        }
        let first = header.offset / UInt64(Geometry.blockSize)
        let blocks = first..<first + UInt64(header.length) / UInt64(Geometry.blockSize)
        if header.kind == .adopt {
            if header.auxiliary == AdoptRequest.keep {
                promises.forget(blocks)
            } else {
                host.marked.formUnion(blocks.map { Int($0) })
            }
        }
        let overlapping = host.requests.first {
            $0.connection == number && $0.blocks.overlaps(blocks) && $0.epoch == header.epoch
        }
        check(
            22, overlapping == nil,
            "\(host.name) is given \(describe(header)) while"
                + " s\(overlapping?.sequence.rawValue ?? 0) on the same blocks is under way")
        if header.flags & FrameFlags.resync != 0, engine.core.isResolution(header.tag) {
            observeMove(host, header, data)
        }
        var values: [ValueID] = []
        if header.kind == .write {
            for position in stride(from: 0, to: data.count, by: Content.sectorSize) {
                let value = contents.own(data.load(UInt64.self, position))
                if value != 0 && value != values.last { values.append(value) }
            }
        }
        host.requests.append(
            .init(
                connection: number, tag: header.tag, epoch: header.epoch,
                sequence: header.sequence, layer: header.layer, blocks: blocks, values: values,
                zeroing: zeroing(of: header, engine),
                isCopy: header.flags & FrameFlags.resync != 0))
    }

    /// The operation that zeroes or trims which the frame was sent for, if its engine has it still.
    private func zeroing(of header: FrameHeader, _ engine: SimulatedEngine) -> Int? {
        guard let attempt = engine.core.clientUserData(ofTag: header.tag) else { return nil }
        let operation = engine.attempts[Int(attempt)].operation
        return operation.changesData && operation.value == 0 ? operation.id : nil
    }

    /// 30: resolution moves a block only to who holds another one.
    private func observeMove(_ host: SimulatedReplica, _ header: FrameHeader, _ data: RawMemory) {
        // A block that cannot be read is rewritten, whatever is there.
        guard !faults.rot, !faults.diskErrors, header.epoch >= host.promised,
            let image = ReplicaImage(
                host.disk, isDurable: false, sizeBytes: workload.sizeBytes,
                record: trueRecord)
        else { return }
        let first = Int(header.offset) / Geometry.blockSize
        let id = header.layer == .head ? image.layers.last?.id : header.layer
        guard let layer = id.flatMap({ image.layer($0) }) else { return }
        for block in first..<first + Int(header.length) / Geometry.blockSize {
            let entry = layer.entries[block]
            let differs: Bool
            if header.kind == .write {
                let content = data.slice((block - first) * Geometry.blockSize, Geometry.blockSize)
                differs =
                    layer.isDoubtful(block)
                    || entry != BlockEntry(state: .data, checksum: CRC32C.checksum(content))
            } else {
                differs = UInt64(entry.state.rawValue) != header.auxiliary
            }
            check(30, differs, "\(host.name) is sent block \(block), which it has")
        }
    }

    /// A replica answers.
    func observeReply(
        _ host: SimulatedReplica, _ number: Int, _ header: FrameHeader, _ table: BufferID
    ) {
        // 3: the promise never goes back, over any crash, and never runs ahead of the store. (A
        // refusal may name an epoch that is only about to be promised.)
        if header.status == .ok && header.kind != .hello {
            check(
                3, header.epoch >= host.promised,
                "\(host.name) promised e\(host.promised.rawValue), now e\(header.epoch.rawValue)")
            // While the store holds an old copy the true history counts: every replica promised
            // its last epoch, and no fault comes, so the one claim made of the old record is
            // refused.
            check(
                3, header.epoch <= trueHistory?.last?.epoch ?? store.record.epoch,
                "\(host.name) promises an epoch the store never had")
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
        case .read where header.status == .ok:
            check(
                4, header.epoch >= host.installed,
                "\(host.name) answered a read of e\(header.epoch.rawValue)")
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
        // The same Install again finds regions in the log that merges brought there since, and
        // nothing of before it in them (seed 2826981).
        if header.epoch > host.installed {
            for active in reply.activeRegions { host.restamped[active] = header.epoch }
        }
        trace("\(host.name) installed e\(header.epoch.rawValue)")
        check(
            3, header.epoch > host.installed || host.installedProcess == host.process,
            "\(host.name) promised e\(header.epoch.rawValue) again after a restart")
        host.installedProcess = host.process
        if host.rot == .manifestSlot { host.rot = .none }
        host.installed = max(host.installed, header.epoch)
        host.installedEver = max(host.installedEver, host.installed)
        host.installedAt = timeline.now
        check(
            4, host.disk.dataWritesInFlight == 0,
            "\(host.name) promised e\(header.epoch.rawValue) with older writes under way")
        // Answers for anything older may not come any more.
        host.requests.removeAll { $0.epoch < header.epoch }
    }

    private func observeApplied(_ host: SimulatedReplica, _ request: SimulatedReplica.DataRequest) {
        check(
            4, request.epoch >= host.installed,
            "\(host.name) applied a write of e\(request.epoch.rawValue) after"
                + " e\(host.installed.rawValue)")
        let point = StablePoint(epoch: request.epoch, sequence: request.sequence)
        for block in request.blocks where Int(block) < host.order.count {
            check(
                22, request.sequence == .zero || point >= host.order[Int(block)],
                "\(host.name) applied s\(request.sequence.rawValue) to block \(block) out of order")
            host.order[Int(block)] = max(host.order[Int(block)], point)
        }
        for value in request.values { host.applied.insert(value) }
        if let zeroing = request.zeroing {
            host.zeroed[zeroing, default: []].formUnion(request.blocks)
        }
        // (A state that is set already changes nothing.)
        if !request.isCopy, !request.values.isEmpty, let block = request.blocks.first {
            let region = LayerRegion(
                request.layer, block / UInt64(Geometry.blocksPerRegion))
            host.lastWrite[region] = max(host.lastWrite[region] ?? .zero, request.epoch)
        }
    }

    /// 14: data changes only in regions that are durably in the activity log. (Looked at now and
    /// then: reading the log takes its time.)
    func observeDiskAction(_ host: SimulatedReplica, _ action: ReplicaAction) {
        guard case .write(.data(let layer), let offset, _, _, _, _) = action else { return }
        // The same bytes again, which invariant 35 judges (seed 800406).
        if host.core?.sharedLayers.contains(layer) == true {
            return coverage.took(faults.rot ? .sharedRepair : .sharedRewrite)
        }
        host.dataWriteCount += 1
        guard host.dataWriteCount % 8 == 1, host.rot == .none else { return }
        let image = ReplicaImage(
            host.disk, isDurable: true, sizeBytes: workload.sizeBytes,
            record: trueRecord)
        let region = Geometry.region(ofByte: offset)
        check(
            14, image?.activeRegions.contains(region) == true,
            "\(host.name) writes data of region \(region), not durably active")
    }

    /// 16: an Install has raised the birth of every active region.
    private func observeBirth(
        _ host: SimulatedReplica, _ header: FrameHeader, _ table: BufferID
    ) {
        guard header.kind == .digest, header.status == .ok, let pool = host.pool else { return }
        let region = Geometry.region(ofByte: header.offset)
        let birth = Epoch(pool.memory(table).load(UInt64.self, 0))
        // A reply does not say of which layer it is.
        guard let layer = host.digestLayers.removeValue(forKey: header.tag) else { return }
        let key = LayerRegion(layer, region)
        if let least = host.restamped[key] {
            check(
                16, birth >= least,
                "\(host.name) gives region \(region) birth \(birth.rawValue), active at the"
                    + " install of e\(least.rawValue)")
        }
        let written = host.lastWrite[key] ?? .zero
        check(
            17, birth >= written,
            "\(host.name) gives region \(region) birth \(birth.rawValue), written in"
                + " e\(written.rawValue)")
    }

    /// A replica gave itself up.
    func observeFailure(_ host: SimulatedReplica, _ failure: ReplicaFailure) {
        switch failure {
        case .syncFailed where faults.diskErrors: break
        case .manifestWriteFailed where faults.diskErrors || faults.noSpace: break
        case .layerNotMade where faults.diskErrors: break
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
        check(
            5, record.engine == engine.instance,
            "\(engine.name) answers in e\(epoch.rawValue), which is not its own")
        // 12: no engine's answer rests on what it was before another one answered. 5: none follows.
        check(
            12, operation.startedAfter <= epoch,
            "\(engine.name) answers \(operation.text) in e\(epoch.rawValue); it began after an"
                + " answer in e\(operation.startedAfter.rawValue)")
        check(
            5, acknowledgedEpoch <= epoch,
            "\(engine.name) answers \(operation.text) in e\(epoch.rawValue) after an answer in"
                + " e\(acknowledgedEpoch.rawValue)")
        acknowledgedEpoch = max(acknowledgedEpoch, epoch)
        guard operation.changesData else { return }
        observeInDoubt(operation, engine, record)
        noteWrite(operation, record)
        // 6: every member has promised the epoch and applied the write. While a change of the
        // record waits for its installs, an earlier record may be the one that counts; members of
        // the later ones must have applied the write all the same.
        var index = epoch
        while let record = store.record(at: index), record.engine == engine.instance {
            guard hasApplied(operation, record) else { break }
            if hosts.allSatisfy({ !record.contains($0) || $0.installed >= index }) {
                coverage.evaluated(6)
                return observeReconstructible(record)
            }
            index = Epoch(index.rawValue - 1)
        }
        check(
            6, false,
            "\(operation.text) acknowledged in e\(epoch.rawValue) by \(engine.name)"
                + " without every member of \(names(record)): \(whoLacks(operation, record))")
    }

    func hasApplied(_ operation: ClientOperation, _ record: VolumeRecord) -> Bool {
        hosts.allSatisfy {
            !record.contains($0) || $0.hasApplied(operation) || $0.rot != .none
                || holds($0, operation)
        }
    }
    private func whoLacks(_ operation: ClientOperation, _ record: VolumeRecord) -> String {
        hosts.filter(record.contains).map { host in
            let image = ReplicaImage(
                host.disk, isDurable: false, sizeBytes: workload.sizeBytes, record: trueRecord)
            let found = operation.sectors.map { sector in
                image.map { String($0.value(sector: sector, contents)) } ?? "no image"
            }
            return "\(host.name) holds \(found.joined(separator: " ")), rot \(host.rot)"
        }.joined(separator: "; ")
    }
    /// Who became a member while the write lacked members got it with the copy of its region, or
    /// had it from before it left. The write still has its range to itself.
    private func holds(_ host: SimulatedReplica, _ operation: ClientOperation) -> Bool {
        guard
            let image = ReplicaImage(
                host.disk, isDurable: false, sizeBytes: workload.sizeBytes,
                record: trueRecord)
        else { return false }
        // A block that it wrote elsewhere (seeds 5205790, 5303416) is damaged, and repaired.
        return operation.sectors.allSatisfy { sector in
            image.value(sector: sector, contents) == operation.value
                || faults.rot && image.isDoubtful(sector / Content.sectorsPerBlock)
        }
    }

    /// 10: a value still on its way is not returned by the engine that has it.
    func observeReadValue(
        _ operation: ClientOperation, _ engine: SimulatedEngine, _ value: ValueID, sector: Int
    ) {
        guard value != 0 else { return }
        check(27, value <= UInt64(operations.count), "a value nobody wrote")
        guard failure == nil else { return }
        let writer = operations[Int(value) - 1]
        let isInFlight =
            writer.firstEngine == engine.index && writer.engine == engine.index
            && writer.isOutstanding && writer.attempts == 1
        check(10, !isInFlight, "\(operation.text) returned \(writer.text), which is in flight")
    }

    /// A client got an error. Only trouble no member is spared explains one.
    func observeError(_ operation: ClientOperation, _ result: OperationResult) {
        if result == .noSpace && faults.noSpace { return }
        if result == .ioError && leases.ioTimeoutMilliseconds > 0 { return }
        let isPartial = operation.offset % 4096 != 0 || operation.length % 4096 != 0
        if result == .ioError && (faults.diskErrors || faults.rot)
            // What a block is, is read too: from its table page (seed 622354).
            && (operation.kind == .read || operation.kind == .status || isPartial)
        {
            return
        }
        fail("\(operation.text) failed: \(result)")
    }
}
