import Glibc
import HapteraCore
import HapteraIO

/// What `verify` found.
package struct VerifyReport: Equatable, Sendable {
    package var regionsRead: UInt64 = 0
    package var dataBlocks: UInt64 = 0
    /// Data that does not match its checksum, outside the activity log.
    package var mismatches: UInt64 = 0
    package var damagedPages: UInt64 = 0
    /// Data that does not match, in regions of the activity log: an interrupted write, which
    /// resolution or resync puts right.
    package var doubtful: UInt64 = 0
    /// The first damaged offsets, and what is wrong there.
    package var details: [(offset: UInt64, text: String)] = []
    package var isDamaged: Bool { mismatches + damagedPages > 0 }
    package static let detailsMax = 1000

    package static func == (a: Self, b: Self) -> Bool {
        a.regionsRead == b.regionsRead && a.dataBlocks == b.dataBlocks
            && a.mismatches == b.mismatches && a.damagedPages == b.damagedPages
            && a.doubtful == b.doubtful
    }
    mutating func note(_ offset: UInt64, _ text: String) {
        if details.count < Self.detailsMax { details.append((offset, text)) }
    }
}

/// The offline tools: they look at a directory nobody serves.
package enum OfflineTools {
    package static func verify(directory: String) throws(StorageError) -> VerifyReport {
        let reader = try open(directory)
        var report = VerifyReport()
        for layer in reader.layers { try verify(reader, layer, &report) }
        return report
    }

    /// Refused as by the process that would serve it, if a record of the activity log is damaged:
    /// what was written last would be missing, and nothing would tell.
    private static func open(_ directory: String) throws(StorageError) -> ReplicaReader {
        let storage = DirectoryStorage(
            directory: directory, mode: .inspect(waitMilliseconds: 3000))
        return try ReplicaReader(opening: storage, boot: storage.bootOfNext())
    }

    private static func verify(
        _ reader: ReplicaReader, _ layer: LayerID, _ report: inout VerifyReport
    ) throws(StorageError) {
        for number in 0..<reader.regionCount where reader.mayHold(layer, number) {
            report.regionsRead += 1
            let start = number * UInt64(Geometry.regionSize)
            do throws(StorageError) {
                let region = try reader.region(number, layer: layer)
                try reader.blocks(of: region) { (block, _, verdict, _) throws(StorageError) in
                    if verdict != .zero { report.dataBlocks += 1 }
                    let offset = start + UInt64(block * Geometry.blockSize)
                    switch verdict {
                    case .zero, .intact: break
                    case .doubtful:
                        report.doubtful += 1
                        report.note(offset, "doubtful: its write was interrupted")
                    case .damaged:
                        report.mismatches += 1
                        report.note(offset, "damaged: the data does not match its checksum")
                    }
                }
            } catch {
                guard error.code == .damaged else { throw error }
                report.damagedPages += 1
                report.note(start, error.message)
            }
        }
    }

    /// Writes the volume, or a snapshot of it, as a raw image. To a file, what reads zero becomes a
    /// hole.
    package static func export(
        directory: String, snapshot: String? = nil, output: String
    ) throws(StorageError) {
        let reader = try open(directory)
        var top = reader.manifest.head
        if let snapshot {
            guard let layer = reader.snapshot(named: snapshot) else {
                throw StorageError(.notFound, "no snapshot \(snapshot) is known here")
            }
            top = layer
        }
        // The volume may have grown since.
        let size = reader.size(of: top)
        let target = try ExportTarget(output, size: size)
        for number in 0..<Geometry.regionCount(size: size) {
            let start = number * UInt64(Geometry.regionSize)
            let length = min(UInt64(Geometry.regionSize), size - start)
            guard reader.mayHold(number) else {
                try target.skip(Int(length))
                continue
            }
            try reader.view(number, from: top) { (block, verdict, bytes) throws(StorageError) in
                let offset = start + UInt64(block * Geometry.blockSize)
                guard offset < size else { return }
                switch verdict {
                case .zero: try target.skip(bytes.count)
                case .intact: try target.write(bytes)
                case .doubtful, .damaged:
                    throw StorageError(
                        .damaged,
                        "the block at offset \(offset) is \(verdict): its data does not match "
                            + "its checksum; export another replica")
                }
            }
        }
        try target.finish()
    }
}

/// A file or standard output that takes an image from its start to its end.
private final class ExportTarget {
    private let path: String
    private let fd: Int32
    private let isSparse: Bool
    private let size: UInt64
    private var position: UInt64 = 0
    private let zeroes = MemoryBlock(count: Geometry.regionSize)
    /// Small writes are gathered.
    private let gathered = MemoryBlock(count: Geometry.regionSize)
    private var gatheredCount = 0

    init(_ path: String, size: UInt64) throws(StorageError) {
        self.path = path
        self.size = size
        isSparse = path != "-"
        guard isSparse else {
            fd = 1
            return
        }
        do throws(IOError) {
            fd = try FileDescriptors.open(path, flags: O_WRONLY | O_CREAT | O_TRUNC)
        } catch { throw DirectoryStorage.error(error.errno, error.message) }
    }
    deinit { if fd != 1 { close(fd) } }

    func write(_ memory: RawMemory) throws(StorageError) {
        gathered.memory.copy(from: memory, at: gatheredCount)
        gatheredCount += memory.count
        if gatheredCount == gathered.memory.count { try flush() }
    }
    func skip(_ count: Int) throws(StorageError) {
        try flush()
        if isSparse {
            position += UInt64(count)
        } else {
            try put(zeroes.memory.slice(0, count))
        }
    }
    func finish() throws(StorageError) {
        try flush()
        precondition(position == size)
        guard isSparse else { return }
        guard ftruncate(fd, off_t(size)) == 0, fsync(fd) == 0 else { throw failure() }
    }
    private func flush() throws(StorageError) {
        try put(gathered.memory.slice(0, gatheredCount))
        gatheredCount = 0
    }
    private func put(_ memory: RawMemory) throws(StorageError) {
        var done = 0
        while done < memory.count {
            let rest = memory.slice(done, memory.count - done)
            // SAFETY: `rest` has `count` readable bytes.
            let count =
                isSparse
                ? unsafe pwrite(fd, rest.base, rest.count, off_t(position))
                : unsafe Glibc.write(fd, rest.base, rest.count)
            if count < 0 {
                guard errno == EINTR else { throw failure() }
                continue
            }
            done += count
            position += UInt64(count)
        }
    }
    private func failure() -> StorageError {
        DirectoryStorage.error(
            errno, "cannot write \(isSparse ? path : "standard output"): \(errorText(errno))")
    }
}
