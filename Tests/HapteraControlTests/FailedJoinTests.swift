import HapteraAPI
import HapteraCore
import Testing

@testable import HapteraControl

/// Replicas whose filling has failed. The record goes on to name one as the joiner until another
/// one joins or an engine takes over, though nobody fills it.
extension ReplicaUpkeepTests {
    /// A joiner drops out without a change of the record, which goes on to name it: whether it is
    /// being filled, only the engine knows. Such a one was never replaced.
    @Test func oneThatDiesForGoodWhileItIsFilledIsReplaced() async throws {
        let world = try await World()
        let lost = try await world.replica(on: "c")
        try await world.lose("c")
        world.alive.insert("c")
        try await world.loseWhileJoining("c")
        try await world.pass(Self.timeout + 20_000)
        #expect(try await world.nodes == ["a", "b", "c", "d"])
        #expect(try await world.replica(on: "d").replaces == lost.id)
        let explanation = Explanation(
            try await world.stored, history: [], nodes: await world.controller.observedNodes,
            inspections: [:]
        ).message
        #expect(explanation.away.allSatisfy { !$0.joining })
    }

    @Test func aReplacementThatDiesWhileItIsFilledIsGivenUp() async throws {
        let world = try await World()
        try await world.lose("c")
        try await world.pass(Self.timeout + 20_000)
        let first = try await world.replica(on: "d")
        try await world.loseWhileJoining("d")
        // It goes, with the record naming it, and another one is begun.
        try await world.pass(Self.timeout + 40_000)
        #expect(try await world.nodes == ["a", "b", "c", "e"])
        #expect(try await world.stored.record?.joining == first.member)
        #expect(try await world.test.store.discardedReplicas(on: "d").map(\.id) == [first.id])
        // The engine's records go on to name it, until another one joins.
        let gone = try #require(try await world.replica(on: "b").member)
        try await world.swap { $0.inSync.removeAll { $0 == gone } }
        try await world.join("e")
        try await world.pass(9000)
        #expect(try await world.stored.record?.joining == nil)
    }

    /// Also another replica that runs, and that the engine cannot reach, waits for nobody then.
    @Test func aFailedFillingHoldsUpNoOther() async throws {
        let world = try await World()
        try await world.lose("b")
        try await world.lose("c")
        world.alive.formUnion(["b", "c"])
        try await world.loseWhileJoining("c")
        world.words["b"] = "absent"
        try await world.pass(Self.timeout + 20_000)
        let new = try await world.replica(on: "d")
        let lost = [try await world.replica(on: "b").id, try await world.replica(on: "c").id]
        #expect(lost.contains(new.replaces ?? ""))
        let away = try #require(try await world.stored.replicas.first { $0.node == "b" })
        let look = ReplicaUpkeep(
            try await world.stored, nodes: await world.controller.observedNodes, rooms: [:],
            awaySince: [:], now: 0)
        #expect(look.isAway(away))
    }

    /// Whoever is not the engine of just this record does not know what that fills.
    @Test func onlyTheRecordsOwnEngineIsBelieved() async throws {
        let world = try await World()
        try await world.lose("c")
        world.alive.insert("c")
        try await world.beginJoin("c")
        let id = try await world.replica(on: "c").id
        world.instance = InstanceID(rawValue: 78)
        world.words["c"] = "absent"
        _ = try await world.controller.deleteReplica(id, of: "vol", discardKept: false)
        try await world.pass(2 * Self.timeout)
        #expect(try await world.nodes == ["a", "b", "c"])
    }

    /// The engine is told to do without it, and has done so, before its data goes: until then it
    /// may make it a member.
    @Test func aJoinerIsDeletedWhenTheEngineHasLetItGo() async throws {
        let world = try await World()
        try await world.lose("c")
        world.alive.insert("c")
        try await world.beginJoin("c")
        let row = try await world.replica(on: "c")
        world.rebuilding = row.id
        _ = try await world.controller.deleteReplica(row.id, of: "vol", discardKept: false)
        #expect(try await world.replica(on: "c").phase == .leave)
        let engine = try await world.controller.desired(for: "a", nodeID: hexadecimal(1)).engines[0]
        #expect(!engine.replicas.map(\.replicaID).contains(row.id))
        // It may be just about to be promoted.
        try await world.pass(2 * Self.timeout)
        #expect(try await world.replica(on: "c").phase == .leave)
        world.rebuilding = nil
        try await world.pass(18_000)
        #expect(try await world.nodes == ["a", "b"])
        #expect(try await world.stored.record?.joining == row.member)
        #expect(try await world.test.store.discardedReplicas().isEmpty)
        // The record can change though it names one that is gone, which cannot be promoted.
        let record = try #require(try await world.stored.record)
        let member = try #require(row.member)
        let promotion = record.next(nonce: 5) {
            $0.joining = nil
            $0.inSync.append(member)
        }
        let answer = try await world.test.store.compareAndSwap(
            record.volume, expected: record.epoch, proposal: promotion.encoded())
        #expect(answer == .invalid("the record names an unknown replica"))
        let again = record.next(nonce: 6)
        let harmless = try await world.test.store.compareAndSwap(
            record.volume, expected: record.epoch, proposal: again.encoded())
        #expect(harmless == .swapped)
    }

    /// A record that was swapped since the engine told of itself: it may join again.
    @Test func whatWasDecidedAboutAnOlderRecordIsNotDone() async throws {
        let world = try await World()
        try await world.lose("c")
        world.alive.insert("c")
        try await world.beginJoin("c")
        let row = try await world.replica(on: "c")
        let seen = try await world.stored.record?.epoch
        _ = try await world.controller.deleteReplica(row.id, of: "vol", discardKept: false)
        try await world.swap { _ in }
        try await world.test.store.finishLeaving(row.id, of: "vol", after: seen)
        #expect(try await world.replica(on: "c").phase == .leave)
        try await world.pass(18_000)
        #expect(try await world.nodes == ["a", "b"])
    }
}
