import GRDB
import HapteraHost

/// What a node's disk has, by its last report.
package struct NodeSpace: Equatable, Sendable {
    package var capacityBytes: UInt64
    package var availableBytes: UInt64
    /// What replicas take there, by id.
    package var allocated: [String: UInt64]

    package init(
        capacityBytes: UInt64, availableBytes: UInt64, allocated: [String: UInt64] = [:]
    ) {
        self.capacityBytes = capacityBytes
        self.availableBytes = availableBytes
        self.allocated = allocated
    }
}

/// By node; nodes whose disk is not known are left out.
package typealias NodeSpaces = [String: NodeSpace]

/// How much may be put on a node. Where there is no row, the defaults.
package struct NodeLimits: Codable, Equatable, Sendable, FetchableRecord, PersistableRecord {
    package static let databaseTableName = "nodeLimits"
    package static let reserveDefault: Int64 = 256 << 20
    package static let overcommitMax = 100_000
    package static let reserveMax = Int64(VolumeSize.maximum)

    package var node: String
    /// Of the capacity, at most so much may be promised; 0: no limit.
    package var overcommitPercent = 0
    package var reserveBytes = NodeLimits.reserveDefault
    /// Less was available than that, and not yet clearly more again.
    package var isLow = false

    package init(node: String) { self.node = node }

    /// What nobody chose is no more than a sixteenth of a small disk.
    package func reserve(of space: NodeSpace) -> UInt64 {
        let reserve = UInt64(reserveBytes)
        return reserveBytes == Self.reserveDefault
            ? min(reserve, space.capacityBytes / 16) : reserve
    }

    /// What `isLow` becomes; nil: it stays. Space has recovered when an eighth of the reserve more
    /// than that is available: what goes to and fro around it is told once.
    package func turn(_ space: NodeSpace) -> Bool? {
        let reserve = reserve(of: space)
        if !isLow { return space.availableBytes < reserve ? true : nil }
        return space.availableBytes >= reserve + reserve / 8 ? false : nil
    }

    package var text: String {
        let overcommit = overcommitPercent == 0 ? "none" : "\(overcommitPercent)%"
        return "overcommit \(overcommit), reserve \(VolumeSize.text(UInt64(reserveBytes)))"
    }
}

/// What one more replica takes of its node.
package struct ReplicaNeed: Equatable, Sendable {
    package var volume: String
    package var sizeBytes: UInt64
    /// What it is to be filled with.
    package var dataBytes: UInt64

    /// The log and the empty files of a replica.
    static let ownBytes: UInt64 = 16 << 20

    package init(volume: String, sizeBytes: UInt64, dataBytes: UInt64 = 0) {
        self.volume = volume
        self.sizeBytes = sizeBytes
        self.dataBytes = dataBytes
    }

    /// It shares what it begins with.
    var withoutData: ReplicaNeed { ReplicaNeed(volume: volume, sizeBytes: sizeBytes) }
    var words: String { "a replica of volume '\(volume)' (\(VolumeSize.text(sizeBytes)))" }
}

/// What is left for replicas on one node: figures, and no more, so that whoever decides in a
/// transaction decides by what is stored in it.
package struct NodeRoom: Equatable, Sendable {
    package var limits: NodeLimits
    /// Nil: not known, and nothing is refused for it.
    package var space: NodeSpace?
    /// Of all volumes.
    package var replicas = 0
    /// The sum of the sizes of their volumes.
    package var promisedBytes: UInt64 = 0
    /// What those that are being filled have not got yet.
    package var incomingBytes: UInt64 = 0

    package init(limits: NodeLimits, space: NodeSpace?) {
        self.limits = limits
        self.space = space
    }

    /// Nil: no limit.
    package var promisableBytes: UInt64? {
        guard let space, limits.overcommitPercent > 0 else { return nil }
        return VolumeSize.percent(
            UInt32(clamping: limits.overcommitPercent), of: space.capacityBytes)
    }

    /// Why there is no room for so much more; nil: there is. `what`: for errors.
    package func objection(to what: String, promise: UInt64, data: UInt64) -> String? {
        guard let space else { return nil }
        let node = limits.node
        let text = VolumeSize.text
        if let limit = promisableBytes, saturating(promisedBytes, promise) > limit {
            return "node \(node) has no room for \(what): \(text(promisedBytes)) are promised to "
                + "its replicas, and at most \(text(limit)) may be "
                + "(\(limits.overcommitPercent)% of \(text(space.capacityBytes))); use another "
                + "node, remove replicas there, or see 'storagectl node update \(node) "
                + "--overcommit'"
        }
        let reserve = limits.reserve(of: space)
        let needed = saturating(saturating(data, incomingBytes), reserve)
        if space.availableBytes < needed {
            var parts = ["\(text(reserve)) reserved"]
            if data > 0 { parts.insert("\(text(data)) needed", at: 0) }
            if incomingBytes > 0 { parts.append("\(text(incomingBytes)) on their way") }
            return "node \(node) has no room for \(what): \(text(space.availableBytes)) are "
                + "available (\(parts.joined(separator: ", "))); free space there, use another "
                + "node, or see 'storagectl node update \(node) --reserve'"
        }
        return nil
    }

    /// One more replica; the objection if there is no room for it.
    package mutating func take(_ need: ReplicaNeed) -> String? {
        let data = saturating(need.dataBytes, ReplicaNeed.ownBytes)
        if let why = objection(to: need.words, promise: need.sizeBytes, data: data) { return why }
        replicas += 1
        promisedBytes = saturating(promisedBytes, need.sizeBytes)
        incomingBytes = saturating(incomingBytes, data)
        return nil
    }
}

func saturating(_ one: UInt64, _ other: UInt64) -> UInt64 {
    let (sum, overflow) = one.addingReportingOverflow(other)
    return overflow ? .max : sum
}
