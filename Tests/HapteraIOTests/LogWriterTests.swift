import Synchronization
import Testing

@testable import HapteraIO

@Suite struct LogWriterTests {
    private final class Disk: Sendable {
        let gate = SilentServer()
        let written = Mutex("")
        var text: String { written.withLock { $0 } }
        func write(_ bytes: [UInt8]) {
            gate.wait()
            written.withLock { $0 += String(decoding: bytes, as: UTF8.self) }
        }
    }

    /// The regression: an engine could hang with the disk its log is on, as it said that it had
    /// lost the replica there.
    @Test func aDiskThatHangsHoldsNobodyUp() {
        let disk = Disk()
        let writer = LogWriter { disk.write($0) }
        for index in 0..<10 { writer.append(Array("line \(index)\n".utf8)) }
        #expect(disk.text == "")
        #expect(!writer.flush(milliseconds: 1))
        // Once for what was taken at first, once for what came meanwhile.
        disk.gate.release()
        disk.gate.release()
        #expect(writer.flush(milliseconds: 20_000))
        #expect(disk.text == (0..<10).map { "line \($0)\n" }.joined())
    }

    @Test func whatThereIsNoRoomForIsCounted() {
        let disk = Disk()
        let writer = LogWriter { disk.write($0) }
        let line = [UInt8](repeating: 0x61, count: 1023) + [0x0a]
        let room = LogWriter.bytesMax / line.count
        for _ in 0..<2 * room + 3 { writer.append(line) }
        for _ in 0..<3 { disk.gate.release() }
        #expect(writer.flush(milliseconds: 20_000))
        let lines = disk.text.split(separator: "\n")
        // What the thread had taken before it was held up left its room to others.
        let whole = lines.count { $0.count == 1023 }
        #expect(whole >= room && whole <= 2 * room)
        // (The thread may have come when some were missing already: then there are two counts.)
        let counts = lines.compactMap { $0.split(separator: " lines=").dropFirst().first }
        let missing = counts.compactMap { Int($0) }.reduce(0, +)
        #expect(missing == 2 * room + 3 - whole && !counts.isEmpty)
    }
}
