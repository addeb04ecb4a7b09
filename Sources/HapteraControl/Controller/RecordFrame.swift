import HapteraCore
import NIOCore

/// A complete frame of the record service: header and table (there is never data).
package struct RecordFrame: Equatable, Sendable {
    package var header: FrameHeader
    package var table: [UInt8]

    package init(header: FrameHeader, table: [UInt8]) {
        self.header = header
        self.table = table
    }

    /// Fills in the table's length and checksum, then encodes both.
    package func encoded() -> [UInt8] {
        var header = header
        header.tableLength = UInt32(table.count)
        header.tableChecksum = checksum(of: table)
        let block = MemoryBlock(count: FrameHeader.size)
        header.encode(to: block.memory)
        return block.memory.bytes() + table
    }
}

/// Cuts the byte stream into frames. Nothing is believed before its checksum, no more than one
/// frame's bytes are kept, and the first error ends the connection.
package struct RecordFrameDecoder: NIOSingleStepByteToMessageDecoder {
    package typealias InboundOut = RecordFrame

    private let memory = MemoryBlock(count: FrameHeader.size)

    package init() {}

    /// Consumes a frame when it is complete, and nothing before that.
    package mutating func decode(buffer: inout ByteBuffer) throws -> RecordFrame? {
        guard let bytes = buffer.getBytes(at: buffer.readerIndex, length: FrameHeader.size) else {
            return nil
        }
        memory.memory.copy(from: bytes)
        let header = try FrameHeader(decoding: memory.memory)
        guard !header.isReply, header.dataLength == 0, header.status == .ok else {
            throw FrameError.malformedPayload
        }
        let size = FrameHeader.size + Int(header.tableLength)
        guard buffer.readableBytes >= size, var frame = buffer.readSlice(length: size) else {
            return nil
        }
        frame.moveReaderIndex(forwardBy: FrameHeader.size)
        let table = [UInt8](frame.readableBytesView)
        guard checksum(of: table) == header.tableChecksum else {
            throw FrameError.tableChecksumMismatch
        }
        return RecordFrame(header: header, table: table)
    }

    package mutating func decodeLast(
        buffer: inout ByteBuffer, seenEOF: Bool
    ) throws -> RecordFrame? {
        try decode(buffer: &buffer)
    }
}

extension MetadataStore {
    /// The record service's answer to one frame.
    package func answer(_ frame: RecordFrame) async -> RecordFrame {
        do {
            return try await answerOrThrow(frame)
        } catch {
            // The store is there but does not do its work (full or broken disk): engines wait.
            return Self.reply(frame, .unavailable)
        }
    }

    private func answerOrThrow(_ frame: RecordFrame) async throws -> RecordFrame {
        var reader = ByteReader(frame.table)
        switch frame.header.kind {
        case .ping:
            return Self.reply(frame, frame.table.isEmpty ? .ok : .invalid)
        case .getRecord:
            let volume = VolumeID(high: reader.read(UInt64.self), low: reader.read(UInt64.self))
            guard reader.isValid, reader.remaining == 0 else { return Self.reply(frame, .invalid) }
            guard let record = try await record(of: volume) else {
                return Self.reply(frame, .notFound)
            }
            return Self.reply(frame, .ok, record)
        case .compareAndSwap:
            let volume = VolumeID(high: reader.read(UInt64.self), low: reader.read(UInt64.self))
            let expected = Epoch(reader.read(UInt64.self))
            let proposal = reader.read(raw: reader.remaining)
            guard reader.isValid else { return Self.reply(frame, .invalid) }
            switch try await compareAndSwap(volume, expected: expected, proposal: proposal) {
            case .swapped: return Self.reply(frame, .ok)
            case .conflict(let record): return Self.reply(frame, .conflict, record)
            case .notFound: return Self.reply(frame, .notFound)
            case .invalid(let reason): return Self.reply(frame, .invalid, Array(reason.utf8))
            }
        default:
            return Self.reply(frame, .invalid)
        }
    }

    private static func reply(
        _ frame: RecordFrame, _ status: FrameStatus, _ table: [UInt8] = []
    ) -> RecordFrame {
        RecordFrame(header: frame.header.reply(status, epoch: frame.header.epoch), table: table)
    }
}
