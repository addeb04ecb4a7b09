import Testing

@testable import HapteraCLI

/// The judge of a chaos run must see what it is there to see.
@Suite struct ChaosTests {
    @Test func aBlockSaysWhatItIs() {
        let bytes = SelfDescribingBlock.bytes(7, 42)
        #expect(bytes.count == SelfDescribingBlock.size)
        #expect(SelfDescribingBlock.value(7, bytes) == 42)
        #expect(SelfDescribingBlock.value(8, bytes) == nil)
        #expect(SelfDescribingBlock.value(7, [UInt8](repeating: 0, count: 4096)) == 0)
        for position in [0, 8, 100, 4095] {
            var torn = bytes
            torn[position] ^= 1
            #expect(SelfDescribingBlock.value(7, torn) == nil)
        }
    }

    @Test func aLostWriteAndAForeignBlockAreFound() {
        let history = ChaosHistory()
        let first = history.writeInvoked(1)
        history.writeReturned(1, first.operation)
        let read = history.readInvoked(1)
        history.readReturned(1, read, first.value)
        #expect(history.judge().isEmpty)
        let second = history.writeInvoked(1)
        // Not acknowledged: it may be read or not, but not un-happen.
        history.readReturned(1, history.readInvoked(1), second.value)
        #expect(history.judge().isEmpty)
        history.readReturned(1, history.readInvoked(1), first.value)
        #expect(history.judge().count == 1)
        history.readReturned(2, history.readInvoked(2), nil)
        #expect(history.judge().count == 2)
    }

    @Test func faultsThatNeedRootAreNamed() throws {
        #expect(try ChaosFaults(typed: "flip,kill").faults == [.flip, .kill])
        for wrong in ["partition", "full", "nonsense", ""] {
            #expect(throws: (any Error).self) { try ChaosFaults(typed: wrong) }
        }
    }
}
