import HapteraCore

/// Where the replies of one client go.
protocol NBDReplyTarget: AnyObject {
    func send(copying memory: RawMemory)
    /// Retains the buffer until it was sent.
    func send(buffer: BufferID, offset: Int, length: Int)
    /// A request has been answered; it held `reserved` bytes of buffers.
    func requestEnded(reserved: Int)
    /// Whether the rest of a change that was launched when others had made `othersChanges` may no
    /// longer be given to the device. It has been detached then.
    func isOvertaken(since othersChanges: UInt64) -> Bool
}

/// The requests of all clients between their headers and their replies: cuts them into operations
/// for the device, and puts their replies together.
///
///     begin -> (payload arrives) -> launch -> operations, a window at a time -> complete -> reply
///
/// All buffers of a read or write are reserved by `begin`, or none: a request that holds some never
/// waits for others, so requests cannot wait for each other. A write is launched only when its
/// whole payload is there, so one that is cut off changes nothing.
final class NBDRequests {
    /// Pieces of one trim or zeroing under way at once.
    static let windowMax: Int32 = 64

    let device: any BlockDevice
    let slots = NBDSlots()
    private(set) var counters = NBDCounters()
    private var targets: [(any NBDReplyTarget)?]
    /// The session of each client.
    private var sessions: [UInt32]
    /// What each client's reads are about.
    private var layers: [LayerID]
    /// And what their status is.
    private var contexts: [[NBDContext]]
    private var lastSession: UInt32 = 0
    /// Operations the device still has of clients that have gone, without those on snapshots.
    private(set) var fencedOperations = 0
    /// Pieces the device had no room for yet, in order.
    private let pending = ValueQueue<UInt64>()
    private let scratch = MemoryBlock(count: NBDBlockStatus.replySizeMax)
    /// Buffers of each class left to the engine, so that clients cannot starve it.
    private let spared: (small: Int, medium: Int, large: Int)

    init(device: any BlockDevice, clientsMax: Int) {
        self.device = device
        targets = Array(repeating: nil, count: clientsMax)
        sessions = Array(repeating: 0, count: clientsMax)
        layers = Array(repeating: .head, count: clientsMax)
        contexts = Array(repeating: [], count: clientsMax)
        let pool = device.pool
        spared = (
            pool.available(4096) / 8, pool.available(128 << 10) / 8, pool.available(1 << 20) / 8
        )
        let largest = NBDLimits.payloadMax / Geometry.regionSize + 1
        precondition(
            pool.available(1 << 20) - spared.large >= largest,
            "the pool cannot hold one request of the largest size")
    }

    /// A new session begins.
    func attach(_ target: any NBDReplyTarget, client: Int32) {
        targets[Int(client)] = target
        lastSession = max(1, lastSession &+ 1)
        sessions[Int(client)] = lastSession
        layers[Int(client)] = .head
        contexts[Int(client)] = []
    }
    /// What all its requests will be about is known: the live volume, or the layer of a snapshot.
    func enter(client: Int32, layer: LayerID, contexts chosen: [NBDContext]) {
        precondition(chosen.count <= NBDContext.selectedMax)
        layers[Int(client)] = layer
        contexts[Int(client)] = chosen
    }

    /// The client has gone: nothing of it is answered, what the device has not seen is dropped at
    /// once, and what the device has not begun is cancelled. A request whose payload is arriving is
    /// the client's to `cancel`. Its peer may already have sent all of it again elsewhere.
    func detach(client: Int32) {
        guard targets[Int(client)] != nil else { return }
        targets[Int(client)] = nil
        for index in 0..<NBDSlots.requestsMax where slots.requests[index].client == client {
            slots.requests[index].client = -1
            if slots.requests[index].isLaunched {
                fence(Int32(index), isAwaited: layers[Int(client)] == .head)
            }
        }
        device.cancel(session: sessions[Int(client)])
    }
    /// `isAwaited`: new sessions wait until the device is done with it.
    private func fence(_ index: Int32, isAwaited: Bool) {
        var next = slots.requests[Int(index)].firstPiece
        while next >= 0 {
            let piece = next
            next = slots.pieces[Int(piece)].next
            switch slots.pieces[Int(piece)].stage {
            case .waiting:
                slots.requests[Int(index)].piecesLeft -= 1
                releasePiece(piece)
            case .submitted where isAwaited:
                slots.pieces[Int(piece)].isFenced = true
                fencedOperations += 1
            case .submitted, .done: break
            }
        }
        if slots.requests[Int(index)].piecesLeft == 0 { _ = abandon(index) }
    }

    // MARK: From header to device

    /// Makes the request and reserves what it needs; nil if that is not there now, and nothing is
    /// held then. Precondition: the request is not refused and not a disconnect.
    func begin(_ request: NBDRequest, client: Int32, format: NBDReplyFormat) -> Int32? {
        guard let index = slots.makeRequest() else { return nil }
        var slot = NBDRequestSlot()
        slot.client = client
        slot.command = request.command
        slot.flags = request.flags
        slot.format = format
        slot.cookie = request.cookie
        slot.offset = request.offset
        slot.length = request.length
        slot.cursor = request.offset
        slot.end = request.offset + request.length
        if request.command == .trim {
            // A trim is a hint: blocks it touches in part keep their data.
            let unit = UInt64(Geometry.blockSize)
            slot.cursor = (slot.cursor + unit - 1) / unit * unit
            slot.end = slot.end / unit * unit
        }
        slots.requests[Int(index)] = slot
        if request.command == .read || request.command == .write {
            guard reserveBuffers(index) else { return abandon(index) }
        } else if request.command == .blockStatus {
            guard addStatusPieces(index) else { return abandon(index) }
        } else if slots.piecesFree == 0 {
            return abandon(index)
        }
        counters.count(request)
        return index
    }

    /// Gives the request to the device. A write's payload is in its pieces' buffers.
    /// `othersChanges`: how many other clients have made.
    func launch(_ index: Int32, othersChanges: UInt64) {
        let at = Int(index)
        slots.requests[at].isLaunched = true
        slots.requests[at].othersChanges = othersChanges
        switch slots.requests[at].command {
        case .read, .write, .blockStatus:
            let isSingle = slots.requests[at].firstPiece == slots.requests[at].lastPiece
            let isDurable =
                slots.requests[at].command == .write && slots.requests[at].flags.contains(.fua)
            slots.requests[at].needsFlush = isDurable && !isSingle
            var piece = slots.requests[at].firstPiece
            while piece >= 0 {
                if isDurable && isSingle { slots.pieces[Int(piece)].flags = .fua }
                pending.append(slots.userData(piece))
                piece = slots.pieces[Int(piece)].next
            }
        case .flush:
            // A snapshot has been durable since before it had a name.
            guard layers[Int(slots.requests[at].client)] == .head else { break }
            let piece = slots.addPiece(to: index)
            slots.pieces[Int(piece)].kind = .flush
            pending.append(slots.userData(piece))
        case .trim, .writeZeroes:
            let first = Geometry.region(ofByte: slots.requests[at].cursor)
            let end = slots.requests[at].end
            let isSingle =
                end > slots.requests[at].cursor && first == Geometry.region(ofByte: end - 1)
            slots.requests[at].needsFlush =
                slots.requests[at].flags.contains(.fua) && !isSingle
                && end > slots.requests[at].cursor
            fillWindow(index)
        case .cache, .disconnect: break
        }
        if slots.requests[at].piecesLeft == 0 { finish(index) }
    }

    /// Takes back a request whose payload never arrived in full.
    func cancel(_ index: Int32) { _ = abandon(index) }

    /// Moves on what waits for the device: in the order it was launched, so nothing is overtaken
    /// here.
    func submitPending() {
        while device.canSubmit, let userData = pending.popFirst() {
            guard let piece = slots.piece(userData) else { continue }
            let request = Int(slots.pieces[Int(piece)].request)
            slots.pieces[Int(piece)].stage = .submitted
            let content = slots.pieces[Int(piece)]
            var operation = Operation(
                kind: content.kind, flags: content.flags, offset: content.offset,
                length: Int(content.length), buffer: content.buffer, userData: userData)
            let client = Int(slots.requests[request].client)
            operation.session = sessions[client]
            operation.layer = layers[client]
            if content.kind == .status {
                operation.base = contexts[client][Int(content.context)].base
            }
            // Clients are refused long before this.
            precondition(
                operation.layer == .head || operation.kind == .read || operation.kind == .status,
                "a snapshot can only be read")
            device.submit(operation)
        }
    }
    var hasPending: Bool { !pending.isEmpty && device.canSubmit }

    private func abandon(_ index: Int32) -> Int32? {
        while slots.requests[Int(index)].firstPiece >= 0 {
            releasePiece(slots.requests[Int(index)].firstPiece)
        }
        slots.free(request: index)
        return nil
    }
    private func releasePiece(_ piece: Int32) {
        let buffer = slots.pieces[Int(piece)].buffer
        if buffer != .none { device.pool.release(buffer) }
        slots.remove(piece: piece)
    }

    private func allocate(_ room: Int) -> BufferID? {
        let left = device.pool.available(room)
        let kept =
            room <= 4096 ? spared.small : room <= 128 << 10 ? spared.medium : spared.large
        return left > kept ? device.pool.allocate(room) : nil
    }

    private func reserveBuffers(_ index: Int32) -> Bool {
        while slots.requests[Int(index)].cursor < slots.requests[Int(index)].end {
            guard slots.piecesFree > 0 else { return false }
            let piece = addNextPiece(index)
            let room = slots.pieces[Int(piece)].room
            guard let buffer = allocate(room) else { return false }
            slots.pieces[Int(piece)].buffer = buffer
            slots.requests[Int(index)].reserved += room
        }
        return true
    }

    /// Adds the piece at the cursor, up to the end of its region or of the request.
    private func addNextPiece(_ index: Int32) -> Int32 {
        let piece = slots.addPiece(to: index)
        let request = slots.requests[Int(index)]
        let region = UInt64(Geometry.regionSize)
        let end = min(request.end, (request.cursor / region + 1) * region)
        slots.pieces[Int(piece)].offset = request.cursor
        slots.pieces[Int(piece)].length = Int32(end - request.cursor)
        switch request.command {
        case .read: slots.pieces[Int(piece)].kind = .read
        case .write: slots.pieces[Int(piece)].kind = .write
        case .trim: slots.pieces[Int(piece)].kind = .trim
        default:
            slots.pieces[Int(piece)].kind = .writeZeroes
            if request.flags.contains(.noHole) { slots.pieces[Int(piece)].flags = .noHole }
        }
        slots.requests[Int(index)].cursor = end
        return piece
    }

    /// One for each context: all, or false.
    private func addStatusPieces(_ index: Int32) -> Bool {
        let unit = UInt64(Geometry.blockSize)
        let request = slots.requests[Int(index)]
        let start = request.offset / unit * unit
        let end = min((request.end + unit - 1) / unit * unit, device.size)
        for context in 0..<contexts[Int(request.client)].count {
            guard slots.piecesFree > 0, let buffer = allocate(Geometry.blockSize) else {
                return false
            }
            let piece = slots.addPiece(to: index)
            slots.pieces[Int(piece)].kind = .status
            slots.pieces[Int(piece)].context = UInt8(context)
            slots.pieces[Int(piece)].buffer = buffer
            slots.pieces[Int(piece)].offset = start
            slots.pieces[Int(piece)].length = Int32(
                min(end - start, UInt64(EngineLimits.statusLengthMax)))
        }
        return true
    }

    /// Keeps up to `windowMax` pieces of a trim or zeroing under way, then flushes for FUA.
    private func fillWindow(_ index: Int32) {
        let at = Int(index)
        guard slots.requests[at].error == .none, slots.requests[at].client >= 0 else { return }
        let isDurable =
            slots.requests[at].flags.contains(.fua) && !slots.requests[at].needsFlush
        while slots.requests[at].cursor < slots.requests[at].end,
            slots.requests[at].piecesLeft < Self.windowMax,
            // At least one, or nothing would bring the request here again.
            slots.piecesFree > NBDSlots.piecesMax / 4
                || slots.requests[at].piecesLeft == 0 && slots.piecesFree > 0
        {
            let piece = addNextPiece(index)
            if isDurable { slots.pieces[Int(piece)].flags.insert(.fua) }
            pending.append(slots.userData(piece))
        }
    }

    // MARK: From device to reply

    func complete(
        userData: UInt64, _ result: OperationResult, _ buffer: BufferID, _ tableLength: Int32,
        _ isHole: Bool
    ) {
        guard let piece = slots.piece(userData) else {
            preconditionFailure("a completion for no operation")
        }
        let index = slots.pieces[Int(piece)].request
        let at = Int(index)
        slots.requests[at].piecesLeft -= 1
        slots.pieces[Int(piece)].stage = .done
        // A hedged read comes back in another buffer; the piece's own is released by the device.
        if buffer != .none { slots.pieces[Int(piece)].buffer = buffer }
        slots.pieces[Int(piece)].isHole = isHole
        if slots.pieces[Int(piece)].isFenced { fencedOperations -= 1 }
        if slots.requests[at].error == .none { slots.requests[at].error = result.nbdError }
        guard let target = target(of: index) else {
            releasePiece(piece)
            if slots.requests[at].piecesLeft == 0 { _ = abandon(index) }
            return
        }
        switch slots.requests[at].command {
        case .read:
            // Kept until the reply, if it goes out in one part.
            if !slots.requests[at].isCollected {
                if result == .ok { sendPart(of: piece, target) }
                releasePiece(piece)
            }
        case .blockStatus:
            if result == .ok { sendStatus(of: piece, Int(tableLength), target) }
            releasePiece(piece)
        case .trim, .writeZeroes:
            releasePiece(piece)
            if slots.requests[at].error == .none && slots.requests[at].hasRest {
                // What others launched meanwhile went ahead of the rest. If they are the same
                // client, which asked for it again there and then went on, the rest would undo
                // what it has been told is done.
                if target.isOvertaken(since: slots.requests[at].othersChanges) { return }
                fillWindow(index)
            }
        default:
            releasePiece(piece)
        }
        if slots.requests[at].piecesLeft == 0 { finish(index) }
    }

    private func target(of index: Int32) -> (any NBDReplyTarget)? {
        let client = slots.requests[Int(index)].client
        return client >= 0 ? targets[Int(client)] : nil
    }

    /// All pieces are done: flushes if it must, else replies.
    private func finish(_ index: Int32) {
        let at = Int(index)
        if slots.requests[at].needsFlush && slots.requests[at].error == .none {
            slots.requests[at].needsFlush = false
            let piece = slots.addPiece(to: index)
            slots.pieces[Int(piece)].kind = .flush
            pending.append(slots.userData(piece))
            return
        }
        if let target = target(of: index) { sendEnd(of: index, target) }
        let reserved = slots.requests[at].reserved
        let target = target(of: index)
        if slots.requests[at].error != .none { counters.errors += 1 }
        _ = abandon(index)
        target?.requestEnded(reserved: reserved)
    }

    private func sendEnd(of index: Int32, _ target: any NBDReplyTarget) {
        let request = slots.requests[Int(index)]
        let isSuccess = request.error == .none
        // The last chunk of these said so already.
        if request.command == .blockStatus && isSuccess { return }
        if request.command == .read && isSuccess && request.length > 0 {
            if request.isCollected { sendCollected(index, target) }
            return
        }
        let count =
            request.command == .read && isSuccess && request.format == .simple
            ? request.reply.simple(.none, to: scratch.memory)
            : request.reply.status(request.error, request.command, to: scratch.memory)
        target.send(copying: scratch.memory.slice(0, count))
    }

    /// A part of a structured read, sent as it arrives.
    private func sendPart(of piece: Int32, _ target: any NBDReplyTarget) {
        let content = slots.pieces[Int(piece)]
        let request = slots.requests[Int(content.request)]
        let isLast = request.piecesLeft == 0 && request.error == .none
        if content.isHole {
            let count = request.reply.hole(
                at: content.offset, length: Int(content.length), isLast: isLast,
                to: scratch.memory)
            target.send(copying: scratch.memory.slice(0, count))
            return
        }
        let count = request.reply.data(
            at: content.offset, length: Int(content.length), isLast: isLast, to: scratch.memory)
        target.send(copying: scratch.memory.slice(0, count))
        target.send(
            buffer: content.buffer, offset: content.position, length: Int(content.length))
    }

    /// A whole read: simple replies, and reads that must not be fragmented.
    private func sendCollected(_ index: Int32, _ target: any NBDReplyTarget) {
        let request = slots.requests[Int(index)]
        var isHole = request.format != .simple
        var piece = request.firstPiece
        while piece >= 0, isHole {
            isHole = slots.pieces[Int(piece)].isHole
            piece = slots.pieces[Int(piece)].next
        }
        let length = Int(request.length)
        let count =
            isHole
            ? request.reply.hole(
                at: request.offset, length: length, isLast: true, to: scratch.memory)
            : request.format == .simple
                ? request.reply.simple(.none, to: scratch.memory)
                : request.reply.data(
                    at: request.offset, length: length, isLast: true, to: scratch.memory)
        target.send(copying: scratch.memory.slice(0, count))
        guard !isHole else { return }
        piece = request.firstPiece
        while piece >= 0 {
            let content = slots.pieces[Int(piece)]
            target.send(
                buffer: content.buffer, offset: content.position, length: Int(content.length))
            piece = content.next
        }
    }

    private func sendStatus(of piece: Int32, _ tableLength: Int, _ target: any NBDReplyTarget) {
        let content = slots.pieces[Int(piece)]
        let request = slots.requests[Int(content.request)]
        let covered = content.offset + UInt64(content.length) - request.offset
        let status = NBDBlockStatus(
            offset: request.offset, length: min(request.length, covered),
            tableOffset: content.offset, isOne: request.flags.contains(.requestOne),
            context: contexts[Int(request.client)][Int(content.context)],
            contextID: UInt32(content.context) + 1)
        let table = device.pool.memory(content.buffer).slice(0, tableLength)
        let isLast = request.piecesLeft == 0 && request.error == .none
        let count = status.encode(
            table: table, reply: request.reply, isLast: isLast, to: scratch.memory)
        target.send(copying: scratch.memory.slice(0, count))
    }
}

extension OperationResult {
    var nbdError: NBDError {
        switch self {
        case .ok: .none
        case .ioError: .io
        case .noSpace: .noSpace
        case .shuttingDown, .cancelled: .shutdown
        }
    }
}

/// What clients asked for since the start.
package struct NBDCounters: BitwiseCopyable, Sendable {
    package var reads: UInt64 = 0
    package var writes: UInt64 = 0
    package var flushes: UInt64 = 0
    package var trims: UInt64 = 0
    package var zeroes: UInt64 = 0
    package var statuses: UInt64 = 0
    package var bytesRead: UInt64 = 0
    package var bytesWritten: UInt64 = 0
    /// Requests a device failed.
    package var errors: UInt64 = 0

    mutating func count(_ request: NBDRequest) {
        switch request.command {
        case .read:
            reads += 1
            bytesRead &+= request.length
        case .write:
            writes += 1
            bytesWritten &+= request.length
        case .flush: flushes += 1
        case .trim: trims += 1
        case .writeZeroes: zeroes += 1
        case .blockStatus: statuses += 1
        case .cache, .disconnect: break
        }
    }
}
