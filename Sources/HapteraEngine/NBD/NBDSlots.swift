import HapteraCore

/// A part of a request that lies in one region: what the device sees as one operation.
struct NBDPiece: BitwiseCopyable {
    /// Raised whenever the slot is freed, so that a late completion is recognised.
    var generation: UInt32 = 0
    var request: Int32 = -1
    /// The request's next piece, or the next free slot.
    var next: Int32 = -1
    var length: Int32 = 0
    var offset: UInt64 = 0
    var buffer = BufferID.none
    var kind = OperationKind.flush
    var flags = OperationFlags()
    var isHole = false
    /// Status: which of the client's contexts it is about.
    var context: UInt8 = 0
    var stage = Stage.waiting
    /// Its client has gone while the device has it.
    var isFenced = false

    enum Stage: UInt8, BitwiseCopyable {
        /// Not given to the device yet.
        case waiting
        case submitted
        case done
    }

    /// Where the piece's first byte is in its buffer.
    var position: Int { Int(offset % UInt64(Geometry.blockSize)) }
    /// Bytes its buffer must have: the range rounded out to whole blocks.
    var room: Int {
        (position + Int(length) + Geometry.blockSize - 1) & ~(Geometry.blockSize - 1)
    }
}

/// A client's request from its header to its reply.
struct NBDRequestSlot: BitwiseCopyable {
    /// -1: free, or its client has gone and it only waits for completions.
    var client: Int32 = -1
    /// Next free slot.
    var next: Int32 = -1
    var firstPiece: Int32 = -1
    var lastPiece: Int32 = -1
    /// Pieces made and not completed.
    var piecesLeft: Int32 = 0
    var command = NBDCommand.flush
    var flags = NBDCommandFlags()
    var format = NBDReplyFormat.simple
    var error = NBDError.none
    /// All of it has arrived: its pieces go to the device.
    var isLaunched = false
    /// A FLUSH follows the last piece: FUA over several pieces.
    var needsFlush = false
    var cookie: UInt64 = 0
    var offset: UInt64 = 0
    var length: UInt64 = 0
    /// Where the next piece starts, and where the last one ends.
    var cursor: UInt64 = 0
    var end: UInt64 = 0
    /// Bytes of buffers it holds.
    var reserved: Int = 0
    /// Changes that other clients had made when it was launched.
    var othersChanges: UInt64 = 0

    /// Not all pieces have been made.
    var hasRest: Bool { cursor < end }
    var reply: NBDReply { NBDReply(format: format, cookie: cookie, offset: offset) }
    /// Its data goes out in one part and in order, once everything was read.
    var isCollected: Bool { format == .simple || flags.contains(.dontFragment) }
}

/// All requests and pieces of a server, allocated once.
final class NBDSlots {
    static let requestsMax = 2048
    static let piecesMax = 4096
    let requests = FixedArray(repeating: NBDRequestSlot(), count: requestsMax)
    let pieces = FixedArray(repeating: NBDPiece(), count: piecesMax)
    private var freeRequest: Int32 = 0
    private var freePiece: Int32 = 0
    private(set) var piecesFree = piecesMax
    private(set) var requestsInUse = 0

    init() {
        for index in 0..<Self.requestsMax {
            requests[index].next = index + 1 < Self.requestsMax ? Int32(index + 1) : -1
        }
        for index in 0..<Self.piecesMax {
            pieces[index].next = index + 1 < Self.piecesMax ? Int32(index + 1) : -1
        }
    }

    /// A fresh slot, or nil if all are in use.
    func makeRequest() -> Int32? {
        let index = freeRequest
        guard index >= 0 else { return nil }
        freeRequest = requests[Int(index)].next
        requestsInUse += 1
        requests[Int(index)] = NBDRequestSlot()
        return index
    }
    func free(request index: Int32) {
        precondition(requests[Int(index)].firstPiece < 0)
        requests[Int(index)].client = -1
        requests[Int(index)].next = freeRequest
        freeRequest = index
        requestsInUse -= 1
    }

    /// Adds a piece to the end of the request's list. Precondition: `piecesFree > 0`.
    func addPiece(to request: Int32) -> Int32 {
        let index = freePiece
        precondition(index >= 0)
        let generation = pieces[Int(index)].generation
        freePiece = pieces[Int(index)].next
        piecesFree -= 1
        pieces[Int(index)] = NBDPiece(generation: generation, request: request)
        let last = requests[Int(request)].lastPiece
        if last >= 0 {
            pieces[Int(last)].next = index
        } else {
            requests[Int(request)].firstPiece = index
        }
        requests[Int(request)].lastPiece = index
        requests[Int(request)].piecesLeft += 1
        return index
    }
    /// Takes the piece off its request's list and frees it.
    func remove(piece index: Int32) {
        let request = Int(pieces[Int(index)].request)
        var previous: Int32 = -1
        var current = requests[request].firstPiece
        while current != index {
            previous = current
            current = pieces[Int(current)].next
        }
        let next = pieces[Int(index)].next
        if previous >= 0 {
            pieces[Int(previous)].next = next
        } else {
            requests[request].firstPiece = next
        }
        if requests[request].lastPiece == index { requests[request].lastPiece = previous }
        pieces[Int(index)].generation &+= 1
        pieces[Int(index)].request = -1
        pieces[Int(index)].next = freePiece
        freePiece = index
        piecesFree += 1
    }

    /// The name under which the device sees the piece.
    func userData(_ piece: Int32) -> UInt64 {
        UInt64(pieces[Int(piece)].generation) << 32 | UInt64(UInt32(bitPattern: piece))
    }
    /// The piece of that name, or nil if it is no more.
    func piece(_ userData: UInt64) -> Int32? {
        let index = Int(userData & 0xffff_ffff)
        guard index < Self.piecesMax, pieces[index].generation == UInt32(userData >> 32),
            pieces[index].request >= 0
        else { return nil }
        return Int32(index)
    }
}
