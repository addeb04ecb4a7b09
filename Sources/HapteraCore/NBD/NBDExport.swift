/// What a server offers under one name: the live volume, or one of its snapshots. The live one is
/// shared by all its sessions, and its `size` may grow while they live; one of a snapshot is made
/// for the session that asks for it.
package final class NBDExport {
    package let name: [UInt8]
    package var size: UInt64
    package let isReadOnly: Bool
    /// Whether zeroing is faster than writing even if the space must be kept (NO_HOLE).
    package let zeroesFastWithoutHole: Bool
    /// The frozen layer that reads are about; `.head`: the live volume.
    package let layer: LayerID
    /// Of a snapshot: the export of the volume, which knows whether the server stops.
    private let live: NBDExport?
    private var hasStopped = false

    package init(name: String, size: UInt64, isReadOnly: Bool, zeroesFastWithoutHole: Bool = true) {
        precondition(name.utf8.count <= NBDLimits.stringLengthMax)
        self.name = [UInt8](name.utf8)
        self.size = size
        self.isReadOnly = isReadOnly
        self.zeroesFastWithoutHole = zeroesFastWithoutHole
        layer = .head
        live = nil
    }

    /// The volume as it was when the snapshot was taken, of the size it had.
    package init(_ snapshot: VolumeRecord.Snapshot, size: UInt64, of live: NBDExport) {
        precondition(live.live == nil && snapshot.layer != .head)
        name = Self.name(of: snapshot, of: live)
        self.size = size
        isReadOnly = true
        zeroesFastWithoutHole = live.zeroesFastWithoutHole
        layer = snapshot.layer
        self.live = live
    }

    package var isSnapshot: Bool { live != nil }

    /// The server is stopping: options and requests are refused from now on.
    package var isStopping: Bool {
        get { live?.isStopping ?? hasStopped }
        set {
            precondition(!isSnapshot, "servers stop, snapshots do not")
            hasStopped = newValue
        }
    }

    package func transmissionFlags(_ format: NBDReplyFormat) -> UInt16 {
        typealias Flags = NBDTransmissionFlags
        var flags = Flags.hasFlags | Flags.canMultiConn
        // Of what never changes there is nothing to flush.
        if !isSnapshot { flags |= Flags.sendFlush | Flags.sendFUA | Flags.sendCache }
        if isReadOnly {
            flags |= Flags.readOnly
        } else {
            flags |= Flags.sendTrim | Flags.sendWriteZeroes | Flags.sendFastZero
        }
        if format != .simple { flags |= Flags.sendDF }
        return flags
    }

    /// Between the names of a volume and of its snapshot: `db@monday`.
    package static let separator = UInt8(ascii: "@")

    static func name(of snapshot: VolumeRecord.Snapshot, of live: NBDExport) -> [UInt8] {
        live.name + [separator] + snapshot.name.utf8
    }
}

/// What a server has to offer at this moment. Negotiations ask at every option, because snapshots
/// come and go while a server runs; what a session has entered stays what it is.
package protocol NBDExportLookup: AnyObject {
    /// The default export, and the first one listed, if it is offered.
    var live: NBDExport { get }
    /// Whether the volume itself may be entered, or its snapshots only.
    var offersLive: Bool { get }
    /// Those of the live volume, oldest first.
    var snapshots: [VolumeRecord.Snapshot] { get }
    /// Bytes of a snapshot.
    func size(of snapshot: VolumeRecord.Snapshot) -> UInt64
    /// Whether one more connection may begin to read a snapshot.
    var admitsReader: Bool { get }
}

extension NBDExportLookup {
    /// The export of that name, if it is offered. The empty name is the live volume's.
    func export(named name: RawMemory) -> NBDExport? {
        if isLive(name) { return offersLive ? live : nil }
        guard let text = snapshotName(in: name),
            let snapshot = snapshots.first(where: { text.equals(text: $0.name) })
        else { return nil }
        return NBDExport(snapshot, size: size(of: snapshot), of: live)
    }

    func isLive(_ name: RawMemory) -> Bool { name.count == 0 || name.equals(bytes: live.name) }

    /// What follows `VOLUME@`; nil if that is not what the name begins with. The volume's name is
    /// known, so that this is not ambiguous even if a name has an `@` of its own.
    func snapshotName(in name: RawMemory) -> RawMemory? {
        let count = live.name.count
        guard name.count > count, name.slice(0, count).equals(bytes: live.name),
            name[count] == NBDExport.separator
        else { return nil }
        return name.slice(count + 1, name.count - count - 1)
    }
}

/// A lookup that is told what there is, for tests and fuzzers.
package final class NBDFixedExports: NBDExportLookup {
    package let live: NBDExport
    package var snapshots: [VolumeRecord.Snapshot]
    package var admitsReader = true
    package var offersLive = true
    /// Those that are not the live volume's size.
    package var sizes: [LayerID: UInt64] = [:]

    package init(live: NBDExport, snapshots: [VolumeRecord.Snapshot] = []) {
        self.live = live
        self.snapshots = snapshots
    }
    package func size(of snapshot: VolumeRecord.Snapshot) -> UInt64 {
        sizes[snapshot.layer] ?? live.size
    }
}
