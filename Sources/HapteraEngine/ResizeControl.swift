import HapteraCore
import HapteraIO

/// The control verb `resize size=BYTES`: asks the core, and answers when it does: `ok` with `size`,
/// and with `existed=1` if the volume was as large already. A caller that got no answer, or one in
/// doubt, asks again.
final class ResizeControl {
    private let shell: EngineShell
    private var waiting: [UInt64: (request: ControlRequest, size: UInt64)] = [:]
    private var nextToken: UInt64 = 0

    init(shell: EngineShell) {
        self.shell = shell
        shell.onResize = { [unowned self] token, result, replica in answer(token, result, replica) }
    }

    func resize(_ request: ControlRequest) {
        guard let size = request.arguments["size"].flatMap({ UInt64($0) }),
            request.arguments.count == 1, VolumeRecord.isValidSize(size)
        else {
            return request.fail(
                "resize needs size=BYTES, a multiple of \(Geometry.blockSize), at most "
                    + "\(Geometry.volumeSizeMax)")
        }
        nextToken += 1
        waiting[nextToken] = (request, size)
        shell.run(.resize(token: nextToken, size: size))
    }

    private func answer(_ token: UInt64, _ result: ResizeResult, _ replica: ReplicaID) {
        guard let (request, size) = waiting.removeValue(forKey: token) else { return }
        let fields = [("size", String(size))]
        switch result {
        case .ok: request.reply(fields)
        case .exists: request.reply(fields + [("existed", "1")])
        case .smaller:
            request.fail(
                "the volume has \(shell.size) bytes and never shrinks: what is beyond \(size) "
                    + "would be lost")
        case .noSpace:
            request.fail(
                "replica \(replica.text) has no space to grow: free some on its node, or replace "
                    + "it; the volume keeps its size")
        case .refused:
            request.fail(
                "replica \(replica.text) cannot have a file of \(size) bytes, or failed to make "
                    + "it (its log says why); the volume keeps its size")
        case .tooMany:
            request.fail(
                "the volume has grown too often between snapshots that are left: delete some")
        case .notServing:
            request.fail("the volume keeps its size: " + shell.notServingText)
        case .inDoubt:
            request.fail(
                "the engine stopped before it knew \(SnapshotResult.resizeDoubtText): ask the "
                    + "next engine again")
        }
    }

    /// The process ends without the core's answers.
    func abandon(_ reason: String) {
        let requests = waiting.values
        waiting = [:]
        for (request, _) in requests {
            request.fail("\(reason); \(SnapshotResult.resizeDoubtText) is not known: ask again")
        }
    }
}
