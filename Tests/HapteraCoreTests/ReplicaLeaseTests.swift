import Testing

@testable import HapteraCore

/// What a replica tells a new engine about the leases it has given (rule L).
@Suite struct ReplicaLeaseTests {
    /// A process that starts does not know what the one before it gave, and assumes the most.
    /// (`restartedReplicaForgetsLease`: it says none.)
    @Test(arguments: [(0, 500), (200, 300), (500, 0)] as [(UInt64, UInt32)])
    func aRestartedReplicaAssumesTheLongestLease(later: UInt64, left: UInt32) throws {
        #expect(try leaseAfterRestart(later, []) == left)
        #expect(try leaseAfterRestart(later, .restartedReplicaForgetsLease) == 0)
    }
    private func leaseAfterRestart(_ later: UInt64, _ mutations: MutationSet) throws -> UInt32? {
        var options = ReplicaBench.options()
        options.mutations = mutations
        let bench = try ReplicaBench(options: options)
        _ = try bench.attach()
        try bench.reopen()
        try bench.tick(milliseconds: 0)
        bench.now = bench.now.adding(milliseconds: later)
        return try bench.attach(epoch: 2, engine: 2)?.leaseRemainingMilliseconds
    }

    /// The engine's own lease, and one given up in order, keep nobody waiting.
    @Test func noLeaseIsLeftOfTheEngineItself() throws {
        let bench = try ReplicaBench()
        _ = try bench.attach()
        #expect(try bench.attach(epoch: 2, on: 1)?.leaseRemainingMilliseconds == 0)
        #expect(try bench.attach(epoch: 3, on: 2, engine: 2)?.leaseRemainingMilliseconds == 500)
    }
}
