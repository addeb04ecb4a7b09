import HapteraCore

/// What the controller does for its schedules now. Pure: decides from what is stored and observed;
/// the controller performs it, and looks again.
package struct SchedulePlan: Sendable {
    package struct Volume: Equatable, Sendable {
        package struct Snapshot: Equatable, Sendable {
            package var name: String
            /// Who took it, if a schedule did.
            package var schedule: String?
            package var layer: LayerID = .head
        }
        /// The last scrub.
        package enum Scrub: Equatable, Sendable {
            case none
            /// Or about to.
            case running
            /// For its replicas: it does nothing.
            case waiting
            case finished
        }
        package var id: String
        package var name: String
        package var labels: [String: String] = [:]
        /// Of its replicas and its engine.
        package var nodes: Set<String> = []
        /// Why no engine can be asked; nil: one can be.
        package var obstacle: String?
        /// Snapshots of this layer and later ones hold what the volume does, which is not attached;
        /// nil: it may have changed since any.
        package var unchangedSince: LayerID?
        /// Oldest first.
        package var snapshots: [Snapshot] = []
        package var scrub = Scrub.none
    }

    package enum Step: Equatable, Sendable {
        /// To be noted before anything is done for that time.
        case begin(ScheduleRow, fire: Int64, volumes: [String])
        /// Cannot be done now, for a reason that is new.
        case hold(ScheduleRunRow, why: String)
        /// Need not be done.
        case skip(ScheduleRunRow, why: String)
        case takeSnapshot(ScheduleRunRow, String)
        case deleteSnapshot(ScheduleRunRow, String)
        case scrub(ScheduleRunRow)
        /// Nothing is noted of the scrub that was asked for.
        case scrubAgain(ScheduleRunRow)
        case finish(ScheduleRunRow)
    }

    private let volumes: [String: Volume]
    private let schedules: [StoredSchedule]
    private let attempts: ScheduleAttempts
    private let now: Int64

    /// `volumes`: those that are ready.
    package init(
        _ schedules: [StoredSchedule], volumes: [Volume], attempts: ScheduleAttempts, now: Int64
    ) {
        self.schedules = schedules
        self.volumes = Dictionary(uniqueKeysWithValues: volumes.map { ($0.id, $0) })
        self.attempts = attempts
        self.now = now
    }

    /// Whether there is anything to look after: the volumes need not be read otherwise.
    package static func isIdle(_ schedules: [StoredSchedule], now: Int64) -> Bool {
        schedules.allSatisfy { schedule in
            guard !schedule.row.isPaused else {
                return schedule.runs.allSatisfy { $0.state != .running }
            }
            return schedule.row.nextMilliseconds > now
                && schedule.runs.allSatisfy { $0.state == .done }
        }
    }

    package var steps: [Step] {
        var steps: [Step] = []
        var busy = attempts.busy
        for schedule in schedules where !schedule.row.isPaused {
            if let fire = schedule.row.due(now: now) {
                steps.append(.begin(schedule.row, fire: fire, volumes: selected(by: schedule.row)))
                continue
            }
            for run in schedule.runs where schedule.row.action == .snapshot {
                guard let volume = volumes[run.volumeID], !busy.contains(volume.id),
                    let step = step(run, of: schedule.row, volume)
                else { continue }
                if step.occupiesVolume { busy.insert(volume.id) }
                steps.append(step)
            }
        }
        return steps + scrubs
    }

    private func selected(by schedule: ScheduleRow) -> [String] {
        volumes.values.sorted { $0.name < $1.name }
            .filter { schedule.selects($0.name, $0.labels) }.map(\.id)
    }

    // MARK: Snapshots

    private func step(
        _ run: ScheduleRunRow, of schedule: ScheduleRow, _ volume: Volume
    ) -> Step? {
        switch run.state {
        case .waiting:
            let name = schedule.snapshotName(at: run.fireMilliseconds)
            let there = volume.snapshots.first { $0.name == name }
            if let there, there.schedule != schedule.name {
                return hold(run, "there is a snapshot '\(name)' that the schedule did not take")
            }
            // One that is there may be certain without an engine: its volume was left in order.
            if there == nil, let same = unchanged(volume, since: schedule) {
                return .skip(run, why: "it is not attached, and has not changed since '\(same)'")
            }
            if there == nil, let obstacle = volume.obstacle { return hold(run, obstacle) }
            if there == nil, let oldest = inTheWay(of: run, schedule, volume) {
                return .deleteSnapshot(run, oldest)
            }
            return attempts.mayTry(run, name, now: now) ? .takeSnapshot(run, name) : nil
        case .taken:
            // Beyond the newest; each by itself, since a reader holds up its own only.
            let excess = volume.snapshots.filter { $0.schedule == schedule.name }
                .dropLast(schedule.retain)
            guard !excess.isEmpty else { return .finish(run) }
            guard volume.obstacle == nil else { return nil }
            return excess.first { attempts.mayTry(run, $0.name, now: now) }
                .map { .deleteSnapshot(run, $0.name) }
        case .running, .done: return nil
        }
    }

    /// The volume has as many snapshots as it can have: what the schedule would let go once it has
    /// taken another one goes before.
    private func inTheWay(
        of run: ScheduleRunRow, _ schedule: ScheduleRow, _ volume: Volume
    ) -> String? {
        guard volume.snapshots.count >= VolumeRecord.snapshotsMax else { return nil }
        let kept = Self.kept(schedule, run, of: volume.snapshots.count)
        return volume.snapshots.filter { $0.schedule == schedule.name }.dropLast(kept)
            .first { attempts.mayTry(run, $0.name, now: now) }?.name
    }
    /// How many of its own a schedule keeps of a volume with so many. It never deletes the last.
    static func kept(_ schedule: ScheduleRow, _ run: ScheduleRunRow, of count: Int) -> Int {
        guard run.state == .waiting, count >= VolumeRecord.snapshotsMax else {
            return schedule.retain
        }
        return max(schedule.retain - 1, 1)
    }

    /// The schedule's own snapshot that holds what the volume does. Another one would hold no more,
    /// and in time cost one that does. Of others nobody knows how long they are kept.
    private func unchanged(_ volume: Volume, since schedule: ScheduleRow) -> String? {
        guard let layer = volume.unchangedSince else { return nil }
        return volume.snapshots.last { $0.schedule == schedule.name && $0.layer >= layer }?.name
    }

    private func hold(_ run: ScheduleRunRow, _ why: String) -> Step? {
        run.message == why ? nil : .hold(run, why: why)
    }

    // MARK: Scrubs

    /// At most one at a time on each node; who was scrubbed longest ago comes first.
    private var scrubs: [Step] {
        var steps: [Step] = []
        var busyNodes: Set<String> = []
        for volume in volumes.values where volume.scrub == .running {
            busyNodes.formUnion(volume.nodes)
        }
        var waiting: [ScheduleRunRow] = []
        for schedule in schedules where schedule.row.action == .scrub {
            let isActive = !schedule.row.isPaused && schedule.row.due(now: now) == nil
            for run in schedule.runs {
                guard let volume = volumes[run.volumeID] else { continue }
                if attempts.busy.contains(volume.id) {
                    busyNodes.formUnion(volume.nodes)
                } else if run.state == .running {
                    if let step = follow(run, volume) { steps.append(step) }
                } else if run.state == .waiting, isActive {
                    waiting.append(run)
                }
            }
        }
        waiting.sort { ($0.doneMilliseconds, $0.volume) < ($1.doneMilliseconds, $1.volume) }
        for run in waiting {
            guard let volume = volumes[run.volumeID] else { continue }
            if let obstacle = volume.obstacle {
                if let step = hold(run, obstacle) { steps.append(step) }
            } else if attempts.mayTry(run, "", now: now), busyNodes.isDisjoint(with: volume.nodes) {
                steps.append(.scrub(run))
                busyNodes.formUnion(volume.nodes)
            }
        }
        return steps
    }

    private func follow(_ run: ScheduleRunRow, _ volume: Volume) -> Step? {
        switch volume.scrub {
        case .finished: return .finish(run)
        case .running, .waiting: return nil
        case .none: return .scrubAgain(run)
        }
    }
}

extension SchedulePlan.Step {
    fileprivate var occupiesVolume: Bool {
        switch self {
        case .takeSnapshot, .deleteSnapshot, .scrub: true
        case .begin, .hold, .skip, .scrubAgain, .finish: false
        }
    }
}

/// What is being done, and when what failed is tried again. Kept in memory: a new controller tries
/// at once.
package struct ScheduleAttempts: Sendable {
    struct Key: Hashable {
        var schedule: String
        var volumeID: String
        /// The snapshot; empty: a scrub.
        var what: String
    }
    struct Failure {
        var count: Int
        var notBefore: Int64
    }
    static let delayMilliseconds: Int64 = 15_000
    static let delayMaxMilliseconds: Int64 = 600_000
    /// Things that are done at a time, beside each other.
    static let busyMax = 16

    /// Volumes something is being done to.
    package var busy: Set<String> = []
    private var failures: [Key: Failure] = [:]

    package init() {}

    func mayTry(_ run: ScheduleRunRow, _ what: String, now: Int64) -> Bool {
        let key = Key(schedule: run.schedule, volumeID: run.volumeID, what: what)
        return failures[key].map { $0.notBefore <= now } ?? true
    }

    package mutating func failed(_ run: ScheduleRunRow, _ what: String, now: Int64) {
        let key = Key(schedule: run.schedule, volumeID: run.volumeID, what: what)
        let count = failures[key]?.count ?? 0
        let delay = min(Self.delayMilliseconds << min(Int64(count), 16), Self.delayMaxMilliseconds)
        failures[key] = Failure(count: count + 1, notBefore: now + delay)
    }

    mutating func succeeded(_ run: ScheduleRunRow, _ what: String) {
        failures[Key(schedule: run.schedule, volumeID: run.volumeID, what: what)] = nil
    }

    /// A schedule acts for another time: nothing is held against it.
    mutating func forget(_ schedule: String) {
        failures = failures.filter { $0.key.schedule != schedule }
    }

    /// Also what schedules that are gone have left.
    mutating func keepOnly(_ schedules: [StoredSchedule]) {
        let names = Set(schedules.map(\.row.name))
        failures = failures.filter { names.contains($0.key.schedule) }
    }
}
