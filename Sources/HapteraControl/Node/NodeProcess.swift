import Foundation
import GRPCCore
import GRPCNIOTransportHTTP2Posix
import HapteraAPI
import HapteraHost
import Logging
import ServiceLifecycle
import UnixSignals

/// Everything `haptera-node` does, from checked arguments to an orderly end. Its end leaves engines
/// and replicas running; the next start adopts them.
package struct NodeProcess: Sendable {
    package var controller: (host: String, port: Int)
    package var name: String
    package var directory: String
    package var address: String
    package var ports: ClosedRange<Int>

    package init(
        controller: (host: String, port: Int), name: String, directory: String, address: String,
        ports: ClosedRange<Int>
    ) {
        self.controller = controller
        self.name = name
        self.directory = directory
        self.address = address
        self.ports = ports
    }

    package func run(logger: Logger) async throws {
        let directory = HostFiles.absolute(directory)
        try UnixSocketPath.check(directory + "/run")
        let lock = try DirectoryLock(directory)
        defer { withExtendedLifetime(lock) {} }
        let context = NodeContext(
            host: RealProcessHost(), directory: directory, address: address, ports: ports,
            replicaProgram: try Programs.find("haptera-replica"),
            engineProgram: try Programs.find("haptera-engine"))
        let agent = try NodeAgent(context, logger: logger)
        await agent.resume()
        var identity = Haptera_V1_RegisterNodeRequest()
        identity.name = name
        identity.nodeID = try Self.nodeID(directory)
        identity.address = address
        identity.directory = directory
        identity.version = HapteraVersion.text
        identity.pid = ProcessInfo.processInfo.processIdentifier
        identity.bootID = ProcessIdentity.currentBootID
        let link = NodeLink(
            agent: agent, identity: identity, controller: controller, logger: logger)
        logger.info(
            "node agent runs", metadata: ["node": "\(name)", "directory": "\(directory)"])
        let group = ServiceGroup(
            configuration: .init(
                services: [
                    .init(service: SupervisionLoop(agent: agent)), .init(service: link),
                    .init(service: RemovalLoop(agent: agent)),
                ],
                gracefulShutdownSignals: [.sigterm, .sigint], logger: logger))
        try await group.run()
        logger.info("node agent stopped; engines and replicas go on")
    }

    /// Chosen at the first start and kept.
    static func nodeID(_ directory: String) throws -> String {
        let path = directory + "/node-id"
        if let data = FileManager.default.contents(atPath: path) {
            return String(decoding: data, as: UTF8.self)
                .trimmingCharacters(in: .whitespacesAndNewlines)
        }
        let random = String(UInt64.random(in: .min ... .max), radix: 16)
        let id = String(repeating: "0", count: 16 - random.count) + random
        try HostFiles.replace(path, with: Data((id + "\n").utf8))
        return id
    }
}

/// Lets the units act several times a second.
struct SupervisionLoop: Service {
    static let period = Duration.milliseconds(200)
    let agent: NodeAgent

    func run() async throws {
        await cancelWhenGracefulShutdown {
            while !Task.isCancelled {
                _ = await agent.step(now: Self.now)
                try? await Task.sleep(for: Self.period)
            }
        }
    }

    /// Milliseconds of a clock that only goes forward.
    static var now: Int64 { Int64(DispatchTime.now().uptimeNanoseconds / 1_000_000) }
}

/// Deletes what removals have left, when the agent starts and every hour.
struct RemovalLoop: Service {
    static let period = Duration.seconds(3600)
    let agent: NodeAgent

    func run() async throws {
        await cancelWhenGracefulShutdown {
            while !Task.isCancelled {
                await agent.sweepRemoved()
                try? await Task.sleep(for: Self.period)
            }
        }
    }
}

/// The agent's connection to the controller: introduces the node, takes the desired state, reports.
/// After any failure it starts over, for ever; meanwhile the agent goes on with what it knows.
struct NodeLink: Service {
    static let retryPeriod = Duration.milliseconds(500)
    static let reportPeriod = Duration.milliseconds(250)
    /// A report is sent at least this often, as a sign of life.
    static let reportsUnchangedMax = 6
    let agent: NodeAgent
    let identity: Haptera_V1_RegisterNodeRequest
    let controller: (host: String, port: Int)
    let logger: Logger

    func run() async throws {
        await cancelWhenGracefulShutdown {
            var lastError = ""
            while !Task.isCancelled {
                do {
                    try await converse()
                } catch is CancellationError {
                    return
                } catch {
                    if "\(error)" != lastError {
                        lastError = "\(error)"
                        logger.warning(
                            "no controller", metadata: ["reason": "\(error)"])
                    }
                }
                try? await Task.sleep(for: Self.retryPeriod)
            }
        }
    }

    private static var callOptions: CallOptions {
        var options = CallOptions.defaults
        options.timeout = .seconds(5)
        options.waitForReady = false
        return options
    }

    private func converse() async throws {
        var config = HTTP2ClientTransport.Posix.Config.defaults
        config.backoff = .init(
            initial: .milliseconds(100), max: .seconds(1), multiplier: 1.6, jitter: 0.2)
        try await withGRPCClient(
            transport: .http2NIOPosix(
                target: .dns(host: controller.host, port: controller.port),
                transportSecurity: .plaintext, config: config)
        ) { client in
            let service = Haptera_V1_AgentService.Client(wrapping: client)
            let options = Self.callOptions
            _ = try await service.registerNode(identity, options: options)
            logger.info("registered with the controller")
            try await withThrowingTaskGroup(of: Void.self) { group in
                group.addTask { try await takeDesiredState(service) }
                group.addTask { try await report(service, options) }
                group.addTask { try await takeTasks(service, options) }
                // Neither ends but by an error, or because the controller stops.
                try await group.next()
                group.cancelAll()
            }
        }
    }

    private func takeDesiredState(
        _ service: Haptera_V1_AgentService.Client<HTTP2ClientTransport.Posix>
    ) async throws {
        var request = Haptera_V1_WatchDesiredStateRequest()
        request.name = identity.name
        request.nodeID = identity.nodeID
        try await service.watchDesiredState(request) { response in
            for try await message in response.messages { try await agent.want(message) }
        }
    }

    /// Tasks run beside each other: one that takes long holds up none.
    private func takeTasks(
        _ service: Haptera_V1_AgentService.Client<HTTP2ClientTransport.Posix>,
        _ options: CallOptions
    ) async throws {
        var request = Haptera_V1_WatchDesiredStateRequest()
        request.name = identity.name
        request.nodeID = identity.nodeID
        try await service.watchTasks(request) { response in
            try await withThrowingDiscardingTaskGroup { group in
                for try await task in response.messages {
                    group.addTask {
                        var answer = await agent.perform(task)
                        answer.name = identity.name
                        answer.nodeID = identity.nodeID
                        _ = try await service.answer(answer, options: options)
                    }
                }
            }
        }
    }

    private func report(
        _ service: Haptera_V1_AgentService.Client<HTTP2ClientTransport.Posix>,
        _ options: CallOptions
    ) async throws {
        var sent: Haptera_V1_NodeReport?
        var unchanged = 0
        while !Task.isCancelled {
            let report = await agent.report(name: identity.name, nodeID: identity.nodeID)
            unchanged += 1
            if !Self.saysTheSame(report, sent) || unchanged >= Self.reportsUnchangedMax {
                _ = try await service.reportStatus(report, options: options)
                sent = report
                unchanged = 0
            }
            try await Task.sleep(for: Self.reportPeriod)
        }
    }

    /// Free space changes all the time and is no news.
    private static func saysTheSame(
        _ report: Haptera_V1_NodeReport, _ sent: Haptera_V1_NodeReport?
    ) -> Bool {
        guard var sent else { return false }
        sent.availableBytes = report.availableBytes
        return sent == report
    }
}
