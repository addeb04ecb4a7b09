import HapteraAPI
import HapteraCore

/// What a node said last, and when.
package struct ObservedNode: Sendable {
    package var report: Haptera_V1_NodeReport
    package var lastSeenMilliseconds: Int64
    /// Heard of recently enough to believe.
    package var isReady: Bool

    package init(report: Haptera_V1_NodeReport, lastSeenMilliseconds: Int64, isReady: Bool) {
        self.report = report
        self.lastSeenMilliseconds = lastSeenMilliseconds
        self.isReady = isReady
    }

    func replica(_ id: String) -> Haptera_V1_ReplicaReport? {
        report.replicas.first { $0.replicaID == id }
    }
    func engine(_ volume: VolumeRow) -> Haptera_V1_EngineReport? {
        report.engines.first {
            $0.volumeID == volume.id && $0.clientGeneration == UInt64(volume.clientGeneration)
        }
    }
}

/// A volume as users see it: derived from what is stored and what the nodes observe, and stored
/// nowhere itself, so that it cannot disagree with either.
package struct VolumeView: Sendable {
    let stored: StoredVolume
    let nodes: [String: ObservedNode]
    /// The engine of the present attachment as its node sees it.
    let engine: Haptera_V1_EngineReport?

    /// Why a stale replica is not replaced.
    let problem: String?
    /// What its engine does while it is not attached; nil: what that was begun for.
    let activity: String?

    package init(
        _ stored: StoredVolume, nodes: [String: ObservedNode], problem: String? = nil,
        activity: String? = nil
    ) {
        self.activity = activity
        self.stored = stored
        self.nodes = nodes
        self.problem = problem
        engine = stored.volume.attachedNode.flatMap { nodes[$0]?.engine(stored.volume) }
    }

    package var message: Haptera_V1_Volume {
        let volume = stored.volume
        var message = Haptera_V1_Volume()
        message.name = volume.name
        message.id = volume.id
        message.sizeBytes = UInt64(volume.sizeBytes)
        message.state = state
        message.epoch = stored.record?.epoch.rawValue ?? 0
        message.clientGeneration = UInt64(volume.clientGeneration)
        message.createdUnixMilliseconds = volume.createdMilliseconds
        message.scratch = volume.isScratch
        message.replicas = stored.replicas.map(replica)
        VolumeSpace(stored.replicas.map { nodes[$0.node]?.replica($0.id) }).fill(&message)
        message.settings = volume.settings.message
        message.labels = stored.labels
        message.originVolume = volume.origin?.volume ?? ""
        message.originSnapshot = volume.origin?.snapshot ?? ""
        message.replicaCount = UInt32(volume.replicaCount)
        message.snapshotCount = UInt32(stored.record?.snapshots.count ?? 0)
        if let engine, engine.needsDecision { message.decisionInstance = engine.instance }
        message.rebuilds = engine?.rebuilds.map(rebuild) ?? []
        if let filling { message.filling = filling }
        if let scrub { message.scrub = scrub }
        if let damage = stored.damage, damage.lostMilliseconds > 0 {
            message.conditions = [.lostBlocks]
        }
        (message.robustness, message.reason) = robustness(message.replicas)
        if let words = maintenance {
            message.reason = [words, message.reason].filter { !$0.isEmpty }.joined(separator: "; ")
        }
        if let node = volume.clientNode {
            message.engine.node = node
            if let engine, !volume.isMaintained {
                message.engine.pid = engine.pid
                message.engine.uri = engine.uri
                message.engine.unixUri = engine.unixUri
                message.engine.connections = engine.connections
                message.engine.rebuildDone = engine.rebuildDone
                message.engine.rebuildTotal = engine.rebuildTotal
                message.engine.restarts = engine.restarts
                message.engine.instance = engine.instance
                message.engine.rebuilds = engine.rebuilds.map(rebuild)
                if engine.hasScrub { message.engine.scrub = Self.scrub(engine.scrub) }
            }
        }
        return message
    }

    var state: Haptera_V1_VolumeState {
        let volume = stored.volume
        switch volume.phase {
        case .creating: return .creating
        case .deleting: return .deleting
        case .ready: break
        }
        guard volume.clientNode != nil else { return .detached }
        if volume.isMaintained { return .attaching }
        if volume.isDetaching { return .detaching }
        // An engine that has served and is being restarted leaves its volume attached (and
        // stalled).
        return volume.servedGeneration == volume.clientGeneration ? .attached : .attaching
    }

    /// Why it is not healthy; empty if it is.
    var trouble: String { robustness(stored.replicas.map(replica)).reason }

    /// What is being done to the volume though it is not attached, if that is of interest: while
    /// it goes on, or holds up an attachment.
    private var maintenance: String? {
        let volume = stored.volume
        guard let words = volume.maintenance.map({ activity ?? $0 }) else { return nil }
        if volume.nextNode != nil { return "it is attached when that is done: \(words)" }
        return volume.isDetaching || words == Controller.fillingWords ? nil : words
    }

    private var filling: Haptera_V1_Filling? {
        guard stored.isBeingFilled else { return nil }
        var message = Haptera_V1_Filling()
        message.replicasDone = UInt32(stored.filledCount)
        message.replicasTotal = UInt32(stored.volume.replicaCount)
        if let rebuild = fillingRebuild {
            message.regionsDone = rebuild.regionsDone
            message.regionsTotal = rebuild.regionsTotal
        }
        return message
    }

    private var fillingRebuild: Haptera_V1_RebuildReport? {
        engine?.rebuilds.first { rebuild in
            stored.replicas.contains { $0.id == rebuild.replicaID && !$0.isTemporary }
        }
    }

    /// "its replicas are being filled, 1 of 2 are in sync, replica X on node x is at 43%"
    private var fillingProgress: String {
        var words =
            "\(Controller.fillingWords), \(stored.filledCount) of "
            + "\(stored.volume.replicaCount) are in sync"
        if let rebuild = fillingRebuild, rebuild.regionsTotal > 0,
            let row = stored.replicas.first(where: { $0.id == rebuild.replicaID })
        {
            let percent =
                min(rebuild.regionsDone, rebuild.regionsTotal) * 100 / rebuild.regionsTotal
            words += ", replica \(row.id) on node \(row.node) is at \(percent)%"
        }
        return words
    }

    /// The engine's process runs and has taken the volume over.
    var isEngineUp: Bool { engine?.state == .serving || engine?.state == .stalled }

    // MARK: Joiners

    /// Of just the record that is stored. One that is not the record's own engine, or has not seen
    /// the last change yet, does not know who is being filled.
    private var recordedEngine: Haptera_V1_EngineReport? {
        guard isEngineUp, isNodeReady, let engine, let record = stored.record,
            engine.instance != 0, engine.instance == record.engine.rawValue,
            engine.epoch == record.epoch.rawValue
        else { return nil }
        return engine
    }

    /// An engine that gives up filling a replica changes no record, which goes on to name it as
    /// the joiner: the word of the record's own engine counts more, where there is one.
    func isBeingFilled(_ row: ReplicaRow) -> Bool {
        guard stored.isJoining(row) else { return false }
        guard let engine = recordedEngine else { return true }
        return engine.rebuilds.contains { $0.replicaID == row.id }
            || engine.replicas.contains { $0.replicaID == row.id && $0.state == "joining" }
    }

    /// No engine makes it a member, or counts it as one, any more. One that was told to do without
    /// it, and does not name it, will not choose it again; while it may just be promoting it, that
    /// is among its rebuilds.
    func isLetGo(_ row: ReplicaRow) -> Bool {
        guard !stored.isMember(row) else { return false }
        guard stored.isJoining(row) else { return true }
        guard let engine = recordedEngine else { return false }
        return !engine.rebuilds.contains { $0.replicaID == row.id }
            && !engine.replicas.contains { $0.replicaID == row.id }
    }

    private func rebuild(_ report: Haptera_V1_RebuildReport) -> Haptera_V1_Rebuild {
        var message = Haptera_V1_Rebuild()
        message.replicaID = report.replicaID
        message.node = stored.replicas.first { $0.id == report.replicaID }?.node ?? ""
        message.kind =
            switch report.kind {
            case "resync": .resync
            case "rebuild": .rebuild
            case "resolve": .resolve
            default: .unspecified
            }
        message.phase = report.phase
        message.regionsDone = report.regionsDone
        message.regionsTotal = report.regionsTotal
        message.bytesCopied = report.bytesCopied
        message.bytesPerSecond = report.bytesPerSecond
        message.elapsedMilliseconds = report.elapsedMilliseconds
        return message
    }

    /// The last one: as an engine tells that is about it, or as it is noted.
    private var scrub: Haptera_V1_Scrub? {
        let told = engine.flatMap { $0.hasScrub ? $0.scrub : nil }
        guard let row = stored.scrub, let noted = row.value else { return told.map(Self.scrub) }
        if let told, ScrubProgress(text: told.progress)?.id == noted.id, !row.isFinished {
            return Self.scrub(told)
        }
        var message = Haptera_V1_Scrub()
        message.state = row.isFinished ? .finished : .waiting
        message.regionsDone = noted.region
        message.regionsTotal =
            row.isFinished
            ? noted.region : Geometry.regionCount(size: UInt64(stored.volume.sizeBytes))
        message.blocksChecked = noted.checked
        message.blocksBad = noted.bad
        message.blocksRepaired = noted.repaired
        message.blocksLost = noted.lost
        message.regionsSkipped = noted.skipped
        return message
    }

    private static func scrub(_ report: Haptera_V1_ScrubReport) -> Haptera_V1_Scrub {
        var message = Haptera_V1_Scrub()
        message.state =
            switch report.state {
            case "running": .running
            case "waiting": .waiting
            case "finished": .finished
            default: .unspecified
            }
        message.regionsDone = report.regionsDone
        message.regionsTotal = report.regionsTotal
        message.blocksChecked = report.blocksChecked
        message.blocksBad = report.blocksBad
        message.blocksRepaired = report.blocksRepaired
        message.blocksLost = report.blocksLost
        message.regionsSkipped = report.regionsSkipped
        message.bytesPerSecond = report.bytesPerSecond
        return message
    }

    // MARK: Replicas

    private func replica(_ row: ReplicaRow) -> Haptera_V1_Replica {
        var message = Haptera_V1_Replica()
        message.id = row.id
        message.volume = stored.volume.name
        message.node = row.node
        message.address = row.address
        message.directory = row.directory
        message.inSync = stored.isMember(row)
        message.replaces = row.replaces ?? ""
        message.leaving = row.phase == .leave
        message.temporary = row.isTemporary
        let report = nodes[row.node]?.replica(row.id)
        if let report {
            message.pid = report.pid
            message.allocatedBytes = report.allocatedBytes
            message.restarts = report.restarts
            message.reason = report.reason
        }
        message.state = replicaState(row, report)
        return message
    }

    private func replicaState(
        _ row: ReplicaRow, _ report: Haptera_V1_ReplicaReport?
    ) -> Haptera_V1_ReplicaState {
        if report?.state == .failed { return .failed }
        let isMember = stored.isMember(row)
        let isJoining = stored.isJoining(row)
        // The engine's connection says more about a replica than its own node does, which may be
        // silent; but a process seen dead is dead, though the engine may not have noticed yet.
        let isDead = nodes[row.node]?.isReady == true && report?.state != .running
        if isDead { return .absent }
        if isEngineUp {
            let view = engine?.replicas.first { $0.replicaID == row.id }?.state
            switch view {
            case "failed":
                // Of one that is there, and no member: it waits for its turn.
                return stored.volume.isFilling && !isMember ? .absent : .failed
            case "full": return .full
            case "inSync": return isMember ? .inSync : (isJoining ? .joining : .absent)
            case "joining": return .joining
            default: return .absent
            }
        }
        guard nodes[row.node]?.isReady == true else { return .absent }
        if isMember { return .inSync }
        return isJoining ? .joining : .absent
    }

    // MARK: Robustness

    private func robustness(
        _ replicas: [Haptera_V1_Replica]
    ) -> (Haptera_V1_Robustness, reason: String) {
        switch stored.volume.phase {
        case .creating:
            guard let troubled = replicas.first(where: { !$0.reason.isEmpty }) else {
                return (.healthy, "")
            }
            let reason = "replica on node \(troubled.node): \(troubled.reason)"
            return (troubled.state == .failed ? .faulted : .healthy, reason)
        case .deleting: return (.healthy, "")
        case .ready: break
        }
        if let engine, engine.needsDecision {
            return (
                .faulted,
                "\(engine.reason); see 'storagectl volume accept-loss \(stored.volume.name)'"
            )
        }
        if let words = engine?.reason,
            let reason = StopReason.standing(in: words, against: stored.record)
        {
            let advice = reason.advice(volume: stored.volume.name)
            return (.faulted, "\(reason.rawValue): \(advice)")
        }
        let isStuck = state == .detaching && !isNodeReady
        if state == .attached || isStuck, let trouble = engineTrouble { return trouble }
        let members = replicas.filter { $0.state == .inSync && !$0.leaving }
        let inSync = members.count { !$0.temporary }
        if inSync >= stored.volume.replicaCount { return (.healthy, "") }
        if members.isEmpty, !isEngineUp {
            return (.stalled, "no in-sync replica is running; it waits for one to return")
        }
        let missing = replicas.filter(isMissing).map { replica in
            let purpose = replica.replaces.isEmpty ? "" : ", to replace \(replica.replaces),"
            return "replica \(replica.id)\(purpose) on node \(replica.node) is "
                + replica.state.word + (replica.reason.isEmpty ? "" : " (\(replica.reason))")
        }
        let progress = stored.volume.isFilling ? [fillingProgress] : []
        let words = progress + missing + [problem].compactMap { $0 }
        return (.degraded, words.joined(separator: "; "))
    }

    /// Of a volume that is being filled, those that wait for their turn are as they should be.
    private func isMissing(_ replica: Haptera_V1_Replica) -> Bool {
        guard replica.state != .inSync else { return false }
        guard stored.volume.isFilling, replica.state != .full else { return true }
        guard let node = nodes[replica.node], node.isReady else { return true }
        return node.replica(replica.id)?.state != .running
    }

    private var isNodeReady: Bool {
        stored.volume.attachedNode.flatMap { nodes[$0]?.isReady } ?? false
    }

    private var engineTrouble: (Haptera_V1_Robustness, reason: String)? {
        let node = stored.volume.attachedNode ?? ""
        guard isNodeReady, let engine else {
            // The engine does not depend on its node agent: most likely it serves.
            return (
                .degraded,
                "node \(node), which runs the engine, is not heard of: bring it back, or, if it "
                    + "is gone, 'storagectl volume detach \(stored.volume.name) --force'"
            )
        }
        switch engine.state {
        case .serving: return nil
        case .stalled:
            let reason = engine.reason.isEmpty ? "no in-sync replica answers" : engine.reason
            return (.stalled, reason)
        default:
            let reason = engine.reason.isEmpty ? "" : ": \(engine.reason)"
            return (.stalled, "the engine is being started again\(reason)")
        }
    }
}

extension Haptera_V1_ReplicaState {
    /// As in the CLI and in engines' status.
    package var word: String {
        switch self {
        case .inSync: "inSync"
        case .joining: "joining"
        case .absent: "absent"
        case .full: "full"
        case .failed: "failed"
        case .unspecified, .UNRECOGNIZED: "unknown"
        }
    }
}
