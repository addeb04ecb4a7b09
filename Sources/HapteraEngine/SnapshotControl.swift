import HapteraCore
import HapteraIO

/// The control verb `snapshot name=NAME created=MS`: asks the core, and answers when it does.
///
/// The reply is `ok` with `layer`, and with `existed=1` if a snapshot of that name was there: so a
/// caller that got no answer, or one in doubt, asks again.
final class SnapshotControl {
    private let shell: EngineShell
    private var waiting: [UInt64: ControlRequest] = [:]
    private var nextToken: UInt64 = 0

    init(shell: EngineShell) {
        self.shell = shell
        shell.onSnapshot = { [unowned self] token, layer, result in
            answer(token, layer, result)
        }
    }

    func take(_ request: ControlRequest) {
        guard let name = request.arguments["name"], VolumeRecord.isValidSnapshotName(name),
            let created = request.arguments["created"].flatMap({ UInt64($0) }),
            request.arguments.count == 2
        else {
            return request.fail(
                "snapshot needs created=MILLISECONDS since 1970 and name=NAME, "
                    + VolumeRecord.snapshotNameRule)
        }
        nextToken += 1
        waiting[nextToken] = request
        shell.run(.takeSnapshot(token: nextToken, name: name, created: created))
    }

    private func answer(_ token: UInt64, _ layer: LayerID, _ result: SnapshotResult) {
        guard let request = waiting.removeValue(forKey: token) else { return }
        let fields = [("layer", String(layer.rawValue))]
        switch result {
        case .ok: request.reply(fields)
        case .exists: request.reply(fields + [("existed", "1")])
        case .tooMany:
            request.fail("the volume's record has no room for another snapshot")
        case .notServing:
            request.fail(
                "no snapshot was taken: the volume is not served at present, or too many requests "
                    + "for snapshots wait; try again")
        case .inDoubt:
            request.fail(
                "the engine stopped before it knew \(SnapshotResult.doubtText): ask the next "
                    + "engine for the same name again")
        }
    }

    /// The process ends without the core's answers.
    func abandon(_ reason: String) {
        let requests = waiting.values
        waiting = [:]
        for request in requests {
            request.fail("\(reason); \(SnapshotResult.doubtText) is not known: ask again")
        }
    }
}
