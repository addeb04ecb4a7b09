import HapteraCore

/// What a disk does wrong, set by the world's fault plan and read at each operation.
struct DiskTrouble: Equatable {
    /// Multiplies latencies.
    var slowness = 1
    /// Per thousand operations.
    var readErrors = 0
    var writeErrors = 0
    var syncErrors = 0
    var isFull = false
    /// Operations that take up to three seconds.
    var outliers = 0
    /// The next write of a layer's data does not happen, or happens somewhere else.
    var misdoing = Misdoing.none
    enum Misdoing {
        case none
        case lose
        case misdirect
    }
    var isNone: Bool { self == DiskTrouble() }
}

/// What directories on one disk have in common.
final class SimulatedDrive {
    var trouble = DiskTrouble()
    /// Of what lands, over all files.
    var nextOrder: UInt64 = 0
}
