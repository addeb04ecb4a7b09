import GRDB
import HapteraAPI
import HapteraCore
import HapteraHost
import Logging
import Synchronization
import Testing

@testable import HapteraControl

extension SnapshotTests.World {
    /// Waits until the volume is stored like that.
    func until(_ isSo: (StoredVolume) -> Bool) async throws {
        let observation = ValueObservation.tracking { db in
            try VolumeRow.filter(Column("name") == "vol").fetchOne(db).map {
                try MetadataStore.stored(db, $0)
            }
        }
        for try await stored in observation.values(in: test.store.database) {
            if let stored, isSo(stored) { return }
        }
    }
    func until(_ isSo: (Maintenances, String) -> Bool) async throws {
        let id = try await test.store.volume(named: "vol").volume.id
        while await !isSo(controller.maintenances, id) { await Task.yield() }
    }
    /// Begins the request, and returns when it waits for something in the controller.
    func whenWaiting<Result: Sendable>(
        _ request: @escaping @Sendable (SnapshotTests.World) async throws -> Result
    ) async -> Task<Result, any Error> {
        let before = controller.changes.watchCount
        let task = Task { try await request(self) }
        while controller.changes.watchCount == before { await Task.yield() }
        return task
    }
    func untilDetached() async throws { try await until { $0.volume.attachedNode == nil } }

    func count(_ kind: String) async throws -> Int { try await events.count { $0.kind == kind } }

    /// How the only engine that is wanted of a node is.
    func phase(on node: String) async throws -> Haptera_V1_DesiredEngine.Phase? {
        let id = ["a": 1, "b": 2, "c": 3][node] ?? 0
        let desired = try await controller.desired(for: node, nodeID: hexadecimal(UInt64(id)))
        return desired.engines.first?.phase
    }
}

/// What is done to volumes that are not attached, over the stand-ins of `SnapshotTests`.
@Suite(.timeLimit(.minutes(5))) struct MaintenanceTests {
    typealias World = SnapshotTests.World

    private func detached() async throws -> World {
        let world = try await World(attached: false)
        world.live()
        return world
    }

    @Test func everythingOnlyAnEngineCanDo() async throws {
        let world = try await detached()
        let taken = try await world.create("s")
        #expect(taken.name == "s" && taken.uri.isEmpty && taken.unixUri.isEmpty)
        try await world.untilDetached()
        #expect(try await world.record.isClean)
        let grown = try await world.resize(2 << 30)
        #expect(grown.sizeBytes == 2 << 30 && grown.state == .detached && !grown.hasEngine)
        #expect(try await world.revert("s", keeping: "kept").name == "kept")
        try await world.delete("kept")
        #expect(try await world.names == ["s"])
        try await world.untilDetached()
        let volume = try await world.test.store.volume(named: "vol")
        #expect(volume.volume.maintenance == nil && !volume.volume.isDetaching)
        #expect(volume.record?.isClean == true && volume.volume.clientGeneration == 4)
        #expect(try await world.count("MaintenanceBegun") == 4)
        #expect(try await world.count("MaintenanceEnded") == 4)
        // Nobody took it for an attachment.
        let kinds = Set(try await world.events.map(\.kind))
        #expect(kinds.isDisjoint(with: ["VolumeAttached", "VolumeDetached"]))
    }

    @Test func theVolumeStaysDetachedAndLetsNobodyIn() async throws {
        let world = try await detached()
        world.gate.close()
        async let snapshot = world.create("s")
        try await world.until { $0.volume.servedGeneration == 1 }
        #expect(try await world.phase(on: "a") == .maintain)
        let volume = try await world.controller.volume(named: "vol")
        #expect(volume.state == .detached && !volume.hasEngine && volume.robustness == .healthy)
        #expect(volume.reason == "a snapshot is being taken")
        // Detached is what it is.
        #expect(try await world.controller.detach("vol").state == .detached)
        #expect(try await world.controller.detach("vol", isForced: true).state == .detached)
        #expect(try await world.phase(on: "a") == .maintain)
        #expect(try await world.count("VolumeDetachRequested") == 0)
        world.gate.open()
        #expect(try await snapshot.uri.isEmpty)
        try await world.untilDetached()
        #expect(try await world.controller.volume(named: "vol").reason.isEmpty)
    }

    @Test func thoseOfOneTimeShareAnEngine() async throws {
        let world = try await detached()
        world.gate.close()
        async let first = world.create("s")
        try await world.until { $0.volume.isMaintained }
        async let second = world.create("t")
        async let third = world.resize(2 << 30)
        try await world.until { $0.userCount($1) == 3 }
        world.gate.open()
        _ = try await (first, second, third)
        try await world.untilDetached()
        #expect(try await world.names.sorted() == ["s", "t"])
        #expect(try await world.count("MaintenanceBegun") == 1)
        #expect(try await world.count("MaintenanceEnded") == 1)
        #expect(try await world.record.isClean)
    }

    /// All that ask at once find the volume detached: one begins, the others share.
    @Test func manyAtOnce() async throws {
        let world = try await detached()
        try await withThrowingTaskGroup(of: Void.self) { group in
            for number in 0..<24 {
                group.addTask { _ = try await world.create("s\(number)") }
            }
            try await group.waitForAll()
        }
        try await world.untilDetached()
        #expect(try await world.names.count == 24)
        let begun = try await world.count("MaintenanceBegun")
        #expect(begun < 24, "none was shared")
        #expect(try await world.count("MaintenanceEnded") == begun)
    }

    @Test func whoAttachesMeanwhileIsAttachedWhereHeWanted() async throws {
        let world = try await detached()
        world.gate.close()
        async let snapshot = world.create("s")
        try await world.until { $0.volume.servedGeneration == 1 }
        let attaching = try await world.controller.attach("vol", node: "b")
        #expect(attaching.state == .attaching && attaching.engine.node == "b")
        #expect(attaching.engine.uri.isEmpty)
        #expect(
            attaching.reason == "it is attached when that is done: a snapshot is being taken")
        #expect(try await world.phase(on: "b") == nil)
        #expect(try await world.phase(on: "a") == .maintain)
        // Again, and elsewhere.
        #expect(try await world.controller.attach("vol", node: "b").state == .attaching)
        #expect(try await world.controller.attach("vol", node: nil).engine.node == "b")
        let elsewhere = await #expect(throws: ControlError.self) {
            _ = try await world.controller.attach("vol", node: "c")
        }
        #expect(elsewhere?.message.contains("is attached to b") == true)
        let deletion = await #expect(throws: ControlError.self) {
            try await world.controller.delete("vol")
        }
        #expect(deletion?.message.contains("is attached to b") == true)
        // What comes now waits for the attachment: nobody keeps it from beginning.
        let later = await world.whenWaiting { try await $0.create("t") }
        world.gate.open()
        _ = try await (snapshot, later.value)
        try await world.until { $0.volume.servedGeneration == 2 }
        let stored = try await world.test.store.volume(named: "vol").volume
        #expect(stored.attachedNode == "b" && !stored.isMaintained && stored.nextNode == nil)
        #expect(try await world.phase(on: "a") == nil)
        #expect(try await world.phase(on: "b") == .attach)
        #expect(world.asked.withLock { $0.map(\.clientGeneration) } == [1, 2])
        #expect(try await world.controller.volume(named: "vol").state == .attached)
        #expect(try await world.count("VolumeAttached") == 1)
    }

    @Test func anAttachmentThatWaitsCanBeGivenUp() async throws {
        let world = try await detached()
        world.gate.close()
        async let snapshot = world.create("s")
        try await world.until { $0.volume.servedGeneration == 1 }
        _ = try await world.controller.attach("vol", node: "b")
        #expect(try await world.controller.detach("vol").state == .detached)
        world.gate.open()
        _ = try await snapshot
        try await world.untilDetached()
        #expect(try await world.test.store.volume(named: "vol").volume.clientGeneration == 1)
        #expect(try await world.count("VolumeDetachRequested") == 1)
    }

    /// What hangs is broken off for the one who wants to attach.
    @Test func anAttachmentDoesNotWaitForEver() async throws {
        let world = try await detached()
        world.gate.close()
        world.engine.withLock { $0 = .isSilent }
        async let snapshot = world.refusal("s")
        try await world.until { $0.volume.servedGeneration == 1 }
        try await world.controller.tendMaintenances()
        _ = try await world.controller.attach("vol", node: "b")
        for wait in [0, Controller.attachmentPatienceMilliseconds - 1] {
            world.test.clock.advance(wait)
            try await world.report(.serving, obeyingOn: ["a", "b", "c"])
            try await world.controller.tendMaintenances()
            #expect(try await world.phase(on: "a") == .maintain)
        }
        world.test.clock.advance(1)
        try await world.report(.serving, obeyingOn: ["a", "b", "c"])
        try await world.controller.tendMaintenances()
        try await world.until { $0.volume.attachedNode == "b" && !$0.volume.isMaintained }
        world.gate.open()
        #expect(try await snapshot.code == .inDoubt)
    }

    @Test func aDeletionWaitsForItsEnd() async throws {
        let world = try await detached()
        world.gate.close()
        async let snapshot = world.create("s")
        try await world.until { $0.volume.servedGeneration == 1 }
        async let deletion: Void = world.controller.delete("vol")
        try await world.until { $0.isClosed($1) }
        // Nothing else is begun meanwhile.
        let late = await world.whenWaiting { try await $0.refusal("t") }
        #expect(try await world.test.store.volume(named: "vol").volume.phase == .ready)
        world.gate.open()
        _ = try await snapshot
        try await deletion
        #expect(try await late.value.message == "volume 'vol' is being deleted")
        let volume = try await world.test.store.volume(named: "vol").volume
        #expect(volume.phase == .deleting && volume.attachedNode == nil)
        #expect(try await world.count("MaintenanceEnded") == 1)
    }

    /// The controller ends when the store knows of it: the next one ends it, and who asks it for
    /// the same is answered.
    @Test func whatACrashLeavesIsEnded() async throws {
        let world = try await detached()
        for turn in 0..<2 {
            let attachment = try await world.test.store.volume(named: "vol").volume
                .clientGeneration
            let begun = try await world.test.store.beginMaintenance(
                "vol", after: attachment, on: "a", words: "a snapshot is being taken")
            #expect(begun?.volume.isMaintained == true)
            world.controller.changes.notify()
            // Not before its engine has begun the second time.
            if turn == 1 { try await world.until { $0.volume.servedGeneration == attachment + 1 } }
            let again = await world.whenWaiting { try await $0.create("s\(turn)") }
            #expect(try await world.phase(on: "a") == .maintain)
            try await world.controller.tendMaintenances()
            #expect(try await again.value.name == "s\(turn)")
            try await world.untilDetached()
            #expect(try await world.record.isClean)
        }
        #expect(try await world.names == ["s0", "s1"])
    }

    /// As `detach --force`: the record is not clean, and the engine is ended when its node returns.
    @Test func aNodeThatDiesCostsTheMaintenanceOnly() async throws {
        let world = try await World(attached: false)
        let nodes = Mutex(["a", "b", "c"])
        let changes = world.controller.changes.watch()
        let living = Task {
            for await _ in changes {
                try await world.report(.serving, obeyingOn: nodes.withLock { $0 })
            }
        }
        defer { living.cancel() }
        world.engine.withLock { $0 = .isSilent }
        world.gate.close()
        async let lost = world.refusal("s")
        try await world.until { $0.volume.servedGeneration == 1 }
        while world.gate.waitingCount == 0 { await Task.yield() }
        nodes.withLock { $0 = ["b", "c"] }
        world.test.clock.advance(Controller.nodeSilenceMaxMilliseconds + 1)
        try await world.report(.serving, obeyingOn: ["b", "c"])
        let waiting = try await world.controller.attach("vol", node: "c")
        #expect(waiting.state == .attaching)
        try await world.controller.tendMaintenances()
        let stored = try await world.test.store.volume(named: "vol")
        #expect(stored.volume.attachedNode == "c" && !stored.volume.isMaintained)
        #expect(stored.record?.isClean == false)
        #expect(try await world.count("MaintenanceAbandoned") == 1)
        // Its node is told to end it.
        #expect(try await world.phase(on: "a") == .detach)
        world.gate.open()
        #expect(try await lost.code == .inDoubt)
        world.engine.withLock { $0 = .obeys }
        try await world.until { $0.volume.servedGeneration == 2 }
        #expect(try await world.create("s").name == "s")
        #expect(world.asked.withLock { $0.last?.clientGeneration } == 2)
    }

    @Test func anotherNodeIsChosenWhenOneDiesBeforeItIsAsked() async throws {
        let world = try await World(attached: false)
        let nodes = Mutex(["b", "c"])
        let changes = world.controller.changes.watch()
        let living = Task {
            for await _ in changes {
                try await world.report(.serving, obeyingOn: nodes.withLock { $0 })
            }
        }
        defer { living.cancel() }
        async let snapshot = world.create("s")
        try await world.until { $0.volume.isMaintained }
        world.test.clock.advance(Controller.nodeSilenceMaxMilliseconds + 1)
        try await world.report(.serving, obeyingOn: ["b", "c"])
        try await world.controller.tendMaintenances()
        #expect(try await snapshot.name == "s")
        #expect(world.asked.withLock { $0.map(\.clientGeneration) } == [2])
        #expect(try await world.count("MaintenanceAbandoned") == 1)
    }

    @Test func withoutAReplicaNothingIsBegun() async throws {
        let world = try await World(attached: false)
        world.test.clock.advance(Controller.nodeSilenceMaxMilliseconds + 1)
        let refused = try await world.refusal("s")
        #expect(refused.code == .precondition)
        #expect(
            refused.message
                == "volume 'vol' is not attached, and no in-sync replica of it is running: bring "
                + "one back; see 'storagectl volume why vol'")
        #expect(try await world.resizeRefusal(2 << 30).message == refused.message)
        #expect(try await world.test.store.volume(named: "vol").volume.clientGeneration == 0)
        #expect(try await world.count("MaintenanceBegun") == 0)
    }

    @Test func anEngineThatDoesNotBecomeReadyIsEnded() async throws {
        let world = try await World(attached: false)
        world.live(.starting)
        let refused = try await world.refusal("s", timeout: 1000)
        #expect(refused.code == .precondition)
        #expect(refused.message.contains("on node a did not become ready in time"))
        try await world.untilDetached()
        #expect(world.asked.withLock { $0.isEmpty })
        #expect(try await world.count("SnapshotRequested") == 0)
    }

    /// Whoever asks shall ask the next controller.
    @Test func aControllerThatStopsSaysSo() async throws {
        let world = try await World(attached: false)
        world.live(.starting)
        async let refused = world.refusal("s")
        try await world.until { $0.volume.isMaintained }
        world.controller.changes.finish()
        #expect(try await refused.code == .unavailable)
    }

    @Test func aDecisionIsNobodyElses() async throws {
        let world = try await World(attached: false)
        world.needsDecision.withLock { $0 = true }
        world.live(.stalled)
        let refused = try await world.refusal("s")
        #expect(refused.code == .precondition)
        #expect(refused.message.hasPrefix("volume 'vol' serves nobody: "))
        #expect(refused.message.hasSuffix("storagectl volume attach vol"))
        try await world.untilDetached()
    }

    /// What cannot be needs no engine, and what is done needs none again.
    @Test func noEngineIsBegunInVain() async throws {
        let world = try await detached()
        _ = try await world.create("s")
        _ = try await world.revert("s", keeping: "kept")
        try await world.untilDetached()
        let attachment = try await world.test.store.volume(named: "vol").volume.clientGeneration
        #expect(try await world.create("s").name == "s")
        #expect(try await world.revert("s", keeping: "kept").name == "kept")
        #expect(try await world.resize(1 << 30).sizeBytes == 1 << 30)
        #expect(try await world.deletionRefusal("t").code == .notFound)
        #expect(try await world.revertRefusal("t", keeping: "k").code == .notFound)
        #expect(try await world.revertRefusal("s", keeping: "s").code == .precondition)
        #expect(try await world.resizeRefusal(1 << 29).code == .precondition)
        #expect(
            try await world.test.store.volume(named: "vol").volume.clientGeneration == attachment)
    }

    /// A crash after the engine's change and before its order: the same again makes sure.
    @Test func oneThatWasNotLeftInOrderIsTakenOver() async throws {
        let world = try await detached()
        try await world.add("s", created: 5)
        #expect(try await !world.record.isClean)
        let again = try await world.create("s")
        #expect(again.createdUnixMilliseconds == 5)
        #expect(world.asked.withLock { $0.count } == 1)
        try await world.untilDetached()
        #expect(try await world.record.isClean)
    }

    @Test func aGroupOfDetachedVolumes() async throws {
        let world = try await detached()
        #expect(try await world.group("g").map(\.name) == ["g"])
        #expect(world.takeSteps() == ["take and hold", "release", "take"])
        try await world.untilDetached()
        #expect(try await world.count("MaintenanceBegun") == 1)
        world.engine.withLock { $0 = .cannotHold }
        #expect(try await world.groupRefusal("h").message.contains("another snapshot"))
        try await world.untilDetached()
        #expect(try await world.count("MaintenanceEnded") == 2)
        #expect(try await world.names == ["g"])
    }

    /// The host of the engine restarts: another engine, and no client who ended.
    @Test func aRebootInTheMiddle() async throws {
        let world = try await World(attached: false)
        let stored = try await world.test.store.volume(named: "vol").volume
        _ = try await world.test.store.beginMaintenance(
            "vol", after: stored.clientGeneration, on: "a", words: "w")
        var row = try #require(try await world.test.store.nodes().first { $0.name == "a" })
        for boot in ["1", "2"] {
            row.bootID = boot
            try await world.test.store.registerNode(row)
        }
        let now = try await world.test.store.volume(named: "vol").volume
        #expect(now.isMaintained && now.clientGeneration == 2)
        #expect(try await world.count("ClientEnded") == 0)
        // It is nobody's.
        world.live()
        try await world.report(.serving, obeyingOn: ["a", "b", "c"])
        try await world.controller.tendMaintenances()
        try await world.untilDetached()
    }
}
