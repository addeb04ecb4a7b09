/// What a run went through: checks made, faults injected, turns the protocol took. A check that is
/// never made proves nothing, and a fault that never happens finds nothing.
package struct Coverage: Sendable {
    /// What happens in a healthy or troubled life of a volume, as engines and records tell it.
    package enum Turn: Int, CaseIterable, Sendable {
        case takeover
        case resolution
        case removal
        case join
        case joinFailed
        case promotion
        case reinstatement
        case salvage
        case detach
        case repair
        case stall
        case refusal
        case doubtfulBytesKept
        case storeUnavailable
        case changeRefused
        /// A replica whose files are damaged beside its data is made anew.
        case damagedReplaced
        /// A snapshot or revert is refused, since a member has as many layers as it may have.
        case layersFull
        case reconnection
        case lossAllowed
        case lossAccepted
        case reconstruction
        case snapshot
        case hold
        case deletion
        case growth
        case revert
        case scrub
        case clone
        /// A clone begins that is a volume of its own.
        case second
        /// A clone of that one, when its source is gone.
        case third
        /// One of two volumes that share layers is deleted.
        case sourceDeleted
        case cloneDeleted
        /// The bytes of a shared layer are written again, as they were; where some have changed by
        /// themselves.
        case sharedRewrite
        case sharedRepair
        /// A replica is filled from others that share layers with another volume.
        case sharedFill
        case mergeDown
        /// A deleted layer stays below the head, being the larger one; what the head hides goes.
        case layerStays
        case hidden
        /// A member leaves because it is slow.
        case slowRemoval
        /// A read is asked of a second member as well.
        case hedgedRead
        /// Troubles have ended, but one host is still dead or cut off: the others serve without it.
        case servedWithoutOne
    }
    /// Those of `docs/replication.md`.
    package static let numbers = Array(1...36)

    /// Times each invariant was evaluated, by number.
    package private(set) var invariants = [Int](repeating: 0, count: 37)
    /// Times each kind of fault was injected, by `FaultPlan.Kind`.
    private(set) var faults = [Int](repeating: 0, count: FaultPlan.Kind.allCases.count)
    private var turns = [Int](repeating: 0, count: Turn.allCases.count)

    package init() {}

    mutating func evaluated(_ invariant: Int) { invariants[invariant] += 1 }
    mutating func injected(_ kind: FaultPlan.Kind) { faults[kind.rawValue] += 1 }
    mutating func took(_ turn: Turn) { turns[turn.rawValue] += 1 }
    package func count(_ turn: Turn) -> Int { turns[turn.rawValue] }
    /// Kinds of faults that were never injected.
    package var faultsMissing: [String] {
        FaultPlan.Kind.allCases.filter { faults[$0.rawValue] == 0 }.map { "\($0)" }
    }

    package mutating func add(_ other: Coverage) {
        for index in invariants.indices { invariants[index] += other.invariants[index] }
        for index in faults.indices { faults[index] += other.faults[index] }
        for index in turns.indices { turns[index] += other.turns[index] }
    }

    /// Lines for people: every invariant, fault and turn with its count.
    package var lines: [String] {
        Self.numbers.map { "invariant \($0): \(invariants[$0])" }
            + FaultPlan.Kind.allCases.map { "fault \($0): \(faults[$0.rawValue])" }
            + Turn.allCases.map { "turn \($0): \(turns[$0.rawValue])" }
    }
}
