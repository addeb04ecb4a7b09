import HapteraCore

/// Everything clients asked for and were told, in the order it happened.
struct History {
    enum Entry {
        case invoked(ClientOperation)
        case returned(ClientOperation)
        case lossAllowed
        /// The volume goes on from an old copy.
        case salvaged
        /// The volume goes back to a snapshot: what each of these sectors holds.
        case reverted([Int], [ValueID])
    }
    private(set) var entries: [(step: Int, entry: Entry)] = []

    mutating func append(_ entry: Entry, step: Int) { entries.append((step, entry)) }

    /// Judges every register; returns what is wrong with the earliest impossible event.
    func check(sectorCount: Int) -> (step: Int, what: String)? {
        var perSector: [[(entry: Int, event: RegisterEvent)]] = Array(
            repeating: [], count: sectorCount)
        var touched = [Bool](repeating: false, count: sectorCount)
        for (_, entry) in entries {
            if case .invoked(let operation) = entry {
                for sector in operation.sectors { touched[sector] = true }
            }
        }
        for (index, item) in entries.enumerated() {
            distribute(item.entry, index, touched, &perSector)
        }
        var worst: (step: Int, what: String)?
        for sector in 0..<sectorCount where touched[sector] {
            // Neighbours that were always treated alike have the same verdict.
            if sector % Content.sectorsPerBlock != 0,
                isSame(perSector[sector], perSector[sector - 1])
            {
                continue
            }
            var checker = RegisterChecker()
            let index = checker.check(perSector[sector].map(\.event))
            if checker.gaveUp {
                return (0, "sector \(sector) has too many possible histories to be judged")
            }
            guard let index else { continue }
            let step = entries[perSector[sector][index].entry].step
            if step < worst?.step ?? .max {
                worst = (step, describe(sector, perSector[sector], index))
            }
        }
        return worst
    }

    private func distribute(
        _ entry: Entry, _ index: Int, _ touched: [Bool],
        _ perSector: inout [[(entry: Int, event: RegisterEvent)]]
    ) {
        switch entry {
        case .lossAllowed, .salvaged:
            var kind = RegisterEvent.Kind.lossAllowed
            if case .salvaged = entry { kind = .salvaged }
            let event = RegisterEvent(kind, operation: -1)
            for sector in perSector.indices where touched[sector] {
                perSector[sector].append((index, event))
            }
        case .reverted(let sectors, let values):
            for (sector, value) in zip(sectors, values) where touched[sector] {
                perSector[sector].append(
                    (index, RegisterEvent(.reverted(value), operation: -1)))
            }
        case .invoked(let operation), .returned(let operation):
            var isReturn = false
            if case .returned = entry { isReturn = true }
            if operation.kind == .flush {
                let event = RegisterEvent(
                    isReturn ? .flushReturned : .flushInvoked, operation: operation.id)
                for sector in perSector.indices where touched[sector] {
                    perSector[sector].append((index, event))
                }
            } else if operation.kind != .status {
                for (position, sector) in operation.sectors.enumerated() {
                    guard let kind = kind(operation, position, isReturn) else { continue }
                    perSector[sector].append(
                        (index, RegisterEvent(kind, operation: operation.id)))
                }
            }
        }
    }

    private func kind(_ operation: ClientOperation, _ position: Int, _ isReturn: Bool)
        -> RegisterEvent.Kind?
    {
        if operation.kind == .read {
            // A read that never returned a value tells nothing.
            guard !operation.values.isEmpty else { return nil }
            return isReturn ? .readReturned : .readInvoked(operation.values[position])
        }
        return isReturn
            ? .writeReturned(isDurable: operation.flags.contains(.fua))
            : .writeInvoked(operation.value)
    }

    private func isSame(
        _ a: [(entry: Int, event: RegisterEvent)], _ b: [(entry: Int, event: RegisterEvent)]
    ) -> Bool {
        guard a.count == b.count else { return false }
        for (x, y) in zip(a, b) {
            guard x.entry == y.entry else { return false }
            if case .readInvoked(let p) = x.event.kind, case .readInvoked(let q) = y.event.kind,
                p != q
            {
                return false
            }
            if case .reverted(let p) = x.event.kind, case .reverted(let q) = y.event.kind, p != q {
                return false
            }
        }
        return true
    }

    private func describe(
        _ sector: Int, _ events: [(entry: Int, event: RegisterEvent)], _ index: Int
    ) -> String {
        var text = "invariant 9: sector \(sector) (block \(sector / 8)) is not linearizable:"
        for (entry, event) in events[max(0, index - 24)...index] {
            if case .flushInvoked = event.kind { continue }
            text += "\n    step \(entries[entry].step): \(event.kind) #\(event.operation)"
        }
        return text
    }
}
