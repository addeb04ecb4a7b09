// What is durable: one sync at a time per file, each covering all that was written before it began.
//
// A write to a block that only lower layers hold leaves the block's flushed content where it is. So
// if the power fails before a flush, and the write's record survives and its data does not, that
// content must be seen again, and not the hole under the record (`OpenedReplica.dropUnsynced`). But
// had a flush been answered, and then the block been written once more, it is in the hole's place.
// The same goes for a trimmed block of the lowest layer, which may have bytes of before the trim
// beneath it.
// To tell one from the other, a flush (or FUA) after a change of state stores a covered record when
// data and entries are durable, and is answered when that record is.

/// Counts what was written to a file, or to all layers' data or tables, and what of it a sync has
/// covered.
struct FileSync: BitwiseCopyable {
    static let log = 0
    static let data = 1
    static let table = 2
    /// Starts above `durable`: what an earlier process wrote counts as not synced.
    var written: UInt64 = 1
    /// `written` when the sync under way began; zero: none is.
    var syncing: UInt64 = 0
    var durable: UInt64 = 0
    var wanted: UInt64 = 0
    /// Files whose sync has not ended, and the layer after the last one begun.
    var outstanding = 0
    var nextLayer = 0
    static let outstandingMax = 16
}

extension ReplicaCore {
    /// Has the file synced past `ticket`, soon.
    func want(_ file: Int, _ ticket: UInt64) {
        syncs[file].wanted = max(syncs[file].wanted, ticket)
        pumpSync(file)
    }
    private func pumpSync(_ file: Int) {
        guard syncs[file].syncing == 0, syncs[file].wanted > syncs[file].durable else { return }
        syncs[file].syncing = written(file)
        syncs[file].nextLayer = 0
        if file == FileSync.log { startSync(file, .log) } else { syncLayers(file) }
    }
    private func syncLayers(_ file: Int) {
        let isData = file == FileSync.data
        while syncs[file].outstanding < FileSync.outstandingMax,
            let index = chain.nextUnsynced(isData: isData, from: syncs[file].nextLayer)
        {
            syncs[file].nextLayer = index + 1
            startSync(file, isData ? .data(chain.id(index)) : .table(chain.id(index)))
        }
    }
    private func startSync(_ file: Int, _ name: ReplicaFile) {
        syncs[file].outstanding += 1
        actions.append(.sync(name, token: startOperation(.sync, index: Int32(file))))
    }
    func written(_ file: Int) -> UInt64 {
        file == FileSync.log ? log.storeCount : syncs[file].written
    }

    /// A write of the layer's table has ended.
    func tableWritten(_ layer: LayerID) {
        syncs[FileSync.table].written += 1
        chain.tableWritten(layer)
    }

    func syncEnded(_ file: Int, _ result: Int) {
        guard result == 0 || options.mutations.contains(.retryFailedSync) else {
            // The kernel may have dropped the pages it could not write: a second sync would lie.
            return fail(.syncFailed(errno: Int32(-result)))
        }
        syncs[file].outstanding -= 1
        if file != FileSync.log { syncLayers(file) }
        guard syncs[file].outstanding == 0 else { return }
        syncs[file].durable = syncs[file].syncing
        syncs[file].syncing = 0
        pumpSync(file)
        if file == FileSync.log { releaseActivations() }
        completeSynced()
    }

    // MARK: requests that wait for syncs

    /// Answers a mutation now, or with FUA when it is durable.
    func finishDurably(_ slot: Int32) {
        guard requests[Int(slot)].header.flags & FrameFlags.fua != 0 else {
            return finish(slot, .ok)
        }
        waitForSync(slot, (log.storeCount, syncs[FileSync.data].written, 0))
    }

    /// Flushes begin when the mutations admitted before them have ended.
    func pumpFlushes() {
        while awaitingMutations.head >= 0 {
            let flush = requests[Int(awaitingMutations.head)].number
            if oldestMutation >= 0, requests[Int(oldestMutation)].number < flush { break }
            guard let slot = pop(&awaitingMutations) else { break }
            if options.mutations.contains(.flushWithoutSync) {
                flushed(slot)
                continue
            }
            let logTicket = options.mutations.contains(.flushWithoutLog) ? 0 : log.storeCount
            waitForSync(
                slot, (logTicket, syncs[FileSync.data].written, syncs[FileSync.table].written))
        }
    }

    private func waitForSync(_ slot: Int32, _ tickets: (UInt64, UInt64, UInt64)) {
        requests[Int(slot)].tickets = tickets
        requests[Int(slot)].coverIndex = log.nextIndex
        push(slot, &awaitingSync)
        want(FileSync.log, tickets.0)
        want(FileSync.data, tickets.1)
        want(FileSync.table, tickets.2)
        completeSynced()
    }

    private func completeSynced() {
        while awaitingSync.head >= 0 {
            let tickets = requests[Int(awaitingSync.head)].tickets
            guard syncs[FileSync.log].durable >= tickets.0,
                syncs[FileSync.data].durable >= tickets.1,
                syncs[FileSync.table].durable >= tickets.2,
                let slot = pop(&awaitingSync)
            else { return }
            guard isCovered(slot) else { continue }
            if requests[Int(slot)].header.kind == .flush {
                flushed(slot)
            } else {
                finish(slot, .ok)
            }
        }
    }

    /// False: it waits for the record that says what it has made durable.
    private func isCovered(_ slot: Int32) -> Bool {
        guard let ticket = cover(upTo: requests[Int(slot)].coverIndex) else {
            push(slot, &awaitingRoom)
            return false
        }
        guard syncs[FileSync.log].durable < ticket else {
            if !log.coversLowest, ticket > 0 { log.foundIsCovered() }
            return true
        }
        requests[Int(slot)].tickets = (ticket, 0, 0)
        push(slot, &awaitingSync)
        want(FileSync.log, ticket)
        return false
    }
    /// Records below `index` are durable with their data: has a record say so, if it matters.
    /// Returns what a sync of the log has to cover before it is durable; nil: no room for it now.
    func cover(upTo index: UInt64) -> UInt64? {
        if freshEnd > covered, index > covered, !options.mutations.contains(.freshNotCovered) {
            guard log.hasRoomForCovered else { return nil }
            log.append(.covered(index))
            covered = index
            coverTicket = log.storeCount
        }
        return coverTicket
    }

    /// Also where no recovery depends on it, so that rot in one of those records is noticed after a
    /// restart of the host, too. Durable with the next sync.
    private func noteCovered(_ index: UInt64) {
        guard index > covered, log.hasRoom(1), !options.mutations.contains(.freshNotCovered) else {
            return
        }
        log.append(.covered(index))
        covered = index
    }

    /// The log's tail has moved.
    func retryCovering() {
        while let slot = pop(&awaitingRoom) { push(slot, &awaitingSync) }
        completeSynced()
    }

    private func flushed(_ slot: Int32) {
        let request = requests[Int(slot)]
        let point = StablePoint(epoch: request.header.epoch, sequence: request.header.sequence)
        let isMarked = log.hasRoom(1)
        if isMarked, point > flushedPoint {
            flushedPoint = point
            // Durable with the next sync: the mark may lag, it never leads.
            log.append(.flushed(point))
            noteCovered(request.coverIndex)
        }
        var header = replyHeader(slot, .ok)
        // Writes sent before the flush may be missing here: the engine leaves their regions out.
        if request.passesParked || request.parkCount != parkCount {
            header.auxiliary |= FlushReply.isPartial
        }
        if !isMarked { header.auxiliary |= FlushReply.isUnmarked }
        send(slot, header)
        end(slot)
    }
}
