import Foundation
import HapteraAPI
import HapteraHost
import Logging
import Testing

@testable import HapteraControl

/// What an interrupted removal leaves is deleted, and nothing else.
@Suite struct RemovedReplicasTests {
    private let directory: TemporaryDirectory
    private var replicas: String { directory.path + "/replicas" }

    init() throws {
        directory = try TemporaryDirectory()
    }

    private func make(_ name: String) throws {
        try FileManager.default.createDirectory(
            atPath: "\(replicas)/\(name)/layers", withIntermediateDirectories: true)
        #expect(
            FileManager.default.createFile(
                atPath: "\(replicas)/\(name)/layers/1.data", contents: Data("data".utf8)))
    }
    private var names: [String] {
        get throws { try FileManager.default.contentsOfDirectory(atPath: replicas).sorted() }
    }
    private func agent() throws -> NodeAgent {
        let context = NodeContext(
            host: RealProcessHost(), directory: directory.path, address: "127.0.0.1",
            ports: Ports.defaultRange, replicaProgram: "/none", engineProgram: "/none")
        return try NodeAgent(
            context, logger: Logger(label: "test") { _ in SwiftLogNoOpLogHandler() })
    }

    @Test func onlyWhatWasRenamedGoes() async throws {
        let stays = [
            "00000000000000aa", "00000000000000AB.removed", "0000000000000000.removed",
            "aa.removed", "notes.removed", "00000000000000ac.removed.old", ".removed",
        ]
        for name in stays { try make(name) }
        try make("00000000000000ad.removed")
        try make("fedcba9876543210.removed")
        // Not directories, however they are called.
        let file = "00000000000000ae.removed"
        #expect(FileManager.default.createFile(atPath: "\(replicas)/\(file)", contents: nil))
        let link = "00000000000000af.removed"
        try FileManager.default.createSymbolicLink(
            atPath: "\(replicas)/\(link)", withDestinationPath: "\(replicas)/00000000000000aa")
        try await agent().sweepRemoved()
        #expect(try names == (stays + [file, link]).sorted())
        #expect(
            FileManager.default.fileExists(atPath: "\(replicas)/00000000000000aa/layers/1.data"))
        // Again, with nothing left.
        try await agent().sweepRemoved()
        #expect(try names.count == stays.count + 2)
    }

    /// Files that another replica has as well stay that one's.
    @Test func aLayerThatIsSharedStaysTheOthers() async throws {
        try make("00000000000000aa")
        try make("00000000000000ab.removed")
        let path = "\(replicas)/00000000000000aa/layers/2.data"
        try FileManager.default.linkItem(
            atPath: "\(replicas)/00000000000000aa/layers/1.data",
            toPath: "\(replicas)/00000000000000ab.removed/layers/2.data")
        try FileManager.default.moveItem(
            atPath: "\(replicas)/00000000000000aa/layers/1.data", toPath: path)
        func linkCount() throws -> Int? {
            try FileManager.default.attributesOfItem(atPath: path)[.referenceCount] as? Int
        }
        #expect(try linkCount() == 2)
        try await agent().sweepRemoved()
        #expect(try names == ["00000000000000aa"])
        #expect(try linkCount() == 1)
        #expect(FileManager.default.contents(atPath: path) == Data("data".utf8))
    }

    /// Its unit goes on with the removal, and tells.
    @Test func whatAUnitRemovesIsLeftToIt() async throws {
        let bench = try NodeAgentBench()
        bench.want(.create)
        _ = try await bench.untilReplica(.running)
        bench.want(.remove)
        try await bench.agent.want(bench.desired)
        let path = bench.directory.path + "/replicas/00000000000000aa"
        let unknown = bench.directory.path + "/replicas/00000000000000bb.removed"
        for doomed in [path + ".removed", unknown] {
            try FileManager.default.createDirectory(
                atPath: doomed + "/layers", withIntermediateDirectories: true)
        }
        await bench.agent.sweepRemoved()
        #expect(FileManager.default.fileExists(atPath: path + ".removed"))
        #expect(!FileManager.default.fileExists(atPath: unknown))
        _ = try await bench.untilReplica(.removed)
        #expect(!FileManager.default.fileExists(atPath: path + ".removed"))
        #expect(!FileManager.default.fileExists(atPath: path))
    }
}
