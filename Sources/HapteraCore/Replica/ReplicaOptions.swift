/// How one process serves a replica's files.
package struct ReplicaOptions {
    package var instance: InstanceID
    package var bootID: BootID
    /// Regions held in memory, active ones included; about 2.2 KiB each, 27 MiB together (and 16
    /// for `LayerViews`). Frames are there for as many as there are pages, up to this, and a volume
    /// with more pages reads some of them again and again. At least `activeRegionsMax` + 64.
    package var tableCachePagesMax = 12_288
    /// Regions in the activity log, at most `InstallReply.activeRegionsMax`. More than an engine
    /// can have requests under way, so that no one stable point has to free them all.
    package var activeRegionsMax = ReplicaOptions.activeRegionsDefault
    package static let activeRegionsDefault = 6144
    /// For writes that make members equal. No stable point comes before they are: were clients'
    /// writes to take all the room, neither would ever end.
    var activeRegionsForCopies: Int {
        let room = activeRegionsMax + (tableCachePagesMax - activeRegionsMax) / 2
        return min(InstallReply.activeRegionsMax, room)
    }
    /// A log written under larger limits must be read all the same.
    var framesMax: Int { max(tableCachePagesMax, InstallReply.activeRegionsMax + 64) }
    /// There are no views of regions with this many layers, or fewer: what is beneath the head is
    /// one page anyway.
    package var layersForViews = 2
    /// A power of two.
    package var viewsMax = LayerViews.slotsMax
    /// As many layers as a copy may have: an Install that would add more is refused, and the engine
    /// knows before it asks (`FrameFlags.layersFull`).
    package var layersMax = Manifest.layersMax
    /// Blocks: a layer below the head with no more than these goes up to it, however little the
    /// head has; and one with no more than so many percent of what the head has.
    package var stayingBlocksMin = 2048
    package var risingPercent: UInt64 = 100
    /// Blocks that the head may hide of such a layer while clients are busy.
    package var hiddenBlocksMin = 8192
    package var mutations = MutationSet()
    /// 128 bits of a block's data for `RegionDigest`; the process gives SHA-256. Must be the same
    /// function on all replicas of a volume. The default is fast and no cryptographic hash: for
    /// simulations.
    package var hash: (RawMemory) -> (low: UInt64, high: UInt64) = ReplicaOptions.quickHash

    package init(
        instance: InstanceID, bootID: BootID = .none, tableCachePagesMax: Int = 12_288,
        activeRegionsMax: Int = activeRegionsDefault, mutations: MutationSet = MutationSet()
    ) {
        self.instance = instance
        self.bootID = bootID
        self.tableCachePagesMax = tableCachePagesMax
        self.activeRegionsMax = activeRegionsMax
        self.mutations = mutations
    }

    package static func quickHash(_ memory: RawMemory) -> (low: UInt64, high: UInt64) {
        var low: UInt64 = 0x243F_6A88_85A3_08D3
        var high: UInt64 = 0x1319_8A2E_0370_7344
        for word in 0..<memory.count / 8 {
            let value = memory.load(UInt64.self, word * 8)
            low = (low ^ value) &* 0x9E37_79B9_7F4A_7C15
            low ^= low >> 29
            high = (high &+ value) &* 0xC2B2_AE3D_27D4_EB4F
            high ^= high >> 31
        }
        return (low, high)
    }
}
