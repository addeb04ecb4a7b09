import Glibc
import HapteraCore
import Testing

@testable import HapteraReplica

@Suite struct DirectoryStorageTests {
    private func make(_ directory: String, _ incarnation: UInt64) throws {
        try ReplicaCore.create(
            storage: DirectoryStorage(directory: directory, mode: .serve),
            identity: ReplicaIdentity(
                volume: VolumeID(high: 1, low: 2), name: "volume",
                replica: ReplicaID(rawValue: 3), incarnation: Incarnation(rawValue: incarnation),
                size: UInt64(Geometry.regionSize)))
    }
    private func move(_ from: String, _ to: String) {
        // SAFETY: the strings outlive the call.
        #expect(unsafe rename(from, to) == 0)
    }

    /// While a process waits for the lock, the copy is removed and another one made in its place:
    /// it was served with the manifest of the one and the other files of the other.
    @Test func aCopyReplacedWhileItsLockIsWaitedForIsNotMixedWithTheOther() throws {
        let directory = try TestDirectory()
        let place = "\(directory.path)/copy"
        try make(place, 4)
        try make("\(directory.path)/other", 5)
        let storage = DirectoryStorage(directory: place, mode: .serve)
        var isReplaced = false
        storage.openedHook = { _ in
            guard !isReplaced else { return }
            isReplaced = true
            move(place, "\(directory.path)/removed")
            move("\(directory.path)/other", place)
        }
        guard case .manifest(let found) = try ReplicaCore.loadManifest(storage) else {
            Issue.record("no manifest")
            return
        }
        #expect(isReplaced && found.identity.incarnation == Incarnation(rawValue: 5))
    }

    @Test func aCopyRemovedWhileItsLockIsWaitedForIsNotThere() throws {
        let directory = try TestDirectory()
        let place = "\(directory.path)/copy"
        try make(place, 4)
        let storage = DirectoryStorage(directory: place, mode: .serve)
        storage.openedHook = { file in
            if file == .log { move(place, "\(directory.path)/removed") }
        }
        _ = try storage.descriptor(.manifest)
        let error = #expect(throws: StorageError.self) { try storage.descriptor(.log) }
        #expect(error?.code == .notFound)
    }

    /// The manifest's lock was there at once, and another file's is waited for.
    @Test func aCopyReplacedBehindItsManifestIsNotMixedWithTheOther() throws {
        for isBefore in [true, false] {
            let directory = try TestDirectory()
            let place = "\(directory.path)/copy"
            try make(place, 4)
            try make("\(directory.path)/other", 5)
            let storage = DirectoryStorage(directory: place, mode: .serve)
            let replace = {
                move(place, "\(directory.path)/removed")
                move("\(directory.path)/other", place)
            }
            let manifest = try storage.descriptor(.manifest)
            if isBefore { replace() } else { storage.openedHook = { _ in replace() } }
            let error = #expect(throws: StorageError.self) { try storage.descriptor(.log) }
            #expect(error?.message.contains("replaced while it was opened") == true)
            // A process that serves goes on using it: its number must not become another file's.
            #expect(fcntl(manifest, F_GETFD) >= 0)
            #expect(try storage.descriptor(.manifest) == manifest)
        }
    }
}
