import HapteraCore

// Invariant 17 for the whole in-sync set: a member's births tell the truth about writes it was
// never sent, too.

extension World {
    /// A write was acknowledged: remembers for each region it touches an epoch in which every
    /// member had applied it. (A trim or zeroing may have found nothing to change.)
    func noteWrite(_ operation: ClientOperation, _ record: VolumeRecord) {
        guard operation.value != 0 else { return }
        for sector in operation.sectors {
            let block = sector / Content.sectorsPerBlock
            let region = UInt64(block / Geometry.blocksPerRegion)
            let applied = hosts.filter { record.contains($0) }.map { $0.order[block].epoch }
            guard let least = applied.min() else { continue }
            lastWrites[region] = max(lastWrites[region] ?? .zero, least)
        }
    }

    /// 17: a member's birth of a region is not below the epoch of the last write to it: members
    /// that were filled from others included, who may never have been sent that write.
    func checkBirths(_ host: SimulatedReplica, _ image: ReplicaImage) {
        guard !host.isLossy else { return }
        for (region, epoch) in lastWrites where !image.activeRegions.contains(region) {
            check(
                17, image.birth(region) >= epoch,
                "\(host.name) gives region \(region) birth \(image.birth(region).rawValue),"
                    + " written in e\(epoch.rawValue)")
        }
    }
}
