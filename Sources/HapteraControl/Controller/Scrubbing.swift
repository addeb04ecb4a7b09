import HapteraAPI
import HapteraCore

/// Scrubs. What is wanted is in the store, with how far it is; each engine of the volume is told to
/// do it (`DesiredEngine.scrub`), and its node's reports tell what it found. A volume that is not
/// attached gets an engine for it when its turn has come.
extension Controller {
    static let scrubPatience = Duration.seconds(12)

    package func scrubVolume(
        _ request: Haptera_V1_ScrubVolumeRequest
    ) async throws -> Haptera_V1_Volume {
        let name = request.name
        let (stored, node) = try await knowingNodes {
            let stored = try await store.volume(named: name)
            let node = try servingNode(stored)
            if node == nil, stored.volume.phase == .ready {
                if let why = takeoverObstacle(stored) {
                    throw Self.refused(
                        "volume '\(name)' cannot be scrubbed: \(why): attach it first: storagectl "
                            + "volume attach \(name)")
                }
                if let why = scrubObstacle(stored) { throw Self.refused(why) }
            }
            return (stored, node)
        }
        guard stored.volume.phase == .ready else {
            throw Self.refused("volume '\(name)' is still being created; try again later")
        }
        if let node { try await tasks.requireConnected(node) }
        // A controller before this one did not note scrubs.
        let report = observedNodes[node ?? ""]?.engine(stored.volume)?.scrub
        let known = report.flatMap { $0.state == "finished" ? nil : $0.progress }
        let noted = try await store.requestScrub(
            name, known: known.flatMap { ScrubProgress(text: $0) })
        changes.notify()
        if node != nil { try await untilScrubBegins(noted) }
        return view(try await store.volume(named: name))
    }

    /// Until the attached engine is about it, or it needs another one.
    private func untilScrubBegins(_ noted: StoredVolume) async throws {
        let name = noted.volume.name
        let begun = try await first(by: ContinuousClock.now + Self.scrubPatience) { () -> Bool? in
            let now = try await store.volume(named: name)
            let isLeft = now.volume.clientNode == nil || now.volume.isDetaching
            let isOver = now.scrub?.isFinished != false || now.scrub?.value?.id != id(noted)
            let told = observedNodes[now.volume.attachedNode ?? ""]?.engine(now.volume)?.scrub
            let isBegun = told.flatMap { ScrubProgress(text: $0.progress)?.id } == id(noted)
            return isLeft || isOver || isBegun ? true : nil
        }
        guard begun == nil else { return }
        throw ControlError(
            .inDoubt,
            "a scrub of volume '\(name)' is noted, but its engine has not said in time that it has "
                + "begun: it does so by itself; see 'storagectl volume scrub-status \(name)'")
    }
    private func id(_ stored: StoredVolume) -> UInt64? { stored.scrub?.value?.id }

    // MARK: Of volumes that are not attached

    /// Why no engine can be begun for it now; nil: it can be.
    func scrubObstacle(_ stored: StoredVolume) -> String? {
        if let why = takeoverObstacle(stored) { return why }
        do {
            if !stored.volume.isMaintained { _ = try maintenanceNode(stored) }
            return nil
        } catch {
            return "\(error)"
        }
    }

    /// Nobody has asked for the takeover of a volume whose clients may live on somewhere. There
    /// were none since it is known what it has not changed since.
    func takeoverObstacle(_ stored: StoredVolume) -> String? {
        if stored.volume.isMaintained || stored.wasLeftInOrder { return nil }
        return stored.volume.unchangedSince > 0
            ? nil : "it is not attached, and its last engine did not leave in order"
    }

    /// A scrub without all replicas would only wait.
    private func missingReplica(_ stored: StoredVolume) -> String? {
        let kept = (stored.record?.out ?? []).filter(\.isKept).map(\.member.replica.text)
        let missing = stored.replicas.first { row in
            guard row.phase == .run, !kept.contains(row.id) else { return false }
            let node = observedNodes[row.node]
            return node?.isReady != true || node?.replica(row.id)?.state != .running
        }
        return missing.map { "replica \($0.id) on node \($0.node) does not run" }
    }

    func isScrubHindered(_ stored: StoredVolume) -> Bool {
        scrubObstacle(stored) != nil || missingReplica(stored) != nil
    }

    /// What a scrub waits for; empty: nothing that is known.
    func scrubReason(_ stored: StoredVolume, isWaiting: Bool) -> String {
        let volume = stored.volume
        guard stored.scrub?.isFinished == false else { return "" }
        guard volume.clientNode == nil else { return isWaiting ? engineScrubReason(stored) : "" }
        if maintenances.isHeld(volume.id, by: .scrub) { return missingReplica(stored) ?? "" }
        return scrubObstacle(stored) ?? missingReplica(stored)
            ?? "it is scrubbed when others on its nodes have been"
    }

    /// The engine of an attached volume says that its scrub waits, and not what for: that is seen
    /// from here.
    private func engineScrubReason(_ stored: StoredVolume) -> String {
        let view = VolumeView(stored, nodes: observedNodes)
        guard let engine = view.engine, engine.state == .serving else {
            return "the volume is not served at present"
        }
        guard engine.hasScrub else { return "its engine has yet to begin it" }
        let kept = (stored.record?.out ?? []).filter(\.isKept).map(\.member.replica.text)
        let other = view.message.replicas.first {
            $0.state != .inSync && !$0.leaving && !kept.contains($0.id)
        }
        if let other {
            let state = other.state == .joining ? "is being filled" : "is \(other.state.word)"
            return "replica \(other.id) on node \(other.node) \(state)"
        }
        return "its engine does something else first: a takeover, or a snapshot"
    }

    /// One round: begins scrubs whose turn has come, and gives up for a while those that get
    /// nowhere.
    @discardableResult
    package func tendScrubs() async throws -> [Task<Void, Never>] {
        guard try await knowsNodes else { return [] }
        let now = store.clock()
        let wanted = try await store.volumes().filter {
            $0.volume.phase == .ready && $0.scrub?.isFinished == false
        }
        detachedScrubs.keepOnly(Set(wanted.map(\.volume.id)))
        var entries: [DetachedScrubs.Entry] = []
        for stored in wanted {
            let entry = scrubEntry(stored)
            if detachedScrubs.isStuck(entry, now: now) {
                detachedScrubs.giveUp(entry.id, now: now)
                await release(stored.volume, .scrub)
            }
            entries.append(entry)
        }
        return detachedScrubs.next(entries, now: now).map { entry in
            detachedScrubs.beginning.insert(entry.id)
            return Task {
                await Caller.$current.withValue(.controller) { await beginScrub(entry) }
            }
        }
    }

    private func scrubEntry(_ stored: StoredVolume) -> DetachedScrubs.Entry {
        let volume = stored.volume
        var entry = DetachedScrubs.Entry(
            id: volume.id, name: volume.name, nodes: Set(stored.replicas.map(\.node)),
            since: stored.scrub?.requestedMilliseconds ?? 0)
        let report = observedNodes[volume.attachedNode ?? ""]?.engine(volume)?.scrub
        entry.isRunning = report?.state == "running"
        if let node = volume.attachedNode { entry.nodes.insert(node) }
        if volume.clientNode != nil {
            entry.state = .attached
        } else if maintenances.isHeld(volume.id, by: .scrub) {
            entry.state = .held
        } else if volume.isDetaching || isScrubHindered(stored) {
            entry.state = .hindered
        }
        return entry
    }

    private func beginScrub(_ entry: DetachedScrubs.Entry) async {
        do {
            try await withEngine(
                of: entry.name, for: "it is being scrubbed", timeout: 0, yields: true,
                isNeeded: { $0.volume.id == entry.id && $0.scrub?.isFinished == false }
            ) { use in
                guard let ticket = use.ticket else { return }
                maintenances.hold(entry.id, ticket, .scrub)
            }
            detachedScrubs.began(entry.id, now: store.clock())
        } catch {
            detachedScrubs.giveUp(entry.id, now: store.clock())
        }
        detachedScrubs.beginning.remove(entry.id)
        changes.notify()
    }
}

/// Whose turn it is: of volumes that are not attached, one at a time on each node that holds a
/// replica. Decides; the controller acts.
struct DetachedScrubs {
    /// One that gets nowhere for so long lets others have its turn, for as long.
    static let stuckMilliseconds: Int64 = 60_000

    struct Entry: Equatable {
        enum State {
            /// The attached engine does it, whatever else there is.
            case attached
            /// An engine without clients is there for it.
            case held
            case hindered
            case due
        }
        var id: String
        var name: String
        /// Of its replicas, and its engine.
        var nodes: Set<String>
        /// When it was asked for.
        var since: Int64
        var state = State.due
        /// Its engine says so.
        var isRunning = false
    }

    /// Those that an engine is being begun for.
    var beginning: Set<String> = []
    private var aliveAt: [String: Int64] = [:]
    private var notBefore: [String: Int64] = [:]

    mutating func began(_ id: String, now: Int64) { aliveAt[id] = now }
    mutating func giveUp(_ id: String, now: Int64) {
        aliveAt[id] = nil
        notBefore[id] = now + Self.stuckMilliseconds
    }
    mutating func keepOnly(_ wanted: Set<String>) {
        aliveAt = aliveAt.filter { wanted.contains($0.key) }
        notBefore = notBefore.filter { wanted.contains($0.key) }
    }

    /// Whether it holds an engine and has done nothing with it for long.
    mutating func isStuck(_ entry: Entry, now: Int64) -> Bool {
        guard entry.state == .held else { return false }
        if entry.isRunning { aliveAt[entry.id] = now }
        guard let alive = aliveAt[entry.id] else {
            aliveAt[entry.id] = now
            return false
        }
        return now - alive >= Self.stuckMilliseconds
    }

    /// Those that may begin, who waited longest first.
    func next(_ entries: [Entry], now: Int64) -> [Entry] {
        var busyNodes: Set<String> = []
        for entry in entries
        where entry.state == .held || beginning.contains(entry.id) || entry.isRunning {
            busyNodes.formUnion(entry.nodes)
        }
        var chosen: [Entry] = []
        for entry in entries.sorted(by: { ($0.since, $0.name) < ($1.since, $1.name) })
        where entry.state == .due && !beginning.contains(entry.id)
            && notBefore[entry.id] ?? now <= now && busyNodes.isDisjoint(with: entry.nodes)
        {
            chosen.append(entry)
            busyNodes.formUnion(entry.nodes)
        }
        return chosen
    }
}
