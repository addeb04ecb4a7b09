/// The one source of chance in a simulated world: SplitMix64, the same sequence on every machine.
package final class RandomSource {
    private var state: UInt64

    package init(seed: UInt64) { state = seed }

    package func next() -> UInt64 {
        state &+= 0x9e37_79b9_7f4a_7c15
        return Self.mix(state)
    }
    /// SplitMix64's finaliser: a good hash of one word.
    package static func mix(_ value: UInt64) -> UInt64 {
        var z = value
        z = (z ^ (z >> 30)) &* 0xbf58_476d_1ce4_e5b9
        z = (z ^ (z >> 27)) &* 0x94d0_49bb_1331_11eb
        return z ^ (z >> 31)
    }
    /// 0..<bound. The bias of a plain modulo is far below anything a test could notice.
    package func below(_ bound: Int) -> Int {
        precondition(bound > 0)
        return Int(next() % UInt64(bound))
    }
    /// Both ends included.
    package func between(_ low: Int, _ high: Int) -> Int { low + below(high - low + 1) }
    /// True `count` times in a thousand.
    package func permille(_ count: Int) -> Bool { below(1000) < count }
    package func pick<Element>(_ list: [Element]) -> Element { list[below(list.count)] }
    /// Microseconds as nanoseconds: mostly near `low`, seldom up to `high`.
    package func delay(microseconds low: Int, _ high: Int) -> UInt64 {
        let span = permille(900) ? low + (high - low) / 8 : high
        return UInt64(between(low, max(low, span))) * 1000 + UInt64(below(1000))
    }
    /// A source of its own, so that drawing more in one place changes nothing in another.
    package func fork() -> RandomSource { RandomSource(seed: next()) }
}
