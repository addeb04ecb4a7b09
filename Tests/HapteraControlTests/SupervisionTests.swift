import HapteraAPI
import Testing

@testable import HapteraControl

@Suite struct RestartBackoffTests {
    @Test func doublesUpToHalfAMinute() {
        var backoff = RestartBackoff()
        var now: Int64 = 0
        #expect(backoff.mayStart(now: now))
        for delay: Int64 in [2, 4, 8, 16, 30, 30] {
            backoff.started(now: now)
            now += 10
            backoff.ended(now: now)
            #expect(!backoff.mayStart(now: now + delay * 1000 - 1))
            now += delay * 1000
            #expect(backoff.mayStart(now: now))
        }
        #expect(backoff.restarts == 5)
    }

    @Test func anEagerOneStartsAtOnceIfItRanForAWhile() {
        var backoff = RestartBackoff(isEager: true)
        var now: Int64 = 0
        for delay: Int64 in [0, 500, 1000, 2000] {
            backoff.started(now: now)
            now += 10
            backoff.ended(now: now)
            #expect(delay == 0 || !backoff.mayStart(now: now + delay - 1))
            now += delay
            #expect(backoff.mayStart(now: now))
        }
        backoff.started(now: now)
        now += RestartBackoff.eagerStableAfter
        backoff.ended(now: now)
        #expect(backoff.mayStart(now: now))
    }

    @Test func startsOverAfterAStableMinute() {
        var backoff = RestartBackoff()
        for _ in 0..<4 {
            backoff.started(now: 0)
            backoff.ended(now: 1)
        }
        backoff.started(now: 100_000)
        backoff.ended(now: 100_000 + RestartBackoff.stableAfter)
        let end = 100_000 + RestartBackoff.stableAfter
        #expect(!backoff.mayStart(now: end + 1999))
        #expect(backoff.mayStart(now: end + 2000))
    }
}

@Suite struct EngineReportTests {
    @Test func rebuildsAreReported() {
        let status = [
            "rebuild.replica": "00000000000000a1", "rebuild.kind": "resync",
            "rebuild.phase": "copying", "rebuild.regionsDone": "3", "rebuild.regionsTotal": "9",
            "rebuild.bytesCopied": "4096", "rebuild.bytesPerSecond": "2048",
            "rebuild.elapsedMilliseconds": "2000", "resolve.regionsDone": "64",
            "resolve.regionsTotal": "64",
        ]
        let reports = EngineUnit.rebuilds(status)
        #expect(reports.map(\.kind) == ["resync"])
        #expect(reports[0].regionsTotal == 9)
        #expect(reports[0].bytesPerSecond == 2048)
        #expect(reports[0].elapsedMilliseconds == 2000)
        #expect(
            EngineUnit.rebuilds(["resolve.regionsDone": "1", "resolve.regionsTotal": "2"])
                .map(\.kind) == ["resolve"])
        #expect(EngineUnit.rebuilds([:]).isEmpty)
    }
}
