import HapteraAPI
import HapteraCore
import HapteraHost

/// Who reads snapshots, by volume id: each says so again before its lease has run out. In memory: a
/// controller that starts anew hears of them in time.
struct SnapshotReaders {
    static let leases: ClosedRange<UInt64> = 1000...60_000
    static let leaseDefault: UInt64 = 10_000
    /// Of one volume.
    static let countMax = 64

    private struct Reader {
        var snapshot: String
        var until: Int64
    }
    private var readers: [String: [UInt64: Reader]] = [:]

    func count(_ volume: String) -> Int { readers[volume]?.count ?? 0 }
    func count(_ volume: String, of snapshot: String) -> Int {
        readers[volume]?.values.count { $0.snapshot == snapshot } ?? 0
    }
    func isKnown(_ reader: UInt64, of volume: String) -> Bool {
        readers[volume]?[reader] != nil
    }

    /// False: there are too many.
    mutating func renew(
        _ reader: UInt64, of volume: String, _ snapshot: String, until: Int64
    ) -> Bool {
        guard isKnown(reader, of: volume) || count(volume) < Self.countMax else { return false }
        readers[volume, default: [:]][reader] = Reader(snapshot: snapshot, until: until)
        return true
    }
    mutating func end(_ reader: UInt64, of volume: String) {
        readers[volume]?[reader] = nil
        if readers[volume]?.isEmpty == true { readers[volume] = nil }
    }
    mutating func expire(now: Int64) {
        readers = readers.mapValues { $0.filter { $0.value.until > now } }
            .filter { !$0.value.isEmpty }
    }
}

/// Reading snapshots: the attached engine serves them beside the volume, and that of a volume that
/// is not attached nothing else.
extension Controller {
    /// Answers with where the snapshot is read, when it can be. Deleted it is not meanwhile: the
    /// engine refuses while somebody is connected, and this while somebody is about to be.
    package func readSnapshot(
        _ request: Haptera_V1_ReadSnapshotRequest
    ) async throws -> Haptera_V1_Snapshot {
        try Self.check(request.name)
        guard request.reader != 0 else {
            throw ControlError(.invalid, "a reader of a snapshot needs a number that is not 0")
        }
        let id = try await store.volume(named: request.volume).volume.id
        if request.ends {
            readers.end(request.reader, of: id)
            try await tendMaintenance(of: request.volume)
            return try await snapshot(request.name, of: request.volume)
        }
        let isNew = !readers.isKnown(request.reader, of: id)
        do {
            try renew(request, id)
            return try await read(request)
        } catch {
            // One that reads has its lease: whatever hinders it may pass.
            if isNew { readers.end(request.reader, of: id) }
            throw error
        }
    }

    private func renew(_ request: Haptera_V1_ReadSnapshotRequest, _ id: String) throws {
        let wanted = request.leaseMilliseconds
        let lease =
            wanted == 0
            ? SnapshotReaders.leaseDefault
            : min(max(wanted, SnapshotReaders.leases.lowerBound), SnapshotReaders.leases.upperBound)
        guard
            readers.renew(
                request.reader, of: id, request.name, until: store.clock() + Int64(lease))
        else {
            throw Self.refused(
                "\(SnapshotReaders.countMax) readers have snapshots of volume "
                    + "'\(request.volume)' open, as many as may: wait until one has done")
        }
    }

    private func read(
        _ request: Haptera_V1_ReadSnapshotRequest
    ) async throws -> Haptera_V1_Snapshot {
        try await withEngine(
            of: request.volume, for: "a snapshot is being read",
            timeout: request.timeoutMilliseconds, yields: true,
            isNeeded: { stored in
                _ = try Self.named(request.name, in: stored)
                return true
            }
        ) { use in
            let id = use.stored.volume.id
            if let ticket = use.ticket { maintenances.hold(id, ticket, .readers) }
            // It may have run out while an engine was waited for.
            try renew(request, id)
            let found = try await first(by: use.deadline) {
                let snapshot = try await snapshot(request.name, of: request.volume)
                return snapshot.uri.isEmpty && snapshot.unixUri.isEmpty ? nil : snapshot
            }
            guard let found else {
                throw Self.refused(
                    "the engine of volume '\(request.volume)' does not say where its snapshots are "
                        + "read; try again")
            }
            return found
        }
    }

    /// Where an engine serves the volume's snapshots; empty: nowhere, or for nobody who asked.
    func snapshotPlaces(_ stored: StoredVolume) -> (uri: String, unixURI: String) {
        let now = VolumeView(stored, nodes: observedNodes)
        guard let engine = now.engine else { return ("", "") }
        let isRead =
            stored.volume.isMaintained && readers.count(stored.volume.id) > 0
            && engine.state == .serving && !stored.volume.isDetaching
        guard now.state == .attached || isRead else { return ("", "") }
        return (engine.uri, engine.unixUri)
    }

    /// One that is read is not deleted, though its reader may just be looking for another engine.
    func requireUnread(_ snapshot: String, of volume: VolumeRow) throws {
        let count = readers.count(volume.id, of: snapshot)
        guard count > 0 else { return }
        throw Self.refused(
            "snapshot '\(snapshot)' of volume '\(volume.name)' is being read by \(count): wait "
                + "until that is done, or end it")
    }
}
