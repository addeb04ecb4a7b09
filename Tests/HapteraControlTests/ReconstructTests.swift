import HapteraAPI
import HapteraCore
import Logging
import Synchronization
import Testing

@testable import HapteraControl

@Suite struct ReconstructTests {
    private func request(act: Bool, force: Bool = false) -> Haptera_V1_ReconstructStoreRequest {
        var request = Haptera_V1_ReconstructStoreRequest()
        request.act = act
        request.force = force
        return request
    }

    /// The replicas of a volume as a store knew them that is lost.
    private func lost(
        epoch: Int = 3, without missing: Int? = nil
    ) async throws -> (bench: Bench, before: StoredVolume, record: VolumeRecord) {
        let old = try await Bench(TestStore())
        let before = try await old.test.makeVolume()
        var record = try #require(before.record)
        record = try await old.swap(record, .takeover) { $0.clientGeneration = 4 }
        record = try await old.swap(record, .takeover) { $0.clientGeneration = 5 }
        let bench = try await Bench(TestStore())
        for (index, row) in before.replicas.enumerated() where index != missing {
            bench.place(row, record, promise: 3, running: false)
        }
        try await bench.report()
        return (bench, before, record)
    }

    @Test func anEmptyStoreLearnsItsVolumes() async throws {
        let (bench, before, record) = try await lost()
        let found = try await bench.controller.reconstruct(request(act: false))
        #expect(found.volumes.map(\.name) == ["vol"])
        #expect(found.volumes[0].safe)
        #expect(found.volumes[0].epoch == 3)
        #expect(found.volumes[0].newestOn.count == 3)
        #expect(try await bench.test.store.volumes().isEmpty)

        #expect(
            try await bench.controller.reconstruct(request(act: true)).volumes[0].newEpoch == 3)
        let volume = try await bench.test.store.volume(named: "vol")
        #expect(volume.record == record)
        #expect(volume.volume.id == before.volume.id)
        #expect(volume.volume.phase == .ready)
        #expect(volume.volume.attachedNode == nil)
        // Numbers of attachments the lost store may have given out are not given out again.
        #expect(volume.volume.clientGeneration == 1005)
        #expect(Set(volume.replicas.map(\.id)) == Set(before.replicas.map(\.id)))
        #expect(volume.replicas.allSatisfy { $0.phase == .run })
        #expect(try await bench.kinds().contains("VolumeReconstructed"))
        // Again: there is nothing to do.
        #expect(try await bench.controller.reconstruct(request(act: true)).volumes[0].current)
    }

    /// A volume that was made and never attached is on no replica; the store knows it.
    @Test func aVolumeNeverAttachedIsCurrent() async throws {
        let bench = try await Bench(TestStore())
        let volume = try await bench.test.makeVolume()
        for row in volume.replicas { bench.place(row, nil, promise: 0, running: false) }
        let found = try await bench.controller.reconstruct(request(act: true))
        #expect(found.volumes.map(\.current) == [true])
        #expect(found.volumes[0].objection.isEmpty)
        #expect(try await bench.test.store.volume(named: "vol").record == volume.record)
    }

    @Test func anEngineThatOutlivedTheStoreStays() async throws {
        let (bench, before, _) = try await lost()
        var engine = Haptera_V1_RunningEngine()
        engine.volumeID = before.volume.id
        engine.clientGeneration = 5
        bench.engines.withLock { $0 = [engine] }
        _ = try await bench.controller.reconstruct(request(act: true))
        let volume = try await bench.test.store.volume(named: "vol").volume
        #expect(volume.attachedNode == "a")
        #expect(volume.clientGeneration == 5)
        #expect(volume.servedGeneration == 5)
    }

    /// A store restored from an old backup counts attachments from the backup on. A node agent that
    /// remembers the end of a later one of the same number never started its engine.
    @Test func anEngineOfTheRestoredStoreBeginsAnew() async throws {
        let (bench, before, _) = try await lost()
        var engine = Haptera_V1_RunningEngine()
        engine.volumeID = before.volume.id
        engine.clientGeneration = 2
        bench.engines.withLock { $0 = [engine] }
        _ = try await bench.controller.reconstruct(request(act: true))
        let volume = try await bench.test.store.volume(named: "vol").volume
        #expect(volume.attachedNode == "a")
        #expect(volume.clientGeneration == 1005)
        #expect(volume.servedGeneration == 0)
    }

    @Test func aMissingReplicaIsADoubt() async throws {
        let (bench, before, record) = try await lost(without: 1)
        let refused = try await bench.controller.reconstruct(request(act: true))
        #expect(!refused.volumes[0].safe)
        #expect(refused.volumes[0].missing == [before.replicas[1].id])
        #expect(refused.volumes[0].objection.contains("--force"))
        #expect(refused.volumes[0].newEpoch == 0)
        #expect(try await bench.test.store.volumes().isEmpty)

        _ = try await bench.controller.reconstruct(request(act: true, force: true))
        let forced = try #require(try await bench.test.store.volume(named: "vol").record)
        #expect(forced.epoch > record.epoch)
        #expect(forced.change == .reconstruction)
        #expect(forced.inSync == [record.inSync[0], record.inSync[2]])
        // Should it return, it may hold writes no other has.
        #expect(forced.out.map(\.member) == [record.inSync[1]])
        #expect(forced.out[0].isKept)
        #expect(forced.out[0].partedEpoch == record.epoch)
        // Its engine can swap it: every member it names is known.
        _ = try await bench.swap(forced, .takeover) { $0.engineEndpoint = "h:1" }
    }

    /// A store restored from an old backup: the replicas have promised more than it knows.
    @Test func anOldBackupIsBroughtUpToDate() async throws {
        let bench = try await Bench(TestStore())
        let volume = try await bench.test.makeVolume()
        let old = try #require(volume.record)
        let newer = old.next(nonce: 7) { $0.change = .takeover }.next(nonce: 8) {
            $0.change = .removal
            $0.out = [
                .init(
                    member: $0.inSync.removeLast(), leftEpoch: $0.epoch, stablePoint: .zero,
                    reason: .silent)
            ]
        }
        for (index, row) in volume.replicas.enumerated() {
            bench.place(row, index == 2 ? old : newer, promise: index == 2 ? 1 : 3, running: true)
        }
        var engine = Haptera_V1_EngineReport()
        _ = try await bench.test.store.attachVolume("vol", node: "a", ready: ["a"])
        engine.volumeID = volume.volume.id
        engine.clientGeneration = 1
        engine.state = .waiting
        engine.reason = StopReason.recordOlderThanReplica.rawValue
        try await bench.report(engine: engine)
        let why = try await bench.controller.explain("vol", all: false)
        #expect(why.waitsFor == "a record as new as its replicas")
        #expect(why.advice.contains("storagectl store reconstruct --volume vol"))
        var one = request(act: true)
        one.volume = "vol"
        #expect(try await bench.controller.reconstruct(one).volumes[0].newEpoch == 3)
        #expect(try await bench.test.store.volume(named: "vol").record == newer)
    }

    @Test func whatWasDeletedStaysSo() async throws {
        let bench = try await Bench(TestStore())
        let volume = try await bench.test.makeVolume()
        _ = try await bench.test.store.deleteVolume("vol")
        for row in volume.replicas { try await bench.test.remove(row) }
        for row in volume.replicas { bench.place(row, volume.record, promise: 1, running: false) }
        let found = try await bench.controller.reconstruct(request(act: true))
        #expect(found.volumes[0].objection == "it was deleted")
        #expect(try await bench.test.store.volumes().isEmpty)
    }
}

@Suite struct FaultTests {
    /// Only what was made for it is ever broken on purpose.
    @Test func onlyScratchVolumesAreBroken() async throws {
        let bench = try await Bench(TestStore())
        _ = try await bench.test.store.createVolume(
            VolumeSpecification(
                name: "tmp", sizeBytes: 1 << 20, replicas: 1, nodes: ["a"], isScratch: true),
            candidates: ["a"])
        let volume = try await bench.test.makeVolume()
        var request = Haptera_V1_InjectVolumeFaultRequest()
        request.kind = "kill"
        request.replicaID = volume.replicas[0].id
        await #expect(throws: ControlError.self) {
            try await bench.controller.injectFault(request, volume: "vol")
        }
        #expect(bench.faults.withLock { $0 }.isEmpty)
        let scratch = try await bench.test.store.volume(named: "tmp")
        request.replicaID = scratch.replicas[0].id
        try await bench.controller.injectFault(request, volume: "tmp")
        #expect(bench.faults.withLock { $0 }.map(\.replicaID) == [scratch.replicas[0].id])
        // What lasts has an end, and what only replicas suffer needs one.
        request.kind = "partition"
        for (replica, milliseconds) in [
            (request.replicaID, 0), (request.replicaID, 60_001), ("", 9),
        ] {
            var wrong = request
            wrong.replicaID = replica
            wrong.milliseconds = UInt64(milliseconds)
            await #expect(throws: ControlError.self) {
                try await bench.controller.injectFault(wrong, volume: "tmp")
            }
        }
        request.milliseconds = 60_000
        try await bench.controller.injectFault(request, volume: "tmp")
        #expect(bench.faults.withLock { $0 }.last?.kind == .partition)
        #expect(bench.faults.withLock { $0 }.last?.milliseconds == 60_000)
        // Bits flip only while there is another good copy.
        request.kind = "flip"
        await #expect(throws: ControlError.self) {
            try await bench.controller.injectFault(request, volume: "tmp")
        }
        #expect(try await bench.kinds().contains("FaultInjected"))
    }
}
