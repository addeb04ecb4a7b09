// Making a replica's files: synchronous, before any process serves them.

extension ReplicaCore {
    /// Makes a replica in an empty directory. Does nothing if this very replica is there already;
    /// refuses a directory that holds anything else.
    ///
    /// Order, and what a crash leaves:
    /// 1. files are created at their sizes, the log is written with zeros   -> no manifest: anew
    /// 2. the log's header is written                                       -> same
    /// 3. all files and then their names are synced                         -> same
    /// 4. the manifest's slot 0 is written and synced                       -> none, or complete
    package static func create(
        storage: ReplicaStorage, identity: ReplicaIdentity,
        logCapacity: UInt64 = ActivityLog.capacityDefault
    ) throws(StorageError) {
        precondition(identity.isValid)
        let manifest = Manifest(identity: identity)
        if try isMade(storage, identity, layer: manifest.head) { return }
        try make(storage, manifest, logCapacity: logCapacity, logFirst: 0)
    }

    /// What a copy that shares layers begins with: the reply to the control verb `share`.
    package struct CloneSource: Equatable, Sendable {
        /// Linked into the directory already, ascending; the last is that of the snapshot.
        package var layers: [LayerID]
        /// `ReplicaIdentity.size` of the copy they are from: none of them is shorter.
        package var size: UInt64
        /// No page of theirs names a record of the log at this index or later.
        package var logIndex: UInt64
        package init(layers: [LayerID], size: UInt64, logIndex: UInt64) {
            self.layers = layers
            self.size = size
            self.logIndex = logIndex
        }
    }

    /// Makes a replica of a clone in a directory into which the layers of a snapshot were linked.
    /// `record`: the clone's first. Does nothing if this very replica is there already.
    ///
    /// Order as in `create`; layers are linked and everything else is made before the names are
    /// synced, and the manifest comes last. Without it there is nothing: it is made anew.
    package static func createClone(
        storage: ReplicaStorage, member: VolumeRecord.Member, record: VolumeRecord,
        source: CloneSource, logCapacity: UInt64 = ActivityLog.capacityDefault
    ) throws(StorageError) {
        var manifest = Manifest(
            identity: ReplicaIdentity(
                volume: record.volume, name: record.name, replica: member.replica,
                incarnation: member.incarnation,
                // No layer is shorter: the source's copy may be younger than the snapshot.
                size: min(source.size, record.layers.first.map(record.size(of:)) ?? 0)))
        guard manifest.identity.isValid, record.inSync.contains(member),
            record.layers.count == 2,
            let top = source.layers.last, top <= record.layers[0],
            zip(source.layers, source.layers.dropFirst()).allSatisfy({ $0 < $1 }),
            source.logIndex < 1 << 61
        else {
            throw StorageError(
                .unsupported, "the layers are not those that the clone's record names")
        }
        if try isMade(storage, manifest.identity, layer: record.head) { return }
        // Not by their link counts: the source may have deleted one that held nothing since.
        for layer in source.layers {
            for file in [ReplicaFile.data(layer), .table(layer)]
            where try fileSize(storage, file) == nil {
                throw StorageError(
                    .notFound, "\(file) is not linked from the source's directory")
            }
        }
        manifest.layers = source.layers + [record.head]
        if top != record.layers[0] { manifest.names[top] = record.layers[0] }
        manifest.promise = record.epoch
        manifest.installed = record
        try make(storage, manifest, logCapacity: logCapacity, logFirst: source.logIndex)
    }

    private static func make(
        _ storage: ReplicaStorage, _ manifest: Manifest, logCapacity: UInt64, logFirst: UInt64
    ) throws(StorageError) {
        let files: [(ReplicaFile, UInt64)] = [
            (.log, ActivityLog.fileSize(capacity: logCapacity)),
            (.data(manifest.head), dataSize(manifest.size)),
            (.table(manifest.head), tableSize(manifest.size)),
            (.manifest, Manifest.fileSize),
        ]
        for (file, size) in files { try createOrReuse(storage, file, size: size) }
        try prewriteLog(storage, capacity: logCapacity, first: logFirst)
        for (file, _) in files { try storage.sync(file) }
        try storage.syncDirectories()

        let bytes = manifest.encoded()
        let block = MemoryBlock(count: bytes.count)
        block.memory.copy(from: bytes)
        try storage.write(.manifest, offset: manifest.slotOffset(), from: block.memory)
        try storage.sync(.manifest)
    }

    /// Whole regions, so that one can be read in one piece in every layer, however large the
    /// volume is by now.
    package static func dataSize(_ size: UInt64) -> UInt64 {
        Geometry.regionCount(size: size) * UInt64(Geometry.regionSize)
    }
    static func tableSize(_ size: UInt64) -> UInt64 {
        Geometry.regionCount(size: size) * UInt64(TablePage.pairSize)
    }

    private static func isMade(
        _ storage: ReplicaStorage, _ identity: ReplicaIdentity, layer: LayerID
    ) throws(StorageError) -> Bool {
        switch try loadManifest(storage) {
        case .manifest(let found):
            guard found.identity.isEarlier(of: identity) else {
                throw StorageError(
                    .exists,
                    "the directory holds replica \(found.identity.replica.text) of volume "
                        + "\(found.identity.volume.text); use another directory")
            }
            // The making may have been cut short before that (seed 2006002).
            try makeDurable(found, storage)
            return true
        case .damaged:
            throw StorageError(.damaged, "manifest: neither slot is valid; the directory is kept")
        case .neverWritten:
            // Only a making that was cut short may be made anew: then nothing was ever written to
            // the table.
            if try fileSize(storage, .table(layer)) != nil,
                try storage.nextAllocated(.table(layer), from: 0) != nil
            {
                throw StorageError(
                    .damaged, "there is a block table but no manifest; the directory is kept")
            }
            return false
        }
    }

    private static func createOrReuse(
        _ storage: ReplicaStorage, _ file: ReplicaFile, size: UInt64
    ) throws(StorageError) {
        do throws(StorageError) {
            try storage.create(file, size: size)
        } catch {
            guard error.code == .exists else { throw error }
            // A making that was cut short before records grew.
            if file == .manifest { try storage.extend(file, size: size) }
            guard try storage.size(file) == size else { throw error }
        }
    }

    private static func prewriteLog(
        _ storage: ReplicaStorage, capacity: UInt64, first: UInt64
    ) throws(StorageError) {
        let total = ActivityLog.fileSize(capacity: capacity)
        let chunk = MemoryBlock(count: 1 << 20)
        var offset: UInt64 = 0
        while offset < total {
            let length = Int(min(UInt64(chunk.memory.count), total - offset))
            try storage.write(.log, offset: offset, from: chunk.memory.slice(0, length))
            offset += UInt64(length)
        }
        ActivityLog.format(chunk.memory, capacity: capacity, first: first)
        try storage.write(
            .log, offset: 0, from: chunk.memory.slice(0, ActivityLog.ringOffset))
    }

    /// Nil if there is no such file.
    static func fileSize(_ storage: ReplicaStorage, _ file: ReplicaFile)
        throws(StorageError) -> UInt64?
    {
        do throws(StorageError) {
            return try storage.size(file)
        } catch {
            guard error.code == .notFound else { throw error }
            return nil
        }
    }

    /// A killed process may have left it in the cache, or a failed write more than it says. A power
    /// cut must not bring back one that names layers whose files are deleted (seed 608283).
    static func makeDurable(
        _ manifest: Manifest, _ storage: ReplicaStorage
    ) throws(StorageError) {
        // As they are, not as they would be encoded today: a torn write of them changes nothing.
        let bytes = manifest.encoded()
        let slot = MemoryBlock(count: bytes.count)
        let offset = manifest.slotOffset(Manifest.slotSize(ofFile: try storage.size(.manifest)))
        let count = try storage.read(.manifest, offset: offset, into: slot.memory)
        guard count == slot.memory.count else {
            throw StorageError(.damaged, "manifest: has an end at \(count)")
        }
        // Found in the other slot only: the next change would go there, and leave none if it tore.
        if Manifest(decoding: slot.memory) != manifest { slot.memory.copy(from: bytes) }
        try storage.write(.manifest, offset: offset, from: slot.memory)
        try storage.sync(.manifest)
    }

    /// Of before records grew: the slots get as large as they are now. Without space for that they
    /// stay as they are, and an Install whose manifest does not fit is refused.
    ///
    /// What a crash leaves, the manifest being durable in its slot:
    /// 1. slot 0, which is where it was, gets it, too -> old slots; if torn, the other one counts
    /// 2. the file grows                              -> old or new slots; slot 0 counts in both
    /// 3. the new slot 1 gets it                      -> new slots, slot 0 counts
    static func widenManifest(
        _ manifest: Manifest, _ storage: ReplicaStorage
    ) throws(StorageError) {
        guard try storage.size(.manifest) < Manifest.fileSize else { return }
        let bytes = manifest.encoded()
        let block = MemoryBlock(count: bytes.count)
        block.memory.copy(from: bytes)
        if manifest.slot != 0 {
            try storage.write(.manifest, offset: 0, from: block.memory)
            try storage.sync(.manifest)
        }
        do throws(StorageError) {
            try storage.extend(.manifest, size: Manifest.fileSize)
        } catch {
            guard error.code == .noSpace else { throw error }
            return
        }
        try storage.sync(.manifest)
        try storage.write(.manifest, offset: UInt64(Manifest.slotSize), from: block.memory)
        try storage.sync(.manifest)
    }

    /// For opening and for the offline tools.
    package static func loadManifest(_ storage: ReplicaStorage) throws(StorageError)
        -> Manifest.Loaded
    {
        guard let size = try fileSize(storage, .manifest) else { return .neverWritten }
        guard Manifest.fileSizeBefore...Manifest.fileSize ~= size else {
            // Created and not yet extended, or not ours.
            return size == 0 ? .neverWritten : .damaged
        }
        let block = MemoryBlock(count: Int(size))
        let count = try storage.read(.manifest, offset: 0, into: block.memory)
        guard count == block.memory.count else { return .damaged }
        return Manifest.load(block.memory)
    }
}
