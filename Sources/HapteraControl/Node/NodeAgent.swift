import Foundation
import HapteraAPI
import HapteraHost
import Logging
import SwiftProtobuf

/// Everything one node runs: a unit for each replica and each engine. What the controller wants is
/// kept on disk, so that supervision goes on while the controller is away, even across our restart.
package actor NodeAgent {
    let context: NodeContext
    let logger: Logger
    private var desired = Haptera_V1_DesiredState()
    private var replicas: [String: ReplicaUnit] = [:]
    private var engines: [String: EngineUnit] = [:]
    /// The controller has spoken since we started.
    private var isConfirmed = false
    private var desiredFile: String { context.directory + "/desired" }

    package init(_ context: NodeContext, logger: Logger) throws {
        self.context = context
        self.logger = logger
        try HostFiles.makeDirectory(context.run)
        try HostFiles.makeDirectory(context.directory + "/replicas")
    }

    /// Takes up what was wanted when our predecessor ended.
    package func resume() {
        guard let data = FileManager.default.contents(atPath: desiredFile),
            let message = try? Haptera_V1_DesiredState(serializedBytes: data)
        else { return }
        take(message)
    }

    package func want(_ message: Haptera_V1_DesiredState) throws {
        isConfirmed = true
        guard message != desired else { return }
        try HostFiles.replace(desiredFile, with: try message.serializedData())
        take(message)
    }

    private func take(_ message: Haptera_V1_DesiredState) {
        desired = message
    }

    /// Hands each unit its part, drops units that are finished and no longer named, and lets every
    /// unit do its next thing. Units do not wait for each other, nor does this wait for them: one
    /// that is still busy with its last round skips this one.
    package func step(now: Int64) async -> [Task<Void, Never>] {
        var tasks: [Task<Void, Never>] = []
        for wanted in desired.replicas {
            let unit = replicas[wanted.replicaID] ?? ReplicaUnit(wanted, context)
            replicas[wanted.replicaID] = unit
            await unit.want(wanted)
            tasks.append(Task { await unit.step(now: now) })
        }
        for wanted in desired.engines {
            let unit =
                engines[wanted.volumeID]
                ?? EngineUnit(wanted, recordService: desired.recordService, context)
            engines[wanted.volumeID] = unit
            await unit.want(
                wanted, recordService: desired.recordService, isConfirmed: isConfirmed)
            tasks.append(Task { await unit.step(now: now) })
        }
        await dropUnnamed()
        return tasks
    }

    /// A unit that is no longer named is forgotten only when nothing of it is left; otherwise its
    /// process goes on as it is, and somebody has to look.
    private func dropUnnamed() async {
        let namedReplicas = Set(desired.replicas.map(\.replicaID))
        for (id, unit) in replicas where !namedReplicas.contains(id) {
            let report = await unit.report
            if report.state != .removed {
                logger.warning("replica is no longer wanted", metadata: ["replica": "\(id)"])
            }
            replicas[id] = nil
        }
        let namedEngines = Set(desired.engines.map(\.volumeID))
        for (id, unit) in engines where !namedEngines.contains(id) {
            if await unit.isDetached {
                await unit.forget()
            } else {
                logger.warning("engine is no longer wanted", metadata: ["volume": "\(id)"])
            }
            engines[id] = nil
        }
    }

    /// Those we are to run or to remove.
    var knownReplicas: Set<String> {
        Set(desired.replicas.map(\.replicaID)).union(replicas.keys)
    }
    func engineUnit(_ volumeID: String) -> EngineUnit? { engines[volumeID] }
    func engineProcess(_ volumeID: String) async -> ProcessIdentity? {
        await engines[volumeID]?.process
    }
    func replicaProcess(_ replicaID: String) async -> ProcessIdentity? {
        await replicas[replicaID]?.process
    }

    package func report(name: String, nodeID: String) async -> Haptera_V1_NodeReport {
        var report = Haptera_V1_NodeReport()
        report.name = name
        report.nodeID = nodeID
        for (_, unit) in replicas.sorted(by: { $0.key < $1.key }) {
            report.replicas.append(await unit.report)
        }
        for (_, unit) in engines.sorted(by: { $0.key < $1.key }) {
            report.engines.append(await unit.report)
        }
        let attributes = try? FileManager.default.attributesOfFileSystem(
            forPath: context.directory)
        report.capacityBytes = (attributes?[.systemSize] as? NSNumber)?.uint64Value ?? 0
        report.availableBytes = (attributes?[.systemFreeSize] as? NSNumber)?.uint64Value ?? 0
        return report
    }
}
