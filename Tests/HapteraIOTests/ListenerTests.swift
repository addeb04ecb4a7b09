import Foundation
import Glibc
import HapteraCore
import Synchronization
import Testing

@testable import HapteraIO

@Suite struct ListenerTests {
    /// One closes while the next one waits for the address: the file that it has made must not go
    /// with the other's. (169 to 771 of the 2,000 did.)
    @Test func closingTakesNobodyElsesFile() throws {
        let directory = TemporaryDirectory()
        let path = directory.file("socket")
        let rounds = 2000
        let lost = Atomic(0)
        let (begun, ended) = (DispatchSemaphore(value: 0), DispatchSemaphore(value: 0))
        Thread.detachNewThread {
            try? withReactor(.aio) { reactor in
                for _ in 0..<rounds {
                    begun.wait()
                    var after: Listener?
                    while after == nil {
                        after = try? Listener(reactor: reactor, address: .unix(path: path)) {
                            close($0)
                        }
                    }
                    usleep(50)
                    if unsafe access(path, F_OK) != 0 { lost.add(1, ordering: .relaxed) }
                    after?.close()
                    ended.signal()
                }
            }
        }
        try withReactor(.aio) { reactor in
            for _ in 0..<rounds {
                let before = try Listener(reactor: reactor, address: .unix(path: path)) {
                    close($0)
                }
                begun.signal()
                usleep(100)
                before.close()
                ended.wait()
            }
            #expect(lost.load(ordering: .relaxed) == 0)
        }
    }
}
