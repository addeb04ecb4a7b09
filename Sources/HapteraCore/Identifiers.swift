/// The number of a volume's configuration; it grows by one with every change and fences engines.
package struct Epoch: RawRepresentable, Hashable, Comparable, BitwiseCopyable, Sendable {
    package var rawValue: UInt64
    @inlinable package init(rawValue: UInt64) { self.rawValue = rawValue }
    @inlinable package init(_ rawValue: UInt64) { self.rawValue = rawValue }
    package static let zero = Epoch(0)
    package var next: Epoch { Epoch(rawValue + 1) }
    @inlinable package static func < (a: Epoch, b: Epoch) -> Bool { a.rawValue < b.rawValue }
}

/// Orders an engine's requests. Starts at 1 and never restarts while the engine process lives.
package struct SequenceNumber: RawRepresentable, Hashable, Comparable, BitwiseCopyable, Sendable {
    package var rawValue: UInt64
    @inlinable package init(rawValue: UInt64) { self.rawValue = rawValue }
    @inlinable package init(_ rawValue: UInt64) { self.rawValue = rawValue }
    package static let zero = SequenceNumber(0)
    @inlinable package static func < (a: Self, b: Self) -> Bool { a.rawValue < b.rawValue }
}

/// A point in a volume's history of writes: everything at or below it is meant. Ordered by epoch,
/// then by sequence number. As *S* of the protocol: the (epoch, sequence) at which a flush was sent
/// that every member has since acknowledged.
package struct StablePoint: Hashable, Comparable, BitwiseCopyable, Sendable {
    package var epoch: Epoch
    package var sequence: SequenceNumber
    @inlinable package init(epoch: Epoch, sequence: SequenceNumber) {
        self.epoch = epoch
        self.sequence = sequence
    }
    package static let zero = StablePoint(epoch: .zero, sequence: .zero)
    /// The first point this one does not cover.
    package var next: StablePoint {
        StablePoint(epoch: epoch, sequence: SequenceNumber(sequence.rawValue + 1))
    }
    @inlinable package static func < (a: StablePoint, b: StablePoint) -> Bool {
        a.epoch == b.epoch ? a.sequence < b.sequence : a.epoch < b.epoch
    }
}

/// Names one volume for ever: 128 random bits chosen when it is created.
package struct VolumeID: Hashable, BitwiseCopyable, Sendable {
    package var high: UInt64
    package var low: UInt64
    package init(high: UInt64, low: UInt64) {
        self.high = high
        self.low = low
    }
    /// 32 lower-case hexadecimal digits.
    package init?(_ text: some StringProtocol) {
        guard text.utf8.count == 32, let high = parseHexadecimal(text.utf8.prefix(16)),
            let low = parseHexadecimal(text.utf8.suffix(16))
        else { return nil }
        self.init(high: high, low: low)
    }
    package var text: String { hexadecimal(high) + hexadecimal(low) }
}

/// Names one replica of a volume: 64 random bits, never zero. Text: 16 hexadecimal digits.
package struct ReplicaID: RawRepresentable, Hashable, Comparable, BitwiseCopyable, Sendable {
    package var rawValue: UInt64
    package init(rawValue: UInt64) { self.rawValue = rawValue }
    package init?(_ text: some StringProtocol) {
        guard text.utf8.count == 16, let value = parseHexadecimal(text.utf8), value != 0 else {
            return nil
        }
        rawValue = value
    }
    package var text: String { hexadecimal(rawValue) }
    package static func < (a: Self, b: Self) -> Bool { a.rawValue < b.rawValue }
}

/// Tells one making of a replica's directory from a later one under the same `ReplicaID`: random,
/// never zero, written when the directory is created. A different incarnation holds no data.
package struct Incarnation: RawRepresentable, Hashable, BitwiseCopyable, Sendable {
    package var rawValue: UInt64
    package init(rawValue: UInt64) { self.rawValue = rawValue }
}

/// One start of an engine or replica process: random, never zero, never reused.
package struct InstanceID: RawRepresentable, Hashable, BitwiseCopyable, Sendable {
    package var rawValue: UInt64
    package init(rawValue: UInt64) { self.rawValue = rawValue }
    package static let none = InstanceID(rawValue: 0)
}

/// One layer of a replica's data; the same number on every replica of the volume. Starts at 1.
package struct LayerID: RawRepresentable, Hashable, Comparable, BitwiseCopyable, Sendable {
    package var rawValue: UInt32
    @inlinable package init(rawValue: UInt32) { self.rawValue = rawValue }
    /// In requests: whichever layer is the head. No layer has this id.
    package static let head = LayerID(rawValue: 0)
    /// `LayerRegion` has room for these.
    package static let max = LayerID(rawValue: 0xff_ffff)
    @inlinable package static func < (a: Self, b: Self) -> Bool { a.rawValue < b.rawValue }
}

/// A layer chain: ascending. Layers are many when snapshots are, and requests more: bisects.
extension [LayerID] {
    /// The place of the lowest layer above one that need not be in the chain; `count`: none is.
    func index(above layer: LayerID) -> Int {
        var (low, high) = (0, count)
        while low < high {
            let middle = (low + high) / 2
            if self[middle] > layer { high = middle } else { low = middle + 1 }
        }
        return low
    }
    /// The layer's place; nil: it is none of the chain's.
    func index(ofLayer layer: LayerID) -> Int? {
        let above = index(above: layer)
        return above > 0 && self[above - 1] == layer ? above - 1 : nil
    }
}

/// One region of one layer.
package struct LayerRegion: Hashable, BitwiseCopyable, Sendable {
    package var layer: LayerID
    package var region: UInt64
    package init(_ layer: LayerID, _ region: UInt64) {
        self.layer = layer
        self.region = region
    }
    /// Layer in the upper 24 bits, region in the lower 40.
    package var packed: UInt64 { UInt64(layer.rawValue) << 40 | region }
    package init(packed: UInt64) {
        layer = LayerID(rawValue: UInt32(packed >> 40))
        region = packed & (1 << 40 - 1)
    }
}

/// A reading of the monotonic clock, nanoseconds. The core never reads a clock; it is told.
package struct Instant: RawRepresentable, Hashable, Comparable, BitwiseCopyable, Sendable {
    package var rawValue: UInt64
    @inlinable package init(rawValue: UInt64) { self.rawValue = rawValue }
    package static let zero = Instant(rawValue: 0)
    @inlinable package static func < (a: Self, b: Self) -> Bool { a.rawValue < b.rawValue }
    /// Saturates instead of overflowing.
    package func adding(milliseconds: UInt64) -> Instant {
        let (sum, overflow) = rawValue.addingReportingOverflow(milliseconds * 1_000_000)
        return Instant(rawValue: overflow ? .max : sum)
    }
    /// Zero if `earlier` is in fact later.
    package func nanoseconds(since earlier: Instant) -> UInt64 {
        rawValue > earlier.rawValue ? rawValue - earlier.rawValue : 0
    }
}

/// 16 lower-case hexadecimal digits. (The data plane links no Foundation, so no `String(format:)`.)
package func hexadecimal(_ value: UInt64) -> String {
    let digits = String(value, radix: 16)
    return String(repeating: "0", count: 16 - digits.utf8.count) + digits
}

/// Two digits for each byte.
package func hexadecimal(_ bytes: [UInt8]) -> String {
    bytes.map { ($0 < 16 ? "0" : "") + String($0, radix: 16) }.joined()
}
/// Nil unless the text is nothing but two digits for each byte.
package func parseHexadecimalBytes(_ text: String) -> [UInt8]? {
    let digits = Array(text.utf8)
    guard digits.count % 2 == 0 else { return nil }
    var bytes: [UInt8] = []
    bytes.reserveCapacity(digits.count / 2)
    for at in stride(from: 0, to: digits.count, by: 2) {
        guard let byte = parseHexadecimal(digits[at..<at + 2]) else { return nil }
        bytes.append(UInt8(byte))
    }
    return bytes
}
/// Up to 16 hexadecimal digits and nothing else, or nil.
package func parseHexadecimal(_ digits: some Collection<UInt8>) -> UInt64? {
    guard !digits.isEmpty, digits.count <= 16 else { return nil }
    var value: UInt64 = 0
    for digit in digits {
        switch digit {
        case UInt8(ascii: "0")...UInt8(ascii: "9"):
            value = value << 4 | UInt64(digit - UInt8(ascii: "0"))
        case UInt8(ascii: "a")...UInt8(ascii: "f"):
            value = value << 4 | UInt64(digit - UInt8(ascii: "a") + 10)
        default: return nil
        }
    }
    return value
}
