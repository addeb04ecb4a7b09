import HapteraCore
import HapteraIO

/// The control verbs `hold token=NUMBER for=MS` and `release token=NUMBER`, for snapshots of
/// several volumes at one instant: `ok` when no change of a client is on the way any more, and
/// `ok` with `held=1` if that was so until the release, `held=0` if the hold had ended by itself.
final class HoldControl {
    private let shell: EngineShell
    private var waiting: [UInt64: ControlRequest] = [:]
    private var nextRequest: UInt64 = 0
    private var wasHeld = false

    init(shell: EngineShell) {
        self.shell = shell
        shell.onHold = { [unowned self] request, result in answer(request, result) }
        shell.onRelease = { [unowned self] _, wasHeld in self.wasHeld = wasHeld }
    }

    func hold(_ request: ControlRequest) {
        guard let token = Self.token(request),
            let milliseconds = request.arguments["for"].flatMap({ UInt64($0) }),
            (1...EngineCore.holdMillisecondsMax).contains(milliseconds),
            request.arguments.count == 2
        else {
            return request.fail(
                "hold needs token=NUMBER, not 0, and for=MILLISECONDS, at most "
                    + "\(EngineCore.holdMillisecondsMax)")
        }
        nextRequest += 1
        waiting[nextRequest] = request
        shell.run(.hold(request: nextRequest, token: token, milliseconds: milliseconds))
    }

    private func answer(_ number: UInt64, _ result: HoldResult) {
        guard let request = waiting.removeValue(forKey: number) else { return }
        switch result {
        case .ok: request.reply()
        case .busy: request.fail("another snapshot of a group is being taken of this volume")
        case .expired:
            request.fail("requests that were on the way did not end in time; try again")
        case .notServing: request.fail("the volume is not served at present; try again")
        }
    }

    func release(_ request: ControlRequest) {
        guard let token = Self.token(request), request.arguments.count == 1 else {
            return request.fail("release needs token=NUMBER, not 0")
        }
        // Answered within the call.
        wasHeld = false
        shell.run(.release(token: token))
        request.reply([("held", wasHeld ? "1" : "0")])
    }

    private static func token(_ request: ControlRequest) -> UInt64? {
        request.arguments["token"].flatMap { UInt64($0) }.flatMap { $0 == 0 ? nil : $0 }
    }

    /// The process ends.
    func abandon(_ reason: String) {
        let requests = waiting.values
        waiting = [:]
        for request in requests { request.fail(reason) }
    }
}
