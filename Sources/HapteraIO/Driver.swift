import CAio
import CHaptera
import CUring
import Glibc
import HapteraCore

/// Which kernel interface a reactor uses.
package enum Backend: String, Sendable {
    /// io_uring if the kernel grants it, else libaio and epoll.
    case automatic
    case uring
    case aio

    /// The choice in the environment's HAPTERA_IO, `automatic` if it is unset or empty.
    package static func fromEnvironment() throws(IOError) -> Backend {
        guard let text = environment("HAPTERA_IO"), !text.isEmpty else { return .automatic }
        switch text {
        case "uring": return .uring
        case "aio": return .aio
        default: throw IOError("HAPTERA_IO is '\(text)'; it must be 'uring' or 'aio'")
        }
    }
}

/// A variable of the process's environment.
package func environment(_ name: String) -> String? {
    // SAFETY: getenv's result is copied at once; nothing here changes the environment.
    guard let value = unsafe getenv(name) else { return nil }
    return unsafe String(cString: value)
}

/// One completion as the kernel reported it.
struct Completion: BitwiseCopyable {
    var userData: UInt64
    /// Bytes, poll events, or a negative errno.
    var result: Int
}

/// The thin layer over the two C back ends; everything above it is the same for both.
@safe final class Driver {
    // SAFETY: exactly one of the two pointers is set, from init to deinit; both are used by the
    // reactor's thread only. `batch` has room for `batchMax` completions.
    private let ring: OpaquePointer?
    private let aio: OpaquePointer?
    private let batch: UnsafeMutablePointer<haptera_completion>
    static let batchMax = 256
    private(set) var registered: RawMemory?
    private let fixedFilesMax = 64
    private var fixedFiles: [Bool] = []

    var name: String { unsafe ring != nil ? "uring" : "aio" }

    /// `operations`: the most there will be outstanding at once.
    init(backend: Backend, operations: Int) throws(IOError) {
        var ring: OpaquePointer?
        var aio: OpaquePointer?
        var refusal: Int32 = 0
        if backend != .aio { refusal = -(unsafe haptera_ring_create(&ring, UInt32(operations))) }
        if unsafe ring == nil {
            if backend == .uring {
                throw IOError(errno: refusal, "HAPTERA_IO=uring, but the kernel refuses io_uring")
            }
            let result = unsafe haptera_aio_create(&aio, UInt32(operations))
            if result < 0 {
                throw IOError(errno: -result, "cannot set up libaio (see sysctl fs.aio-max-nr)")
            }
            if backend == .automatic {
                Log.warn("io_uring refused, using libaio and epoll", ("reason", errorText(refusal)))
            }
        }
        unsafe self.ring = ring
        unsafe self.aio = aio
        unsafe batch = UnsafeMutablePointer.allocate(capacity: Self.batchMax)
    }

    deinit {
        // SAFETY: as above.
        if let ring = unsafe ring { unsafe haptera_ring_destroy(ring) }
        if let aio = unsafe aio { unsafe haptera_aio_destroy(aio) }
        unsafe batch.deallocate()
    }

    /// Registers memory with the kernel, which pins it. Best effort.
    func register(buffer: RawMemory) {
        // SAFETY: the pool's memory outlives the reactor that owns both.
        guard let ring = unsafe ring, buffer.count > 0 else { return }
        let result = unsafe haptera_ring_register_buffer(ring, buffer.base, buffer.count)
        if result == 0 {
            registered = buffer
        } else {
            Log.info(
                "buffers not registered with io_uring (RLIMIT_MEMLOCK)",
                ("reason", errorText(-result)))
        }
    }

    /// A registered-file slot for `fd`, or -1 if there is none.
    func register(file fd: Int32) -> Int32 {
        // SAFETY: as above.
        guard let ring = unsafe ring else { return -1 }
        if fixedFiles.isEmpty {
            guard unsafe haptera_ring_register_files(ring, UInt32(fixedFilesMax)) == 0 else {
                return -1
            }
            fixedFiles = Array(repeating: false, count: fixedFilesMax)
        }
        guard let slot = fixedFiles.firstIndex(of: false),
            unsafe haptera_ring_set_file(ring, UInt32(slot), fd) >= 0
        else { return -1 }
        fixedFiles[slot] = true
        return Int32(slot)
    }

    func unregister(fileSlot: Int32) {
        // SAFETY: as above.
        guard let ring = unsafe ring, fileSlot >= 0 else { return }
        _ = unsafe haptera_ring_set_file(ring, UInt32(fileSlot), -1)
        fixedFiles[Int(fileSlot)] = false
    }

    /// The registered buffer that holds all of `memory`, or -1.
    func bufferIndex(_ memory: RawMemory) -> Int32 {
        // SAFETY: addresses are compared, not followed.
        guard let registered, unsafe memory.base >= registered.base,
            unsafe memory.base + memory.count <= registered.base + registered.count
        else { return -1 }
        return 0
    }

    func prepare(_ operation: inout haptera_operation) {
        // SAFETY: the C side copies the operation; what `address` points to stays valid until its
        // completion by the contracts of Reactor and Connection.
        if let ring = unsafe ring {
            unsafe haptera_ring_prepare(ring, &operation)
        } else if let aio = unsafe aio {
            unsafe haptera_aio_prepare(aio, &operation)
        }
    }

    /// To be called before a socket is closed.
    func forget(_ fd: Int32) {
        // SAFETY: as above.
        if let aio = unsafe aio { unsafe haptera_aio_forget(aio, fd) }
    }

    /// Submits, waits for at least one completion if asked to, and takes at most `batchMax`.
    func wait(block: Bool) -> Int {
        let minimum: UInt32 = block ? 1 : 0
        let count: Int32
        // SAFETY: `batch` has room for batchMax entries.
        if let ring = unsafe ring {
            count = unsafe haptera_ring_wait(ring, minimum, batch, UInt32(Self.batchMax))
        } else {
            count = unsafe haptera_aio_wait(aio, minimum, batch, UInt32(Self.batchMax))
        }
        // Nothing can be done without the ring, and going on would lose completions.
        precondition(count >= 0, "waiting for I/O failed: \(errorText(-count))")
        return Int(count)
    }

    func completion(_ index: Int) -> Completion {
        precondition(index < Self.batchMax)
        // SAFETY: the index is below the count `wait` returned.
        let raw = unsafe batch[index]
        return Completion(userData: raw.user_data, result: Int(raw.result))
    }
}
