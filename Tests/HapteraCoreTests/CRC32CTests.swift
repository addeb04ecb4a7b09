import CHaptera
import Testing

@testable import HapteraCore

@Suite struct CRC32CTests {
    private typealias Variant = (UInt32, RawMemory) -> UInt32
    private let variants: [(name: String, function: Variant)] = [
        ("chosen", { CRC32C.checksum($1, continuing: $0) }),
        ("table", { unsafe haptera_crc32c_table($0, $1.base, $1.count) }),
        ("hardware", { unsafe haptera_crc32c_hardware($0, $1.base, $1.count) }),
    ]

    /// RFC 3720, appendix B.4, and the usual check value.
    @Test func knownVectors() {
        let ascending = (0..<32).map { UInt8($0) }
        let read: [UInt8] = [
            0x01, 0xc0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x14, 0, 0, 0, 0, 0, 0x04, 0, 0,
            0,
            0, 0x14, 0, 0, 0, 0x18, 0x28, 0, 0, 0, 0, 0, 0, 0, 0x02, 0, 0, 0, 0, 0, 0, 0,
        ]
        let vectors: [([UInt8], UInt32)] = [
            ([UInt8](repeating: 0, count: 32), 0x8a91_36aa),
            ([UInt8](repeating: 0xff, count: 32), 0x62a8_ab43),
            (ascending, 0x46dd_794e),
            (ascending.reversed(), 0x113f_db5c),
            (read, 0xd996_3a56),
            (Array("123456789".utf8), 0xe306_9283),
        ]
        for (bytes, expected) in vectors {
            let block = MemoryBlock(count: bytes.count)
            block.memory.copy(from: bytes)
            for (name, function) in variants {
                #expect(function(0, block.memory) == expected, "\(name)")
            }
        }
    }

    /// All variants agree with a bit-by-bit computation for every length and alignment around the
    /// stream sizes, whole and in two parts.
    @Test func variantsAgree() {
        let block = MemoryBlock(count: 16 << 10)
        var generator = SystemRandomNumberGenerator()
        for at in 0..<block.memory.count { block.memory[at] = generator.next() }
        let lengths = Array(0...600) + [1359, 1360, 4079, 4080, 4081, 4095, 4096, 8160, 12_300]
        for length in lengths {
            let memory = block.memory.slice(Int.random(in: 0..<16), length)
            let expected = bitwise(memory)
            let cut = length == 0 ? 0 : Int.random(in: 0..<length)
            for (name, function) in variants {
                #expect(function(0, memory) == expected, "\(name), \(length) bytes")
                let first = function(0, memory.slice(0, cut))
                let whole = function(first, memory.slice(cut, length - cut))
                #expect(whole == expected, "\(name), \(length) bytes cut at \(cut)")
            }
        }
    }

    private func bitwise(_ memory: RawMemory) -> UInt32 {
        var crc = UInt32.max
        for at in 0..<memory.count {
            crc ^= UInt32(memory[at])
            for _ in 0..<8 { crc = crc >> 1 ^ (crc & 1 == 1 ? 0x82f6_3b78 : 0) }
        }
        return ~crc
    }
}
