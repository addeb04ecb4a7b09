/// One client's side of the NBD protocol as a state machine over bytes: it opens no socket and
/// reads no clock. Bytes go in by `next`; what comes out is replies to options, in `output`, and
/// requests, already checked.
///
///     greeting -> flags -> option <-> optionData -> transmission <-> discarding
///                            |            |              |
///                            +------------+----> over <--+
///
/// `over` is reached by ABORT, DISC, and by anything that leaves the stream out of step; nothing
/// leaves it.
package struct NBDSession {
    package enum Event: Equatable {
        /// Everything usable was consumed: come again with more bytes.
        case needsMore
        /// Send `output`, then call again.
        case reply
        /// Send `output` (if any), then call again: options are over.
        case transmission
        /// A request whose header was consumed. If it was refused (`error`), so was its payload;
        /// otherwise the caller takes `payload` bytes from the stream before the next call.
        case request(NBDRequest)
        /// The client leaves in order: answer everything in flight, then close.
        case disconnect
        /// Send `output` (if any), then close.
        case hangUp(NBDHangUp)
    }

    private enum State {
        case greeting
        case flags
        case option
        /// `remaining` bytes of the option's data are still to come; without `isKept` they are
        /// thrown away.
        case optionData(option: UInt32, length: Int, remaining: Int, isKept: Bool)
        case transmission
        case discarding(NBDRequest, remaining: UInt64)
        case over
    }

    private var state = State.greeting
    private var negotiation: NBDNegotiation
    private var optionCount = 0
    /// Option data, then the answer. Freed with the session: its pages cost nothing once unused,
    /// and few are ever touched.
    private let scratch: MemoryBlock

    package init(exports: any NBDExportLookup) {
        scratch = MemoryBlock(count: NBDLimits.optionDataMax + NBDNegotiation.answerMax)
        negotiation = NBDNegotiation(
            exports: exports,
            output: scratch.memory.slice(NBDLimits.optionDataMax, NBDNegotiation.answerMax))
    }

    /// A server with one export and no snapshots.
    package init(export: NBDExport) { self.init(exports: NBDFixedExports(live: export)) }

    /// What is served; final once `transmission` was reported, until then the live volume.
    package var export: NBDExport { negotiation.export }
    /// What was agreed so far; final once `transmission` was reported.
    package var agreement: NBDAgreement { negotiation.agreement }
    /// The metadata contexts selected so far, in the order of their ids; final likewise.
    package var contexts: [NBDContext] { negotiation.contexts }
    /// Bytes to send now; valid until the next call.
    package var output: RawMemory {
        scratch.memory.slice(NBDLimits.optionDataMax, negotiation.outputCount)
    }
    package var isNegotiating: Bool {
        switch state {
        case .greeting, .flags, .option, .optionData: true
        case .transmission, .discarding, .over: false
        }
    }
    /// Whether the client owes the rest of something it began, apart from bytes not consumed.
    package var isInsideMessage: Bool {
        switch state {
        case .optionData, .discarding: true
        default: false
        }
    }

    /// Consumes at most one message from the start of `bytes` and adds its length to `consumed`.
    package mutating func next(_ bytes: RawMemory, consumed: inout Int) -> Event {
        if negotiation.outputCount != 0 { negotiation.resetOutput() }
        if case .transmission = state { return nextRequest(bytes, &consumed) }
        switch state {
        case .greeting:
            negotiation.greet()
            state = .flags
            return .reply
        case .flags:
            guard bytes.count >= 4 else { return .needsMore }
            consumed += 4
            guard negotiation.accept(clientFlags: bytes.loadBigEndian(UInt32.self, 0)) else {
                return end(.unknownClientFlags)
            }
            state = .option
            return next(bytes.slice(4, bytes.count - 4), consumed: &consumed)
        case .option:
            return nextOption(bytes, &consumed)
        case .optionData(let option, let length, let remaining, let isKept):
            return takeOptionData(bytes, &consumed, option, length, remaining, isKept)
        case .discarding(let request, let remaining):
            return discard(bytes, &consumed, request, remaining)
        case .transmission, .over:
            return end(.isOver)
        }
    }

    // MARK: - Options

    private mutating func nextOption(_ bytes: RawMemory, _ consumed: inout Int) -> Event {
        guard bytes.count >= 16 else { return .needsMore }
        guard bytes.loadBigEndian(UInt64.self, 0) == NBDMagic.option else {
            return end(.badMagic)
        }
        optionCount += 1
        guard optionCount <= NBDLimits.optionsMax else { return end(.tooManyOptions) }
        consumed += 16
        let option = bytes.loadBigEndian(UInt32.self, 8)
        let length = Int(bytes.loadBigEndian(UInt32.self, 12))
        return takeOptionData(
            bytes.slice(16, bytes.count - 16), &consumed, option, length, length,
            length <= NBDLimits.optionDataMax)
    }

    private mutating func takeOptionData(
        _ bytes: RawMemory, _ consumed: inout Int, _ option: UInt32, _ length: Int,
        _ remaining: Int, _ isKept: Bool
    ) -> Event {
        let taken = min(remaining, bytes.count)
        if isKept { scratch.memory.copy(from: bytes.slice(0, taken), at: length - remaining) }
        consumed += taken
        guard taken == remaining else {
            state = .optionData(
                option: option, length: length, remaining: remaining - taken, isKept: isKept)
            return .needsMore
        }
        let data = isKept ? scratch.memory.slice(0, length) : nil
        switch negotiation.handle(option: option, data: data) {
        case .goOn:
            state = .option
            return .reply
        case .transmission:
            state = .transmission
            return .transmission
        case .close:
            state = .over
            return .hangUp(.aborted)
        case .hangUp:
            return end(.refused)
        }
    }

    // MARK: - Requests

    private mutating func nextRequest(_ bytes: RawMemory, _ consumed: inout Int) -> Event {
        let size =
            agreement.format == .extended ? NBDRequest.extendedSize : NBDRequest.compactSize
        guard bytes.count >= size else {
            // A wrong magic is never worth waiting for the rest.
            return isMagicPlausible(bytes) ? .needsMore : end(.badMagic)
        }
        guard let request = NBDRequest(decoding: bytes, agreement: agreement, export: export)
        else { return end(.badMagic) }
        consumed += size
        if request.command == .disconnect {
            state = .over
            return .disconnect
        }
        guard request.error != .none && request.payload > 0 else { return .request(request) }
        return discard(
            bytes.slice(size, bytes.count - size), &consumed, request, request.payload)
    }

    private func isMagicPlausible(_ bytes: RawMemory) -> Bool {
        guard bytes.count >= 4 else { return true }
        let magic = bytes.loadBigEndian(UInt32.self, 0)
        return magic
            == (agreement.format == .extended ? NBDMagic.extendedRequest : NBDMagic.request)
    }

    private mutating func discard(
        _ bytes: RawMemory, _ consumed: inout Int, _ request: NBDRequest, _ remaining: UInt64
    ) -> Event {
        let taken = Int(min(remaining, UInt64(bytes.count)))
        consumed += taken
        guard UInt64(taken) == remaining else {
            state = .discarding(request, remaining: remaining - UInt64(taken))
            return .needsMore
        }
        state = .transmission
        return .request(request)
    }

    private mutating func end(_ reason: NBDHangUp) -> Event {
        state = .over
        return .hangUp(reason)
    }
}

/// Why the server ended a connection.
package enum NBDHangUp: String, Sendable {
    case aborted = "the client aborted the negotiation"
    case badMagic = "wrong magic, or a payload beyond all bounds"
    case unknownClientFlags = "unknown client flags"
    case refused = "an option that cannot be answered"
    case tooManyOptions = "too many options"
    case isOver = "bytes after the end"
}
