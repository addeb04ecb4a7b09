import GRDB
import HapteraCore
import Logging
import NIOCore
import NIOPosix
import Testing

@testable import HapteraControl

/// The record service as an engine, or a stranger, meets it: over TCP.
@Suite struct RecordServiceTests {
    private static let quiet = Logger(label: "test") { _ in SwiftLogNoOpLogHandler() }

    /// Runs a service over a store with one volume, and `body` with it.
    private func withService(
        partialFrameLimit: TimeAmount = .seconds(10),
        _ body: (TestStore, VolumeRecord, RecordService) async throws -> Void
    ) async throws {
        let test = try TestStore()
        let record = try #require(try await test.makeVolume().record)
        let service = try await RecordService(
            store: test.store, changes: ChangeSignal(), host: "127.0.0.1", port: 0,
            logger: Self.quiet, partialFrameLimit: partialFrameLimit)
        let running = Task { try await service.run() }
        try await body(test, record, service)
        running.cancel()
        _ = await running.result
    }

    private static func get(_ volume: VolumeID, tag: UInt64 = 1) -> RecordFrame {
        var writer = ByteWriter()
        writer.append(volume.high)
        writer.append(volume.low)
        var header = FrameHeader(kind: .getRecord)
        header.tag = tag
        return RecordFrame(header: header, table: writer.bytes)
    }

    private static func swap(
        _ proposal: VolumeRecord, expected: UInt64, tag: UInt64 = 1
    ) -> RecordFrame {
        var writer = ByteWriter()
        writer.append(proposal.volume.high)
        writer.append(proposal.volume.low)
        writer.append(expected)
        writer.append(raw: proposal.encoded())
        var header = FrameHeader(kind: .compareAndSwap)
        header.tag = tag
        return RecordFrame(header: header, table: writer.bytes)
    }

    @Test func readsAndSwaps() async throws {
        try await withService { _, record, service in
            let second = record.next(nonce: 4)
            let client = try await Client(port: service.port)
            let replies = try await client.converse(
                [
                    Self.get(record.volume), Self.swap(second, expected: 1),
                    Self.swap(record.next(nonce: 5), expected: 1), Self.get(record.volume),
                    Self.get(VolumeID(high: 9, low: 9)),
                    RecordFrame(header: FrameHeader(kind: .ping), table: []),
                ], replies: 6)
            #expect(
                replies.map(\.header.status) == [.ok, .ok, .conflict, .ok, .notFound, .ok])
            #expect(replies[0].table == record.encoded())
            #expect(replies[1].table.isEmpty)
            #expect(replies[2].table == second.encoded())
            #expect(replies[3].table == second.encoded())
        }
    }

    /// Many requests written at once are all answered, in their order.
    @Test func pipelinesInOrder() async throws {
        try await withService { _, record, service in
            let client = try await Client(port: service.port)
            let requests = (0..<500).map { Self.get(record.volume, tag: UInt64($0)) }
            let replies = try await client.converse(requests, replies: 500)
            #expect(replies.map(\.header.tag) == (0..<500).map { UInt64($0) })
            #expect(replies.allSatisfy { $0.table == record.encoded() })
        }
    }

    /// The time that answering the requests before takes is not the peer's: a connection with much
    /// under way was closed while a frame lay half read.
    @Test func waitingForAnswersIsNoDelayOfThePeer() async throws {
        try await withService(partialFrameLimit: .milliseconds(500)) { _, record, service in
            let client = try await Client(port: service.port)
            let requests = (0..<10_000).map { Self.get(record.volume, tag: UInt64($0)) }
            let replies = try await client.converse(requests, replies: requests.count)
            #expect(replies.count == requests.count)
        }
    }

    @Test func aFrameMayArriveByteByByte() async throws {
        try await withService { _, record, service in
            let client = try await Client(port: service.port)
            let pieces = Self.get(record.volume).encoded().map { [$0] }
            let replies = try await client.converse(bytes: pieces, replies: 1)
            #expect(replies.first?.table == record.encoded())
        }
    }

    /// What is well-formed but makes no sense gets an answer, and the connection lives on.
    @Test func malformedRequestsAreAnswered() async throws {
        try await withService { _, record, service in
            let client = try await Client(port: service.port)
            let frames = [
                RecordFrame(header: FrameHeader(kind: .getRecord), table: [1, 2, 3]),
                RecordFrame(header: FrameHeader(kind: .compareAndSwap), table: []),
                RecordFrame(
                    header: FrameHeader(kind: .compareAndSwap),
                    table: [UInt8](repeating: 7, count: FrameHeader.tableLengthMax)),
                RecordFrame(header: FrameHeader(kind: .write), table: []),
                RecordFrame(header: FrameHeader(kind: .ping), table: [0]),
                Self.get(record.volume),
            ]
            let replies = try await client.converse(frames, replies: 6)
            #expect(
                replies.map(\.header.status) == [
                    .invalid, .invalid, .invalid, .invalid, .invalid, .ok,
                ])
        }
    }

    /// The engine tells whoever reads its log, and gives the change up.
    @Test func aRefusalSaysWhy() async throws {
        try await withService { _, record, service in
            var proposal = record.next(nonce: 4)
            proposal.joining = VolumeRecord.Member(
                replica: ReplicaID(rawValue: 77), incarnation: Incarnation(rawValue: 1))
            let client = try await Client(port: service.port)
            let replies = try await client.converse(
                [Self.swap(proposal, expected: 1), Self.get(record.volume)], replies: 2)
            #expect(replies.map(\.header.status) == [.invalid, .ok])
            let reason = String(decoding: replies[0].table, as: UTF8.self)
            #expect(reason == "the record names an unknown replica")
            #expect(replies[1].table == record.encoded())
        }
    }

    /// Each of these closes its connection, costs nobody else anything and changes nothing.
    @Test func hostileBytesCloseTheConnection() async throws {
        try await withService { test, record, service in
            let good = Self.swap(record.next(nonce: 6), expected: 1).encoded()
            var hostile: [[UInt8]] = [
                [UInt8](repeating: 0, count: FrameHeader.size),
                Array("GET / HTTP/1.1\r\nHost: example\r\n\r\n".utf8)
                    + [UInt8](repeating: 32, count: FrameHeader.size),
            ]
            var reply = FrameHeader(kind: .ping)
            reply.flags = FrameFlags.reply
            hostile.append(RecordFrame(header: reply, table: []).encoded())
            var withData = FrameHeader(kind: .ping)
            withData.dataLength = 4096
            hostile.append(RecordFrame(header: withData, table: []).encoded())
            for position in stride(from: 0, to: good.count, by: 5) {
                var flipped = good
                flipped[position] ^= 0x10
                hostile.append(flipped)
            }
            let bystander = try await Client(port: service.port)
            for bytes in hostile {
                let client = try await Client(port: service.port)
                let replies = try await client.converse(bytes: [bytes], replies: .max)
                #expect(replies.isEmpty)
            }
            #expect(try await test.store.record(of: record.volume) == record.encoded())
            let replies = try await bystander.converse([Self.get(record.volume)], replies: 1)
            #expect(replies.first?.table == record.encoded())
        }
    }

    /// A frame that is begun and never completed holds its connection for a bounded time; one that
    /// has nothing begun may be silent for ever.
    @Test func halfAFrameTimesOut() async throws {
        try await withService(partialFrameLimit: .milliseconds(20)) { _, record, service in
            let silent = try await Client(port: service.port)
            let frame = Self.get(record.volume).encoded()
            for length in [1, FrameHeader.size - 1, FrameHeader.size, frame.count - 1] {
                let client = try await Client(port: service.port)
                let replies = try await client.converse(
                    bytes: [Array(frame.prefix(length))], replies: .max)
                #expect(replies.isEmpty)
            }
            let replies = try await silent.converse([Self.get(record.volume)], replies: 1)
            #expect(replies.count == 1)
        }
    }

    @Test func aBrokenStoreIsUnavailable() async throws {
        try await withService { test, record, service in
            try test.store.database.close()
            let client = try await Client(port: service.port)
            let replies = try await client.converse(
                [Self.get(record.volume), Self.swap(record.next(nonce: 1), expected: 1)],
                replies: 2)
            #expect(replies.map(\.header.status) == [.unavailable, .unavailable])
        }
    }
}

/// Sends bytes and collects replies.
private struct Client {
    private let channel: NIOAsyncChannel<ByteBuffer, ByteBuffer>

    init(port: Int) async throws {
        channel = try await ClientBootstrap(group: .singletonMultiThreadedEventLoopGroup)
            .connect(host: "127.0.0.1", port: port) { channel in
                channel.eventLoop.makeCompletedFuture {
                    try NIOAsyncChannel(wrappingChannelSynchronously: channel)
                }
            }
    }

    func converse(_ frames: [RecordFrame], replies: Int) async throws -> [RecordFrame] {
        try await converse(bytes: [frames.flatMap { $0.encoded() }], replies: replies)
    }

    /// Returns after so many replies, or when the server closes.
    func converse(bytes: [[UInt8]], replies: Int) async throws -> [RecordFrame] {
        try await channel.executeThenClose { inbound, outbound in
            for piece in bytes { try await outbound.write(ByteBuffer(bytes: piece)) }
            var received: [UInt8] = []
            var frames: [RecordFrame] = []
            do {
                for try await buffer in inbound {
                    received += buffer.readableBytesView
                    while let frame = try Self.takeReply(&received) { frames.append(frame) }
                    if frames.count >= replies { break }
                }
            } catch let error as IOError {
                // Reset: the server closed with bytes of ours unread.
                guard error.errnoCode == 104 else { throw error }
            }
            return frames
        }
    }

    private static func takeReply(_ bytes: inout [UInt8]) throws -> RecordFrame? {
        guard bytes.count >= FrameHeader.size else { return nil }
        let block = MemoryBlock(count: FrameHeader.size)
        block.memory.copy(from: Array(bytes.prefix(FrameHeader.size)))
        let header = try FrameHeader(decoding: block.memory)
        let size = FrameHeader.size + header.payloadLength
        guard bytes.count >= size else { return nil }
        let table = Array(bytes[FrameHeader.size..<size])
        #expect(header.isReply)
        #expect(checksum(of: table) == header.tableChecksum)
        bytes.removeFirst(size)
        return RecordFrame(header: header, table: table)
    }
}
