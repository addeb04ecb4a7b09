@testable import HapteraCore

/// Builds what a client sends, big-endian.
struct NBDBytes {
    var bytes: [UInt8] = []
    mutating func put<T: FixedWidthInteger>(_ value: T) {
        for shift in stride(from: T.bitWidth - 8, through: 0, by: -8) {
            bytes.append(UInt8(truncatingIfNeeded: value >> shift))
        }
    }
    mutating func put(_ text: String) { bytes.append(contentsOf: text.utf8) }

    static func option(_ option: UInt32, _ data: [UInt8] = []) -> [UInt8] {
        var out = NBDBytes()
        out.put(NBDMagic.option)
        out.put(option)
        out.put(UInt32(data.count))
        return out.bytes + data
    }
    static func option(_ option: NBDOption, _ data: [UInt8] = []) -> [UInt8] {
        Self.option(option.rawValue, data)
    }
    static func go(_ name: String, _ items: [UInt16] = []) -> [UInt8] {
        var data = NBDBytes()
        data.put(UInt32(name.utf8.count))
        data.put(name)
        data.put(UInt16(items.count))
        for item in items { data.put(item) }
        return data.bytes
    }
    static func queries(_ name: String, _ queries: [String]) -> [UInt8] {
        var data = NBDBytes()
        data.put(UInt32(name.utf8.count))
        data.put(name)
        data.put(UInt32(queries.count))
        for query in queries {
            data.put(UInt32(query.utf8.count))
            data.put(query)
        }
        return data.bytes
    }
    static func request(
        _ type: UInt16, flags: UInt16 = 0, cookie: UInt64 = 7, offset: UInt64 = 0,
        length: UInt64 = 0, isExtended: Bool = false
    ) -> [UInt8] {
        var out = NBDBytes()
        out.put(isExtended ? NBDMagic.extendedRequest : NBDMagic.request)
        out.put(flags)
        out.put(type)
        out.put(cookie)
        out.put(offset)
        if isExtended { out.put(length) } else { out.put(UInt32(length)) }
        return out.bytes
    }
}

/// A session and what came out of it.
final class NBDHarness {
    var session: NBDSession
    var sent: [UInt8] = []
    private var pending: [UInt8] = []

    let exports: NBDFixedExports

    init(
        size: UInt64 = 1 << 30, isReadOnly: Bool = false, clientFlags: UInt32? = 3,
        snapshots: [String] = []
    ) {
        exports = NBDFixedExports(
            live: NBDExport(name: "vol", size: size, isReadOnly: isReadOnly),
            snapshots: snapshots.enumerated().map {
                VolumeRecord.Snapshot(
                    layer: LayerID(rawValue: UInt32($0.offset + 1)), name: $0.element, created: 0)
            })
        session = NBDSession(exports: exports)
        _ = feed([])
        sent = []
        if let clientFlags {
            var flags = NBDBytes()
            flags.put(clientFlags)
            _ = feed(flags.bytes)
        }
    }

    /// Feeds `bytes`; returns the events, without the final `needsMore`. Accepted payloads are
    /// skipped.
    @discardableResult
    func feed(_ bytes: [UInt8]) -> [NBDSession.Event] {
        pending += bytes
        var events: [NBDSession.Event] = []
        while true {
            let block = MemoryBlock(count: max(pending.count, 1))
            block.memory.copy(from: pending)
            var consumed = 0
            let event = session.next(block.memory.slice(0, pending.count), consumed: &consumed)
            pending.removeFirst(consumed)
            if event == .needsMore { return events }
            if case .request = event {} else { sent += session.output.bytes() }
            events.append(event)
            if case .request(let request) = event, request.error == .none {
                pending.removeFirst(min(pending.count, Int(request.payload)))
            }
            if case .hangUp = event { return events }
            if event == .disconnect { return events }
        }
    }

    /// Sends an option and returns the replies to it: type and data.
    func ask(_ option: NBDOption, _ data: [UInt8] = []) -> [(NBDOptionReply, [UInt8])] {
        ask(option.rawValue, data)
    }
    func ask(_ option: UInt32, _ data: [UInt8] = []) -> [(NBDOptionReply, [UInt8])] {
        sent = []
        feed(NBDBytes.option(option, data))
        let block = MemoryBlock(count: max(sent.count, 1))
        block.memory.copy(from: sent)
        var replies: [(NBDOptionReply, [UInt8])] = []
        var at = 0
        while at < sent.count {
            guard block.memory.loadBigEndian(UInt64.self, at) == NBDMagic.optionReply,
                block.memory.loadBigEndian(UInt32.self, at + 8) == option,
                let type = NBDOptionReply(
                    rawValue: block.memory.loadBigEndian(UInt32.self, at + 12))
            else { return [] }
            let length = Int(block.memory.loadBigEndian(UInt32.self, at + 16))
            replies.append((type, block.memory.slice(at + 20, length).bytes()))
            at += 20 + length
        }
        return replies
    }

    /// Sends one request header and returns how it was judged.
    func judge(
        _ command: NBDCommand, flags: NBDCommandFlags = [], offset: UInt64 = 0, length: UInt64 = 0
    ) -> NBDError? {
        let isExtended = session.agreement.format == .extended
        let events = feed(
            NBDBytes.request(
                command.rawValue, flags: flags.rawValue, offset: offset, length: length,
                isExtended: isExtended))
        if case .request(let request) = events.first { return request.error }
        return nil
    }
}
