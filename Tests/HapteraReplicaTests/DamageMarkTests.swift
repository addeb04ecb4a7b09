import Glibc
import HapteraCore
import HapteraIO
import Testing

@testable import HapteraReplica

/// What a process leaves that has met a damaged table page, and what the next one makes of it.
@Suite struct DamageMarkTests {
    private static let regions = 4
    private static let member = VolumeRecord.Member(
        replica: ReplicaID(rawValue: 3), incarnation: Incarnation(rawValue: 4))
    private static let other = VolumeRecord.Member(
        replica: ReplicaID(rawValue: 5), incarnation: Incarnation(rawValue: 6))
    private let identity = ReplicaIdentity(
        volume: VolumeID(high: 1, low: 2), name: "volume", replica: member.replica,
        incarnation: member.incarnation, size: UInt64(regions * Geometry.regionSize))

    /// A copy whose record says that these are in sync.
    private func make(_ directory: String, inSync: [VolumeRecord.Member]) throws {
        let storage = DirectoryStorage(directory: directory, mode: .serve)
        try ReplicaCore.create(storage: storage, identity: identity)
        try install(storage, inSync)
    }
    private func install(_ storage: DirectoryStorage, _ inSync: [VolumeRecord.Member]) throws {
        guard case .manifest(var manifest) = try ReplicaCore.loadManifest(storage) else {
            throw StorageError(.damaged, "no manifest")
        }
        manifest.counter += 1
        manifest.promise = Epoch(manifest.promise.rawValue + 1)
        manifest.installed = VolumeRecord(
            volume: identity.volume, name: identity.name, epoch: manifest.promise, nonce: 1,
            size: identity.size, inSync: inSync)
        let bytes = manifest.encoded()
        let memory = MemoryBlock(count: bytes.count)
        memory.memory.copy(from: bytes)
        try storage.write(.manifest, offset: manifest.slotOffset(), from: memory.memory)
    }
    private func serve(_ directory: String) throws -> ReplicaServer {
        try ReplicaServer(
            reactor: try Reactor(), directory: directory, listen: .tcp(host: "127.0.0.1", port: 0),
            control: "\(directory)/control")
    }
    private static let damage = "the table page of region 2 is damaged"
    private func mark(_ directory: String) {
        let storage = DirectoryStorage(directory: directory, mode: .peek)
        storage.noteDamage(Self.damage, of: Self.member)
    }
    private func found(_ directory: String) -> DamageMark? {
        DirectoryStorage(directory: directory, mode: .peek).damageMark(of: Self.member)
    }

    @Test func aProcessThatMeetsADamagedPageLeavesAMark() throws {
        let directory = try TestDirectory()
        try make(directory.path, inSync: [Self.member, Self.other])
        let server = try serve(directory.path)
        #expect(found(directory.path) == nil)
        server.fail(.tableUnreadable(region: 2))
        #expect(found(directory.path) == DamageMark(Self.member, Self.damage))
        // The node agent shows what the process says last.
        let text = try #require(server.failure)
        for part in [
            Self.damage, "storagectl replica replace volume \(Self.member.replica.text)",
            "haptera-replica accept-damage --dir \(directory.path)",
        ] { #expect(text.contains(part), "\(part) in \(text)") }
    }

    @Test func aCopyWithADamagedPageIsNotServedBesideAnother() throws {
        let directory = try TestDirectory()
        try make(directory.path, inSync: [Self.member, Self.other])
        mark(directory.path)
        let error = #expect(throws: StorageError.self) { try serve(directory.path) }
        #expect(error == StorageError(.damaged, Self.damage))
        // As one that is being filled beside it, too.
        try install(DirectoryStorage(directory: directory.path, mode: .serve), [Self.other])
        #expect(throws: StorageError.self) { try serve(directory.path) }
        // The tools look at it all the same.
        #expect(try OfflineTools.verify(directory: directory.path).isDamaged == false)
        try OfflineTools.export(directory: directory.path, output: directory.path + "/image")
        _ = try InspectReport(directory: directory.path)
    }

    /// Most of what the only copy holds can still be read.
    @Test(arguments: [false, true]) func theOnlyCopyIsServedAsBefore(isFresh: Bool) throws {
        let directory = try TestDirectory()
        if isFresh {
            // Before any record.
            try ReplicaCore.create(
                storage: DirectoryStorage(directory: directory.path, mode: .serve),
                identity: identity)
        } else {
            try make(directory.path, inSync: [Self.member])
        }
        mark(directory.path)
        withExtendedLifetime(try serve(directory.path)) {}
    }

    /// The others may have been lost in the same moment, which its record does not say.
    @Test(arguments: [-DamageMark.refusalSeconds, 100])
    func aCopyThatNobodyReplacesIsServedAgain(seconds: Int) throws {
        let directory = try TestDirectory()
        try make(directory.path, inSync: [Self.member, Self.other])
        mark(directory.path)
        #expect(throws: StorageError.self) { try serve(directory.path) }
        // As old as that, or of a clock that has been set back since.
        let moment = timespec(tv_sec: time(nil) + seconds, tv_nsec: 0)
        // SAFETY: the string and the array outlive the call.
        try #require(
            unsafe utimensat(AT_FDCWD, "\(directory.path)/damaged", [moment, moment], 0) == 0)
        withExtendedLifetime(try serve(directory.path)) {}
    }

    @Test func aMarkOfAnotherMakingSaysNothing() throws {
        let directory = try TestDirectory()
        try make(directory.path, inSync: [Self.member, Self.other])
        let storage = DirectoryStorage(directory: directory.path, mode: .peek)
        var before = Self.member
        before.incarnation = Incarnation(rawValue: 3)
        storage.noteDamage("a page", of: before)
        try storage.refuseMarked()
        storage.noteDamage("a page", of: Self.member)
        #expect(throws: StorageError.self) { try storage.refuseMarked() }
        try storage.forgetDamage()
        try storage.refuseMarked()
    }

    /// As on a full disk: what cannot be written is not there.
    @Test func withoutRoomForAMarkAllIsAsBefore() throws {
        let directory = try TestDirectory()
        try make(directory.path, inSync: [Self.member, Self.other])
        let path = "\(directory.path)/damaged"
        // SAFETY: the strings outlive the calls.
        try #require(unsafe symlink("/dev/full", path) == 0)
        mark(directory.path)
        var status = stat()
        #expect(unsafe lstat(path, &status) != 0)
        withExtendedLifetime(try serve(directory.path)) {}
    }

    /// A crash while it is written leaves some of it; rot may change any of it.
    @Test func onlyAWholeMarkCounts() throws {
        let mark = DamageMark(Self.member, "the table page of region 2 is damaged")
        let bytes = mark.encoded()
        #expect(DamageMark(decoding: bytes) == mark)
        for count in bytes.indices {
            #expect(DamageMark(decoding: [UInt8](bytes.prefix(count))) == nil)
            for bit in 0..<8 {
                var other = bytes
                other[count] ^= 1 << UInt8(bit)
                #expect(DamageMark(decoding: other) == nil)
            }
        }
        #expect(
            bytes.prefix(28) == [
                0x48, 0x50, 0x44, 0x4d, 1, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0,
                37, 0, 0, 0,
            ])
    }
}
