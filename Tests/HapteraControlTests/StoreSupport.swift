import Foundation
import GRDB
import HapteraAPI
import HapteraCore
import Synchronization

@testable import HapteraControl

/// A directory that is removed with its owner.
final class TemporaryDirectory: Sendable {
    let path: String
    init() throws {
        // Short: Unix sockets are made below it.
        let template = "/tmp/haptera-\(UInt32.random(in: .min ... .max))"
        try FileManager.default.createDirectory(
            atPath: template, withIntermediateDirectories: false)
        path = template
    }
    deinit { try? FileManager.default.removeItem(atPath: path) }
}

/// A store in a directory of its own, on a clock that moves when told.
struct TestStore {
    let directory: TemporaryDirectory
    let store: MetadataStore
    let clock: TestClock

    init() throws {
        directory = try TemporaryDirectory()
        let clock = TestClock()
        self.clock = clock
        store = try MetadataStore(path: directory.path + "/store") { clock.now }
    }

    func addNodes(_ names: [String]) async throws {
        for (index, name) in names.enumerated() {
            try await store.registerNode(
                NodeRow(
                    name: name, nodeID: hexadecimal(UInt64(index + 1)), address: "127.0.0.1",
                    directory: "/\(name)", version: "1", pid: 1))
        }
    }

    /// Three nodes and one volume on them, created to the end.
    func makeVolume(
        _ name: String = "vol", replicas: UInt32 = 3
    ) async throws -> StoredVolume {
        let nodes = ["a", "b", "c"]
        try await addNodes(nodes)
        let created = try await store.createVolume(
            VolumeSpecification(name: name, sizeBytes: 1 << 30, replicas: replicas, nodes: []),
            candidates: nodes)
        for replica in created.replicas { try await run(replica) }
        return try await store.volume(named: name)
    }

    /// Has the store's one writer busy until so many swaps wait.
    func whileBusy<Result: Sendable>(
        swaps: Int, _ body: @escaping @Sendable () async throws -> Result
    ) async throws -> Result {
        let gate = DispatchSemaphore(value: 0)
        let busy = Task { try await store.database.write { _ in gate.wait() } }
        let result = Task { try await body() }
        while store.swaps.waitingCount < swaps { await Task.yield() }
        gate.signal()
        try await busy.value
        return try await result.value
    }

    func run(_ replica: ReplicaRow) async throws {
        var facts = ReportedFacts()
        facts.replicas = [
            .init(
                id: replica.id, address: "127.0.0.1:\(20000 + replica.ordinal)",
                directory: "/\(replica.node)/\(replica.id)", isRemoved: false)
        ]
        _ = try await store.apply(facts, from: replica.node)
    }

    func remove(_ replica: ReplicaRow) async throws {
        var facts = ReportedFacts()
        facts.replicas = [.init(id: replica.id, address: "", directory: "/", isRemoved: true)]
        _ = try await store.apply(facts, from: replica.node)
    }

    func reportEngine(
        _ stored: StoredVolume, served: Bool = false, detached: Bool = false
    ) async throws {
        var facts = ReportedFacts()
        facts.engines = [
            .init(
                volumeID: stored.volume.id, clientGeneration: stored.volume.clientGeneration,
                hasServed: served, isDetached: detached)
        ]
        _ = try await store.apply(facts, from: stored.volume.attachedNode ?? "")
    }
}

/// Whoever comes while it is closed waits until it opens.
final class Gate: Sendable {
    private let state = Mutex<(isClosed: Bool, waiting: [CheckedContinuation<Void, Never>])>(
        (false, []))
    var waitingCount: Int { state.withLock { $0.waiting.count } }

    func close() { state.withLock { $0.isClosed = true } }
    func open() {
        let waiting = state.withLock { state in
            defer { state = (false, []) }
            return state.waiting
        }
        for one in waiting { one.resume() }
    }
    func pass() async {
        await withCheckedContinuation { continuation in
            let isOpen = state.withLock { state in
                if state.isClosed { state.waiting.append(continuation) }
                return !state.isClosed
            }
            if isOpen { continuation.resume() }
        }
    }
}

/// Counts transactions that change records.
final class RecordCommits: TransactionObserver, Sendable {
    private let state = Mutex((hasChanged: false, count: 0))
    var count: Int { state.withLock { $0.count } }

    func observes(eventsOfKind eventKind: DatabaseEventKind) -> Bool {
        eventKind.tableName == "records"
    }
    func databaseDidChange(with event: DatabaseEvent) { state.withLock { $0.hasChanged = true } }
    func databaseDidCommit(_ db: Database) {
        state.withLock { state in
            if state.hasChanged { state.count += 1 }
            state.hasChanged = false
        }
    }
    func databaseDidRollback(_ db: Database) { state.withLock { $0.hasChanged = false } }
}

final class TestClock: Sendable {
    private let value = Mutex<Int64>(1_000_000)
    var now: Int64 { value.withLock { $0 } }
    func advance(_ milliseconds: Int64) { value.withLock { $0 += milliseconds } }
}

extension VolumeRecord {
    /// The record an engine would propose next.
    func next(nonce: UInt64, _ change: (inout VolumeRecord) -> Void = { _ in }) -> VolumeRecord {
        var record = self
        record.epoch = epoch.next
        record.nonce = nonce
        change(&record)
        return record
    }
}

extension Haptera_V1_ReplicaReport {
    /// Of a node, the one at `index`, that does what it is told.
    init(
        obeying wanted: Haptera_V1_DesiredReplica, on node: String, _ index: Int,
        allocated: UInt64 = 0
    ) {
        self.init()
        replicaID = wanted.replicaID
        state = wanted.phase == .remove ? .removed : .running
        address = "127.0.0.1:2000\(index)"
        directory = "/\(node)/\(wanted.replicaID)"
        allocatedBytes = allocated
    }
}
