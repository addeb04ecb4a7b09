import HapteraAPI
import HapteraCore
import Logging
import Testing

@testable import HapteraControl

@Suite struct ControllerTests {
    private static let quiet = Logger(label: "test") { _ in SwiftLogNoOpLogHandler() }

    private struct Bench {
        let test: TestStore
        let controller: Controller

        init() throws {
            test = try TestStore()
            controller = Controller(
                store: test.store, recordService: "h:1", logger: ControllerTests.quiet)
        }

        func register(_ name: String, id: String = "00000000000000a1") async throws {
            var request = Haptera_V1_RegisterNodeRequest()
            request.name = name
            request.nodeID = id
            request.address = "127.0.0.1"
            request.directory = "/\(name)"
            request.pid = 5
            try await controller.register(request)
        }

        func report(
            _ name: String, id: String = "00000000000000a1",
            replicas: [Haptera_V1_ReplicaReport] = [], engines: [Haptera_V1_EngineReport] = []
        ) async throws {
            var report = Haptera_V1_NodeReport()
            report.name = name
            report.nodeID = id
            report.replicas = replicas
            report.engines = engines
            try await controller.report(report)
        }

        func ready() async throws -> [String] {
            try await controller.nodes().filter(\.ready).map(\.name)
        }

        /// Replica reports as a node gives them that does what it is told.
        func obedience() async throws -> [Haptera_V1_ReplicaReport] {
            try await controller.desired(for: "n", nodeID: "00000000000000a1").replicas.map {
                var report = Haptera_V1_ReplicaReport()
                report.replicaID = $0.replicaID
                report.state = $0.phase == .remove ? .removed : .running
                report.address = "127.0.0.1:20001"
                report.directory = "/n/\($0.replicaID)"
                report.pid = 9
                return report
            }
        }
    }

    @Test func aNodeIsReadyWhileItReports() async throws {
        let bench = try Bench()
        try await bench.register("n")
        #expect(try await bench.ready().isEmpty)
        try await bench.report("n")
        #expect(try await bench.ready() == ["n"])
        bench.test.clock.advance(Controller.nodeSilenceMaxMilliseconds)
        #expect(try await bench.ready() == ["n"])
        bench.test.clock.advance(1)
        #expect(try await bench.ready().isEmpty)
        try await bench.report("n")
        #expect(try await bench.ready() == ["n"])
    }

    /// A volume that was asked for while the controller started again was refused, for want of
    /// nodes that were about to report.
    @Test func nodesAreWaitedForWhileTheControllerIsYoung() async throws {
        let bench = try Bench()
        try await bench.register("n")
        let wanted = try VolumeSpecification(
            name: "vol", sizeBytes: 1 << 30, replicas: 1, nodes: [])
        func refusal() async throws -> ControlError.Code? {
            do {
                _ = try await bench.controller.create(wanted)
                return nil
            } catch let error as ControlError {
                return error.code
            }
        }
        #expect(try await refusal() == .unavailable)
        bench.test.clock.advance(Controller.nodeSilenceMaxMilliseconds + 1)
        #expect(try await refusal() == .precondition)
        try await bench.report("n")
        #expect(try await refusal() == nil)
    }

    @Test func aStrangerMayNotReportOrAsk() async throws {
        let bench = try Bench()
        try await bench.register("n")
        await #expect(throws: ControlError.self) {
            try await bench.report("n", id: "00000000000000ff")
        }
        await #expect(throws: ControlError.self) {
            try await bench.controller.desired(for: "other", nodeID: "00000000000000a1")
        }
    }

    @Test func aVolumesWholeLife() async throws {
        let bench = try Bench()
        try await bench.register("n")
        try await bench.report("n")
        let wanted = try VolumeSpecification(
            name: "vol", sizeBytes: 1 << 30, replicas: 1, nodes: [])
        #expect(try await bench.controller.create(wanted).state == .creating)
        try await bench.report("n", replicas: try await bench.obedience())
        #expect(try await bench.controller.volume(named: "vol").state == .detached)

        #expect(try await bench.controller.attach("vol", node: nil).state == .attaching)
        let desired = try await bench.controller.desired(for: "n", nodeID: "00000000000000a1")
        let engine = try #require(desired.engines.first)
        #expect(desired.recordService == "h:1")
        #expect(engine.phase == .attach)
        #expect(engine.clientGeneration == 1)
        #expect(engine.replicas.map(\.address) == ["127.0.0.1:20001"])
        var running = Haptera_V1_EngineReport()
        running.volumeID = engine.volumeID
        running.clientGeneration = 1
        running.state = .serving
        running.pid = 10
        running.uri = "nbd://h:2/vol"
        var view = Haptera_V1_EngineReplicaReport()
        view.replicaID = engine.replicas[0].replicaID
        view.state = "inSync"
        running.replicas = [view]
        try await bench.report("n", replicas: try await bench.obedience(), engines: [running])
        let attached = try await bench.controller.volume(named: "vol")
        #expect(attached.state == .attached)
        #expect(attached.robustness == .healthy)
        #expect(attached.engine.uri == "nbd://h:2/vol")

        #expect(try await bench.controller.detach("vol").state == .detaching)
        let leaving = try await bench.controller.desired(for: "n", nodeID: "00000000000000a1")
        #expect(leaving.engines.map(\.phase) == [.detach])
        running.state = .detached
        try await bench.report("n", replicas: try await bench.obedience(), engines: [running])
        #expect(try await bench.controller.volume(named: "vol").state == .detached)

        try await bench.controller.delete("vol")
        #expect(try await bench.controller.volume(named: "vol").state == .deleting)
        try await bench.report("n", replicas: try await bench.obedience())
        #expect(try await bench.controller.volumes().isEmpty)
        let kinds = try await bench.test.store.events(after: 0, limit: 100).map(\.kind)
        #expect(
            kinds.filter { $0.hasPrefix("Volume") } == [
                "VolumeRequested", "VolumeCreated", "VolumeAttachRequested", "VolumeAttached",
                "VolumeDetachRequested", "VolumeDetached", "VolumeDeleteRequested",
                "VolumeDeleted",
            ])
    }

    /// A dead node's attachment is given up; if the node returns, its engine ends first.
    @Test func aForcedDetach() async throws {
        let bench = try Bench()
        try await bench.register("n")
        try await bench.report("n")
        _ = try await bench.controller.create(
            VolumeSpecification(name: "vol", sizeBytes: 1 << 20, replicas: 1, nodes: []))
        try await bench.report("n", replicas: try await bench.obedience())
        _ = try await bench.controller.attach("vol", node: nil)
        let error = await #expect(throws: ControlError.self) {
            try await bench.controller.detach("vol", isForced: true)
        }
        #expect(error?.message.contains("without --force") == true)
        bench.test.clock.advance(Controller.nodeSilenceMaxMilliseconds + 1)
        let record = try await bench.test.store.volume(named: "vol").record
        #expect(try await bench.controller.detach("vol", isForced: true).state == .detached)
        // Nothing is said for the engine: the next one takes over.
        #expect(try await bench.test.store.volume(named: "vol").record == record)
        let back = try await bench.controller.desired(for: "n", nodeID: "00000000000000a1")
        #expect(back.engines.map(\.phase) == [.detach])
        #expect(back.engines.map(\.clientGeneration) == [1])
        // Attached again, there is one wish for the volume, of a later generation.
        try await bench.report("n", replicas: try await bench.obedience())
        _ = try await bench.controller.attach("vol", node: "n")
        let again = try await bench.controller.desired(for: "n", nodeID: "00000000000000a1")
        #expect(again.engines.map(\.phase) == [.attach])
        #expect(again.engines.map(\.clientGeneration) == [2])
        var engine = Haptera_V1_EngineReport()
        engine.volumeID = again.engines[0].volumeID
        engine.clientGeneration = 2
        engine.state = .serving
        try await bench.report(
            "n", replicas: try await bench.obedience(), engines: [engine])
        let kinds = try await bench.test.store.events(after: 0, limit: 100).map(\.kind)
        #expect(kinds.contains("VolumeDetachForced"))
        #expect(kinds.contains("AbandonedEngineEnded"))
    }

    @Test func anAbandonedEngineIsForgottenOnceItHasEnded() async throws {
        let bench = try Bench()
        try await bench.register("n")
        try await bench.report("n")
        _ = try await bench.controller.create(
            VolumeSpecification(name: "vol", sizeBytes: 1 << 20, replicas: 1, nodes: []))
        try await bench.report("n", replicas: try await bench.obedience())
        let volume = try await bench.controller.attach("vol", node: nil)
        bench.test.clock.advance(Controller.nodeSilenceMaxMilliseconds + 1)
        _ = try await bench.controller.detach("vol", isForced: true)
        var engine = Haptera_V1_EngineReport()
        engine.volumeID = volume.id
        engine.clientGeneration = 1
        engine.state = .serving
        try await bench.report("n", replicas: try await bench.obedience(), engines: [engine])
        #expect(try await bench.controller.volume(named: "vol").state == .detached)
        let before = try await bench.controller.desired(for: "n", nodeID: "00000000000000a1")
        #expect(before.engines.count == 1)
        engine.state = .detached
        try await bench.report("n", replicas: try await bench.obedience(), engines: [engine])
        let after = try await bench.controller.desired(for: "n", nodeID: "00000000000000a1")
        #expect(after.engines.isEmpty)
    }

    /// Nothing is lost with the controller's memory but what nodes say again.
    @Test func aRestartedControllerKnowsWhatIsWanted() async throws {
        let bench = try Bench()
        try await bench.register("n")
        try await bench.report("n")
        _ = try await bench.controller.create(
            VolumeSpecification(name: "vol", sizeBytes: 1 << 20, replicas: 1, nodes: []))
        let reports = try await bench.obedience()
        try await bench.report("n", replicas: reports)
        let before = try await bench.controller.desired(for: "n", nodeID: "00000000000000a1")
        let second = Controller(
            store: bench.test.store, recordService: "h:1", logger: Self.quiet)
        #expect(try await second.desired(for: "n", nodeID: "00000000000000a1") == before)
        var report = Haptera_V1_NodeReport()
        report.name = "n"
        report.nodeID = "00000000000000a1"
        report.replicas = reports
        try await second.report(report)
        #expect(try await second.volume(named: "vol").robustness == .healthy)
    }

    @Test func watchersWakeAndEnd() async throws {
        let signal = ChangeSignal()
        var woken = signal.watch().makeAsyncIterator()
        // At once, then for each change; several changes before a look are one.
        #expect(await woken.next() != nil)
        signal.notify()
        signal.notify()
        #expect(await woken.next() != nil)
        // Later, once for all of them, and again for one after that.
        let begun = ContinuousClock.now
        for _ in 0..<10 { signal.notifySoon() }
        #expect(await woken.next() != nil)
        #expect(ContinuousClock.now - begun >= ChangeSignal.soon)
        signal.notifySoon()
        #expect(await woken.next() != nil)
        #expect(ContinuousClock.now - begun >= ChangeSignal.soon * 2, "one was left over")
        signal.finish()
        #expect(await woken.next() == nil)
        var late = signal.watch().makeAsyncIterator()
        #expect(await late.next() != nil)
        #expect(await late.next() == nil)
    }
}
