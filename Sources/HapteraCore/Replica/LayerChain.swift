/// The layers of a copy, lowest first; the last is the head, all others are frozen. A block that a
/// layer does not hold is the next lower layer's; below the lowest, everything reads zero.
///
/// In memory a layer costs a bit per region: 128 KiB per TiB.
struct LayerChain {
    private struct Layer {
        /// A bit per region: 1 if the layer's table or the log may know it.
        let map: FixedArray<UInt64>
        /// Written since the last sync of the file began, perhaps by an earlier process.
        var isDataUnsynced = true
        var isTableUnsynced = true
    }
    private(set) var ids: [LayerID] = []
    private var layers: [Layer] = []
    private let regionCount: UInt64
    private(set) var head: LayerID

    init(_ ids: [LayerID], regionCount: UInt64) {
        self.regionCount = regionCount
        head = .head
        for id in ids { append(id) }
    }

    var count: Int { ids.count }
    func id(_ index: Int) -> LayerID { ids[index] }

    /// A new, empty head.
    mutating func append(_ id: LayerID) {
        precondition(id > head)
        ids.append(id)
        layers.append(Layer(map: FixedArray(repeating: 0, count: Int((regionCount + 63) / 64))))
        head = id
    }

    /// The layer's place, nil if it is none of the chain's.
    func index(of id: LayerID) -> Int? {
        id == head ? count - 1 : ids.index(ofLayer: id)
    }
    private func existing(_ id: LayerID) -> Int {
        guard let index = index(of: id) else { preconditionFailure("no such layer") }
        return index
    }

    // MARK: which regions a layer may know

    func mayHold(_ index: Int, _ region: UInt64) -> Bool {
        layers[index].map[Int(region / 64)] >> (region % 64) & 1 != 0
    }
    func mayHold(_ id: LayerID, _ region: UInt64) -> Bool { mayHold(existing(id), region) }
    /// Any layer.
    func mayHold(_ region: UInt64) -> Bool { mayHold(region, upTo: count - 1) }
    /// Any layer from the lowest to the one at `top`.
    func mayHold(_ region: UInt64, upTo top: Int) -> Bool {
        for index in 0...top where mayHold(index, region) { return true }
        return false
    }
    func mark(_ id: LayerID, _ region: UInt64) {
        layers[existing(id)].map[Int(region / 64)] |= 1 << (region % 64)
    }

    // MARK: what is not synced

    mutating func dataWritten(_ id: LayerID) { layers[existing(id)].isDataUnsynced = true }
    mutating func tableWritten(_ id: LayerID) { layers[existing(id)].isTableUnsynced = true }
    /// The next layer at `index` or above whose file has to be synced; it counts as being so.
    /// The head's always has: nobody has to ask whether there is one at all.
    mutating func nextUnsynced(isData: Bool, from index: Int) -> Int? {
        for index in min(index, layers.count)..<layers.count {
            let isUnsynced = isData ? layers[index].isDataUnsynced : layers[index].isTableUnsynced
            guard isUnsynced || index == layers.count - 1 else { continue }
            if isData {
                layers[index].isDataUnsynced = false
            } else {
                layers[index].isTableUnsynced = false
            }
            return index
        }
        return nil
    }
}
