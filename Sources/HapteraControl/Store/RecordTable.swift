import Foundation
import GRDB
import HapteraCore
import HapteraHost

/// How a compare-and-swap of a volume record ended.
package enum SwapResult: Equatable, Sendable {
    case swapped
    /// Another record stands; here it is, encoded.
    case conflict([UInt8])
    case notFound
    /// The proposal is no record this volume may have; nothing was looked at further.
    case invalid(String)
}

extension MetadataStore {
    /// The encoded record, or nil if there is no such volume (or it is not created yet).
    package func record(of volume: VolumeID) async throws -> [UInt8]? {
        try await database.read { db in try Self.storedRecord(db, volume.text)?.bytes }
    }

    static func storedRecord(
        _ db: Database, _ volume: String
    ) throws -> (epoch: Int64, bytes: [UInt8])? {
        let row = try Row.fetchOne(
            db, sql: "SELECT epoch, record FROM records WHERE volumeID = ?", arguments: [volume])
        guard let row else { return nil }
        let data: Data = row["record"]
        return (row["epoch"], [UInt8](data))
    }

    /// Replaces the record if its epoch is `expected`; durable when it returns.
    ///
    /// A writer in doubt sends the same proposal again: if exactly that record stands already (it
    /// carries its writer's nonce, so nobody else can have written it), the answer is `swapped`.
    package func compareAndSwap(
        _ volume: VolumeID, expected: Epoch, proposal: [UInt8]
    ) async throws -> SwapResult {
        guard let proposed = VolumeRecord(decoding: proposal), proposed.volume == volume else {
            return .invalid("not a record of this volume")
        }
        guard expected.rawValue < UInt64(Int64.max), proposed.epoch == expected.next else {
            return .invalid("the record's epoch does not follow the expected one")
        }
        return try await withCheckedThrowingContinuation { continuation in
            let swap = WaitingSwap(
                volume: volume, expected: expected, proposed: proposed, proposal: proposal,
                continuation: continuation)
            // In a task of its own: that this caller has gone must not fail the others.
            if swaps.add(swap) { Task { await decideSwaps() } }
        }
    }

    /// Until nothing waits. One that fails takes the whole transaction back: then each is decided
    /// by itself, and fails alone.
    private func decideSwaps() async {
        repeat {
            do {
                let results = try await database.write { db in
                    try self.swaps.take().map { try self.decide(db, $0) }
                }
                swaps.answer(results)
            } catch {
                let taken = swaps.giveUp()
                if taken.isEmpty { swaps.fail(error) }
                if taken.count == 1 { taken[0].continuation.resume(throwing: error) }
                if taken.count > 1 { for swap in taken { await decideAlone(swap) } }
            }
        } while !swaps.isDone()
    }
    private func decideAlone(_ swap: WaitingSwap) async {
        do {
            let result = try await database.write { db in try self.decide(db, swap) }
            swap.continuation.resume(returning: result)
        } catch {
            swap.continuation.resume(throwing: error)
        }
    }

    /// Within a transaction. Said twice it is the same, should the one before have been kept.
    private func decide(_ db: Database, _ swap: WaitingSwap) throws -> SwapResult {
        let (volume, proposed) = (swap.volume.text, swap.proposed)
        guard let stored = try Self.storedRecord(db, volume) else { return .notFound }
        if stored.bytes == swap.proposal { return .swapped }
        guard stored.epoch == Int64(swap.expected.rawValue),
            let current = VolumeRecord(decoding: stored.bytes)
        else { return .conflict(stored.bytes) }
        let replicas = try ReplicaRow.filter(Column("volumeID") == volume).fetchAll(db)
        let rules = RecordRules(after: current, known: Set(replicas.compactMap(\.member)))
        if let reason = rules.objection(to: proposed, by: .engine) { return .invalid(reason) }
        try db.execute(
            sql: "UPDATE records SET epoch = ?, record = ? WHERE volumeID = ? AND epoch = ?",
            arguments: [
                Int64(proposed.epoch.rawValue), Data(swap.proposal), volume,
                Int64(swap.expected.rawValue),
            ])
        guard db.changesCount == 1 else { return .conflict(stored.bytes) }
        if proposed.size != current.size {
            try db.execute(
                sql: "UPDATE volumes SET sizeBytes = ? WHERE id = ?",
                arguments: [Int64(proposed.size), volume])
            try Self.forgetGrowths(db, of: volume, upTo: proposed.size)
        }
        if proposed.size != current.size || proposed.change == .revert {
            try db.execute(
                sql: "UPDATE volumes SET unchangedSince = 0 WHERE id = ?",
                arguments: [proposed.volume.text])
        }
        if proposed.snapshots != current.snapshots { try settleLabels(db, proposed) }
        try noteHistory(db, proposed)
        try addEvents(db, of: proposed, after: current)
        return .swapped
    }

    /// What the change means to an operator.
    private func addEvents(
        _ db: Database, of new: VolumeRecord, after old: VolumeRecord
    ) throws {
        let subject = "volume/\(new.name)"
        let engine = Caller(actor: "engine/\(hexadecimal(new.engine.rawValue))")
        let epoch = "epoch \(new.epoch.rawValue)"
        if new.engine != old.engine, new.engine != .none {
            let place = new.engineEndpoint.isEmpty ? "without clients" : "at \(new.engineEndpoint)"
            try addEvent(
                db, "EngineTookOver", subject, "engine \(place), \(epoch)", by: engine)
        }
        for member in old.inSync where !new.inSync.contains(member) {
            let text = "replica \(member.replica.text) left the in-sync set, \(epoch)"
            try addEvent(db, "ReplicaRemoved", subject, text, by: engine)
        }
        for member in new.inSync where !old.inSync.contains(member) {
            let text = "replica \(member.replica.text) is in sync again, \(epoch)"
            try addEvent(db, "ReplicaPromoted", subject, text, by: engine)
        }
        if let joining = new.joining, joining != old.joining {
            let text = "replica \(joining.replica.text) is being filled, \(epoch)"
            try addEvent(db, "ReplicaJoining", subject, text, by: engine)
        }
        if new.size != old.size {
            let sizes = "\(VolumeSize.text(old.size)) to \(VolumeSize.text(new.size))"
            try addEvent(db, "VolumeResized", subject, "\(sizes), \(epoch)", by: engine)
        }
        if new.change == .revert, let revert = new.reverts.last {
            let target = new.snapshots.first { $0.layer == revert.target }
            let text = "to snapshot \(target?.name ?? "?"), \(epoch)"
            try addEvent(db, "VolumeReverted", subject, text, by: engine)
        }
        for snapshot in new.snapshots where !old.snapshots.contains(snapshot) {
            let text = "snapshot \(snapshot.name), layer \(snapshot.layer.rawValue), \(epoch)"
            try addEvent(db, "SnapshotCreated", subject, text, by: engine)
        }
        for snapshot in old.snapshots where !new.snapshots.contains(snapshot) {
            let text = "snapshot \(snapshot.name), layer \(snapshot.layer.rawValue), \(epoch)"
            try addEvent(db, "SnapshotDeleted", subject, text, by: engine)
        }
    }
}
