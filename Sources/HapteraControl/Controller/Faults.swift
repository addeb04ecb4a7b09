import HapteraAPI
import HapteraHost

extension Controller {
    /// Breaks something of a scratch volume, and of no other.
    package func injectFault(
        _ request: Haptera_V1_InjectVolumeFaultRequest, volume name: String
    ) async throws {
        let stored = try await store.volume(named: name)
        guard stored.volume.isScratch else {
            throw ControlError(
                .invalid,
                "volume '\(name)' is no scratch volume: nothing of it is broken on purpose")
        }
        guard let kind = Self.faultKinds[request.kind] else {
            throw ControlError(
                .invalid, "'\(request.kind)' is no fault: use kill, pause, flip, partition, full")
        }
        let replica = request.replicaID.isEmpty ? nil : try stored.replica(request.replicaID)
        guard let node = replica?.node ?? stored.volume.attachedNode else {
            throw ControlError(
                .precondition,
                "volume '\(name)' is not attached: storagectl volume attach \(name)")
        }
        guard replica != nil || kind == .kill || kind == .pause else {
            throw ControlError(
                .invalid, "'\(request.kind)' is a fault of replicas: say which one")
        }
        let lasts = kind != .kill && kind != .flip
        guard !lasts || (1...Self.faultMillisecondsMax).contains(request.milliseconds) else {
            throw ControlError(
                .invalid,
                "'\(request.kind)' lasts 1 to \(Self.faultMillisecondsMax) ms, not "
                    + "\(request.milliseconds)")
        }
        if kind == .flip {
            // One good copy of every block stays.
            guard view(stored).robustness == .healthy, stored.replicas.count > 1 else {
                throw ControlError(
                    .precondition,
                    "volume '\(name)' needs two replicas or more, all in sync, for a bit to flip in "
                        + "one")
            }
        }
        _ = try await tasks.ask(node) {
            $0.fault.kind = kind
            $0.fault.volumeID = stored.volume.id
            $0.fault.replicaID = request.replicaID
            $0.fault.random = request.random
            $0.fault.milliseconds = request.milliseconds
        }
        let target = replica.map { "replica \($0.id)" } ?? "the engine"
        try await store.addEvent(
            "FaultInjected", "volume/\(name)",
            "\(request.kind) \(target) on node \(node)"
                + (lasts ? " for \(request.milliseconds) ms" : ""), by: Caller.current)
    }

    private static let faultMillisecondsMax: UInt64 = 60_000
    private static let faultKinds: [String: Haptera_V1_InjectFault.Kind] = [
        "kill": .kill, "pause": .pause, "flip": .flip, "partition": .partition, "full": .full,
    ]
}
