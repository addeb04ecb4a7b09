import Glibc
import HapteraCore
import HapteraIO

// After a failed sync the kernel may show pages that are not on the disk, and a later sync says
// nothing of them. The process that met it leaves a mark, `failed-sync`: the boot of the host, and
// another boot id made up for what follows. Later processes drop what the kernel remembers of the
// log and go by that id, so the copy comes back as if the host had restarted: nothing it holds is
// preferred to another copy's until it was made equal.
extension DirectoryStorage {
    private var markPath: String { "\(directory)/failed-sync" }
    private static func text(_ boot: BootID) -> String {
        hexadecimal(boot.high) + hexadecimal(boot.low)
    }
    private static var newBoot: BootID { BootID(high: randomUInt64(), low: randomUInt64()) }

    /// As well as a failing disk lets it: this boot's processes see the mark even if it never gets
    /// to the disk.
    package func noteFailedSync(_ boot: BootID) {
        guard
            let fd = try? FileDescriptors.open(markPath, flags: O_RDWR | O_CREAT | O_TRUNC)
        else { return Log.error("cannot mark the failed sync", ("file", markPath)) }
        defer { close(fd) }
        let bytes = [UInt8]((Self.text(boot) + Self.text(Self.newBoot)).utf8)
        // SAFETY: the array has the bytes given.
        _ = unsafe Glibc.write(fd, bytes, bytes.count)
        _ = fsync(fd)
    }

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
    /// the lock and has not mapped the log. A mark of an earlier boot is removed.
    package func bootAfterFailedSyncs(_ boot: BootID) throws(StorageError) -> BootID {
        let fd: Int32
        do throws(IOError) {
            fd = try FileDescriptors.open(markPath, flags: O_RDONLY)
        } catch {
            guard error.errno == ENOENT else {
                throw Self.error(error.errno, "cannot read \(markPath)")
            }
            return boot
        }
        defer { close(fd) }
        var bytes = [UInt8](repeating: 0, count: 80)
        // SAFETY: the array has the bytes given.
        let count = unsafe Glibc.read(fd, &bytes, bytes.count)
        guard count == 64, let high = parseHexadecimal(bytes[32..<48]),
            let low = parseHexadecimal(bytes[48..<64])
        else {
            // Whichever boot it was: better once too often.
            try forgetLog()
            return Self.newBoot
        }
        guard Array(bytes[..<32]) == [UInt8](Self.text(boot).utf8) else {
            // SAFETY: the string outlives the call.
            _ = unsafe unlink(markPath)
            return boot
        }
        try forgetLog()
        return BootID(high: high, low: low)
    }

    /// What is read next comes from the disk. (The other files bypass the page cache.)
    private func forgetLog() throws(StorageError) {
        let result = posix_fadvise(try descriptor(.log), 0, 0, POSIX_FADV_DONTNEED)
        guard result == 0 else { throw Self.error(result, "cannot drop the cache of the log") }
    }
}
