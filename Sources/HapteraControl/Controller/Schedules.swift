import HapteraAPI
import HapteraCore
import HapteraHost

/// Schedules: what is asked of them, and what the controller does for them.
extension Controller {
    package func createSchedule(
        _ wanted: Haptera_V1_ScheduleSpecification
    ) async throws -> Haptera_V1_Schedule {
        try await store.createSchedule(ScheduleRow(wanted, now: store.clock())).message
    }

    package func updateSchedule(
        _ request: Haptera_V1_UpdateScheduleRequest
    ) async throws -> Haptera_V1_Schedule {
        let schedule = try await store.updateSchedule(request).message
        changes.notify()
        return schedule
    }

    package func schedules() async throws -> [Haptera_V1_Schedule] {
        try await store.schedules().map(\.message)
    }

    package func schedule(named name: String) async throws -> Haptera_V1_Schedule {
        try await store.schedule(named: name).message
    }

    package func deleteSchedule(_ name: String) async throws {
        try await store.deleteSchedule(name)
    }

    package func pauseSchedule(
        _ name: String, isPaused: Bool
    ) async throws -> Haptera_V1_Schedule {
        try await store.pauseSchedule(name, isPaused: isPaused).message
    }

    // MARK: What is due

    /// One round. Returns what goes on: an engine may take a minute to answer, and nobody waits for
    /// another volume's.
    @discardableResult
    package func runSchedules() async throws -> [Task<Void, Never>] {
        let now = store.clock()
        // Before the store is read: what ends meanwhile has noted more than is read.
        let known = attempts
        let schedules = try await store.schedules()
        attempts.keepOnly(schedules)
        // Nodes that have yet to report would pass for dead.
        guard !SchedulePlan.isIdle(schedules, now: now), try await knowsNodes else { return [] }
        let plan = SchedulePlan(
            schedules, volumes: try await volumesToSchedule(), attempts: known, now: now)
        var tasks: [Task<Void, Never>] = []
        for step in plan.steps {
            switch step {
            case .begin(let schedule, let fire, let volumes):
                attempts.forget(schedule.name)
                try await store.beginRun(schedule, fire: fire, volumes: volumes)
                changes.notify()
            case .hold(let run, let why):
                try await store.noteRun(
                    run, run.state, message: why, event: "ScheduleVolumeSkipped")
            case .skip(let run, let why):
                try await store.noteRun(run, .done, message: why, event: "ScheduleVolumeSkipped")
            case .scrubAgain(let run): try await store.noteRun(run, .waiting)
            case .finish(let run): try await store.noteRun(run, .done)
            case .takeSnapshot(let run, let snapshot):
                tasks += perform(run, snapshot, then: .taken) {
                    try await $0.takeSnapshot(run, snapshot)
                }
            case .deleteSnapshot(let run, let snapshot):
                tasks += perform(run, snapshot, then: run.state) {
                    try await $0.deleteSnapshot(run, snapshot)
                }
            case .scrub(let run):
                tasks += perform(run, "", then: .running) { try await $0.scrub(run) }
            }
        }
        return tasks
    }

    private func volumesToSchedule() async throws -> [SchedulePlan.Volume] {
        let taken = try await store.scheduledSnapshots()
        return try await store.volumes().filter { $0.volume.phase == .ready }.map { stored in
            var volume = SchedulePlan.Volume(
                id: stored.volume.id, name: stored.volume.name, labels: stored.labels)
            volume.nodes = Set(stored.replicas.map(\.node))
            volume.obstacle = obstacle(stored)
            if stored.volume.clientNode == nil, stored.volume.unchangedSince > 0 {
                volume.unchangedSince = LayerID(
                    rawValue: UInt32(clamping: stored.volume.unchangedSince))
            }
            volume.snapshots = (stored.record?.snapshots ?? []).map {
                .init(
                    name: $0.name, schedule: taken[stored.volume.id]?[$0.name], layer: $0.layer)
            }
            if let node = stored.volume.attachedNode { volume.nodes.insert(node) }
            volume.scrub = scrubState(stored)
            return volume
        }
    }

    /// As it is noted: what nobody has done yet, and can be, is as good as running.
    private func scrubState(_ stored: StoredVolume) -> SchedulePlan.Volume.Scrub {
        guard let row = stored.scrub else { return .none }
        if row.isFinished { return .finished }
        let engine = observedNodes[stored.volume.attachedNode ?? ""]?.engine(stored.volume)
        if engine?.scrub.state == "running" { return .running }
        // Whoever has its turn next counts, or all would be begun at once.
        let isDue = stored.volume.clientNode == nil && engine?.scrub.state != "waiting"
        return isDue && !isScrubHindered(stored) ? .running : .waiting
    }

    /// To a snapshot and to a scrub. A volume that is not attached gets an engine for either.
    private func obstacle(_ stored: StoredVolume) -> String? {
        do {
            return try servingNode(stored) == nil ? scrubObstacle(stored) : nil
        } catch {
            return "\(error)"
        }
    }

    /// Does one thing to a volume, and notes what became of it.
    private func perform(
        _ run: ScheduleRunRow, _ what: String, then state: ScheduleRunRow.State,
        _ act: @escaping @Sendable (isolated Controller) async throws -> Void
    ) -> [Task<Void, Never>] {
        guard attempts.busy.count < ScheduleAttempts.busyMax,
            attempts.busy.insert(run.volumeID).inserted
        else { return [] }
        let task = Task {
            let caller = Caller(actor: "schedule/\(run.schedule)")
            do {
                try await Caller.$current.withValue(caller) { try await act(self) }
                attempts.succeeded(run, what)
                try await store.noteRun(run, state)
            } catch {
                await note(error, run, what)
            }
            attempts.busy.remove(run.volumeID)
            changes.notify()
        }
        return [task]
    }

    /// It is tried again, later each time, until the schedule acts for another time.
    private func note(_ error: any Error, _ run: ScheduleRunRow, _ what: String) async {
        attempts.failed(run, what, now: store.clock())
        // An agent that is about to connect is no news.
        let isPassing = (error as? ControlError)?.code == .unavailable
        try? await store.noteRun(
            run, run.state, message: "\(error)",
            event: isPassing ? nil : "ScheduleVolumeFailed")
    }

    private func takeSnapshot(_ run: ScheduleRunRow, _ name: String) async throws {
        var request = Haptera_V1_CreateSnapshotRequest()
        request.volume = run.volume
        request.name = name
        _ = try await createSnapshot(request, reserved: [ScheduleRow.label: run.schedule])
    }

    func deleteSnapshot(_ run: ScheduleRunRow, _ name: String) async throws {
        var request = Haptera_V1_DeleteSnapshotRequest()
        request.volume = run.volume
        request.name = name
        do {
            guard try await isExcess(name, run) else { return }
            try await deleteSnapshot(request)
        } catch let error as ControlError {
            if error.code == .notFound { return }
            throw ControlError(error.code, "snapshot '\(name)' is not deleted: \(error.message)")
        }
    }

    /// Whether the schedule, as it is by now, does not keep that snapshot: it may have been updated
    /// to keep more, or paused, since that was planned.
    private func isExcess(_ snapshot: String, _ run: ScheduleRunRow) async throws -> Bool {
        let schedule = try await store.schedule(named: run.schedule).row
        let stored = try await store.volume(named: run.volume)
        let labels = try await store.snapshotLabels(of: stored.volume.id)
        let snapshots = stored.record?.snapshots ?? []
        let taken = snapshots.filter { labels[$0.name]?[ScheduleRow.label] == schedule.name }
        let kept = SchedulePlan.kept(schedule, run, of: snapshots.count)
        return !schedule.isPaused && taken.dropLast(kept).contains { $0.name == snapshot }
    }

    private func scrub(_ run: ScheduleRunRow) async throws {
        var request = Haptera_V1_ScrubVolumeRequest()
        request.name = run.volume
        _ = try await scrubVolume(request)
    }
}
