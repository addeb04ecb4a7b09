import Foundation
import HapteraAPI
import HapteraCore

/// What `haptera-replica inspect --json` told of one replica directory. Fields of the log and the
/// files are missing where the directory could only be peeked at.
package struct DirectoryInspection: Decodable, Equatable, Sendable {
    package struct Birth: Decodable, Equatable, Sendable {
        package var epoch: UInt64
        package var regions: UInt64
    }
    package var volume: String
    package var name: String
    package var replica: String
    package var incarnation: String
    package var sizeBytes: UInt64
    package var promise: UInt64
    /// Hexadecimal; empty if none was ever installed.
    package var record: String?
    package var flushedEpoch: UInt64?
    package var flushedSequence: UInt64?
    package var stableEpoch: UInt64?
    package var stableSequence: UInt64?
    package var births: [Birth]?
    package var olderRegions: UInt64?
    package var isRebooted: Bool?
    package var activeRegions: UInt64?

    package static func decode(_ json: String) throws -> DirectoryInspection {
        do {
            return try JSONDecoder().decode(Self.self, from: Data(json.utf8))
        } catch {
            throw ControlError(.precondition, "what its inspection said cannot be read: \(error)")
        }
    }

    package var member: VolumeRecord.Member? {
        guard let id = ReplicaID(replica), let number = parseHexadecimal(incarnation.utf8) else {
            return nil
        }
        return VolumeRecord.Member(replica: id, incarnation: Incarnation(rawValue: number))
    }

    /// The same as salvage and reconstruction take it.
    package var survey: ReplicaSurvey? {
        guard let member else { return nil }
        var survey = ReplicaSurvey(
            member: member, promise: Epoch(promise), installed: installed)
        survey.flushed = StablePoint(
            epoch: Epoch(flushedEpoch ?? 0), sequence: SequenceNumber(flushedSequence ?? 0))
        survey.stable = StablePoint(
            epoch: Epoch(stableEpoch ?? 0), sequence: SequenceNumber(stableSequence ?? 0))
        survey.isRebooted = isRebooted ?? false
        survey.activeRegions = activeRegions ?? 0
        survey.births = (births ?? []).map { .init(epoch: Epoch($0.epoch), regions: $0.regions) }
        survey.olderRegions = olderRegions ?? 0
        return survey
    }

    /// The record it installed last.
    package var installed: VolumeRecord? {
        record.flatMap(parseHexadecimalBytes).flatMap(VolumeRecord.init(decoding:))
    }
}

/// What is known of a replica's directory: what it says, or why nobody could look.
package enum InspectionOutcome: Sendable {
    case found(DirectoryInspection)
    case failed(String)
}

extension Controller {
    /// Replicas looked into with one task: an answer stays below gRPC's 4 MiB, of which one with
    /// the largest record, in hexadecimal digits, takes 300 KiB.
    static let inspectionBatch = 8

    /// Looks into replica directories through the agents of their nodes, all nodes at once.
    nonisolated func inspect(_ wanted: [(node: String, replica: String)]) async -> [String:
        InspectionOutcome]
    {
        let byNode = Dictionary(grouping: wanted, by: \.node)
        return await withTaskGroup(of: [String: InspectionOutcome].self) { group in
            for (node, replicas) in byNode {
                let ids = replicas.map(\.replica)
                group.addTask { await self.inspect(ids, on: node) }
            }
            return await group.reduce(into: [:]) { $0.merge($1) { $1 } }
        }
    }

    private nonisolated func inspect(_ ids: [String], on node: String) async -> [String:
        InspectionOutcome]
    {
        var outcomes: [String: InspectionOutcome] = [:]
        for start in stride(from: 0, to: ids.count, by: Self.inspectionBatch) {
            let batch = Array(ids[start..<min(start + Self.inspectionBatch, ids.count)])
            do {
                let answer = try await tasks.ask(node) { $0.inspect.replicaIds = batch }
                for found in answer.replicas { outcomes[found.replicaID] = Self.outcome(found) }
            } catch {
                for id in batch { outcomes[id] = .failed("\(error)") }
            }
        }
        return outcomes
    }

    private static func outcome(_ found: Haptera_V1_InspectedReplica) -> InspectionOutcome {
        guard found.error.isEmpty else { return .failed(found.error) }
        do {
            return .found(try DirectoryInspection.decode(found.json))
        } catch {
            return .failed("\(error)")
        }
    }
}
