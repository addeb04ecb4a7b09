import HapteraCore

/// What a server offers at this moment: its device, and the snapshots the device knows by now.
final class NBDExports: NBDExportLookup {
    let live: NBDExport
    private let device: any BlockDevice
    let offersLive: Bool
    private let readersMax: Int
    /// Connections that have entered the export of a snapshot.
    var readers = 0

    init(device: any BlockDevice, readersMax: Int, offersLive: Bool) {
        live = NBDExport(
            name: device.name, size: device.size, isReadOnly: device.isReadOnly,
            zeroesFastWithoutHole: device.zeroesFastWithoutHole)
        self.offersLive = offersLive
        self.device = device
        self.readersMax = readersMax
    }

    var snapshots: [VolumeRecord.Snapshot] { device.snapshots }
    func size(of snapshot: VolumeRecord.Snapshot) -> UInt64 { device.size(of: snapshot) }
    var admitsReader: Bool { readers < readersMax }
}
