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
/// Values that no answer brings any more are not told apart, and of two states of which one can do
/// all that the other can, the other is dropped.
package struct RegisterChecker {
    private struct State: Hashable {
        var value: ValueID
        /// Pending operations that have happened, by slot.
        var happened: UInt128 = 0
    }
    private struct Pending {
        var operation: Int
        var value: ValueID
        var isRead: Bool
        var willReturn: Bool
        /// A write of something that no answer brings any more.
        var isForgotten = false
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
    /// Stands for every value but zero that no answer brings any more.
    private static let forgotten: ValueID = .max - 1
    /// By value: the place of the last answer that brings it.
    private var lastAnswer: [ValueID: Int] = [:]
    private var place = 0
    /// Too many possibilities: the rest of the history is not judged. Whoever asks for a verdict
    /// must look at this too.
    package private(set) var gaveUp = false

    package init(initial: ValueID = 0) {
        states = [State(value: initial)]
        candidates = [initial]
    }

    /// The index of the first event that cannot be explained, or nil. Operations with an invocation
    /// and no return are pending for ever.
    package mutating func check(_ events: [RegisterEvent]) -> Int? {
        var returning: Set<Int> = []
        var reading: [Int: ValueID] = [:]
        for (index, event) in events.enumerated() {
            switch event.kind {
            case .writeReturned, .flushReturned: returning.insert(event.operation)
            case .readInvoked(let value): reading[event.operation] = value
            case .readReturned:
                returning.insert(event.operation)
                if let value = reading[event.operation] { lastAnswer[value] = index }
            default: break
            }
        }
        for (index, event) in events.enumerated() {
            place = index
            let returns = returning.contains(event.operation)
            // A write nobody waits for and nobody will see may as well never have happened.
            if case .writeInvoked(let value) = event.kind, !returns, isForgotten(value) {
                hasUnseenWrites = true
                continue
            }
            if case .readInvoked = event.kind, !returns { continue }
            apply(event, returns: returns)
            if gaveUp { return nil }
            if states.isEmpty { return index }
            if case .readReturned = event.kind, let value = reading[event.operation],
                value != 0, lastAnswer[value] == index
            {
                place += 1
                forget(value)
            }
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
            var satisfied: UInt128 = 0
            for (slot, entry) in pending.enumerated() where entry?.isRead == true {
                satisfied |= states.reduce(0) { $0 | $1.happened } & (1 << slot)
            }
            for index in flushes.indices { flushes[index].candidates += values }
            // It is on the old copy's disk, and a loss may take back all that comes after (seed
            // 2813919).
            if case .salvaged = event.kind { candidates = values }
            states = Set(values.map { withReads(State(value: known($0), happened: satisfied)) })
                .sorted { $0.value < $1.value }
        }
    }

    private mutating func revert(to value: ValueID) {
        var satisfied: UInt128 = 0
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

    // MARK: What makes no difference any more

    /// Zeroes never are: after a loss they let old bytes back.
    private func isForgotten(_ value: ValueID) -> Bool {
        value != 0 && lastAnswer[value] ?? -1 < place
    }
    private func known(_ value: ValueID) -> ValueID {
        isForgotten(value) ? Self.forgotten : value
    }

    /// The last answer that brings it is there.
    private mutating func forget(_ value: ValueID) {
        var dropped: UInt128 = 0
        for slot in pending.indices where pending[slot]?.value == value {
            guard let entry = pending[slot], !entry.isRead else { continue }
            pending[slot]?.isForgotten = true
            pending[slot]?.value = Self.forgotten
            guard !entry.willReturn else { continue }
            hasUnseenWrites = true
            pending[slot] = nil
            dropped |= 1 << slot
        }
        states = states.map {
            State(value: known($0.value), happened: $0.happened & ~dropped)
        }
        reduce()
    }

    /// Drops states that can do nothing another cannot: of equal values, who has answered more
    /// reads and is done with more writes that nobody looks for, and may yet let more writes happen
    /// that nobody waits for.
    private mutating func reduce() {
        var more: UInt128 = 0
        var less: UInt128 = 0
        for (slot, entry) in pending.enumerated() {
            guard let entry else { continue }
            if entry.isRead || entry.isForgotten {
                more |= 1 << slot
            } else if !entry.willReturn {
                less |= 1 << slot
            }
        }
        var groups: [State: [UInt128]] = [:]
        for state in states {
            let key = State(value: state.value, happened: state.happened & ~(more | less))
            // As a set of which a subset is better.
            let rest = (state.happened & less) | (~state.happened & more)
            var kept = groups[key] ?? []
            if kept.contains(where: { $0 & ~rest == 0 }) { continue }
            kept.removeAll { rest & ~$0 == 0 }
            groups[key] = kept + [rest]
        }
        states = groups.flatMap { key, kept in
            kept.map { rest in
                State(value: key.value, happened: key.happened | rest & less | ~rest & more)
            }
        }
        states.sort { ($0.value, $0.happened) < ($1.value, $1.happened) }
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
        let isForgotten = !isRead && isForgotten(value)
        let entry = Pending(
            operation: operation, value: isRead ? value : known(value), isRead: isRead,
            willReturn: returns, isForgotten: isForgotten)
        // Of zeroes that nobody waits for, so many others will do: to want one more the register
        // would have to be seen coming back to zero as often (seed 3000890).
        if !isRead, !returns, pending.count(where: { isAlike($0, entry) }) >= Self.alikeMax {
            return
        }
        if let slot = pending.firstIndex(where: { $0 == nil }) {
            pending[slot] = entry
        } else if pending.count < UInt128.bitWidth {
            pending.append(entry)
        } else {
            gaveUp = true
        }
    }

    private static let alikeMax = 32
    private func isAlike(_ one: Pending?, _ other: Pending) -> Bool {
        guard let one else { return false }
        return !one.isRead && !one.willReturn && one.value == other.value
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
        let bit: UInt128 = 1 << slot
        var results: [State] = []
        var seen: Set<State> = []
        for start in states {
            for var result in closure(from: start, until: bit) {
                result.happened &= ~bit
                if seen.insert(result).inserted { results.append(result) }
            }
            if results.count > Self.statesMax { gaveUp = true }
            if gaveUp { return }
        }
        pending[slot] = nil
        states = results
        reduce()
    }

    /// The states reachable from `start` by letting pending writes happen, in which `bit` has.
    private mutating func closure(from start: State, until bit: UInt128) -> [State] {
        if start.happened & bit != 0 { return [start] }
        var start = start
        // What it holds will be overwritten in any case: these may as well have been before.
        for (slot, entry) in pending.enumerated() where entry?.isForgotten == true {
            if 1 << slot != bit { start.happened |= 1 << slot }
        }
        var results: [State] = []
        var frontier = [start]
        var seen: Set<State> = [start]
        let wanted = pending.compactMap { $0 }.filter(\.isRead).map(\.value)
        while let state = frontier.popLast() {
            for (slot, entry) in pending.enumerated() {
                let own: UInt128 = 1 << slot
                guard let entry, !entry.isRead, state.happened & own == 0 else { continue }
                // Of equal ones that nobody waits for, the first is as good as any.
                if !entry.willReturn, hasEqual(entry.value, before: slot, in: state) { continue }
                // To let it happen early only helps if it returns, or if somebody reads it.
                guard own == bit || entry.willReturn || wanted.contains(entry.value) else {
                    continue
                }
                let next = withReads(
                    State(value: entry.value, happened: state.happened | own))
                guard seen.insert(next).inserted else { continue }
                if next.happened & bit != 0 { results.append(next) } else { frontier.append(next) }
            }
            if seen.count > Self.statesMax {
                gaveUp = true
                return results
            }
        }
        return results
    }

    private func hasEqual(_ value: ValueID, before slot: Int, in state: State) -> Bool {
        for (other, entry) in pending[..<slot].enumerated() {
            guard let entry, !entry.isRead, !entry.willReturn, entry.value == value else {
                continue
            }
            if state.happened & (1 << other) == 0 { return true }
        }
        return false
    }
}
