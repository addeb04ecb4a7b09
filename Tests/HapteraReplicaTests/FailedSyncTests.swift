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

    // MARK: a file system that takes no mark

    /// Its own mark is what a file system that is shut down does not keep.
    private func loseOwnMark(_ directory: TestDirectory) {
        // SAFETY: the string outlives the call.
        _ = unsafe unlink("\(directory.path)/failed-sync")
    }
    private func isThere(_ path: String) -> Bool {
        // SAFETY: the string outlives the call.
        unsafe access(path, F_OK) == 0
    }
    private func put(_ text: String, _ path: String) throws {
        // SAFETY: the strings outlive the calls.
        let fd = unsafe open(path, O_RDWR | O_CREAT | O_TRUNC, 0o600)
        try #require(fd >= 0)
        defer { close(fd) }
        let bytes = [UInt8](text.utf8)
        // SAFETY: the array has the bytes given.
        try #require(unsafe write(fd, bytes, bytes.count) == bytes.count)
    }
    private func mark(_ place: TestDirectory, incarnation: UInt64 = 4) -> String {
        "\(place.path)/haptera-failed-sync-\(identity.replica.text)-\(hexadecimal(incarnation))"
    }

    @Test func theMarkIsFoundElsewhereIfTheCopyHasLostIt() throws {
        let (directory, place) = (try TestDirectory(), try TestDirectory())
        let storage = try make(directory.path)
        storage.markPlaces = [place.path, "\(place.path)/missing"]
        #expect(try storage.bootAfterFailedSyncs(boot) == boot)
        storage.noteFailedSync(boot)
        let first = try storage.bootAfterFailedSyncs(boot)
        #expect(first != boot)
        loseOwnMark(directory)
        #expect(try storage.bootByMarks(boot) == first)
        #expect(try storage.bootAfterFailedSyncs(boot) == first)
        // Those that are left elsewhere alone are enough, and the next boot forgets them.
        let next = BootID(high: 1, low: 3)
        #expect(try storage.bootAfterFailedSyncs(next) == next)
        #expect(!isThere(mark(place)))
    }

    @Test func aFailureThatOnlyOneMarkTellsOfIsAnother() throws {
        let (directory, place) = (try TestDirectory(), try TestDirectory())
        let storage = try make(directory.path)
        storage.markPlaces = [place.path]
        storage.noteFailedSync(boot)
        let first = try storage.bootAfterFailedSyncs(boot)
        storage.markPlaces = []
        storage.noteFailedSync(boot)
        storage.markPlaces = [place.path]
        let second = try storage.bootAfterFailedSyncs(boot)
        #expect(second != first && second != boot)
        #expect(try storage.bootAfterFailedSyncs(boot) == second)
    }

    /// Another making of the replica is another copy.
    @Test func aMarkElsewhereIsOfOneMakingOnly() throws {
        let (directory, place) = (try TestDirectory(), try TestDirectory())
        let storage = try make(directory.path)
        storage.markPlaces = [place.path]
        let digits = hexadecimal(boot.high) + hexadecimal(boot.low)
        try put(digits + digits, mark(place, incarnation: 5))
        #expect(try storage.bootAfterFailedSyncs(boot) == boot)
        #expect(isThere(mark(place, incarnation: 5)))
        // Of replicas that are no more, none outlives the boot.
        let next = BootID(high: 1, low: 3)
        #expect(try storage.bootAfterFailedSyncs(next) == next)
        #expect(!isThere(mark(place, incarnation: 5)))
    }

    @Test(arguments: ["", "0", String(repeating: "x", count: 64)])
    func aDamagedMarkElsewhereCountsAndIsMadeGood(text: String) throws {
        let (directory, place) = (try TestDirectory(), try TestDirectory())
        let storage = try make(directory.path)
        storage.markPlaces = [place.path]
        try put(text, mark(place))
        let found = try storage.bootAfterFailedSyncs(boot)
        #expect(found != boot)
        #expect(try storage.bootAfterFailedSyncs(boot) == found)
        loseOwnMark(directory)
        #expect(try storage.bootAfterFailedSyncs(boot) == found)
    }

    /// Where others may write: nothing of theirs is followed, waited for or believed.
    @Test func whatIsNoFileElsewhereIsNoMark() throws {
        let (directory, place) = (try TestDirectory(), try TestDirectory())
        let storage = try make(directory.path)
        storage.markPlaces = [place.path]
        let victim = "\(place.path)/victim"
        try put("keep", victim)
        // SAFETY: the strings outlive the calls.
        try #require(unsafe symlink(victim, mark(place)) == 0)
        #expect(try storage.bootAfterFailedSyncs(boot) == boot)
        storage.noteFailedSync(boot)
        #expect(try storage.bootAfterFailedSyncs(boot) != boot)
        var status = stat()
        // SAFETY: the string outlives the call; `status` is a local.
        #expect(unsafe stat(victim, &status) == 0 && status.st_size == 4)
        loseOwnMark(directory)
        unsafe unlink(mark(place))
        try #require(unsafe mkfifo(mark(place), 0o600) == 0)
        #expect(try storage.bootAfterFailedSyncs(boot) == boot)
    }
}
