// What goes into and comes out of `ReplicaCore`. Pure like the engine's core; the files are the
// shell's (real files through io_uring, or the simulator's disk).

/// A replica's files, by role.
package enum ReplicaFile: Hashable, BitwiseCopyable, Sendable {
    case manifest
    /// The activity log. Mapped into memory: see `ReplicaCore.init`.
    case log
    case data(LayerID)
    case table(LayerID)
    /// The names of the layers' files. Only to be synced.
    case layers

    /// Whose file it is, of the two that a layer has.
    package var layer: LayerID? {
        switch self {
        case .data(let layer), .table(let layer): layer
        case .manifest, .log, .layers: nil
        }
    }
}

extension ReplicaFile: CustomStringConvertible {
    /// Its name below the replica's directory.
    package var description: String {
        switch self {
        case .manifest: "manifest"
        case .log: "activity.log"
        case .data(let layer): "layers/\(layer.rawValue).data"
        case .table(let layer): "layers/\(layer.rawValue).table"
        case .layers: "layers"
        }
    }
}

/// Connections are numbered by the shell, 0..<connectionsMax, and a number is reused only after
/// `disconnected`.
package enum ReplicaLimits {
    package static let connectionsMax = 32
    package static let diskOperationsMax = 1024
}

package enum ReplicaEvent {
    case connected(connection: Int)
    case disconnected(connection: Int)
    /// A complete frame. The shell has verified header and table checksums, not the data's. `table`
    /// is valid during the call only. `buffer` holds the data (whole blocks from position 0) or is
    /// `.none`; the core takes over the shell's reference.
    case frame(connection: Int, FrameHeader, table: RawMemory, buffer: BufferID)
    /// A disk operation ended: bytes transferred, or a negative errno.
    case disk(token: UInt64, result: Int)
    /// At least every 100 ms.
    case tick
}

package enum ReplicaAction: BitwiseCopyable {
    /// Reads or writes `length` bytes at `offset` of the file, from or to `bufferOffset` of
    /// `buffer` (4 KiB aligned throughout); `ReplicaEvent.disk` with `token` follows. The core
    /// holds the buffer's reference until then. Short transfers are reported as they are.
    case read(
        ReplicaFile, offset: UInt64, length: Int, buffer: BufferID, bufferOffset: Int, token: UInt64
    )
    case write(
        ReplicaFile, offset: UInt64, length: Int, buffer: BufferID, bufferOffset: Int, token: UInt64
    )
    /// fdatasync: what was written (for the log: stored in its mapping) before this action is
    /// durable when it ends with 0.
    case sync(ReplicaFile, token: UInt64)
    /// Make the layer's data and table files, sparse, for a volume of `size` bytes, or find them
    /// made and never written to. Not durable before syncs of both, and of `.layers`.
    case create(LayerID, size: UInt64, token: UInt64)
    /// Let the layer's data and table files have room for a volume of `size` bytes: they never
    /// shrink. Not durable before syncs of both.
    case extend(LayerID, size: UInt64, token: UInt64)
    /// Delete the layer's files, which the manifest does not name any more. Nothing depends on its
    /// being durable.
    case remove(LayerID, token: UInt64)
    /// Give the range's space back (fallocate PUNCH_HOLE | KEEP_SIZE).
    case punch(ReplicaFile, offset: UInt64, length: UInt64, token: UInt64)
    /// Send a reply. The table is in `tableBuffer` at 0 (header.tableLength bytes; `.none` if 0),
    /// the data in `buffer` at `bufferOffset` (header.dataLength bytes). The shell takes over both
    /// references and releases them when sent or when the connection is gone.
    case reply(
        connection: Int, FrameHeader, tableBuffer: BufferID, buffer: BufferID, bufferOffset: Int)
    case close(connection: Int)
    case note(ReplicaNote)
    /// The replica can't go on (failed sync, damaged manifest): exit with a clear message.
    case failed(ReplicaFailure)
}

package enum ReplicaNote: BitwiseCopyable, Sendable {
    case installed(Epoch)
    case refusedStale(connection: Int, Epoch)
    case checksumMismatch(offset: UInt64)
    /// A change was refused: a layer that clones share would not be what it was.
    case sharedLayerDiffers(offset: UInt64)
    case logFull
}

package enum ReplicaFailure: BitwiseCopyable, Sendable {
    case syncFailed(errno: Int32)
    case tableUnreadable(region: UInt64)
    case manifestWriteFailed(errno: Int32)
    case layerNotMade(LayerID, errno: Int32)
}

/// Synchronous access to a replica's files at creation, at open and for the offline tools. Real
/// directory or simulated disk. Errors are negative errno values turned into `StorageError`.
package protocol ReplicaStorage: AnyObject {
    /// Reads up to `memory.count` bytes; fewer only at the end of the file.
    func read(_ file: ReplicaFile, offset: UInt64, into memory: RawMemory) throws(StorageError)
        -> Int
    func write(_ file: ReplicaFile, offset: UInt64, from memory: RawMemory) throws(StorageError)
    func sync(_ file: ReplicaFile) throws(StorageError)
    func size(_ file: ReplicaFile) throws(StorageError) -> UInt64
    /// Creates an empty file of `size` bytes (sparse), or fails if it exists.
    func create(_ file: ReplicaFile, size: UInt64) throws(StorageError)
    /// Makes the file that long, sparse, if it is shorter.
    func extend(_ file: ReplicaFile, size: UInt64) throws(StorageError)
    /// Deletes the layer's files, as far as they are there. Not durable before a sync of the names.
    func remove(_ layer: LayerID) throws(StorageError)
    /// Layers that have any file.
    func layersPresent() throws(StorageError) -> [LayerID]
    /// Whether the layer's files have names in another directory as well.
    func isShared(_ layer: LayerID) -> Bool
    /// Makes created files' names durable.
    func syncDirectories() throws(StorageError)
    /// Ranges of the file that hold data (SEEK_DATA / SEEK_HOLE), at or after `offset`; nil: none.
    /// Only a hint for skipping what was never written: entries are never derived from it.
    func nextAllocated(_ file: ReplicaFile, from offset: UInt64) throws(StorageError) -> Range<
        UInt64
    >?
    /// The log's mapping: stores are seen by the file at once (and survive the process), and are
    /// durable after a `sync(.log)` begun later.
    func mapLog(size: Int) throws(StorageError) -> RawMemory
}

extension ReplicaStorage {
    /// For those that are never asked to.
    package func extend(_ file: ReplicaFile, size: UInt64) throws(StorageError) {
        guard try self.size(file) < size else { return }
        throw StorageError(.unsupported, "\(file): cannot grow here")
    }
    package func remove(_ layer: LayerID) throws(StorageError) {
        throw StorageError(.unsupported, "layer \(layer.rawValue) cannot be deleted here")
    }
    package func layersPresent() throws(StorageError) -> [LayerID] { [] }
    package func isShared(_ layer: LayerID) -> Bool { false }
    /// Makes a layer's files of a volume of `size` bytes, or finds them as an earlier making left
    /// them: nothing is written to a layer before it is in the manifest. Durable after syncs of
    /// both and of the directories.
    package func createLayer(_ layer: LayerID, size: UInt64) throws(StorageError) {
        for (file, bytes) in [
            (ReplicaFile.data(layer), ReplicaCore.dataSize(size)),
            (.table(layer), ReplicaCore.tableSize(size)),
        ] {
            do throws(StorageError) {
                try create(file, size: bytes)
            } catch {
                guard error.code == .exists, try nextAllocated(file, from: 0) == nil else {
                    throw error
                }
                // Perhaps before the volume grew.
                try extend(file, size: bytes)
            }
        }
    }
    /// Gives a layer's files room for a volume of `size` bytes.
    package func extendLayer(_ layer: LayerID, size: UInt64) throws(StorageError) {
        try extend(.data(layer), size: ReplicaCore.dataSize(size))
        try extend(.table(layer), size: ReplicaCore.tableSize(size))
    }
}

extension StorageError {
    /// As the result of a disk operation.
    package var result: Int {
        switch code {
        case .noSpace: -28
        case .exists: -17
        case .notFound: -2
        case .io(let errno): -Int(errno)
        case .inUse, .damaged, .unsupported: -5
        }
    }
}

package struct StorageError: Error, Equatable, Sendable {
    package enum Code: Equatable, Sendable {
        case notFound
        case exists
        case noSpace
        case inUse
        case io(errno: Int32)
        case damaged
        case unsupported
    }
    package var code: Code
    /// What happened to which file, and what to do.
    package var message: String
    package init(_ code: Code, _ message: String) {
        self.code = code
        self.message = message
    }
}
