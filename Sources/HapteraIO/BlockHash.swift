import COpenSSL
import HapteraCore

/// SHA-256 cut to 128 bits, by OpenSSL: shows that two copies of a block are equal, which a CRC
/// cannot. One context, reused.
@safe package final class BlockHash {
    // SAFETY: made in init, checked, freed in deinit only.
    private let context: OpaquePointer

    package init() {
        guard let made = unsafe EVP_MD_CTX_new() else { preconditionFailure("out of memory") }
        unsafe context = made
    }
    deinit { unsafe EVP_MD_CTX_free(context) }

    /// The digest's first 16 bytes, as two little-endian integers.
    package func hash(_ memory: RawMemory) -> (low: UInt64, high: UInt64) {
        var digest: (UInt64, UInt64, UInt64, UInt64) = (0, 0, 0, 0)
        // SAFETY: RawMemory guarantees `count` readable bytes; `digest` has the 32 bytes SHA-256
        // writes.
        let isDone = unsafe withUnsafeMutableBytes(of: &digest) { target in
            unsafe EVP_DigestInit_ex(context, EVP_sha256(), nil) == 1
                && EVP_DigestUpdate(context, memory.base, memory.count) == 1
                && EVP_DigestFinal_ex(
                    context, target.baseAddress?.assumingMemoryBound(to: UInt8.self), nil) == 1
        }
        precondition(isDone, "OpenSSL refuses SHA-256")
        return (UInt64(littleEndian: digest.0), UInt64(littleEndian: digest.1))
    }
}
