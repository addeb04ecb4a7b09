import Testing

@testable import HapteraCore

@Suite struct EngineThrottleTests {
    /// A window of half a second with 200 operations of this latency.
    private func window(
        _ throttle: inout CopyThrottle, _ now: inout Instant, microseconds: UInt64, copying: Bool
    ) {
        for _ in 0..<200 {
            throttle.completed(isRead: false, nanoseconds: microseconds * 1000)
        }
        now = now.adding(milliseconds: 500)
        throttle.advance(now, isCopying: copying)
    }

    @Test func slowClientsCutTheRateToTheFloorAndNoFurther() {
        var throttle = CopyThrottle()
        var now = Instant(rawValue: 1_000_000_000)
        for _ in 0..<8 { window(&throttle, &now, microseconds: 2000, copying: false) }
        // 1.5 times as slow is what was promised: the rate rises.
        window(&throttle, &now, microseconds: 2000, copying: true)
        let first = throttle.rate
        window(&throttle, &now, microseconds: 2100, copying: true)
        #expect(throttle.rate > first)
        for _ in 0..<40 { window(&throttle, &now, microseconds: 9000, copying: true) }
        #expect(throttle.rate == CopyThrottle.floor)
        // The floor in regions: 32 a second, one at a time.
        var begun = 0
        for _ in 0..<100 {
            now = now.adding(milliseconds: 10)
            guard throttle.mayBegin(now, running: 0) else { continue }
            throttle.began(bytes: Geometry.regionSize)
            begun += 1
        }
        #expect((31...33).contains(begun))
        let mayBeginLater = throttle.mayBegin(now.adding(milliseconds: 500), running: 1)
        #expect(!mayBeginLater)
    }

    @Test func withoutClientsThereIsNoLimit() {
        var throttle = CopyThrottle()
        var now = Instant(rawValue: 1_000_000_000)
        throttle.advance(now, isCopying: true)
        for _ in 0..<20 {
            let mayBegin = throttle.mayBegin(now, running: 3)
            #expect(mayBegin)
            throttle.began(bytes: Geometry.regionSize)
        }
        for _ in 0..<40 { window(&throttle, &now, microseconds: 9000, copying: true) }
        #expect(throttle.rate == CopyThrottle.floor)
        now = now.adding(milliseconds: 2000)
        throttle.advance(now, isCopying: true)
        #expect(throttle.rate == CopyThrottle.ceiling)
    }
}
