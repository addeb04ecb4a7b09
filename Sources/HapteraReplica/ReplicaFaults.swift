import HapteraCore
import HapteraIO

/// Faults asked for on the control socket of a replica started with `--allow-faults`: that of a
/// scratch volume. Each undoes itself, whoever asked for it.
///
///     fault link=in|out|both milliseconds=MS   frames of that way wait, as behind a partition
///     fault files=RULES milliseconds=MS        file I/O fails as `FaultRules` says
struct ReplicaFaults {
    static let millisecondsMax: UInt64 = 60_000

    /// A reply that cannot get out. Its buffers stay retained.
    struct HeldReply {
        var connection: FrameConnection
        var header: FrameHeader
        var table: BufferID
        var buffer: BufferID
        var offset: Int
    }

    enum Fault {
        case link(isDeaf: Bool, isMute: Bool)
        case files(FaultRules)
    }

    private(set) var isDeaf = false
    private(set) var isMute = false
    var held: [HeldReply] = []
    private var linkEnd: Instant?
    private var filesEnd: Instant?

    static func parse(
        _ arguments: [String: String]
    ) throws(IOError) -> (fault: Fault, milliseconds: UInt64) {
        guard let milliseconds = arguments["milliseconds"].flatMap({ UInt64($0) }),
            (1...millisecondsMax).contains(milliseconds), arguments.count == 2
        else {
            throw IOError("use link= or files=, and milliseconds= from 1 to \(millisecondsMax)")
        }
        if let rules = arguments["files"] {
            return (.files(try FaultRules(parsing: rules)), milliseconds)
        }
        switch arguments["link"] {
        case "in": return (.link(isDeaf: true, isMute: false), milliseconds)
        case "out": return (.link(isDeaf: false, isMute: true), milliseconds)
        case "both": return (.link(isDeaf: true, isMute: true), milliseconds)
        default: throw IOError("link= is in, out or both")
        }
    }

    var isCut: Bool { isDeaf || isMute }

    mutating func cut(isDeaf: Bool, isMute: Bool, until end: Instant) {
        self.isDeaf = isDeaf
        self.isMute = isMute
        linkEnd = end
    }
    mutating func harmFiles(until end: Instant) { filesEnd = end }

    /// What has come to its end, once.
    mutating func ended(now: Instant) -> (link: Bool, files: Bool) {
        let link = linkEnd.map { now >= $0 } ?? false
        let files = filesEnd.map { now >= $0 } ?? false
        if link {
            linkEnd = nil
            isDeaf = false
            isMute = false
        }
        if files { filesEnd = nil }
        return (link, files)
    }
}
