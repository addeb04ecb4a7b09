import HapteraAPI
import HapteraCore

/// Going on from a replica that is out, when no member of the in-sync set will come back.
struct Salvage {
    let explanation: Explanation
    let plan: SalvagePlan

    init?(_ explanation: Explanation) {
        guard let record = explanation.stored.record else { return nil }
        self.explanation = explanation
        plan = SalvagePlan(record: record, surveys: explanation.surveys)
    }

    /// What each replica that is out would lose; those nobody could look into at the end.
    var choices: [Haptera_V1_SalvageChoice] {
        let chosen = plan.choices.filter { !$0.isInSync && $0.obstacle != .unknownReplica }
        let seen = Set(chosen.map(\.member))
        return chosen.map(message)
            + plan.record.out.filter { !seen.contains($0.member) }.map { departure in
                var choice = blank(departure.member)
                choice.problem = explanation.problem(departure.member)
                return choice
            }
    }

    private func blank(_ member: VolumeRecord.Member) -> Haptera_V1_SalvageChoice {
        var choice = Haptera_V1_SalvageChoice()
        choice.replicaID = member.replica.text
        choice.node = explanation.stored.replicas.first { $0.id == choice.replicaID }?.node ?? ""
        guard let departure = plan.record.out.first(where: { $0.member == member }) else {
            return choice
        }
        choice.lastEpoch = departure.leftEpoch.rawValue - 1
        choice.leftUnixMilliseconds = explanation.time(of: departure.leftEpoch)
        choice.reason = RecordWords.words(departure.reason)
        return choice
    }

    private func message(_ option: SalvagePlan.Choice) -> Haptera_V1_SalvageChoice {
        var choice = blank(option.member)
        choice.regionsMax = option.regionsMax
        choice.measured = option.isMeasured
        choice.lacksUnflushed = option.mayLackUnflushed
        choice.rolledBack = option.isRolledBack
        choice.problem = option.obstacle?.rawValue ?? ""
        if let since = option.lostSince {
            choice.lostFromEpoch = since.rawValue
            choice.lostToEpoch = plan.record.epoch.rawValue
        }
        return choice
    }

    /// Why the volume is not to be salvaged now.
    func objection(engineIsGone: Bool) -> String? {
        let stored = explanation.stored
        let name = stored.volume.name
        if let member = explanation.reachableMember {
            return
                "replica \(member.id) on \(member.node) is in the in-sync set and can be reached: "
                + "nothing is lost; attach the volume, or see 'storagectl volume why \(name)'"
        }
        guard let node = stored.volume.attachedNode else { return nil }
        guard let observed = explanation.nodes[node], observed.isReady else {
            return engineIsGone
                ? nil
                : "node \(node), which ran the engine, is not heard of: it may still serve the "
                    + "volume. If that node is gone for good, say so with --engine-is-gone"
        }
        return observed.engine(stored.volume)?.state == .serving
            ? "the volume is being served on node \(node)" : nil
    }

    /// It ran on a node that is not heard of.
    var isEngineGone: Bool {
        guard let node = explanation.stored.volume.attachedNode else { return false }
        return explanation.nodes[node]?.isReady != true
    }

    /// The record that goes on from the replica.
    func record(_ replica: String) throws -> VolumeRecord {
        let option = plan.choices.first { $0.member.replica.text == replica && !$0.isInSync }
        guard let option, var record = option.record else {
            let problem = choices.first { $0.replicaID == replica }?.problem
            throw ControlError(
                .precondition,
                "replica \(replica) cannot be chosen: \(problem ?? "it is not one that is out")")
        }
        record.nonce = UInt64.random(in: 1 ... .max)
        return record
    }
}

extension Explanation {
    /// What is known of every copy that could be looked into.
    var surveys: [ReplicaSurvey] {
        inspections.values.compactMap { outcome in
            guard case .found(let found) = outcome, found.volume == stored.volume.id else {
                return nil
            }
            return found.survey
        }
    }

    func problem(_ member: VolumeRecord.Member) -> String {
        switch inspections[member.replica.text] {
        case .failed(let reason): reason
        case .found: "its directory holds another making of it"
        case nil: Explanation.unknownPlace
        }
    }
}

extension Controller {
    /// Tells what each choice would lose, and with a replica named, acts: the record
    /// goes on from that replica, the engine is ended, and supervision starts it again.
    package func salvage(
        _ request: Haptera_V1_SalvageVolumeRequest
    ) async throws -> Haptera_V1_SalvageVolumeResponse {
        let explanation = try await explanation(request.name, inspectingAll: true)
        guard let salvage = Salvage(explanation) else {
            throw ControlError(
                .precondition,
                "volume '\(request.name)' is still being created: there is nothing to salvage")
        }
        var response = Haptera_V1_SalvageVolumeResponse()
        response.epoch = salvage.plan.record.epoch.rawValue
        response.choices = salvage.choices
        response.objection = salvage.objection(engineIsGone: request.engineIsGone) ?? ""
        guard !request.replicaID.isEmpty else { return response }
        guard response.objection.isEmpty else {
            throw ControlError(.precondition, response.objection)
        }
        guard request.expectedEpoch == response.epoch else {
            throw ControlError(
                .conflict,
                "volume '\(request.name)' is at epoch \(response.epoch) now; look at the "
                    + "choices again"
            )
        }
        let record = try salvage.record(request.replicaID)
        let choice = response.choices.first { $0.replicaID == request.replicaID }
        let stored = try await store.salvage(
            explanation.stored.volume, record,
            endsAttachment: salvage.isEngineGone, message: Self.message(choice, record))
        changes.notify()
        // A stalled engine can take nothing over any more; its successor starts from this record.
        _ = try? await endEngine(explanation)
        response.volume = view(stored)
        return response
    }

    private static func message(
        _ choice: Haptera_V1_SalvageChoice?, _ record: VolumeRecord
    ) -> String {
        let lost =
            choice.map {
                $0.lostFromEpoch == 0
                    ? "nothing acknowledged is known to be lost"
                    : "lost are writes since epoch \($0.lostFromEpoch), in at most "
                        + "\($0.regionsMax) regions"
            } ?? ""
        return "goes on from replica \(record.inSync[0].replica.text), epoch "
            + "\(record.epoch.rawValue); \(lost)"
    }

    /// Ends the volume's engine so that its successor starts from the record as it stands now.
    private func endEngine(_ explanation: Explanation) async throws {
        let volume = explanation.stored.volume
        guard let node = volume.attachedNode else { return }
        _ = try await tasks.ask(node) { $0.endEngine.volumeID = volume.id }
    }

    package func rejoin(_ request: Haptera_V1_ReplicaRequest) async throws -> Haptera_V1_Volume {
        let stored = try await store.rejoinReplica(request.replicaID, of: request.volume)
        return try await decided(stored)
    }

    /// An engine that serves has the record of before: its successor starts from this one.
    private func decided(_ stored: StoredVolume) async throws -> Haptera_V1_Volume {
        changes.notify()
        _ = try? await endEngine(try await explanation(stored.volume.name))
        return view(stored)
    }
}
