import HapteraAPI

/// Snapshots in the order of their tree. What the volume came from stays in one column, however
/// long that chain is; what reverts left branches off to the right of it, and comes first:
///
///     a
///     ├─ b
///     │  kept
///     (volume)
struct SnapshotTree {
    struct Line: Equatable {
        /// The volume's is the one after the last snapshot's.
        var index: Int
        var branches: String
    }
    private(set) var lines: [Line] = []
    /// In the order of the list, by the index of the one that they came after.
    private var below: [Int?: [Int]] = [:]
    /// The volume, and what it came from.
    private var trunk: Set<Int> = []

    /// Nil: not every snapshot that others came after is among them.
    init?(_ snapshots: [Haptera_V1_Snapshot]) {
        let indices = Dictionary(snapshots.enumerated().map { ($1.name, $0) }) { first, _ in first }
        guard snapshots.allSatisfy({ $0.parent.isEmpty || indices[$0.parent] != nil }) else {
            return nil
        }
        let parents =
            snapshots.map { indices[$0.parent] } + [snapshots.firstIndex(where: \.isVolumeParent)]
        for (index, parent) in parents.enumerated() { below[parent, default: []].append(index) }
        var place: Int? = snapshots.count
        while let index = place, trunk.insert(index).inserted { place = parents[index] }
        follow(nil, first: "", rest: "")
    }

    /// Down to the end of one column. Deeper only for branches, of which there are few.
    private mutating func follow(_ start: Int?, first: String, rest: String) {
        var place = start
        var branches = first
        while true {
            if let place {
                lines.append(Line(index: place, branches: branches))
                branches = rest
            }
            let next = below[place] ?? []
            guard let onward = next.first(where: trunk.contains) ?? next.last else { return }
            for index in next where index != onward {
                follow(index, first: rest + "├─ ", rest: rest + "│  ")
            }
            place = onward
        }
    }
}
