import Testing

@testable import HapteraCore

/// Births that an Install raises while regions leave the activity log.
@Suite struct ReplicaBirthTests {
    /// Writes and flushes region 0, has it leave the log, and sends the next Install after that
    /// many disk operations. Returns the region's birth as told then, and by the next process, and
    /// whether the Install's answer names it as in the log.
    private func births(after operations: Int, failing isFailing: Bool, _ mutations: MutationSet)
        throws -> (told: UInt64, kept: UInt64, isNamed: Bool, isOver: Bool)
    {
        var options = ReplicaBench.options()
        options.mutations = mutations
        let bench = try ReplicaBench(options: options)
        _ = try bench.attach()
        bench.write(ReplicaBench.pattern(1), at: 0)
        try bench.run()
        try bench.flush(5)
        bench.now = bench.now.adding(milliseconds: 2 * Upkeep.idleMilliseconds)
        bench.step(.tick)
        for _ in 0..<operations where !bench.pending.isEmpty { try bench.performOne() }
        let isOver = bench.pending.isEmpty
        if isFailing {
            bench.fault = { action in
                if case .write(.table, _, _, _, _, _) = action { -28 } else { nil }
            }
        }
        let tag = bench.install(epoch: 2)
        try bench.run()
        let reply = try #require(bench.reply(tag).flatMap { InstallReply(decoding: $0.table) })
        bench.fault = nil
        let told = try bench.birth()
        try bench.reopen()
        _ = try bench.attach(epoch: bench.core.promise.rawValue + 1)
        return (told, try bench.birth(), !reply.activeRegions.isEmpty, isOver)
    }

    /// Told a later birth than the page has, an engine leaves the page as it is: the next one finds
    /// the region older than what is in it, and does not send it to whom lacks that.
    /// (Seed 5705358.)
    @Test(arguments: [false, true])
    func whatIsToldOfARegionThatLeavesTheLogIsKept(isFailing: Bool) throws {
        var missed = 0
        for operations in 0..<20 {
            let births = try births(after: operations, failing: isFailing, [])
            #expect(births.kept >= births.told, "after \(operations) operations")
            // What is in the log may have been written in any epoch up to this one.
            #expect(!births.isNamed || births.told == 2, "after \(operations) operations")
            let bad = try self.births(after: operations, failing: isFailing, .leavingIsRestamped)
            if bad.kept < bad.told { missed += 1 }
            if births.isOver { break }
        }
        #expect(missed > 0 || isFailing)
    }
}
