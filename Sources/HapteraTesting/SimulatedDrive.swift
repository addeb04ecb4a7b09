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
    var fullness = Fullness.data
    /// What a full disk has no room for, data aside.
    enum Fullness {
        case data
        /// New pages of tables, and new files.
        case newPages
        /// Anything: one that writes nothing in place.
        case all
    }
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
    mutating func fill(_ fullness: Fullness) {
        isFull = true
        self.fullness = fullness
    }

    /// Whether a full disk refuses the write.
    func needsSpace(_ file: SimulatedFile, offset: Int, length: Int) -> Bool {
        if fullness == .all { return true }
        let pages = offset / 4096..<(offset + length + 4095) / 4096
        switch file.name {
        case .data: return !file.allocated[pages.lowerBound]
        case .table:
            return fullness == .newPages
                && pages.contains { $0 >= file.allocated.count || !file.allocated[$0] }
        default: return false
        }
    }
}

/// What directories on one disk have in common.
final class SimulatedDrive {
    var trouble = DiskTrouble()
    /// Of what lands, over all files.
    var nextOrder: UInt64 = 0
}
