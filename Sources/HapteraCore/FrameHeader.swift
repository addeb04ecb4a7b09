/// What a frame between an engine and a replica, or between an engine and the record service, asks
/// or answers. A reply carries the kind of its request and `FrameFlags.reply`.
package enum FrameKind: UInt16, BitwiseCopyable, Sendable {
    // Engine to replica. "table" and "data" are the two parts of the payload, in this order.
    /// First frame on a connection. Control payload: `HelloRequest`; reply: `HelloReply`.
    case hello = 1
    /// Control payload: `InstallRequest`; reply: `InstallReply`.
    case install = 2
    /// `offset`, `length`: whole blocks of one region. table: CRC32C (4 bytes) per block; data: the
    /// blocks. Reply: no payload.
    case write = 3
    /// `offset`, `length`: whole blocks of one region; `auxiliary`: the `BlockState` to set.
    case setState = 4
    /// `offset`, `length`: whole blocks of one region, as seen from `layer`: what it does not hold
    /// is the next lower layer's. With `FrameFlags.resync`: what the layer itself holds. Reply
    /// table: one entry (8 bytes, as in the block table) per block; reply data: the blocks, states
    /// other than data zero-filled, or no data at all if no block is in state data.
    case read = 5
    /// Wait for every write and setState received before it on this connection, then sync
    /// everything written. `sequence` is the point the flush was sent at. Reply: no payload;
    /// `auxiliary`: `FlushReply`.
    case flush = 6
    /// Announces S = (`auxiliary` as epoch, `sequence`), and in `offset` (epoch) and `tag`
    /// (sequence) the point every member is known to hold a durable mark of; no reply. With a
    /// `length`: the region at `offset` holds writes to `layer` that S, announced by a frame right
    /// behind, does not cover.
    case stable = 7
    /// `offset`: start of a region; of what `layer` itself holds. Reply: `RegionDigest`.
    case digest = 8
    /// `offset`: where to start; `length` bytes at most (any whole blocks). Reply: extents, each
    /// length in bytes (8) and `BlockState` (4) and zero (4), possibly covering less than asked. As
    /// seen from `layer`. `auxiliary` above zero: a base, a layer at or below `layer`; blocks that
    /// no layer above the base holds are absent.
    case status = 9
    /// Which regions may hold anything but absent blocks, in any layer: `offset`: first region's
    /// start, `length`: regions asked for (at most 65536). `auxiliary` above zero: only those whose
    /// birth is that epoch or later (at most 4096 regions). Reply: a bit per region, least
    /// significant first.
    case regionMap = 10
    /// Keeps the connection alive; replies at once.
    case ping = 11
    /// Resolution found every copy of the blocks doubtful: take the bytes that are there as data
    /// (`auxiliary` 0). Sent to one replica, which answers like `read`; the others get a `write`.
    /// `auxiliary` 1 with a checksum in its upper half: nobody has the blocks' data; let their
    /// entries name that checksum, whatever the bytes are. No read returns them then, unless they
    /// are just those.
    case adopt = 12
    /// The volume is about to grow to `offset` bytes: make room for it in the head, durably. The
    /// volume's size stays what it is until an Install says otherwise.
    case prepareSize = 13
    /// Read every block that the entries of the region at `offset` (its start) call data, in
    /// `layer` and those below it, and check them. Reply: `RegionVerification`, possibly of fewer
    /// layers. Nothing changes, nothing is locked: what is written meanwhile may look suspect.
    case verify = 14

    // Engine to record service.
    /// `HelloRequest` for the store is not needed: the volume's id is the control payload (16
    /// bytes). Reply: the record, or `FrameStatus.notFound`.
    case getRecord = 64
    /// Control payload: volume id (16), expected epoch (8), the new record. Reply `ok` with no
    /// payload, or `conflict` with the current record.
    case compareAndSwap = 65
}

/// How a request ended. Everything but `ok` leaves the connection usable unless said otherwise.
package enum FrameStatus: UInt32, BitwiseCopyable, Sendable {
    case ok = 0
    /// The frame's epoch is not the replica's promise; reply's `epoch` is the promise.
    case staleEpoch = 1
    /// The device failed the request. For flush the replica is failed for good.
    case ioError = 2
    case noSpace = 3
    /// A payload does not match its checksum (write), or a block's data its entry (read): then the
    /// reply's table is valid and its data is not sent.
    case checksumMismatch = 4
    /// The request itself is malformed or out of bounds.
    case invalid = 5
    case notFound = 6
    case conflict = 7
    /// Not possible now (record service without its store, replica shutting down).
    case unavailable = 8
    /// The connection belongs to another volume, or has not said hello or installed.
    case notInstalled = 9
}

/// Bits of `auxiliary` in the reply to a flush.
package enum FlushReply {
    /// Some of the writes before it wait for room in the activity log and are not covered.
    package static let isPartial: UInt64 = 1
    /// There was no room in the log for a mark of the point flushed.
    package static let isUnmarked: UInt64 = 2
}

/// Bits of `auxiliary` in the reply to what changes a copy.
package enum MutationReply {
    /// It waited for room in the activity log: flushes sent after it may have passed it.
    package static let wasParked: UInt64 = 1
}

package enum FrameFlags {
    package static let reply: UInt16 = 1 << 0
    /// Durable before the reply (force unit access).
    package static let fua: UInt16 = 1 << 1
    /// A copy made by resolution or rebuild, not a client's write; a read for one.
    package static let resync: UInt16 = 1 << 2
    /// The replica's activity log is at least three quarters full: please flush.
    package static let logPressure: UInt16 = 1 << 3
    /// `stable` only: the copies are known equal, so a reboot from now on counts anew.
    package static let settled: UInt16 = 1 << 4
    /// The replica has as many layers as it may: it would refuse another one.
    package static let layersFull: UInt16 = 1 << 5
    static let defined: UInt16 = 0b111111
}

/// The fixed header in front of every frame. All integers are little-endian.
///
/// A receiver reads `FrameHeader.size` bytes, validates them, and only then trusts a length.
///
///     offset  size  field
///          0     4  magic            "HPT1"
///          4     2  kind             raw value of `FrameKind`
///          6     2  flags            `FrameFlags`; undefined bits must be zero
///          8     8  epoch            request: the epoch the sender acts in; reply: the promise
///         16     8  tag              chosen by the requester, echoed in the reply
///         24     8  sequence         the engine's sequence number of the request; echoed
///         32     8  offset           byte offset in the volume
///         40     4  length           bytes of the volume the request is about
///         44     4  tableLength      bytes of the payload's first part: at most 64 KiB, or 127 KiB
///                                    and 64 bytes where a record may be in it
///         48     4  dataLength       bytes of the payload's second part: whole blocks
///         52     4  status           reply: `FrameStatus`; request: the `LayerID` it is about
///                                    (zero: the head)
///         56     8  auxiliary        by kind; otherwise zero
///         64     4  tableChecksum    CRC32C of the first part, zero if it is empty
///         68     4  headerChecksum   CRC32C of bytes 0..<68
package struct FrameHeader: Equatable, BitwiseCopyable, Sendable {
    package static let size = 72
    package static let magic: UInt32 = 0x3154_5048
    /// Bounds the memory one connection can claim.
    package static let tableLengthMax = 64 << 10
    /// Of frames that may carry a volume's record, which have no data: beside it at most 64 bytes.
    package static let recordTableLengthMax = VolumeRecord.encodedSizeMax + 64
    package static let dataLengthMax = Geometry.regionSize

    package var kind: FrameKind
    package var flags: UInt16 = 0
    package var epoch: Epoch = .zero
    package var tag: UInt64 = 0
    package var sequence: SequenceNumber = .zero
    package var offset: UInt64 = 0
    package var length: UInt32 = 0
    package var tableLength: UInt32 = 0
    package var dataLength: UInt32 = 0
    package var status: FrameStatus = .ok
    /// Requests: the layer they are about; zero: the head as it is when they are admitted.
    package var layer = LayerID.head
    package var auxiliary: UInt64 = 0
    package var tableChecksum: UInt32 = 0

    package init(kind: FrameKind) { self.kind = kind }

    package var isReply: Bool { flags & FrameFlags.reply != 0 }
    package var payloadLength: Int { Int(tableLength) + Int(dataLength) }
    private var tableLimit: Int {
        switch kind {
        case .hello, .install, .getRecord, .compareAndSwap:
            return dataLength == 0 ? Self.recordTableLengthMax : Self.tableLengthMax
        default: return Self.tableLengthMax
        }
    }

    /// A reply to this request: same kind, tag, sequence, offset and length.
    package func reply(_ status: FrameStatus, epoch: Epoch) -> FrameHeader {
        var header = FrameHeader(kind: kind)
        header.flags = FrameFlags.reply
        header.epoch = epoch
        header.tag = tag
        header.sequence = sequence
        header.offset = offset
        header.length = length
        header.status = status
        return header
    }

    /// Writes `size` bytes to the start of `memory`.
    package func encode(to memory: RawMemory) {
        memory.store(Self.magic, 0)
        memory.store(kind.rawValue, 4)
        memory.store(flags, 6)
        memory.store(epoch.rawValue, 8)
        memory.store(tag, 16)
        memory.store(sequence.rawValue, 24)
        memory.store(offset, 32)
        memory.store(length, 40)
        memory.store(tableLength, 44)
        memory.store(dataLength, 48)
        memory.store(isReply ? status.rawValue : layer.rawValue, 52)
        memory.store(auxiliary, 56)
        memory.store(tableChecksum, 64)
        memory.store(CRC32C.checksum(memory.slice(0, 68)), 68)
    }

    /// Parses a header received from a peer, rejecting anything this version did not define.
    package init(decoding memory: RawMemory) throws(FrameError) {
        precondition(memory.count >= Self.size)
        // Magic before checksum: a stranger on the port deserves a different error than bit rot.
        guard memory.load(UInt32.self, 0) == Self.magic else { throw .badMagic }
        guard memory.load(UInt32.self, 68) == CRC32C.checksum(memory.slice(0, 68)) else {
            throw .headerChecksumMismatch
        }
        guard let kind = FrameKind(rawValue: memory.load(UInt16.self, 4)) else {
            throw .unknownKind
        }
        self.kind = kind
        flags = memory.load(UInt16.self, 6)
        guard flags & ~FrameFlags.defined == 0 else { throw .reservedBitsSet }
        tableLength = memory.load(UInt32.self, 44)
        dataLength = memory.load(UInt32.self, 48)
        guard tableLength <= tableLimit, dataLength <= Self.dataLengthMax else {
            throw .payloadTooLarge
        }
        guard Int(dataLength) % Geometry.blockSize == 0 else { throw .payloadNotWholeBlocks }
        if flags & FrameFlags.reply != 0 {
            guard let status = FrameStatus(rawValue: memory.load(UInt32.self, 52)) else {
                throw .unknownStatus
            }
            self.status = status
        } else {
            layer = LayerID(rawValue: memory.load(UInt32.self, 52))
        }
        epoch = Epoch(memory.load(UInt64.self, 8))
        tag = memory.load(UInt64.self, 16)
        sequence = SequenceNumber(memory.load(UInt64.self, 24))
        offset = memory.load(UInt64.self, 32)
        length = memory.load(UInt32.self, 40)
        auxiliary = memory.load(UInt64.self, 56)
        tableChecksum = memory.load(UInt32.self, 64)
        guard tableLength > 0 || tableChecksum == 0 else { throw .reservedBitsSet }
    }
}

/// What a peer can get wrong in a frame; every case closes the connection.
package enum FrameError: Error, Equatable {
    case badMagic
    case headerChecksumMismatch
    case unknownKind
    case unknownStatus
    case reservedBitsSet
    case payloadTooLarge
    case payloadNotWholeBlocks
    case tableChecksumMismatch
    case malformedPayload
}
