import Foundation
import Glibc
import HapteraAPI
import HapteraCore
import HapteraHost
import Testing

@testable import HapteraControl

/// How a node makes a replica of the layers of another one, over the stand-ins of `NodeAgentTests`.
@Suite struct ReplicaCloneTests {
    private typealias Bench = NodeAgentBench
    private static let source = "00000000000000aa"
    private static let clone = "00000000000000bb"

    private static let record = VolumeRecord(
        cloning: .init(layer: LayerID(rawValue: 2), name: "s", created: 5),
        of: VolumeRecord(
            volume: VolumeID(high: 1, low: 2), name: "vol", epoch: Epoch(7), nonce: 1,
            size: 1 << 20, inSync: []),
        volume: VolumeID(high: 0xabcd, low: 0xef), name: "new", size: 1 << 20, nonce: 9,
        inSync: [
            .init(replica: ReplicaID(rawValue: 0xbb), incarnation: Incarnation(rawValue: 1))
        ])

    private static func want(
        _ bench: Bench, _ phase: Haptera_V1_DesiredReplica.Phase,
        record: [UInt8] = record.encoded()
    ) {
        bench.want(phase, id: clone)
        let last = bench.desired.replicas.count - 1
        bench.desired.replicas[last].volumeID = "000000000000abcd00000000000000ef"
        bench.desired.replicas[last].volume = "new"
        bench.desired.replicas[last].cloneSource.replicaID = source
        bench.desired.replicas[last].cloneSource.layer = 2
        bench.desired.replicas[last].cloneSource.record = Data(record)
    }

    private static func until(
        _ bench: Bench, _ state: Haptera_V1_ReplicaReport.State, _ words: String = ""
    ) async throws -> Haptera_V1_ReplicaReport {
        func own(_ report: Haptera_V1_NodeReport) -> Haptera_V1_ReplicaReport? {
            report.replicas.first { $0.replicaID == clone }
        }
        let report = try await bench.until("\(state) \(words)") {
            own($0)?.state == state && (words.isEmpty || own($0)?.reason.contains(words) == true)
        }
        return try #require(own(report))
    }

    private static func directory(_ bench: Bench, _ id: String) -> String {
        "\(bench.directory.path)/replicas/\(id)"
    }
    private static func object(_ text: some StringProtocol) throws -> [String: String] {
        try JSONDecoder().decode([String: String].self, from: Data(text.utf8))
    }
    /// What the source was asked to share, each time.
    private static func shares(_ bench: Bench) throws -> [[String: String]] {
        let path = directory(bench, source) + "/shares"
        guard FileManager.default.fileExists(atPath: path) else { return [] }
        return try String(contentsOfFile: path, encoding: .utf8).split(separator: "\n").map(object)
    }
    /// What it was made with.
    private static func made(_ bench: Bench) throws -> [String: String] {
        let path = directory(bench, clone) + "/identity.json"
        return try object(String(contentsOfFile: path, encoding: .utf8))
    }

    private static func sourceRunning() async throws -> (Bench, Haptera_V1_ReplicaReport) {
        let bench = try Bench()
        bench.want(.create)
        return (bench, try await bench.untilReplica(.running))
    }

    @Test func isMadeOfWhatItsSourceShares() async throws {
        let (bench, source) = try await Self.sourceRunning()
        Self.want(bench, .clone)
        let replica = try await Self.until(bench, .running)
        let directory = Self.directory(bench, Self.clone)
        #expect(replica.directory == directory)
        #expect(replica.reason.isEmpty)
        #expect(
            try Self.shares(bench)
                == [["layer": "2", "into": Self.clone, "epoch": "\(7 + 1000)"]])
        let made = try Self.made(bench)
        #expect(made["layers"] == "1,2" && made["size"] == "1048576" && made["log-index"] == "17")
        #expect(made["replica-id"] == Self.clone && made["incarnation"] == "0000000000000001")
        #expect(made["volume-id"] == "000000000000abcd00000000000000ef")
        let digits = Array(try #require(made["record"]).utf8)
        let bytes = stride(from: 0, to: digits.count, by: 2).map {
            UInt8(truncatingIfNeeded: parseHexadecimal(digits[$0..<$0 + 2]) ?? 0)
        }
        #expect(bytes == Self.record.encoded())
        // The source goes on, and may go.
        bench.want(.remove)
        _ = try await bench.untilReplica(.removed)
        #expect(ProcessIdentity(running: source.pid) == nil)
        #expect(ProcessIdentity(running: replica.pid) != nil)
        #expect(FileManager.default.fileExists(atPath: directory + "/layers/2"))
    }

    private static func refuse(_ bench: Bench, with words: String) throws -> String {
        let marker = directory(bench, source) + "/unfrozen"
        #expect(FileManager.default.createFile(atPath: marker, contents: Data(words.utf8)))
        return marker
    }

    /// It says what it waits for, which is no failure, and asks again after a pause.
    @Test func waitsForASourceThatCannotShareYet() async throws {
        let (bench, _) = try await Self.sourceRunning()
        let text = "\(SharingRefusal.notYetText): this replica is not in sync"
        let marker = try Self.refuse(bench, with: text)
        Self.want(bench, .clone)
        let replica = try await Self.until(bench, .unspecified, text)
        #expect(
            replica.reason
                == "waits for replica \(Self.source) to share its layers: \(text)")
        #expect(replica.pid == 0 && replica.directory.isEmpty)
        try FileManager.default.removeItem(atPath: marker)
        let seen = bench.now
        #expect(try await Self.until(bench, .running).reason.isEmpty)
        #expect(bench.now >= seen + ReplicaUnit.shareRetryMilliseconds - 50)
        #expect(bench.now < seen + RestartBackoff.delayMinimum)
        #expect(try Self.shares(bench).count == 2)
    }

    /// What does not pass by itself is a failure, and tried again all the same.
    @Test func aRefusalThatLastsIsAFailure() async throws {
        let (bench, _) = try await Self.sourceRunning()
        let marker = try Self.refuse(bench, with: "cannot link 1.data: No space left on device")
        Self.want(bench, .clone)
        let replica = try await Self.until(bench, .failed)
        #expect(
            replica.reason
                == "replica \(Self.source) does not share its layers: cannot link 1.data: No space "
                + "left on device")
        // The one passes into the other, and back.
        _ = try Self.refuse(bench, with: SharingRefusal.notYetText)
        _ = try await Self.until(bench, .unspecified, "waits for")
        _ = try Self.refuse(bench, with: "no space")
        _ = try await Self.until(bench, .failed, "does not share its layers: no space")
        try FileManager.default.removeItem(atPath: marker)
        _ = try await Self.until(bench, .running)
    }

    @Test func waitsForASourceThatIsDown() async throws {
        let (bench, source) = try await Self.sourceRunning()
        // Nobody starts it again.
        bench.desired.replicas.removeAll { $0.replicaID == Self.source }
        try await bench.step()
        kill(source.pid, SIGKILL)
        try await bench.untilGone(source.pid)
        Self.want(bench, .clone)
        let replica = try await Self.until(bench, .unspecified, "its process does not run")
        #expect(replica.pid == 0)
        bench.want(.run)
        _ = try await Self.until(bench, .running)
    }

    /// One that is removed shares nothing any more.
    @Test func aSourceThatIsGoneIsAFailure() async throws {
        let bench = try Bench()
        Self.want(bench, .clone)
        let replica = try await Self.until(bench, .failed)
        #expect(
            replica.reason == "replica \(Self.source), whose layers it was to share, is gone")
        bench.want(.create)
        _ = try await Self.until(bench, .running)
    }

    /// Between the two steps there are layers, and no replica: both are done again.
    @Test func anAgentThatRestartsInBetweenGoesOn() async throws {
        let (bench, _) = try await Self.sourceRunning()
        let marker = bench.directory.path + "/replicas/refuse"
        _ = FileManager.default.createFile(atPath: marker, contents: nil)
        Self.want(bench, .clone)
        _ = try await Self.until(bench, .failed, "cannot be created (status 1)")
        let directory = Self.directory(bench, Self.clone)
        #expect(FileManager.default.fileExists(atPath: directory + "/layers/2"))
        #expect(!FileManager.default.fileExists(atPath: directory + "/manifest"))
        try await bench.restartAgent()
        try FileManager.default.removeItem(atPath: marker)
        _ = try await Self.until(bench, .running)
        #expect(try Self.shares(bench).count == 2)
        #expect(try Self.made(bench)["layers"] == "1,2")
    }

    /// Once it is there it needs its source no more, though the controller does not know that yet.
    @Test func oneThatIsMadeDoesNotAskItsSource() async throws {
        let (bench, source) = try await Self.sourceRunning()
        Self.want(bench, .clone)
        let before = try await Self.until(bench, .running)
        // While its process runs, and when that has ended too.
        bench.desired.replicas.removeAll { $0.replicaID == Self.source }
        try await bench.restartAgent()
        kill(source.pid, SIGKILL)
        try await bench.untilGone(source.pid)
        #expect(try await Self.until(bench, .running).pid == before.pid)
        kill(before.pid, SIGKILL)
        try await bench.untilGone(before.pid)
        try await bench.restartAgent()
        #expect(try await Self.until(bench, .running).pid != before.pid)
        #expect(try Self.shares(bench).count == 1)
    }

    /// What held data is not made again, though its source is named.
    @Test func aLostDirectoryIsNotMadeAnew() async throws {
        let (bench, _) = try await Self.sourceRunning()
        Self.want(bench, .run)
        _ = try await Self.until(bench, .failed, "is gone")
        #expect(try Self.shares(bench).isEmpty)
        #expect(!FileManager.default.fileExists(atPath: Self.directory(bench, Self.clone)))
    }

    @Test func nothingIsMadeOfAMalformedRecord() async throws {
        let (bench, _) = try await Self.sourceRunning()
        Self.want(bench, .clone, record: [1, 2, 3])
        _ = try await Self.until(bench, .failed, "first record is malformed")
        // Nor is an empty one made where the source is missing.
        bench.want(.clone, id: Self.clone)
        try await bench.restartAgent()
        _ = try await Self.until(bench, .failed, "first record is malformed")
        #expect(!FileManager.default.fileExists(atPath: Self.directory(bench, Self.clone)))
        #expect(try Self.shares(bench).isEmpty)
    }

    /// Given up before it was made: what was shared goes with it.
    @Test func halfOfOneIsRemoved() async throws {
        let (bench, source) = try await Self.sourceRunning()
        let marker = bench.directory.path + "/replicas/refuse"
        _ = FileManager.default.createFile(atPath: marker, contents: nil)
        Self.want(bench, .clone)
        _ = try await Self.until(bench, .failed)
        Self.want(bench, .remove)
        _ = try await Self.until(bench, .removed)
        #expect(!FileManager.default.fileExists(atPath: Self.directory(bench, Self.clone)))
        #expect(ProcessIdentity(running: source.pid) != nil)
    }
}
