import CHaptera
import Glibc
import HapteraCore

/// An open file, by default with O_DIRECT, and synchronous operations on it for start-up and tools.
/// Running processes give `descriptor` to the reactor. Errors name the path.
package final class DirectFile {
    package enum Access: Sendable { case readOnly, readWrite }
    package let path: String
    package let descriptor: Int32
    private enum Mode { static let keepSize: Int32 = 1, punchHole: Int32 = 2 }

    /// Opens an existing file, or (with `create`) makes a new one and fails with `exists` if there
    /// is one. With `direct`, memory, offsets and lengths must be multiples of 4096.
    package init(
        path: String, access: Access = .readWrite, create: Bool = false, direct: Bool = true
    ) throws(StorageError) {
        self.path = path
        var flags = access == .readOnly ? O_RDONLY : O_RDWR
        if create { flags |= O_CREAT | O_EXCL }
        // SAFETY: the string outlives the call.
        descriptor = unsafe haptera_open(path, flags, direct ? 1 : 0)
        guard descriptor >= 0 else {
            if descriptor == -EINVAL && direct {
                if create { _ = unsafe unlink(path) }
                throw StorageError(
                    .unsupported,
                    "the file system of \(path) has no direct I/O (O_DIRECT); use ext4 or xfs")
            }
            throw Self.error(-descriptor, create ? "create" : "open", path)
        }
    }
    deinit { close(descriptor) }

    /// Takes the lock that keeps a second process off this file, on this very descriptor. Waits up
    /// to `waitMilliseconds`: the kernel may still be finishing writes of a killed process, which
    /// holds its lock until then. `inUse` if somebody keeps it.
    package func lock(waitMilliseconds: Int) throws(StorageError) {
        let limit = Clock.monotonic().adding(milliseconds: UInt64(waitMilliseconds))
        while flock(descriptor, LOCK_EX | LOCK_NB) != 0 {
            guard errno == EWOULDBLOCK || errno == EINTR else { throw failure("lock") }
            guard Clock.monotonic() < limit else {
                throw StorageError(.inUse, "\(path) is in use by another process")
            }
            usleep(10_000)
        }
    }

    /// Reads up to `memory.count` bytes; fewer only at the end of the file.
    package func read(into memory: RawMemory, offset: UInt64) throws(StorageError) -> Int {
        var done = 0
        while done < memory.count {
            // SAFETY: the slice is within `memory`.
            let rest = memory.slice(done, memory.count - done)
            let count = unsafe pread(
                descriptor, rest.base, rest.count, off_t(offset) + off_t(done))
            if count < 0 && errno == EINTR { continue }
            guard count >= 0 else { throw failure("read") }
            if count == 0 { break }
            done += count
            // An unaligned count with O_DIRECT is the end of the file; reading on would be EINVAL.
            if done % 512 != 0 { break }
        }
        return done
    }
    /// Writes all of `memory`.
    package func write(from memory: RawMemory, offset: UInt64) throws(StorageError) {
        var done = 0
        while done < memory.count {
            // SAFETY: the slice is within `memory`.
            let rest = memory.slice(done, memory.count - done)
            let count = unsafe pwrite(
                descriptor, rest.base, rest.count, off_t(offset) + off_t(done))
            if count < 0 && errno == EINTR { continue }
            guard count > 0 else { throw failure("write") }
            done += count
        }
    }
    /// fdatasync.
    package func sync() throws(StorageError) {
        guard fdatasync(descriptor) == 0 else { throw failure("sync") }
    }
    package func size() throws(StorageError) -> UInt64 {
        let end = lseek(descriptor, 0, SEEK_END)
        guard end >= 0 else { throw failure("find the size of") }
        return UInt64(end)
    }
    package func resize(_ size: UInt64) throws(StorageError) {
        guard ftruncate(descriptor, off_t(size)) == 0 else { throw failure("resize") }
    }
    /// Reserves space without changing what is read.
    package func allocate(offset: UInt64, length: UInt64) throws(StorageError) {
        try fallocate(0, offset, length, "reserve space for")
    }
    package func punch(offset: UInt64, length: UInt64) throws(StorageError) {
        try fallocate(Mode.keepSize | Mode.punchHole, offset, length, "punch a hole into")
    }
    private func fallocate(
        _ mode: Int32, _ offset: UInt64, _ length: UInt64, _ verb: String
    ) throws(StorageError) {
        let result = haptera_fallocate(descriptor, mode, Int64(offset), Int64(length))
        guard result == 0 else { throw Self.error(-result, verb, path) }
    }
    /// The next range that holds data at or after `offset` (SEEK_DATA, SEEK_HOLE); nil: none.
    package func nextAllocated(from offset: UInt64) throws(StorageError) -> Range<UInt64>? {
        let start = haptera_seek(descriptor, Int64(offset), 1)
        if start == -Int64(ENXIO) { return nil }
        guard start >= 0 else { throw Self.error(Int32(-start), "seek in", path) }
        let end = haptera_seek(descriptor, start, 0)
        guard end >= 0 else { throw Self.error(Int32(-end), "seek in", path) }
        return UInt64(start)..<UInt64(end)
    }

    /// Makes the names of files created in (or removed from) a directory durable.
    package static func syncDirectory(_ path: String) throws(StorageError) {
        // SAFETY: the string outlives the call.
        let fd = unsafe haptera_open(path, O_RDONLY | O_DIRECTORY, 0)
        guard fd >= 0 else { throw error(-fd, "open", path) }
        defer { close(fd) }
        guard fsync(fd) == 0 else { throw error(errno, "sync", path) }
    }
    /// True if it was made, false if it was there.
    @discardableResult
    package static func makeDirectory(_ path: String) throws(StorageError) -> Bool {
        // SAFETY: the string outlives the call.
        if unsafe mkdir(path, 0o700) == 0 { return true }
        guard errno == EEXIST else { throw error(errno, "make directory", path) }
        return false
    }

    private func failure(_ verb: String) -> StorageError { Self.error(errno, verb, path) }
    package static func error(_ number: Int32, _ verb: String, _ path: String) -> StorageError {
        let code: StorageError.Code
        switch number {
        case ENOENT: code = .notFound
        case EEXIST: code = .exists
        case ENOSPC, EDQUOT: code = .noSpace
        case EOPNOTSUPP: code = .unsupported
        default: code = .io(errno: number)
        }
        return StorageError(code, "cannot \(verb) \(path): \(errorText(number))")
    }
}

/// The first bytes of a file as shared memory: stores are in the file at once, as far as any
/// process can tell, and durable after a later fdatasync of it.
@safe package final class MappedFile {
    package let memory: RawMemory
    private let file: DirectFile

    /// The file must be at least `size` bytes and open for writing; touching pages past its end
    /// would kill the process.
    package init(_ file: DirectFile, size: Int) throws(StorageError) {
        self.file = file
        guard try file.size() >= UInt64(size) else {
            throw StorageError(.damaged, "\(file.path) is shorter than \(size) bytes")
        }
        // SAFETY: the result is checked; the mapping is this object's until deinit.
        let address = unsafe mmap(
            nil, size, PROT_READ | PROT_WRITE, MAP_SHARED, file.descriptor, 0)
        guard let address = unsafe address, unsafe address != MAP_FAILED else {
            throw DirectFile.error(errno, "map", file.path)
        }
        memory = unsafe RawMemory(base: address, count: size)
    }
    // SAFETY: same address and length as mapped in init.
    deinit { unsafe munmap(memory.base, memory.count) }
}

/// Names this start of the host (the kernel's boot id): 128 bits.
package func bootID() throws(StorageError) -> (high: UInt64, low: UInt64) {
    let path = "/proc/sys/kernel/random/boot_id"
    let file = try DirectFile(path: path, access: .readOnly, direct: false)
    let block = MemoryBlock(count: 64)
    let count = try file.read(into: block.memory, offset: 0)
    let digits = block.memory.slice(0, count).bytes().filter {
        $0 != UInt8(ascii: "-") && $0 != UInt8(ascii: "\n")
    }
    guard digits.count == 32, let high = parseHexadecimal(digits.prefix(16)),
        let low = parseHexadecimal(digits.suffix(16))
    else { throw StorageError(.damaged, "\(path) holds no boot id") }
    return (high, low)
}
