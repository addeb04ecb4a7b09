/// The option phase of one connection: what was agreed, and the replies to single options. Bytes
/// are fed by `NBDSession`, which has bounded every option before it gets here.
package struct NBDNegotiation {
    /// What happens after an option was answered.
    enum Outcome {
        case goOn
        case transmission
        /// Send what was written, then close.
        case close
        /// No answer is possible.
        case hangUp
    }

    /// The longest answer lists the contexts of all the snapshots a record may hold, two each, with
    /// names of the longest kind: 20 bytes of header, 4 of id, and the name. What had no room would
    /// not be listed.
    static let answerMax =
        (VolumeRecord.snapshotsMax + 2) * 2 * (24 + NBDContext.nameLengthMax)

    private let exports: any NBDExportLookup
    /// What transmission is about: until it begins, the live volume.
    private(set) var export: NBDExport
    /// The layer of the export that metadata contexts were selected for.
    private var contextLayer = LayerID.head
    /// Those selected; the id of each is its place, counted from one.
    private(set) var contexts: [NBDContext] = []
    /// Client flags of the handshake.
    var isFixedNewstyle = false
    var omitsZeroes = false
    private(set) var agreement = NBDAgreement()
    private let output: RawMemory
    private(set) var outputCount = 0

    init(exports: any NBDExportLookup, output: RawMemory) {
        precondition(output.count >= Self.answerMax)
        self.exports = exports
        export = exports.live
        self.output = output
    }

    mutating func resetOutput() { outputCount = 0 }

    mutating func greet() {
        output.storeBigEndian(NBDMagic.greeting, 0)
        output.storeBigEndian(NBDMagic.option, 8)
        output.storeBigEndian(NBDHandshakeFlags.fixedNewstyle | NBDHandshakeFlags.noZeroes, 16)
        outputCount = 18
    }

    /// False if the client claims something that was not offered.
    mutating func accept(clientFlags: UInt32) -> Bool {
        isFixedNewstyle = clientFlags & UInt32(NBDHandshakeFlags.fixedNewstyle) != 0
        omitsZeroes = clientFlags & UInt32(NBDHandshakeFlags.noZeroes) != 0
        return clientFlags <= 3
    }

    /// Answers one option; `data` is nil if it was too long and has been thrown away.
    mutating func handle(option raw: UInt32, data: RawMemory?) -> Outcome {
        let option = NBDOption(rawValue: raw)
        if option == .exportName {
            guard let data, !exports.live.isStopping else { return .hangUp }
            return enterByName(data)
        }
        // Only fixed newstyle has replies to options.
        guard isFixedNewstyle else { return .hangUp }
        if option == .abort {
            answer(raw, .ack)
            return .close
        }
        if exports.live.isStopping {
            refuse(raw, .errorShutdown, "the server is shutting down")
            return .goOn
        }
        guard let data else {
            refuse(raw, .errorTooBig, "option data is limited to 65536 bytes")
            return .goOn
        }
        switch option {
        case .list: list(raw, data)
        case .info, .go: return describe(raw, data, isGo: option == .go)
        case .structuredReply, .extendedHeaders:
            agree(raw, data, isExtended: option == .extendedHeaders)
        case .listMetaContext, .setMetaContext:
            metaContext(raw, data, isSet: option == .setMetaContext)
        case .startTLS: refuse(raw, .errorUnsupported, "TLS is not available")
        default: refuse(raw, .errorUnsupported, "unknown option")
        }
        return .goOn
    }

    // MARK: - Options

    private mutating func enterByName(_ name: RawMemory) -> Outcome {
        guard agreement.format != .extended, let named = exports.export(named: name),
            mayEnter(named)
        else { return .hangUp }
        output.storeBigEndian(named.size, 0)
        output.storeBigEndian(named.transmissionFlags(agreement.format), 8)
        let zeroes = omitsZeroes ? 0 : 124
        output.slice(10, zeroes).fill()
        outputCount = 10 + zeroes
        enter(named)
        return .transmission
    }

    /// Places for readers of snapshots are fewer than all: the volume's own client gets in.
    private func mayEnter(_ named: NBDExport) -> Bool {
        !named.isSnapshot || exports.admitsReader
    }
    private mutating func enter(_ named: NBDExport) {
        export = named
        // Contexts belong to one export: those selected for another say nothing about this one.
        if contextLayer != named.layer { select([]) }
    }

    private mutating func list(_ option: UInt32, _ data: RawMemory) {
        guard data.count == 0 else {
            refuse(option, .errorInvalid, "LIST takes no data")
            return
        }
        if exports.offersLive { listName(option, exports.live.name) }
        for snapshot in exports.snapshots {
            listName(option, NBDExport.name(of: snapshot, of: exports.live))
        }
        answer(option, .ack)
    }
    private mutating func listName(_ option: UInt32, _ name: [UInt8]) {
        // Two headers: this one's, and that of the last answer.
        guard output.count - outputCount >= 2 * 20 + 4 + name.count else { return }
        let at = answer(option, .server, 4 + name.count)
        output.storeBigEndian(UInt32(name.count), at)
        output.copy(from: name, at: at + 4)
    }

    private mutating func describe(_ option: UInt32, _ data: RawMemory, isGo: Bool) -> Outcome {
        var reader = NBDOptionReader(data)
        let name = reader.readString()
        let count = Int(reader.readUInt16())
        var asksName = false
        var asksBlockSize = false
        for _ in 0..<count {
            let item = reader.readUInt16()
            guard reader.isValid else { break }
            asksName = asksName || item == NBDInfo.name
            asksBlockSize = asksBlockSize || item == NBDInfo.blockSize
        }
        guard reader.isAtEnd else {
            refuse(option, .errorInvalid, "malformed option")
            return .goOn
        }
        guard let named = exports.export(named: name) else {
            refuseUnknown(option, name)
            return .goOn
        }
        guard !isGo || mayEnter(named) else {
            refuse(option, .errorPolicy, "too many connections read snapshots of this volume")
            return .goOn
        }
        answerInfo(option, named, asksName: asksName, asksBlockSize: asksBlockSize)
        guard isGo else { return .goOn }
        agreement.isBlockSizeNegotiated = asksBlockSize
        enter(named)
        return .transmission
    }

    private mutating func answerInfo(
        _ option: UInt32, _ named: NBDExport, asksName: Bool, asksBlockSize: Bool
    ) {
        var at = answer(option, .info, 12)
        output.storeBigEndian(NBDInfo.export, at)
        output.storeBigEndian(named.size, at + 2)
        output.storeBigEndian(named.transmissionFlags(agreement.format), at + 10)
        if asksName {
            at = answer(option, .info, 2 + named.name.count)
            output.storeBigEndian(NBDInfo.name, at)
            output.copy(from: named.name, at: at + 2)
        }
        if asksBlockSize {
            at = answer(option, .info, 14)
            output.storeBigEndian(NBDInfo.blockSize, at)
            output.storeBigEndian(UInt32(NBDLimits.blockSizeMin), at + 2)
            output.storeBigEndian(UInt32(NBDLimits.blockSizePreferred), at + 6)
            output.storeBigEndian(UInt32(NBDLimits.payloadMax), at + 10)
        }
        answer(option, .ack)
    }

    private mutating func agree(_ option: UInt32, _ data: RawMemory, isExtended: Bool) {
        guard data.count == 0 else {
            refuse(option, .errorInvalid, "the option takes no data")
            return
        }
        if !isExtended && agreement.format == .extended {
            refuse(
                option, .errorExtendedHeadersRequired, "extended headers were agreed on already")
            return
        }
        agreement.format = isExtended ? .extended : .structured
        answer(option, .ack)
    }

    private mutating func select(_ chosen: [NBDContext]) {
        contexts = chosen
        agreement.contextCount = UInt8(chosen.count)
    }

    private mutating func metaContext(_ option: UInt32, _ data: RawMemory, isSet: Bool) {
        // Even a failed SET replaces what was selected before.
        if isSet { select([]) }
        guard agreement.format != .simple else {
            refuse(option, .errorInvalid, "negotiate structured replies first")
            return
        }
        var reader = NBDOptionReader(data)
        let name = reader.readString()
        let count = reader.readUInt32()
        var queries: [RawMemory] = []
        while queries.count < count, reader.isValid, queries.count <= NBDContext.queriesMax {
            queries.append(reader.readString())
        }
        guard queries.count <= NBDContext.queriesMax else {
            refuse(option, .errorTooBig, "at most \(NBDContext.queriesMax) queries at once")
            return
        }
        guard reader.isAtEnd else {
            refuse(option, .errorInvalid, "malformed option")
            return
        }
        guard let named = exports.export(named: name) else {
            refuseUnknown(option, name)
            return
        }
        var selection = NBDContextSelection(of: exports.snapshots, seenFrom: named.layer)
        if isSet {
            for query in queries { selection.add(named: query) }
            guard selection.picked.count <= NBDContext.selectedMax else {
                refuse(option, .errorTooBig, "at most \(NBDContext.selectedMax) contexts at once")
                return
            }
            select(selection.picked.map(\.context))
            contextLayer = named.layer
        } else if queries.isEmpty {
            selection.addEverything()
        } else {
            for query in queries { selection.add(matching: query) }
        }
        for (index, picked) in selection.picked.enumerated() {
            nameContext(option, id: isSet ? UInt32(index + 1) : 0, picked)
        }
        answer(option, .ack)
    }
    private mutating func nameContext(
        _ option: UInt32, id: UInt32, _ picked: (context: NBDContext, snapshot: String)
    ) {
        let name = [UInt8]("\(picked.context.kind.prefix)\(picked.snapshot)".utf8)
        guard output.count - outputCount >= 2 * 20 + 4 + name.count else { return }
        let at = answer(option, .metaContext, 4 + name.count)
        output.storeBigEndian(id, at)
        output.copy(from: name, at: at + 4)
    }

    // MARK: - Answers

    /// Writes a reply's header and returns where its `length` bytes of data go.
    @discardableResult
    private mutating func answer(
        _ option: UInt32, _ type: NBDOptionReply, _ length: Int = 0
    ) -> Int {
        output.storeBigEndian(NBDMagic.optionReply, outputCount)
        output.storeBigEndian(option, outputCount + 8)
        output.storeBigEndian(type.rawValue, outputCount + 12)
        output.storeBigEndian(UInt32(length), outputCount + 16)
        let at = outputCount + 20
        output.check(at, length)
        outputCount = at + length
        return at
    }

    private mutating func refuse(_ option: UInt32, _ type: NBDOptionReply, _ message: String) {
        let text = [UInt8](message.utf8)
        let at = answer(option, type, text.count)
        output.copy(from: text, at: at)
    }

    private mutating func refuseUnknown(_ option: UInt32, _ name: RawMemory) {
        if exports.isLive(name) {
            let volume = String(decoding: exports.live.name, as: UTF8.self)
            refuse(
                option, .errorPolicy,
                "volume '\(volume)' is not attached: only its snapshots can be read, as "
                    + "'\(volume)@SNAPSHOT'; LIST names them")
            return
        }
        guard let snapshot = exports.snapshotName(in: name) else {
            refuse(option, .errorUnknown, "no such export: '\(Self.printable(name))'")
            return
        }
        refuse(
            option, .errorUnknown,
            "no snapshot '\(Self.printable(snapshot))' of this volume; LIST names those there are")
    }
    /// For a terminal: the start of a name, without what is not plain text.
    private static func printable(_ name: RawMemory) -> String {
        let shown = name.slice(0, min(name.count, printedMax)).bytes()
            .map { (0x20..<0x7f).contains($0) ? $0 : UInt8(ascii: "?") }
        return String(decoding: shown, as: UTF8.self) + (name.count > printedMax ? "..." : "")
    }
    private static let printedMax = 128
}

/// Reads an option's data; after any overrun `isValid` is false and everything reads as zero.
struct NBDOptionReader {
    private let memory: RawMemory
    private var position = 0
    private(set) var isValid = true

    init(_ memory: RawMemory) { self.memory = memory }

    /// Everything was read, and nothing more than there was.
    var isAtEnd: Bool { isValid && position == memory.count }

    mutating func readUInt16() -> UInt16 {
        take(2).map { memory.loadBigEndian(UInt16.self, $0) } ?? 0
    }
    mutating func readUInt32() -> UInt32 {
        take(4).map { memory.loadBigEndian(UInt32.self, $0) } ?? 0
    }
    /// A length (4 bytes) and that many bytes, at most `NBDLimits.stringLengthMax`.
    mutating func readString() -> RawMemory {
        let length = Int(readUInt32())
        if length > NBDLimits.stringLengthMax { isValid = false }
        guard let at = take(length) else { return memory.slice(0, 0) }
        return memory.slice(at, length)
    }
    private mutating func take(_ count: Int) -> Int? {
        guard isValid, count <= memory.count - position else {
            isValid = false
            return nil
        }
        defer { position += count }
        return position
    }
}

extension RawMemory {
    func equals(bytes other: [UInt8]) -> Bool {
        guard count == other.count else { return false }
        for index in 0..<count where self[index] != other[index] { return false }
        return true
    }
    func equals(text: String) -> Bool {
        guard count == text.utf8.count else { return false }
        for (index, byte) in text.utf8.enumerated() where self[index] != byte { return false }
        return true
    }
}
