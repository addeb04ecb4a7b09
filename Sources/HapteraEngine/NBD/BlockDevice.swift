import HapteraCore

/// What a frontend serves: a volume behind the engine core, memory, or a file. See `Operation` for
/// how requests are cut and who owns their buffers.
package protocol BlockDevice: AnyObject {
    var name: String { get }
    /// Bytes, a multiple of 512. May grow; `frontend` is told.
    var size: UInt64 { get }
    var isReadOnly: Bool { get }
    /// Those that can be read at present, oldest first: operations may name their layers. What asks
    /// for one that is gone is completed with an error.
    var snapshots: [VolumeRecord.Snapshot] { get }
    /// Bytes of one of them.
    func size(of snapshot: VolumeRecord.Snapshot) -> UInt64
    /// Whether zeroing is faster than writing even if the space must be kept.
    var zeroesFastWithoutHole: Bool { get }
    /// Where the buffers of operations come from.
    var pool: BufferPool { get }
    /// Whether there is room for another operation.
    var canSubmit: Bool { get }
    /// Who is told of completions. Set once, before the first operation; not retained.
    var frontend: (any BlockDeviceFrontend)? { get set }

    /// Precondition: `canSubmit`. The completion follows later, never from within this call.
    /// A device that cannot serve at present holds the operation; it does not fail it.
    func submit(_ operation: Operation)
    /// The client connection of this number is gone: what of it has not begun need not happen, and
    /// is completed with `OperationResult.cancelled`; later, never from within this call.
    func cancel(session: UInt32)
    /// Called at the end of a turn, after everything was submitted. A device that completes
    /// without waiting for anything reports its completions here; true if there were any.
    func completeReady() -> Bool
}

extension BlockDevice {
    /// For devices that have none.
    package var snapshots: [VolumeRecord.Snapshot] { [] }
    package func size(of snapshot: VolumeRecord.Snapshot) -> UInt64 { size }
    /// For devices that begin everything at once.
    package func cancel(session: UInt32) {}
}

/// The other side of a `BlockDevice`.
package protocol BlockDeviceFrontend: AnyObject {
    /// `EngineAction.complete`: the operation's buffer is the frontend's again.
    func complete(
        userData: UInt64, result: OperationResult, buffer: BufferID, tableLength: Int32,
        isHole: Bool)
    /// The device's size is another now.
    func sizeChanged()
}
