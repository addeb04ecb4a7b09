import HapteraCore

/// Mutated input for the NBD parsers. Each input is a plausible stream with some of its bytes
/// changed; it is fed once whole and once in random parts, and both must give the same events and
/// the same replies. What else counts as wrong traps: memory is bounds-checked everywhere.
package struct FuzzNBD {
    package enum Target: String, CaseIterable, Sendable {
        case options = "nbd-options"
        case requests = "nbd-requests"
    }
    /// What the inputs reached, so that a run that tests nothing shows.
    package struct Report: Equatable, Sendable {
        package var inputs = 0
        package var bytes = 0
        package var replies = 0
        package var requests = 0
        package var refused = 0
        package var hangUps = 0
    }
    /// An input that gave two answers.
    package struct Failure: Error {
        package let seed: UInt64
        package let input: Int
    }

    private let target: Target
    private let random: RandomSource
    private let exports = NBDFixedExports(
        live: NBDExport(
            name: "vol", size: 1 << 40, isReadOnly: false, zeroesFastWithoutHole: false),
        snapshots: [VolumeRecord.Snapshot(layer: LayerID(rawValue: 3), name: "mon", created: 1)])
    private let block = MemoryBlock(count: 1 << 20)
    private var report = Report()
    private static let longName = String(repeating: "x", count: NBDLimits.stringLengthMax + 1)

    /// Runs `inputs` inputs of `target` from `seed`.
    package static func run(_ target: Target, seed: UInt64, inputs: Int) throws(Failure) -> Report {
        var fuzzer = FuzzNBD(target: target, random: RandomSource(seed: seed))
        for index in 0..<inputs {
            let bytes = fuzzer.makeInput()
            let whole = fuzzer.events(bytes, isCut: false)
            let cut = fuzzer.events(bytes, isCut: true)
            guard whole == cut else { throw Failure(seed: seed, input: index) }
            fuzzer.report.inputs += 1
            fuzzer.report.bytes += bytes.count
        }
        return fuzzer.report
    }

    private init(target: Target, random: RandomSource) {
        self.target = target
        self.random = random
    }

    // MARK: Inputs

    private func makeInput() -> [UInt8] {
        var bytes = number(random.permille(950) ? 3 : random.next(), 4)
        switch target {
        case .options:
            for _ in 0..<random.between(1, 6) { bytes += option() }
        case .requests:
            let format = random.below(3)
            if format >= 1 { bytes += header(8, 0) }
            if format == 2 { bytes += header(11, 0) }
            let name = random.permille(800) ? "vol" : "vol@mon"
            if random.permille(700) { bytes += option(10, metaContexts(name)) }
            bytes += option(7, export(name, random.permille(500) ? [3] : []))
            let start = bytes.count
            for _ in 0..<random.between(1, 12) { bytes += request(isExtended: format == 2) }
            mutate(&bytes, from: random.permille(800) ? start : 0)
            return bytes
        }
        mutate(&bytes, from: 0)
        return bytes
    }

    private func mutate(_ bytes: inout [UInt8], from start: Int) {
        for _ in 0..<random.below(6) where start < bytes.count {
            let at = random.between(start, bytes.count - 1)
            switch random.below(5) {
            case 0: bytes[at] ^= 1 << UInt8(random.below(8))
            case 1: bytes[at] = random.pick([0, 1, 0x7f, 0x80, 0xff])
            case 2: bytes.remove(at: at)
            case 3: bytes.insert(UInt8(random.below(256)), at: at)
            default: bytes.removeLast(bytes.count - at)
            }
        }
    }

    private func number(_ value: UInt64, _ width: Int) -> [UInt8] {
        (0..<width).reversed().map { UInt8(truncatingIfNeeded: value >> UInt64($0 * 8)) }
    }
    private func header(_ option: UInt64, _ length: Int) -> [UInt8] {
        number(NBDMagic.option, 8) + number(option, 4) + number(UInt64(length), 4)
    }
    private func option(_ option: UInt64, _ data: [UInt8]) -> [UInt8] {
        header(option, data.count) + data
    }
    private func option() -> [UInt8] {
        let name = random.pick([
            "", "vol", "other", "vol@mon", random.permille(50) ? Self.longName : "vol@x",
        ])
        switch random.below(8) {
        case 0: return option(6, export(name, [0, 1, 3]))
        case 1: return option(7, export(name, [3]))
        case 2: return option(UInt64(random.between(9, 10)), metaContexts(name))
        case 3: return option(1, Array(name.utf8))
        case 4: return header(8, 0)
        case 5: return header(11, 0)
        case 6: return option(99, longData())
        default: return header(UInt64(random.below(13)), 0)
        }
    }
    /// Around the limit, seldom: long inputs are slow ones.
    private func longData() -> [UInt8] {
        let count = random.permille(30) ? random.between(65535, 65537) : random.below(64)
        return [UInt8](repeating: 7, count: count)
    }
    private func export(_ name: String, _ items: [UInt64]) -> [UInt8] {
        number(UInt64(name.utf8.count), 4) + Array(name.utf8) + number(UInt64(items.count), 2)
            + items.flatMap { number($0, 2) }
    }
    private func metaContexts(_ name: String) -> [UInt8] {
        let queries = [
            "base:allocation", "base:", "x:y", "", "qemu:dirty-bitmap:mon", "haptera:",
            "haptera:changed:mon", "haptera:changed:tue",
        ].filter { _ in random.permille(600) }
        return number(UInt64(name.utf8.count), 4) + Array(name.utf8)
            + number(UInt64(queries.count), 4)
            + queries.flatMap { number(UInt64($0.utf8.count), 4) + Array($0.utf8) }
    }
    private func request(isExtended: Bool) -> [UInt8] {
        let command = UInt64(random.below(random.permille(900) ? 8 : 0x10000))
        var flags: UInt64 = random.permille(700) ? 0 : random.next() & 0x3f
        let lengths: [UInt64] = [0, 1, 511, 512, 4096, 70_000, 32 << 20, 33 << 20, 1 << 31]
        var length = random.pick(lengths)
        if isExtended && random.permille(100) { length = random.next() }
        if command == 1 {
            length = min(length, random.permille(20) ? 70_000 : 1024)
            if isExtended { flags |= 0x20 }
        }
        let offset = random.pick([0, 512, 1, 1 << 39, 1 << 40, .max, 1 << 63, random.next()])
        let magic = isExtended ? NBDMagic.extendedRequest : NBDMagic.request
        let head =
            number(UInt64(magic), 4) + number(flags, 2) + number(command, 2)
            + number(random.next(), 8) + number(offset, 8) + number(length, isExtended ? 8 : 4)
        return head + (command == 1 ? [UInt8](repeating: 0x25, count: Int(length)) : [])
    }

    // MARK: Feeding

    /// Everything a session said to `bytes`: events and replies.
    private mutating func events(_ bytes: [UInt8], isCut: Bool) -> [Said] {
        block.memory.copy(from: bytes)
        exports.admitsReader = bytes.count % 8 != 0
        var session = NBDSession(exports: exports)
        var said: [Said] = []
        var position = 0
        var visible = isCut ? 0 : bytes.count
        var payload: UInt64 = 0
        while true {
            let taken = min(payload, UInt64(visible - position))
            position += Int(taken)
            payload -= taken
            var consumed = 0
            let event: NBDSession.Event =
                payload > 0
                ? .needsMore
                : session.next(
                    block.memory.slice(position, visible - position), consumed: &consumed)
            precondition(consumed >= 0 && consumed <= visible - position)
            position += consumed
            switch event {
            case .needsMore:
                if visible == bytes.count { return said }
                visible = min(bytes.count, visible + random.between(1, 64))
                continue
            case .request(let request):
                precondition(request.error != .none || isSound(request, session.export))
                if request.error == .none { payload = request.payload }
                if !isCut { report.requests += 1 }
                if !isCut && request.error != .none { report.refused += 1 }
            case .reply, .transmission:
                if !isCut { report.replies += 1 }
            case .disconnect, .hangUp:
                if !isCut { report.hangUps += 1 }
                said.append(Said(event: event, output: session.output.bytes()))
                return said
            }
            if case .request = event {
                said.append(Said(event: event, output: []))
            } else {
                said.append(Said(event: event, output: session.output.bytes()))
            }
        }
    }
    private struct Said: Equatable {
        var event: NBDSession.Event
        var output: [UInt8]
    }

    /// What every accepted request must be, whatever was sent.
    private func isSound(_ request: NBDRequest, _ export: NBDExport) -> Bool {
        let (end, overflow) = request.offset.addingReportingOverflow(request.length)
        let hasData = request.command == .read || request.command == .write
        return !overflow && end <= export.size
            && (!hasData || request.length <= UInt64(NBDLimits.payloadMax))
            && (request.payload == 0 || request.command == .write)
            && !(export.isReadOnly && request.command.isModification)
    }
}
