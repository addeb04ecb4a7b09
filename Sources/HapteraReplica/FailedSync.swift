import Glibc
import HapteraCore
import HapteraIO

// After a failed sync the kernel may show pages that are not on the disk, and a later sync says
// nothing of them. The process that met it leaves a mark, `failed-sync`: the boot of the host, and
// another boot id made up for what follows. Later processes drop what the kernel remembers of the
// log and go by that id, so the copy comes back as if the host had restarted: nothing it holds is
// preferred to another copy's until it was made equal.
//
// A file system that fails altogether takes no mark, and shows none that it took without writing
// it once it is mounted again, perhaps without a restart of the host. So the mark is also left at
// `markPlaces`, under the name of this making of the replica: a copy made anew has another one.
extension DirectoryStorage {
    /// Memory that lasts as long as the boot: no disk has to work for it.
    package static let markMemory = "/dev/shm"
    private static let elsewherePrefix = "haptera-failed-sync-"
    /// 32 hexadecimal digits each: the boot in which a sync failed, the one made up.
    private static let markSize = 64

    private struct MarkPath {
        var path: String
        /// Where others may write, too.
        var isElsewhere: Bool
    }
    private enum Mark: Equatable {
        case none
        case earlierBoot
        case madeUp(BootID)
        /// Left, but not to be read: it may say anything.
        case damaged
    }

    private static func bytes(_ failed: BootID, _ madeUp: BootID) -> [UInt8] {
        let numbers = [failed.high, failed.low, madeUp.high, madeUp.low]
        return numbers.flatMap { [UInt8](hexadecimal($0).utf8) }
    }
    private static var newBoot: BootID { BootID(high: randomUInt64(), low: randomUInt64()) }

    /// The copy's own directory last: its disk may take long to fail.
    private func markPaths() -> [MarkPath] {
        if markOwner == nil, !markPlaces.isEmpty,
            case .manifest(let manifest)? = try? ReplicaCore.loadManifest(self)
        {
            markOwner = manifest.identity.member
        }
        let own = MarkPath(path: "\(directory)/failed-sync", isElsewhere: false)
        guard let owner = markOwner else { return [own] }
        let name =
            Self.elsewherePrefix + owner.replica.text + "-"
            + hexadecimal(owner.incarnation.rawValue)
        return markPlaces.map { MarkPath(path: "\($0)/\(name)", isElsewhere: true) } + [own]
    }

    // MARK: leaving it

    /// As well as a failing disk lets it: this boot's processes see the mark even if it never gets
    /// to the disk. Returns the boot to go by.
    @discardableResult
    package func noteFailedSync(_ boot: BootID) -> BootID {
        let madeUp = Self.newBoot
        let bytes = Self.bytes(boot, madeUp)
        for place in markPaths() where !Self.leave(bytes, place) {
            Log.error("cannot mark the failed sync", ("file", place.path))
        }
        return madeUp
    }

    /// A file system that shuts itself down may refuse a store into the log's mapping before any
    /// sync has failed: SIGBUS ends the process then, and leaves a mark in the first of
    /// `markPlaces`.
    package func markBusErrors(_ boot: BootID) {
        guard let place = markPaths().first, place.isElsewhere else { return }
        if !BusErrors.leave(Self.bytes(boot, Self.newBoot), at: place.path) {
            Log.warn("cannot mark bus errors: the path is too long", ("file", place.path))
        }
    }

    private static func leave(_ bytes: [UInt8], _ place: MarkPath) -> Bool {
        guard let fd = try? FileDescriptors.open(place.path, flags: O_RDWR | O_CREAT | careful)
        else { return false }
        defer { close(fd) }
        guard isOurs(fd, place), ftruncate(fd, 0) == 0 else { return false }
        // SAFETY: the array has the bytes given.
        let count = unsafe Glibc.write(fd, bytes, bytes.count)
        _ = fsync(fd)
        return count == bytes.count
    }

    /// A link is not followed and a pipe is not waited for: where all may write, others may have
    /// put something else there.
    private static let careful = O_NOFOLLOW | O_NONBLOCK
    private static func isOurs(_ fd: Int32, _ place: MarkPath) -> Bool {
        var status = stat()
        // SAFETY: `status` is a local that outlives the call.
        return unsafe fstat(fd, &status) == 0 && status.st_mode & S_IFMT == S_IFREG
            && (!place.isElsewhere || status.st_uid == geteuid() || status.st_uid == 0)
    }

    // MARK: finding it

    /// Opens the copy. A sync that fails meanwhile is marked as well: the next process would find
    /// the log in the page cache and its second sync would succeed.
    package func open(options: ReplicaOptions, pool: BufferPool, boot: BootID)
        throws(StorageError) -> ReplicaCore
    {
        do throws(StorageError) {
            return try ReplicaCore(opening: self, options: options, pool: pool)
        } catch {
            if hasFailedSync { noteFailedSync(boot) }
            throw error
        }
    }

    /// The boot to go by: `boot`, or the one made up when a sync failed during it. The caller holds
    /// the lock and has not mapped the log. Marks of an earlier boot are removed.
    package func bootAfterFailedSyncs(_ boot: BootID) throws(StorageError) -> BootID {
        for place in markPlaces { removeEarlierMarks(in: place, boot) }
        let found = try marks(boot)
        for (place, mark) in found where mark == .earlierBoot {
            // SAFETY: the string outlives the call.
            _ = unsafe unlink(place.path)
        }
        let marks = found.map(\.mark).filter { $0 != .none && $0 != .earlierBoot }
        guard !marks.isEmpty else { return boot }
        try forgetLog()
        // Whichever boot it was: better once too often. What takes its place can be read.
        guard !marks.contains(.damaged) else { return noteFailedSync(boot) }
        return Self.together(marks)
    }

    /// The host's boot as the next process will go by it, if it finds no mark beside its control
    /// socket.
    func bootOfNext() -> BootID {
        markPlaces = [Self.markMemory]
        return (try? bootByMarks(HostBoot.read())) ?? .none
    }

    /// As `bootAfterFailedSyncs`, for those who only look: nothing is changed.
    package func bootByMarks(_ boot: BootID) throws(StorageError) -> BootID {
        let marks = try marks(boot).map(\.mark).filter { $0 != .none && $0 != .earlierBoot }
        guard !marks.isEmpty else { return boot }
        return marks.contains(.damaged) ? Self.newBoot : Self.together(marks)
    }

    /// Nearly always they say the same. If some could not be left, or were lost, and others are of
    /// another failure, it is a boot that none of them alone stands for.
    private static func together(_ marks: [Mark]) -> BootID {
        var boots: Set<BootID> = []
        for case .madeUp(let boot) in marks { boots.insert(boot) }
        return boots.reduce(BootID.none) { BootID(high: $0.high ^ $1.high, low: $0.low ^ $1.low) }
    }

    private func marks(_ boot: BootID) throws(StorageError) -> [(place: MarkPath, mark: Mark)] {
        var found: [(place: MarkPath, mark: Mark)] = []
        for place in markPaths() { found.append((place, try Self.mark(place, boot))) }
        return found
    }

    private static func mark(_ place: MarkPath, _ boot: BootID) throws(StorageError) -> Mark {
        let fd: Int32
        do throws(IOError) {
            fd = try FileDescriptors.open(place.path, flags: O_RDONLY | careful)
        } catch {
            if error.errno == ENOENT { return .none }
            guard place.isElsewhere else {
                throw Self.error(error.errno, "cannot read \(place.path)")
            }
            Log.warn("cannot look for a failed sync's mark", ("file", place.path))
            return .none
        }
        defer { close(fd) }
        // No other user's word counts, but the administrator's.
        guard isOurs(fd, place) else { return place.isElsewhere ? .none : .damaged }
        var bytes = [UInt8](repeating: 0, count: markSize + 1)
        // SAFETY: the array has the bytes given.
        let count = unsafe Glibc.read(fd, &bytes, bytes.count)
        guard count == markSize, let failed = parse(bytes[..<32]),
            let madeUp = parse(bytes[32..<64])
        else { return .damaged }
        return failed == boot ? .madeUp(madeUp) : .earlierBoot
    }
    private static func parse(_ digits: ArraySlice<UInt8>) -> BootID? {
        guard let high = parseHexadecimal(digits.prefix(16)),
            let low = parseHexadecimal(digits.suffix(16))
        else { return nil }
        return BootID(high: high, low: low)
    }

    /// Those of replicas that are no more would stay for ever on a disk. One that is being written
    /// just now has no boot yet, and stays.
    private func removeEarlierMarks(in directory: String, _ boot: BootID) {
        for name in Self.names(in: directory) ?? [] where name.hasPrefix(Self.elsewherePrefix) {
            let place = MarkPath(path: "\(directory)/\(name)", isElsewhere: true)
            guard (try? Self.mark(place, boot)) == .earlierBoot else { continue }
            // SAFETY: the string outlives the call.
            _ = unsafe unlink(place.path)
        }
    }

    /// What is read next comes from the disk. (The other files bypass the page cache.)
    private func forgetLog() throws(StorageError) {
        let result = posix_fadvise(try descriptor(.log), 0, 0, POSIX_FADV_DONTNEED)
        guard result == 0 else { throw Self.error(result, "cannot drop the cache of the log") }
    }
}
