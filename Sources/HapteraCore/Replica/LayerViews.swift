/// What is seen of regions through the frozen layers: a read that finds its region here asks the
/// head and this, however many layers there are, and not a page of each.
///
/// A view has the room of a page: of each block its entry, with the layer it is from in bytes 1..<4
/// (a `LayerID` has no more). It comes from reads, page by page downwards, and is complete when one
/// has had to ask the lowest layer; a new snapshot's page is put on top of it. It says nothing that
/// the layers do not: it is dropped when an entry of a frozen one changes (a merge, a repair, a
/// write that came late), and whatever it is not about is asked of the layers.
///
/// One slot serves all regions whose numbers end alike; the last one read has it. Slots take memory
/// when they are used: at most 16 MiB, which is enough for any region of 8 GiB.
final class LayerViews {
    static let slotsMax = 8192

    private struct Slot: BitwiseCopyable {
        var region = UInt64.max
        var top = LayerID.head
        var next = LayerID.head
    }
    /// Empty until there is a view: most volumes never have many layers.
    private var slots = FixedArray(repeating: Slot(), count: 0)
    private let slotCount: Int
    private let entryMemory: MemoryBlock

    /// `count`: a power of two.
    init(_ count: Int) {
        precondition(count.nonzeroBitCount == 1)
        slotCount = count
        entryMemory = MemoryBlock(count: count * TablePage.entriesSize)
    }

    private func slot(_ region: UInt64) -> Int {
        Int(truncatingIfNeeded: region) & (slotCount - 1)
    }
    private func entries(_ slot: Int) -> RawMemory {
        entryMemory.memory.slice(slot * TablePage.entriesSize, TablePage.entriesSize)
    }

    func holds(_ region: UInt64) -> Bool {
        slots.count > 0 && slots[slot(region)].region == region
    }
    /// The uppermost layer that is in the region's view; `head`: there is none.
    func top(_ region: UInt64) -> LayerID {
        holds(region) ? slots[slot(region)].top : .head
    }
    /// The next one to be asked for what is absent here; `head`: there is none.
    func next(_ region: UInt64) -> LayerID {
        holds(region) ? slots[slot(region)].next : .head
    }

    func drop(_ region: UInt64) {
        if holds(region) { slots[slot(region)].region = .max }
    }
    /// A view in which there is nothing yet.
    func begin(_ region: UInt64, top: LayerID) {
        if slots.count == 0 { slots = FixedArray(repeating: Slot(), count: slotCount) }
        let slot = slot(region)
        slots[slot] = Slot(region: region, top: top, next: top)
        entries(slot).fill()
    }
    /// What `next` holds shows where there is nothing above it. It has had its turn.
    func putUnder(_ region: UInt64, _ page: RawMemory?, then next: LayerID) {
        let slot = slot(region)
        if let page { merge(page, of: slots[slot].next, into: entries(slot), isOver: false) }
        slots[slot].next = next
    }
    /// The layer is right above the uppermost one that holds anything of the region.
    func putOver(_ region: UInt64, _ page: RawMemory?, of layer: LayerID) {
        let slot = slot(region)
        if let page { merge(page, of: layer, into: entries(slot), isOver: true) }
        slots[slot].top = layer
    }
    private func merge(
        _ page: RawMemory, of layer: LayerID, into entries: RawMemory, isOver: Bool
    ) {
        let absent = BlockState.absent.rawValue
        for at in stride(from: 0, to: TablePage.entriesSize, by: BlockEntry.size)
        where page[at] != absent && (isOver || entries[at] == absent) {
            entries.store(page.load(UInt64.self, at) | UInt64(layer.rawValue) << 8, at)
        }
    }

    /// Of a block of the region; nil: it is absent from all layers of the view.
    func entry(_ region: UInt64, _ block: Int) -> (entry: BlockEntry, layer: LayerID)? {
        let word = entries(slot(region)).load(UInt64.self, block * BlockEntry.size)
        guard let state = BlockState(rawValue: UInt8(word & 0xff)), state != .absent else {
            return nil
        }
        let layer = LayerID(rawValue: UInt32(word >> 8 & 0xff_ffff))
        return (BlockEntry(state: state, checksum: UInt32(word >> 32)), layer)
    }
}
