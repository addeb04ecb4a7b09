import HapteraCore
import HapteraIO
import Testing

@testable import HapteraReplica

@Suite struct ReplicaFaultsTests {
    @Test func whatIsAskedForIsChecked() throws {
        let fine: [[String: String]] = [
            ["link": "in", "milliseconds": "1"], ["link": "both", "milliseconds": "60000"],
            ["files": "write:data:ENOSPC", "milliseconds": "500"],
        ]
        for arguments in fine { _ = try ReplicaFaults.parse(arguments) }
        let wrong: [[String: String]] = [
            [:], ["link": "in"], ["milliseconds": "5"], ["link": "up", "milliseconds": "5"],
            ["link": "in", "milliseconds": "0"], ["link": "in", "milliseconds": "60001"],
            ["link": "in", "milliseconds": "-1"], ["files": "nonsense", "milliseconds": "5"],
            ["link": "in", "files": "write:data:EIO", "milliseconds": "5"],
        ]
        for arguments in wrong {
            #expect(throws: IOError.self) { try ReplicaFaults.parse(arguments) }
        }
    }

    /// Each by itself, once.
    @Test func everyFaultEnds() {
        var faults = ReplicaFaults()
        faults.cut(isDeaf: true, isMute: false, until: Instant(rawValue: 20))
        faults.harmFiles(until: Instant(rawValue: 10))
        #expect(faults.isDeaf && !faults.isMute && faults.isCut)
        #expect(faults.ended(now: Instant(rawValue: 9)) == (false, false))
        #expect(faults.ended(now: Instant(rawValue: 10)) == (false, true))
        #expect(faults.isCut)
        #expect(faults.ended(now: Instant(rawValue: 25)) == (true, false))
        #expect(!faults.isCut)
        #expect(faults.ended(now: Instant(rawValue: 26)) == (false, false))
    }
}
