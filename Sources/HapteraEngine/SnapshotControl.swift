import HapteraCore
import HapteraIO

/// The control verbs `snapshot name=NAME created=MS`, `revert snapshot=NAME keep=NAME created=MS`
/// and `delete-snapshot name=NAME`: ask the core, and answer when it does.
///
/// For snapshots of several volumes at one instant, `snapshot` takes `hold=NUMBER for=MS` as well:
/// it is answered when the head is frozen, and what lies behind that is acknowledged after
/// `release token=NUMBER`, or so long after the request. The reply to that has `held=1` if it was
/// so until then, `held=0` if not.
///
/// The reply to the first two is `ok` with `layer`, and with `existed=1` if a snapshot of that name
/// was there, taken by the same request: so a caller that got no answer, or one in doubt, asks
/// again. So does the caller of a deletion, whose reply is `ok`, with `existed=0` if there was none
/// of that name.
final class SnapshotControl {
    private let shell: EngineShell
    /// For snapshots and for reverts, which take one: the verb tells.
    private var waiting: [UInt64: ControlRequest] = [:]
    private var waitingDeletions: [UInt64: ControlRequest] = [:]
    /// Clients that read the snapshot of a layer, or ask what has changed since.
    var userCount: (LayerID) -> Int = { _ in 0 }
    private var nextToken: UInt64 = 0
    private var wasHeld = false

    init(shell: EngineShell) {
        self.shell = shell
        shell.onSnapshot = { [unowned self] token, layer, result in
            answer(token, layer, result)
        }
        shell.onRelease = { [unowned self] _, wasHeld in self.wasHeld = wasHeld }
        shell.onDeletion = { [unowned self] token, result in answer(token, result) }
    }

    func take(_ request: ControlRequest) {
        let hold = Self.hold(request)
        guard let name = request.arguments["name"], VolumeRecord.isValidSnapshotName(name),
            let created = request.arguments["created"].flatMap({ UInt64($0) }),
            request.arguments.count == (hold == nil ? 2 : 4)
        else {
            return request.fail(
                "snapshot needs created=MILLISECONDS since 1970 and name=NAME, "
                    + "\(VolumeRecord.snapshotNameRule); optional: hold=NUMBER, not 0, with "
                    + "for=MILLISECONDS, at most \(EngineCore.holdMillisecondsMax)")
        }
        nextToken += 1
        waiting[nextToken] = request
        shell.run(.takeSnapshot(token: nextToken, name: name, created: created, hold: hold))
    }
    private static func hold(_ request: ControlRequest) -> SnapshotHold? {
        guard let token = request.arguments["hold"].flatMap({ UInt64($0) }), token != 0,
            let milliseconds = request.arguments["for"].flatMap({ UInt64($0) }),
            (1...EngineCore.holdMillisecondsMax).contains(milliseconds)
        else { return nil }
        return SnapshotHold(token: token, milliseconds: milliseconds)
    }

    func release(_ request: ControlRequest) {
        guard let token = request.arguments["token"].flatMap({ UInt64($0) }), token != 0,
            request.arguments.count == 1
        else { return request.fail("release needs token=NUMBER, not 0") }
        // Answered within the call.
        wasHeld = false
        shell.run(.release(token: token))
        request.reply([("held", wasHeld ? "1" : "0")])
    }

    func revert(_ request: ControlRequest) {
        guard let name = request.arguments["snapshot"], VolumeRecord.isValidSnapshotName(name),
            let kept = request.arguments["keep"], VolumeRecord.isValidSnapshotName(kept),
            let created = request.arguments["created"].flatMap({ UInt64($0) }),
            request.arguments.count == 3
        else {
            return request.fail(
                "revert needs created=MILLISECONDS since 1970, snapshot=NAME and keep=NAME, "
                    + VolumeRecord.snapshotNameRule)
        }
        // One that has happened is only brought to its end.
        let users = shell.snapshots.contains { $0.name == kept } ? 0 : userCount(.head)
        guard users == 0 else {
            return request.fail(
                "the volume is in use: \(users) "
                    + (users == 1 ? "client is connected" : "clients are connected")
                    + ", and what they remember of it would be wrong; disconnect them first")
        }
        nextToken += 1
        waiting[nextToken] = request
        shell.run(.revert(token: nextToken, target: name, kept: kept, created: created))
    }

    private func answerRevert(
        _ request: ControlRequest, _ layer: LayerID, _ result: SnapshotResult
    ) {
        let fields = [("layer", String(layer.rawValue))]
        switch result {
        case .ok: request.reply(fields)
        case .exists: request.reply(fields + [("existed", "1")])
        case .notThere:
            request.fail("the volume has no snapshot '\(request.arguments["snapshot"] ?? "")'")
        case .nameTaken:
            request.fail(
                "a snapshot '\(request.arguments["keep"] ?? "")' is there already, and is not what "
                    + "such a revert has kept: choose another name")
        case .tooMany:
            request.fail(
                "the volume's record has no room for another revert, or for the snapshot that one "
                    + "keeps: delete snapshots, above all those that reverts have kept")
        case .tooManyLayers:
            request.fail(
                "the volume was not reverted: a replica has as many layers as it can, and "
                    + Self.mergesText)
        case .notServing, .notHeld, .busy:
            request.fail("the volume was not reverted: " + shell.notServingText)
        case .inDoubt:
            request.fail(
                "the engine stopped before it knew \(SnapshotResult.revertDoubtText): ask the "
                    + "next engine for the same again")
        }
    }

    private static let mergesText =
        "those of deleted snapshots have to be merged first (retiredLayers in its status); try "
        + "again later"

    private func answer(_ token: UInt64, _ layer: LayerID, _ result: SnapshotResult) {
        guard let request = waiting.removeValue(forKey: token) else { return }
        if request.verb == "revert" { return answerRevert(request, layer, result) }
        let fields = [("layer", String(layer.rawValue))]
        switch result {
        case .ok: request.reply(fields)
        case .exists: request.reply(fields + [("existed", "1")])
        case .tooMany:
            request.fail("the volume's record has no room for another snapshot: delete some")
        case .tooManyLayers:
            request.fail(
                "no snapshot was taken: a replica has as many layers as it can, and "
                    + Self.mergesText)
        case .notHeld:
            request.fail(
                "no snapshot was taken: its replicas, or the metadata store, did not come to it in "
                    + "time; try again")
        case .busy:
            request.fail("another snapshot of a group is being taken of this volume; try again")
        case .notServing, .notThere, .nameTaken:
            request.fail("no snapshot was taken: " + shell.notServingText)
        case .inDoubt:
            request.fail(
                "the engine stopped before it knew \(SnapshotResult.doubtText): ask the next "
                    + "engine for the same name again")
        }
    }

    func delete(_ request: ControlRequest) {
        guard let name = request.arguments["name"], VolumeRecord.isValidSnapshotName(name),
            request.arguments.count == 1
        else {
            return request.fail("delete-snapshot needs name=NAME, " + VolumeRecord.snapshotNameRule)
        }
        if let there = shell.snapshots.first(where: { $0.name == name }) {
            let users = userCount(there.layer)
            guard users == 0 else {
                return request.fail(
                    "snapshot '\(name)' is in use: \(users) "
                        + (users == 1
                            ? "client reads it, or what changed since; disconnect it first"
                            : "clients read it, or what changed since; disconnect them first"))
            }
        }
        nextToken += 1
        waitingDeletions[nextToken] = request
        shell.run(.deleteSnapshot(token: nextToken, name: name))
    }

    private func answer(_ token: UInt64, _ result: DeletionResult) {
        guard let request = waitingDeletions.removeValue(forKey: token) else { return }
        switch result {
        case .ok: request.reply()
        case .notThere: request.reply([("existed", "0")])
        case .notServing:
            request.fail("the snapshot was not deleted: " + shell.notServingText)
        case .inDoubt:
            request.fail(
                "the engine stopped before it knew \(SnapshotResult.deletionDoubtText): ask the "
                    + "next engine again")
        }
    }

    /// The process ends without the core's answers.
    func abandon(_ reason: String) {
        let requests = waiting.values
        waiting = [:]
        for request in requests {
            let doubt =
                request.verb == "revert"
                ? SnapshotResult.revertDoubtText : SnapshotResult.doubtText
            request.fail("\(reason); \(doubt) is not known: ask again")
        }
        let deletions = waitingDeletions.values
        waitingDeletions = [:]
        for request in deletions {
            request.fail("\(reason); \(SnapshotResult.deletionDoubtText) is not known: ask again")
        }
    }
}
