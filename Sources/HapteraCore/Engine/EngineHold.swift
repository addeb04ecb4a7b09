// Rule S, groups: a snapshot of several volumes at one instant.
//
// Whoever wants one has the engine of each freeze its head with a hold, and when all have, releases
// them. From the step in which an engine freezes its head until its release, it acknowledges
// nothing that lies behind the freeze. So if a change was acknowledged behind its volume's freeze,
// that was after the first release, when all were frozen, and nothing asked for because of it is in
// any of the snapshots (invariant 26). A hold ends by itself; the release tells whether it had, and
// then the group is none.
//
// Only the acknowledgement waits: the changes are sent, and so is whatever the new layer costs at
// first. Their range stays locked, so nobody reads them before; other reads go on. The store's
// answer is no part of it: until that comes, everything goes on in front of the freeze.

/// What is asked for with a snapshot of a group.
package struct SnapshotHold: BitwiseCopyable, Sendable {
    /// Not 0.
    package var token: UInt64
    /// From the request on; 1 to `EngineCore.holdMillisecondsMax`.
    package var milliseconds: UInt64
    package init(token: UInt64, milliseconds: UInt64) {
        self.token = token
        self.milliseconds = milliseconds
    }
}

/// Acknowledgements wait, or will once the head is frozen. Nobody has two.
///
///     asked -> holding -> released, ended
///         \-------------> ended: the head was not frozen in time, or not at all
struct ClientHold {
    var token: UInt64
    var until: Instant
    /// What lies above this layer is not acknowledged; nil: it is not frozen yet.
    var frozen: LayerID?
}

extension EngineCore {
    package static let holdMillisecondsMax: UInt64 = 10_000

    func beginHold(_ asked: SnapshotHold) {
        precondition(asked.token != 0 && hold == nil)
        precondition((1...Self.holdMillisecondsMax).contains(asked.milliseconds))
        hold = ClientHold(
            token: asked.token, until: now.adding(milliseconds: asked.milliseconds))
    }
    /// The request of this hold can be done yet.
    func isHoldOpen(_ token: UInt64) -> Bool {
        hold.map { $0.token == token && now < $0.until } ?? false
    }

    /// The record says so: what is sent from this step on lies behind the freeze of `layer`.
    func startHolding(_ token: UInt64, above layer: LayerID) {
        guard token != 0, isHoldOpen(token) else { return }
        hold?.frozen = layer
    }
    /// Whether the answer to a change waits for the release.
    func isHeldBack(_ index: Int) -> Bool {
        guard let layer = hold?.frozen, !mutations.contains(.heldIsAcknowledged) else {
            return false
        }
        return slots[index].layer > layer
    }

    /// After every event, while there is one.
    func advanceHold() {
        if let hold, now >= hold.until { endHold() }
    }
    /// Answers whether it was held until now.
    func releaseHold(_ token: UInt64) {
        let wasHeld = isHoldOpen(token) && hold?.frozen != nil
        actions.append(.released(token: token, wasHeld: wasHeld))
        if hold?.token == token { endHold() }
    }
    /// Its snapshot was answered with something else than a freeze.
    func giveUpHold(_ token: UInt64) {
        if token != 0, hold?.token == token, hold?.frozen == nil { hold = nil }
    }
    private func endHold() {
        let wasHolding = hold?.frozen != nil
        hold = nil
        if wasHolding, phase == .serving { recheckAll() }
    }
}
