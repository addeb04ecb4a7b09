import Glibc
import HapteraCore
import Testing

@testable import HapteraReplica

@Suite struct FailedSyncTests {
    private let boot = BootID(high: 1, low: 2)
    private let identity = ReplicaIdentity(
        volume: VolumeID(high: 1, low: 2), name: "volume", replica: ReplicaID(rawValue: 3),
        incarnation: Incarnation(rawValue: 4), size: UInt64(Geometry.regionSize))

    private func make(_ directory: String) throws -> DirectoryStorage {
        let storage = DirectoryStorage(directory: directory, mode: .serve)
        try ReplicaCore.create(storage: storage, identity: identity)
        return storage
    }

    /// Later processes of the same boot take the copy for one of a restarted host, always the same
    /// one, so that it can be settled again; the next real boot forgets.
    @Test func aFailedSyncCountsAsARestartOfTheHost() throws {
        let directory = try TestDirectory()
        let storage = try make(directory.path)
        #expect(try storage.bootAfterFailedSyncs(boot) == boot)
        storage.noteFailedSync(boot)
        let first = try storage.bootAfterFailedSyncs(boot)
        #expect(first != boot)
        #expect(try storage.bootAfterFailedSyncs(boot) == first)
        storage.noteFailedSync(boot)
        #expect(try storage.bootAfterFailedSyncs(boot) != first)
        let next = BootID(high: 1, low: 3)
        #expect(try storage.bootAfterFailedSyncs(next) == next)
        #expect(try storage.bootAfterFailedSyncs(boot) == boot)
    }

    /// The second sync says nothing of the pages that the first one could not write.
    @Test(arguments: [ReplicaFile.log, .table(LayerID(rawValue: 1))])
    func aSyncThatFailsWhileOpeningCounts(file: ReplicaFile) throws {
        let directory = try TestDirectory()
        let storage = try make(directory.path)
        storage.syncFault = { $0 == file ? EIO : nil }
        let options = ReplicaOptions(instance: InstanceID(rawValue: 1), bootID: boot)
        #expect(throws: StorageError.self) {
            try storage.open(options: options, pool: BufferPool(), boot: boot)
        }
        #expect(try storage.bootAfterFailedSyncs(boot) != boot)
    }

    @Test func aMarkThatCannotBeReadCounts() throws {
        let directory = try TestDirectory()
        let storage = try make(directory.path)
        // SAFETY: the string outlives the call.
        let fd = unsafe open("\(directory.path)/failed-sync", O_RDWR | O_CREAT, 0o600)
        try #require(fd >= 0)
        close(fd)
        #expect(try storage.bootAfterFailedSyncs(boot) != boot)
    }
}
