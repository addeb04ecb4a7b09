import Foundation
import GRPCCore
import GRPCNIOTransportHTTP2Posix
import HapteraHost
import Logging
import ServiceLifecycle
import UnixSignals

/// Everything `haptera-controller` does, from checked arguments to an orderly end.
package struct ControllerProcess: Sendable {
    package var directory: String
    package var listen: (host: String, port: Int)
    package var records: (host: String, port: Int)
    /// Under which engines on other hosts reach `records`; HOST:PORT.
    package var advertisedRecords: String?

    package init(
        directory: String, listen: (host: String, port: Int), records: (host: String, port: Int),
        advertisedRecords: String?
    ) {
        self.directory = directory
        self.listen = listen
        self.records = records
        self.advertisedRecords = advertisedRecords
    }

    /// Serves until SIGTERM or SIGINT.
    package func run(logger: Logger) async throws {
        let directory = HostFiles.absolute(directory)
        let lock = try DirectoryLock(directory)
        defer { withExtendedLifetime(lock) {} }
        let store = try MetadataStore(path: directory + "/haptera.sqlite")
        let advertised =
            advertisedRecords ?? Names.endpoint(host: records.host, port: records.port)
        let controller = Controller(store: store, recordService: advertised, logger: logger)
        let recordService = try await RecordService(
            store: store, changes: controller.changes, host: records.host, port: records.port,
            logger: logger)
        let api = try GRPCService(controller: controller, host: listen.host, port: listen.port)
        logger.info(
            "controller serves",
            metadata: [
                "listen": "\(Names.endpoint(host: listen.host, port: listen.port))",
                "records": "\(advertised)", "directory": "\(directory)",
                "version": "\(HapteraVersion.text)",
            ])
        let group = ServiceGroup(
            configuration: .init(
                services: [
                    .init(service: recordService), .init(service: api),
                    .init(service: Ticker(changes: controller.changes)),
                    .init(
                        service: PeriodicLoop(name: "upkeep", logger: logger) {
                            try await controller.upkeep()
                        }),
                    .init(
                        service: PeriodicLoop(name: "ending maintenance", logger: logger) {
                            try await controller.tendMaintenances()
                        }),
                    .init(
                        service: PeriodicLoop(name: "scrubs", logger: logger) {
                            try await controller.tendScrubs()
                        }),
                    .init(
                        service: PeriodicLoop(name: "telling of damage", logger: logger) {
                            try await controller.store.tellDamage()
                        }),
                    .init(
                        service: PeriodicLoop(name: "schedules", logger: logger) {
                            try await controller.runSchedules()
                        }),
                    .init(
                        service: PeriodicLoop(name: "undoing groups", logger: logger) {
                            try await controller.undoGroups()
                        }),
                ],
                gracefulShutdownSignals: [.sigterm, .sigint], logger: logger))
        try await group.run()
        logger.info("controller stopped")
    }
}

/// The gRPC API as a service of the process.
package struct GRPCService: Service {
    private let server: GRPCServer<HTTP2ServerTransport.Posix>
    private let changes: ChangeSignal
    private let tasks: AgentTasks

    package init(controller: Controller, host: String, port: Int) throws {
        // The transport takes addresses, not names; `localhost` is the one name worth knowing.
        let address: GRPCNIOTransportCore.SocketAddress =
            host.contains(":")
            ? .ipv6(host: host, port: port)
            : .ipv4(host: host == "localhost" ? "127.0.0.1" : host, port: port)
        changes = controller.changes
        tasks = controller.tasks
        server = GRPCServer(
            transport: .http2NIOPosix(address: address, transportSecurity: .plaintext),
            services: [
                VolumeService(controller: controller), AgentService(controller: controller),
                ClusterService(controller: controller), ScheduleService(controller: controller),
                HealthService(controller: controller),
            ],
            interceptors: [CallerInterceptor()])
    }

    /// Returns once the server listens; then `port` is known.
    package var port: Int? {
        get async throws { try await server.listeningAddress?.ipv4?.port }
    }

    package func run() async throws {
        try await withGracefulShutdownHandler {
            try await server.serve()
        } onGracefulShutdown: {
            // Watches never end by themselves.
            changes.finish()
            Task { await tasks.finish() }
            server.beginGracefulShutdown()
        }
    }
}

/// Something the controller looks after by itself, round after round.
struct PeriodicLoop: Service {
    static let period = Duration.seconds(1)
    /// For the log.
    let name: String
    let logger: Logger
    let round: @Sendable () async throws -> Void

    func run() async throws {
        await cancelWhenGracefulShutdown {
            while !Task.isCancelled {
                do {
                    try await round()
                } catch {
                    logger.error("\(name) failed", metadata: ["reason": "\(error)"])
                }
                try? await Task.sleep(for: Self.period)
            }
        }
    }
}

/// Wakes the watchers regularly: nodes fall silent without telling, and agents get their complete
/// desired state again.
struct Ticker: Service {
    static let period = Duration.seconds(2)
    let changes: ChangeSignal

    func run() async throws {
        await cancelWhenGracefulShutdown {
            while !Task.isCancelled {
                try? await Task.sleep(for: Self.period)
                changes.notify()
            }
        }
    }
}
