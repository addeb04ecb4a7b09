import CHaptera
import Glibc

/// Blocking calls on descriptors, for opening files and for offline tools.
package enum FileDescriptors {
    /// Close-on-exec; `isDirect` bypasses the page cache (O_DIRECT).
    package static func open(_ path: String, flags: Int32, isDirect: Bool = false) throws(IOError)
        -> Int32
    {
        // SAFETY: the string outlives the call.
        let fd = unsafe haptera_open(path, flags, isDirect ? 1 : 0)
        guard fd >= 0 else { throw IOError(errno: -fd, "cannot open \(path)") }
        return fd
    }
    /// Closes it on a thread of its own: the last descriptor of a deleted file gives its space
    /// back, which takes the file system seconds if the file is large.
    package static func closeInBackground(_ fd: Int32) { haptera_close_in_background(fd) }
    /// Takes the file's space now.
    package static func allocate(_ fd: Int32, length: UInt64) throws(IOError) {
        let result = haptera_fallocate(fd, 0, 0, Int64(length))
        guard result >= 0 else { throw IOError(errno: -result, "cannot allocate \(length) bytes") }
    }
    /// The next range at or after `offset` that holds data; nil: none.
    package static func nextData(_ fd: Int32, from offset: UInt64) throws(IOError) -> Range<UInt64>?
    {
        let start = haptera_seek(fd, Int64(offset), 1)
        if start == -Int64(ENXIO) { return nil }
        guard start >= 0 else { throw IOError(errno: Int32(-start), "cannot look for data") }
        let end = haptera_seek(fd, start, 0)
        guard end >= start else { throw IOError(errno: Int32(-end), "cannot look for holes") }
        return UInt64(start)..<UInt64(end)
    }
}
