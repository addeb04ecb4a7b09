import Glibc
import HapteraCore
import HapteraIO

/// A replica's files in a directory:
///
///     manifest, activity.log, layers/<layer>.data, layers/<layer>.table
///
/// Data, tables and manifest are opened with O_DIRECT, the log is mapped. Each file is locked with
/// flock on the very description that I/O goes through: a killed process's writes that io_uring
/// still carries out hold it, so who gets the lock finds the files at rest.
package final class DirectoryStorage: ReplicaStorage {
    package enum Mode: Equatable, Sendable {
        /// Waits for the lock of another process.
        case serve
        /// Changes files that nobody serves: fails as `inspect` does if somebody does.
        case change(waitMilliseconds: Int)
        /// Looks only, shares the lock with others that do; fails if somebody serves, but waits
        /// this long for the kernel to end the I/O of one that has just stopped.
        case inspect(waitMilliseconds: Int)
        /// Looks only, without a lock.
        case peek

        fileprivate var isWriting: Bool {
            switch self {
            case .serve, .change: true
            case .inspect, .peek: false
            }
        }
        /// Nil: as long as it takes.
        fileprivate var lockMilliseconds: Int? {
            switch self {
            case .change(let limit), .inspect(let limit): limit
            case .serve, .peek: nil
            }
        }
    }
    package let directory: String
    private let mode: Mode
    private var descriptors: [ReplicaFile: Int32] = [:]
    /// Of layers, and locked together with other copies' processes.
    var sharedFiles: Set<ReplicaFile> = []
    private var mapping: RawMemory?
    private var logCopy: MemoryBlock?
    /// What is durable is unknown from then on.
    private(set) var hasFailedSync = false
    /// Directories beside the copy's own where a failed sync is marked.
    package var markPlaces: [String] = []
    /// Whose mark it is there; nil: the manifest was not read for it yet.
    var markOwner: VolumeRecord.Member?
    /// For tests: what happens between the opening of a file and its lock.
    var openedHook: ((ReplicaFile) -> Void)?
    /// For tests: the error number a file's next syncs end with.
    var syncFault: ((ReplicaFile) -> Int32?)?
    /// For tests: the error number that reads of these bytes end with.
    var readFault: ((ReplicaFile, Range<UInt64>) -> Int32?)?

    package init(directory: String, mode: Mode) {
        self.directory = directory
        self.mode = mode
    }
    deinit {
        for fd in descriptors.values { Glibc.close(fd) }
        // SAFETY: the mapping is this object's and nobody uses it once the object is gone.
        if let mapping { unsafe munmap(mapping.base, mapping.count) }
    }

    package func path(_ file: ReplicaFile) -> String { "\(directory)/\(file)" }

    /// The file's descriptor, locked. Opens it at first.
    package func descriptor(_ file: ReplicaFile) throws(StorageError) -> Int32 {
        if let fd = descriptors[file] { return fd }
        let flags =
            file == .layers ? O_RDONLY | O_DIRECTORY : mode.isWriting ? O_RDWR : O_RDONLY
        while true {
            let fd = try open(file, flags: flags)
            openedHook?(file)
            try adopt(fd, file)
            // Whoever had the lock may have removed the copy and made another one meanwhile, and
            // its manifest must not be served with the other files of that. The manifest is the
            // first to be opened, and all that follow are looked at with it.
            let isManifestThere = descriptors[.manifest].map { isStillThere($0, .manifest) }
            guard mode.isWriting, !isStillThere(fd, file) || isManifestThere == false else {
                return fd
            }
            descriptors[file] = nil
            sharedFiles.remove(file)
            Glibc.close(fd)
            guard file == .manifest else {
                throw StorageError(
                    .notFound,
                    "\(directory) was removed or replaced while it was opened; start the replica "
                        + "again if it is still wanted")
            }
        }
    }

    /// False: another file has the name, or none.
    private func isStillThere(_ fd: Int32, _ file: ReplicaFile) -> Bool {
        var (opened, named) = (stat(), stat())
        // SAFETY: the string and the locals outlive the calls.
        guard unsafe fstat(fd, &opened) == 0, unsafe stat(path(file), &named) == 0 else {
            return false
        }
        return opened.st_ino == named.st_ino && opened.st_dev == named.st_dev
    }

    private func open(_ file: ReplicaFile, flags: Int32) throws(StorageError) -> Int32 {
        do throws(IOError) {
            let isDirect = file != .log && file != .layers
            return try FileDescriptors.open(path(file), flags: flags, isDirect: isDirect)
        } catch {
            switch error.errno {
            case ENOENT, ENOTDIR:
                throw StorageError(.notFound, "\(path(file)) is not there")
            case EEXIST: throw StorageError(.exists, "\(path(file)) is there already")
            case EINVAL where file != .log:
                throw StorageError(
                    .unsupported,
                    "the file system of \(directory) does not support O_DIRECT; "
                        + "keep replicas on ext4 or xfs")
            default: throw Self.error(error.errno, error.message)
            }
        }
    }

    private func adopt(_ fd: Int32, _ file: ReplicaFile) throws(StorageError) {
        do throws(StorageError) {
            try lock(fd, file)
        } catch {
            Glibc.close(fd)
            throw error
        }
        descriptors[file] = fd
    }

    private func lock(_ fd: Int32, _ file: ReplicaFile) throws(StorageError) {
        guard mode != .peek, file != .layers else { return }
        // Two processes serve a file that two copies share; both leave it as it is.
        let isShared = mode.isWriting && linkCount(fd) > 1
        let kind = mode.isWriting && !isShared ? LOCK_EX : LOCK_SH
        if isShared { sharedFiles.insert(file) }
        if flock(fd, kind | LOCK_NB) == 0 { return }
        guard errno == EWOULDBLOCK else {
            throw Self.error(errno, "cannot lock \(path(file)): \(errorText(errno))")
        }
        if let limit = mode.lockMilliseconds {
            for _ in 0..<limit / 20 {
                usleep(20_000)
                if flock(fd, kind | LOCK_NB) == 0 { return }
            }
            throw StorageError(.inUse, "\(directory) is in use: stop its replica first")
        }
        Log.info("waiting for the lock", ("file", path(file)))
        // Not a blocking call: the signals that end the process are blocked and could not end it.
        while flock(fd, kind | LOCK_NB) != 0 {
            guard errno == EINTR || errno == EWOULDBLOCK else {
                throw Self.error(errno, "cannot lock \(path(file)): \(errorText(errno))")
            }
            guard !Self.isToldToStop() else {
                throw StorageError(.inUse, "stopped while waiting for the lock of \(path(file))")
            }
            usleep(10_000)
        }
    }
    private static func isToldToStop() -> Bool {
        var pending = sigset_t()
        // SAFETY: `pending` is a local that outlives the calls.
        return unsafe sigpending(&pending) == 0
            && (sigismember(&pending, SIGTERM) == 1 || sigismember(&pending, SIGINT) == 1)
    }

    static func error(_ number: Int32, _ message: String) -> StorageError {
        switch number {
        case ENOSPC, EDQUOT: StorageError(.noSpace, message)
        case ENOENT: StorageError(.notFound, message)
        default: StorageError(.io(errno: number), message)
        }
    }
    private func failure(_ verb: String, _ file: ReplicaFile) -> StorageError {
        let number = errno
        return Self.error(number, "cannot \(verb) \(path(file)): \(errorText(number))")
    }

    // MARK: ReplicaStorage

    package func read(_ file: ReplicaFile, offset: UInt64, into memory: RawMemory)
        throws(StorageError) -> Int
    {
        let fd = try descriptor(file)
        if let number = readFault?(file, offset..<offset + UInt64(memory.count)) {
            errno = number
            throw failure("read", file)
        }
        var done = 0
        while done < memory.count {
            let rest = memory.slice(done, memory.count - done)
            // SAFETY: `rest` has `count` writable bytes.
            let count = unsafe pread(fd, rest.base, rest.count, off_t(offset) + off_t(done))
            if count == 0 { break }
            if count < 0 {
                guard errno == EINTR else { throw failure("read", file) }
                continue
            }
            done += count
            // Direct I/O goes on at whole blocks only: a shorter read is the end of the file.
            if done % 512 != 0 { break }
        }
        return done
    }

    package func write(_ file: ReplicaFile, offset: UInt64, from memory: RawMemory)
        throws(StorageError)
    {
        let fd = try descriptor(file)
        var done = 0
        while done < memory.count {
            let rest = memory.slice(done, memory.count - done)
            // SAFETY: `rest` has `count` readable bytes.
            let count = unsafe pwrite(fd, rest.base, rest.count, off_t(offset) + off_t(done))
            if count < 0 {
                guard errno == EINTR else { throw failure("write", file) }
                continue
            }
            done += count
        }
    }

    package func sync(_ file: ReplicaFile) throws(StorageError) {
        let fd = try descriptor(file)
        let fault = syncFault?(file)
        guard fault == nil, fdatasync(fd) == 0 else {
            errno = fault ?? errno
            hasFailedSync = true
            throw failure("sync", file)
        }
    }

    package func size(_ file: ReplicaFile) throws(StorageError) -> UInt64 {
        var status = stat()
        // SAFETY: `status` is a local that outlives the call.
        guard unsafe fstat(try descriptor(file), &status) == 0 else {
            throw failure("examine", file)
        }
        return UInt64(status.st_size)
    }

    /// Bytes that each open file occupies.
    package func allocatedBytes() -> [ReplicaFile: UInt64] {
        descriptors.compactMapValues { fd in
            var status = stat()
            // SAFETY: `status` is a local that outlives the call.
            return unsafe fstat(fd, &status) == 0 ? UInt64(status.st_blocks) * 512 : nil
        }
    }

    package func create(_ file: ReplicaFile, size: UInt64) throws(StorageError) {
        for path in [directory, "\(directory)/layers"] {
            // SAFETY: the string outlives the call.
            guard unsafe mkdir(path, 0o700) == 0 || errno == EEXIST else {
                throw Self.error(errno, "cannot create \(path): \(errorText(errno))")
            }
        }
        let fd = try openNew(file)
        guard ftruncate(fd, off_t(size)) == 0 else { throw failure("extend", file) }
        try allocate(file, fd, size)
    }
    /// Installing and draining must not need space later.
    private func allocate(
        _ file: ReplicaFile, _ fd: Int32, _ size: UInt64
    ) throws(StorageError) {
        guard file == .manifest || file == .log else { return }
        do throws(IOError) {
            try FileDescriptors.allocate(fd, length: size)
        } catch {
            guard error.errno == EOPNOTSUPP else {
                throw Self.error(error.errno, "\(path(file)): \(error.message)")
            }
        }
    }

    package func extend(_ file: ReplicaFile, size: UInt64) throws(StorageError) {
        guard try self.size(file) < size else { return }
        let fd = try descriptor(file)
        // Space first: a manifest without it keeps its size, or gets one between the two.
        try allocate(file, fd, size)
        guard ftruncate(fd, off_t(size)) == 0 else { throw failure("extend", file) }
    }

    /// A file without a byte is what a creation cut short leaves: it is taken for new.
    private func openNew(_ file: ReplicaFile) throws(StorageError) -> Int32 {
        do throws(StorageError) {
            let fd = try open(file, flags: O_RDWR | O_CREAT | O_EXCL)
            try adopt(fd, file)
            return fd
        } catch {
            guard error.code == .exists, try size(file) == 0 else { throw error }
            return try descriptor(file)
        }
    }

    /// Nobody uses their descriptors any more. Quick: the space comes back in the background.
    package func remove(_ layer: LayerID) throws(StorageError) {
        for file in [ReplicaFile.data(layer), .table(layer)] {
            // Open, so that deleting the name does not have to wait for the space.
            let fd = try? descriptor(file)
            descriptors[file] = nil
            defer { if let fd { FileDescriptors.closeInBackground(fd) } }
            // SAFETY: the string outlives the call.
            guard unsafe unlink(path(file)) == 0 || errno == ENOENT else {
                throw failure("delete", file)
            }
        }
    }

    package func layersPresent() throws(StorageError) -> [LayerID] {
        guard let names = Self.names(in: "\(directory)/layers") else {
            throw failure("list", .layers)
        }
        var found: Set<LayerID> = []
        for name in names {
            for suffix in [".data", ".table"] where name.hasSuffix(suffix) {
                guard let number = UInt32(name.dropLast(suffix.count)) else { continue }
                let layer = LayerID(rawValue: number)
                if name == String(number) + suffix { found.insert(layer) }
            }
        }
        return found.sorted()
    }

    /// Nil: it cannot be listed, and `errno` says why.
    static func names(in directory: String) -> [String]? {
        // SAFETY: the stream is this function's own until it is closed; an entry is used before the
        // next is read.
        guard let folder = unsafe opendir(directory) else { return nil }
        defer { unsafe closedir(folder) }
        var names: [String] = []
        while let entry = unsafe readdir(folder) {
            let name = unsafe withUnsafePointer(to: &entry.pointee.d_name) { start in
                unsafe start.withMemoryRebound(to: CChar.self, capacity: 256) {
                    unsafe String(cString: $0)
                }
            }
            names.append(name)
        }
        return names
    }

    package func syncDirectories() throws(StorageError) {
        for path in ["\(directory)/layers", directory, "\(directory)/.."] {
            do throws(IOError) {
                let fd = try FileDescriptors.open(path, flags: O_RDONLY | O_DIRECTORY)
                defer { Glibc.close(fd) }
                guard fsync(fd) == 0 else { throw IOError(errno: errno, "cannot sync \(path)") }
            } catch {
                // The parent's is a courtesy: we may lack the right to open it.
                if path.hasSuffix("/..") { continue }
                throw Self.error(error.errno, error.message)
            }
        }
    }

    package func nextAllocated(_ file: ReplicaFile, from offset: UInt64) throws(StorageError)
        -> Range<UInt64>?
    {
        let fd = try descriptor(file)
        do throws(IOError) {
            return try FileDescriptors.nextData(fd, from: offset)
        } catch { throw Self.error(error.errno, "\(path(file)): \(error.message)") }
    }

    /// Those who only look get a private mapping: nothing they do reaches the file. Without the
    /// lock they get a copy, which does not change under their eyes.
    package func mapLog(size: Int) throws(StorageError) -> RawMemory {
        let fd = try descriptor(.log)
        if mode == .peek {
            let block = MemoryBlock(count: size)
            guard try read(.log, offset: 0, into: block.memory) == size else {
                throw StorageError(.damaged, "\(path(.log)) ends early")
            }
            logCopy = block
            return block.memory
        }
        let sharing = mode.isWriting ? MAP_SHARED : MAP_PRIVATE
        // SAFETY: mmap's result is checked; the mapping lives as long as this object.
        let address = unsafe mmap(nil, size, PROT_READ | PROT_WRITE, sharing, fd, 0)
        guard let address = unsafe address, unsafe address != MAP_FAILED else {
            throw failure("map", .log)
        }
        let memory = unsafe RawMemory(base: address, count: size)
        mapping = memory
        return memory
    }
    /// Gives the memory of the mapping's pages back, which replaying has all touched; the page
    /// cache keeps what was stored.
    package func releaseLogPages() {
        // SAFETY: the range is this object's own shared mapping of a file, which stays as it is.
        if mode == .serve, let mapping {
            unsafe madvise(mapping.base, mapping.count, MADV_DONTNEED)
        }
    }
}
