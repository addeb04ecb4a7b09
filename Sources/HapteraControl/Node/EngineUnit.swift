import HapteraAPI
import HapteraCore
import HapteraHost

/// Runs one engine from attach to detach.
package actor EngineUnit {
    private let context: NodeContext
    private var wanted: Haptera_V1_DesiredEngine
    private var recordService: String
    private var supervision: Supervision
    private var settings: UnitSettings
    /// The replica list the running engine was told last; nil after an adoption.
    private var told: [Haptera_V1_ReplicaEndpoint]?
    private var failure = ""
    private var isBusy = false

    /// An engine answers `detach` when it has flushed.
    static let detachTimeoutSeconds = 60

    package init(
        _ wanted: Haptera_V1_DesiredEngine, recordService: String, _ context: NodeContext
    ) {
        self.wanted = wanted
        self.recordService = recordService
        self.context = context
        let files = UnitFiles(run: context.run, prefix: "e", id: wanted.volumeID)
        supervision = Supervision(files: files)
        settings = files.loadSettings()
    }

    package func want(_ wanted: Haptera_V1_DesiredEngine, recordService: String) {
        self.wanted = wanted
        self.recordService = recordService
    }

    package func step(now: Int64) async {
        guard !isBusy else { return }
        isBusy = true
        defer { isBusy = false }
        if supervision.mustAdopt {
            let answer = try? await context.host.request(
                supervision.files.control, "status", timeoutSeconds: 2)
            supervision.adopt(context.host, answer: answer, now: now)
        }
        supervision.observe(context.host, now: now)
        do {
            switch wanted.phase {
            case .attach: try await serve(now: now)
            case .detach: try await detach(now: now)
            case .unspecified, .UNRECOGNIZED: return
            }
            failure = ""
        } catch {
            failure = "\(error)"
        }
    }

    private var isOfThisAttachment: Bool {
        settings.clientGeneration == wanted.clientGeneration
    }

    private func serve(now: Int64) async throws {
        if !isOfThisAttachment {
            // An engine of an earlier attachment must be gone before this one's is started.
            guard !supervision.isRunning else { return try await leave(now: now) }
            settings.port = try context.host.findPort(at: context.address, in: context.ports)
            settings.clientGeneration = wanted.clientGeneration
            settings.isDetached = false
            try supervision.files.save(settings)
        }
        guard !settings.isDetached else { return }
        if !supervision.isRunning { start(now: now) }
        guard supervision.isRunning else { return }
        if supervision.isPollDue(now: now, isSettling: supervision.status["state"] != "serving") {
            let values = try? await context.host.request(
                supervision.files.control, "status", timeoutSeconds: 2)
            supervision.polled(values, now: now)
        }
        try await tellReplicas()
    }

    private func start(now: Int64) {
        guard supervision.backoff.mayStart(now: now) else { return }
        var arguments = [
            "--volume", wanted.volume, "--volume-id", wanted.volumeID, "--store", recordService,
            "--nbd", Names.endpoint(host: context.address, port: settings.port), "--nbd-unix",
            supervision.files.nbdSocket, "--control", supervision.files.control,
            "--client-generation", "\(wanted.clientGeneration)",
        ]
        for replica in wanted.replicas {
            arguments += ["--replica", "\(replica.replicaID)=\(replica.address)"]
        }
        let replicas = wanted.replicas
        supervision.start(context.host, context.engineProgram, arguments, now: now)
        if supervision.isRunning { told = replicas }
    }

    private func tellReplicas() async throws {
        let replicas = wanted.replicas
        guard told != replicas, !supervision.status.isEmpty else { return }
        let list = replicas.map { "\($0.replicaID)=\($0.address)" }.joined(separator: ",")
        _ = try await context.host.request(
            supervision.files.control, "replicas list=\(list)", timeoutSeconds: 5)
        told = replicas
    }

    private func detach(now: Int64) async throws {
        if settings.isDetached, isOfThisAttachment, !supervision.isRunning { return }
        guard !supervision.isRunning else { return try await leave(now: now) }
        settings.clientGeneration = wanted.clientGeneration
        settings.isDetached = true
        try supervision.files.save(settings)
    }

    /// Asks the engine to leave in order; the next rounds see it gone. Never killed: it may hold
    /// acknowledged writes that wait for a flush.
    private func leave(now: Int64) async throws {
        _ = try await context.host.request(
            supervision.files.control, "detach", timeoutSeconds: Self.detachTimeoutSeconds)
    }

    var process: ProcessIdentity? { supervision.process }

    /// True once the controller may forget the attachment and we the unit.
    package var isDetached: Bool {
        settings.isDetached && isOfThisAttachment && !supervision.isRunning
    }

    /// Nobody asks for it any more: only its log stays.
    package func forget() { supervision.files.removeAllButLog() }

    package var report: Haptera_V1_EngineReport {
        let status = supervision.status
        var report = Haptera_V1_EngineReport()
        report.volumeID = wanted.volumeID
        report.clientGeneration = wanted.clientGeneration
        report.pid = supervision.process?.pid ?? 0
        report.restarts = supervision.backoff.restarts
        report.uri = status["uri"] ?? ""
        report.unixUri = status["unixURI"] ?? ""
        report.epoch = status["epoch"].flatMap { UInt64($0) } ?? 0
        report.connections = status["connections"].flatMap { UInt32($0) } ?? 0
        report.rebuildDone = status["rebuildDone"].flatMap { UInt64($0) } ?? 0
        report.rebuildTotal = status["rebuildTotal"].flatMap { UInt64($0) } ?? 0
        report.reason = status["reason"] ?? (failure.isEmpty ? supervision.reason : failure)
        report.replicas = status.filter { $0.key.hasPrefix("replica.") }
            .sorted { $0.key < $1.key }
            .map { key, value in
                var replica = Haptera_V1_EngineReplicaReport()
                replica.replicaID = String(key.dropFirst("replica.".count))
                replica.state = value
                return replica
            }
        report.state = state
        return report
    }

    private var state: Haptera_V1_EngineReport.State {
        if isDetached { return .detached }
        guard isOfThisAttachment, supervision.isRunning else {
            return supervision.reason.isEmpty ? .starting : .waiting
        }
        switch supervision.status["state"] {
        case "serving": return .serving
        case "stalled": return .stalled
        default: return .starting
        }
    }
}
