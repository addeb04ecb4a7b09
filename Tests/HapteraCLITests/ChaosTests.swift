import Foundation
import Glibc
import HapteraHost
import Testing

@testable import HapteraCLI

/// The judge of a chaos run must see what it is there to see.
@Suite struct ChaosTests {
    @Test func aBlockSaysWhatItIs() {
        let bytes = SelfDescribingBlock.bytes(7, 42)
        #expect(bytes.count == SelfDescribingBlock.size)
        #expect(SelfDescribingBlock.value(7, bytes) == 42)
        #expect(SelfDescribingBlock.value(8, bytes) == nil)
        #expect(SelfDescribingBlock.value(7, [UInt8](repeating: 0, count: 4096)) == 0)
        for position in [0, 8, 100, 4095] {
            var torn = bytes
            torn[position] ^= 1
            #expect(SelfDescribingBlock.value(7, torn) == nil)
        }
    }

    @Test func aLostWriteAndAForeignBlockAreFound() {
        let history = ChaosHistory()
        let first = history.writeInvoked(1)
        history.writeReturned(1, first.operation)
        let read = history.readInvoked(1)
        history.readReturned(1, read, first.value)
        #expect(history.judge().isEmpty)
        let second = history.writeInvoked(1)
        // Not acknowledged: it may be read or not, but not un-happen.
        history.readReturned(1, history.readInvoked(1), second.value)
        #expect(history.judge().isEmpty)
        history.readReturned(1, history.readInvoked(1), first.value)
        #expect(history.judge().count == 1)
        history.readReturned(2, history.readInvoked(2), nil)
        #expect(history.judge().count == 2)
    }

    /// The whole way, from clients to judge, over a server that lies about one block.
    @Test(arguments: [
        ("tells the truth", 0), ("forgets", 1), ("goes back", 1), ("misplaces", 1), ("tears", 1),
        ("fails", 1),
    ])
    func aServerThatLiesIsFound(_ lie: String, violationsMin: Int) async throws {
        let directory = "/tmp/haptera-\(UInt32.random(in: .min ... .max))"
        try HostFiles.makeDirectory(directory)
        defer { try? FileManager.default.removeItem(atPath: directory) }
        let socket = directory + "/socket"
        let server = try ChildProcess.startDetached(
            URL(filePath: #filePath).deletingLastPathComponent()
                .appending(path: "Fakes/lying-server").path,
            [socket, lie], log: directory + "/log")
        defer { server.signal(SIGKILL) }
        while (try? NBDSocket(path: socket, export: "vol")) == nil {
            try #require(server.isRunning)
            await Task.yield()
        }
        let workload = ChaosWorkload(path: socket, export: "vol", sizeBytes: 8 * 4096, blocks: 8)
        try workload.fill()
        // More than enough for the tenth write of every block.
        workload.start(workers: 2, seed: 1, pauseMicroseconds: 100)
        while workload.history.counts.acknowledged < 600 { await Task.yield() }
        workload.stop()
        try workload.readAll()
        let violations = workload.history.judge()
        #expect(violations.count >= violationsMin, "\(lie)")
        #expect(violationsMin > 0 || violations.isEmpty, "\(violations)")
        let blamed = ["block 3:"] + (lie == "misplaces" ? ["block 4:"] : [])
        #expect(violations.allSatisfy { text in blamed.contains { text.hasPrefix($0) } })
    }

    @Test func theSameSeedPlansTheSameFaults() {
        func plan(_ seed: UInt64, _ faults: [ChaosFault]) -> [FaultPlan.Step] {
            let plan = FaultPlan(seed: seed, faults: faults, replicas: 3)
            return (0..<200).map { _ in plan.next() }
        }
        let all = plan(7, ChaosFault.allCases)
        #expect(all == plan(7, ChaosFault.allCases))
        #expect(all != plan(8, ChaosFault.allCases))
        for fault in ChaosFault.allCases {
            let steps = all.filter { $0.fault == fault }
            #expect(steps.count > 20)
            let isOfReplicas = steps.allSatisfy { $0.replica != nil }
            #expect(isOfReplicas == fault.isOfReplicasOnly)
            let lasts = steps.allSatisfy { $0.milliseconds > 0 }
            #expect(lasts == (fault != .kill && fault != .flip))
        }
        // One good copy stays: rot in one replica, and nothing else until all are in sync.
        #expect(Set(all.filter { $0.fault == .flip }.map(\.replica)).count == 1)
        #expect(all.contains { !$0.waitsForHealth } == false)
        #expect(plan(7, [.kill, .pause]).contains { !$0.waitsForHealth })
    }

    @Test func faultsAreTyped() throws {
        #expect(try ChaosFaults(typed: "flip,kill").faults == [.flip, .kill])
        for wrong in ["nonsense", "", "kill,", "Kill"] {
            #expect(throws: (any Error).self) { try ChaosFaults(typed: wrong) }
        }
    }
}
