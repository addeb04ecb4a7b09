import HapteraCore

/// A file operation about to start, as the fault seam sees it.
package struct FileOperation: BitwiseCopyable, Sendable {
    package enum Kind: UInt8, BitwiseCopyable, Sendable {
        case read, write, sync, punch
    }
    package var kind: Kind
    package var file: FileID
    package var offset: UInt64
    package var length: Int
}

/// What to do to one file operation.
package enum FaultEffect: BitwiseCopyable, Equatable, Sendable {
    case none
    /// The operation does not reach the disk and fails with this errno.
    case fail(errno: Int32)
    /// The operation is carried out, then reported as failed: its outcome is in doubt.
    case failAfter(errno: Int32)
    /// The operation does not reach the disk and is reported as done: a disk that lies.
    case skip
    /// A read or write moves only this many bytes (rounded down to 512, at least 0), as the disk
    /// may.
    case short(Int)
    /// The completion arrives this much later.
    case delay(milliseconds: Int)
    /// The completion arrives when the test calls `Reactor.releaseHeld`.
    case hold
}

/// Lets tests fail or delay any single completion of a file operation. Not consulted for sockets.
package protocol CompletionFault: AnyObject {
    /// `label` is the one the file was registered with.
    func effect(of operation: FileOperation, label: String) -> FaultEffect
}
