import GRDB
import HapteraCore
import Testing

@testable import HapteraControl

@Suite struct MetadataStoreTests {
    /// With any less, a power cut takes back what was answered as done.
    @Test func writesAreSynced() async throws {
        let test = try TestStore()
        let mode = try await test.store.database.writeWithoutTransaction { db in
            (
                try Int.fetchOne(db, sql: "PRAGMA synchronous"),
                try String.fetchOne(db, sql: "PRAGMA journal_mode")
            )
        }
        #expect(mode.0 == 2)
        #expect(mode.1 == "wal")
    }

    @Test func everythingIsThereAfterReopening() async throws {
        let test = try TestStore()
        let volume = try await test.makeVolume()
        let clusterID = try await test.store.clusterID()
        try test.store.database.close()
        let again = try MetadataStore(path: test.directory.path + "/store")
        #expect(try await again.volume(named: "vol") == volume)
        #expect(try await again.clusterID() == clusterID)
        #expect(try await again.nodes().map(\.name) == ["a", "b", "c"])
    }

    /// No engine may find a member whose directory was not made yet.
    @Test func theRecordAppearsWithTheLastReplica() async throws {
        let test = try TestStore()
        try await test.addNodes(["a", "b"])
        let created = try await test.store.createVolume(
            VolumeSpecification(name: "v", sizeBytes: 1 << 20, replicas: 2, nodes: []),
            candidates: ["a", "b"])
        #expect(created.volume.phase == .creating)
        try await test.run(created.replicas[0])
        let half = try await test.store.volume(named: "v")
        #expect(half.volume.phase == .creating)
        #expect(half.record == nil)
        try await test.run(created.replicas[1])
        let whole = try await test.store.volume(named: "v")
        #expect(whole.volume.phase == .ready)
        #expect(whole.record?.epoch == Epoch(1))
        #expect(whole.record?.inSync == whole.replicas.compactMap(\.member))
        #expect(whole.record?.inSync.count == 2)
    }

    @Test func aReplicaIsBelievedFromItsOwnNodeOnly() async throws {
        let test = try TestStore()
        try await test.addNodes(["a", "b"])
        let created = try await test.store.createVolume(
            VolumeSpecification(name: "v", sizeBytes: 1 << 20, replicas: 1, nodes: ["a"]),
            candidates: ["a", "b"])
        var stranger = created.replicas[0]
        stranger.node = "b"
        try await test.run(stranger)
        #expect(try await test.store.volume(named: "v").replicas[0].phase == .create)
    }

    @Test func aNodeNameBelongsToOneDirectory() async throws {
        let test = try TestStore()
        try await test.addNodes(["a"])
        await #expect(throws: ControlError.self) {
            try await test.store.registerNode(
                NodeRow(
                    name: "a", nodeID: "00000000000000ff", address: "127.0.0.1",
                    directory: "/other", version: "1", pid: 2))
        }
        #expect(try await test.store.nodes().map(\.directory) == ["/a"])
    }

    @Test func eventsAreAnAudit() async throws {
        let test = try TestStore()
        try await test.addNodes(["a"])
        try await Caller.$current.withValue(Caller(actor: "ann@host", peer: "ipv4:1.2.3.4:5")) {
            _ = try await test.store.createVolume(
                VolumeSpecification(name: "v", sizeBytes: 1 << 20, replicas: 1, nodes: []),
                candidates: ["a"])
        }
        let events = try await test.store.events(after: 0, limit: 10)
        let last = try #require(events.last)
        #expect(last.kind == "VolumeRequested")
        #expect(last.subject == "volume/v")
        #expect(last.actor == "ann@host")
        #expect(last.peer == "ipv4:1.2.3.4:5")
        #expect(last.timeMilliseconds == test.clock.now)
        #expect(try await test.store.events(after: last.id ?? 0, limit: 10).isEmpty)
    }

    @Test func oldEventsGo() async throws {
        let test = try TestStore()
        let count = MetadataStore.eventsMax + 512
        try await test.store.transaction { db in
            for number in 0..<count {
                try test.store.addEvent(db, "Kind", "subject", "\(number)")
            }
        }
        let kept = try await test.store.database.read { db in try EventRow.fetchCount(db) }
        #expect(kept <= MetadataStore.eventsMax + 256)
        let newest = try await test.store.events(after: 0, limit: 1)
        #expect(newest.first?.message == "\(count - 1)")
    }
}

@Suite struct RecordTableTests {
    private func setUp() async throws -> (TestStore, VolumeID, VolumeRecord) {
        let test = try TestStore()
        let stored = try await test.makeVolume()
        let record = try #require(stored.record)
        return (test, record.volume, record)
    }

    @Test func swapsAtTheExpectedEpochOnly() async throws {
        let (test, volume, first) = try await setUp()
        let second = first.next(nonce: 7) { $0.inSync.removeLast() }
        let result = try await test.store.compareAndSwap(
            volume, expected: Epoch(1), proposal: second.encoded())
        #expect(result == .swapped)
        #expect(try await test.store.record(of: volume) == second.encoded())

        let late = first.next(nonce: 8)
        #expect(
            try await test.store.compareAndSwap(
                volume, expected: Epoch(1), proposal: late.encoded())
                == .conflict(second.encoded()))
        #expect(try await test.store.record(of: volume) == second.encoded())
    }

    /// A writer in doubt sends the identical proposal again, and learns that it landed.
    @Test func theSameProposalAgainIsSwapped() async throws {
        let (test, volume, first) = try await setUp()
        let second = first.next(nonce: 7)
        for _ in 0..<3 {
            #expect(
                try await test.store.compareAndSwap(
                    volume, expected: Epoch(1), proposal: second.encoded()) == .swapped)
        }
        // Another writer's record of the same epoch differs in its nonce.
        let other = first.next(nonce: 8)
        #expect(
            try await test.store.compareAndSwap(
                volume, expected: Epoch(1), proposal: other.encoded())
                == .conflict(second.encoded()))
        // And once it was overtaken, it did not win.
        let third = second.next(nonce: 9)
        #expect(
            try await test.store.compareAndSwap(
                volume, expected: Epoch(2), proposal: third.encoded()) == .swapped)
        #expect(
            try await test.store.compareAndSwap(
                volume, expected: Epoch(1), proposal: second.encoded())
                == .conflict(third.encoded()))
    }

    @Test func oneOfManyWritersWins() async throws {
        let (test, volume, first) = try await setUp()
        let winners = try await withThrowingTaskGroup(of: Bool.self) { group in
            for nonce in 100..<116 as Range<UInt64> {
                group.addTask {
                    try await test.store.compareAndSwap(
                        volume, expected: Epoch(1), proposal: first.next(nonce: nonce).encoded())
                        == .swapped
                }
            }
            return try await group.reduce(0) { $0 + ($1 ? 1 : 0) }
        }
        #expect(winners == 1)
    }

    /// What comes while the store is busy is decided in one transaction, each for itself.
    @Test func manyAtOnceCostOneTransaction() async throws {
        let (test, _, _) = try await setUp()
        var records: [VolumeRecord] = []
        for number in 0..<8 {
            records.append(try #require(try await test.makeVolume("v\(number)").record))
        }
        let commits = RecordCommits()
        test.store.database.add(transactionObserver: commits)
        let results = try await test.whileBusy(swaps: records.count) { [records] in
            try await withThrowingTaskGroup(of: (Int, SwapResult).self) { group in
                for (number, record) in records.enumerated() {
                    let expected = Epoch(number == 3 ? 7 : 1)
                    var proposal = record.next(nonce: 5)
                    proposal.epoch = expected.next
                    if number == 5 { proposal.name = "other" }
                    let bytes = proposal.encoded()
                    group.addTask {
                        let result = try await test.store.compareAndSwap(
                            record.volume, expected: expected, proposal: bytes)
                        return (number, result)
                    }
                }
                return try await group.reduce(into: [:]) { $0[$1.0] = $1.1 }
            }
        }
        #expect(commits.count == 1)
        for (number, record) in records.enumerated() {
            let stored = try await test.store.record(of: record.volume)
            switch number {
            case 3: #expect(results[3] == .conflict(record.encoded()))
            case 5:
                guard case .invalid = results[5] else {
                    Issue.record("\(results)")
                    continue
                }
            default:
                #expect(results[number] == .swapped)
                #expect(stored == record.next(nonce: 5).encoded())
                continue
            }
            #expect(stored == record.encoded())
        }
    }

    /// One that the database refuses takes none of the others along.
    @Test func aFailureFailsAlone() async throws {
        let (test, _, _) = try await setUp()
        let (good, bad) = (
            try #require(try await test.makeVolume("good").record),
            try #require(try await test.makeVolume("bad").record)
        )
        try await test.store.transaction { db in
            try db.execute(
                sql: """
                    CREATE TRIGGER refuse BEFORE UPDATE ON records
                    WHEN NEW.volumeID = '\(bad.volume.text)'
                    BEGIN SELECT RAISE(ABORT, 'the disk is full'); END
                    """)
        }
        let outcomes = try await test.whileBusy(swaps: 2) {
            await withTaskGroup(of: (VolumeID, SwapResult?).self) { group in
                for record in [good, bad] {
                    group.addTask {
                        let result = try? await test.store.compareAndSwap(
                            record.volume, expected: Epoch(1),
                            proposal: record.next(nonce: 5).encoded())
                        return (record.volume, result)
                    }
                }
                return await group.reduce(into: [VolumeID: SwapResult?]()) { $0[$1.0] = $1.1 }
            }
        }
        #expect(outcomes[good.volume] == .some(.swapped))
        #expect(outcomes[bad.volume] == .some(nil))
        #expect(try await test.store.record(of: good.volume) == good.next(nonce: 5).encoded())
        #expect(try await test.store.record(of: bad.volume) == bad.encoded())
        // And the next one finds everything in order.
        #expect(
            try await test.store.compareAndSwap(
                good.volume, expected: Epoch(2),
                proposal: good.next(nonce: 5).next(nonce: 6).encoded()) == .swapped)
    }

    @Test func nonsenseIsRefused() async throws {
        let (test, volume, first) = try await setUp()
        let stranger = VolumeRecord.Member(
            replica: ReplicaID(rawValue: 99), incarnation: Incarnation(rawValue: 1))
        let proposals: [VolumeRecord] = [
            first.next(nonce: 1) { $0.size += 4096 },
            first.next(nonce: 1) { $0.name = "other" },
            first.next(nonce: 1) { $0.inSync = [stranger] },
            first.next(nonce: 1) { $0.joining = stranger },
            first.next(nonce: 1) { $0.inSync[0].incarnation = Incarnation(rawValue: 5) },
            first.next(nonce: 1) { $0.inSync.append($0.inSync[0]) },
            first.next(nonce: 1) { $0.epoch = Epoch(3) },
            first.next(nonce: 1) { $0.volume = VolumeID(high: 1, low: 2) },
        ]
        for proposal in proposals {
            let result = try await test.store.compareAndSwap(
                volume, expected: Epoch(1), proposal: proposal.encoded())
            guard case .invalid = result else {
                Issue.record("\(result)")
                continue
            }
        }
        for bytes in [[], [1, 2, 3], Array(first.next(nonce: 1).encoded().dropLast())] {
            let result = try await test.store.compareAndSwap(
                volume, expected: Epoch(1), proposal: bytes)
            #expect(result == .invalid("not a record of this volume"))
        }
        #expect(try await test.store.record(of: volume) == first.encoded())
    }

    @Test func anUnknownVolumeIsNotFound() async throws {
        let (test, _, first) = try await setUp()
        let other = VolumeID(high: 1, low: 2)
        var proposal = first.next(nonce: 1)
        proposal.volume = other
        #expect(try await test.store.record(of: other) == nil)
        #expect(
            try await test.store.compareAndSwap(
                other, expected: Epoch(1), proposal: proposal.encoded()) == .notFound)
    }

    @Test func changesOfTheInSyncSetAreEvents() async throws {
        let (test, volume, first) = try await setUp()
        let lost = first.inSync[2]
        let second = first.next(nonce: 1) {
            $0.inSync.removeLast()
            $0.engine = InstanceID(rawValue: 5)
        }
        let third = second.next(nonce: 2) { $0.joining = lost }
        let fourth = third.next(nonce: 3) {
            $0.joining = nil
            $0.inSync.append(lost)
        }
        for (epoch, record) in zip(1..., [second, third, fourth]) {
            let result = try await test.store.compareAndSwap(
                volume, expected: Epoch(UInt64(epoch)), proposal: record.encoded())
            #expect(result == .swapped)
        }
        let kinds = try await test.store.events(after: 0, limit: 100).map(\.kind)
        #expect(
            kinds.suffix(4) == [
                "EngineTookOver", "ReplicaRemoved", "ReplicaJoining", "ReplicaPromoted",
            ])
    }
}
