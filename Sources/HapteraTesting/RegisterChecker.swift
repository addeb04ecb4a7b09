/// One thing that happened to one register (a sector of the volume), in the order it happened.
package struct RegisterEvent {
    package enum Kind {
        case writeInvoked(ValueID)
        /// `isDurable`: the write carried FUA.
        case writeReturned(isDurable: Bool)
        /// With the value it is going to return.
        case readInvoked(ValueID)
        case readReturned
        case flushInvoked
        case flushReturned
        /// What was acknowledged and not flushed may be gone from here on.
        case lossAllowed
        /// Anything it ever held may be back.
        case salvaged
        /// It holds this, durably, and what was asked for before never happens any more.
        case reverted(ValueID)
    }
    package var kind: Kind
    /// The operation it belongs to.
    package var operation: Int
    package init(_ kind: Kind, operation: Int) {
        self.kind = kind
        self.operation = operation
    }
}

/// Decides whether a register's history is linearizable, with the crash semantics of a disk
/// (invariants 9 and 33): a write that was never acknowledged happens once, at any time after it
/// was asked for, or never; what was acknowledged stays, except that `lossAllowed` may take back
/// what no flush covered.
///
/// Keeps the set of all states the register may be in: its value, and which of the pending
/// operations have happened. An operation is made to happen as late as possible: when it returns,
/// or when another needs it. (Wing and Gong 1993, with Lowe's just-in-time refinement, 2017.)
package struct RegisterChecker {
    private struct State: Hashable {
        var value: ValueID
        /// Pending operations that have happened, by slot.
        var happened: UInt64 = 0
    }
    private struct Pending {
        var operation: Int
        var value: ValueID
        var isRead: Bool
        var willReturn: Bool
    }
    private struct Flush {
        var operation: Int
        var order: Int
        /// What the register may hold, on a disk, if this flush is the last that counted.
        var candidates: [ValueID]
    }

    private var states: [State]
    private var pending: [Pending?] = []
    private var flushes: [Flush] = []
    private var floorOrder = -1
    private var candidates: [ValueID]
    /// Every value ever written.
    private var past: [ValueID] = []
    private var hasUnseenWrites = false
    private var order = 0
    private static let statesMax = 4000
    /// Too many possibilities: the rest of the history is not judged.
    package private(set) var gaveUp = false

    package init(initial: ValueID = 0) {
        states = [State(value: initial)]
        candidates = [initial]
    }

    /// The index of the first event that cannot be explained, or nil. Operations with an invocation
    /// and no return are pending for ever.
    package mutating func check(_ events: [RegisterEvent]) -> Int? {
        var returning: Set<Int> = []
        var read: Set<ValueID> = [0]
        for event in events {
            switch event.kind {
            case .writeReturned, .readReturned, .flushReturned: returning.insert(event.operation)
            case .readInvoked(let value): read.insert(value)
            default: break
            }
        }
        for (index, event) in events.enumerated() {
            let returns = returning.contains(event.operation)
            // A write nobody waits for and nobody saw may as well never have happened.
            if case .writeInvoked(let value) = event.kind, !returns, !read.contains(value) {
                hasUnseenWrites = true
                continue
            }
            if case .readInvoked = event.kind, !returns { continue }
            apply(event, returns: returns)
            if gaveUp { return nil }
            if states.isEmpty { return index }
        }
        return nil
    }

    private mutating func apply(_ event: RegisterEvent, returns: Bool) {
        order += 1
        switch event.kind {
        case .writeInvoked(let value):
            remember(value)
            flushes.append(
                Flush(
                    operation: event.operation, order: order,
                    candidates: unhappenedWrites() + [value]))
            begin(event.operation, value, isRead: false, returns: returns)
        case .readInvoked(let value):
            begin(event.operation, value, isRead: true, returns: returns)
            settleReads()
        case .writeReturned(let isDurable):
            finish(event.operation)
            raiseFloor(event.operation, counts: isDurable)
        case .readReturned:
            finish(event.operation)
        case .flushInvoked:
            flushes.append(
                Flush(
                    operation: event.operation, order: order,
                    candidates: states.map(\.value) + unhappenedWrites()))
        case .flushReturned:
            raiseFloor(event.operation, counts: true)
        case .reverted(let value):
            for slot in pending.indices where pending[slot]?.isRead == false { pending[slot] = nil }
            revert(to: value)
        case .lossAllowed, .salvaged:
            // A write torn on every copy of a block that was trimmed before leaves whatever bytes
            // lie there, also some from before the trim.
            var possible = candidates + states.map(\.value)
            if case .salvaged = event.kind { possible += past + [0] }
            if possible.contains(0), hasUnseenWrites || possible.contains(where: { $0 != 0 }) {
                possible += past
            }
            var values: [ValueID] = []
            for value in possible where !values.contains(value) { values.append(value) }
            // A read that was satisfied before the loss stays so.
            var satisfied: UInt64 = 0
            for (slot, entry) in pending.enumerated() where entry?.isRead == true {
                satisfied |= states.reduce(0) { $0 | $1.happened } & (1 << slot)
            }
            for index in flushes.indices { flushes[index].candidates += values }
            states = values.map { withReads(State(value: $0, happened: satisfied)) }
        }
    }

    private mutating func revert(to value: ValueID) {
        var satisfied: UInt64 = 0
        for (slot, entry) in pending.enumerated() where entry?.isRead == true {
            satisfied |= states.reduce(0) { $0 | $1.happened } & (1 << slot)
        }
        states = [withReads(State(value: value, happened: satisfied))]
        candidates = [value]
        // A clone's first: nobody wrote it here, and a salvage may bring it back (seed 921).
        if value != 0, !past.contains(value) { past.append(value) }
        flushes = []
        floorOrder = order
        hasUnseenWrites = false
    }

    // MARK: What a disk may hold

    private mutating func remember(_ value: ValueID) {
        candidates.append(value)
        past.append(value)
        for index in flushes.indices { flushes[index].candidates.append(value) }
    }
    private func unhappenedWrites() -> [ValueID] {
        pending.compactMap { $0 }.filter { !$0.isRead }.map(\.value)
    }
    private mutating func raiseFloor(_ operation: Int, counts: Bool) {
        guard let index = flushes.firstIndex(where: { $0.operation == operation }) else { return }
        let flush = flushes.remove(at: index)
        guard counts, flush.order > floorOrder else { return }
        floorOrder = flush.order
        candidates = flush.candidates
    }

    // MARK: Pending operations

    private mutating func begin(_ operation: Int, _ value: ValueID, isRead: Bool, returns: Bool) {
        let entry = Pending(
            operation: operation, value: value, isRead: isRead, willReturn: returns)
        if let slot = pending.firstIndex(where: { $0 == nil }) {
            pending[slot] = entry
        } else if pending.count < 64 {
            pending.append(entry)
        } else {
            gaveUp = true
        }
    }

    /// Marks the pending reads that the states' values satisfy: never a disadvantage.
    private mutating func settleReads() {
        for index in states.indices { states[index] = withReads(states[index]) }
    }
    private func withReads(_ state: State) -> State {
        var state = state
        for (slot, entry) in pending.enumerated() {
            if let entry, entry.isRead, entry.value == state.value { state.happened |= 1 << slot }
        }
        return state
    }

    /// The operation returns: it must have happened in every state that remains.
    private mutating func finish(_ operation: Int) {
        guard let slot = pending.firstIndex(where: { $0?.operation == operation }) else { return }
        let bit: UInt64 = 1 << slot
        var results: [State] = []
        var seen: Set<State> = []
        for start in states {
            for var result in closure(from: start, until: bit) {
                result.happened &= ~bit
                if seen.insert(result).inserted { results.append(result) }
            }
            if results.count > Self.statesMax {
                gaveUp = true
                return
            }
        }
        pending[slot] = nil
        states = results
    }

    /// The states reachable from `start` by letting pending writes happen, in which `bit` has.
    private func closure(from start: State, until bit: UInt64) -> [State] {
        if start.happened & bit != 0 { return [start] }
        var results: [State] = []
        var frontier = [start]
        var seen: Set<State> = [start]
        let wanted = pending.compactMap { $0 }.filter(\.isRead).map(\.value)
        while let state = frontier.popLast() {
            for (slot, entry) in pending.enumerated() {
                let own: UInt64 = 1 << slot
                guard let entry, !entry.isRead, state.happened & own == 0 else { continue }
                // To let it happen early only helps if it returns, or if somebody reads it.
                guard own == bit || entry.willReturn || wanted.contains(entry.value) else {
                    continue
                }
                let next = withReads(
                    State(value: entry.value, happened: state.happened | own))
                guard seen.insert(next).inserted else { continue }
                if next.happened & bit != 0 { results.append(next) } else { frontier.append(next) }
            }
            if seen.count > Self.statesMax { return results }
        }
        return results
    }
}
