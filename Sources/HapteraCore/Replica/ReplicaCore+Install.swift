// Hello, Install and the manifest.

extension ReplicaCore {
    func hello(_ slot: Int32, _ table: RawMemory) {
        let connection = Int(requests[Int(slot)].connection)
        guard let request = HelloRequest(decoding: table.bytes()),
            request.version == HelloRequest.protocolVersion
        else { return refuse(slot, .invalid) }
        guard request.volume == identity.volume else { return refuse(slot, .notInstalled) }
        let reply = HelloReply(
            member: identity.member, instance: options.instance, promise: promise, size: size,
            installed: manifest.installed)
        guard sendControl(slot, reply.encoded()) else { return refuse(slot, .unavailable) }
        connections[connection].hasSaidHello = true
        connections[connection].engine = request.engine
        free(slot)
    }

    private func sendControl(_ slot: Int32, _ payload: [UInt8]) -> Bool {
        guard let table = pool.allocate(payload.count) else { return false }
        pool.memory(table).copy(from: payload)
        var header = replyHeader(slot, .ok)
        header.tableLength = UInt32(payload.count)
        header.tableChecksum = CRC32C.checksum(pool.memory(table).slice(0, payload.count))
        send(slot, header, table: table)
        return true
    }

    /// Install(e, engine, V). In this order, and what a crash leaves:
    /// 1. nothing else is admitted; requests under way end, parked ones are refused -> old promise
    /// 2. births of active regions rise to e in memory                              -> old promise
    /// 3. the head's files grow to V's size, if they have not yet, and are synced; files of layers
    ///    that V has and this copy has not are made, empty, and synced with their names; without
    ///    space for them it is refused here   -> old promise, files nobody looks at, room not used
    /// 4. the manifest with e and V is written to the slot not in use               -> old or new
    /// 5. it is synced                                                              -> new promise,
    ///    and opening gives active regions the promise as birth: step 2 is not lost
    /// 6. the log is synced, at the same time: the marks the reply speaks of        -> new promise
    /// 7. the reply                                                                 -> new promise
    func beginInstall(_ slot: Int32) {
        let connection = Int(requests[Int(slot)].connection)
        guard let request = decodedInstalls[slot] else { return refuse(slot, .invalid) }
        guard connections[connection].hasSaidHello, request.record.volume == identity.volume,
            connections[connection].engine == request.engine, !isSuperseded(connection)
        else { return refuse(slot, .notInstalled) }
        guard shutdown == .none else { return refuse(slot, .unavailable) }
        let epoch = request.record.epoch
        let isAgain =
            epoch == promise && (hasPromisedHere || acceptsAgain)
            && manifest.promisedEngine == request.engine && manifest.installed == request.record
        guard epoch > admittedEpoch || (isAgain && epoch == admittedEpoch) else {
            actions.append(.note(.refusedStale(connection: connection, epoch)))
            return refuse(slot, .staleEpoch)
        }
        let member = identity.member
        guard epoch.rawValue < 1 << 62, request.record.size >= size,
            isChainLawful(request.record),
            (request.record.inSync + [request.record.joining].compactMap { $0 }).allSatisfy({
                $0.replica != member.replica || $0 == member
            })
        else { return refuse(slot, .invalid) }

        connections[connection].isHeld = true
        requests[Int(slot)].phase = .held
        guard currentInstall < 0 else { return waitingInstalls.append(slot) }
        currentInstall = slot
        installTicket = nil
        admittedEpoch = epoch
        passLease(to: request)
        for other in 0..<connections.count where other != connection {
            connections[other].installedEpoch = .zero
        }
        refuseParked(.staleEpoch)
        refuseAwaitingMerge(.staleEpoch)
    }

    /// Layers may have been added above this copy's, and any of its own be deleted.
    private func isChainLawful(_ record: VolumeRecord) -> Bool {
        guard record.head >= chain.head else { return false }
        return record.layers.allSatisfy { layer in
            layer > chain.head || chain.place(named: layer).map { !chain.isRetired($0) } ?? false
        }
    }

    /// Its engine has made another connection since: what still arrives here, late, must not take
    /// that one's place.
    private func isSuperseded(_ connection: Int) -> Bool {
        (0..<connections.count).contains { other in
            connections[other].isConnected && connections[other].hasSaidHello
                && connections[other].engine == connections[connection].engine
                && connections[other].number > connections[connection].number
        }
    }

    private var acceptsAgain: Bool {
        options.mutations.contains(.equalEpochInstallAfterRestart)
    }

    /// Step 2 on, once nothing is under way. Tried at the end of every step.
    func pumpInstall() {
        guard currentInstall >= 0, manifestProposal == nil else { return }
        guard startedCount == 0 || options.mutations.contains(.installWithoutDrain),
            !isMergeCopying
        else { return }
        guard let request = decodedInstalls[currentInstall] else { return }
        let ticket = installTicket ?? log.storeCount
        installTicket = ticket
        want(FileSync.log, ticket)
        if request.record.epoch == promise {
            guard syncs[FileSync.log].durable >= ticket else { return }
            // Merges may have activated others since (seed 5011450).
            if !options.mutations.contains(.noRestamp) { restamp(promise) }
            return completeInstall()
        }
        guard !isSecondSlotDue, hasRoom(for: request.record), areLayersMade(request.record)
        else { return }
        promiseBefore = promise
        if !options.mutations.contains(.noRestamp) { restamp(request.record.epoch) }
        var proposal = manifest
        proposal.promise = request.record.epoch
        proposal.promisedEngine = request.engine
        proposal.installed = request.record
        proposal.layers += request.record.layers.filter { $0 > chain.head }
        proposal.boot = options.bootID
        // A clean copy has lost nothing in a restart since.
        if proposal.isClean { proposal.settledBoot = options.bootID }
        // So has one that this very process has filled from the others until it became a member.
        if hasPromisedHere, manifest.installed?.joining == identity.member,
            request.record.inSync.contains(identity.member)
        {
            proposal.settledBoot = options.bootID
        }
        proposal.isClean = false
        writeManifest(proposal, .install)
    }

    /// Whether the files of the layers that the record adds are durable. What was written before
    /// this Install is in the head as it was, what comes after it in the new one.
    private func areLayersMade(_ record: VolumeRecord) -> Bool {
        // Those of an Install refused before the volume grew are too small.
        if record.size != layersMadeSize { layersMade = [] }
        layersMadeSize = record.size
        // Nothing has changed yet: merges make room, as space that comes back does.
        let layers = manifest.layers.count + record.layers.count { $0 > chain.head }
        let most = wasAway(record) ? Manifest.layersMost(beside: record) : options.layersMax
        guard layers <= most || record.head == chain.head, fitsManifest(record) else {
            endInstall(refusing: .noSpace)
            return false
        }
        for layer in record.layers where layer > chain.head && !layersMade.contains(layer) {
            guard layerOperations == 0 else { return false }
            layerOperations = 1
            let token = startOperation(.layerCreate, index: 0)
            operations[Int(token & 0xffff_ffff)].layer = layer
            actions.append(.create(layer, size: record.size, token: token))
            return false
        }
        return true
    }
    /// Who was away learns only by the record which of its layers are gone, and merges them then:
    /// a joiner, or the copy that a salvage has gone on from since its own record (seed 5601466).
    private func wasAway(_ record: VolumeRecord) -> Bool {
        if record.joining == identity.member { return true }
        let known = manifest.installed?.epoch ?? .zero
        return record.lineage.contains { $0.survivor == identity.replica && $0.epoch > known }
    }
    /// Any does but in slots that there was no space to widen.
    private func fitsManifest(_ record: VolumeRecord) -> Bool {
        if manifestSlotSize == Manifest.slotSize { return true }
        var proposal = manifest
        proposal.installed = record
        proposal.layers += record.layers.filter { $0 > chain.head }
        return proposal.fits(manifestSlotSize)
    }
    func layerStepEnded(_ operation: DiskOperation, _ result: Int) {
        let layer = operation.layer
        layerOperations -= 1
        guard operation.kind == .layerCreate else {
            guard result >= 0 else { return fail(.layerNotMade(layer, errno: Int32(-result))) }
            if layerOperations == 0 { layersMade.append(layer) }
            return
        }
        // Nothing is lost and nothing in doubt: with space again, the next Install makes them.
        guard result >= 0 else { return endInstall(refusing: status(ofError: result)) }
        let files = [ReplicaFile.data(layer), .table(layer), .layers]
        for file in options.mutations.contains(.layerNamesNotSynced) ? [.data(layer)] : files {
            layerOperations += 1
            let token = startOperation(.layerSync, index: 0)
            operations[Int(token & 0xffff_ffff)].layer = layer
            actions.append(.sync(file, token: token))
        }
    }

    /// Regions in the log: what they were sent may have been sent in any epoch up to this one.
    private func restamp(_ epoch: Epoch) {
        var frame = cache.oldestActive
        while frame >= 0 {
            if !isLeavingLog(frame) {
                cache.frames[Int(frame)].birth = max(cache.frames[Int(frame)].birth, epoch)
            }
            frame = cache.nextActive(frame)
        }
    }
    /// Its page is on its way: as good as out of the log, since every member has flushed what it
    /// holds; and the birth in the page is what it is known by from then on (seed 5705358).
    private func isLeavingLog(_ frame: Int32) -> Bool {
        cache.frames[Int(frame)].state == .draining && upkeep.phase != .syncingLog
            && !options.mutations.contains(.leavingIsRestamped)
    }

    private func completeInstall() {
        let slot = currentInstall
        let connection = Int(requests[Int(slot)].connection)
        hasPromisedHere = true
        leaseInstalled()
        actions.append(.note(.installed(promise)))
        if isConnected(slot) {
            connections[connection].installedEpoch = promise
            let isAnswered = sendControl(slot, installReply().encoded())
            // The engine tries again on a new connection: the promise stands.
            if !isAnswered { actions.append(.close(connection: connection)) }
        }
        endInstall()
    }

    /// The next one begins, and what was held behind this one runs.
    func endInstall(refusing status: FrameStatus? = nil) {
        let slot = currentInstall
        let connection = Int(requests[Int(slot)].connection)
        let isAlive = isConnected(slot)
        if let status { refuse(slot, status) } else { free(slot) }
        currentInstall = -1
        if isAlive { letGo(connection) }
        while currentInstall < 0, !waitingInstalls.isEmpty {
            let next = waitingInstalls.removeFirst()
            let waiting = Int(requests[Int(next)].connection)
            beginInstall(next)
            if currentInstall != next { letGo(waiting) }
        }
    }

    /// Runs what was held behind an Install, up to the next Install.
    private func letGo(_ connection: Int) {
        connections[connection].isHeld = false
        while !connections[connection].isHeld {
            var held = connections[connection].held
            guard let slot = pop(&held) else { return }
            connections[connection].held = held
            dispatch(slot)
        }
    }

    private func installReply() -> InstallReply {
        var regions: [LayerRegion] = []
        var frame = cache.oldestActive
        while frame >= 0 {
            let (layer, region) = (cache.frames[Int(frame)].layer, cache.frames[Int(frame)].region)
            // Once it is merged, the region it went over to says all there is to say.
            if !isLeavingLog(frame), let place = chain.index(of: layer),
                chain.mayHold(place, region), !chain.isAbsorbed(place, region),
                let heir = chain.heirPlace(place)
            {
                regions.append(LayerRegion(chain.name(heir), region))
            }
            frame = cache.nextActive(frame)
        }
        return InstallReply(
            instance: options.instance, isRebooted: isRebooted && !hasSettledHere,
            flushed: flushedPoint, stablePoint: knownStable, promiseBefore: promiseBefore,
            leaseRemainingMilliseconds: leaseRemainingMilliseconds, activeRegions: regions)
    }
    private var hasSettledHere: Bool { manifest.settledBoot == options.bootID }

    // MARK: stable

    /// S, and whether the copies are known equal. No reply.
    func takeStable(_ header: FrameHeader) {
        let point = StablePoint(epoch: Epoch(header.auxiliary), sequence: header.sequence)
        // A point of an epoch not promised yet says nothing about this copy.
        guard point.epoch <= promise else { return }
        if header.length > 0 {
            let region = Geometry.region(ofByte: header.offset)
            return leaveOut(LayerRegion(header.layer, region), point)
        }
        stablePoint = max(stablePoint, point)
        lookForShared()
        learn(StablePoint(epoch: Epoch(header.offset), sequence: SequenceNumber(header.tag)))
        guard header.flags & FrameFlags.settled != 0, !hasSettledHere else { return }
        isSettleWanted = true
    }
    /// Every member holds a durable mark of the point.
    private func learn(_ point: StablePoint) {
        guard point > knownStable, point <= stablePoint else { return }
        knownStable = point
        // Durable with the next sync: it may lag.
        if log.hasRoom(1) { log.append(.stable(point)) }
    }
    /// The region stays active past the point: some member has not got all that was written to it.
    private func leaveOut(_ region: LayerRegion, _ point: StablePoint) {
        // Wherever of the two it is, if the layer was deleted since.
        guard let named = chain.place(named: region.layer), var place = chain.heirPlace(named)
        else { return }
        repeat {
            if let frame = cache.find(chain.id(place), region.region) {
                let last = cache.frames[Int(frame)].lastWrite
                cache.frames[Int(frame)].lastWrite = max(last, point.next)
            }
            place = chain.below(place)
        } while place >= 0 && chain.isRetired(place)
    }
    func pumpSettle() {
        guard isSettleWanted, !isManifestBusy, currentInstall < 0, shutdown == .none else { return }
        var proposal = manifest
        proposal.settledBoot = options.bootID
        writeManifest(proposal, .settle)
    }

    // MARK: the manifest

    /// 1. the older slot is written                -> torn: the other slot counts
    /// 2. the file is synced, what waits goes on    -> the new one counts
    /// 3. the other slot gets the same, and a sync  -> rot in one slot takes nothing back
    func writeManifest(_ proposal: Manifest, _ purpose: ManifestPurpose) {
        precondition(!isManifestBusy)
        var next = proposal
        next.counter = manifest.counter + 1
        guard writeManifest(next, slot: next.slot) else { return }
        manifestProposal = next
        manifestPurpose = purpose
    }
    var isManifestBusy: Bool { manifestProposal != nil || isSecondSlotDue }

    /// False: no buffer now; the next step tries again.
    private func writeManifest(_ next: Manifest, slot: Int) -> Bool {
        let bytes = next.encoded()
        guard let buffer = pool.allocate(bytes.count) else { return false }
        pool.memory(buffer).copy(from: bytes)
        let token = startOperation(
            .manifestWrite, index: 0, buffer: buffer, length: bytes.count)
        actions.append(
            .write(
                .manifest, offset: UInt64(slot * manifestSlotSize), length: bytes.count,
                buffer: buffer, bufferOffset: 0, token: token))
        return true
    }
    func pumpSecondSlot() {
        guard isSecondSlotDue, !isMirroring else { return }
        isMirroring = writeManifest(manifest, slot: 1 - manifest.slot)
    }
    func manifestWritten(_ operation: DiskOperation, _ result: Int) {
        release(operation.buffer)
        guard result == operation.length else {
            return fail(.manifestWriteFailed(errno: result < 0 ? Int32(-result) : 5))
        }
        if options.mutations.contains(.manifestNotSynced) { return manifestSynced(0) }
        let token = startOperation(.manifestSync, index: 0)
        actions.append(.sync(.manifest, token: token))
    }
    func manifestSynced(_ result: Int) {
        guard result == 0 else {
            return fail(.manifestWriteFailed(errno: Int32(-result)))
        }
        guard let made = manifestProposal else {
            isSecondSlotDue = false
            isMirroring = false
            if manifestPurpose == .shutdown { shutdown = .done }
            return
        }
        manifest = made
        manifestProposal = nil
        adoptChain(made)
        isSecondSlotDue = true
        if manifestPurpose == .settle { isSettleWanted = false }
    }
    private func adoptChain(_ made: Manifest) {
        adoptSize(made)
        layersMade = []
        for layer in merge.leaving.reversed() { layerLeaves(layer) }
        let isIgnored = options.mutations.contains(.revertIgnored)
        let tree = isIgnored ? LayerTree() : made.installed?.tree ?? LayerTree()
        chain.change(tree, made.installed) { chain in
            for layer in made.layers where layer > chain.head { chain.append(layer) }
            for layer in merge.leaving {
                guard let place = chain.index(of: layer) else { continue }
                if chain.isRetired(place) {
                    chain.remove(layer)
                } else {
                    chain.removeAbsorbed(layer)
                }
            }
            for layer in made.retiredLayers where !chain.isRetired(chain.index(of: layer) ?? 0) {
                chain.retire(layer)
            }
        }
        merge.leaving = []
        // At once: of a layer that is discarded now nothing may be left soon.
        followChain()
        retryAwaitingMerge()
    }
}
