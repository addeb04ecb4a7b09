/// Encodes the replies to one request, in the layout its connection negotiated.
///
///     simple      0 magic 4 | 4 error 4 | 8 cookie 8
///     structured  0 magic 4 | 4 flags 2 | 6 type 2 | 8 cookie 8 | 16 payload length 4
///     extended    0 magic 4 | 4 flags 2 | 6 type 2 | 8 cookie 8 | 16 request's offset 8
///                 | 24 payload length 8
///
/// Each function writes to the start of `memory` (at least `headerSizeMax` bytes unless it says
/// otherwise) and returns how many bytes it wrote.
package struct NBDReply: BitwiseCopyable, Sendable {
    /// The longest header plus the fixed part of the longest payload, an error with its message.
    package static let headerSizeMax = 128

    package let format: NBDReplyFormat
    package let cookie: UInt64
    /// The request's, which extended replies repeat.
    package let offset: UInt64

    @inlinable package init(format: NBDReplyFormat, cookie: UInt64, offset: UInt64) {
        self.format = format
        self.cookie = cookie
        self.offset = offset
    }

    /// The whole reply of a request that returns no data, or of one that failed.
    package func status(_ error: NBDError, _ command: NBDCommand, to memory: RawMemory) -> Int {
        switch format {
        case .simple: return simple(error, to: memory)
        // Shorter, and allowed for all but reads.
        case .structured where error == .none && command != .read:
            return simple(error, to: memory)
        case .structured, .extended:
            return error == .none ? done(to: memory) : failure(error, to: memory)
        }
    }

    /// The simple reply; of a successful read, the data follows.
    package func simple(_ error: NBDError, to memory: RawMemory) -> Int {
        memory.storeBigEndian(NBDMagic.simpleReply, 0)
        memory.storeBigEndian(error.rawValue, 4)
        memory.storeBigEndian(cookie, 8)
        return 16
    }

    /// The header of a chunk of data; `length` bytes of data follow.
    package func data(
        at dataOffset: UInt64, length: Int, isLast: Bool, to memory: RawMemory
    ) -> Int {
        let start = chunk(NBDChunk.offsetData, isLast, payload: length + 8, to: memory)
        memory.storeBigEndian(dataOffset, start)
        return start + 8
    }

    package func hole(
        at holeOffset: UInt64, length: Int, isLast: Bool, to memory: RawMemory
    ) -> Int {
        let start = chunk(NBDChunk.offsetHole, isLast, payload: 12, to: memory)
        memory.storeBigEndian(holeOffset, start)
        memory.storeBigEndian(UInt32(length), start + 8)
        return start + 12
    }

    /// The last chunk of a reply that succeeded.
    package func done(to memory: RawMemory) -> Int {
        chunk(NBDChunk.none, true, payload: 0, to: memory)
    }

    /// The last chunk of a reply that failed.
    package func failure(_ error: NBDError, to memory: RawMemory) -> Int {
        precondition(error != .none)
        let text = error.message
        let count = text.utf8CodeUnitCount
        let start = chunk(NBDChunk.error, true, payload: 6 + count, to: memory)
        memory.storeBigEndian(error.rawValue, start)
        memory.storeBigEndian(UInt16(count), start + 4)
        for index in 0..<count {
            // SAFETY: a StaticString of more than one scalar has `utf8CodeUnitCount` bytes at
            // `utf8Start`, for ever.
            memory[start + 6 + index] = unsafe text.utf8Start[index]
        }
        return start + 6 + count
    }

    /// The header of a chunk whose `payload` bytes follow.
    package func chunk(_ type: UInt16, _ isLast: Bool, payload: Int, to memory: RawMemory) -> Int {
        let isExtended = format == .extended
        precondition(format != .simple)
        memory.storeBigEndian(
            isExtended ? NBDMagic.extendedReply : NBDMagic.structuredReply, 0)
        memory.storeBigEndian(isLast ? NBDChunk.done : 0, 4)
        memory.storeBigEndian(type, 6)
        memory.storeBigEndian(cookie, 8)
        guard isExtended else {
            memory.storeBigEndian(UInt32(payload), 16)
            return 20
        }
        memory.storeBigEndian(offset, 16)
        memory.storeBigEndian(UInt64(payload), 24)
        return 32
    }
}
