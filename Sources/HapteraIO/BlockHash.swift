import COpenSSL
import HapteraCore

/// The hash by which replicas compare blocks: CRC32C is no proof of equality over millions of them.
package enum BlockHash {
    /// The first 16 bytes of SHA-256, as two little-endian integers.
    package static func hash(_ memory: RawMemory) -> (low: UInt64, high: UInt64) {
        var low: UInt64 = 0
        var high: UInt64 = 0
        // SAFETY: `memory` has `count` readable bytes; the prefix has room for two integers.
        unsafe withUnsafeTemporaryAllocation(of: UInt64.self, capacity: 2) { prefix in
            unsafe haptera_sha256_prefix(memory.base, memory.count, prefix.baseAddress)
            low = unsafe prefix[0]
            high = unsafe prefix[1]
        }
        return (low, high)
    }
}
