import Foundation
import Glibc
import HapteraAPI
import HapteraCore
import HapteraHost
import Logging
import Testing

@testable import HapteraControl

/// The agent against stand-ins for the data-plane programs: real processes, sockets and files.
@Suite struct NodeAgentTests {
    private typealias Bench = NodeAgentBench

    @Test func makesAndRunsAReplica() async throws {
        let bench = try Bench()
        bench.want(.create)
        let replica = try await bench.untilReplica(.running)
        #expect(ProcessIdentity(running: replica.pid) != nil)
        #expect(replica.directory == bench.directory.path + "/replicas/00000000000000aa")
        #expect(replica.allocatedBytes == 4096)
        #expect(replica.sharedBytes == 1024 && replica.reclaimableBytes == 512)
        #expect(replica.exclusiveBytes == [1: 8192] && !replica.hasStuckBytes)
        #expect(Names.hostAndPort(replica.address) != nil)
        // In a session of its own: nothing that hits ours hits it.
        #expect(getsid(replica.pid) == replica.pid)
        bench.want(.remove)
        _ = try await bench.untilReplica(.removed)
        #expect(ProcessIdentity(running: replica.pid) == nil)
        #expect(!FileManager.default.fileExists(atPath: replica.directory))
    }

    @Test func adoptsWhatItsPredecessorLeft() async throws {
        let bench = try Bench()
        bench.want(.create)
        let before = try await bench.untilReplica(.running)
        bench.want(.attach, addresses: [before.address], attachment: 1)
        let engine = try await bench.untilEngine(.serving)
        bench.want(.run)
        try await bench.step()
        try await bench.restartAgent()
        let after = try await bench.until("adopted") {
            $0.replicas.first?.state == .running && $0.engines.first?.state == .serving
        }
        #expect(after.replicas[0].pid == before.pid)
        #expect(after.replicas[0].address == before.address)
        #expect(after.engines[0].pid == engine.pid)
        #expect(after.engines[0].uri == engine.uri)
    }

    /// A crash between starting a process and writing its file down: its control socket answers.
    @Test func adoptsAProcessWithoutAFile() async throws {
        let bench = try Bench()
        bench.want(.create)
        let before = try await bench.untilReplica(.running)
        let file = bench.directory.path + "/run/r-00000000000000aa.pid"
        let process = try #require(ProcessFile.load(file))
        try FileManager.default.removeItem(atPath: file)
        try await bench.restartAgent()
        let after = try await bench.untilReplica(.running)
        #expect(after.pid == before.pid)
        process.identity.signal(SIGKILL)
    }

    /// A number that another process has now is not ours to adopt or signal.
    @Test func doesNotAdoptAStranger() async throws {
        let bench = try Bench()
        let stranger = try #require(
            ProcessIdentity(running: ProcessInfo.processInfo.processIdentifier))
        bench.want(.create)
        try ProcessFile(
            identity: .init(
                pid: stranger.pid, startTime: stranger.startTime + 1, bootID: stranger.bootID),
            executable: "x", arguments: [], control: "x"
        ).save(bench.directory.path + "/run/r-00000000000000aa.pid")
        let replica = try await bench.untilReplica(.running)
        #expect(replica.pid != stranger.pid)
    }

    @Test func aKilledReplicaComesBackAfterAPause() async throws {
        let bench = try Bench()
        bench.want(.create)
        let first = try await bench.untilReplica(.running)
        kill(first.pid, SIGKILL)
        let waiting = try await bench.untilReplica(.waiting)
        #expect(waiting.reason == "process \(first.pid) was ended by signal 9")
        let seen = bench.now
        // Not within 2 s of the agent's clock, whatever the wall clock says.
        while bench.now < seen + RestartBackoff.delayMinimum - 50 {
            try await bench.step()
            #expect(await bench.report.replicas[0].pid == 0)
        }
        let second = try await bench.untilReplica(.running)
        #expect(bench.now >= seen + RestartBackoff.delayMinimum - 50)
        #expect(second.pid != first.pid)
        #expect(second.address == first.address)
        #expect(second.restarts == 1)
    }

    @Test func aKilledEngineComesBackAsTheSameAttachment() async throws {
        let bench = try Bench()
        bench.want(.create)
        let replica = try await bench.untilReplica(.running)
        bench.want(.attach, addresses: [replica.address], attachment: 7)
        let first = try await bench.untilEngine(.serving)
        #expect(try bench.engineArgument("--ended-instance") == nil)
        kill(first.pid, SIGKILL)
        try await bench.untilGone(first.pid)
        // At once: the round that finds it ended starts the next.
        try await bench.step()
        #expect(await bench.report.engines[0].pid != 0)
        #expect(await bench.report.engines[0].lastEnding.contains("ended by signal 9"))
        let second = try await bench.untilEngine(.serving)
        #expect(second.pid != first.pid)
        #expect(second.uri == first.uri)
        #expect(second.restarts == 1)
        #expect(try bench.engineArgument("--client-generation") == "7")
        // It need not wait for the leases of the one that is known to be gone.
        #expect(try bench.engineArgument("--ended-instance") == "\(first.instance)")
    }

    /// The agent may have been away when the engine ended: its number is kept on disk.
    @Test func anEngineThatEndedUnseenIsNamedToTheNext() async throws {
        let bench = try Bench()
        bench.want(.create)
        let replica = try await bench.untilReplica(.running)
        bench.want(.attach, addresses: [replica.address], attachment: 1)
        let first = try await bench.untilEngine(.serving)
        kill(first.pid, SIGKILL)
        try await bench.untilGone(first.pid)
        try await bench.restartAgent()
        _ = try await bench.untilEngine(.serving)
        #expect(try bench.engineArgument("--ended-instance") == "\(first.instance)")
        #expect(try bench.engineArgument("--client-generation") == "1")
    }

    /// After a reboot the client is another one, perhaps: the controller says so first.
    @Test func afterARebootTheEngineWaitsForTheController() async throws {
        let bench = try Bench()
        bench.want(.create)
        let replica = try await bench.untilReplica(.running)
        bench.want(.attach, addresses: [replica.address], attachment: 1)
        let first = try await bench.untilEngine(.serving)
        kill(first.pid, SIGKILL)
        try await bench.untilGone(first.pid)
        let path = bench.directory.path + "/run/e-0000000000000001.pid"
        var file = try #require(ProcessFile.load(path))
        file.identity.bootID = "another"
        try file.save(path)
        try await bench.restartAgent()
        for _ in 0..<3 {
            for task in await bench.agent.step(now: bench.now) { await task.value }
            #expect(await bench.report.engines.first?.pid == 0)
        }
        bench.want(.attach, addresses: [replica.address], attachment: 2)
        let second = try await bench.untilEngine(.serving)
        #expect(second.clientGeneration == 2)
        #expect(try bench.engineArgument("--client-generation") == "2")
        // The volume was not detached: its address stays.
        #expect(second.uri == first.uri)
    }

    @Test func anEngineGetsTheVolumesSettings() async throws {
        let bench = try Bench()
        bench.want(.create)
        let replica = try await bench.untilReplica(.running)
        bench.want(.attach, addresses: [replica.address], attachment: 1) {
            $0.minInSync = 2
            $0.leaseMilliseconds = 1000
            $0.renewMilliseconds = 300
            $0.removalDeadlineMilliseconds = 5000
        }
        _ = try await bench.untilEngine(.serving)
        #expect(try bench.engineArgument("--min-in-sync") == "2")
        #expect(try bench.engineArgument("--lease") == "1000")
        #expect(try bench.engineArgument("--renew") == "300")
        #expect(try bench.engineArgument("--removal-deadline") == "5000")
        #expect(try bench.engineArgument("--io-timeout") == nil)
        #expect(try bench.engineArgument("--detect-zeroes") == nil)
        #expect(try await bench.engineStatus["limits"] == "none")
        // What can change while it runs is told, and no shorter than the lease it has.
        bench.want(.attach, addresses: [replica.address], attachment: 1) {
            $0.minInSync = 1
            $0.leaseMilliseconds = 200
            $0.renewMilliseconds = 60
            $0.ioTimeoutMilliseconds = 30_000
            $0.removalDeadlineMilliseconds = 700
        }
        try await bench.step()
        #expect(try await bench.engineStatus["limits"] == "30000/1000/off")
        bench.want(.attach, addresses: [replica.address], attachment: 1) {
            $0.removalDeadlineMilliseconds = 5000
            $0.detectZeroes = true
        }
        try await bench.step()
        #expect(try await bench.engineStatus["limits"] == "0/5000/on")
    }

    /// An acceptance is for the engine process that asked.
    @Test func anAcceptedLossReachesTheEngineThatAsked() async throws {
        let bench = try Bench()
        bench.want(.create)
        let replica = try await bench.untilReplica(.running)
        let question = bench.directory.path + "/run/e-0000000000000001.sock.decide"
        _ = FileManager.default.createFile(atPath: question, contents: nil)
        bench.want(.attach, addresses: [replica.address], attachment: 1)
        let asking = try await bench.untilEngine(.stalled)
        #expect(asking.needsDecision)
        #expect(asking.instance != 0)
        bench.want(.attach, addresses: [replica.address], attachment: 1) {
            $0.acceptLossInstance = asking.instance &+ 1
        }
        for _ in 0..<3 { try await bench.step() }
        #expect(await bench.report.engines[0].needsDecision)
        bench.want(.attach, addresses: [replica.address], attachment: 1) {
            $0.acceptLossInstance = asking.instance
        }
        let resumed = try await bench.untilEngine(.serving)
        #expect(!resumed.needsDecision)
    }

    @Test func anEngineIsToldOfNewAddresses() async throws {
        let bench = try Bench()
        bench.want(.create)
        let replica = try await bench.untilReplica(.running)
        let nowhere = "127.0.0.1:1"
        bench.want(.attach, addresses: [nowhere], attachment: 1)
        _ = try await bench.untilEngine(.stalled)
        bench.want(.attach, addresses: [replica.address], attachment: 1)
        let engine = try await bench.untilEngine(.serving)
        #expect(engine.replicas.map(\.state) == ["inSync"])
    }

    /// A store that was lost does not know where replicas are: that is no reason to drop them.
    @Test func anEngineKeepsAReplicaWhoseAddressIsUnknown() async throws {
        let bench = try Bench()
        bench.want(.create)
        let replica = try await bench.untilReplica(.running)
        bench.want(.attach, addresses: [replica.address, replica.address], attachment: 1)
        _ = try await bench.untilEngine(.serving)
        func inSync(_ report: Haptera_V1_NodeReport) -> Int {
            report.engines[0].replicas.count { $0.state == "inSync" }
        }
        for isAgentNew in [false, true] {
            if isAgentNew { try await bench.restartAgent() }
            bench.want(.attach, addresses: [replica.address, ""], attachment: 1)
            for _ in 0..<5 { try await bench.step() }
            #expect(inSync(await bench.report) == 2)
        }
        // One it never had is told when its address is known.
        bench.want(.attach, addresses: [replica.address, replica.address, ""], attachment: 1)
        for _ in 0..<5 { try await bench.step() }
        #expect(inSync(await bench.report) == 2)
        bench.want(.attach, addresses: [replica.address], attachment: 1)
        _ = try await bench.until("one has left") { inSync($0) == 1 }
    }

    /// Only replicas of scratch volumes take faults.
    @Test func onlyScratchReplicasAreStartedForFaults() async throws {
        for isScratch in [false, true] {
            let bench = try Bench()
            bench.want(.create)
            bench.desired.replicas[0].scratch = isScratch
            _ = try await bench.untilReplica(.running)
            let file = try #require(Bench.files(bench.directory.path).first)
            #expect(file.arguments.contains("--allow-faults") == isScratch)
        }
    }

    @Test func detachesInOrderAndStaysDetached() async throws {
        let bench = try Bench()
        bench.want(.create)
        let replica = try await bench.untilReplica(.running)
        bench.want(.attach, addresses: [replica.address], attachment: 1)
        let engine = try await bench.untilEngine(.serving)
        bench.want(.detach, addresses: [replica.address], attachment: 1)
        _ = try await bench.untilEngine(.detached)
        #expect(ProcessIdentity(running: engine.pid) == nil)
        // An agent that starts with an old wish does not bring it back.
        bench.want(.attach, addresses: [replica.address], attachment: 1)
        try await bench.restartAgent()
        _ = try await bench.untilEngine(.detached)
        // A new attachment does.
        bench.want(.attach, addresses: [replica.address], attachment: 2)
        let second = try await bench.untilEngine(.serving)
        #expect(second.clientGeneration == 2)
    }

    /// An empty directory under an old identity would pass for a member of the volume.
    @Test func aLostDirectoryIsNotMadeAnew() async throws {
        let bench = try Bench()
        bench.want(.run)
        let replica = try await bench.untilReplica(.failed)
        #expect(
            replica.reason.hasSuffix(
                "is gone: is its disk mounted? If it is lost, have the replica made anew with: "
                    + "storagectl replica replace vol 00000000000000aa"))
        #expect(replica.pid == 0)
        #expect(
            !FileManager.default.fileExists(
                atPath: bench.directory.path + "/replicas/00000000000000aa"))
    }

    @Test func aRefusedCreationSaysWhy() async throws {
        let bench = try Bench()
        _ = FileManager.default.createFile(
            atPath: bench.directory.path + "/replicas/refuse", contents: nil)
        bench.want(.create)
        let replica = try await bench.untilReplica(.failed)
        #expect(replica.reason.contains("does not support O_DIRECT"))
    }

    @Test func looksIntoDirectoriesItWasNeverToldOf() async throws {
        let bench = try Bench()
        bench.want(.create)
        let replica = try await bench.untilReplica(.running)
        bench.want(.attach, addresses: [replica.address], attachment: 7)
        let engine = try await bench.untilEngine(.serving)
        // A new controller on an empty store knows neither.
        bench.desired = Haptera_V1_DesiredState()
        try await bench.step()
        var task = Haptera_V1_AgentTask()
        task.inspect.replicaIds = []
        let found = await bench.agent.perform(task)
        #expect(found.replicas.map(\.replicaID) == ["00000000000000aa"])
        #expect(found.engines.map(\.pid) == [engine.pid])
        #expect(found.engines.map(\.clientGeneration) == [7])
        task.inspect.replicaIds = ["00000000000000aa", "00000000000000ab", "../run"]
        let inspected = await bench.agent.perform(task).replicas
        let inspection = try DirectoryInspection.decode(inspected[0].json)
        #expect(inspection.volume == "00000000000000010000000000000002")
        #expect(inspection.promise == 7)
        #expect(inspection.member?.replica.text == "00000000000000aa")
        #expect(inspected[1].error.hasSuffix("is gone: is its disk mounted?"))
        #expect(inspected[2].error.hasSuffix("is no replica's id"))
        #expect(ProcessIdentity(running: replica.pid) != nil)
    }

    @Test func endsAnEngineAndStartsItAgain() async throws {
        let bench = try Bench()
        bench.want(.create)
        let replica = try await bench.untilReplica(.running)
        bench.want(.attach, addresses: [replica.address], attachment: 1)
        let engine = try await bench.untilEngine(.serving)
        var task = Haptera_V1_AgentTask()
        task.endEngine.volumeID = "00000000000000010000000000000002"
        #expect(await bench.agent.perform(task).error.isEmpty)
        #expect(ProcessIdentity(running: engine.pid) == nil)
        let again = try await bench.until("another engine") {
            $0.engines.first?.state == .serving && $0.engines[0].pid != engine.pid
        }
        #expect(again.engines[0].uri == engine.uri)
        // Without a process there is nothing to do, and nothing to fail.
        task.endEngine.volumeID = "00000000000000010000000000000009"
        #expect(await bench.agent.perform(task).error.isEmpty)
    }

    @Test func aPausedProcessGoesOn() async throws {
        let bench = try Bench()
        bench.want(.create)
        let replica = try await bench.untilReplica(.running)
        func state() throws -> String {
            let stat = try String(contentsOfFile: "/proc/\(replica.pid)/stat", encoding: .utf8)
            return String(stat.split(separator: ")").last?.split(separator: " ").first ?? "")
        }
        var task = Haptera_V1_AgentTask()
        task.fault.kind = .pause
        task.fault.replicaID = replica.replicaID
        task.fault.milliseconds = 3000
        #expect(await bench.agent.perform(task).error.isEmpty)
        for isPaused in [true, false] {
            let deadline = ContinuousClock.now + .seconds(30)
            while try (state() == "T") != isPaused {
                try #require(ContinuousClock.now < deadline)
                await Task.yield()
            }
        }
    }

    /// Nothing is stopped or removed because it is not named.
    @Test func anEmptyDesiredStateDestroysNothing() async throws {
        let bench = try Bench()
        bench.want(.create)
        let replica = try await bench.untilReplica(.running)
        bench.desired = Haptera_V1_DesiredState()
        for _ in 0..<5 { try await bench.step() }
        #expect(ProcessIdentity(running: replica.pid) != nil)
        #expect(FileManager.default.fileExists(atPath: replica.directory))
    }
}
