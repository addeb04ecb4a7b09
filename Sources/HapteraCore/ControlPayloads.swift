/// The first frame on a connection to a replica: who calls, for which volume.
package struct HelloRequest: Equatable, Sendable {
    /// The replication protocol's version; a replica refuses one it does not speak.
    package static let protocolVersion: UInt32 = 4
    package var version: UInt32 = protocolVersion
    package var volume: VolumeID
    package var engine: InstanceID
    package init(volume: VolumeID, engine: InstanceID) {
        self.volume = volume
        self.engine = engine
    }
    package func encoded() -> [UInt8] {
        var w = ByteWriter()
        w.append(version)
        w.append(volume.high)
        w.append(volume.low)
        w.append(engine.rawValue)
        return w.bytes
    }
    package init?(decoding bytes: [UInt8]) {
        var r = ByteReader(bytes)
        version = r.read(UInt32.self)
        volume = VolumeID(high: r.read(UInt64.self), low: r.read(UInt64.self))
        engine = InstanceID(rawValue: r.read(UInt64.self))
        guard r.isValid, r.remaining == 0 else { return nil }
    }
}

/// What a replica says of itself when greeted.
package struct HelloReply: Equatable, Sendable {
    package var member: VolumeRecord.Member
    package var instance: InstanceID
    package var promise: Epoch
    package var size: UInt64
    /// The record installed with `promise`, or nil if none ever was.
    package var installed: VolumeRecord?
    package init(
        member: VolumeRecord.Member, instance: InstanceID, promise: Epoch, size: UInt64,
        installed: VolumeRecord?
    ) {
        self.member = member
        self.instance = instance
        self.promise = promise
        self.size = size
        self.installed = installed
    }
    package func encoded() -> [UInt8] {
        var w = ByteWriter()
        w.append(member)
        w.append(instance.rawValue)
        w.append(promise.rawValue)
        w.append(size)
        let record = installed?.encoded() ?? []
        w.append(UInt32(record.count))
        w.append(raw: record)
        return w.bytes
    }
    package init?(decoding bytes: [UInt8]) {
        var r = ByteReader(bytes)
        member = r.readMember()
        instance = InstanceID(rawValue: r.read(UInt64.self))
        promise = Epoch(r.read(UInt64.self))
        size = r.read(UInt64.self)
        let record = r.read(raw: r.readCount(limit: VolumeRecord.encodedSizeMax))
        installed = record.isEmpty ? nil : VolumeRecord(decoding: record)
        guard r.isValid, r.remaining == 0, record.isEmpty == (installed == nil) else { return nil }
    }
}

/// Asks a replica to promise `record.epoch` to this engine and to keep the record.
package struct InstallRequest: Equatable, Sendable {
    package var engine: InstanceID
    /// An engine known to have ended: it relies on no lease any more.
    package var ended: InstanceID
    package var record: VolumeRecord
    package init(engine: InstanceID, ended: InstanceID = .none, record: VolumeRecord) {
        self.engine = engine
        self.ended = ended
        self.record = record
    }
    package func encoded() -> [UInt8] {
        var w = ByteWriter()
        w.append(engine.rawValue)
        w.append(ended.rawValue)
        w.append(raw: record.encoded())
        return w.bytes
    }
    package init?(decoding bytes: [UInt8]) {
        guard bytes.count > 16 else { return nil }
        var r = ByteReader([UInt8](bytes.prefix(16)))
        engine = InstanceID(rawValue: r.read(UInt64.self))
        ended = InstanceID(rawValue: r.read(UInt64.self))
        guard let record = VolumeRecord(decoding: [UInt8](bytes.dropFirst(16))) else { return nil }
        self.record = record
    }
}

/// A replica's durable promise.
package struct InstallReply: Equatable, Sendable {
    package var instance: InstanceID
    /// The host restarted (so unflushed writes may be lost) since this copy was last known equal to
    /// the others (a `stable` frame with `FrameFlags.settled`).
    package var isRebooted: Bool
    /// Highest point this replica has flushed; its mark is durable. Before, after a crash, it may
    /// have lagged by what was flushed last.
    package var flushed: StablePoint
    /// Highest point it was told every member holds a durable mark of: at most S. May lag.
    package var stablePoint: StablePoint
    /// What it had promised before this Install.
    package var promiseBefore: Epoch
    /// What is left of the lease given to the engine before, milliseconds.
    package var leaseRemainingMilliseconds: UInt32
    /// The activity log: regions that may differ from the other members.
    package var activeRegions: [LayerRegion]
    package init(
        instance: InstanceID, isRebooted: Bool, flushed: StablePoint,
        stablePoint: StablePoint = .zero, promiseBefore: Epoch = .zero,
        leaseRemainingMilliseconds: UInt32, activeRegions: [LayerRegion]
    ) {
        self.instance = instance
        self.isRebooted = isRebooted
        self.flushed = flushed
        self.stablePoint = stablePoint
        self.promiseBefore = promiseBefore
        self.leaseRemainingMilliseconds = leaseRemainingMilliseconds
        self.activeRegions = activeRegions
    }
    /// A replica keeps at most this many regions active, so that the reply fits a frame's table.
    package static let activeRegionsMax = 8000

    package func encoded() -> [UInt8] {
        var w = ByteWriter()
        w.append(instance.rawValue)
        w.append(isRebooted ? 1 as UInt8 : 0)
        w.append(flushed.epoch.rawValue)
        w.append(flushed.sequence.rawValue)
        w.append(stablePoint.epoch.rawValue)
        w.append(stablePoint.sequence.rawValue)
        w.append(promiseBefore.rawValue)
        w.append(leaseRemainingMilliseconds)
        w.append(UInt32(activeRegions.count))
        for region in activeRegions { w.append(region.packed) }
        return w.bytes
    }
    package init?(decoding bytes: [UInt8]) {
        var r = ByteReader(bytes)
        instance = InstanceID(rawValue: r.read(UInt64.self))
        let rebooted = r.read(UInt8.self)
        isRebooted = rebooted != 0
        flushed = StablePoint(
            epoch: Epoch(r.read(UInt64.self)), sequence: SequenceNumber(r.read(UInt64.self)))
        stablePoint = StablePoint(
            epoch: Epoch(r.read(UInt64.self)), sequence: SequenceNumber(r.read(UInt64.self)))
        promiseBefore = Epoch(r.read(UInt64.self))
        leaseRemainingMilliseconds = r.read(UInt32.self)
        activeRegions = (0..<r.readCount(limit: Self.activeRegionsMax)).map { _ in
            LayerRegion(packed: r.read(UInt64.self))
        }
        guard r.isValid, r.remaining == 0, rebooted <= 1 else { return nil }
    }
}
