// What goes into and comes out of `EngineCore`. The core is pure: it reads no clock, opens no
// socket and starts no thread. The shell (the real process, or the simulator) feeds it
// `EngineEvent`s one at a time and performs the `EngineAction`s it appended, in order.

/// What a client can ask of one piece of a volume.
package enum OperationKind: UInt8, BitwiseCopyable, Sendable {
    case read
    case write
    /// Make the range read zero and give its space back (NBD TRIM).
    case trim
    /// Make the range read zero; `OperationFlags.noHole` keeps its space.
    case writeZeroes
    case flush
    /// Which parts of the range hold data (NBD BLOCK_STATUS).
    case status
}

package struct OperationFlags: OptionSet, BitwiseCopyable, Sendable {
    package var rawValue: UInt8
    package init(rawValue: UInt8) { self.rawValue = rawValue }
    package static let fua = OperationFlags(rawValue: 1)
    package static let noHole = OperationFlags(rawValue: 2)
}

/// One client operation as a frontend hands it in: any byte range within one region (a flush has
/// none; a status may span regions, at most `EngineLimits.statusLengthMax`). A frontend cuts larger
/// requests at region boundaries.
///
/// Buffer contract, read and write: `buffer` has room for the range rounded out to whole blocks,
/// and the byte at `offset` is at position `offset % 4096` in it. The core keeps the reference it
/// is given until `EngineAction.complete`, which hands it back to the frontend, or another one of
/// the same size in its place (a hedged read): the frontend releases that once it has used the
/// data. Status: a 4 KiB buffer that receives the extents of
/// `FrameKind.status`, the first `tableLength` bytes; `EngineAction.complete` says how many.
package struct Operation: BitwiseCopyable, Sendable {
    package var kind: OperationKind
    package var flags: OperationFlags
    package var offset: UInt64
    package var length: Int
    package var buffer: BufferID
    /// The frontend's own; returned in `EngineAction.complete`.
    package var userData: UInt64
    /// Read and status: the frozen layer whose snapshot is meant; `.head`: the live volume. Nothing
    /// else is ever done to a snapshot.
    package var layer = LayerID.head
    /// Status: a snapshot's layer, at or below `layer`: what no layer above it holds, and so is as
    /// it was in the snapshot, is absent. `.head`: none, all layers count.
    package var base = LayerID.head
    /// The client connection it came on, for `EngineEvent.cancel`; 0: none.
    package var session: UInt32 = 0
    package init(
        kind: OperationKind, flags: OperationFlags = OperationFlags(), offset: UInt64 = 0,
        length: Int = 0,
        buffer: BufferID = .none, userData: UInt64
    ) {
        self.kind = kind
        self.flags = flags
        self.offset = offset
        self.length = length
        self.buffer = buffer
        self.userData = userData
    }
}

package enum EngineLimits {
    /// Operations the core holds at once, queued ones included; `EngineCore.canSubmit` says if
    /// there is room for another.
    package static let operationsMax = 2048
    package static let statusLengthMax = 1 << 30
}

/// How an operation ended for the client.
package enum OperationResult: UInt8, BitwiseCopyable, Sendable {
    case ok
    case ioError
    case noSpace
    /// The engine stops (fenced by another engine, or detached): the client must reconnect.
    case shuttingDown
    /// Its client is gone and it had not begun: it never happened.
    case cancelled
}

/// A replica's place in the engine, 0..<Geometry.replicaSlotsMax.
package typealias ReplicaSlot = Int

package enum EngineEvent {
    /// Start: read the record, take the volume over.
    case start
    /// A client operation. Precondition: `canSubmit`.
    case submit(Operation)
    /// The replicas this volume has now, from the controller by way of the node. A replica new here
    /// gets a slot; one no longer named is disconnected.
    case configure([ReplicaID])
    /// A connection to the replica is up (nothing said on it yet).
    case connected(ReplicaSlot)
    /// It is gone, whoever closed it. Everything sent on it and not answered is lost or in doubt.
    case disconnected(ReplicaSlot)
    /// A complete, checksum-verified frame from a replica. `table` and, for replies without a
    /// `readTarget`, `data` are valid during the call only.
    case frame(ReplicaSlot, FrameHeader, table: RawMemory, data: RawMemory)
    case store(StoreOutcome)
    /// Time passed. At least every 50 ms.
    case tick
    /// The client connection of this number is gone: what of it was not sent to any replica yet is
    /// completed with `OperationResult.cancelled` and never happens; the rest ends as it may.
    case cancel(session: UInt32)
    /// An administrator accepts that only rebooted members are left: go on from what they hold.
    case acceptLoss
    /// Freeze the head under this name (1 to `VolumeRecord.nameLengthMax` bytes), `created` in
    /// milliseconds since 1970. `EngineAction.snapshotTaken` with `token` answers when every member
    /// holds it durably; a name that is there already is brought to that, too.
    ///
    /// `hold`: from the freeze until its release, or its end, no change behind the freeze is
    /// acknowledged. Then it is answered as soon as the head is frozen; the same name asked for
    /// without one is answered when it is durable.
    case takeSnapshot(token: UInt64, name: String, created: UInt64, hold: SnapshotHold? = nil)
    /// End the hold of that token; `EngineAction.released` answers.
    case release(token: UInt64)
    /// Go back to the snapshot `target`: from the answer on, which is `EngineAction.snapshotTaken`
    /// with `token`, the volume holds what that holds, and a snapshot `kept` what it held before;
    /// asked for again, it is brought to that. Requests of clients that come meanwhile wait, and
    /// find the volume reverted.
    case revert(token: UInt64, target: String, kept: String, created: UInt64)
    /// Take the snapshot of this name out of the record; `EngineAction.snapshotDeleted` with
    /// `token` answers when it is. Reads of it that were submitted before end first, later ones
    /// fail.
    case deleteSnapshot(token: UInt64, name: String)
    /// Let the volume grow to this size, a valid one; `EngineAction.resized` with `token` answers
    /// when every member has it.
    case resize(token: UInt64, size: UInt64)
    /// Verify every layer of every member, from the region that the progress names on.
    case scrub(ScrubProgress)
    /// Leave in order: finish what is held, flush, mark the record clean, then `stopped`.
    case detach
}

/// The record service's answer to the one request outstanding.
package enum StoreOutcome: Sendable {
    /// get: the record. compareAndSwap: it was swapped, this is what stands.
    case record(VolumeRecord)
    /// compareAndSwap: the expected epoch is not there; this is.
    case conflict(VolumeRecord)
    case notFound
    /// compareAndSwap: the record must not become this one, and why. This request has changed
    /// nothing; an earlier one with the same proposal may have, or may yet.
    case refused(String)
    /// No answer (lost connection, time-out, store down): for compareAndSwap, in doubt.
    case unavailable
}

package enum EngineAction: BitwiseCopyable {
    /// Send the frame to the replica, in the order given. `header.tableLength` bytes of table come
    /// from `EngineCore.table(operationIndex)` (already checksummed in the header), then
    /// `header.dataLength` bytes at `bufferOffset` of `buffer` (which the shell retains until
    /// sent).
    case send(ReplicaSlot, FrameHeader, tableOf: Int32, buffer: BufferID, bufferOffset: Int32)
    /// Send a control frame: hello, install. Its table is `EngineCore.controlPayload`, copied at
    /// once.
    case sendControl(ReplicaSlot, FrameHeader)
    /// Close the connection to the replica. `disconnected` follows as an event. The shell connects
    /// again by itself, with back-off, as long as the replica is configured.
    case disconnect(ReplicaSlot)
    /// Answer the client. `tableLength`: bytes of extents, for status. For read,
    /// `isHole`: the whole range is known to read zero and the buffer was zero-filled.
    case complete(
        userData: UInt64, OperationResult, buffer: BufferID, tableLength: Int32, isHole: Bool)
    /// The snapshot is in the record, on every member, and durable there; or is not, and why.
    case snapshotTaken(token: UInt64, LayerID, SnapshotResult)
    /// Nothing is held back any more. `wasHeld`: everything behind the freeze was until now.
    case released(token: UInt64, wasHeld: Bool)
    /// The record names the snapshot no more; or does, and why.
    case snapshotDeleted(token: UInt64, DeletionResult)
    /// The volume is as large as was asked, or is not, and why; `by`: the replica that cannot.
    case resized(token: UInt64, ResizeResult, by: ReplicaSlot)
    /// `EngineCore.size` is another now.
    case sizeChanged
    /// Read the record; `EngineEvent.store` answers.
    case storeGet
    /// Swap in `EngineCore.proposedRecord` if the store's epoch is `expected`.
    case storeCompareAndSwap(expected: Epoch)
    /// Something an operator wants to know; the shell logs it and the node makes it an event.
    case note(EngineNote)
    /// The volume can be served / cannot at present (requests are held, not failed).
    case serving(Bool)
    /// The engine is done for good; see `EngineCore.stopReason`.
    case stopped
}

package enum SnapshotResult: UInt8, BitwiseCopyable, Sendable {
    case ok
    /// One with that name was there.
    case exists
    /// The record has no room for another.
    case tooMany
    /// A member has no room for another layer before it has merged those of deleted snapshots.
    case tooManyLayers
    /// Its hold had ended before the head could be frozen.
    case notHeld
    /// There is another hold.
    case busy
    /// Revert: no snapshot has the name of the target.
    case notThere
    /// Revert: another snapshot has the name of the one to keep.
    case nameTaken
    /// The volume is not served at present, or is being detached.
    case notServing
    /// The engine stopped before it was known whether the snapshot is there.
    case inDoubt

    /// In the text of the engine's error if, and only if, the snapshot may be there all the same.
    package static let doubtText = "whether the snapshot is there"
    package static let revertDoubtText = "whether the volume was reverted"
    package static let deletionDoubtText = "whether the snapshot was deleted"
    package static let resizeDoubtText = "whether the volume has grown"
}

package enum DeletionResult: UInt8, BitwiseCopyable, Sendable {
    case ok
    /// No snapshot has that name.
    case notThere
    /// The volume is not served at present, or is being detached, or too many requests wait.
    case notServing
    /// The engine stopped before it was known whether the snapshot is gone.
    case inDoubt
}

package enum ResizeResult: UInt8, BitwiseCopyable, Sendable {
    case ok
    /// It was as large already.
    case exists
    /// A volume never shrinks.
    case smaller
    /// A replica's disk is full.
    case noSpace
    /// A replica cannot be that large.
    case refused
    /// The record has no room for another size of its layers.
    case tooMany
    /// The volume is not served at present, or is being detached, or too many requests wait.
    case notServing
    /// The engine stopped before it was known whether the volume has grown.
    case inDoubt
}

/// What happened, in terms an operator knows. Details are in `EngineCore`'s state.
package enum EngineNote: BitwiseCopyable, Sendable {
    case tookOver(Epoch)
    case replicaLost(ReplicaSlot)
    case replicaRemoved(ReplicaSlot, Epoch, VolumeRecord.DepartureReason)
    /// Taken back as a member without a resync: nothing was acknowledged without it.
    case replicaReinstated(ReplicaSlot, Epoch)
    /// Its files are older than what it once said it had flushed.
    case replicaRolledBack(ReplicaSlot)
    /// An administrator let the volume go on from rebooted members only.
    case lossAccepted
    case replicaJoining(ReplicaSlot, Epoch)
    case replicaPromoted(ReplicaSlot, Epoch)
    case joinFailed(ReplicaSlot)
    /// What to fill the joiner with is known: regions written since this epoch (zero: all).
    case joinMapped(ReplicaSlot, since: Epoch, regions: UInt64)
    /// The joiner's copy is older than what it is known to have flushed or promised.
    case joinerRolledBack(ReplicaSlot)
    /// Every reachable member lost its host since the copies were last equal, and the client may
    /// remember writes that none of them holds: waits for a better member.
    case onlyRebootedMembers
    /// Takeover has made the members equal: regions compared, blocks that differed, since it began
    /// to serve.
    case resolved(regions: UInt64, blocks: UInt64, milliseconds: UInt64)
    /// Every member is gone: requests wait for one to return.
    case stalled
    /// No member has space for a write: it is held and tried again.
    case fullEverywhere
    case storeUnavailable
    case checksumMismatch(ReplicaSlot, offset: UInt64)
    /// Resolution found no intact copy of the block and kept the bytes of this replica.
    case doubtfulBytesKept(ReplicaSlot, offset: UInt64)
    /// A damaged copy was rewritten from another member.
    case repaired(region: UInt64, blocks: UInt64)
    case protocolError(ReplicaSlot)
    /// It answers much later than the others, and leaves the in-sync set for a while.
    case replicaSlow(ReplicaSlot)
    case snapshotTaken(LayerID, Epoch)
    case reverted(to: LayerID, Epoch)
    case snapshotDeleted(LayerID, Epoch)
    /// Bytes.
    case resized(UInt64, Epoch)
    case scrubBegun(region: UInt64)
    /// Blocks of this member's copy, the first at `offset`, that do not match their checksums or
    /// cannot be read. What is repaired of the region is told by `repaired`.
    case scrubFound(ReplicaSlot, offset: UInt64, blocks: UInt64)
    /// Blocks of which no member has a copy that can be trusted.
    case scrubLost(offset: UInt64, blocks: UInt64)
    /// The member cannot say what it holds of the region.
    case scrubSkipped(ReplicaSlot, region: UInt64)
    /// `EngineCore.scrubReport` says what was found.
    case scrubFinished
    case rebuildProgress(ReplicaSlot, regionsDone: UInt64, regionsTotal: UInt64)
}

/// Why an engine stopped.
package enum StopReason: String, Sendable {
    case detached = "detached"
    /// The next engine takes over as after a crash: it compares what may differ.
    case left = "the engine left without marking the volume clean"
    case fenced = "another engine has taken the volume over"
    case recordOlderThanReplica =
        "a replica has promised a later epoch than the metadata store knows: was the store restored?"
    case volumeNotFound = "the metadata store knows no such volume"
    case sizeMismatch = "a replica's size is not the volume's"
    case refused = "the metadata store refuses a change of the record"

    /// Those that no restart of the engine cures.
    private static let lasting: [StopReason] = [
        .recordOlderThanReplica, .volumeNotFound, .sizeMismatch,
    ]

    /// An engine's last words: the reason, and which record it judged.
    package func text(judging record: VolumeRecord?) -> String {
        rawValue + (record.map { " (record \(Self.name($0)))" } ?? "")
    }

    /// The lasting reason in an engine's last words; nil if there is none, or if the record that
    /// stands now is not the one that was judged: whoever repaired it waits for another engine.
    package static func standing(in text: String, against record: VolumeRecord?) -> StopReason? {
        guard let reason = lasting.first(where: { text.holds($0.rawValue) }) else { return nil }
        if reason == .volumeNotFound { return record == nil ? reason : nil }
        guard let record, text.holds("(record ") else { return reason }
        return text.holds("(record \(name(record)))") ? reason : nil
    }

    /// There is one record per epoch, unless a store was restored: the nonce tells those apart.
    private static func name(_ record: VolumeRecord) -> String {
        "\(record.epoch.rawValue)/\(String(record.nonce, radix: 16))"
    }
}

extension String {
    /// As `contains`, without the regular expressions that this brings into a process.
    fileprivate func holds(_ part: String) -> Bool {
        var rest = utf8[...]
        while rest.count >= part.utf8.count {
            if rest.starts(with: part.utf8) { return true }
            rest = rest.dropFirst()
        }
        return false
    }
}
