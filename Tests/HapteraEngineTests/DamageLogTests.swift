import HapteraCore
import Testing

@testable import HapteraEngine

/// What becomes of bad copies, from what the engine's core says of them.
@Suite struct DamageLogTests {
    private let a = ReplicaID(rawValue: 1)
    private let b = ReplicaID(rawValue: 2)
    private let c = ReplicaID(rawValue: 3)
    private static let region = UInt64(Geometry.regionSize)

    private func texts(_ log: DamageLog) -> [String] { log.findings.map(\.text) }

    @Test func whatARepairRewritesIsToldWithItsReplica() {
        var log = DamageLog()
        #expect(log.statusLines.isEmpty)
        log.found(b, offset: Self.region + 8192, now: .zero)
        log.found(b, offset: Self.region + 8192, now: .zero)
        log.found(a, offset: Self.region + 4096, now: .zero)
        #expect(log.statusLines.isEmpty)
        // Of another region.
        log.repaired(region: 0, blocks: 1, members: [a, b])
        log.repaired(region: 1, blocks: 2, members: [a, b])
        let replicas = [b, a].map(\.text).joined(separator: ",")
        #expect(
            log.statusLines.map { "\($0.key)=\($0.value)" } == [
                "damage=2", "damage.repaired=3", "damage.lost=0", "damage.damaged=0",
                "damage.1=repaired:0:1:",
                "damage.2=repaired:\(Self.region + 4096):2:\(replicas)",
            ])
        // Good again by itself: nothing was rewritten.
        log.found(a, offset: 0, now: .zero)
        log.repaired(region: 0, blocks: 0, members: [a, b])
        #expect(log.number == 2 && !log.isWaiting)
        // Not of one that has left meanwhile.
        log.found(b, offset: 0, now: .zero)
        log.repaired(region: 0, blocks: 0, members: [a])
        #expect(log.number == 2 && log.isWaiting)
    }

    /// One block is bad everywhere, another one on one member, which is rewritten.
    @Test func whatNobodyHasIsNotCalledRepaired() {
        var log = DamageLog()
        for replica in [a, b] { log.found(replica, offset: 0, now: .zero) }
        log.found(b, offset: 8192, now: .zero)
        log.repaired(region: 0, blocks: 1, members: [a, b])
        #expect(texts(log) == ["repaired:8192:1:\(b.text)"])
        // Each had another block of one request: nothing else is known.
        for replica in [a, b] { log.found(replica, offset: 4096, now: .zero) }
        log.repaired(region: 0, blocks: 2, members: [a, b])
        #expect(texts(log).last == "repaired:4096:2:\(a.text),\(b.text)")
        #expect(!log.isWaiting)
    }

    /// Only if every member has failed at the same place; once, however often it is read.
    @Test func aRequestThatFailsForWantOfACopyIsALoss() {
        var log = DamageLog()
        #expect(log.requestFailed(members: [a, b]).isEmpty)
        log.found(a, offset: 4096, now: .zero)
        log.found(b, offset: 8192, now: .zero)
        #expect(log.requestFailed(members: [a, b]).isEmpty)
        #expect(log.requestFailed(members: []).isEmpty)
        log.found(b, offset: 4096, now: .zero)
        #expect(log.requestFailed(members: [a, b, c]).isEmpty)
        #expect(log.requestFailed(members: [a, b]).map(\.offset) == [4096])
        #expect(log.requestFailed(members: [a, b]).isEmpty)
        #expect(texts(log) == ["lost:4096:1:\(a.text),\(b.text)"])
        // Nor again when it has been forgotten which copies were bad.
        log.tick(now: Instant.zero.adding(milliseconds: DamageLog.patienceMilliseconds))
        #expect(texts(log).count == 2 && texts(log)[1] == "damaged:8192:1:\(b.text)")
        func readAgain() -> [DamageLog.Finding] {
            log.found(a, offset: 4096, now: .zero)
            log.found(b, offset: 4096, now: .zero)
            return log.requestFailed(members: [a, b])
        }
        #expect(readAgain().isEmpty)
        // The engine tries to repair it each time, in vain.
        log.repaired(region: 0, blocks: 0, members: [a, b])
        #expect(readAgain().isEmpty)
        // But if it was good in between.
        log.repaired(region: 0, blocks: 1, members: [a, b])
        #expect(readAgain().map(\.offset) == [4096])
    }

    /// A scrub tells what is lost before it has repaired the rest.
    @Test func aScrubTellsBothOfARegion() {
        var log = DamageLog()
        log.found(a, offset: 4096, blocks: 5, now: .zero)
        log.found(b, offset: 4096, blocks: 2, now: .zero)
        log.lost(offset: 4096, blocks: 2)
        log.repaired(region: 0, blocks: 3, members: [a, b, c])
        let both = "\(a.text),\(b.text)"
        #expect(texts(log) == ["lost:4096:2:\(both)", "repaired:4096:3:\(both)"])
        log.found(a, offset: Self.region, blocks: 5, now: .zero)
        log.lost(offset: Self.region, blocks: 5)
        log.tick(now: Instant.zero.adding(milliseconds: DamageLog.patienceMilliseconds))
        #expect(!log.isWaiting && log.number == 3)
        log.lost(offset: Self.region, blocks: 5)
        #expect(log.number == 3)
        log.nothingIsLost()
        log.lost(offset: Self.region, blocks: 5)
        #expect(log.number == 4)
    }

    /// As when a replica is filled from a damaged copy: no word comes of a repair.
    @Test func whatNothingIsHeardOfIsToldInTheEnd() {
        var log = DamageLog()
        log.found(a, offset: Self.region, blocks: 3, now: .zero)
        log.tick(now: Instant.zero.adding(milliseconds: DamageLog.patienceMilliseconds - 1))
        #expect(log.isWaiting && log.findings.isEmpty)
        log.tick(now: Instant.zero.adding(milliseconds: DamageLog.patienceMilliseconds))
        #expect(!log.isWaiting && texts(log) == ["damaged:\(Self.region):3:\(a.text)"])
    }

    @Test func memoryIsBoundedAndSumsAreNot() {
        var log = DamageLog()
        for block in 0..<DamageLog.openMax + 20 {
            log.found(a, offset: UInt64(block * Geometry.blockSize), now: .zero)
        }
        #expect(log.number == 20 && log.sums[.damaged] == 20)
        #expect(log.findings.map(\.number) == Array(5...20))
        log.tick(now: Instant.zero.adding(milliseconds: DamageLog.patienceMilliseconds))
        #expect(log.sums[.damaged] == UInt64(DamageLog.openMax) + 20)
        #expect(log.findings.count == DamageLog.findingsMax)
        for block in 0...DamageLog.lostOffsetsMax {
            log.lost(offset: UInt64(block * Geometry.blockSize), blocks: 1)
        }
        #expect(log.sums[.lost] == UInt64(DamageLog.lostOffsetsMax) + 1)
    }
}
