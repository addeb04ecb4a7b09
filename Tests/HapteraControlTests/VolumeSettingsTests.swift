import GRDB
import HapteraAPI
import HapteraCore
import Testing

@testable import HapteraControl

@Suite struct VolumeSettingsTests {
    private static func message(
        _ change: (inout Haptera_V1_VolumeSettings) -> Void
    ) -> Haptera_V1_VolumeSettings {
        var message = Haptera_V1_VolumeSettings()
        change(&message)
        return message
    }

    @Test func theDefaultsAreValid() throws {
        let settings = VolumeSettings()
        try settings.check(replicas: 1)
        #expect(settings.renew < settings.lease)
        #expect(settings.lease <= settings.removalDeadline)
        #expect(settings.staleReplicaTimeout == 1_800_000)
        for lease in [VolumeSettings.leases.lowerBound, VolumeSettings.leases.upperBound] {
            var other = settings
            other.lease = lease
            #expect((1..<lease).contains(other.renew))
        }
    }

    @Test(
        arguments: [
            (Self.message { $0.minInSync = 0 }, "--min-in-sync 0"),
            (Self.message { $0.minInSync = 4 }, "use 1 to 3"),
            (Self.message { $0.leaseMilliseconds = 99 }, "--lease is 100ms to 1m"),
            (Self.message { $0.leaseMilliseconds = 3001 }, "shorter than the lease"),
            (Self.message { $0.removalDeadlineMilliseconds = 499 }, "shorter than the lease"),
            (Self.message { $0.removalDeadlineMilliseconds = 600_001 }, "at most 10m"),
            (Self.message { $0.ioTimeoutMilliseconds = 999 }, "--io-timeout is 0"),
            (Self.message { $0.ioTimeoutMilliseconds = .max }, "--io-timeout is 0"),
            (Self.message { $0.staleReplicaTimeoutMilliseconds = 999 }, "is 0 (never) or 1s"),
        ])
    func whatCannotWorkIsRefused(_ message: Haptera_V1_VolumeSettings, _ words: String) {
        let error = #expect(throws: ControlError.self) {
            try VolumeSpecification(
                name: "v", sizeBytes: 1 << 20, replicas: 3, nodes: [], settings: message)
        }
        #expect(error?.code == .invalid)
        #expect(error?.message.contains(words) == true, "\(error?.message ?? "")")
    }

    @Test func theyAreKeptAndGoIntoTheRecord() async throws {
        let test = try TestStore()
        let nodes = ["a", "b", "c"]
        try await test.addNodes(nodes)
        let wanted = try VolumeSpecification(
            name: "v", sizeBytes: 1 << 20, replicas: 3, nodes: [],
            settings: Self.message {
                $0.minInSync = 2
                $0.leaseMilliseconds = 1000
            })
        let created = try await test.store.createVolume(wanted, candidates: nodes)
        for replica in created.replicas { try await test.run(replica) }
        let stored = try await test.store.volume(named: "v")
        #expect(stored.volume.settings.minInSync == 2)
        #expect(stored.volume.settings.lease == 1000)
        #expect(stored.volume.settings.removalDeadline == 3000)
        #expect(stored.record?.minInSync == 2)
        #expect(stored.record?.leaseMilliseconds == 1000)
        // Again: the same, also with less said; but not with something else.
        #expect(try await test.store.createVolume(wanted, candidates: nodes) == stored)
        let less = try VolumeSpecification(name: "v", sizeBytes: 1 << 20, replicas: 3, nodes: [])
        #expect(try await test.store.createVolume(less, candidates: nodes) == stored)
        let other = try VolumeSpecification(
            name: "v", sizeBytes: 1 << 20, replicas: 3, nodes: [],
            settings: Self.message { $0.minInSync = 1 })
        let error = await #expect(throws: ControlError.self) {
            try await test.store.createVolume(other, candidates: nodes)
        }
        #expect(error?.code == .conflict)
    }

    @Test func anUpdateChangesWhatItNames() async throws {
        let test = try TestStore()
        let before = try await test.makeVolume()
        let after = try await test.store.updateVolume(
            "vol",
            Self.message {
                $0.ioTimeoutMilliseconds = 30_000
                $0.staleReplicaTimeoutMilliseconds = 0
                $0.detectZeroes = true
            })
        var expected = before.volume.settings
        expected.ioTimeout = 30_000
        expected.staleReplicaTimeout = 0
        expected.detectsZeroes = true
        #expect(after.volume.settings == expected)
        let event = try #require(try await test.store.events(after: 0, limit: 1).first)
        #expect(event.kind == "VolumeUpdated")
        #expect(event.message == "io-timeout 30s, stale-replica-timeout 0s, detect-zeroes on")
        // With what is there already: a lease longer than the deadline.
        await #expect(throws: ControlError.self) {
            try await test.store.updateVolume("vol", Self.message { $0.leaseMilliseconds = 4000 })
        }
        // Nothing new is no event.
        _ = try await test.store.updateVolume("vol", Self.message { $0.minInSync = 1 })
        #expect(try await test.store.events(after: event.id ?? 0, limit: 10).isEmpty)
    }
}

/// When a client cannot have survived, and when it can.
@Suite struct ClientSurvivalTests {
    private static func register(
        _ test: TestStore, boot: String, pid: Int32 = 1
    ) async throws {
        try await test.store.registerNode(
            NodeRow(
                name: "a", nodeID: hexadecimal(1), address: "127.0.0.1", directory: "/a",
                version: "1", pid: pid, bootID: boot))
    }

    private static func attached() async throws -> TestStore {
        let test = try TestStore()
        _ = try await test.makeVolume(replicas: 1)
        try await register(test, boot: "boot-1")
        let stored = try await test.store.attachVolume("vol", node: "a", ready: ["a"])
        try await test.reportEngine(stored, served: true)
        return test
    }

    @Test func anotherBootIsAnotherClient() async throws {
        let test = try await Self.attached()
        try await Self.register(test, boot: "boot-2")
        let stored = try await test.store.volume(named: "vol")
        #expect(stored.volume.clientGeneration == 2)
        #expect(stored.volume.attachedNode == "a")
        #expect(try await test.store.desired(for: "a").engines[0].volume.clientGeneration == 2)
        let kinds = try await test.store.events(after: 0, limit: 100).map(\.kind)
        #expect(kinds.count { $0 == "ClientEnded" } == 1)
        // Once for each boot.
        try await Self.register(test, boot: "boot-2", pid: 9)
        #expect(try await test.store.volume(named: "vol").volume.clientGeneration == 2)
    }

    /// A new process of the agent, or one that does not say its boot, says nothing of the client.
    @Test func aRestartOfAnAgentIsNot() async throws {
        let test = try await Self.attached()
        try await Self.register(test, boot: "boot-1", pid: 2)
        try await Self.register(test, boot: "", pid: 3)
        #expect(try await test.store.volume(named: "vol").volume.clientGeneration == 1)
    }

    /// A client on another host outlives the node it is attached to.
    @Test func aRemoteClientMayHaveSurvived() async throws {
        let test = try await Self.attached()
        let stored = try await test.store.volume(named: "vol")
        var facts = ReportedFacts()
        facts.engines = [
            .init(
                volumeID: stored.volume.id, clientGeneration: 1, hasServed: true,
                isDetached: false, hadRemoteClient: true)
        ]
        _ = try await test.store.apply(facts, from: "a")
        try await Self.register(test, boot: "boot-2")
        #expect(try await test.store.volume(named: "vol").volume.clientGeneration == 1)
    }

    /// Whether it rebooted since an attach by an older version is not known.
    @Test func anUnknownBootIsNoNews() async throws {
        let test = try TestStore()
        _ = try await test.makeVolume(replicas: 1)
        _ = try await test.store.attachVolume("vol", node: "a", ready: ["a"])
        try await Self.register(test, boot: "boot-1")
        #expect(try await test.store.volume(named: "vol").volume.clientGeneration == 1)
        try await Self.register(test, boot: "boot-2")
        #expect(try await test.store.volume(named: "vol").volume.clientGeneration == 2)
    }
}
