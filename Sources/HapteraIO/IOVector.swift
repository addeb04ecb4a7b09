import Glibc
import HapteraCore

/// A `struct msghdr` with its `iovec`s at a stable address, as the kernel wants them.
@safe final class IOVector {
    // SAFETY: both allocations live from init to deinit; `first` and `count` stay within
    // `entriesMax`. What the entries point to is kept alive by the owner until the operation ends.
    static let entriesMax = 64
    private let entries: UnsafeMutablePointer<iovec>
    private let message: UnsafeMutablePointer<msghdr>
    private var first = 0
    private(set) var count = 0
    /// Bytes of all entries left.
    private(set) var length = 0

    init() {
        unsafe entries = UnsafeMutablePointer.allocate(capacity: Self.entriesMax)
        unsafe message = UnsafeMutablePointer.allocate(capacity: 1)
        unsafe message.initialize(to: msghdr())
    }
    deinit {
        unsafe entries.deallocate()
        unsafe message.deallocate()
    }

    var isFull: Bool { first + count == Self.entriesMax }

    func removeAll() {
        first = 0
        count = 0
        length = 0
    }

    /// Adds memory; what directly follows the last entry extends it.
    func append(_ memory: RawMemory) {
        length += memory.count
        if count > 0 {
            let last = unsafe entries + (first + count - 1)
            if let base = unsafe last.pointee.iov_base,
                unsafe base + last.pointee.iov_len == memory.base
            {
                unsafe last.pointee.iov_len += memory.count
                return
            }
        }
        precondition(!isFull)
        unsafe (entries + first + count).initialize(
            to: iovec(iov_base: memory.base, iov_len: memory.count))
        count += 1
    }

    /// Drops the first `bytes`, which were transferred.
    func advance(by bytes: Int) {
        precondition(bytes <= length)
        length -= bytes
        var rest = bytes
        while rest > 0 {
            let entry = unsafe entries + first
            if unsafe rest < entry.pointee.iov_len {
                unsafe entry.pointee.iov_base = entry.pointee.iov_base.map { unsafe $0 + rest }
                unsafe entry.pointee.iov_len -= rest
                return
            }
            unsafe rest -= entry.pointee.iov_len
            first += 1
            count -= 1
        }
    }

    /// The only entry's memory, if there is just one.
    var single: RawMemory? {
        guard count == 1, let base = unsafe entries[first].iov_base else { return nil }
        return unsafe RawMemory(base: base, count: entries[first].iov_len)
    }

    /// The message header over what is left; valid until the next change.
    var header: UnsafeMutableRawPointer {
        unsafe message.pointee.msg_iov = entries + first
        unsafe message.pointee.msg_iovlen = count
        return unsafe UnsafeMutableRawPointer(message)
    }
}
