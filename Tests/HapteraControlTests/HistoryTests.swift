import GRDB
import HapteraAPI
import HapteraCore
import Testing

@testable import HapteraControl

/// Writes records as an engine does.
private struct Writer {
    let test: TestStore
    var record: VolumeRecord
    var nonce: UInt64 = 1

    init(_ test: TestStore) async throws {
        self.test = test
        record = try #require(try await test.makeVolume().record)
    }

    mutating func write(
        _ change: VolumeRecord.Change, _ edit: (inout VolumeRecord) -> Void = { _ in }
    ) async throws {
        nonce += 1
        let next = record.next(nonce: nonce) {
            $0.change = change
            edit(&$0)
        }
        #expect(
            try await test.store.compareAndSwap(
                next.volume, expected: record.epoch, proposal: next.encoded()) == .swapped)
        record = next
        test.clock.advance(1000)
    }
}

@Suite struct HistoryTests {
    @Test func everyChangeIsNotedWithItsTime() async throws {
        let test = try TestStore()
        var writer = try await Writer(test)
        let lost = writer.record.inSync[1]
        try await writer.write(.takeover) { $0.engineEndpoint = "h:1" }
        try await writer.write(.removal) {
            $0.inSync.remove(at: 1)
            $0.out = [
                .init(
                    member: lost, leftEpoch: $0.epoch,
                    stablePoint: .init(epoch: Epoch(2), sequence: SequenceNumber(9)),
                    reason: .silent)
            ]
        }
        let all = try await test.store.history(of: writer.record.volume.text, limit: 100)
        #expect(all.map(\.record.epoch.rawValue) == [1, 2, 3])
        #expect(all.map(\.timeMilliseconds) == [1_000_000, 1_000_000, 1_001_000])
        // What says why a replica is out is shown however old it is.
        for _ in 0..<5 { try await writer.write(.takeover) }
        let relevant = try await test.store.history(
            of: writer.record.volume.text, limit: 2,
            also: Explanation.relevantEpochs(writer.record))
        #expect(relevant.map(\.record.epoch.rawValue) == [3, 7, 8])
        try await test.store.deleteVolumeAndRecord("vol")
        #expect(try await test.store.history(of: writer.record.volume.text, limit: 9).isEmpty)
    }

    /// When they are too many, or take too much: with a thousand snapshots a record is 100 KiB.
    @Test(arguments: [false, true])
    func oldChangesAreForgottenDecisionsAreNot(isBySize: Bool) async throws {
        let test = try TestStore()
        var record = try #require(try await test.makeVolume().record)
        record.out = [
            .init(
                member: record.inSync[2], leftEpoch: Epoch(5),
                stablePoint: .init(epoch: .zero, sequence: SequenceNumber(0)))
        ]
        let volume = record.volume.text
        let template = record
        let size = record.encoded().count
        try await test.store.database.write { db in
            for epoch: UInt64 in 2...512 {
                var record = template
                record.epoch = Epoch(epoch)
                record.change = epoch == 100 ? .salvage : .takeover
                if isBySize {
                    try test.store.noteHistory(db, record, bytes: 300 * size)
                } else {
                    try test.store.noteHistory(db, record, keeping: 300)
                }
            }
        }
        let epochs = try await test.store.history(of: volume, limit: 20_000)
            .map(\.record.epoch.rawValue)
        #expect(epochs.prefix(4) == [1, 5, 100, 213])
        #expect(epochs.count == 300 + 3)
    }

    /// The chain of epochs in the words `volume why` prints.
    @Test func theChainInWords() async throws {
        let test = try TestStore()
        var writer = try await Writer(test)
        let lost = writer.record.inSync[2]
        try await writer.write(.takeover) { $0.engineEndpoint = "h:1" }
        try await writer.write(.removal) {
            $0.inSync.remove(at: 2)
            $0.out = [
                .init(
                    member: lost, leftEpoch: $0.epoch,
                    stablePoint: .init(epoch: Epoch(2), sequence: SequenceNumber(9)),
                    reason: .disconnected)
            ]
        }
        let stored = try await test.store.volume(named: "vol")
        let inspection = DirectoryInspection(
            volume: stored.volume.id, name: "vol", replica: lost.replica.text,
            incarnation: hexadecimal(lost.incarnation.rawValue), sizeBytes: 1 << 30, promise: 2,
            flushedEpoch: 2)
        func message() async throws -> Haptera_V1_VolumeExplanation {
            Explanation(
                try await test.store.volume(named: "vol"),
                history: try await test.store.history(of: stored.volume.id, limit: 20),
                nodes: [:], inspections: [lost.replica.text: .found(inspection)]
            ).message
        }
        let out = try await message()
        let name = "replica \(lost.replica.text) on c"
        #expect(
            out.changes.map(\.text).dropFirst() == [
                "engine at h:1 took over", "removed \(name), because its connection was closed",
            ])
        #expect(out.changes[0].text.hasPrefix("created with replica "))
        #expect(out.changes[2].inSync == writer.record.inSync.map(\.replica.text))
        #expect(out.away.map(\.replicaID) == [lost.replica.text])
        #expect(out.away[0].leftEpoch == 3)
        #expect(out.away[0].leftUnixMilliseconds == 1_001_000)
        #expect(out.away[0].inspected)
        #expect(out.away[0].promisedEpoch == 2)
        // No node is heard of: it waits for either member.
        #expect(out.waitsFor.hasPrefix("one of: replica \(writer.record.inSync[0].replica.text)"))

        try await writer.write(.join) { $0.joining = lost }
        try await writer.write(.promotion) {
            $0.inSync.append(lost)
            $0.out = []
            $0.joining = nil
        }
        try await writer.write(.detach) { $0.isClean = true }
        #expect(
            try await message().changes.suffix(3).map(\.text) == [
                "\(name) joins: it is being filled", "\(name) is in sync again",
                "detached, clean",
            ])
    }
}

extension MetadataStore {
    fileprivate func deleteVolumeAndRecord(_ name: String) async throws {
        _ = try await deleteVolume(name)
    }
}

@Suite struct AgentTasksTests {
    private func answer(_ node: String, _ id: UInt64) -> Haptera_V1_AgentAnswer {
        var answer = Haptera_V1_AgentAnswer()
        answer.name = node
        answer.taskID = id
        return answer
    }

    @Test func aTaskIsAnsweredByItsNodeOnly() async throws {
        let tasks = AgentTasks()
        await #expect(throws: ControlError.self) { try await tasks.ask("a") { _ in } }
        var stream = await tasks.watch("a", nodeID: "").makeAsyncIterator()
        let asked = Task { try await tasks.ask("a") { $0.endEngine.volumeID = "v" } }
        let task = try #require(await stream.next())
        #expect(task.endEngine.volumeID == "v")
        // A stranger's answer is not taken.
        var wrong = answer("b", task.id)
        wrong.error = "no"
        await tasks.answered(wrong)
        wrong = answer("a", task.id)
        wrong.nodeID = "00000000000000ff"
        wrong.error = "no"
        await tasks.answered(wrong)
        await tasks.answered(answer("a", task.id))
        #expect(try await asked.value.taskID == task.id)
    }

    @Test func aFailureIsThrownAndANewAgentAnswersNothingOld() async throws {
        let tasks = AgentTasks()
        var stream = await tasks.watch("a", nodeID: "").makeAsyncIterator()
        let failing = Task { try await tasks.ask("a") { _ in } }
        var failed = answer("a", try #require(await stream.next()).id)
        failed.error = "it broke"
        await tasks.answered(failed)
        await #expect(throws: ControlError(.precondition, "node a: it broke")) {
            _ = try await failing.value
        }
        let abandoned = Task { try await tasks.ask("a") { _ in } }
        _ = await stream.next()
        _ = await tasks.watch("a", nodeID: "")
        await #expect(throws: ControlError.self) { _ = try await abandoned.value }
        #expect(await stream.next() == nil)
    }
}
