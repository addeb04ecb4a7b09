/// A volume's configuration: one record in the metadata store, changed only by compare-and-swap on
/// `epoch`, each change raising the epoch by one and carrying its writer's `nonce`. Every replica
/// keeps the copy it last installed. While an engine is attached only that engine writes it.
package struct VolumeRecord: Equatable, Sendable {
    package struct Member: Hashable, Sendable {
        package var replica: ReplicaID
        package var incarnation: Incarnation
        package init(replica: ReplicaID, incarnation: Incarnation) {
            self.replica = replica
            self.incarnation = incarnation
        }
    }
    /// A replica that left the in-sync set: since when, and the highest stable point the remaining
    /// members knew then.
    package struct Departure: Equatable, Sendable {
        package var member: Member
        package var leftEpoch: Epoch
        package var stablePoint: StablePoint
        package init(member: Member, leftEpoch: Epoch, stablePoint: StablePoint) {
            self.member = member
            self.leftEpoch = leftEpoch
            self.stablePoint = stablePoint
        }
    }

    package var volume: VolumeID
    /// The user's name for it: for messages; the id decides.
    package var name: String
    package var epoch: Epoch
    package var nonce: UInt64
    package var size: UInt64
    package var engine: InstanceID = .none
    package var engineEndpoint: String = ""
    /// Raised by the controller whenever a new client (attachment) begins.
    package var clientGeneration: UInt64 = 0
    package var minInSync: UInt8 = 1
    /// Detached in order: the members are equal and their activity logs empty.
    package var isClean = true
    package var inSync: [Member]
    package var joining: Member?
    package var out: [Departure] = []
    /// Epochs at which a salvage forked the history.
    package var lineage: [Epoch] = []
    /// The layer chain, lowest first; the last is the head.
    package var layers: [LayerID] = [LayerID(rawValue: 1)]

    package init(
        volume: VolumeID, name: String, epoch: Epoch, nonce: UInt64, size: UInt64, inSync: [Member]
    ) {
        self.volume = volume
        self.name = name
        self.epoch = epoch
        self.nonce = nonce
        self.size = size
        self.inSync = inSync
    }

    package static let formatVersion: UInt32 = 1
    package static let magic: UInt32 = 0x5645_5248
    package static let encodedSizeMax = 32 << 10
    package static let nameLengthMax = 63
    private static let listMax = 64
    private static let layersMax = 4096

    /// Bytes, in this order, integers little-endian: magic "HREV" (4), format version (4), volume
    /// (16), epoch (8), nonce (8), size (8), engine (8), clientGeneration (8), minInSync (1),
    /// clean (1), name (text), endpoint (text), inSync, joining (list of 0 or 1), out, lineage,
    /// layers (each a 4-byte count, then its elements), CRC32C of all before it (4).
    package func encoded() -> [UInt8] {
        var w = ByteWriter()
        w.append(Self.magic)
        w.append(Self.formatVersion)
        w.append(volume.high)
        w.append(volume.low)
        w.append(epoch.rawValue)
        w.append(nonce)
        w.append(size)
        w.append(engine.rawValue)
        w.append(clientGeneration)
        w.append(minInSync)
        w.append(isClean ? 1 as UInt8 : 0)
        w.append(text: name)
        w.append(text: engineEndpoint)
        w.append(UInt32(inSync.count))
        for member in inSync { w.append(member) }
        w.append(joining == nil ? 0 as UInt32 : 1)
        if let joining { w.append(joining) }
        w.append(UInt32(out.count))
        for departure in out {
            w.append(departure.member)
            w.append(departure.leftEpoch.rawValue)
            w.append(departure.stablePoint.epoch.rawValue)
            w.append(departure.stablePoint.sequence.rawValue)
        }
        w.append(UInt32(lineage.count))
        for fork in lineage { w.append(fork.rawValue) }
        w.append(UInt32(layers.count))
        for layer in layers { w.append(layer.rawValue) }
        w.append(checksum(of: w.bytes))
        return w.bytes
    }

    /// Nil if the bytes are not exactly one valid record.
    package init?(decoding bytes: [UInt8]) {
        guard bytes.count >= 8, bytes.count <= Self.encodedSizeMax else { return nil }
        var tail = ByteReader([UInt8](bytes.suffix(4)))
        guard tail.read(UInt32.self) == checksum(of: [UInt8](bytes.dropLast(4))) else { return nil }
        var r = ByteReader([UInt8](bytes.dropLast(4)))
        guard r.read(UInt32.self) == Self.magic, r.read(UInt32.self) == Self.formatVersion else {
            return nil
        }
        volume = VolumeID(high: r.read(UInt64.self), low: r.read(UInt64.self))
        epoch = Epoch(r.read(UInt64.self))
        nonce = r.read(UInt64.self)
        size = r.read(UInt64.self)
        engine = InstanceID(rawValue: r.read(UInt64.self))
        clientGeneration = r.read(UInt64.self)
        minInSync = r.read(UInt8.self)
        let clean = r.read(UInt8.self)
        isClean = clean == 1
        name = r.readText(limit: Self.nameLengthMax)
        engineEndpoint = r.readText(limit: 255)
        inSync = (0..<r.readCount(limit: Self.listMax)).map { _ in r.readMember() }
        let joiners = (0..<r.readCount(limit: 1)).map { _ in r.readMember() }
        joining = joiners.first
        out = (0..<r.readCount(limit: Self.listMax)).map { _ in
            Departure(
                member: r.readMember(), leftEpoch: Epoch(r.read(UInt64.self)),
                stablePoint: StablePoint(
                    epoch: Epoch(r.read(UInt64.self)),
                    sequence: SequenceNumber(r.read(UInt64.self))))
        }
        lineage = (0..<r.readCount(limit: Self.layersMax)).map { _ in Epoch(r.read(UInt64.self)) }
        layers = (0..<r.readCount(limit: Self.layersMax)).map { _ in
            LayerID(rawValue: r.read(UInt32.self))
        }
        guard r.isValid, r.remaining == 0, clean <= 1, !inSync.isEmpty, !layers.isEmpty,
            size > 0, size <= Geometry.volumeSizeMax, size % UInt64(Geometry.blockSize) == 0
        else { return nil }
    }

    package func contains(_ replica: ReplicaID) -> Bool {
        inSync.contains { $0.replica == replica }
    }
}

/// CRC32C of an array: for control structures.
package func checksum(of bytes: [UInt8]) -> UInt32 {
    if bytes.isEmpty { return 0 }
    let block = MemoryBlock(count: bytes.count)
    block.memory.copy(from: bytes)
    return CRC32C.checksum(block.memory)
}

extension ByteWriter {
    mutating func append(_ member: VolumeRecord.Member) {
        append(member.replica.rawValue)
        append(member.incarnation.rawValue)
    }
}
extension ByteReader {
    mutating func readMember() -> VolumeRecord.Member {
        VolumeRecord.Member(
            replica: ReplicaID(rawValue: read(UInt64.self)),
            incarnation: Incarnation(rawValue: read(UInt64.self)))
    }
}
