import HapteraAPI
import HapteraCore
import HapteraHost

/// What all units of a node share.
package struct NodeContext: Sendable {
    package var host: any ProcessHost
    package var directory: String
    /// Host name or address the node's processes listen on.
    package var address: String
    package var ports: ClosedRange<Int>
    package var replicaProgram: String
    package var engineProgram: String

    package init(
        host: any ProcessHost, directory: String, address: String, ports: ClosedRange<Int>,
        replicaProgram: String, engineProgram: String
    ) {
        self.host = host
        self.directory = directory
        self.address = address
        self.ports = ports
        self.replicaProgram = replicaProgram
        self.engineProgram = engineProgram
    }
    var run: String { directory + "/run" }
}

/// Makes, runs and removes one replica.
package actor ReplicaUnit {
    private let context: NodeContext
    private let directory: String
    private var wanted: Haptera_V1_DesiredReplica
    private var supervision: Supervision
    private var settings: UnitSettings
    private var isCreated = false
    private var isRemoved = false
    private var failure = ""
    /// What a clone's replica waits for: that ends by itself, and is no failure.
    private var sharing = SharingWait()
    private var creation = RestartBackoff()
    private var shutdownAsked: Int64?
    private var isBusy = false

    /// After being told to shut down, a replica gets this long to write its log back.
    package static let shutdownMilliseconds: Int64 = 10_000
    /// A replica answers `share` when what it still has to write back is on its disk.
    static let shareTimeoutSeconds = 10
    /// Until it is asked again.
    package static let shareRetryMilliseconds: Int64 = 500

    package init(_ wanted: Haptera_V1_DesiredReplica, _ context: NodeContext) {
        self.wanted = wanted
        self.context = context
        directory = "\(context.directory)/replicas/\(wanted.replicaID)"
        let files = UnitFiles(run: context.run, prefix: "r", id: wanted.replicaID)
        supervision = Supervision(files: files)
        settings = files.loadSettings()
    }

    package func want(_ wanted: Haptera_V1_DesiredReplica) { self.wanted = wanted }

    /// One round: look, then do the next thing there is to do.
    package func step(now: Int64) async {
        guard !isBusy else { return }
        isBusy = true
        defer { isBusy = false }
        if supervision.mustAdopt {
            let answer = try? await context.host.request(
                supervision.files.control, "status", timeoutSeconds: 2)
            supervision.adopt(context.host, answer: answer, now: now)
        }
        supervision.observe(context.host, now: now)
        switch wanted.phase {
        case .create, .clone, .run: await serve(now: now)
        case .remove: await remove(now: now)
        case .unspecified, .UNRECOGNIZED: return
        }
    }

    private func serve(now: Int64) async {
        if !isCreated { await create(now: now) }
        guard isCreated else { return }
        if !supervision.isRunning { start(now: now) }
        guard supervision.isPollDue(now: now, isSettling: supervision.status.isEmpty) else {
            return
        }
        let values = try? await context.host.request(
            supervision.files.control, "status", timeoutSeconds: 2)
        supervision.polled(values, now: now)
    }

    /// A directory that held data is never made anew: an empty replica under the old identity would
    /// pass for a member.
    private func create(now: Int64) async {
        if wanted.phase == .run {
            isCreated = context.host.directoryExists(directory)
            failure = isCreated ? "" : Self.goneText(directory, wanted)
            return
        }
        guard creation.mayStart(now: now), now >= sharing.notBefore else { return }
        do {
            try HostFiles.makeDirectory(context.directory + "/replicas")
            if wanted.phase == .clone {
                try await makeClone()
            } else {
                try await make([
                    "create", "--dir", directory, "--volume-id", wanted.volumeID, "--volume",
                    wanted.volume, "--replica-id", wanted.replicaID, "--incarnation",
                    wanted.incarnation, "--size", "\(wanted.sizeBytes)",
                ])
            }
            isCreated = true
            failure = ""
            sharing = SharingWait()
        } catch let wait as SharingWait {
            failure = ""
            sharing = wait
            sharing.notBefore = now + Self.shareRetryMilliseconds
        } catch {
            failure = "\(error)"
            sharing = SharingWait()
            creation.ended(now: now)
        }
    }

    static func goneText(_ directory: String, _ wanted: Haptera_V1_DesiredReplica) -> String {
        "its directory \(directory) is gone: is its disk mounted? If it is lost, have the replica "
            + "made anew with: storagectl replica replace \(wanted.volume) \(wanted.replicaID)"
    }

    private func make(_ arguments: [String]) async throws {
        let status = try await context.host.run(
            context.replicaProgram, arguments, log: supervision.files.log)
        guard status == 0 else {
            let line = context.host.lastLine(of: supervision.files.log)
            throw HostError("cannot be created (status \(status)): \(line)")
        }
    }

    /// 1. the source links its layers  -> a directory without a manifest, which is no replica yet
    /// 2. the new one gets its manifest -> a replica, which needs its source no more
    ///
    /// Both may be done again, and are after a crash between them.
    private func makeClone() async throws {
        // Made before our own restart: its source may have gone since.
        guard !context.host.isManifestWritten(directory + "/manifest") else { return }
        let source = wanted.cloneSource
        let record = [UInt8](source.record)
        guard let epoch = VolumeRecord(decoding: record)?.epoch else {
            throw HostError("cannot be created: its volume's first record is malformed")
        }
        // The source never makes it: it may come late to a request, when nobody wants it any more.
        try HostFiles.makeDirectory(directory)
        let shared = try await askToShare(source, epoch)
        guard let layers = shared["layers"], let size = shared["size"],
            let logIndex = shared["logIndex"]
        else {
            throw HostError("replica \(source.replicaID) does not say which layers it shared")
        }
        try await make([
            "clone", "--dir", directory, "--record", hexadecimal(record), "--replica-id",
            wanted.replicaID, "--incarnation", wanted.incarnation, "--layers", layers, "--size",
            size, "--log-index", logIndex,
        ])
    }

    /// Throws `SharingWait` if the same may be granted later: its source does not run, or does not
    /// answer, or says so.
    private func askToShare(
        _ source: Haptera_V1_CloneSource, _ epoch: Epoch
    ) async throws -> [String: String] {
        let words = "replica \(source.replicaID) to share its layers"
        // It may take until it is answered, or is not.
        if sharing.reason.isEmpty { sharing.reason = "waits for \(words)" }
        guard context.host.directoryExists("\(context.directory)/replicas/\(source.replicaID)")
        else {
            throw HostError("replica \(source.replicaID), whose layers it was to share, is gone")
        }
        let control = UnitFiles(run: context.run, prefix: "r", id: source.replicaID).control
        do {
            return try await context.host.request(
                control,
                "share layer=\(source.layer) into=\(wanted.replicaID) epoch=\(epoch.rawValue)",
                timeoutSeconds: Self.shareTimeoutSeconds)
        } catch let error as ControlSocket.NoAnswer {
            throw SharingWait(reason: "waits for \(words): \(error)")
        } catch let error as ControlSocket.NotReached {
            throw SharingWait(reason: "waits for \(words): its process does not run (\(error))")
        } catch let error as HostError where error.description.hasPrefix(SharingRefusal.notYetText)
        {
            throw SharingWait(reason: "waits for \(words): \(error)")
        } catch {
            throw HostError("replica \(source.replicaID) does not share its layers: \(error)")
        }
    }

    private func start(now: Int64) {
        guard supervision.backoff.mayStart(now: now) else { return }
        do {
            // Engines are told when it changes, so a port that somebody took is given up.
            if settings.port == 0 || !context.host.isPortFree(settings.port, at: context.address) {
                settings.port = try context.host.findPort(at: context.address, in: context.ports)
                try supervision.files.save(settings)
            }
            failure = ""
        } catch {
            failure = "\(error)"
            return
        }
        supervision.start(
            context.host, context.replicaProgram,
            [
                "serve", "--dir", directory, "--listen", address, "--control",
                supervision.files.control,
            ] + (wanted.scratch ? ["--allow-faults"] : []), now: now)
    }

    private func remove(now: Int64) async {
        guard !isRemoved else { return }
        sharing = SharingWait()
        if let process = supervision.process {
            if let shutdownAsked, now - shutdownAsked > Self.shutdownMilliseconds {
                context.host.kill(process)
                return
            }
            if shutdownAsked == nil { shutdownAsked = now }
            _ = try? await context.host.request(
                supervision.files.control, "shutdown", timeoutSeconds: 10)
            return
        }
        do {
            try await context.host.removeDirectory(directory)
            supervision.files.removeAllButLog()
            isRemoved = true
            failure = ""
        } catch {
            failure = "cannot remove \(directory): \(error)"
        }
    }

    var process: ProcessIdentity? { supervision.process }

    private var address: String { Names.endpoint(host: context.address, port: settings.port) }

    /// `LAYER:BYTES,...`
    static func layerBytes(_ text: String) -> [UInt32: UInt64] {
        var bytes: [UInt32: UInt64] = [:]
        for part in text.split(separator: ",") {
            let words = part.split(separator: ":")
            guard words.count == 2, let layer = UInt32(words[0]), let count = UInt64(words[1])
            else { continue }
            bytes[layer] = count
        }
        return bytes
    }

    /// Of the replica's last status.
    private func number(_ key: String) -> UInt64? {
        supervision.status[key].flatMap { UInt64($0) }
    }

    package var report: Haptera_V1_ReplicaReport {
        var report = Haptera_V1_ReplicaReport()
        report.replicaID = wanted.replicaID
        report.directory = isCreated || isRemoved ? directory : ""
        report.address = settings.port == 0 ? "" : address
        report.restarts = supervision.backoff.restarts
        report.pid = supervision.process?.pid ?? 0
        report.allocatedBytes = number("allocatedBytes") ?? 0
        report.layerBytes = Self.layerBytes(supervision.status["layerBytes"] ?? "")
        report.exclusiveBytes = Self.layerBytes(supervision.status["exclusiveBytes"] ?? "")
        // Left out by who has not counted them, and by replicas of an earlier version.
        if let shared = number("sharedBytes") { report.sharedBytes = shared }
        if let reclaimable = number("reclaimableBytes") { report.reclaimableBytes = reclaimable }
        if let stuck = number("stuckBytes") { report.stuckBytes = stuck }
        report.reason =
            [failure, sharing.reason, supervision.reason].first { !$0.isEmpty } ?? ""
        report.state =
            if isRemoved {
                .removed
            } else if !failure.isEmpty {
                .failed
            } else if supervision.isRunning {
                supervision.status.isEmpty ? .created : .running
            } else if isCreated {
                supervision.reason.isEmpty ? .created : .waiting
            } else {
                .unspecified
            }
        return report
    }
}

/// Why a clone's replica is not made yet, and when its source is asked again.
private struct SharingWait: Error {
    var reason = ""
    var notBefore: Int64 = .min
}
