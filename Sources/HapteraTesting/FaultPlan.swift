import HapteraCore

/// Which troubles a seed draws. A few at a time find more than all together (swarm testing): what
/// is switched off here cannot mask what is on.
struct FaultPlan {
    enum Kind: Int, CaseIterable {
        case killReplica
        case killAllReplicas
        /// SIGSTOP, and SIGCONT later: the clock goes on, what arrives waits.
        case pauseReplica
        case pauseEngine
        case cutPower
        case cutConnection
        case clogLink
        /// A link that comes and goes.
        case flapLink
        case isolateReplica
        case slowDisk
        /// A few operations that take a hundred times as long as the others.
        case diskOutliers
        case badDisk
        case fullDisk
        case fullDisks
        case engineCrash
        case clientCrash
        case takeover
        /// The clients' connection breaks; they come back on a new one.
        case cutClients
        case storeOutage
        /// One engine cannot reach the store, or is not answered.
        case storePartition
        case blackout
        /// A replica's disk is replaced: the same replica, made anew.
        case replaceReplica
        /// A replica's directory is put back as it was some time ago.
        case restoreReplica
        case rot
        /// A block's write goes nowhere, or to another block; the disk says it is done.
        case lostWrite
        case misdirectedWrite
        /// The same beside the data: see `FileRot`.
        case rotTable
        case rotLog
        case rotManifest
        /// The metadata store is put back as it was some changes ago.
        case restoreStore
        /// An administrator goes on from members that lost power.
        case acceptLoss
        /// An administrator goes on from a replica outside the set, when the set will not return.
        case salvage
    }
    private(set) var kinds: [Kind] = []
    let pauseMillisecondsMax: Int
    let cutsDuringOpen: Bool
    private(set) var corruptsFrames: Bool
    /// Per thousand changes of stage (a join begins, a record change is asked for, a takeover
    /// resolves): something goes wrong right then. Rare windows are hit on purpose.
    let stageFaultPermille: Int
    /// Where a host loses power the engine always lived on it, and both are back before anybody
    /// gives the host up: the clients, who live elsewhere, find a member that has lost something.
    let cutsPowerOfEngines: Bool

    /// Of its hosts, which another volume's faults befall.
    private var befalling: [Kind] = []
    var diskErrors: Bool { has(.badDisk) }
    var noSpace: Bool { has(.fullDisk) || has(.fullDisks) }
    private func has(_ kind: Kind) -> Bool { kinds.contains(kind) || befalling.contains(kind) }
    /// Bytes change behind the replica's back.
    var rot: Bool { kinds.contains { Self.rotting.contains($0) } }
    private static let rotting: [Kind] = [.rot, .lostWrite, .misdirectedWrite]
    /// Those that two volumes on one host have in common.
    static let ofHosts: [Kind] =
        rotting + [
            .cutPower, .blackout, .slowDisk, .diskOutliers, .badDisk, .fullDisk, .fullDisks,
        ]

    /// `other`: the faults of a volume on the same hosts.
    init(random: RandomSource, mutations: MutationSet, beside other: FaultPlan?) {
        self.init(random: random, mutations: mutations)
        guard let other else { return }
        kinds.removeAll { Self.ofHosts.contains($0) }
        befalling = other.befalling + other.kinds.filter { Self.ofHosts.contains($0) }
        if other.rot {
            kinds.removeAll { [.pauseEngine, .replaceReplica, .salvage].contains($0) }
            // Each volume's own layers, and shared ones from either side.
            kinds.append(.rot)
            corruptsFrames = false
        }
        if kinds.isEmpty { kinds = [.killReplica] }
    }

    init(random: RandomSource, mutations: MutationSet = MutationSet()) {
        for kind in Kind.allCases where !Kind.ofFiles.contains(kind) {
            let chance: Int
            switch kind {
            case .blackout: chance = 150
            case .restoreStore, .salvage: chance = 70
            case .rot, .lostWrite, .misdirectedWrite: chance = 80
            case .badDisk, .fullDisk: chance = 200
            case .fullDisks: chance = 100
            case .killAllReplicas, .pauseReplica, .pauseEngine, .flapLink, .diskOutliers,
                .storePartition, .replaceReplica, .restoreReplica:
                chance = 250
            default: chance = 400
            }
            if random.permille(chance) { kinds.append(kind) }
        }
        let needed = Self.needed(by: mutations)
        if !needed.isEmpty {
            kinds.removeAll { Self.rotting.contains($0) || needed.contains($0) }
            kinds += needed
        }
        let rots = kinds.contains { Self.rotting.contains($0) }
        if rots {
            // Rot needs a second good copy at all times: nothing else may take it away. (An engine
            // that was stopped may find every replica silent.)
            kinds.removeAll { $0 == .pauseEngine }
            kinds.removeAll {
                [
                    .cutPower, .blackout, .badDisk, .fullDisk, .fullDisks, .replaceReplica,
                    .salvage,
                ]
                .contains($0)
            }
        }
        if kinds.isEmpty { kinds = [.killReplica] }
        pauseMillisecondsMax = random.pick([300, 1500, 5000])
        cutsDuringOpen = random.permille(300)
        corruptsFrames = !rots && random.permille(200)
        stageFaultPermille = random.pick([0, 50, 300])
        cutsPowerOfEngines = mutations.contains(.stableBeforeResolved)
    }

    /// From a source of their own: the rest of a world does not depend on them.
    mutating func addFileRot(_ random: RandomSource) {
        guard rot, random.permille(500) else { return }
        kinds += Kind.ofFiles.filter { _ in random.permille(600) }
    }

    /// Rules that matter only while leases outlast the time in which members are removed.
    static let leaseRules: MutationSet = [
        .noLeaseCheck, .noLeaseWait, .restartedReplicaForgetsLease, .noLeaseMargin,
    ]
    static let scrubRules: MutationSet = [.scrubBelieves, .scrubTrustsFirst]
    /// Faults without which nobody misses the rule: every seed that judges it has them, besides
    /// those it draws.
    private static func needed(by mutations: MutationSet) -> [Kind] {
        if !mutations.isDisjoint(with: leaseRules) { return [.takeover] }
        return needs.first { mutations.contains($0.mutation) }?.kinds ?? []
    }
    private static let needs: [(mutation: MutationSet, kinds: [Kind])] = [
        (.flushWhileResolving, [.cutPower, .engineCrash]),
        (.rebootedSource, [.cutPower, .engineCrash]),
        (.clientGenerationIgnored, [.cutPower, .engineCrash]),
        (.stableBeforeResolved, [.cutPower, .engineCrash]),
        (.acceptRolledBackMember, [.restoreReplica]),
        (.rollBackNotRecorded, [.restoreReplica, .killReplica, .engineCrash]),
        (.joinKept, [.salvage, .cutConnection]),
        (.recordOlderIgnored, [.restoreStore]),
        (.inFlightRegionsNotCopied, [.cutConnection]),
        (.scrubBelieves, [.rot]), (.scrubTrustsFirst, [.rot]),
        (.joinerKeepsRequests, [.cutConnection, .slowDisk, .diskOutliers]),
        (.noJoinerLock, [.cutConnection, .slowDisk]),
        (.sameEpochIsSameRecord, [.restoreStore]),
        (.passedWritesNotLeftOut, [.slowDisk, .cutPower]),
        (.erroredWriteNotResolved, [.fullDisks]),
        (.rolledBackJoinerByDelta, [.restoreReplica, .killReplica]),
        (.deltaIgnoresJoinerBirth, [.takeover, .isolateReplica, .engineCrash]),
        (.equalRegionKeepsBirth, [.killReplica, .cutConnection]),
        (.snapshotWritesUnlayered, [.slowDisk, .cutConnection]),
        (.staleIsKept, [.killReplica, .cutPower, .blackout]),
        (.damagedRecordIsGap, [.rot, .rotLog]),
        (.growthNotSynced, [.cutPower, .blackout]),
        (.growthUnprepared, [.fullDisk, .killReplica]),
    ]
}
