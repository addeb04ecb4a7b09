import Glibc
import HapteraCore
import HapteraIO

// A table page that cannot be read ends the process whenever it is needed, and not before. Started
// again, the copy would be filled until it is needed again, and never be away long enough to be
// replaced. So the process that met it leaves a mark, `damaged`, with the reason. Later processes
// refuse to serve the copy, where the record in its manifest names another in-sync copy. One that
// is alone by its own record is served as before: most of what it holds can still be read. Its own
// record may be behind: if the others were lost at the same moment, it is the last one and does not
// know. So after `refusalSeconds`, in which it would have been replaced, it is served as well.

/// What the file `damaged` in a copy's directory says.
///
///     offset  size  field
///          0     4  magic        "HPDM"
///          4     4  format       1
///          8     8  replica
///         16     8  incarnation  of another making of the copy: it says nothing of this one
///         24     4  length       bytes of the reason, up to 1024
///         28     4  checksum     CRC32C of bytes 0..<28, then of the reason
///         32        reason       UTF-8
struct DamageMark: Equatable {
    static let magic: UInt32 = 0x4d44_5048
    static let formatVersion: UInt32 = 1
    static let headerSize = 32
    static let reasonLengthMax = 1024
    /// Twice the default of `--stale-replica-timeout`.
    static let refusalSeconds = 3600

    var member: VolumeRecord.Member
    var reason: String

    func encoded() -> [UInt8] {
        let text = [UInt8](reason.utf8.prefix(Self.reasonLengthMax))
        var header = ByteWriter()
        header.append(Self.magic)
        header.append(Self.formatVersion)
        header.append(member.replica.rawValue)
        header.append(member.incarnation.rawValue)
        header.append(UInt32(text.count))
        header.append(checksum(of: header.bytes + text))
        return header.bytes + text
    }

    /// Nil: a mark whose writing was cut short, or that is damaged itself. It counts as none: the
    /// page will be needed again.
    init?(decoding bytes: [UInt8]) {
        var reader = ByteReader(bytes)
        let (magic, format) = (reader.read(UInt32.self), reader.read(UInt32.self))
        member = VolumeRecord.Member(
            replica: ReplicaID(rawValue: reader.read(UInt64.self)),
            incarnation: Incarnation(rawValue: reader.read(UInt64.self)))
        let length = Int(reader.read(UInt32.self))
        let expected = reader.read(UInt32.self)
        guard reader.isValid, magic == Self.magic, format == Self.formatVersion,
            length <= Self.reasonLengthMax, reader.remaining == length
        else { return nil }
        let text = reader.read(raw: length)
        guard expected == checksum(of: [UInt8](bytes[..<28]) + text) else { return nil }
        reason = String(decoding: text, as: UTF8.self)
    }
    init(_ member: VolumeRecord.Member, _ reason: String) {
        self.member = member
        self.reason = reason
    }
}

extension DirectoryStorage {
    private var damagePath: String { "\(directory)/damaged" }

    /// Leaves the mark, durably. Without space for it, or if it fails otherwise, all is as if there
    /// were no marks: the next process serves the copy until the page is needed again.
    ///
    /// What a crash leaves: a part of it, which says nothing, or all of it.
    func noteDamage(_ reason: String, of member: VolumeRecord.Member) {
        do throws(StorageError) {
            try writeWhole(DamageMark(member, reason).encoded(), to: damagePath)
            try DirectFile.syncDirectory(directory)
        } catch {
            Log.error("cannot mark the damage", ("reason", error.message))
            // SAFETY: the string outlives the call.
            _ = unsafe unlink(damagePath)
        }
    }

    /// Writes a small file and syncs it; what it held before is gone.
    func writeWhole(_ bytes: [UInt8], to path: String) throws(StorageError) {
        let fd: Int32
        do throws(IOError) {
            fd = try FileDescriptors.open(path, flags: O_WRONLY | O_CREAT | O_TRUNC)
        } catch { throw Self.error(error.errno, error.message) }
        defer { close(fd) }
        var done = 0
        while done < bytes.count {
            // SAFETY: the slice's bytes are valid during the call.
            let count = unsafe bytes[done...].withUnsafeBytes {
                unsafe Glibc.write(fd, $0.baseAddress, $0.count)
            }
            if count < 0, errno == EINTR { continue }
            guard count > 0 else {
                throw Self.error(errno, "cannot write \(path): \(errorText(errno))")
            }
            done += count
        }
        guard fsync(fd) == 0 else {
            throw Self.error(errno, "cannot sync \(path): \(errorText(errno))")
        }
    }

    /// The mark of this very making of the copy, whatever its record says; nil: none.
    func damageMark(of member: VolumeRecord.Member) -> DamageMark? {
        guard let fd = try? FileDescriptors.open(damagePath, flags: O_RDONLY) else { return nil }
        defer { close(fd) }
        var bytes = [UInt8](
            repeating: 0, count: DamageMark.headerSize + DamageMark.reasonLengthMax + 1)
        // SAFETY: the array has the bytes given.
        let count = unsafe Glibc.read(fd, &bytes, bytes.count)
        guard count > 0, let mark = DamageMark(decoding: [UInt8](bytes.prefix(count))) else {
            return nil
        }
        return mark.member == member ? mark : nil
    }

    /// Takes the mark away, durably.
    func forgetDamage() throws(StorageError) {
        // SAFETY: the string outlives the call.
        guard unsafe unlink(damagePath) == 0 || errno == ENOENT else {
            throw Self.error(errno, "cannot remove \(damagePath): \(errorText(errno))")
        }
        try DirectFile.syncDirectory(directory)
    }

    /// Throws `damaged` if the copy is marked and the record in its manifest names another in-sync
    /// copy. The caller holds the manifest's lock.
    func refuseMarked() throws(StorageError) {
        var status = stat()
        // SAFETY: the string and `status` outlive the call.
        guard unsafe stat(damagePath, &status) == 0 else { return }
        let age = time(nil) - status.st_mtim.tv_sec
        guard case .manifest(let manifest) = try ReplicaCore.loadManifest(self),
            let mark = damageMark(of: manifest.identity.member)
        else { return }
        guard !manifest.isAlone else {
            return Log.warn(
                "served although it is damaged: its record names no other copy",
                ("damage", mark.reason))
        }
        guard age >= 0, age < DamageMark.refusalSeconds else {
            return Log.warn(
                "served although it is damaged: nobody has replaced it",
                ("damage", mark.reason))
        }
        throw StorageError(.damaged, mark.reason)
    }
}

extension Manifest {
    /// By the record installed here no other copy is in sync.
    var isAlone: Bool { VolumeRecord.isAlone(identity.replica, in: installed) }
}

extension VolumeRecord {
    /// The record names no in-sync replica but that one, or there is none.
    static func isAlone(_ replica: ReplicaID, in record: VolumeRecord?) -> Bool {
        record?.inSync.contains { $0.replica != replica } != true
    }
}
