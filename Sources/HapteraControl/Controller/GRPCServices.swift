import GRPCCore
import HapteraAPI
import HapteraCore
import HapteraHost

/// Notes who calls, for the audit fields of events: the name the client gives of itself and the
/// address it calls from. Turns unexpected errors into ones that say something.
struct CallerInterceptor: ServerInterceptor {
    static let actorKey = "haptera-actor"

    func intercept<Input: Sendable, Output: Sendable>(
        request: StreamingServerRequest<Input>, context: ServerContext,
        next:
            @Sendable (StreamingServerRequest<Input>, ServerContext) async throws ->
            StreamingServerResponse<Output>
    ) async throws -> StreamingServerResponse<Output> {
        let name = request.metadata[stringValues: Self.actorKey].first { _ in true } ?? "unknown"
        let printable = name.unicodeScalars.filter { $0.value > 31 && $0.value != 127 }.prefix(128)
        let caller = Caller(
            actor: String(String.UnicodeScalarView(printable)), peer: context.remotePeer)
        return try await Caller.$current.withValue(caller) {
            do {
                return try await next(request, context)
            } catch let error as any RPCErrorConvertible {
                throw RPCError(error)
            } catch {
                throw RPCError(code: .internalError, message: "the metadata store failed: \(error)")
            }
        }
    }
}

struct VolumeService: Haptera_V1_VolumeService.SimpleServiceProtocol {
    let controller: Controller

    func createVolume(
        request: Haptera_V1_CreateVolumeRequest, context: ServerContext
    ) async throws -> Haptera_V1_Volume {
        try await controller.create(try VolumeSpecification(request))
    }

    func labelVolume(
        request: Haptera_V1_LabelVolumeRequest, context: ServerContext
    ) async throws -> Haptera_V1_Volume {
        try await controller.label(
            try checked(request.name), set: request.set, remove: request.remove)
    }

    func updateVolume(
        request: Haptera_V1_UpdateVolumeRequest, context: ServerContext
    ) async throws -> Haptera_V1_Volume {
        try await controller.update(try checked(request.name), request.settings)
    }

    func getVolume(
        request: Haptera_V1_GetVolumeRequest, context: ServerContext
    ) async throws -> Haptera_V1_Volume {
        try await controller.volume(named: try checked(request.name))
    }

    func listVolumes(
        request: Haptera_V1_ListVolumesRequest, context: ServerContext
    ) async throws -> Haptera_V1_ListVolumesResponse {
        try await list(request)
    }

    func watchVolumes(
        request: Haptera_V1_ListVolumesRequest,
        response: RPCWriter<Haptera_V1_ListVolumesResponse>, context: ServerContext
    ) async throws {
        var sent: Haptera_V1_ListVolumesResponse?
        for await _ in controller.changes.watch() {
            let now = try await list(request)
            guard now != sent else { continue }
            try await response.write(now)
            sent = now
        }
    }

    private func list(
        _ request: Haptera_V1_ListVolumesRequest
    ) async throws -> Haptera_V1_ListVolumesResponse {
        let name = request.name.isEmpty ? nil : try checked(request.name)
        var response = Haptera_V1_ListVolumesResponse()
        let selector = try Controller.selector(request.selector)
        response.volumes = try await controller.volumes(named: name)
            .filter { selector.matches($0.labels) }
        return response
    }

    func attachVolume(
        request: Haptera_V1_AttachVolumeRequest, context: ServerContext
    ) async throws -> Haptera_V1_Volume {
        let node = request.node.isEmpty ? nil : try checked(request.node, "node")
        return try await controller.attach(try checked(request.name), node: node)
    }

    func detachVolume(
        request: Haptera_V1_DetachVolumeRequest, context: ServerContext
    ) async throws -> Haptera_V1_Volume {
        try await controller.detach(try checked(request.name), isForced: request.force)
    }

    func deleteVolume(
        request: Haptera_V1_DeleteVolumeRequest, context: ServerContext
    ) async throws -> Haptera_V1_DeleteVolumeResponse {
        try await controller.delete(try checked(request.name))
        return Haptera_V1_DeleteVolumeResponse()
    }

    func replaceReplica(
        request: Haptera_V1_ReplaceReplicaRequest, context: ServerContext
    ) async throws -> Haptera_V1_Volume {
        let node = request.node.isEmpty ? nil : try checked(request.node, "node")
        return try await controller.replace(
            request.replicaID, of: try checked(request.volume), node: node)
    }

    func deleteReplica(
        request: Haptera_V1_DeleteReplicaRequest, context: ServerContext
    ) async throws -> Haptera_V1_Volume {
        try await controller.deleteReplica(
            request.replicaID, of: try checked(request.volume), discardKept: request.discardKept)
    }

    func acceptLoss(
        request: Haptera_V1_AcceptLossRequest, context: ServerContext
    ) async throws -> Haptera_V1_Volume {
        try await controller.acceptLoss(try checked(request.name), instance: request.instance)
    }

    func listReplicas(
        request: Haptera_V1_ListReplicasRequest, context: ServerContext
    ) async throws -> Haptera_V1_ListReplicasResponse {
        var response = Haptera_V1_ListReplicasResponse()
        if request.volume.isEmpty {
            response.replicas = try await controller.volumes().flatMap(\.replicas)
        } else {
            response.replicas = try await controller.volume(named: try checked(request.volume))
                .replicas
        }
        return response
    }
}

extension VolumeService {
    func explainVolume(
        request: Haptera_V1_ExplainVolumeRequest, context: ServerContext
    ) async throws -> Haptera_V1_VolumeExplanation {
        try await controller.explain(try checked(request.name), all: request.all)
    }

    func salvageVolume(
        request: Haptera_V1_SalvageVolumeRequest, context: ServerContext
    ) async throws -> Haptera_V1_SalvageVolumeResponse {
        _ = try checked(request.name)
        return try await controller.salvage(request)
    }

    func rejoinReplica(
        request: Haptera_V1_ReplicaRequest, context: ServerContext
    ) async throws -> Haptera_V1_Volume {
        _ = try checked(request.volume)
        return try await controller.rejoin(request)
    }
}

extension VolumeService {
    func createSnapshot(
        request: Haptera_V1_CreateSnapshotRequest, context: ServerContext
    ) async throws -> Haptera_V1_Snapshot {
        _ = try checked(request.volume)
        return try await controller.createSnapshot(request)
    }

    func listSnapshots(
        request: Haptera_V1_ListSnapshotsRequest, context: ServerContext
    ) async throws -> Haptera_V1_ListSnapshotsResponse {
        var response = Haptera_V1_ListSnapshotsResponse()
        response.snapshots = try await controller.snapshots(
            of: try checked(request.volume), selector: request.selector)
        return response
    }

    func readSnapshot(
        request: Haptera_V1_ReadSnapshotRequest, context: ServerContext
    ) async throws -> Haptera_V1_Snapshot {
        _ = try checked(request.volume)
        return try await controller.readSnapshot(request)
    }

    func labelSnapshot(
        request: Haptera_V1_LabelSnapshotRequest, context: ServerContext
    ) async throws -> Haptera_V1_Snapshot {
        _ = try checked(request.volume)
        return try await controller.labelSnapshot(request)
    }

    func getSnapshot(
        request: Haptera_V1_GetSnapshotRequest, context: ServerContext
    ) async throws -> Haptera_V1_Snapshot {
        try await controller.snapshot(request.name, of: try checked(request.volume))
    }

    func deleteSnapshot(
        request: Haptera_V1_DeleteSnapshotRequest, context: ServerContext
    ) async throws -> Haptera_V1_DeleteSnapshotResponse {
        _ = try checked(request.volume)
        try await controller.deleteSnapshot(request)
        return Haptera_V1_DeleteSnapshotResponse()
    }

    func createGroupSnapshot(
        request: Haptera_V1_CreateGroupSnapshotRequest, context: ServerContext
    ) async throws -> Haptera_V1_CreateGroupSnapshotResponse {
        for volume in request.volumes { _ = try checked(volume) }
        var response = Haptera_V1_CreateGroupSnapshotResponse()
        response.snapshots = try await controller.createGroupSnapshot(request)
        return response
    }

    func revertVolume(
        request: Haptera_V1_RevertVolumeRequest, context: ServerContext
    ) async throws -> Haptera_V1_Snapshot {
        _ = try checked(request.volume)
        return try await controller.revertVolume(request)
    }

    func resizeVolume(
        request: Haptera_V1_ResizeVolumeRequest, context: ServerContext
    ) async throws -> Haptera_V1_Volume {
        _ = try checked(request.name)
        return try await controller.resizeVolume(request)
    }

    func scrubVolume(
        request: Haptera_V1_ScrubVolumeRequest, context: ServerContext
    ) async throws -> Haptera_V1_Volume {
        _ = try checked(request.name)
        return try await controller.scrubVolume(request)
    }
}

extension ClusterService {
    func reconstructStore(
        request: Haptera_V1_ReconstructStoreRequest, context: ServerContext
    ) async throws -> Haptera_V1_ReconstructStoreResponse {
        if !request.volume.isEmpty { _ = try checked(request.volume) }
        return try await controller.reconstruct(request)
    }

    func injectVolumeFault(
        request: Haptera_V1_InjectVolumeFaultRequest, context: ServerContext
    ) async throws -> Haptera_V1_InjectVolumeFaultResponse {
        try await controller.injectFault(request, volume: try checked(request.volume))
        return Haptera_V1_InjectVolumeFaultResponse()
    }
}

/// A name that could exist, or an error that says what names look like.
private func checked(_ name: String, _ noun: String = "volume") throws -> String {
    guard Names.isValidLabel(name) else {
        throw ControlError(
            .invalid, "'\(name.prefix(100))' is no \(noun) name: use \(Names.labelRule)")
    }
    return name
}

struct AgentService: Haptera_V1_AgentService.SimpleServiceProtocol {
    let controller: Controller

    func registerNode(
        request: Haptera_V1_RegisterNodeRequest, context: ServerContext
    ) async throws -> Haptera_V1_RegisterNodeResponse {
        try await controller.register(request)
        var response = Haptera_V1_RegisterNodeResponse()
        response.clusterID = try await controller.store.clusterID()
        return response
    }

    func watchDesiredState(
        request: Haptera_V1_WatchDesiredStateRequest,
        response: RPCWriter<Haptera_V1_DesiredState>, context: ServerContext
    ) async throws {
        // Sent even when nothing changed: the agent's complete check against what it has.
        for await _ in controller.changes.watch() {
            try await response.write(
                try await controller.desired(for: request.name, nodeID: request.nodeID))
        }
    }

    func watchTasks(
        request: Haptera_V1_WatchDesiredStateRequest, response: RPCWriter<Haptera_V1_AgentTask>,
        context: ServerContext
    ) async throws {
        try await controller.requireNode(request.name, request.nodeID)
        for await task in await controller.tasks.watch(request.name, nodeID: request.nodeID) {
            try await response.write(task)
        }
    }

    func answer(
        request: Haptera_V1_AgentAnswer, context: ServerContext
    ) async throws -> Haptera_V1_AnswerResponse {
        // Who took the task has shown which node it is; the store need not be asked again.
        await controller.tasks.answered(request)
        return Haptera_V1_AnswerResponse()
    }

    func reportStatus(
        request: Haptera_V1_NodeReport, context: ServerContext
    ) async throws -> Haptera_V1_ReportStatusResponse {
        try await controller.report(request)
        return Haptera_V1_ReportStatusResponse()
    }
}

struct ClusterService: Haptera_V1_ClusterService.SimpleServiceProtocol {
    let controller: Controller

    func getClusterStatus(
        request: Haptera_V1_GetClusterStatusRequest, context: ServerContext
    ) async throws -> Haptera_V1_ClusterStatus {
        let volumes = try await controller.volumes()
        let nodes = try await controller.nodes()
        var status = Haptera_V1_ClusterStatus()
        status.clusterID = try await controller.store.clusterID()
        status.version = HapteraVersion.text
        status.nodes = UInt32(nodes.count)
        status.nodesReady = UInt32(nodes.count { $0.ready })
        status.volumes = UInt32(volumes.count)
        status.volumesAttached = UInt32(volumes.count { $0.state == .attached })
        status.volumesHealthy = UInt32(volumes.count { $0.robustness == .healthy })
        status.volumesDegraded = UInt32(volumes.count { $0.robustness == .degraded })
        status.volumesStalled = UInt32(volumes.count { $0.robustness == .stalled })
        status.volumesFaulted = UInt32(volumes.count { $0.robustness == .faulted })
        status.replicas = UInt32(volumes.reduce(0) { $0 + $1.replicas.count })
        status.replicasInSync = UInt32(
            volumes.reduce(0) { $0 + $1.replicas.count { $0.state == .inSync } })
        return status
    }

    func getVersion(
        request: Haptera_V1_GetVersionRequest, context: ServerContext
    ) async throws -> Haptera_V1_Version {
        var version = Haptera_V1_Version()
        version.version = HapteraVersion.text
        version.apiVersion = HapteraVersion.api
        return version
    }

    func listNodes(
        request: Haptera_V1_ListNodesRequest, context: ServerContext
    ) async throws -> Haptera_V1_ListNodesResponse {
        var response = Haptera_V1_ListNodesResponse()
        response.nodes = try await controller.nodes()
        return response
    }

    func getNode(
        request: Haptera_V1_GetNodeRequest, context: ServerContext
    ) async throws -> Haptera_V1_Node {
        try await controller.node(named: try checked(request.name, "node"))
    }

    func updateNode(
        request: Haptera_V1_UpdateNodeRequest, context: ServerContext
    ) async throws -> Haptera_V1_Node {
        _ = try checked(request.name, "node")
        return try await controller.updateNode(request)
    }

    func listEvents(
        request: Haptera_V1_ListEventsRequest, context: ServerContext
    ) async throws -> Haptera_V1_ListEventsResponse {
        var response = Haptera_V1_ListEventsResponse()
        response.events = try await events(request, after: request.afterID)
        return response
    }

    func watchEvents(
        request: Haptera_V1_ListEventsRequest, response: RPCWriter<Haptera_V1_Event>,
        context: ServerContext
    ) async throws {
        var last = request.afterID
        for await _ in controller.changes.watch() {
            for event in try await events(request, after: last) {
                try await response.write(event)
                last = event.id
            }
        }
    }

    private static let eventsMax: UInt32 = 1000

    private func events(
        _ request: Haptera_V1_ListEventsRequest, after id: UInt64
    ) async throws -> [Haptera_V1_Event] {
        let limit = request.limit == 0 ? Self.eventsMax : min(request.limit, Self.eventsMax)
        let rows = try await controller.store.events(after: Int64(clamping: id), limit: Int(limit))
        return rows.map { row in
            var event = Haptera_V1_Event()
            event.id = UInt64(row.id ?? 0)
            event.timeUnixMilliseconds = row.timeMilliseconds
            event.kind = row.kind
            event.subject = row.subject
            event.message = row.message
            event.actor = row.actor
            event.peer = row.peer
            return event
        }
    }
}

/// Serving as long as the store answers.
struct HealthService: Grpc_Health_V1_Health.SimpleServiceProtocol {
    let controller: Controller
    private static let services: Set<String> = [
        "", "haptera.v1.VolumeService", "haptera.v1.ClusterService", "haptera.v1.AgentService",
        "haptera.v1.ScheduleService",
    ]

    func check(
        request: Grpc_Health_V1_HealthCheckRequest, context: ServerContext
    ) async throws -> Grpc_Health_V1_HealthCheckResponse {
        guard Self.services.contains(request.service) else {
            throw ControlError(.notFound, "no such service")
        }
        return await status(request.service)
    }

    func watch(
        request: Grpc_Health_V1_HealthCheckRequest,
        response: RPCWriter<Grpc_Health_V1_HealthCheckResponse>, context: ServerContext
    ) async throws {
        var sent: Grpc_Health_V1_HealthCheckResponse?
        for await _ in controller.changes.watch() {
            let now = await status(request.service)
            guard now != sent else { continue }
            try await response.write(now)
            sent = now
        }
    }

    private func status(_ service: String) async -> Grpc_Health_V1_HealthCheckResponse {
        var response = Grpc_Health_V1_HealthCheckResponse()
        guard Self.services.contains(service) else {
            response.status = .serviceUnknown
            return response
        }
        let answers = try? await controller.store.clusterID()
        response.status = answers == nil ? .notServing : .serving
        return response
    }
}
