/// What `haptera-replica inspect` says of one copy, as far as salvage and reconstruction go by it.
package struct ReplicaSurvey: Equatable, Sendable {
    package struct BirthCount: Equatable, Sendable {
        package var epoch: Epoch
        package var regions: UInt64
        package init(epoch: Epoch, regions: UInt64) {
            self.epoch = epoch
            self.regions = regions
        }
    }
    package var member: VolumeRecord.Member
    package var promise: Epoch
    /// The record installed with the promise; nil: never one.
    package var installed: VolumeRecord?
    package var flushed: StablePoint = .zero
    /// As in `InstallReply.stablePoint`.
    package var stable: StablePoint = .zero
    package var isRebooted = false
    package var activeRegions: UInt64 = 0
    /// Regions by the epoch of their last write.
    package var births: [BirthCount] = []
    /// Regions last written before the oldest of `births`.
    package var olderRegions: UInt64 = 0

    package init(member: VolumeRecord.Member, promise: Epoch, installed: VolumeRecord?) {
        self.member = member
        self.promise = promise
        self.installed = installed
    }

    /// At least the regions written in `epoch` or later.
    package func regions(since epoch: Epoch) -> UInt64 {
        let listed = births.reduce(0) { $0 + ($1.epoch >= epoch ? $1.regions : 0) }
        let oldest = births.map(\.epoch).min() ?? .zero
        return listed + (epoch < oldest || births.isEmpty ? olderRegions : 0)
    }
}

/// Going on from one copy when the in-sync set will not come back: what each choice would lose, and
/// the record it would write. Nothing here acts.
package struct SalvagePlan: Equatable, Sendable {
    /// Why a copy cannot be chosen.
    package enum Obstacle: String, Sendable {
        case recordIsOlder =
            "it has promised a later epoch than the record's: reconstruct the store first"
        case unknownReplica = "the record knows no such copy"
    }

    package struct Choice: Equatable, Sendable {
        package var member: VolumeRecord.Member
        /// It is in the in-sync set: going on from it may need no salvage.
        package var isInSync: Bool
        /// It has flushed less than it once said.
        package var isRolledBack: Bool
        /// Its host restarted: of what it held it may lack writes that were never flushed.
        package var mayLackUnflushed: Bool
        /// Writes of this epoch or later may be lost; nil: of none, but for unflushed ones.
        package var lostSince: Epoch?
        /// At most so many regions hold lost writes.
        package var regionsMax: UInt64
        /// `regionsMax` was counted on a copy that holds them; false: nobody asked does, so it is
        /// the whole volume.
        package var isMeasured: Bool
        package var obstacle: Obstacle?
        /// What the salvage would swap in, but for the nonce; nil: there is an obstacle.
        package var record: VolumeRecord?
    }
    package let record: VolumeRecord
    /// In the order of what they lose, least first.
    package let choices: [Choice]

    /// `surveys`: of every copy that could be looked at.
    package init(record: VolumeRecord, surveys: [ReplicaSurvey]) {
        self.record = record
        choices = surveys.map { Self.choice($0, record, surveys) }.sorted {
            ($0.obstacle == nil ? 0 : 1, $0.regionsMax, $0.member.replica.rawValue)
                < ($1.obstacle == nil ? 0 : 1, $1.regionsMax, $1.member.replica.rawValue)
        }
    }

    private static func choice(
        _ survey: ReplicaSurvey, _ record: VolumeRecord, _ surveys: [ReplicaSurvey]
    ) -> Choice {
        let isInSync = record.inSync.contains(survey.member)
        let departure = record.out.first { $0.member == survey.member }
        let regions = Geometry.regionCount(size: record.size)
        let known = departure?.stablePoint ?? stablePoint(record, surveys)
        let isRolledBack =
            survey.flushed < known || isInSync && survey.promise < record.promised
        var choice = Choice(
            member: survey.member, isInSync: isInSync, isRolledBack: isRolledBack,
            mayLackUnflushed: survey.isRebooted, regionsMax: 0, isMeasured: true)
        guard isInSync || departure != nil else {
            choice.obstacle = .unknownReplica
            return choice
        }
        guard survey.promise <= record.epoch else {
            choice.obstacle = .recordIsOlder
            return choice
        }
        choice.lostSince = departure?.partedEpoch
        if isRolledBack {
            choice.lostSince = min(survey.flushed.epoch, choice.lostSince ?? record.epoch)
        }
        if let since = choice.lostSince {
            // Every member holds every acknowledged write, so each of them gives an upper bound.
            let counts = surveys.compactMap { other -> UInt64? in
                guard other.member != survey.member, record.inSync.contains(other.member) else {
                    return nil
                }
                return other.regions(since: since)
            }
            choice.isMeasured = !counts.isEmpty
            choice.regionsMax = counts.min() ?? regions
        }
        // Those writes are all in regions of its activity log.
        if survey.isRebooted { choice.regionsMax += survey.activeRegions }
        choice.regionsMax = min(choice.regionsMax, regions)
        choice.record = Self.record(
            record, survivor: survey.member, parted: choice.lostSince, surveys)
        return choice
    }

    /// What every member is known to have flushed.
    private static func stablePoint(_ record: VolumeRecord, _ surveys: [ReplicaSurvey])
        -> StablePoint
    {
        surveys.filter { record.inSync.contains($0.member) }.map(\.stable).max() ?? .zero
    }

    /// The record that goes on from `survivor`, whose history is the in-sync set's up to, not
    /// including, the epoch `parted` (nil: all of it).
    ///
    /// The losers' B is where the histories parted. Everything that differs between survivor and a
    /// loser is then in the delta {birth >= B on either side} or active on the loser: what the
    /// survivor missed was written, or re-stamped when its removal was installed, in B or later;
    /// what it holds of writes nobody else has is in its own activity log, which the next Install
    /// re-stamps.
    private static func record(
        _ record: VolumeRecord, survivor: VolumeRecord.Member, parted: Epoch?,
        _ surveys: [ReplicaSurvey]
    ) -> VolumeRecord {
        var next = record
        next.epoch = record.epoch.next
        next.engine = .none
        next.engineEndpoint = ""
        next.change = .salvage
        next.isClean = false
        next.joining = nil
        next.inSync = [survivor]
        next.promised = min(
            next.promised, surveys.first { $0.member == survivor }?.promise ?? .zero)
        // What was frozen after the survivor left it has not got. But what a revert has kept is
        // seen from nowhere else: its name stays, for what the survivor holds of it.
        let head = surveys.first { $0.member == survivor }?.installed?.head ?? record.head
        let tree = record.tree
        next.snapshots.removeAll {
            $0.layer >= head && head < record.head && tree.isSeen($0.layer, from: record.head)
        }
        let parted = parted ?? next.epoch
        next.out = record.out.filter { $0.member != survivor }.map { old in
            var departure = old
            // It followed the in-sync set for longer than the survivor: it holds what is given up.
            if old.partedEpoch > parted { departure.isKept = true }
            departure.partedEpoch = min(old.partedEpoch, parted)
            return departure
        }
        for member in record.inSync where member != survivor {
            let survey = surveys.first { $0.member == member }
            next.out.append(
                VolumeRecord.Departure(
                    member: member, leftEpoch: next.epoch, stablePoint: survey?.stable ?? .zero,
                    partedEpoch: parted, reason: .salvaged, isKept: true))
        }
        next.lineage.append(
            VolumeRecord.Fork(
                epoch: next.epoch, survivor: survivor.replica, partedEpoch: parted))
        return next
    }
}
