// The numbers of the Network Block Device protocol (fixed newstyle, with structured replies and
// extended headers). Everything on the wire is big-endian.

package enum NBDMagic {
    /// "NBDMAGIC", the first thing a server says.
    package static let greeting: UInt64 = 0x4e42_444d_4147_4943
    /// "IHAVEOPT", in the greeting and in front of every option.
    package static let option: UInt64 = 0x4948_4156_454f_5054
    package static let optionReply: UInt64 = 0x0003_e889_0455_65a9
    package static let request: UInt32 = 0x2560_9513
    package static let extendedRequest: UInt32 = 0x21e4_1c71
    package static let simpleReply: UInt32 = 0x6744_6698
    package static let structuredReply: UInt32 = 0x668e_33ef
    package static let extendedReply: UInt32 = 0x6e8a_278c
}

package enum NBDLimits {
    /// Option data a client may send; more is consumed and refused.
    package static let optionDataMax = 64 << 10
    /// Options in one negotiation.
    package static let optionsMax = 1024
    /// Export names and metadata queries, bytes.
    package static let stringLengthMax = 4096
    package static let blockSizeMin = 512
    package static let blockSizePreferred = 4096
    /// The payload of one read or write, bytes.
    package static let payloadMax = 32 << 20
}

/// Handshake flags; the client's answer uses the same bits.
package enum NBDHandshakeFlags {
    package static let fixedNewstyle: UInt16 = 1 << 0
    package static let noZeroes: UInt16 = 1 << 1
}

package enum NBDTransmissionFlags {
    package static let hasFlags: UInt16 = 1 << 0
    package static let readOnly: UInt16 = 1 << 1
    package static let sendFlush: UInt16 = 1 << 2
    package static let sendFUA: UInt16 = 1 << 3
    package static let sendTrim: UInt16 = 1 << 5
    package static let sendWriteZeroes: UInt16 = 1 << 6
    package static let sendDF: UInt16 = 1 << 7
    package static let canMultiConn: UInt16 = 1 << 8
    package static let sendCache: UInt16 = 1 << 10
    package static let sendFastZero: UInt16 = 1 << 11
}

package enum NBDOption: UInt32, Sendable {
    case exportName = 1
    case abort = 2
    case list = 3
    case startTLS = 5
    case info = 6
    case go = 7
    case structuredReply = 8
    case listMetaContext = 9
    case setMetaContext = 10
    case extendedHeaders = 11
}

package enum NBDOptionReply: UInt32, Sendable {
    case ack = 1
    case server = 2
    case info = 3
    case metaContext = 4
    case errorUnsupported = 0x8000_0001
    case errorPolicy = 0x8000_0002
    case errorInvalid = 0x8000_0003
    case errorUnknown = 0x8000_0006
    case errorShutdown = 0x8000_0007
    case errorBlockSizeRequired = 0x8000_0008
    case errorTooBig = 0x8000_0009
    case errorExtendedHeadersRequired = 0x8000_000a
}

package enum NBDInfo {
    package static let export: UInt16 = 0
    package static let name: UInt16 = 1
    package static let description: UInt16 = 2
    package static let blockSize: UInt16 = 3
}

package enum NBDCommand: UInt16, BitwiseCopyable, Sendable {
    case read = 0
    case write = 1
    case disconnect = 2
    case flush = 3
    case trim = 4
    case cache = 5
    case writeZeroes = 6
    case blockStatus = 7

    /// Whether the command changes the volume.
    @inlinable package var isModification: Bool {
        self == .write || self == .trim || self == .writeZeroes
    }
}

package struct NBDCommandFlags: OptionSet, BitwiseCopyable, Sendable {
    package var rawValue: UInt16
    @inlinable package init(rawValue: UInt16) { self.rawValue = rawValue }
    package static let fua = NBDCommandFlags(rawValue: 1 << 0)
    package static let noHole = NBDCommandFlags(rawValue: 1 << 1)
    package static let dontFragment = NBDCommandFlags(rawValue: 1 << 2)
    package static let requestOne = NBDCommandFlags(rawValue: 1 << 3)
    package static let fastZero = NBDCommandFlags(rawValue: 1 << 4)
    package static let payloadLength = NBDCommandFlags(rawValue: 1 << 5)
}

package enum NBDChunk {
    package static let done: UInt16 = 1 << 0

    package static let none: UInt16 = 0
    package static let offsetData: UInt16 = 1
    package static let offsetHole: UInt16 = 2
    package static let blockStatus: UInt16 = 5
    package static let blockStatusExtended: UInt16 = 6
    package static let error: UInt16 = 0x8001
}

/// The errors a reply may carry. `none` is success.
package enum NBDError: UInt32, BitwiseCopyable, Sendable {
    case none = 0
    case notPermitted = 1
    case io = 5
    case invalid = 22
    case noSpace = 28
    case overflow = 75
    case notSupported = 95
    case shutdown = 108

    /// For people; shown by clients that negotiated structured replies.
    package var message: StaticString {
        switch self {
        case .none: ""
        case .notPermitted: "the export is read-only"
        case .io: "input/output error"
        case .invalid: "invalid request"
        case .noSpace: "no space left, or past the end of the export"
        case .overflow: "the request is larger than 32 MiB"
        case .notSupported: "not possible faster than writing"
        case .shutdown: "the server is shutting down"
        }
    }
}

/// How replies are laid out on one connection, as negotiated.
package enum NBDReplyFormat: UInt8, BitwiseCopyable, Sendable {
    case simple
    case structured
    /// Extended headers, which include everything structured replies do.
    case extended
}
