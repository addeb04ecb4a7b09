import CHaptera

/// CRC32C (Castagnoli; RFC 3720 appendix B.4 has test vectors), in hardware where there is any.
package enum CRC32C {
    @inlinable package static func checksum(_ memory: RawMemory, continuing crc: UInt32 = 0)
        -> UInt32
    {
        // SAFETY: RawMemory guarantees `count` readable bytes at `base`.
        unsafe haptera_crc32c(crc, memory.base, memory.count)
    }
}
