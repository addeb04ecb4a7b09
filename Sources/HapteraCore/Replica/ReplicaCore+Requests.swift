// Frames in, replies out, and the disk operations between.

extension ReplicaCore {
    func connected(_ connection: Int) {
        let generation = connections[connection].generation &+ 1
        connections[connection] = ConnectionState()
        connections[connection].generation = generation
        connections[connection].isConnected = true
        connectionsMade += 1
        connections[connection].number = connectionsMade
    }

    /// What was admitted is finished, unanswered; what was held is dropped.
    func disconnected(_ connection: Int) {
        connections[connection].isConnected = false
        connections[connection].installedEpoch = .zero
        connections[connection].isHeld = false
        var held = connections[connection].held
        connections[connection].held = SlotQueue()
        while let slot = pop(&held) { free(slot) }
        waitingInstalls.removeAll {
            guard requests[Int($0)].connection == Int32(connection) else { return false }
            free($0)
            return true
        }
    }

    func receive(
        _ connection: Int, _ header: FrameHeader, _ table: RawMemory, _ buffer: BufferID
    ) {
        guard connections[connection].isConnected else { return release(buffer) }
        guard !header.isReply, header.status == .ok, freeRequest >= 0 else {
            release(buffer)
            return actions.append(.close(connection: connection))
        }
        let slot = allocate()
        let index = Int(slot)
        requests[index].header = header
        requests[index].connection = Int32(connection)
        requests[index].connectionGeneration = connections[connection].generation
        requests[index].buffer = buffer
        if header.kind == .hello { return hello(slot, table) }
        if header.kind == .install {
            guard let request = InstallRequest(decoding: table.bytes()) else {
                return refuse(slot, .invalid)
            }
            decodedInstalls[slot] = request
        } else {
            guard isWellFormed(header, buffer) else { return refuse(slot, .invalid) }
            if header.kind == .write {
                checksums.memory.slice(index * 1024, 1024).copy(from: table)
            }
        }
        if connections[connection].isHeld {
            requests[index].phase = .held
            return push(slot, &connections[connection].held)
        }
        dispatch(slot)
    }

    /// What the kind demands of offset, length and payload.
    private func isWellFormed(_ header: FrameHeader, _ buffer: BufferID) -> Bool {
        let blockSize = UInt64(Geometry.blockSize)
        let blocks = Int(header.length) / Geometry.blockSize
        let isWrite = header.kind == .write
        // Sequence numbers count requests: none gets there, and none may overflow later.
        guard header.sequence.rawValue < 1 << 62 else { return false }
        guard (buffer != .none) == isWrite, isWrite || header.dataLength == 0,
            isWrite || header.tableLength == 0
        else { return false }
        switch header.kind {
        case .flush, .stable, .ping: return true
        case .digest, .verify: return header.offset % UInt64(Geometry.regionSize) == 0
        case .regionMap:
            return header.offset % UInt64(Geometry.regionSize) == 0 && header.length >= 1
                && header.length <= (header.auxiliary == 0 ? 65_536 : UInt32(Self.birthRegionsMax))
        case .write, .setState, .read, .adopt, .status:
            guard header.offset % blockSize == 0, UInt64(header.length) % blockSize == 0,
                header.length > 0, header.offset < Geometry.volumeSizeMax
            else { return false }
            if header.kind == .status { return true }
            let last = header.offset + UInt64(header.length) - 1
            guard Geometry.region(ofByte: header.offset) == Geometry.region(ofByte: last) else {
                return false
            }
            if header.kind == .setState {
                return header.auxiliary <= 3 && header.auxiliary != UInt64(BlockState.data.rawValue)
            }
            if header.kind == .adopt {
                return header.auxiliary == AdoptRequest.keep
                    || AdoptRequest.checksum(header.auxiliary) != nil
            }
            return !isWrite
                || header.dataLength == header.length && Int(header.tableLength) == 4 * blocks
        case .prepareSize:
            return header.offset % blockSize == 0 && header.offset > 0
                && header.offset <= Geometry.volumeSizeMax
        case .hello, .install, .getRecord, .compareAndSwap: return false
        }
    }
    /// Whether it is within the volume: asked when it begins, an Install before it on its
    /// connection may have let the volume grow.
    private func isWithinVolume(_ header: FrameHeader) -> Bool {
        switch header.kind {
        case .write, .setState, .read, .adopt, .status:
            return header.offset < size && UInt64(header.length) <= size - header.offset
        case .digest, .verify, .regionMap: return header.offset < size
        default: return true
        }
    }

    /// Begins a request that nothing holds back.
    func dispatch(_ slot: Int32) {
        let index = Int(slot)
        let header = requests[index].header
        let connection = connections[Int(requests[index].connection)]
        if header.kind == .install { return beginInstall(slot) }
        guard connection.hasSaidHello else { return refuse(slot, .notInstalled) }
        guard shutdown == .none else { return refuse(slot, .unavailable) }
        if !options.mutations.contains(.noEpochCheck) {
            // From the moment a higher Install is let in, nothing of an older epoch is.
            guard header.epoch == admittedEpoch, admittedEpoch == promise else {
                actions.append(
                    .note(.refusedStale(connection: Int(requests[index].connection), header.epoch)))
                return refuse(slot, .staleEpoch)
            }
            guard connection.installedEpoch == promise else { return refuse(slot, .notInstalled) }
        }
        giveLease()
        admit(slot)
    }

    private func admit(_ slot: Int32) {
        let index = Int(slot)
        requests[index].phase = .started
        requests[index].number = nextNumber
        requests[index].begun = now
        nextNumber += 1
        startedCount += 1
        // Asked now: an Install before it on its connection may have made the layer.
        if requests[index].header.layer == .head { requests[index].header.layer = chain.head }
        guard isLayerLawful(requests[index].header), isWithinVolume(requests[index].header) else {
            return finish(slot, .invalid)
        }
        switch requests[index].header.kind {
        case .write:
            guard payloadMatches(slot) else { return finish(slot, .checksumMismatch) }
            linkMutation(slot)
        case .setState, .adopt: linkMutation(slot)
        default: break
        }
        resume(slot)
    }

    /// The number of the layer that the request names, which is one of the chain's.
    func layer(of slot: Int32) -> LayerID {
        let name = requests[Int(slot)].header.layer
        guard name != chain.head, !manifest.names.isEmpty else { return name }
        return chain.place(named: name).map(chain.id) ?? name
    }

    /// A layer that is retired counts as its heir, and can't be meant. (A point may have left out
    /// what it holds.)
    private func isLayerLawful(_ header: FrameHeader) -> Bool {
        switch header.kind {
        case .write, .setState, .adopt:
            // What is written behind its end grows the file, durably or not (seed 403123).
            let region = Geometry.region(ofByte: header.offset)
            let isRoom =
                header.layer == chain.head
                || manifest.installed?.reaches(header.layer, region) ?? true
            return isRoom && chain.place(named: header.layer).map { !chain.isRetired($0) } ?? false
        case .read, .digest, .status, .verify:
            return chain.place(named: header.layer).map { !chain.isRetired($0) } ?? false
        default: return true
        }
    }

    /// Goes on with a request as far as it goes: at first, and when what it waited for is there.
    func resume(_ slot: Int32) {
        let index = Int(slot)
        if requests[index].phase == .parked { unpark(slot) }
        guard isConnected(slot) || requests[index].operationsLeft > 0 else {
            return finish(slot, .unavailable)
        }
        switch requests[index].header.kind {
        case .write, .setState, .adopt: resumeMutation(slot)
        case .read: resumeRead(slot)
        case .digest: resumeDigest(slot)
        case .verify: resumeVerify(slot)
        case .status: resumeStatus(slot)
        case .regionMap: resumeRegionMap(slot)
        case .flush:
            requests[index].parkCount = parkCount
            requests[index].passesParked = !parked.isEmpty || !merge.waiting.isEmpty
            push(slot, &awaitingMutations)
        case .stable:
            takeStable(requests[index].header)
            end(slot)
        case .ping: finish(slot, .ok)
        case .prepareSize: prepareSize(slot)
        case .hello, .install, .getRecord, .compareAndSwap: refuse(slot, .invalid)
        }
    }

    private func payloadMatches(_ slot: Int32) -> Bool {
        let header = requests[Int(slot)].header
        let data = pool.memory(requests[Int(slot)].buffer)
        for block in 0..<Int(header.length) / Geometry.blockSize {
            let bytes = data.slice(block * Geometry.blockSize, Geometry.blockSize)
            guard CRC32C.checksum(bytes) == payloadChecksum(slot, block) else { return false }
        }
        return true
    }
    func payloadChecksum(_ slot: Int32, _ block: Int) -> UInt32 {
        checksums.memory.load(UInt32.self, Int(slot) * 1024 + block * 4)
    }

    // MARK: slots

    private func allocate() -> Int32 {
        let slot = freeRequest
        freeRequest = requests[Int(slot)].next
        freeRequestCount -= 1
        requests[Int(slot)] = Request()
        return slot
    }
    /// Gives the slot and its buffer back without an answer; for requests that did not start.
    func free(_ slot: Int32) {
        let index = Int(slot)
        precondition(requests[index].phase != .started || requests[index].frame < 0)
        if requests[index].header.kind == .install { decodedInstalls[slot] = nil }
        release(requests[index].buffer)
        release(requests[index].table)
        requests[index].phase = .free
        requests[index].next = freeRequest
        freeRequest = slot
        freeRequestCount += 1
    }
    /// Ends a started request without an answer.
    func end(_ slot: Int32) {
        let index = Int(slot)
        precondition(requests[index].operationsLeft == 0)
        learnLatency(slot)
        unpin(slot)
        if requests[index].isMutation { unlinkMutation(slot) }
        if requests[index].phase == .started { startedCount -= 1 }
        requests[index].phase = .held
        free(slot)
    }

    func pin(_ slot: Int32, _ frame: Int32) {
        precondition(requests[Int(slot)].frame < 0)
        requests[Int(slot)].frame = frame
        cache.frames[Int(frame)].pins += 1
        // A pinned frame is in no list it could be evicted from.
        if cache.list(of: frame) == .clean { cache.move(frame, to: .none) }
    }
    func unpin(_ slot: Int32) {
        let frame = requests[Int(slot)].frame
        guard frame >= 0 else { return }
        requests[Int(slot)].frame = -1
        cache.frames[Int(frame)].pins -= 1
        shelve(frame)
    }
    /// Puts a clean frame that nobody uses where it can be evicted or punched.
    func shelve(_ frame: Int32) {
        guard cache.frames[Int(frame)].state == .clean, cache.frames[Int(frame)].pins == 0 else {
            return
        }
        cache.move(frame, to: cache.frames[Int(frame)].unneeded.isEmpty ? .clean : .punch)
    }

    private func linkMutation(_ slot: Int32) {
        requests[Int(slot)].isMutation = true
        requests[Int(slot)].olderMutation = newestMutation
        requests[Int(slot)].newerMutation = -1
        if newestMutation >= 0 {
            requests[Int(newestMutation)].newerMutation = slot
        } else {
            oldestMutation = slot
        }
        newestMutation = slot
    }
    private func unlinkMutation(_ slot: Int32) {
        let older = requests[Int(slot)].olderMutation
        let newer = requests[Int(slot)].newerMutation
        if older >= 0 {
            requests[Int(older)].newerMutation = newer
        } else {
            oldestMutation = newer
        }
        if newer >= 0 {
            requests[Int(newer)].olderMutation = older
        } else {
            newestMutation = older
        }
        requests[Int(slot)].isMutation = false
    }

    /// Waits for another region to leave the log. Such a request has touched nothing; flushes pass
    /// it by, since it may need the stable point they lead to.
    func park(_ slot: Int32) {
        guard currentInstall < 0, shutdown == .none else {
            return finish(slot, shutdown == .none ? .staleEpoch : .unavailable)
        }
        setAside(slot)
        push(slot, &parked)
    }
    /// From here on it counts as not begun.
    func setAside(_ slot: Int32) {
        startedCount -= 1
        requests[Int(slot)].phase = .parked
        guard requests[Int(slot)].isMutation else { return }
        unlinkMutation(slot)
        parkCount += 1
        requests[Int(slot)].wasParked = true
    }
    private func unpark(_ slot: Int32) {
        requests[Int(slot)].phase = .started
        startedCount += 1
        requests[Int(slot)].number = nextNumber
        nextNumber += 1
        if requests[Int(slot)].wasParked { linkMutation(slot) }
    }
    /// An Install or a shutdown answers them: nothing of an older epoch may run later.
    func refuseParked(_ status: FrameStatus) {
        while let slot = pop(&parked) { refuse(slot, status) }
    }

    func isConnected(_ slot: Int32) -> Bool {
        let connection = Int(requests[Int(slot)].connection)
        return connections[connection].isConnected
            && connections[connection].generation == requests[Int(slot)].connectionGeneration
    }

    // MARK: replies

    func replyHeader(_ slot: Int32, _ status: FrameStatus) -> FrameHeader {
        var header = requests[Int(slot)].header.reply(
            status, epoch: max(promise, admittedEpoch))
        if isUnderPressure { header.flags |= FrameFlags.logPressure }
        if chain.count >= options.layersMax { header.flags |= FrameFlags.layersFull }
        if requests[Int(slot)].wasParked { header.auxiliary |= MutationReply.wasParked }
        return header
    }
    /// Sends a reply, if there is still somebody to send it to. Takes over both buffers.
    func send(
        _ slot: Int32, _ header: FrameHeader, table: BufferID = .none, data: BufferID = .none
    ) {
        guard isConnected(slot) else {
            release(table)
            return release(data)
        }
        actions.append(
            .reply(
                connection: Int(requests[Int(slot)].connection), header, tableBuffer: table,
                buffer: data, bufferOffset: 0))
    }
    /// Answers a request that did not start.
    func refuse(_ slot: Int32, _ status: FrameStatus) {
        if requests[Int(slot)].header.kind != .stable { send(slot, replyHeader(slot, status)) }
        requests[Int(slot)].phase = .held
        free(slot)
    }
    /// Answers a started request without payload.
    func finish(_ slot: Int32, _ status: FrameStatus) {
        send(slot, replyHeader(slot, status))
        end(slot)
    }
    /// Answers a started request with a table and perhaps its buffer.
    func finish(
        _ slot: Int32, _ status: FrameStatus, table: BufferID, tableLength: Int,
        dataLength: Int = 0
    ) {
        var header = replyHeader(slot, status)
        header.tableLength = UInt32(tableLength)
        header.tableChecksum =
            tableLength == 0 ? 0 : CRC32C.checksum(pool.memory(table).slice(0, tableLength))
        header.dataLength = UInt32(dataLength)
        var data = BufferID.none
        if dataLength > 0 {
            data = requests[Int(slot)].buffer
            requests[Int(slot)].buffer = .none
        }
        send(slot, header, table: table, data: data)
        end(slot)
    }

    // MARK: disk operations

    /// Operations requests may not take, so that upkeep and syncs always go on.
    static let operationsForUpkeep = Upkeep.batchMax + 16
    var hasOperationForRequests: Bool { freeOperationCount > Self.operationsForUpkeep }

    func startOperation(
        _ kind: DiskOperation.Kind, index: Int32, buffer: BufferID = .none, length: Int = 0
    ) -> UInt64 {
        let operation = Int(freeOperation)
        precondition(operation >= 0)
        freeOperation = operations[operation].next
        freeOperationCount -= 1
        operations[operation].kind = kind
        operations[operation].index = index
        operations[operation].buffer = buffer
        operations[operation].length = length
        return UInt64(operation) | UInt64(operations[operation].generation) << 32
    }

    func diskEnded(_ token: UInt64, _ result: Int) {
        let id = Int(token & 0xffff_ffff)
        let ended = operations[id]
        precondition(ended.kind != .free && UInt64(ended.generation) == token >> 32)
        operations[id].kind = .free
        operations[id].generation &+= 1
        operations[id].next = freeOperation
        freeOperation = Int32(id)
        freeOperationCount += 1
        if result > 0, !unreadablePages.isEmpty { diskWorkedAt = now }
        switch ended.kind {
        case .free: break
        case .dataWrite: dataWritten(ended.index, result)
        case .dataRead: dataRead(ended, result)
        case .pageLoad: pageLoaded(ended.index, ended.buffer, result)
        case .birthsRead: birthsRead(ended, result)
        case .verifyRead: verifyRead(ended, result)
        case .spaceRead: spaceRead(ended, result)
        case .slotsInit: slotsInitialised(ended.index, ended.buffer, result)
        case .pageWrite: pageWritten(ended.index, ended.buffer, result)
        case .sync: syncEnded(Int(ended.index), result)
        case .punch: punched(ended.index)
        case .manifestWrite: manifestWritten(ended, result)
        case .manifestSync: manifestSynced(result)
        case .layerCreate, .layerSync: layerStepEnded(ended, result)
        case .growthExtend, .growthSync: growthStepEnded(ended, result)
        case .layerRemove: layerRemoved()
        case .mergeRead: mergeRead(Int(ended.index), result)
        case .mergeWrite: mergeWritten(Int(ended.index), result)
        case .rewrite: rewritten(ended, result)
        }
    }

    func wait(_ slot: Int32, on frame: Int32) {
        var queue = cache.frames[Int(frame)].waiters
        push(slot, &queue)
        cache.frames[Int(frame)].waiters = queue
    }
    /// The frame's state has changed: those who waited go on, in order.
    func wake(_ frame: Int32) {
        var queue = cache.frames[Int(frame)].waiters
        cache.frames[Int(frame)].waiters = SlotQueue()
        // Held in memory while they run: the first to finish must not make it evictable.
        cache.frames[Int(frame)].pins += 1
        while let slot = pop(&queue) { resume(slot) }
        cache.frames[Int(frame)].pins -= 1
        shelve(frame)
    }
}
