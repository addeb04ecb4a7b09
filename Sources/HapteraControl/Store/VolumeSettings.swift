import GRDB
import HapteraAPI
import HapteraCore
import HapteraHost

/// How a volume behaves when something is slow or gone. Times are milliseconds.
package struct VolumeSettings: Equatable, Sendable {
    /// Writes wait while fewer replicas are in sync.
    package var minInSync = 1
    /// A request not answered for this long gets an error; 0: it waits.
    package var ioTimeout: Int64 = 0
    /// How long a replica's answer lets the engine serve.
    package var lease: Int64 = 500
    /// A replica that owes an answer this long leaves the in-sync set.
    package var removalDeadline: Int64 = 3000
    /// A replica out of the in-sync set and away for longer is replaced; 0: never.
    package var staleReplicaTimeout: Int64 = 30 * 60_000
    /// A write of nothing but zeroes takes no space.
    package var detectsZeroes = false

    package init() {}

    static let leases: ClosedRange<Int64> = 100...60_000
    static let removalDeadlineMax: Int64 = 600_000
    static let ioTimeouts: ClosedRange<Int64> = 1000...86_400_000
    static let staleReplicaTimeouts: ClosedRange<Int64> = 1000...365 * 86_400_000

    /// Leases are renewed three times before they run out.
    package var renew: Int64 { lease * 3 / 10 }

    /// Refuses what cannot work, and says what would.
    package func check(replicas: Int) throws(ControlError) {
        func refuse(_ message: String) throws(ControlError) -> Never {
            throw ControlError(.invalid, message)
        }
        func text(_ milliseconds: Int64) -> String { Durations.text(UInt64(milliseconds)) }
        guard (1...replicas).contains(minInSync) else {
            try refuse(
                "--min-in-sync \(minInSync) is not possible with \(replicas) replicas: "
                    + "use 1 to \(replicas)")
        }
        guard Self.leases.contains(lease) else {
            try refuse(
                "--lease is \(text(Self.leases.lowerBound)) to \(text(Self.leases.upperBound)), "
                    + "not \(text(lease))")
        }
        guard removalDeadline <= Self.removalDeadlineMax else {
            try refuse(
                "--removal-deadline is at most \(text(Self.removalDeadlineMax)), "
                    + "not \(text(removalDeadline))")
        }
        guard lease <= removalDeadline else {
            try refuse(
                "--removal-deadline \(text(removalDeadline)) is shorter than the lease of "
                    + "\(text(lease)): lengthen it, or shorten --lease")
        }
        guard ioTimeout == 0 || Self.ioTimeouts.contains(ioTimeout) else {
            try refuse(
                "--io-timeout is 0 (wait) or \(text(Self.ioTimeouts.lowerBound)) to "
                    + "\(text(Self.ioTimeouts.upperBound)), not \(text(ioTimeout))")
        }
        guard staleReplicaTimeout == 0 || Self.staleReplicaTimeouts.contains(staleReplicaTimeout)
        else {
            try refuse(
                "--stale-replica-timeout is 0 (never) or "
                    + "\(text(Self.staleReplicaTimeouts.lowerBound)) to "
                    + "\(text(Self.staleReplicaTimeouts.upperBound)), "
                    + "not \(text(staleReplicaTimeout))")
        }
    }

    /// With what is given in place of what is here.
    package func changed(by change: Haptera_V1_VolumeSettings) -> VolumeSettings {
        var result = self
        if change.hasMinInSync { result.minInSync = Int(change.minInSync) }
        if change.hasIoTimeoutMilliseconds {
            result.ioTimeout = Int64(clamping: change.ioTimeoutMilliseconds)
        }
        if change.hasLeaseMilliseconds { result.lease = Int64(clamping: change.leaseMilliseconds) }
        if change.hasRemovalDeadlineMilliseconds {
            result.removalDeadline = Int64(clamping: change.removalDeadlineMilliseconds)
        }
        if change.hasStaleReplicaTimeoutMilliseconds {
            result.staleReplicaTimeout = Int64(clamping: change.staleReplicaTimeoutMilliseconds)
        }
        if change.hasDetectZeroes { result.detectsZeroes = change.detectZeroes }
        return result
    }

    package var message: Haptera_V1_VolumeSettings {
        var message = Haptera_V1_VolumeSettings()
        message.minInSync = UInt32(minInSync)
        message.ioTimeoutMilliseconds = UInt64(ioTimeout)
        message.leaseMilliseconds = UInt64(lease)
        message.removalDeadlineMilliseconds = UInt64(removalDeadline)
        message.staleReplicaTimeoutMilliseconds = UInt64(staleReplicaTimeout)
        message.detectZeroes = detectsZeroes
        return message
    }

    /// What differs from `other`, for the event.
    func differences(from other: VolumeSettings) -> String {
        var parts: [String] = []
        if minInSync != other.minInSync { parts.append("min-in-sync \(minInSync)") }
        let times: [(String, Int64, Int64)] = [
            ("io-timeout", ioTimeout, other.ioTimeout), ("lease", lease, other.lease),
            ("removal-deadline", removalDeadline, other.removalDeadline),
            ("stale-replica-timeout", staleReplicaTimeout, other.staleReplicaTimeout),
        ]
        for (name, value, before) in times where value != before {
            parts.append("\(name) \(Durations.text(UInt64(value)))")
        }
        if detectsZeroes != other.detectsZeroes {
            parts.append("detect-zeroes \(detectsZeroes ? "on" : "off")")
        }
        return parts.joined(separator: ", ")
    }
}

extension VolumeRecord {
    /// Those that the record has too, in a first record: later they are the engine's to change.
    mutating func take(_ settings: VolumeSettings) {
        minInSync = UInt8(clamping: settings.minInSync)
        leaseMilliseconds = UInt32(clamping: settings.lease)
    }
}

extension VolumeRow {
    package var settings: VolumeSettings {
        get {
            var settings = VolumeSettings()
            settings.minInSync = minInSync
            settings.ioTimeout = ioTimeoutMilliseconds
            settings.lease = leaseMilliseconds
            settings.removalDeadline = removalDeadlineMilliseconds
            settings.staleReplicaTimeout = staleReplicaTimeoutMilliseconds
            settings.detectsZeroes = detectsZeroes
            return settings
        }
        set {
            minInSync = newValue.minInSync
            ioTimeoutMilliseconds = newValue.ioTimeout
            leaseMilliseconds = newValue.lease
            removalDeadlineMilliseconds = newValue.removalDeadline
            staleReplicaTimeoutMilliseconds = newValue.staleReplicaTimeout
            detectsZeroes = newValue.detectsZeroes
        }
    }
}

extension MetadataStore {
    /// Changes what is given and leaves the rest.
    package func updateVolume(
        _ name: String, _ change: Haptera_V1_VolumeSettings
    ) async throws -> StoredVolume {
        try await changeVolume(name) { db, stored in
            var row = stored.volume
            let before = row.settings
            row.settings = before.changed(by: change)
            guard row.settings != before else { return }
            try row.settings.check(replicas: row.replicaCount)
            try row.update(db)
            try self.addEvent(
                db, "VolumeUpdated", "volume/\(name)", row.settings.differences(from: before))
        }
    }
}
