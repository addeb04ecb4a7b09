// Rule S, groups: a snapshot of several volumes at one instant.
//
// Whoever wants one has the engines of all of them hold their clients' changes, then has each
// freeze its head, then releases them. Between the answer to the first and the release no engine
// has acknowledged a change. So if one was acknowledged behind its volume's freeze, that was after
// the release, and nothing asked for because of it is in any of the snapshots (invariant 26). A
// hold ends by itself; the release tells whether it had, and then the group is none.
//
// What is on the way when a hold begins ends first, and is in the snapshot. Reads go on.

/// Clients' changes wait. Nobody has two.
struct ClientHold {
    var token: UInt64
    /// The request that waits for what is on the way to end; nil: it was answered.
    var request: UInt64?
    var until: Instant
}

extension EngineCore {
    package static let holdMillisecondsMax: UInt64 = 10_000

    func holdChanges(_ request: UInt64, token: UInt64, milliseconds: UInt64) {
        precondition((1...Self.holdMillisecondsMax).contains(milliseconds))
        guard phase == .serving, !isDetaching else { return answerHold(request, .notServing) }
        guard hold == nil else { return answerHold(request, .busy) }
        hold = ClientHold(
            token: token, request: request, until: now.adding(milliseconds: milliseconds))
        updateHolding()
    }
    func answerHold(_ request: UInt64, _ result: HoldResult) {
        actions.append(.held(request: request, result))
    }

    /// After every event, while there is one.
    func advanceHold() {
        guard let current = hold else { return }
        if now >= current.until {
            if let request = current.request { answerHold(request, .expired) }
            return endHold()
        }
        guard let request = current.request, phase == .serving, !hasChangeAtWork else { return }
        hold?.request = nil
        answerHold(request, .ok)
    }
    private var hasChangeAtWork: Bool {
        (0..<slotsUsed).contains {
            slots[$0].use == .client && slots[$0].operation.isChange
                && slots[$0].phase != .waiting && !slots[$0].isAcknowledged
        }
    }

    /// Answers whether it was held until now.
    func releaseHold(_ token: UInt64) {
        let isHeld = isHeld(token)
        actions.append(.released(token: token, wasHeld: isHeld))
        if hold?.token == token { endHold() }
    }
    func isHeld(_ token: UInt64) -> Bool {
        guard let hold else { return false }
        return hold.token == token && hold.request == nil && now < hold.until
    }
    private func endHold() {
        hold = nil
        updateHolding()
    }
    func abandonHold() {
        if let request = hold?.request { answerHold(request, .notServing) }
        hold = nil
    }

    /// Some requests wait, be it for a revert or in a hold; those that do not any more begin.
    func updateHolding() {
        let wasHolding = isHolding
        isHolding = isReverting || hold != nil
        if wasHolding { startAll() }
    }
    /// Whether a hold or a revert lets a client's operation begin.
    func mayBegin(_ index: Int) -> Bool {
        guard slots[index].operation.layer == .head else { return true }
        return !isReverting && (hold == nil || !slots[index].operation.isChange)
    }
}

extension Operation {
    fileprivate var isChange: Bool { kind == .write || kind == .trim || kind == .writeZeroes }
}
