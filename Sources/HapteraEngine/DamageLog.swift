import HapteraCore
import HapteraIO

/// What an engine has learned of damaged blocks since it started, so that its status can tell it:
/// a running number of findings, sums of blocks, and the newest findings one by one.
///
/// A copy that turns out to be bad waits here for what becomes of it:
///
///     bad copy found -> repaired   the engine rewrote it from another replica
///                    -> lost       no replica in the in-sync set has a good copy of it
///                    -> damaged    neither within `patienceMilliseconds`: as when a replica was
///                                  being filled from it, and shares the damage
struct DamageLog {
    enum Outcome: String, CaseIterable {
        case repaired, lost, damaged
    }

    struct Finding: Equatable {
        /// Counts all findings from 1.
        var number: UInt64
        var outcome: Outcome
        /// Bytes: of the first bad block, or of the request that met it.
        var offset: UInt64
        /// At least so many.
        var blocks: UInt64
        /// Those whose copies were bad, as far as it is known.
        var replicas: [ReplicaID]

        /// A value of the status: OUTCOME:OFFSET:BLOCKS:REPLICA,...
        var text: String {
            "\(outcome.rawValue):\(offset):\(blocks):"
                + replicas.map(\.text).joined(separator: ",")
        }
    }

    /// The newest of those; older ones are in the sums and in the engine's log.
    static let findingsMax = 16
    /// Bad copies that wait for what becomes of them.
    static let openMax = 1024
    /// Offsets that were told as lost, and are not told again whenever they are read.
    static let lostOffsetsMax = 1024
    static let patienceMilliseconds: UInt64 = 60_000

    private struct BadCopy {
        var replica: ReplicaID
        var offset: UInt64
        var blocks: UInt64
        var found: Instant
        /// As lost: if some of it is repaired all the same, that is told, too.
        var isTold = false
        var region: UInt64 { offset / UInt64(Geometry.regionSize) }
    }

    private(set) var number: UInt64 = 0
    /// Blocks.
    private(set) var sums: [Outcome: UInt64] = [:]
    private(set) var findings: [Finding] = []
    private var open: [BadCopy] = []
    private var lostOffsets: Set<UInt64> = []

    /// A copy of the replica's is bad; of some block that a request at the offset meets.
    mutating func found(
        _ replica: ReplicaID, offset: UInt64, blocks: UInt64 = 1, now: Instant
    ) {
        if let at = open.firstIndex(where: { $0.replica == replica && $0.offset == offset }) {
            open[at].blocks = max(open[at].blocks, blocks)
            return
        }
        if open.count == Self.openMax { close(open.removeFirst()) }
        open.append(BadCopy(replica: replica, offset: offset, blocks: blocks, found: now))
    }

    /// Bad copies of the region were rewritten. None: they had been made good meanwhile, or no
    /// member has a good one, and the request that asks for it fails; or a member has left with
    /// its own, of which nothing is known then.
    mutating func repaired(region: UInt64, blocks: UInt64, members: [ReplicaID]) {
        let copies = open.filter { $0.region == region }
        guard blocks > 0 else {
            return open.removeAll { $0.region == region && members.contains($0.replica) }
        }
        open.removeAll { $0.region == region }
        lostOffsets = lostOffsets.filter { $0 / UInt64(Geometry.regionSize) != region }
        // Where every member's copy was bad, it may not be this that was rewritten.
        let likely = copies.filter { copy in
            let replicas = Self.replicas(of: copies.filter { $0.offset == copy.offset })
            return !members.allSatisfy(replicas.contains)
        }
        let told = likely.isEmpty ? copies : likely
        let offset = told.map(\.offset).min() ?? region * UInt64(Geometry.regionSize)
        add(.repaired, offset, blocks, Self.replicas(of: told))
    }

    /// A scrub has judged it under the region's lock.
    mutating func lost(offset: UInt64, blocks: UInt64) {
        let region = offset / UInt64(Geometry.regionSize)
        let replicas = Self.replicas(of: open.filter { $0.region == region })
        for at in open.indices where open[at].region == region { open[at].isTold = true }
        if isNew(offset) { add(.lost, offset, blocks, replicas) }
    }

    /// A client's request has failed. If every member has a bad copy of what one asks for, it is
    /// this that it failed for. What is told so for the first time.
    mutating func requestFailed(members: [ReplicaID]) -> [Finding] {
        guard !members.isEmpty else { return [] }
        let before = number
        for offset in Set(open.filter { !$0.isTold }.map(\.offset)).sorted() {
            let replicas = Self.replicas(of: open.filter { $0.offset == offset })
            guard members.allSatisfy(replicas.contains) else { continue }
            for at in open.indices where open[at].offset == offset { open[at].isTold = true }
            if isNew(offset) { add(.lost, offset, 1, replicas) }
        }
        return findings.filter { $0.number > before }
    }

    /// A scrub went over everything and found nothing that is lost: what will be is told again.
    mutating func nothingIsLost() { lostOffsets = [] }

    var isWaiting: Bool { !open.isEmpty }

    /// Tells of copies that nothing was heard of for long.
    mutating func tick(now: Instant) {
        while let first = open.first,
            first.found.adding(milliseconds: Self.patienceMilliseconds) <= now
        {
            close(open.removeFirst())
        }
    }

    private mutating func close(_ copy: BadCopy) {
        guard !copy.isTold else { return }
        add(.damaged, copy.offset, copy.blocks, [copy.replica])
    }

    private mutating func isNew(_ offset: UInt64) -> Bool {
        if lostOffsets.count >= Self.lostOffsetsMax { lostOffsets = [] }
        return lostOffsets.insert(offset).inserted
    }

    private mutating func add(
        _ outcome: Outcome, _ offset: UInt64, _ count: UInt64, _ replicas: [ReplicaID]
    ) {
        number += 1
        sums[outcome, default: 0] += count
        if findings.count == Self.findingsMax { findings.removeFirst() }
        findings.append(
            Finding(
                number: number, outcome: outcome, offset: offset, blocks: count,
                replicas: replicas))
    }

    private static func replicas(of copies: [BadCopy]) -> [ReplicaID] {
        var replicas: [ReplicaID] = []
        for copy in copies where !replicas.contains(copy.replica) { replicas.append(copy.replica) }
        return replicas
    }
}

extension DamageLog {
    /// Of the engine's status; none while nothing was found.
    var statusLines: [(key: String, value: String)] {
        guard number > 0 else { return [] }
        return [("damage", String(number))]
            + Outcome.allCases.map { ("damage.\($0.rawValue)", String(sums[$0] ?? 0)) }
            + findings.map { ("damage.\($0.number)", $0.text) }
    }
}

extension EngineShell {
    /// A request of a client's has failed: perhaps because no copy is good.
    func noteFailure() {
        for finding in damage.requestFailed(members: inSyncIDs) {
            Log.error(
                "no replica in sync has a good copy of what a client asked for: write it anew or "
                    + "restore it from a backup", ("volume", name),
                ("offset", String(finding.offset)))
        }
    }

    private var inSyncIDs: [ReplicaID] {
        core.configuredSlots.filter { core.standing($0) == .inSync }.map(core.replicaID)
    }

    func logDamage(_ note: EngineNote) {
        let volume = ("volume", name)
        func id(_ slot: ReplicaSlot) -> (String, String) { ("replica", core.replicaID(slot).text) }
        switch note {
        case .checksumMismatch(let slot, let offset):
            counters.checksumMismatches &+= 1
            damage.found(core.replicaID(slot), offset: offset, now: reactor.now)
            let text = "a replica's copy of a block is damaged"
            Log.error(text, volume, id(slot), ("offset", String(offset)))
        case .doubtfulBytesKept(let slot, let offset):
            Log.warn(
                "no intact copy of an interrupted write; bytes kept", volume, id(slot),
                ("offset", String(offset)))
        case .repaired(let region, let blocks):
            damage.repaired(region: region, blocks: blocks, members: inSyncIDs)
            guard blocks > 0 else { break }
            Log.info(
                "damaged copy repaired", volume, ("region", String(region)),
                ("blocksCopied", String(blocks)))
        default: break
        }
    }
}
