import ArgumentParser
import HapteraTesting

/// Faults that need no rights of root: node agents cause them, or the replicas themselves.
package enum ChaosFault: String, CaseIterable, Sendable {
    case kill
    case pause
    case partition
    case flip
    case full

    var isOfReplicasOnly: Bool { self != .kill && self != .pause }
    /// Milliseconds it may last; nil: it is done at once.
    fileprivate var lasts: ClosedRange<Int>? {
        switch self {
        case .kill, .flip: nil
        // Some shorter than the removal deadline, some longer.
        case .pause, .partition: 100...5000
        case .full: 500...5000
        }
    }
}

package struct ChaosFaults: Equatable, Sendable {
    package var faults: [ChaosFault]
    package static let all = ChaosFaults(ChaosFault.allCases)
    static let words = ChaosFault.allCases.map(\.rawValue).joined(separator: ", ")

    private init(_ faults: [ChaosFault]) { self.faults = faults }

    package init(typed: String) throws {
        faults = try typed.split(separator: ",", omittingEmptySubsequences: false).map { word in
            guard let fault = ChaosFault(rawValue: String(word)) else {
                throw ValidationError("'\(word)' is no fault: use \(Self.words)")
            }
            return fault
        }
    }
}

/// Which fault comes next, where, and for how long: the same for the same seed, faults and number
/// of replicas, whatever becomes of them.
struct FaultPlan {
    struct Step: Equatable, Sendable {
        var fault: ChaosFault
        /// Index of the replica; nil: the engine.
        var replica: Int?
        var random: UInt64
        /// 0: it is done at once.
        var milliseconds: UInt64
        /// Nothing else is broken just then.
        var waitsForHealth: Bool
        var pauseMilliseconds: Int
    }

    /// What a fault did is known to the controller by then, at the latest.
    private static let newsMilliseconds = 2500

    private let faults: [ChaosFault]
    private let replicas: Int
    /// Bits flip in one replica only, and then nothing else is broken before all are in sync: one
    /// good copy of everything stays.
    private let rotten: Int
    private let random: RandomSource

    init(seed: UInt64, faults: [ChaosFault], replicas: Int) {
        self.faults = faults
        self.replicas = replicas
        random = RandomSource(seed: seed)
        rotten = random.below(replicas)
    }

    func next() -> Step {
        let fault = random.pick(faults)
        let flips = faults.contains(.flip)
        let place = random.below(fault.isOfReplicasOnly ? replicas : replicas + 1)
        let replica = fault == .flip ? rotten : place
        let waits = random.permille(500)
        return Step(
            fault: fault, replica: replica == replicas ? nil : replica, random: random.next(),
            milliseconds: UInt64(
                fault.lasts.map { random.between($0.lowerBound, $0.upperBound) } ?? 0),
            waitsForHealth: flips || waits,
            pauseMilliseconds: random.between(flips ? Self.newsMilliseconds : 200, 4000))
    }
}
