/// A metadata context: what BLOCK_STATUS can be asked about an export.
///
///     name                      a block's flags
///     base:allocation           bit 0: a hole, bit 1: reads zero
///     haptera:changed:SNAP      bit 0: may differ from snapshot SNAP
///     qemu:dirty-bitmap:SNAP    the same, under the name that qemu knows for it
///
/// SNAP is a snapshot of the volume at or below what is read: the live volume has them all.
package struct NBDContext: Hashable, BitwiseCopyable, Sendable {
    package enum Kind: UInt8, BitwiseCopyable, Sendable {
        case allocation
        case changed
        /// The same for qemu.
        case dirty

        /// Of its names, as far as the snapshot's.
        var prefix: StaticString {
            switch self {
            case .allocation: "base:allocation"
            case .changed: "haptera:changed:"
            case .dirty: "qemu:dirty-bitmap:"
            }
        }
    }
    package let kind: Kind
    /// The layer of the snapshot compared with; `.head`: none.
    package let base: LayerID

    package static let allocation = NBDContext(.allocation, base: .head)
    package init(_ kind: Kind, base: LayerID) {
        self.kind = kind
        self.base = base
    }

    /// Contexts one client may select: each costs its requests a buffer.
    package static let selectedMax = 8
    /// Names in one option: each is looked for among all snapshots.
    static let queriesMax = 256
    static let nameLengthMax = 18 + VolumeRecord.nameLengthMax

    package static let hole: UInt32 = 1 << 0
    package static let zero: UInt32 = 1 << 1
    package static let dirty: UInt32 = 1 << 0

    /// What a client is told of blocks in `state`.
    package func flags(_ state: BlockState) -> UInt32 {
        switch (kind, state) {
        case (.allocation, .data): 0
        case (.allocation, .absent), (.allocation, .zero): Self.hole | Self.zero
        case (.allocation, .zeroAllocated): Self.zero
        // A trim is a change, too.
        case (_, .absent): 0
        case (_, .data), (_, .zero), (_, .zeroAllocated): Self.dirty
        }
    }
    /// What is always true: that there is data, that it may have changed.
    package var safeFlags: UInt32 { flags(.data) }
}

/// What one LIST or SET picks from the contexts of an export, each once, in the order asked for.
struct NBDContextSelection {
    private(set) var picked: [(context: NBDContext, snapshot: String)] = []
    private var known: Set<NBDContext> = []
    private let snapshots: [VolumeRecord.Snapshot]

    /// `layer`: the export's. What is above it is not part of it.
    init(of snapshots: [VolumeRecord.Snapshot], seenFrom layer: LayerID) {
        self.snapshots = snapshots.filter { layer == .head || $0.layer <= layer }
    }

    /// What the query names exactly, if that is there.
    mutating func add(named query: RawMemory) {
        if query.equals(text: NBDContext.Kind.allocation.prefix) { return add(.allocation) }
        for kind in [NBDContext.Kind.changed, .dirty] {
            guard let name = query.dropping(kind.prefix),
                let snapshot = snapshots.first(where: { name.equals(text: $0.name) })
            else { continue }
            add(NBDContext(kind, base: snapshot.layer), snapshot.name)
        }
    }
    /// What the query begins the names of: as LIST has it.
    mutating func add(matching query: RawMemory) {
        if query.equals(text: "base:") { return add(.allocation) }
        if query.equals(text: "haptera:") || query.equals(text: "haptera:changed:") {
            return addAll(.changed)
        }
        if query.equals(text: "qemu:") || query.equals(text: "qemu:dirty-bitmap:") {
            return addAll(.dirty)
        }
        add(named: query)
    }
    mutating func addEverything() {
        add(.allocation)
        addAll(.changed)
        addAll(.dirty)
    }

    private mutating func addAll(_ kind: NBDContext.Kind) {
        for snapshot in snapshots { add(NBDContext(kind, base: snapshot.layer), snapshot.name) }
    }
    private mutating func add(_ context: NBDContext, _ snapshot: String = "") {
        if known.insert(context).inserted { picked.append((context, snapshot)) }
    }
}

extension RawMemory {
    fileprivate func equals(text: StaticString) -> Bool { dropping(text)?.count == 0 }
    /// What follows `text`; nil if that is not how it begins.
    fileprivate func dropping(_ text: StaticString) -> RawMemory? {
        let length = text.utf8CodeUnitCount
        guard count >= length else { return nil }
        for index in 0..<length {
            // SAFETY: a StaticString of more than one scalar has `utf8CodeUnitCount` bytes at
            // `utf8Start`, for ever.
            guard unsafe text.utf8Start[index] == self[index] else { return nil }
        }
        return slice(length, count - length)
    }
}
