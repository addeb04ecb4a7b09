import Testing

@testable import HapteraCore

/// Records of the activity log that rot while only they say what a block is.
@Suite struct ReplicaLogDamageTests {
    private func used() throws -> ReplicaBench {
        let bench = try ReplicaBench()
        _ = try bench.attach()
        bench.write(ReplicaBench.pattern(1), at: 0)
        try bench.run()
        try bench.flush(5)
        bench.write(ReplicaBench.pattern(2), at: 4096, sequence: 6)
        try bench.run()
        try bench.flush(7)
        return bench
    }
    private func flip(_ bench: ReplicaBench, record: Int) throws {
        try bench.disk.memory(.log)[ActivityLog.ringOffset + record * LogRecord.size + 9] ^= 1
    }
    private func count(_ bench: ReplicaBench) throws -> Int {
        let log = try bench.disk.memory(.log)
        let all = 0..<Int(ActivityLog.capacityMin)
        return all.prefix {
            LogRecord(decoding: log, at: ActivityLog.ringOffset + $0 * LogRecord.size) != nil
        }.count
    }

    /// Taken for one that was never durable, it would leave its block as it was before: a flushed
    /// write undone, in a copy that passes for as good as the others. While the host runs on, what
    /// a process has stored is there.
    @Test func aDamagedRecordIsNoticedWhileTheHostRuns() throws {
        let most = try count(try used())
        #expect(most > 3)
        var undone = 0
        for record in 0..<most - 1 {
            let bench = try used()
            try flip(bench, record: record)
            #expect(throws: StorageError.self) { try bench.reopen() }
            var options = ReplicaBench.options()
            options.mutations = .damagedRecordIsGap
            let next = try ReplicaBench(disk: bench.disk, create: false, options: options)
            let epoch = next.core.promise.rawValue + 1
            _ = try next.attach(epoch: epoch)
            let tag = next.send(.read, epoch: epoch, offset: 0, length: 4096)
            try next.run()
            // As if nothing had been written there.
            if let reply = next.reply(tag), reply.header.status == .ok, reply.data.isEmpty {
                undone += 1
            }
        }
        #expect(undone > 0)
        try used().reopen()
    }

    /// After a power cut records may be missing that no sync had covered. From then on none may.
    @Test func whatAPowerCutLeftOutIsNoDamage() throws {
        let bench = try used()
        let flushed = try count(bench)
        for block in 2...3 {
            bench.write(ReplicaBench.pattern(3), at: UInt64(block) * 4096, sequence: 8)
            try bench.run()
        }
        try #expect(count(bench) == flushed + 2)
        try flip(bench, record: flushed)
        try bench.reopen(boot: 2)
        _ = try bench.attach(epoch: bench.core.promise.rawValue + 1)
        try bench.reopen()
        try flip(bench, record: flushed)
        #expect(throws: StorageError.self) { try bench.reopen() }
    }

    /// What was flushed no power cut leaves out: missing after one, a record has rotted, whatever
    /// it says. It was taken for never made.
    @Test func aDamagedRecordOfWhatWasFlushedIsNoticedAfterARestart() throws {
        let all = try used()
        let log = try all.disk.memory(.log)
        let covered = try (0..<count(all)).compactMap {
            LogRecord(decoding: log, at: ActivityLog.ringOffset + $0 * LogRecord.size)
        }
        .filter { $0.kind == .covered }.map(\.position)
        let entries = 3
        #expect(covered.max().map { $0 > entries } == true)
        for record in 0..<Int(covered.max() ?? 0) {
            let bench = try used()
            try flip(bench, record: record)
            #expect(throws: StorageError.self) { try bench.reopen(boot: 2) }
            var options = ReplicaBench.options(boot: 2)
            options.mutations = .coveredRecordIsGap
            _ = try ReplicaBench(disk: bench.disk, create: false, options: options)
        }
        try used().reopen(boot: 2)
    }
}
