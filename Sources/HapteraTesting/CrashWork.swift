import HapteraCore

/// A write or a trim under way.
struct CrashWrite {
    var blocks: Range<Int>
    /// What they become, by block; none: nothing changes.
    var versions: [UInt64]
    var sequence: UInt64
    var isDurable: Bool
    /// With FUA and nothing to change: what is durable by the answer.
    var present: [UInt64]
}

// What the engine of a crash replay asks of its replica.
extension CrashReplay {
    private static let blocksUsed = 8

    // MARK: disk

    func submit(_ action: ReplicaAction) {
        switch action {
        case .write(let file, let offset, let length, let buffer, let at, let token):
            guard let host else { return }
            let bytes = host.pool.memory(buffer).slice(at, length).bytes()
            identities[token] = (
                file, disk.beginWrite(file, offset: offset, bytes: bytes, length: length)
            )
        case .punch(let file, let offset, let length, let token):
            identities[token] = (
                file, disk.beginWrite(file, offset: offset, bytes: [], length: Int(length))
            )
        case .sync(.layers, _): break
        case .sync(let file, let token): identities[token] = (file, disk.beginSync(file))
        default: break
        }
        pending.append(action)
    }

    /// Any of the operations under way ends.
    func performOne() throws(StorageError) {
        guard let host, !pending.isEmpty else { return }
        let action = pending.remove(at: random.below(pending.count))
        var result = 0
        let token: UInt64
        switch action {
        case .read(let file, let offset, let length, let buffer, let at, let own):
            token = own
            result = try disk.read(
                file, offset: offset, into: host.pool.memory(buffer).slice(at, length))
        case .write(let file, let offset, let length, _, _, let own):
            token = own
            result = try write(file, offset: offset, length: length, token: own)
        case .create(let layer, let size, let own):
            token = own
            try disk.createLayer(layer, size: size)
        case .remove(let layer, let own):
            token = own
            try disk.remove(layer)
        case .sync(.layers, let own):
            token = own
            try disk.syncDirectories()
        case .sync(_, let own):
            token = own
            if let begun = identities[own] { disk.endSync(begun.file, begun.id) }
        case .punch(_, _, _, let own):
            token = own
            if let begun = identities[own] { disk.land(begun.file, begun.id) }
        default: return
        }
        identities[token] = nil
        guard !isOver else { return }
        host.step(.disk(token: token, result: result))
    }

    private func write(_ file: ReplicaFile, offset: UInt64, length: Int, token: UInt64)
        throws(StorageError) -> Int
    {
        guard let begun = identities[token] else { return -5 }
        if isFull, try needsSpace(file, offset: offset, length: length) {
            let kept = random.permille(600) ? 0 : random.below(length / 512) * 512
            disk.failWrite(file, begun.id, kept: kept)
            return -28
        }
        disk.land(file, begun.id)
        return length
    }
    /// Where there is nothing yet. Log, manifest and slots once made never need any.
    private func needsSpace(_ file: ReplicaFile, offset: UInt64, length: Int)
        throws(StorageError) -> Bool
    {
        if file == .manifest { return false }
        return try disk.file(file).current.memory.slice(Int(offset), length).isZero
    }

    func run() throws(StorageError) {
        while !pending.isEmpty && !isOver && host?.failure == nil { try performOne() }
    }
    func advance(milliseconds: UInt64) {
        guard let host else { return }
        host.now = host.now.adding(milliseconds: milliseconds)
        host.step(.tick)
    }

    // MARK: installs

    /// A new engine takes over, reads everything and writes what is doubtful anew.
    func install() throws(StorageError) {
        guard let host else { return }
        oracle.asked += 1
        oracle.recorded.append(oracle.layers)
        let epoch = oracle.asked
        sequence = 0
        let tag = host.attach(epoch: epoch, layers: oracle.layers).install
        // What was let in before may wait for room.
        guard let reply = try reply(to: tag), !isOver, reply.header.status == .ok,
            let installed = InstallReply(decoding: reply.table)
        else { return isOver ? () : fail("e\(epoch) is not installed") }
        oracle.promised = epoch
        writes = [:]
        flushTags = [:]
        for place in oracle.regionPlaces where !isOver {
            try survey(place, isActive: installed.activeRegions.contains(oracle.region(at: place)))
        }
        isUnsurveyed = false
        for block in oracle.blocks.indices
        where oracle.blocks[block].newest.isDoubtful && !isOver {
            write(block..<block + 1, isTrim: false)
            try run()
        }
        guard !isOver else { return }
        flush()
        try run()
    }

    private func reply(to tag: UInt64?) throws(StorageError) -> CrashHost.Reply? {
        try run()
        for _ in 0..<50 where tag.flatMap({ replies[$0] }) == nil && !isOver {
            advance(milliseconds: 100)
            try run()
        }
        return tag.flatMap { replies[$0] }
    }

    private func survey(_ place: Int, isActive: Bool) throws(StorageError) {
        let isPower = isUnsurveyed
        let region = oracle.region(at: place)
        let tag = host?.send(
            .digest, epoch: oracle.asked, layer: region.layer,
            offset: region.region * UInt64(Geometry.regionSize))
        // It may wait for a merge.
        guard let reply = try reply(to: tag), reply.header.status == .ok else {
            return isOver ? () : fail("no digest of \(region)")
        }
        let found = CrashJudge.decode(reply.table).blocks
        let first = place * Geometry.blocksPerRegion
        for block in first..<first + found.count {
            guard var version = oracle.match(block, found[block - first], isPower: isPower) else {
                return fail(
                    "block \(block) after the crash; lawful is "
                        + oracle.describe(block, isPower: isPower))
            }
            oracle.blocks[block].isBusy = false
            if isPower {
                // All that is left is durable. Other copies may hold something else.
                if isActive && version.id > oracle.blocks[block].stable {
                    version.id = oracle.newID()
                }
                oracle.blocks[block].versions = [version]
            } else if version.isDoubtful {
                version.id = oracle.newID()
                oracle.blocks[block].versions.append(version)
            } else {
                // Nothing of an older epoch happens from here on.
                oracle.blocks[block].versions.removeAll { $0.id > version.id }
            }
            oracle.blocks[block].current = version.id
        }
    }

    // MARK: requests

    func write(_ blocks: Range<Int>, isTrim: Bool) {
        guard let host, blocks.allSatisfy({ !oracle.blocks[$0].isBusy }) else { return }
        // Where nothing was, a trim is noted unless the layer is the lowest one: a deleted one
        // below it goes at a moment of the replica's own.
        let isLowest = oracle.layers.count == 1
        if isTrim && isLowest && oracle.sections.count > 1
            && blocks.contains(where: { oracle.blocks[$0].known.state == .absent })
        {
            return
        }
        let state =
            !isTrim ? BlockState.data : random.permille(800) ? .zero : .zeroAllocated
        let isDurable = random.permille(100)
        var write = CrashWrite(
            blocks: blocks, versions: [], sequence: sequence + 1, isDurable: isDurable,
            present: blocks.map { oracle.blocks[$0].current })
        let changes =
            !isTrim
            || blocks.contains { block in
                let known = oracle.blocks[block].known
                let now = known.state
                return known.isDoubtful
                    || now != state && !(isLowest && now == .absent && state == .zero)
            }
        var values: [UInt64] = []
        if changes {
            for _ in blocks {
                let id = oracle.newID()
                write.versions.append(id)
                values.append(isTrim ? 0 : RandomSource.mix(id))
            }
        }
        // The versions count from the moment the frame is in: before the step.
        let before = blocks.map { oracle.blocks[$0] }
        for (place, id) in write.versions.enumerated() {
            let block = blocks.lowerBound + place
            oracle.blocks[block].isBusy = true
            oracle.blocks[block].versions.append(
                CrashVersion(
                    id: id, state: state, value: values[place], epoch: oracle.asked))
        }
        if write.versions.isEmpty { for block in blocks { oracle.blocks[block].isBusy = true } }
        nextWrite = write
        sequence += 1
        let region = oracle.region(at: blocks.lowerBound / Geometry.blocksPerRegion)
        let start = blocks.lowerBound % Geometry.blocksPerRegion
        let isFrozen = region.layer != oracle.layers.last
        let tag = host.send(
            isTrim ? .setState : .write, epoch: oracle.asked, layer: region.layer,
            offset: region.region * UInt64(Geometry.regionSize)
                + UInt64(start * Geometry.blockSize),
            length: blocks.count * Geometry.blockSize, sequence: sequence,
            auxiliary: isTrim ? UInt64(state.rawValue) : 0,
            flags: (isDurable ? FrameFlags.fua : 0) | (isFrozen ? FrameFlags.resync : 0),
            values: isTrim ? [] : values)
        if let tag {
            if nextWrite != nil { writes[tag] = write }
        } else {
            for (place, block) in blocks.enumerated() { oracle.blocks[block] = before[place] }
        }
        nextWrite = nil
    }

    func flush(isSettled: Bool = false) {
        guard let host else { return }
        sequence += 1
        let point = StablePoint(
            epoch: Epoch(oracle.asked), sequence: SequenceNumber(sequence))
        oracle.flushes.append(
            CrashFlush(
                point: point, versions: oracle.blocks.map(\.current),
                newest: oracle.blocks.map(\.newest.id),
                outstanding: Set(
                    writes.values.map { $0.blocks.lowerBound / Geometry.blocksPerRegion })))
        nextFlush = oracle.flushes.count - 1
        wantsSettled = isSettled
        let tag = host.send(.flush, epoch: oracle.asked, sequence: sequence)
        if let tag, nextFlush != nil { flushTags[tag] = oracle.flushes.count - 1 }
        nextFlush = nil
    }

    func take(_ reply: CrashHost.Reply) {
        let header = reply.header
        replies[header.tag] = reply
        if header.kind == .flush {
            let sent = flushTags.removeValue(forKey: header.tag)
            guard let index = sent ?? nextFlush else { return }
            if sent == nil { nextFlush = nil }
            return flushed(index, header)
        }
        guard header.kind == .write || header.kind == .setState else { return }
        let sent = writes.removeValue(forKey: header.tag)
        guard let write = sent ?? nextWrite else { return }
        // One that was sent before may be answered while the next one is on its way.
        if sent == nil { nextWrite = nil }
        wrote(write, header.status)
    }

    private func wrote(_ write: CrashWrite, _ status: FrameStatus) {
        for (place, block) in write.blocks.enumerated() {
            oracle.blocks[block].isBusy = false
            guard status == .ok else { continue }
            if !write.versions.isEmpty { oracle.blocks[block].current = write.versions[place] }
            let id = write.versions.isEmpty ? write.present[place] : write.versions[place]
            if write.isDurable { oracle.blocks[block].raiseFloor(id) }
        }
        switch status {
        case .ok: sample(permille: 100)
        case .noSpace where profile == .full: unsettle(write)
        case .staleEpoch: break
        default: fail("a write is answered \(status)")
        }
    }
    /// A write failed: whatever of it is there, it is not acknowledged. A region that could not be
    /// activated has not changed; otherwise the engine writes the blocks again.
    private func unsettle(_ write: CrashWrite) {
        for (block, id) in zip(write.blocks, write.versions) {
            unsettled.insert(block)
            if let place = oracle.blocks[block].versions.firstIndex(where: { $0.id == id }) {
                oracle.blocks[block].versions[place].hasFailed = true
            }
        }
    }

    private func flushed(_ index: Int, _ header: FrameHeader) {
        guard header.status == .ok else {
            return header.status == .staleEpoch ? () : fail("a flush is answered \(header.status)")
        }
        let flush = oracle.flushes[index]
        // It has passed by a write that was sent before it.
        let hasPassed = header.auxiliary != 0
        let covered = oracle.blocks.indices.map {
            hasPassed ? flush.versions[$0] : oracle.covered($0, by: flush)
        }
        for block in oracle.blocks.indices {
            oracle.blocks[block].raiseFloor(covered[block])
        }
        sample(permille: 300)
        guard !isOver, let host else { return }
        // Regions of writes sent before the flush and not covered are left out of the point.
        var left = hasPassed ? flush.outstanding : []
        for write in writes.values where write.sequence < flush.point.sequence.rawValue {
            left.insert(write.blocks.lowerBound / Geometry.blocksPerRegion)
        }
        for block in oracle.blocks.indices
        where !left.contains(block / Geometry.blocksPerRegion) {
            oracle.blocks[block].stable = max(oracle.blocks[block].stable, covered[block])
        }
        for place in left.sorted() {
            let region = oracle.region(at: place)
            host.send(
                .stable, epoch: oracle.asked, layer: region.layer,
                offset: region.region * UInt64(Geometry.regionSize), length: Geometry.regionSize,
                sequence: flush.point.sequence.rawValue,
                auxiliary: oracle.asked)
        }
        host.send(
            .stable, epoch: oracle.asked, sequence: flush.point.sequence.rawValue,
            auxiliary: oracle.asked, flags: wantsSettled ? FrameFlags.settled : 0)
    }

    private func sample(permille: Int) {
        if random.permille(permille) && !isOver { sample() }
    }

    // MARK: a busy day

    func work(_ steps: Int) throws(StorageError) {
        for _ in 0..<steps where !isOver {
            switch random.below(1000) {
            case 0..<300: randomWrite()
            case 300..<(profile == .wrap ? 320 : 360): flush(isSettled: random.permille(200))
            case 360..<(hasManyTicks ? 460 : 410):
                advance(milliseconds: random.permille(250) ? 20_000 : 100)
            case 460..<(profile == .manifest ? 490 : 463): try install()
            case 463..<466 where profile == .layers: try snapshot()
            case 466..<470 where profile == .layers: try deleteLayer()
            case 490..<495: isFull = profile == .full && !isFull
            case 495..<500 where profile == .manifest: try settle()
            default: try performOne()
            }
            if let failure = host?.failure { fail("the replica failed: \(failure)") }
            if !isFull && !unsettled.isEmpty { rewrite() }
        }
        isFull = false
        if !isOver { rewrite() }
    }
    private var hasManyTicks: Bool {
        profile == .drain || profile == .punch || profile == .layers
    }
    private func randomWrite() {
        let region = random.below(CrashHost.regions)
        let head = (oracle.sections.count - 1) * CrashSection.stride
        let first = head + region * Geometry.blocksPerRegion
        let isTrim = random.permille(profile == .punch ? 500 : 200)
        let isWide = random.permille(profile == .wrap ? 400 : isTrim ? 200 : 20)
        let limit = isWide ? 64 : Self.blocksUsed
        let count = isWide ? random.between(16, 32) : random.between(1, 3)
        let start = first + random.below(limit - count + 1)
        write(start..<start + count, isTrim: isTrim)
    }
    private func rewrite() {
        for block in unsettled.sorted() where !oracle.blocks[block].isBusy {
            unsettled.remove(block)
            write(block..<block + 1, isTrim: false)
        }
    }

    func settle() throws(StorageError) {
        try finishWrites()
        guard !isOver else { return }
        flush(isSettled: true)
        try run()
    }

    /// Until everything is answered. What is parked needs a stable point and a tick.
    func finishWrites() throws(StorageError) {
        isFull = false
        for _ in 0..<50 where !isOver {
            try run()
            if writes.isEmpty && unsettled.isEmpty { return }
            rewrite()
            flush()
            try run()
            advance(milliseconds: 100)
        }
        if !isOver { fail("writes are never answered") }
    }
}
