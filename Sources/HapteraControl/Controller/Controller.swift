import Foundation
import HapteraAPI
import HapteraCore
import HapteraHost
import Logging

/// Joins what is stored (what is wanted) and what the nodes report (what is), answers requests, and
/// tells each node what it shall run. All durable state is the store's; this can be restarted at
/// any moment and learns the rest from the next reports.
package actor Controller {
    /// A node that was not heard of for this long is not ready.
    package static let nodeSilenceMaxMilliseconds: Int64 = 6000

    package nonisolated let store: MetadataStore
    package nonisolated let changes = ChangeSignal()
    package nonisolated let tasks = AgentTasks()
    /// HOST:PORT under which engines reach the record service.
    package nonisolated let recordService: String
    private nonisolated let logger: Logger
    /// Since when replicas are away, and which volumes' stale replicas cannot be replaced, and why.
    var awayTimes = AwayTimes()
    var problems: [String: String] = [:]
    var attempts = ScheduleAttempts()
    /// Of snapshots of groups that are being taken, by id.
    var groupsUnderWay: Set<String> = []
    /// When those that came to nothing are looked at again.
    var groupsRetryAt: Int64 = 0
    var maintenances = Maintenances()
    var readers = SnapshotReaders()
    var detachedScrubs = DetachedScrubs()
    private var observed: [String: (report: Haptera_V1_NodeReport, seen: Int64)] = [:]
    private let startedMilliseconds: Int64

    package init(store: MetadataStore, recordService: String, logger: Logger) {
        self.store = store
        self.recordService = recordService
        self.logger = logger
        startedMilliseconds = store.clock()
    }

    // MARK: Nodes

    package func register(_ request: Haptera_V1_RegisterNodeRequest) async throws {
        let row = NodeRow(
            name: request.name, nodeID: request.nodeID, address: request.address,
            directory: request.directory, version: request.version, pid: request.pid,
            bootID: request.bootID)
        try await store.registerNode(row)
        // Ready with its first report: before that, its replicas would look dead. What it reported
        // before its restart still stands.
        if let known = observed[row.name] { observed[row.name] = (known.report, store.clock()) }
        changes.notify()
    }

    package func report(_ report: Haptera_V1_NodeReport) async throws {
        try await requireNode(report.name, report.nodeID)
        let previous = observed[report.name]
        observed[report.name] = (report, store.clock())
        let isChanged = try await store.apply(Self.facts(report), from: report.name)
        try await noteTransitions(from: previous?.report, to: report)
        let isSpaceNews = try await noteSpace(of: report.name)
        if isSpaceNews || isChanged || previous?.report != report || !isFresh(previous?.seen) {
            changes.notify()
        }
    }

    package func requireNode(_ name: String, _ nodeID: String) async throws {
        guard try await store.nodes().contains(where: { $0.name == name && $0.nodeID == nodeID })
        else {
            throw ControlError(.precondition, "node '\(name)' is not registered with this id")
        }
    }

    private static func facts(_ report: Haptera_V1_NodeReport) -> ReportedFacts {
        var facts = ReportedFacts()
        facts.replicas = report.replicas.filter { $0.state == .running || $0.state == .removed }
            .map {
                .init(
                    id: $0.replicaID, address: $0.address, directory: $0.directory,
                    isRemoved: $0.state == .removed)
            }
        facts.engines = report.engines.map { engine in
            .init(
                volumeID: engine.volumeID,
                clientGeneration: Int64(clamping: engine.clientGeneration),
                hasServed: engine.state == .serving, isDetached: engine.state == .detached,
                hadRemoteClient: engine.hadRemoteClient,
                scrub: ScrubProgress(text: engine.scrub.progress).map {
                    ScrubFact(progress: $0, isFinished: engine.scrub.state == "finished")
                }, damage: DamageFact(engine))
        }
        return facts
    }

    /// Events for what only a comparison of two reports shows.
    private func noteTransitions(
        from old: Haptera_V1_NodeReport?, to new: Haptera_V1_NodeReport
    ) async throws {
        guard let old else { return }
        let caller = Caller(actor: "node/\(new.name)")
        for replica in new.replicas {
            guard let before = old.replicas.first(where: { $0.replicaID == replica.replicaID }),
                before.state != replica.state || before.restarts < replica.restarts
            else { continue }
            if let kind = Self.replicaEvents[replica.state] {
                try await store.addEvent(
                    kind, "replica/\(replica.replicaID)", replica.reason, by: caller)
            }
        }
        for engine in new.engines {
            if let before = old.engines.first(where: { $0.volumeID == engine.volumeID }),
                before.restarts < engine.restarts
            {
                try await store.addEvent(
                    "EngineRestarted", "engine/\(engine.volumeID)", engine.lastEnding, by: caller)
            }
            guard let before = old.engines.first(where: { $0.volumeID == engine.volumeID }),
                before.clientGeneration == engine.clientGeneration, before.state != engine.state,
                let kind = Self.engineEvents[engine.state]
            else { continue }
            try await store.addEvent(
                kind, "engine/\(engine.volumeID)", engine.reason, by: caller)
        }
    }

    private static let replicaEvents: [Haptera_V1_ReplicaReport.State: String] = [
        .running: "ReplicaRunning", .waiting: "ReplicaStopped", .failed: "ReplicaFailed",
    ]
    private static let engineEvents: [Haptera_V1_EngineReport.State: String] = [
        .serving: "EngineServing", .stalled: "EngineStalled", .waiting: "EngineStopped",
    ]

    package func desired(for node: String, nodeID: String) async throws -> Haptera_V1_DesiredState {
        try await requireNode(node, nodeID)
        let rows = try await store.desired(for: node)
        var message = Haptera_V1_DesiredState()
        message.recordService = recordService
        message.replicas =
            rows.replicas.map { Self.desired($0, of: $1) } + rows.discarded.map(Self.removal)
        message.engines = rows.engines.map(Self.desired) + rows.abandoned.map(Self.end)
        return message
    }

    private static func desired(
        _ replica: ReplicaRow, of volume: VolumeRow
    ) -> Haptera_V1_DesiredReplica {
        var wanted = Haptera_V1_DesiredReplica()
        wanted.volumeID = volume.id
        wanted.volume = volume.name
        wanted.replicaID = replica.id
        wanted.incarnation = replica.incarnation
        wanted.sizeBytes = UInt64(volume.sizeBytes)
        wanted.scratch = volume.isScratch
        wanted.phase =
            switch replica.phase {
            case .create: replica.source == nil ? .create : .clone
            case .run, .leave: .run
            case .remove: .remove
            }
        if wanted.phase == .clone, let source = replica.source, let bytes = volume.firstRecord,
            let layer = volume.cloneRecord?.layers.first
        {
            wanted.cloneSource.replicaID = source
            wanted.cloneSource.layer = layer.rawValue
            wanted.cloneSource.record = bytes
        }
        return wanted
    }

    private static func removal(_ row: DiscardedReplicaRow) -> Haptera_V1_DesiredReplica {
        var wanted = Haptera_V1_DesiredReplica()
        wanted.volumeID = row.volumeID
        wanted.volume = row.volume
        wanted.replicaID = row.id
        wanted.incarnation = row.incarnation
        wanted.sizeBytes = UInt64(row.sizeBytes)
        wanted.phase = .remove
        return wanted
    }

    private static func desired(_ stored: StoredVolume) -> Haptera_V1_DesiredEngine {
        let volume = stored.volume
        var wanted = Haptera_V1_DesiredEngine()
        wanted.volumeID = volume.id
        wanted.volume = volume.name
        wanted.clientGeneration = UInt64(volume.clientGeneration)
        wanted.phase =
            volume.isDetaching ? .detach : volume.isMaintained ? .maintain : .attach
        wanted.minInSync = UInt32(volume.minInSync)
        wanted.ioTimeoutMilliseconds = UInt64(volume.ioTimeoutMilliseconds)
        wanted.leaseMilliseconds = UInt64(volume.leaseMilliseconds)
        wanted.renewMilliseconds = UInt64(volume.settings.renew)
        wanted.removalDeadlineMilliseconds = UInt64(volume.removalDeadlineMilliseconds)
        wanted.acceptLossInstance = UInt64(volume.acceptLossInstance) ?? 0
        wanted.detectZeroes = volume.detectsZeroes
        if let scrub = stored.scrub, !scrub.isFinished { wanted.scrub = scrub.progress }
        wanted.replicas = stored.replicas.filter(stored.isForEngine).map {
            var endpoint = Haptera_V1_ReplicaEndpoint()
            endpoint.replicaID = $0.id
            endpoint.address = $0.address
            return endpoint
        }
        return wanted
    }

    private static func end(_ row: AbandonedEngineRow) -> Haptera_V1_DesiredEngine {
        var wanted = Haptera_V1_DesiredEngine()
        wanted.volumeID = row.volumeID
        wanted.volume = row.volume
        wanted.clientGeneration = UInt64(row.clientGeneration)
        wanted.phase = .detach
        return wanted
    }

    private func isFresh(_ seen: Int64?) -> Bool {
        guard let seen else { return false }
        return store.clock() - seen <= Self.nodeSilenceMaxMilliseconds
    }

    package var observedNodes: [String: ObservedNode] {
        observed.mapValues {
            ObservedNode(
                report: $0.report, lastSeenMilliseconds: $0.seen, isReady: isFresh($0.seen))
        }
    }

    private var readyNodes: [String] {
        observed.filter { isFresh($0.value.seen) }.keys.sorted()
    }
    /// On nodes that are ready.
    private var runningReplicas: Set<String> {
        Set(
            observed.values.filter { isFresh($0.seen) }.flatMap(\.report.replicas)
                .filter { $0.state == .running }.map(\.replicaID))
    }

    // MARK: Volumes

    package func volumes(named name: String? = nil) async throws -> [Haptera_V1_Volume] {
        let stored = try await store.volumes(named: name)
        return stored.map(view)
    }

    package func volume(named name: String) async throws -> Haptera_V1_Volume {
        view(try await store.volume(named: name))
    }

    /// Why the volume is not healthy, for errors; empty if it is.
    func trouble(_ stored: StoredVolume) -> String {
        VolumeView(stored, nodes: observedNodes, problem: problems[stored.volume.name]).trouble
    }

    func view(_ stored: StoredVolume) -> Haptera_V1_Volume {
        var message = VolumeView(
            stored, nodes: observedNodes, problem: problems[stored.volume.name],
            activity: activity(stored.volume)
        ).message
        if message.hasScrub {
            message.scrub.reason = scrubReason(stored, isWaiting: message.scrub.state == .waiting)
        }
        return message
    }

    package func create(_ wanted: VolumeSpecification) async throws -> Haptera_V1_Volume {
        try await knowingNodes {
            try await requireUsableSource(wanted)
            return try changed(
                await store.createVolume(
                    wanted, candidates: readyNodes, running: runningReplicas, spaces: spaces,
                    sourceBytes: try await sourceBytes(wanted.source)))
        }
    }
    /// What a copy of the snapshot takes, as replicas that have it say.
    private func sourceBytes(_ source: CloneSource?) async throws -> UInt64 {
        guard let source, let stored = try await store.volumes(named: source.volume).first,
            let snapshot = stored.record?.snapshot(named: source.snapshot)
        else { return 0 }
        return lineage(stored).cumulative[snapshot.layer] ?? 0
    }
    private func requireUsableSource(_ wanted: VolumeSpecification) async throws {
        guard let source = wanted.source, try await store.volumes(named: wanted.name).isEmpty
        else { return }
        // A controller that has just started takes replicas for dead that have yet to be reported:
        // a clone would get fewer than it should.
        guard try await knowsNodes else {
            throw ControlError(.precondition, "it is not known yet which replicas run")
        }
        // The record names a snapshot before every replica has all of it: its engine knows.
        guard let stored = try await store.volumes(named: source.volume).first,
            stored.volume.phase == .ready, stored.record?.snapshot(named: source.snapshot) != nil
        else { return }
        var request = Haptera_V1_CreateSnapshotRequest()
        request.volume = source.volume
        request.name = source.snapshot
        _ = try await createSnapshot(request)
    }
    package func attach(_ name: String, node: String?) async throws -> Haptera_V1_Volume {
        let volume = try await knowingNodes {
            try changed(await store.attachVolume(name, node: node, ready: Set(readyNodes)))
        }
        // What gives way does so now; if this fails, in the next round.
        if volume.state == .attaching { try? await tendMaintenance(of: name) }
        return volume
    }
    /// A controller that has just started takes nodes for missing that have yet to report to it:
    /// then what they are needed for is not refused; whoever asks shall ask again.
    func knowingNodes<Result>(_ act: () async throws -> Result) async throws -> Result {
        do {
            return try await act()
        } catch let error as ControlError where error.code == .precondition {
            if try await knowsNodes { throw error }
            throw ControlError(
                .unavailable,
                "\(error.message) (the controller has just started; some nodes have yet to report)")
        }
    }
    /// Every node that is there has had the time to say so.
    var knowsNodes: Bool {
        get async throws {
            let age = store.clock() - startedMilliseconds
            if age > Self.nodeSilenceMaxMilliseconds { return true }
            return try await store.nodes().allSatisfy { observed[$0.name] != nil }
        }
    }
    package func detach(
        _ name: String, isForced: Bool = false
    ) async throws -> Haptera_V1_Volume {
        let volume = try await store.volume(named: name).volume
        let isReady = observedNodes[volume.attachedNode ?? ""]?.isReady ?? false
        // In a maintenance it is detached already, and that ends by itself.
        guard isForced, !volume.isMaintained || !isReady else {
            return try changed(await store.detachVolume(name))
        }
        return try changed(await store.abandonAttachment(name, isNodeReady: isReady))
    }
    package func update(
        _ name: String, _ settings: Haptera_V1_VolumeSettings
    ) async throws -> Haptera_V1_Volume {
        try changed(await store.updateVolume(name, settings))
    }
    package func label(
        _ name: String, set: [String: String], remove: [String]
    ) async throws -> Haptera_V1_Volume {
        try changed(await store.labelVolume(name, set: set, remove: remove))
    }
    static func selector(_ text: String) throws(ControlError) -> LabelSelector {
        do {
            return try LabelSelector(text)
        } catch {
            throw ControlError(.invalid, error.message)
        }
    }
    /// `instance`: the engine process whose question the caller has seen.
    package func acceptLoss(_ name: String, instance: UInt64) async throws -> Haptera_V1_Volume {
        let now = view(try await store.volume(named: name))
        guard now.decisionInstance != 0 else {
            throw ControlError(
                .precondition,
                "the engine of volume '\(name)' does not wait for a decision; see 'storagectl "
                    + "volume show \(name)'")
        }
        guard now.decisionInstance == instance else {
            throw ControlError(
                .precondition,
                "the engine of volume '\(name)' was started again meanwhile; look again")
        }
        return try changed(await store.acceptLoss(name, instance: instance, question: now.reason))
    }
    func changed(_ stored: StoredVolume) -> Haptera_V1_Volume {
        logger.info("volume changed", metadata: ["volume": "\(stored.volume.name)"])
        changes.notify()
        return view(stored)
    }
}
