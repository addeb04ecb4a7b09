/// Builds the control structures (volume record, install, hello, manifest): not for the data path.
package struct ByteWriter {
    package private(set) var bytes: [UInt8] = []
    package init() {}
    package mutating func append<T: FixedWidthInteger>(_ value: T) {
        var rest = value
        for _ in 0..<(T.bitWidth / 8) {
            bytes.append(UInt8(truncatingIfNeeded: rest))
            rest = T.bitWidth > 8 ? rest >> 8 : 0
        }
    }
    package mutating func append(raw: [UInt8]) { bytes.append(contentsOf: raw) }
    /// Length (4 bytes), then UTF-8.
    package mutating func append(text: String) {
        append(UInt32(text.utf8.count))
        bytes.append(contentsOf: text.utf8)
    }
}

/// Reads what `ByteWriter` wrote. After any failure `isValid` is false and every value is zero, so
/// a decoder reads straight through and checks once at the end.
package struct ByteReader {
    private let bytes: [UInt8]
    private var position = 0
    package private(set) var isValid = true

    package init(_ bytes: [UInt8]) { self.bytes = bytes }
    package var remaining: Int { bytes.count - position }

    package mutating func read<T: FixedWidthInteger>(_ type: T.Type) -> T {
        let width = T.bitWidth / 8
        guard isValid, remaining >= width else {
            isValid = false
            return 0
        }
        var value: T = 0
        for index in (0..<width).reversed() {
            value =
                (T.bitWidth > 8 ? value << 8 : 0) | T(truncatingIfNeeded: bytes[position + index])
        }
        position += width
        return value
    }
    package mutating func read(raw count: Int) -> [UInt8] {
        guard isValid, count >= 0, remaining >= count else {
            isValid = false
            return []
        }
        defer { position += count }
        return [UInt8](bytes[position..<position + count])
    }
    /// A text of at most `limit` bytes of valid UTF-8.
    package mutating func readText(limit: Int) -> String {
        let count = Int(read(UInt32.self))
        guard isValid, count <= limit else {
            isValid = false
            return ""
        }
        guard let text = String(validating: read(raw: count), as: UTF8.self) else {
            isValid = false
            return ""
        }
        return text
    }
    /// A list's length, refused above `limit`.
    package mutating func readCount(limit: Int) -> Int {
        let count = Int(read(UInt32.self))
        if count > limit { isValid = false }
        return isValid ? count : 0
    }
    package mutating func invalidate() { isValid = false }
}
