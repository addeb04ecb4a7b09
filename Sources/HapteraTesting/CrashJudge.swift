import HapteraCore

/// Opens a crash image with the real core and compares what it says with the oracle.
struct CrashJudge {
    let oracle: CrashOracle
    /// Unsynced writes may be gone; otherwise only the process ended.
    let isPower: Bool
    /// After a kill it is the same as before.
    let boot: UInt64
    let random: RandomSource
    let mutations: MutationSet

    /// Nil: lawful.
    func examine(_ image: CrashImage) -> String? {
        do throws(StorageError) {
            if !oracle.isCreated {
                try ReplicaCore.create(
                    storage: image, identity: CrashHost.identity, logCapacity: CrashDisk.records)
            }
            let host = try CrashHost(
                opening: image, instance: random.next() | 1, boot: boot, mutations: mutations,
                limits: .init(small: 48, medium: 4, large: 3))
            return examine(host, image)
        } catch { return "does not open: \(error.message)" }
    }

    private func examine(_ host: CrashHost, _ image: CrashImage) -> String? {
        var replies: [UInt64: CrashHost.Reply] = [:]
        var pending: [ReplicaAction] = []
        host.replied = { replies[$0.header.tag] = $0 }
        host.perform = { pending.append($0) }
        func run() throws(StorageError) {
            while !pending.isEmpty {
                let (token, result) = try perform(pending.removeFirst(), image, host.pool)
                host.step(.disk(token: token, result: result))
            }
        }
        do throws(StorageError) {
            let epoch = oracle.asked + 1
            let tags = host.attach(epoch: epoch, layers: oracle.layers)
            try run()
            guard let hello = tags.hello.flatMap({ replies[$0] }),
                let said = HelloReply(decoding: hello.table)
            else { return "does not answer hello" }
            if let wrong = examine(said) { return wrong }
            guard let install = tags.install.flatMap({ replies[$0] }), install.header.status == .ok,
                let installed = InstallReply(decoding: install.table)
            else { return "does not install: \(host.failure.map { "\($0)" } ?? "no answer")" }

            // By place; those of deleted layers are not asked for.
            var found = [CrashFound?](repeating: nil, count: oracle.blocks.count)
            var births = [UInt64](repeating: 0, count: oracle.sections.count * CrashHost.regions)
            for place in oracle.regionPlaces {
                let region = oracle.region(at: place)
                let tag = host.send(
                    .digest, epoch: epoch, layer: region.layer,
                    offset: region.region * UInt64(Geometry.regionSize))
                try run()
                // It may wait for a merge.
                for _ in 0..<50 where tag.flatMap({ replies[$0] }) == nil && host.failure == nil {
                    host.now = host.now.adding(milliseconds: 100)
                    host.step(.tick)
                    try run()
                }
                guard let reply = tag.flatMap({ replies[$0] }), reply.header.status == .ok else {
                    return "no digest of \(region): "
                        + (host.failure.map { "\($0)" } ?? "refused")
                }
                let (birth, blocks) = Self.decode(reply.table)
                births[place] = birth
                for (block, own) in blocks.enumerated() {
                    found[place * Geometry.blocksPerRegion + block] = own
                }
            }
            if let wrong = examine(found, births, installed) { return wrong }
            for _ in 0..<3 {
                let block = random.below(Int(CrashHost.size) / Geometry.blockSize)
                let offset = UInt64(block * Geometry.blockSize)
                let tag = host.send(.read, epoch: epoch, offset: offset, length: 4096)
                try run()
                guard let reply = tag.flatMap({ replies[$0] }),
                    let own = oracle.seen(block, in: found), isAsDigested(reply, own)
                else { return "block \(block): read and digest differ" }
            }
            host.step(.disconnected(connection: host.connection))
            return host.pool.inUse == 0 ? nil : "buffers were not given back"
        } catch { return error.message }
    }

    private func perform(_ action: ReplicaAction, _ image: CrashImage, _ pool: BufferPool)
        throws(StorageError) -> (token: UInt64, result: Int)
    {
        switch action {
        case .read(let file, let offset, let length, let buffer, let at, let token):
            let memory = pool.memory(buffer).slice(at, length)
            return (token, try image.read(file, offset: offset, into: memory))
        case .write(let file, let offset, let length, let buffer, let at, let token):
            try image.write(file, offset: offset, from: pool.memory(buffer).slice(at, length))
            return (token, length)
        case .create(let layer, let size, let token):
            try image.createLayer(layer, size: size)
            return (token, 0)
        case .remove(let layer, let token):
            try image.remove(layer)
            return (token, 0)
        case .sync(let file, let token):
            if file == .layers { return (token, 0) }
            try image.sync(file)
            return (token, 0)
        case .punch(let file, let offset, let length, let token):
            try image.punch(file, offset: offset, length: Int(length))
            return (token, 0)
        default: preconditionFailure("not a disk operation")
        }
    }

    static func decode(_ table: [UInt8]) -> (birth: UInt64, blocks: [CrashFound]) {
        let block = MemoryBlock(count: table.count)
        block.memory.copy(from: table)
        let blocks = (0..<Geometry.blocksPerRegion).compactMap { index -> CrashFound? in
            guard let digest = RegionDigest.decode(index: index, from: block.memory) else {
                return nil
            }
            // One that is not doubtful holds one value in all sectors, or its checksum lies.
            let isWhole = digest.entry.state != .data || digest.hashHigh == 8
            return CrashFound(
                entry: digest.entry, isDoubtful: digest.isDoubtful,
                value: isWhole ? digest.hashLow : .max)
        }
        return (block.memory.load(UInt64.self, 0), blocks)
    }

    private func isAsDigested(_ reply: CrashHost.Reply, _ found: CrashFound) -> Bool {
        if found.isDoubtful { return reply.header.status == .checksumMismatch }
        guard reply.header.status == .ok else { return false }
        guard found.entry.state == .data else { return reply.data.isEmpty }
        var reader = ByteReader(reply.data)
        return reader.read(UInt64.self) == found.value
    }

    private func examine(_ hello: HelloReply) -> String? {
        let promise = hello.promise.rawValue
        guard promise >= oracle.promised, promise <= oracle.asked else {
            return "promises e\(promise); promised was e\(oracle.promised), asked e\(oracle.asked)"
        }
        let layers = promise == 0 ? [] : oracle.recorded[Int(promise) - 1]
        let record = promise == 0 ? nil : CrashHost.record(epoch: promise, layers: layers)
        return hello.installed == record ? nil : "its record is not that of e\(promise)"
    }

    private func examine(
        _ found: [CrashFound?], _ births: [UInt64], _ installed: InstallReply
    ) -> String? {
        let active = Set(installed.activeRegions)
        // A clean copy has lost nothing at all.
        let mayLose = isPower && installed.isRebooted
        let flushed = oracle.flushes.first { $0.point == installed.flushed }
        if flushed == nil && installed.flushed != .zero {
            return "has flushed a point nobody asked for"
        }
        for (block, seen) in found.enumerated() {
            guard let seen else { continue }
            let least = flushed.flatMap { block < $0.versions.count ? $0.versions[block] : nil }
            guard
                let version = oracle.match(block, seen, isPower: mayLose, flushed: least ?? 0)
            else {
                let shown =
                    seen.isDoubtful
                    ? "doubt" : seen.entry.state == .data ? "data" : "\(seen.entry.state)"
                return "block \(block) shows \(shown) \(seen.value),"
                    + " lawful is \(oracle.describe(block, isPower: mayLose)) from \(least ?? 0)"
                    + (isPower && !mayLose ? " (it says nothing is lost)" : "")
            }
            let place = block / Geometry.blocksPerRegion
            let region = oracle.region(at: place)
            let isActive = active.contains(region)
            if oracle.mustBeActive(block, version) && !isActive {
                return "block \(block): the activity log does not name \(region)"
            }
            let birth = isActive ? oracle.asked + 1 : version.epoch
            if births[place] < birth {
                return "\(region) has birth \(births[place]), block \(block) is of \(birth)"
            }
        }
        return nil
    }
}
