import Foundation
import Glibc

/// Small files that must survive a crash whole, and the lock on a directory.
package enum HostFiles {
    /// Replaces the file by `contents`: write a new file, sync it, rename it, sync the directory. A
    /// crash at any point leaves the old contents or the new.
    package static func replace(_ path: String, with contents: Data) throws {
        let temporary = path + ".new"
        // SAFETY: a Swift string passed as a C string is valid during the call.
        let descriptor = unsafe open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0o600)
        guard descriptor >= 0 else { throw failure("create", temporary) }
        defer { close(descriptor) }
        // SAFETY: the pointer is used only within the closure, for the buffer's own length.
        let isWritten = unsafe contents.withUnsafeBytes { buffer in
            guard let start = buffer.baseAddress else { return true }
            let size = buffer.count
            var done = 0
            while done < size {
                let count = unsafe write(descriptor, start + done, size - done)
                if count <= 0 { return false }
                done += count
            }
            return true
        }
        guard isWritten, fsync(descriptor) == 0 else { throw failure("write", temporary) }
        guard unsafe rename(temporary, path) == 0 else { throw failure("rename", temporary) }
        try syncDirectory(of: path)
    }

    package static func syncDirectory(of path: String) throws {
        let directory = (path as NSString).deletingLastPathComponent
        // SAFETY: as above.
        let descriptor = unsafe open(
            directory.isEmpty ? "." : directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC)
        guard descriptor >= 0 else { throw failure("open", directory) }
        defer { close(descriptor) }
        guard fsync(descriptor) == 0 else { throw failure("sync", directory) }
    }

    package static func makeDirectory(_ path: String) throws {
        do {
            try FileManager.default.createDirectory(
                atPath: path, withIntermediateDirectories: true,
                attributes: [.posixPermissions: 0o700])
        } catch {
            throw HostError("cannot create the directory \(path): \(error.localizedDescription)")
        }
    }

    package static func absolute(_ path: String) -> String {
        let expanded = (path as NSString).expandingTildeInPath
        return URL(fileURLWithPath: expanded).standardizedFileURL.path
    }

    package static func failure(_ action: String, _ path: String) -> HostError {
        // SAFETY: strerror's result is copied at once.
        let reason = unsafe String(cString: strerror(errno))
        return HostError("cannot \(action) \(path): \(reason)")
    }
}

/// Held for as long as a process uses a directory, so that two processes never share one.
package final class DirectoryLock: Sendable {
    private let descriptor: Int32

    /// Throws if another process holds it.
    package init(_ directory: String) throws {
        try HostFiles.makeDirectory(directory)
        let path = directory + "/lock"
        // SAFETY: as above.
        descriptor = unsafe open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0o600)
        guard descriptor >= 0 else { throw HostFiles.failure("open", path) }
        guard flock(descriptor, LOCK_EX | LOCK_NB) == 0 else {
            close(descriptor)
            throw HostError("\(directory) is in use by another process; stop that one first")
        }
    }

    deinit { close(descriptor) }
}
