import HapteraCore
import HapteraHost

/// What a reader and an engine agreed on, so that the same can be agreed on with another engine.
struct NBDScript: Sendable {
    /// It is no use to try again.
    struct Broken: Error {
        var reason: String
    }
    private struct Exchange {
        var option: UInt32
        var question: [UInt8]
        var answer: [UInt8] = []
    }
    private static let optionsMax = 64

    let export: String
    private(set) var isEntered = false
    private var flags: [UInt8] = []
    private var exchanges: [Exchange] = []
    /// Asked by the reader, and not answered yet.
    private var pending: Exchange?
    private var size: UInt64?
    /// What follows the answer to EXPORT_NAME, unless the reader does without.
    private var zeroesLength: Int { flags.last.map { $0 & 2 == 0 ? 124 : 0 } ?? 124 }

    init(export: String) { self.export = export }

    /// Passes on what both say until the snapshot is entered, or the reader has enough. If an
    /// engine is lost in the middle, again with another one.
    mutating func negotiate(_ client: NBDSocket, _ engine: NBDSocket) throws {
        let greeting = try Self.greeting(of: engine)
        if flags.isEmpty {
            try fromReader { try client.send(greeting) }
            flags = try fromReader { try client.receive(4) }
        }
        try repeatAnswered(to: engine)
        while !isEntered {
            guard let asked = try pending ?? nextOption(of: client) else { continue }
            pending = asked
            let answer = try ask(asked, engine)
            exchanges.append(
                Exchange(option: asked.option, question: asked.question, answer: answer))
            pending = nil
            try fromReader { try client.send(answer) }
            if asked.option == NBDOption.abort.rawValue { return }
        }
    }

    /// The same with another engine.
    func repeated(to engine: NBDSocket) throws {
        _ = try Self.greeting(of: engine)
        var same = self
        try same.repeatAnswered(to: engine)
    }

    private static func greeting(of engine: NBDSocket) throws -> [UInt8] {
        let greeting = try engine.receive(18)
        guard greeting.prefix(16).elementsEqual("NBDMAGICIHAVEOPT".utf8) else {
            throw HostError("what answers where the snapshot is served is no NBD server")
        }
        return greeting
    }

    private mutating func repeatAnswered(to engine: NBDSocket) throws {
        try engine.send(flags)
        for exchange in exchanges {
            let answer = try ask(exchange, engine)
            // Contexts are known by their numbers from then on.
            let isSame =
                exchange.option != NBDOption.setMetaContext.rawValue || answer == exchange.answer
            guard isSame else {
                throw Broken(reason: "a snapshot to compare with was deleted meanwhile")
            }
        }
    }

    private func fromReader<Result>(_ body: () throws -> Result) throws -> Result {
        do {
            return try body()
        } catch {
            throw Broken(reason: "the reader has left")
        }
    }

    // MARK: The reader's options

    /// Nil: it was refused here.
    private func nextOption(of client: NBDSocket) throws -> Exchange? {
        let header = try fromReader { try client.receive(16) }
        let option = UInt32(NBDSocket.number(header[8..<12]))
        let length = Int(NBDSocket.number(header[12..<16]))
        guard NBDSocket.number(header[0..<8]) == NBDMagic.option,
            length <= NBDLimits.optionDataMax, exchanges.count < Self.optionsMax
        else { throw Broken(reason: "the reader's options make no sense") }
        let data = try fromReader { try client.receive(length) }
        if let refusal = try refusal(option, data) {
            try fromReader { try client.send(refusal) }
            return nil
        }
        return Exchange(option: option, question: header + data)
    }

    /// Only this snapshot is served here; and what follows is parsed, so headers have one length.
    private func refusal(_ option: UInt32, _ data: [UInt8]) throws -> [UInt8]? {
        let name: [UInt8]?
        switch NBDOption(rawValue: option) {
        case .extendedHeaders, .startTLS: return Self.reply(option, .errorUnsupported)
        case .list:
            let text = Array(export.utf8)
            return Self.reply(option, .server, NBDSocket.bytes(UInt32(text.count)) + text)
                + Self.reply(option, .ack)
        case .exportName: name = data
        case .info, .go, .listMetaContext, .setMetaContext:
            let length = data.count >= 4 ? Int(NBDSocket.number(data[0..<4])) : -1
            name = length >= 0 && length <= data.count - 4 ? Array(data[4..<4 + length]) : nil
        default: return nil
        }
        if let name, name.elementsEqual(export.utf8) { return nil }
        guard option != NBDOption.exportName.rawValue else {
            throw Broken(reason: "the reader wants another export")
        }
        return Self.reply(option, .errorUnknown, Array("only '\(export)' is served here".utf8))
    }

    private static func reply(
        _ option: UInt32, _ type: NBDOptionReply, _ data: [UInt8] = []
    ) -> [UInt8] {
        NBDSocket.bytes(NBDMagic.optionReply) + NBDSocket.bytes(option)
            + NBDSocket.bytes(type.rawValue) + NBDSocket.bytes(UInt32(data.count)) + data
    }

    // MARK: The engine's answers

    private mutating func ask(_ asked: Exchange, _ engine: NBDSocket) throws -> [UInt8] {
        try engine.send(asked.question)
        if asked.option == NBDOption.exportName.rawValue {
            let answer = try engine.receive(10 + zeroesLength)
            try enter(NBDSocket.number(answer[0..<8]))
            return answer
        }
        var answer: [UInt8] = []
        var told: UInt64 = 0
        while true {
            let header = try engine.receive(20)
            let type = UInt32(NBDSocket.number(header[12..<16]))
            let length = Int(NBDSocket.number(header[16..<20]))
            guard NBDSocket.number(header[0..<8]) == NBDMagic.optionReply, length <= 65536 else {
                throw HostError("the engine's answer makes no sense")
            }
            let data = try engine.receive(length)
            answer += header + data
            if type == NBDOptionReply.info.rawValue, data.count == 12 {
                told = NBDSocket.number(data[2..<10])
            }
            let isGo = asked.option == NBDOption.go.rawValue
            if type == NBDOptionReply.ack.rawValue {
                if isGo { try enter(told) }
                return answer
            }
            guard type >= 0x8000_0000 else { continue }
            // One that leaves, or has not got the snapshot: there may be another.
            guard !isGo, type != NBDOptionReply.errorShutdown.rawValue else {
                throw HostError("the engine refuses: \(String(decoding: data, as: UTF8.self))")
            }
            return answer
        }
    }

    private mutating func enter(_ size: UInt64) throws {
        guard self.size == nil || self.size == size else {
            throw Broken(reason: "the snapshot has another size")
        }
        self.size = size
        isEntered = true
    }
}
