import HapteraCore
import HapteraHost
import Logging
import NIOCore
import NIOPosix
import ServiceLifecycle
import Synchronization

/// The TCP server through which engines read and swap volume records: frames of `FrameHeader`,
/// kinds getRecord, compareAndSwap and ping. Requests of one connection are answered in their
/// order; while some wait for it nothing more is read, so a peer costs one receive buffer and one
/// frame.
package struct RecordService: Service {
    /// Connections at once. Each engine holds one.
    package static let connectionsMax = 4096

    private let store: MetadataStore
    private let server: NIOAsyncChannel<NIOAsyncChannel<RecordFrame, ByteBuffer>, Never>
    private let changes: ChangeSignal
    private let logger: Logger

    package var port: Int { server.channel.localAddress?.port ?? 0 }

    /// Binds, so that a port in use is reported before anything else starts. `partialFrameLimit`:
    /// what a peer may take to complete a frame it has begun.
    package init(
        store: MetadataStore, changes: ChangeSignal, host: String, port: Int, logger: Logger,
        partialFrameLimit: TimeAmount = .seconds(10)
    ) async throws {
        self.store = store
        self.changes = changes
        self.logger = logger
        let connections = ConnectionCount()
        server = try await ServerBootstrap(group: .singletonMultiThreadedEventLoopGroup)
            .serverChannelOption(.backlog, value: 256)
            .serverChannelOption(.socketOption(.so_reuseaddr), value: 1)
            .childChannelOption(.tcpOption(.tcp_nodelay), value: 1)
            .childChannelOption(.socketOption(.so_keepalive), value: 1)
            .bind(host: host, port: port) { channel in
                channel.eventLoop.makeCompletedFuture {
                    guard connections.increase(below: Self.connectionsMax) else {
                        throw HostError("too many connections")
                    }
                    channel.closeFuture.whenComplete { _ in connections.decrease() }
                    try channel.pipeline.syncOperations.addHandler(
                        RecordFrameHandler(timeLimit: partialFrameLimit))
                    return try NIOAsyncChannel(
                        wrappingChannelSynchronously: channel,
                        configuration: .init(
                            backPressureStrategy: .init(lowWatermark: 1, highWatermark: 2)))
                }
            }
    }

    package func run() async throws {
        try await withGracefulShutdownHandler {
            try await server.executeThenClose { inbound in
                try await withThrowingDiscardingTaskGroup { group in
                    for try await connection in inbound {
                        group.addTask { await serve(connection) }
                    }
                }
            }
        } onGracefulShutdown: {
            server.channel.close(promise: nil)
        }
    }

    private func serve(_ connection: NIOAsyncChannel<RecordFrame, ByteBuffer>) async {
        let peer = connection.channel.remoteAddress.map { "\($0)" } ?? "unknown"
        do {
            try await connection.executeThenClose { inbound, outbound in
                await cancelWhenGracefulShutdown {
                    do {
                        for try await frame in inbound {
                            let reply = await store.answer(frame)
                            try await outbound.write(ByteBuffer(bytes: reply.encoded()))
                            if frame.header.kind == .compareAndSwap, reply.header.status == .ok {
                                changes.notifySoon()
                            }
                        }
                    } catch {
                        logger.notice(
                            "record connection closed",
                            metadata: ["peer": "\(peer)", "reason": "\(error)"])
                    }
                }
            }
        } catch {
            logger.debug(
                "record connection failed", metadata: ["peer": "\(peer)", "reason": "\(error)"])
        }
    }
}

/// A bounded count shared by the event loops.
private final class ConnectionCount: Sendable {
    private let value = Mutex(0)
    func increase(below limit: Int) -> Bool {
        value.withLock { value in
            guard value < limit else { return false }
            value += 1
            return true
        }
    }
    func decrease() { value.withLock { $0 -= 1 } }
}

/// Cuts what arrives into frames, and closes a connection on which a frame was begun and not
/// completed in time. Only time in which we were ready to read counts: while earlier requests are
/// being answered nothing is read, and that is not the peer's doing. An engine's connection is
/// otherwise silent while its volume is healthy.
private final class RecordFrameHandler: ChannelDuplexHandler {
    typealias InboundIn = ByteBuffer
    typealias InboundOut = RecordFrame
    typealias OutboundIn = ByteBuffer
    typealias OutboundOut = ByteBuffer

    private let processor = NIOSingleStepByteToMessageProcessor(
        RecordFrameDecoder(),
        maximumBufferSize: FrameHeader.size + FrameHeader.recordTableLengthMax)
    private let timeLimit: TimeAmount
    /// What is left of the limit for the frame that has begun.
    private var timeLeft: TimeAmount
    private var readingSince: NIODeadline?
    private var timeout: Scheduled<Void>?

    init(timeLimit: TimeAmount) {
        self.timeLimit = timeLimit
        timeLeft = timeLimit
    }

    func read(context: ChannelHandlerContext) {
        if readingSince == nil {
            readingSince = .now()
            if processor.unprocessedBytes > 0 {
                let channel = context.channel
                timeout = context.eventLoop.scheduleTask(in: timeLeft) {
                    channel.close(promise: nil)
                }
            }
        }
        context.read()
    }

    func channelRead(context: ChannelHandlerContext, data: NIOAny) {
        timeout?.cancel()
        timeout = nil
        let wasPartial = processor.unprocessedBytes > 0
        if wasPartial, let readingSince { timeLeft = timeLeft - (.now() - readingSince) }
        readingSince = nil
        do {
            try processor.process(buffer: unwrapInboundIn(data)) { frame in
                timeLeft = timeLimit
                context.fireChannelRead(wrapInboundOut(frame))
            }
        } catch {
            context.fireErrorCaught(error)
            context.close(promise: nil)
        }
    }

    func channelInactive(context: ChannelHandlerContext) {
        timeout?.cancel()
        context.fireChannelInactive()
    }
}
