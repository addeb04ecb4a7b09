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
    /// A replica that left the in-sync set.
    package struct Departure: Equatable, Sendable {
        package var member: Member
        /// The epoch of the change that removed it.
        package var leftEpoch: Epoch
        /// A stable point it is known to have flushed: a copy that has flushed less was rolled
        /// back, and is compared in full.
        package var stablePoint: StablePoint
        /// B, from which epoch on its history may differ from the members': `leftEpoch`, or what
        /// the survivor of a salvage left at.
        package var partedEpoch: Epoch
        package var reason: DepartureReason
        /// A loser of a salvage: its bytes stay as they are until an administrator decides.
        package var isKept: Bool
        package init(
            member: Member, leftEpoch: Epoch, stablePoint: StablePoint, partedEpoch: Epoch? = nil,
            reason: DepartureReason = .unknown, isKept: Bool = false
        ) {
            self.member = member
            self.leftEpoch = leftEpoch
            self.stablePoint = stablePoint
            self.partedEpoch = partedEpoch ?? leftEpoch
            self.reason = reason
            self.isKept = isKept
        }
        /// As far as the record tells, the next change may take it back without a resync: it is not
        /// set aside in a salvage, and no disk has failed it.
        package var isReinstatable: Bool {
            guard !isKept, partedEpoch == leftEpoch else { return false }
            switch reason {
            case .unknown, .disconnected, .silent, .unreachable, .slow: return true
            case .full, .ioError, .protocolError, .rolledBack, .salvaged, .administrator:
                return false
            }
        }
    }
    /// The replica that is out holds less than it once had: it is compared in full.
    mutating func markRolledBack(_ member: Member) {
        for index in out.indices where out[index].member == member {
            out[index].reason = .rolledBack
        }
    }
    /// Why a replica left the in-sync set. Raw values are on disk and on the wire.
    package enum DepartureReason: UInt8, BitwiseCopyable, Sendable, CaseIterable {
        case unknown = 0
        /// Its connection closed.
        case disconnected = 1
        /// It owed an answer past the removal deadline.
        case silent = 2
        case full = 3
        /// It failed a request, a sync above all.
        case ioError = 4
        /// It broke the protocol.
        case protocolError = 5
        /// It answered much later than the others for a while.
        case slow = 6
        /// Its files are older than it once said.
        case rolledBack = 7
        /// It could not be reached when an engine took the volume over.
        case unreachable = 8
        /// Another copy was chosen in a salvage.
        case salvaged = 9
        case administrator = 10
    }
    /// What the last change of the record was for. Raw values are on disk and on the wire.
    package enum Change: UInt8, BitwiseCopyable, Sendable, CaseIterable {
        case creation = 0
        case takeover = 1
        case removal = 2
        case join = 3
        case promotion = 4
        case detach = 5
        case salvage = 6
        case reconstruction = 7
        /// A takeover that took a removed replica back without a resync.
        case reinstatement = 8
        /// A decision about a replica that is out.
        case administration = 9
        /// One was taken, or one was deleted: snapshots and layers say which.
        case snapshot = 10
        /// The volume grew.
        case resize = 11
        /// The volume went back to a snapshot; what it held is one, too.
        case revert = 12
    }
    /// The volume as it was when `layer` was frozen: what the chain up to it holds.
    package struct Snapshot: Equatable, Sendable {
        package var layer: LayerID
        package var name: String
        /// When it was asked for, milliseconds since 1970.
        package var created: UInt64
        package init(layer: LayerID, name: String, created: UInt64) {
            self.layer = layer
            self.name = name
            self.created = created
        }
    }
    /// A salvage: the history went on from the copy of `survivor`, which had parted from the other
    /// members' at `partedEpoch`.
    package struct Fork: Hashable, Sendable {
        package var epoch: Epoch
        package var survivor: ReplicaID
        package var partedEpoch: Epoch
        package init(epoch: Epoch, survivor: ReplicaID, partedEpoch: Epoch) {
            self.epoch = epoch
            self.survivor = survivor
            self.partedEpoch = partedEpoch
        }
    }

    /// The volume grew while `head` was its head: layers below that one are as large as it was.
    package struct Growth: Equatable, Sendable {
        package var head: LayerID
        /// Bytes, before it.
        package var sizeBefore: UInt64
        package init(head: LayerID, sizeBefore: UInt64) {
            self.head = head
            self.sizeBefore = sizeBefore
        }
    }

    package var volume: VolumeID
    /// The user's name for it: for messages; the id decides.
    package var name: String
    package var epoch: Epoch
    package var nonce: UInt64
    /// Bytes, whole blocks. It only grows.
    package var size: UInt64
    package var engine: InstanceID = .none
    package var engineEndpoint: String = ""
    /// Raised by the controller whenever a new client (attachment) begins.
    package var clientGeneration: UInt64 = 0
    package var minInSync: UInt8 = 1
    /// How long a member's answer lets the engine serve reads and acknowledge writes, milliseconds.
    package var leaseMilliseconds: UInt32 = VolumeRecord.leaseMillisecondsDefault
    package var change = Change.creation
    /// Every member had durably promised this epoch when the record was written: one that has not
    /// is an older copy of itself.
    package var promised = Epoch.zero
    /// Detached in order: the members are equal and their activity logs empty.
    package var isClean = true
    package var inSync: [Member]
    package var joining: Member?
    package var out: [Departure] = []
    /// Where salvages forked the history, oldest first.
    package var lineage: [Fork] = []
    /// Ascending; the last is the head. A chain, but for `reverts`.
    package var layers: [LayerID] = [LayerID(rawValue: 1)]
    /// Oldest first; each of another layer, none of the head.
    package var snapshots: [Snapshot] = []
    /// Oldest first, as far as a layer below is left.
    package var growths: [Growth] = []
    /// Oldest first, as far as anything is left of what was made since.
    package var reverts: [Revert] = []

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

    /// Of a record without growths, which is what those before volumes grew can read.
    package static let formatVersion: UInt32 = 3
    package static let formatVersionGrown: UInt32 = 4
    package static let formatVersionReverted: UInt32 = 5
    package static let leaseMillisecondsDefault: UInt32 = 500
    package static let leaseMillisecondsMax: UInt32 = 600_000
    package static let magic: UInt32 = 0x5645_5248
    /// What may be there at once fits, whatever it is called: `snapshotsMax` names of
    /// `nameLengthMax`, all layers, reverts, growths, departures, and 700 salvages. A frame with it
    /// fits 128 KiB: what a connection stages, and a pool's buffer.
    package static let encodedSizeMax = 127 << 10
    package static let nameLengthMax = 63
    private static let listMax = 64
    private static let layersMax = 4096
    /// What snapshots leave to changes that must never fail: replicas that leave, an endpoint.
    private static let otherGrowth = 4096
    package static let snapshotsMax = 1024
    package static let revertsMax = 512

    /// Bytes, in this order, integers little-endian: magic "HREV" (4), format version (4), volume
    /// (16), epoch (8), nonce (8), size (8), engine (8), clientGeneration (8), promised (8),
    /// leaseMilliseconds (4), minInSync (1), clean (1), change (1), name (text), endpoint (text),
    /// inSync, joining (list of 0 or 1), out, lineage, layers, snapshots, growths, reverts (each
    /// a 4-byte count, then its elements), CRC32C of all before it (4). A member is replica (8) and
    /// incarnation (8); an element of out: member, leftEpoch (8), stable point (epoch 8, sequence
    /// 8), partedEpoch (8), reason (1), kept (1); a fork: epoch (8), survivor (8), partedEpoch (8);
    /// a layer: its id (4); a snapshot: layer (4), created (8), name (text); a growth: head (4),
    /// size before (8); a revert: head (4), target (4). Version 3 has neither growths nor reverts,
    /// not even a count; version 4 has growths only; version 5 has reverts.
    package func encoded() -> [UInt8] {
        var w = ByteWriter()
        w.append(Self.magic)
        w.append(formatVersionNeeded)
        w.append(volume.high)
        w.append(volume.low)
        w.append(epoch.rawValue)
        w.append(nonce)
        w.append(size)
        w.append(engine.rawValue)
        w.append(clientGeneration)
        w.append(promised.rawValue)
        w.append(leaseMilliseconds)
        w.append(minInSync)
        w.append(isClean ? 1 as UInt8 : 0)
        w.append(change.rawValue)
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
            w.append(departure.partedEpoch.rawValue)
            w.append(departure.reason.rawValue)
            w.append(departure.isKept ? 1 as UInt8 : 0)
        }
        w.append(UInt32(lineage.count))
        for fork in lineage {
            w.append(fork.epoch.rawValue)
            w.append(fork.survivor.rawValue)
            w.append(fork.partedEpoch.rawValue)
        }
        w.append(UInt32(layers.count))
        for layer in layers { w.append(layer.rawValue) }
        w.append(UInt32(snapshots.count))
        for snapshot in snapshots {
            w.append(snapshot.layer.rawValue)
            w.append(snapshot.created)
            w.append(text: snapshot.name)
        }
        if formatVersionNeeded >= Self.formatVersionGrown {
            w.append(UInt32(growths.count))
            for growth in growths {
                w.append(growth.head.rawValue)
                w.append(growth.sizeBefore)
            }
        }
        if formatVersionNeeded >= Self.formatVersionReverted {
            w.append(UInt32(reverts.count))
            for revert in reverts {
                w.append(revert.head.rawValue)
                w.append(revert.target.rawValue)
            }
        }
        w.append(checksum(of: w.bytes))
        return w.bytes
    }

    /// Nil if the bytes are not exactly one valid record.
    package init?(decoding bytes: [UInt8]) {
        guard bytes.count >= 8, bytes.count <= Self.encodedSizeMax else { return nil }
        var tail = ByteReader([UInt8](bytes.suffix(4)))
        guard tail.read(UInt32.self) == checksum(of: [UInt8](bytes.dropLast(4))) else { return nil }
        var r = ByteReader([UInt8](bytes.dropLast(4)))
        guard r.read(UInt32.self) == Self.magic else { return nil }
        let version = r.read(UInt32.self)
        guard (Self.formatVersion...Self.formatVersionReverted).contains(version) else {
            return nil
        }
        volume = VolumeID(high: r.read(UInt64.self), low: r.read(UInt64.self))
        epoch = Epoch(r.read(UInt64.self))
        nonce = r.read(UInt64.self)
        size = r.read(UInt64.self)
        engine = InstanceID(rawValue: r.read(UInt64.self))
        clientGeneration = r.read(UInt64.self)
        promised = Epoch(r.read(UInt64.self))
        leaseMilliseconds = r.read(UInt32.self)
        minInSync = r.read(UInt8.self)
        let clean = r.read(UInt8.self)
        isClean = clean == 1
        guard let change = Change(rawValue: r.read(UInt8.self)) else { return nil }
        self.change = change
        name = r.readText(limit: Self.nameLengthMax)
        engineEndpoint = r.readText(limit: 255)
        inSync = (0..<r.readCount(limit: Self.listMax)).map { _ in r.readMember() }
        let joiners = (0..<r.readCount(limit: 1)).map { _ in r.readMember() }
        joining = joiners.first
        var isSane = clean <= 1 && leaseMilliseconds <= Self.leaseMillisecondsMax
        out = (0..<r.readCount(limit: Self.listMax)).map { _ in
            r.readDeparture(isSane: &isSane)
        }
        lineage = (0..<r.readCount(limit: Self.layersMax)).map { _ in
            Fork(
                epoch: Epoch(r.read(UInt64.self)),
                survivor: ReplicaID(rawValue: r.read(UInt64.self)),
                partedEpoch: Epoch(r.read(UInt64.self)))
        }
        layers = (0..<r.readCount(limit: Self.layersMax)).map { _ in
            LayerID(rawValue: r.read(UInt32.self))
        }
        snapshots = (0..<r.readCount(limit: Self.snapshotsMax)).map { _ in
            Snapshot(
                layer: LayerID(rawValue: r.read(UInt32.self)), name: "",
                created: r.read(UInt64.self)
            ).named(r.readText(limit: Self.nameLengthMax))
        }
        if version >= Self.formatVersionGrown {
            growths = (0..<r.readCount(limit: Self.listMax)).map { _ in
                Growth(
                    head: LayerID(rawValue: r.read(UInt32.self)), sizeBefore: r.read(UInt64.self))
            }
        }
        if version >= Self.formatVersionReverted {
            reverts = (0..<r.readCount(limit: Self.revertsMax)).map { _ in
                Revert(
                    head: LayerID(rawValue: r.read(UInt32.self)),
                    target: LayerID(rawValue: r.read(UInt32.self)))
            }
        }
        guard r.isValid, r.remaining == 0, isSane, version == formatVersionNeeded,
            !inSync.isEmpty, isChainSane, areGrowthsSane, areRevertsSane, Self.isValidSize(size)
        else { return nil }
    }

    /// Layers are numbered upwards; a snapshot is of a frozen one, and has its name to itself.
    private var isChainSane: Bool {
        guard let first = layers.first, let head = layers.last, first > .head, head <= .max,
            zip(layers, layers.dropFirst()).allSatisfy({ $0 < $1 })
        else { return false }
        let frozen = Set(layers.dropLast())
        return snapshots.allSatisfy { frozen.contains($0.layer) && !$0.name.isEmpty }
            && Set(snapshots.map(\.layer)).count == snapshots.count
            && Set(snapshots.map(\.name)).count == snapshots.count
    }
    /// Each at a later head and to a larger size than the one before.
    private var areGrowthsSane: Bool {
        var (head, size) = (LayerID.head, UInt64(0))
        for growth in growths {
            guard growth.head > head, growth.head <= self.head, growth.sizeBefore > size,
                growth.sizeBefore < self.size,
                growth.sizeBefore % UInt64(Geometry.blockSize) == 0
            else { return false }
            (head, size) = (growth.head, growth.sizeBefore)
        }
        return true
    }
    private var areRevertsSane: Bool {
        var head = LayerID(rawValue: 1)
        for revert in reverts {
            guard revert.head > head, revert.head <= self.head, revert.target > .head,
                revert.target < revert.head
            else { return false }
            head = revert.head
        }
        return true
    }
    /// What older versions cannot say is only there when it is needed.
    private var formatVersionNeeded: UInt32 {
        if !reverts.isEmpty { return Self.formatVersionReverted }
        return growths.isEmpty ? Self.formatVersion : Self.formatVersionGrown
    }
    package var head: LayerID { layers[layers.count - 1] }
    package func snapshot(named name: String) -> Snapshot? {
        snapshots.first { $0.name == name }
    }
    /// Whether a snapshot of that name would still fit the record.
    package func mayHold(snapshotNamed name: String, extra: Int = 0) -> Bool {
        snapshots.count < Self.snapshotsMax && layers.count < Self.layersMax
            && head < .max
            && encoded().count + 4 + 16 + name.utf8.count + extra + Self.otherGrowth
                <= Self.encodedSizeMax
    }
    /// Whether going back to one of them, keeping what was there under that name, would fit.
    package func mayRevert(keeping name: String) -> Bool {
        // A revert, and with the first one the counts of growths and of reverts.
        reverts.count < Self.revertsMax && mayHold(snapshotNamed: name, extra: 16)
    }

    package func contains(_ replica: ReplicaID) -> Bool {
        inSync.contains { $0.replica == replica }
    }
}

extension VolumeRecord.Snapshot {
    fileprivate func named(_ name: String) -> Self {
        var snapshot = self
        snapshot.name = name
        return snapshot
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
    mutating func readDeparture(isSane: inout Bool) -> VolumeRecord.Departure {
        var departure = VolumeRecord.Departure(
            member: readMember(), leftEpoch: Epoch(read(UInt64.self)),
            stablePoint: StablePoint(
                epoch: Epoch(read(UInt64.self)), sequence: SequenceNumber(read(UInt64.self))),
            partedEpoch: Epoch(read(UInt64.self)))
        if let reason = VolumeRecord.DepartureReason(rawValue: read(UInt8.self)) {
            departure.reason = reason
        } else {
            isSane = false
        }
        let kept = read(UInt8.self)
        departure.isKept = kept == 1
        if kept > 1 { isSane = false }
        return departure
    }
}
