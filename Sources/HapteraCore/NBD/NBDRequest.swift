/// One request of the transmission phase, as decoded from its header.
///
///     compact  extended  size  field
///           0         0     4  magic   0x25609513, extended 0x21e41c71
///           4         4     2  flags   `NBDCommandFlags`
///           6         6     2  type    `NBDCommand`
///           8         8     8  cookie  chosen by the client, echoed in the reply
///          16        16     8  offset
///          24        24   4/8  length  of the payload or of the effect
package struct NBDRequest: Equatable, BitwiseCopyable, Sendable {
    package static let compactSize = 28
    package static let extendedSize = 32

    package var flags: NBDCommandFlags
    package var command: NBDCommand
    package var cookie: UInt64
    package var offset: UInt64
    package var length: UInt64
    /// Bytes of payload that follow the header.
    package var payload: UInt64
    /// Other than `none`: the request is refused with this, once its payload has been consumed.
    package var error: NBDError

    package init(
        flags: NBDCommandFlags = NBDCommandFlags(), command: NBDCommand, cookie: UInt64,
        offset: UInt64 = 0,
        length: UInt64 = 0, payload: UInt64 = 0, error: NBDError = .none
    ) {
        self.flags = flags
        self.command = command
        self.cookie = cookie
        self.offset = offset
        self.length = length
        self.payload = payload
        self.error = error
    }
}

/// What a connection agreed on, and so what its requests are checked against.
package struct NBDAgreement: BitwiseCopyable, Sendable {
    package var format: NBDReplyFormat = .simple
    /// The client asked for the block sizes with GO and must keep to them.
    package var isBlockSizeNegotiated = false
    /// Metadata contexts it selected.
    package var contextCount: UInt8 = 0
    package init() {}
}

extension NBDRequest {
    /// Decodes and checks the header at the start of `memory`, which holds at least the size that
    /// `agreement` calls for. Nil if the stream cannot be trusted any more: hang up.
    package init?(
        decoding memory: RawMemory, agreement: NBDAgreement, export: NBDExport
    ) {
        let isExtended = agreement.format == .extended
        let magic = memory.loadBigEndian(UInt32.self, 0)
        guard magic == (isExtended ? NBDMagic.extendedRequest : NBDMagic.request) else {
            return nil
        }
        flags = NBDCommandFlags(rawValue: memory.loadBigEndian(UInt16.self, 4))
        let type = NBDCommand(rawValue: memory.loadBigEndian(UInt16.self, 6))
        // An unknown command is refused like a cache request that is invalid.
        command = type ?? .cache
        cookie = memory.loadBigEndian(UInt64.self, 8)
        offset = memory.loadBigEndian(UInt64.self, 16)
        length =
            isExtended
            ? memory.loadBigEndian(UInt64.self, 24)
            : UInt64(memory.loadBigEndian(UInt32.self, 24))
        let hasPayload =
            isExtended ? flags.contains(.payloadLength) : type == .write
        payload = hasPayload ? length : 0
        error = .none
        // Extended headers have the sender bound its payloads; a compact write of up to 4 GiB is
        // consumed instead, so that the client gets an answer.
        if isExtended && payload > UInt64(NBDLimits.payloadMax) { return nil }
        error = type == nil ? .invalid : check(agreement, export)
    }

    /// Reads, writes and status requests hold buffers; the others need only be answered.
    package var needsBuffers: Bool {
        command == .read || command == .write || command == .blockStatus
    }

    private func check(_ agreement: NBDAgreement, _ export: NBDExport) -> NBDError {
        if command == .disconnect { return .none }
        if export.isStopping { return .shutdown }
        guard flags.isSubset(of: allowedFlags(agreement.format)) else { return .invalid }
        // With extended headers a write says that its length is a payload's.
        if command == .write, agreement.format == .extended, !flags.contains(.payloadLength) {
            return .invalid
        }
        if command == .flush { return offset == 0 && length == 0 ? .none : .invalid }
        if command.isModification && export.isReadOnly { return .notPermitted }
        if command == .blockStatus && (agreement.contextCount == 0 || length == 0) {
            return .invalid
        }
        if offset > export.size || length > export.size - offset {
            return command == .write || command == .writeZeroes ? .noSpace : .invalid
        }
        let unit = UInt64(NBDLimits.blockSizeMin)
        if agreement.isBlockSizeNegotiated && (offset % unit != 0 || length % unit != 0) {
            return .invalid
        }
        if length > UInt64(NBDLimits.payloadMax) {
            if command == .write { return .invalid }
            if command == .read { return agreement.format == .simple ? .invalid : .overflow }
        }
        if flags.contains(.fastZero) && flags.contains(.noHole) && !export.zeroesFastWithoutHole {
            return .notSupported
        }
        return .none
    }

    /// FUA is legal on every command; the others belong to one.
    private func allowedFlags(_ format: NBDReplyFormat) -> NBDCommandFlags {
        switch command {
        case .read: format == .simple ? .fua : .ofReads
        case .write: format == .extended ? .ofExtendedWrites : .fua
        case .writeZeroes: .ofZeroes
        case .blockStatus: .ofStatus
        case .flush, .trim, .cache, .disconnect: .fua
        }
    }
}

extension NBDCommandFlags {
    // Not array literals: unoptimised code would allocate them for every request.
    fileprivate static let ofReads = NBDCommandFlags(rawValue: 0b000101)
    fileprivate static let ofExtendedWrites = NBDCommandFlags(rawValue: 0b100001)
    fileprivate static let ofZeroes = NBDCommandFlags(rawValue: 0b010011)
    fileprivate static let ofStatus = NBDCommandFlags(rawValue: 0b001001)
}
