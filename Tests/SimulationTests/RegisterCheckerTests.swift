import Testing

@testable import HapteraTesting

/// The judge must be right before it judges: histories with known verdicts.
@Suite struct RegisterCheckerTests {
    private func verdict(_ events: [RegisterEvent]) -> Int? {
        var checker = RegisterChecker()
        let index = checker.check(events)
        #expect(!checker.gaveUp)
        return index
    }
    private func write(_ operation: Int, _ value: ValueID) -> [RegisterEvent] {
        [
            .init(.writeInvoked(value), operation: operation),
            .init(.writeReturned(isDurable: false), operation: operation),
        ]
    }
    private func read(_ operation: Int, _ value: ValueID) -> [RegisterEvent] {
        [
            .init(.readInvoked(value), operation: operation),
            .init(.readReturned, operation: operation),
        ]
    }
    private func flush(_ operation: Int) -> [RegisterEvent] {
        [.init(.flushInvoked, operation: operation), .init(.flushReturned, operation: operation)]
    }
    private let loss = RegisterEvent(.lossAllowed, operation: -1)

    @Test func acceptsSequentialHistory() {
        #expect(verdict(read(1, 0) + write(2, 7) + read(3, 7) + write(4, 8) + read(5, 8)) == nil)
    }

    @Test func rejectsStaleRead() {
        #expect(verdict(write(1, 7) + write(2, 8) + read(3, 7)) == 5)
    }

    @Test func rejectsLostWrite() {
        #expect(verdict(write(1, 7) + read(2, 0)) != nil)
    }

    @Test func concurrentWritesMayTakeEitherOrder() {
        let both: [RegisterEvent] = [
            .init(.writeInvoked(7), operation: 1), .init(.writeInvoked(8), operation: 2),
            .init(.writeReturned(isDurable: false), operation: 2),
            .init(.writeReturned(isDurable: false), operation: 1),
        ]
        #expect(verdict(both + read(3, 7)) == nil)
        #expect(verdict(both + read(3, 8)) == nil)
        #expect(verdict(both + read(3, 7) + read(4, 8)) != nil)
        #expect(verdict(both + read(3, 0)) != nil)
    }

    @Test func readDuringWriteSeesOldThenNewButNotBack() {
        let start = RegisterEvent(.writeInvoked(7), operation: 1)
        let end = RegisterEvent(.writeReturned(isDurable: false), operation: 1)
        #expect(verdict([start] + read(2, 0) + read(3, 7) + [end]) == nil)
        #expect(verdict([start] + read(2, 7) + read(3, 0) + [end]) != nil)
    }

    @Test func unansweredWriteHappensOnceOrNever() {
        let lost = RegisterEvent(.writeInvoked(7), operation: 1)
        #expect(verdict([lost] + read(2, 0) + read(3, 7) + read(4, 7)) == nil)
        #expect(verdict([lost] + write(2, 8) + read(3, 8)) == nil)
        #expect(verdict([lost] + read(2, 7) + write(3, 8) + read(4, 7)) != nil)
        #expect(verdict([lost] + read(2, 7) + read(3, 0)) != nil)
    }

    @Test func lossTakesBackOnlyWhatNoFlushCovered() {
        #expect(verdict(write(1, 7) + [loss] + read(2, 0)) == nil)
        #expect(verdict(write(1, 7) + [loss] + read(2, 7)) == nil)
        #expect(verdict(write(1, 7) + flush(2) + [loss] + read(3, 0)) != nil)
        #expect(verdict(write(1, 7) + flush(2) + write(3, 8) + [loss] + read(4, 7)) == nil)
        #expect(
            verdict(write(1, 7) + flush(2) + write(3, 8) + flush(4) + [loss] + read(5, 7)) != nil)
        // Once seen after the loss, it is settled.
        #expect(verdict(write(1, 7) + [loss] + read(2, 0) + read(3, 7)) != nil)
    }

    @Test func forcedWriteSurvivesLoss() {
        let forced: [RegisterEvent] = [
            .init(.writeInvoked(7), operation: 1),
            .init(.writeReturned(isDurable: true), operation: 1),
        ]
        #expect(verdict(forced + [loss] + read(2, 7)) == nil)
        #expect(verdict(forced + [loss] + read(2, 0)) != nil)
    }

    @Test func trimmedAndFlushedStaysZero() {
        #expect(verdict(write(1, 7) + write(2, 0) + flush(3) + [loss] + read(4, 7)) != nil)
        #expect(verdict(write(1, 7) + write(2, 0) + flush(3) + [loss] + read(4, 0)) == nil)
    }

    /// A clone begins with what its source wrote; going on from an old copy may bring that back.
    @Test func aSalvageMayBringBackWhatAClonesFirstCopyHeld() {
        let begun = [RegisterEvent(.reverted(3), operation: -1)]
        let salvaged = [RegisterEvent(.salvaged, operation: -1)]
        #expect(verdict(begun + read(1, 3)) == nil)
        #expect(verdict(begun + read(1, 0)) != nil)
        #expect(verdict(begun + write(1, 7) + flush(2) + read(3, 3)) != nil)
        #expect(verdict(begun + write(1, 7) + flush(2) + salvaged + read(3, 3)) == nil)
        #expect(verdict(begun + write(1, 7) + flush(2) + salvaged + read(3, 4)) != nil)
    }
}
