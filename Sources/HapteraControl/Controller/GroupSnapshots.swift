import HapteraAPI
import HapteraCore
import HapteraHost

/// Snapshots of several volumes at one instant: of all of them or of none.
///
/// 1. the group is noted                 -> a controller that starts anew undoes it
/// 2. every engine freezes its head, and acknowledges nothing behind that from then on
/// 3. every engine releases its clients, and says that it was so until then
/// 4. the note is deleted                -> it is a group
///
/// What fails before the last step takes every snapshot of it back. Only then is waited until all
/// is durable: what is left of a group after a crash is whole.
extension Controller {
    package static let groupVolumesMax = 16
    static let groupLabel = "\(Labels.reservedPrefix)/group"
    /// Longer than all of it takes; clients wait no longer, whatever happens.
    static let groupHoldMilliseconds: UInt64 = 3000
    /// An engine that was asked for a snapshot may still take it so long afterwards.
    static let groupSettledMilliseconds: Int64 = 60_000
    static let groupRetryMilliseconds: Int64 = 15_000
    /// For each of its snapshots: it is tried again.
    static let groupUndoMilliseconds: UInt64 = 15_000

    private struct Member: Sendable {
        let stored: StoredVolume
        let node: String
    }

    /// In the order of the volumes asked for. A name that is a group of just these volumes is
    /// brought to its end.
    package func createGroupSnapshot(
        _ request: Haptera_V1_CreateGroupSnapshotRequest
    ) async throws -> [Haptera_V1_Snapshot] {
        try Self.check(request.name)
        if let objection = Labels.objection(to: request.labels) {
            throw ControlError(.invalid, objection)
        }
        let volumes = request.volumes
        guard (1...Self.groupVolumesMax).contains(volumes.count),
            Set(volumes).count == volumes.count
        else {
            throw ControlError(
                .invalid, "a group has 1 to \(Self.groupVolumesMax) volumes, each named once")
        }
        guard try await !isGroup(request) else { return try await finish(request) }
        let uses = try await enter(request)
        do {
            let snapshots = try await take(request, uses)
            for use in uses { await leave(use) }
            return snapshots
        } catch {
            for use in uses { await leave(use) }
            throw error
        }
    }

    /// An engine of each volume: of those that are not attached, one for so long.
    private func enter(
        _ request: Haptera_V1_CreateGroupSnapshotRequest
    ) async throws -> [EngineUse] {
        let deadline =
            ContinuousClock.now + .milliseconds(Self.timeout(request.timeoutMilliseconds))
        return try await withThrowingTaskGroup(of: EngineUse.self) { group in
            for volume in request.volumes {
                group.addTask {
                    try await self.enter(volume, takingGroup: request.name, by: deadline)
                }
            }
            var uses: [EngineUse] = []
            var failure: (any Error)?
            while let result = await group.nextResult() {
                switch result {
                case .success(let use): uses.append(use)
                case .failure(let error):
                    failure = failure ?? error
                    group.cancelAll()
                }
            }
            guard let failure else { return uses }
            for use in uses { await leave(use) }
            throw failure
        }
    }

    private func enter(
        _ volume: String, takingGroup name: String, by deadline: ContinuousClock.Instant
    ) async throws -> EngineUse {
        try await enter(
            volume, for: "a snapshot of a group is being taken", by: deadline,
            isNeeded: { try isToBeTaken(name, of: $0) })
    }

    private func take(
        _ request: Haptera_V1_CreateGroupSnapshotRequest, _ uses: [EngineUse]
    ) async throws -> [Haptera_V1_Snapshot] {
        let members = uses.compactMap { use in
            use.node.map { Member(stored: use.stored, node: $0) }
        }
        for member in members { try await tasks.requireConnected(member.node) }
        let token = UInt64.random(in: 1...UInt64(Int64.max))
        let group = GroupRow(
            id: hexadecimal(token), snapshot: request.name,
            volumes: request.volumes.joined(separator: ","), timeMilliseconds: store.clock())
        try await store.beginGroup(group)
        groupsUnderWay.insert(group.id)
        defer { groupsUnderWay.remove(group.id) }
        // Nobody is told yet: who looks at everything anew would hold up who is in a hurry.
        do {
            for member in members {
                guard let volume = member.stored.record?.volume else { continue }
                try await store.labelSnapshot(
                    request.name, of: volume, request.labels,
                    reserved: [Self.groupLabel: group.id])
            }
            try await freeze(members, request.name, token)
        } catch {
            let isUndone = await undo(group)
            changes.notify()
            guard !isUndone, let failure = error as? ControlError else { throw error }
            throw ControlError(
                failure.code,
                failure.message + "; what was taken of it is deleted when its engine can be asked")
        }
        try await store.endGroup(group)
        changes.notify()
        return try await finish(request)
    }

    /// Whether the name is one of just these volumes. Throws if it is another's in one of them.
    private func isGroup(_ request: Haptera_V1_CreateGroupSnapshotRequest) async throws -> Bool {
        var groups: [String?] = []
        for volume in request.volumes {
            let found = try await existing(request.name, of: volume)
            groups.append(found.map { $0.labels[Self.groupLabel] ?? "" })
        }
        let unfinished = try await store.groups()
        let volumes = request.volumes.joined(separator: ",")
        // Who asks again because an answer was lost is not told that the name is taken.
        let isUnderWay = unfinished.contains {
            $0.snapshot == request.name && $0.volumes == volumes
                && (groupsUnderWay.contains($0.id) || groups.contains($0.id))
        }
        if isUnderWay {
            throw ControlError(
                .unavailable,
                "snapshot '\(request.name)' of the group is being taken, or taken back after a "
                    + "failure; try again")
        }
        if groups.allSatisfy({ $0 == nil }) { return false }
        if let first = groups[0], !first.isEmpty, groups.allSatisfy({ $0 == first }),
            !unfinished.contains(where: { $0.id == first })
        {
            return true
        }
        let place = groups.firstIndex { $0 != nil } ?? 0
        throw Self.refused(
            "volume '\(request.volumes[place])' has a snapshot '\(request.name)' already, which is "
                + "not of this group: choose another name")
    }

    private func freeze(_ members: [Member], _ name: String, _ token: UInt64) async throws {
        let created = UInt64(clamping: store.clock())
        do {
            try await each(members) {
                $0.takeSnapshot.volumeID = $1.id
                $0.takeSnapshot.clientGeneration = UInt64($1.clientGeneration)
                $0.takeSnapshot.name = name
                $0.takeSnapshot.createdUnixMilliseconds = created
                $0.takeSnapshot.timeoutMilliseconds = Self.groupHoldMilliseconds
                $0.takeSnapshot.hold = token
                $0.takeSnapshot.holdMilliseconds = Self.groupHoldMilliseconds
            }
        } catch {
            try? await release(members, token)
            throw error
        }
        try await release(members, token)
    }
    /// Throws if one was not held until now.
    private func release(_ members: [Member], _ token: UInt64) async throws {
        try await each(members) {
            $0.releaseChanges.volumeID = $1.id
            $0.releaseChanges.clientGeneration = UInt64($1.clientGeneration)
            $0.releaseChanges.token = token
        }
    }

    /// Asks all at once, and waits for all; throws what the first failed with.
    private func each(
        _ members: [Member],
        _ fill: @escaping @Sendable (inout Haptera_V1_AgentTask, VolumeRow) -> Void
    ) async throws {
        let tasks = tasks
        try await withThrowingTaskGroup(of: Void.self) { group in
            for member in members {
                group.addTask {
                    let timeout = Self.patience(Self.groupHoldMilliseconds)
                    do {
                        _ = try await tasks.ask(member.node, timeout: timeout, doubt: .inDoubt) {
                            fill(&$0, member.stored.volume)
                        }
                    } catch let error as ControlError {
                        // All of it is taken back. Not `unavailable`, which is asked again at once:
                        // every attempt holds the clients of all the others.
                        throw ControlError(
                            error.code == .inDoubt ? .precondition : error.code,
                            "no snapshot of the group was taken: volume "
                                + "'\(member.stored.volume.name)': \(error.message)")
                    }
                }
            }
            var failure: (any Error)?
            while let result = await group.nextResult() {
                if case .failure(let error) = result { failure = failure ?? error }
            }
            if let failure { throw failure }
        }
    }

    /// Waits until all is durable.
    private func finish(
        _ request: Haptera_V1_CreateGroupSnapshotRequest
    ) async throws -> [Haptera_V1_Snapshot] {
        try await withThrowingTaskGroup(of: (Int, Haptera_V1_Snapshot).self) { group in
            for (place, volume) in request.volumes.enumerated() {
                group.addTask {
                    var one = Haptera_V1_CreateSnapshotRequest()
                    one.volume = volume
                    one.name = request.name
                    one.labels = request.labels
                    one.timeoutMilliseconds = request.timeoutMilliseconds
                    return (place, try await self.createSnapshot(one))
                }
            }
            var snapshots: [(Int, Haptera_V1_Snapshot)] = []
            for try await snapshot in group { snapshots.append(snapshot) }
            return snapshots.sorted { $0.0 < $1.0 }.map(\.1)
        }
    }

    // MARK: Groups that came to nothing

    /// Takes back what was taken of it. True: nothing is left.
    private func undo(_ group: GroupRow) async -> Bool {
        var isDone = true
        for volume in group.volumes.split(separator: ",").map(String.init) {
            do {
                guard let found = try await existing(group.snapshot, of: volume),
                    found.labels[Self.groupLabel] == group.id
                else { continue }
                var request = Haptera_V1_DeleteSnapshotRequest()
                request.volume = volume
                request.name = group.snapshot
                request.timeoutMilliseconds = Self.groupUndoMilliseconds
                try await deleteSnapshot(request)
            } catch let error as ControlError where error.code == .notFound {
                continue
            } catch {
                isDone = false
            }
        }
        return isDone
    }

    /// One round: those that a controller before this one, or an engine that was late, has left.
    package func undoGroups() async throws {
        guard store.clock() >= groupsRetryAt else { return }
        for group in try await store.groups() where !groupsUnderWay.contains(group.id) {
            guard try await knowsNodes else { return }
            let caller = Caller(actor: "group/\(group.snapshot)")
            let isDone = await Caller.$current.withValue(caller) { await undo(group) }
            // A reader, or a node that is away, may hold it up for long.
            if !isDone { groupsRetryAt = store.clock() + Self.groupRetryMilliseconds }
            let age = store.clock() - group.timeMilliseconds
            if isDone, age >= Self.groupSettledMilliseconds { try await store.endGroup(group) }
        }
    }
}
