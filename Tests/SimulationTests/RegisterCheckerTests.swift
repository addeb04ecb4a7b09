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
        // What it was, if nobody has looked, a loss may show.
        let overwritten = begun + write(1, 7) + flush(2) + salvaged + write(3, 8)
        #expect(verdict(overwritten + [loss] + read(4, 3)) == nil)
        #expect(verdict(overwritten + flush(5) + [loss] + read(4, 3)) != nil)
    }

    /// Many writes and trims nobody was told of, between others that were seen: seeds 78, 246 and
    /// 265 were not judged to their ends for those.
    @Test func manyUnansweredWritesAreJudgedToTheEnd() {
        var events: [RegisterEvent] = []
        for operation in 1...20 {
            events.append(.init(.writeInvoked(0), operation: operation))
            events.append(.init(.writeInvoked(ValueID(100 + operation)), operation: 20 + operation))
        }
        for operation in 41...56 {
            events.append(.init(.writeInvoked(ValueID(operation)), operation: operation))
        }
        events.append(.init(.writeInvoked(7), operation: 57))
        events += read(58, 7) + read(59, 0) + read(60, 104)
        for operation in 41...57 {
            events.append(.init(.writeReturned(isDurable: false), operation: operation))
        }
        #expect(verdict(events + read(61, 56) + read(62, 0)) == nil)
        // Once it was overwritten, nobody writes it again.
        #expect(verdict(events + read(61, 104)) == nil)
        #expect(verdict(events + read(61, 56) + read(62, 104)) != nil)
        #expect(verdict(events + write(63, 8) + read(64, 7)) != nil)
    }

    /// Every history of a real register is accepted; the same with one answer exchanged is judged
    /// as by trying every order.
    @Test func agreesWithTryingEveryOrder() {
        var wrong = 0
        for seed in 0..<3000 as Range<UInt64> {
            let events = randomHistory(RandomSource(seed: RandomSource.mix(seed)))
            let isExplained = explained(events)
            if !isExplained { wrong += 1 }
            #expect((verdict(events) == nil) == isExplained, "seed \(seed): \(events)")
        }
        #expect(300...2700 ~= wrong)
    }

    /// Up to eight operations; each read tells something, perhaps nonsense.
    private func randomHistory(_ random: RandomSource) -> [RegisterEvent] {
        var events: [RegisterEvent] = []
        var open: [(operation: Int, isRead: Bool)] = []
        var written: [ValueID] = [0]
        for operation in 0..<8 {
            while !open.isEmpty, random.permille(400) {
                let (ended, isRead) = open.remove(at: random.below(open.count))
                events.append(
                    .init(
                        isRead ? .readReturned : .writeReturned(isDurable: false), operation: ended)
                )
            }
            let isRead = random.permille(500)
            if isRead {
                events.append(.init(.readInvoked(random.pick(written)), operation: operation))
            } else {
                let value = random.permille(300) ? 0 : ValueID(operation + 1)
                written.append(value)
                events.append(.init(.writeInvoked(value), operation: operation))
            }
            open.append((operation, isRead))
        }
        for (ended, isRead) in open where random.permille(600) {
            events.append(
                .init(isRead ? .readReturned : .writeReturned(isDurable: false), operation: ended))
        }
        return events
    }

    /// Whether some order of the operations explains every answer: by trying all.
    private func explained(_ events: [RegisterEvent]) -> Bool {
        struct Item { var value: ValueID, isRead: Bool, invoked: Int, returned: Int? }
        var items: [Int: Item] = [:]
        for (index, event) in events.enumerated() {
            switch event.kind {
            case .writeInvoked(let value):
                items[event.operation] = Item(
                    value: value, isRead: false, invoked: index, returned: nil)
            case .readInvoked(let value):
                items[event.operation] = Item(
                    value: value, isRead: true, invoked: index, returned: nil)
            default: items[event.operation]?.returned = index
            }
        }
        let all = items.values.filter { !$0.isRead || $0.returned != nil }
        func order(_ left: [Item], _ value: ValueID) -> Bool {
            guard let deadline = left.compactMap(\.returned).min() else { return true }
            // Next is one that was asked for before any other that is left was answered.
            for (index, item) in left.enumerated() where item.invoked < deadline {
                if item.isRead, item.value != value { continue }
                var rest = left
                rest.remove(at: index)
                if order(rest, item.isRead ? value : item.value) { return true }
            }
            return false
        }
        return order(all, 0)
    }
}
