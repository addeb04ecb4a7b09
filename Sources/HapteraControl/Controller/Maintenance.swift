import HapteraAPI
import HapteraCore
import HapteraHost

/// An engine that may be asked, until `leave`.
struct EngineUse: Sendable {
    let stored: StoredVolume
    /// Nil: nobody needs to be asked.
    let node: String?
    let deadline: ContinuousClock.Instant
    /// The share of a maintenance; nil: the volume is attached.
    let ticket: UInt64?
    /// What a command does; nil: it gives way.
    let words: String?

    /// What is left of the time, milliseconds.
    var timeout: UInt64 {
        let left = (deadline - ContinuousClock.now) / .milliseconds(1)
        return UInt64(max(left, Double(Controller.snapshotTimeouts.lowerBound)))
    }
}

/// What only an engine can do, to volumes that are attached or not.
extension Controller {
    /// Does it with the volume's engine. A volume that is not attached gets one for so long, which
    /// no client can connect to; those who do something at the same time share it.
    ///
    /// `words`: what is done. `yields`: an attachment does not wait for it; what is done then is
    /// done with the attached engine. `isNeeded`: throws where it would lead nowhere, before an
    /// engine is begun and again when it is ready; false: nobody needs to be asked.
    func withEngine<Result>(
        of name: String, for words: String, timeout: UInt64, yields: Bool = false,
        isNeeded: (StoredVolume) throws -> Bool,
        _ act: (EngineUse) async throws -> Result
    ) async throws -> Result {
        let deadline = ContinuousClock.now + .milliseconds(Self.timeout(timeout))
        let use = try await enter(
            name, for: words, by: deadline, yields: yields, isNeeded: isNeeded)
        do {
            let result = try await act(use)
            await leave(use)
            return result
        } catch {
            await leave(use)
            throw error
        }
    }

    /// Waits until an engine can be asked.
    func enter(
        _ name: String, for words: String, by deadline: ContinuousClock.Instant,
        yields: Bool = false, isNeeded: (StoredVolume) throws -> Bool
    ) async throws -> EngineUse {
        let command = yields ? nil : words
        var ticket: UInt64?
        var last: StoredVolume?
        var reason = "volume '\(name)' did not get an engine in time; try again"
        do {
            let found = try await first(by: deadline) { () -> EngineUse? in
                let stored = try await store.volume(named: name)
                last = stored
                maintenances.look(at: stored.volume)
                if let held = ticket, !maintenances.isUsed(stored.volume.id, by: held) {
                    ticket = nil
                }
                let step = try await knowingNodes {
                    try self.step(stored, ticket, isNeeded: isNeeded)
                }
                switch step {
                case .ask(let node):
                    return EngineUse(
                        stored: stored, node: node, deadline: deadline, ticket: ticket,
                        words: command)
                case .wait(let why): reason = why
                case .join:
                    ticket = maintenances.join(stored.volume.id, for: command)
                    changes.notify()
                case .begin(let node):
                    ticket = try await begin(stored, on: node, for: words, command)
                }
                return nil
            }
            if let found { return found }
            throw Self.refused(reason)
        } catch {
            if let last, let ticket {
                await leave(
                    EngineUse(
                        stored: last, node: nil, deadline: deadline, ticket: ticket,
                        words: command))
            }
            throw error
        }
    }

    private enum EngineStep {
        /// Nil: nobody needs to be asked.
        case ask(String?)
        case wait(String)
        /// The engine that somebody else has begun.
        case join
        case begin(String)
    }

    private func step(
        _ stored: StoredVolume, _ ticket: UInt64?, isNeeded: (StoredVolume) throws -> Bool
    ) throws -> EngineStep {
        let volume = stored.volume
        guard volume.phase == .ready else {
            throw Self.refused(
                volume.phase == .deleting
                    ? "volume '\(volume.name)' is being deleted"
                    : "volume '\(volume.name)' is still being created; try again later")
        }
        if let node = volume.attachedNode, !volume.isMaintained {
            if let why = try passing(stored, on: node) { return .wait(why) }
            let node = try servingNode(stored)
            return try .ask(isNeeded(stored) ? node : nil)
        }
        // Also of one that is about to begin: it would be no use.
        guard try isNeeded(stored) else { return .ask(nil) }
        if ticket != nil {
            guard let node = volume.attachedNode else {
                return .wait(
                    "the engine of volume '\(volume.name)' did not begin in time; try again")
            }
            return try maintained(stored, on: node)
        }
        let isShared = maintenances.isUsed(volume.id) && volume.nextNode == nil
        if isShared, !maintenances.isClosed(volume.id) { return .join }
        if let words = volume.maintenance {
            return .wait(
                "volume '\(volume.name)' still has the engine of an earlier request: \(words); "
                    + "try again")
        }
        guard !maintenances.isUsed(volume.id), !maintenances.isClosed(volume.id) else {
            return .wait("volume '\(volume.name)' is about to be deleted; try again")
        }
        return .begin(try maintenanceNode(stored))
    }

    /// Of a volume that is just being attached or detached: what is waited for.
    private func passing(_ stored: StoredVolume, on node: String) throws -> String? {
        let now = view(stored)
        guard now.state != .attached, observedNodes[node]?.isReady == true,
            now.robustness != .faulted
        else { return nil }
        do {
            _ = try servingNode(stored)
            return nil
        } catch {
            return "\(error)"
        }
    }

    /// Of a maintenance that is shared: whether its engine can be asked.
    private func maintained(_ stored: StoredVolume, on node: String) throws -> EngineStep {
        let name = stored.volume.name
        let now = VolumeView(stored, nodes: observedNodes)
        let (robustness, why) = (now.message.robustness, now.engine?.reason ?? "")
        guard observedNodes[node]?.isReady == true else {
            return .wait(
                "node \(node), which runs the engine of volume '\(name)', is not heard of: bring "
                    + "it back; see 'storagectl node list'")
        }
        guard robustness != .faulted else {
            throw Self.refused(
                "volume '\(name)' serves nobody: \(why); attach it to decide what becomes of it: "
                    + "storagectl volume attach \(name)")
        }
        guard now.engine?.state == .serving else {
            return .wait(
                "the engine of volume '\(name)' on node \(node) did not become ready in time"
                    + (why.isEmpty ? "" : ": \(why)") + "; see 'storagectl volume why \(name)'")
        }
        return .ask(node)
    }

    /// One that holds a replica which is in sync and runs: no other engine could begin.
    func maintenanceNode(_ stored: StoredVolume) throws -> String {
        let nodes = observedNodes
        let holder = stored.replicas.first { row in
            guard stored.isMember(row), row.phase == .run, let node = nodes[row.node] else {
                return false
            }
            return node.isReady && node.replica(row.id)?.state == .running
        }
        guard let holder else {
            let name = stored.volume.name
            throw Self.refused(
                "volume '\(name)' is not attached, and no in-sync replica of it is running: bring "
                    + "one back; see 'storagectl volume why \(name)'")
        }
        return holder.node
    }

    /// Nil: somebody else was first.
    func begin(
        _ stored: StoredVolume, on node: String, for words: String, _ command: String?
    ) async throws -> UInt64? {
        let id = stored.volume.id
        // It would be begun in vain.
        try await tasks.requireConnected(node)
        guard !maintenances.isUsed(id), !maintenances.isClosed(id) else {
            changes.notify()
            return nil
        }
        let ticket = maintenances.begin(id, for: command)
        defer { changes.notify() }
        // Not given up half-way, whoever asked: what is in the store is noted here, or is nobody's.
        let (name, generation) = (stored.volume.name, stored.volume.clientGeneration)
        do {
            let begun = try await Task {
                try await store.beginMaintenance(name, after: generation, on: node, words: words)
            }.value
            if let begun {
                maintenances.begun(id, ticket, generation: begun.volume.clientGeneration)
                return ticket
            }
        } catch {
            maintenances.drop(id)
            throw error
        }
        maintenances.drop(id)
        return nil
    }

    /// The last one to leave ends the maintenance; its engine's end is not waited for.
    func leave(_ use: EngineUse) async {
        let volume = use.stored.volume
        guard let ticket = use.ticket,
            let generation = maintenances.leave(volume.id, ticket, for: use.words)
        else { return }
        await end(volume, generation)
    }
    /// What held it is over; it ends if that was the last.
    func release(_ volume: VolumeRow, _ hold: Maintenances.Hold) async {
        guard let generation = maintenances.release(volume.id, hold) else { return }
        await end(volume, generation)
    }
    private func end(_ volume: VolumeRow, _ generation: Int64) async {
        // Also of a request that was given up. What fails is tried again.
        await Task {
            try? await store.endMaintenance(volume.name, generation: generation)
        }.value
        changes.notify()
    }

    /// Looks now and after each change, until `look` has found something. Nil: not in time.
    func first<Found>(
        by deadline: ContinuousClock.Instant, _ look: () async throws -> Found?
    ) async throws -> Found? {
        let alarm = Task {
            try await Task.sleep(until: deadline, clock: .continuous)
            changes.notify()
        }
        defer { alarm.cancel() }
        for await _ in changes.watch() {
            // Before the look: what is there when the time is up is found.
            let isLast = ContinuousClock.now >= deadline
            if let found = try await look() { return found }
            if isLast { return nil }
        }
        try Task.checkCancellation()
        throw ControlError(.unavailable, "the controller stops")
    }

    /// So long an attachment waits for what is being done. Then that is broken off: it may hang,
    /// and whoever wants to attach has no use for an answer that it does.
    static let attachmentPatienceMilliseconds: Int64 = 10_000

    /// One round: ends what nobody uses, which a controller before this one may have begun, breaks
    /// off what takes too long, and gives up what is on nodes that are not heard of.
    package func tendMaintenances() async throws {
        readers.expire(now: store.clock())
        let volumes = try await store.volumes()
        maintenances.keepOnly(Set(volumes.filter(\.volume.isMaintained).map(\.volume.id)))
        for stored in volumes {
            maintenances.look(at: stored.volume)
            // First: what a controller before this one has begun goes on.
            if stored.isBeingFilled, stored.volume.phase == .ready { try await tendFilling(stored) }
            if stored.volume.isMaintained { try await tend(stored) }
        }
    }

    func tendMaintenance(of name: String) async throws {
        let stored = try await store.volume(named: name)
        if stored.volume.isMaintained { try await tend(stored) }
    }

    private func tend(_ stored: StoredVolume) async throws {
        let volume = stored.volume
        if stored.scrub?.isFinished != false { await release(volume, .scrub) }
        if readers.count(volume.id) == 0 { await release(volume, .readers) }
        if !stored.isBeingFilled { await release(volume, .filling) }
        let isReady = observedNodes[volume.attachedNode ?? ""]?.isReady ?? false
        let waited = maintenances.waiting(volume, now: store.clock())
        let isInTheWay =
            volume.nextNode != nil
            && (maintenances.yields(volume.id) || waited >= Self.attachmentPatienceMilliseconds)
        try await Caller.$current.withValue(.controller) {
            if !isReady {
                guard try await knowsNodes else { return }
                maintenances.drop(volume.id)
                try await store.abandonMaintenance(
                    volume.name, generation: volume.clientGeneration)
            } else if !volume.isDetaching, !maintenances.isUsed(volume.id) || isInTheWay {
                maintenances.drop(volume.id)
                try await store.endMaintenance(volume.name, generation: volume.clientGeneration)
            } else {
                return
            }
            changes.notify()
        }
    }

    /// What the engine of a volume that is not attached is there for; nil: what it was begun for.
    func activity(_ volume: VolumeRow) -> String? {
        var words = maintenances.words(volume.id)
        let count = readers.count(volume.id)
        if count > 0, maintenances.isHeld(volume.id, by: .readers) {
            words.append(
                count == 1 ? "a snapshot is being read" : "snapshots are being read, by \(count)")
        }
        if maintenances.isHeld(volume.id, by: .scrub) { words.append("it is being scrubbed") }
        return words.isEmpty ? nil : words.joined(separator: ", ")
    }

    // MARK: Deletion

    static let deletionPatience = Duration.seconds(30)

    /// What is just done to the volume comes to its end first, and nothing else is begun.
    package func delete(_ name: String) async throws {
        let volume = try await store.volumes(named: name).first?.volume
        if let volume, volume.clientNode == nil, readers.count(volume.id) > 0 {
            throw Self.refused(
                "a snapshot of volume '\(name)' is being read: wait until that is done, or end it")
        }
        if let volume { maintenances.close(volume.id) }
        defer { if let volume { maintenances.open(volume.id) } }
        if let volume {
            await release(volume, .scrub)
            await release(volume, .filling)
            _ = try await first(by: ContinuousClock.now + Self.deletionPatience) {
                let now = try await store.volumes(named: name).first?.volume
                let isFree = now?.maintenance == nil || now?.nextNode != nil
                return isFree && !maintenances.isUsed(volume.id) ? true : nil
            }
        }
        _ = try await store.deleteVolume(name)
        changes.notify()
    }
}
