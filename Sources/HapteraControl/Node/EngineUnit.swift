import HapteraAPI
import HapteraCore
import HapteraHost

/// Runs one engine from attach to detach.
package actor EngineUnit {
    private let context: NodeContext
    private var wanted: Haptera_V1_DesiredEngine
    private var recordService: String
    private var supervision: Supervision
    private var settings: UnitSettings
    /// The replica list the running engine was told last; nil after an adoption.
    private var told: [Haptera_V1_ReplicaEndpoint]?
    /// The last that an engine told of.
    private var scrubWords: ScrubWords?
    /// The scrub that was begun last, and in which process: it may be over before it is told of.
    private var begunScrub: (process: ProcessIdentity, id: UInt64)?
    private var failure = ""
    private var isBusy = false
    /// The controller has said so since the agent started: not only its memory on disk.
    private var isConfirmed = false
    /// The process before was another boot's.
    private let isRebooted: Bool

    /// An engine answers `detach` when it has flushed.
    static let detachTimeoutSeconds = 60
    static let maintenanceTimeoutSeconds = 5
    /// Longer than an engine takes that leaves as it is.
    static let hangingMilliseconds: Int64 = 15_000
    private var askedToLeave: Int64?

    package init(
        _ wanted: Haptera_V1_DesiredEngine, recordService: String, _ context: NodeContext
    ) {
        self.wanted = wanted
        self.recordService = recordService
        self.context = context
        let files = UnitFiles(run: context.run, prefix: "e", id: wanted.volumeID)
        supervision = Supervision(files: files, isEager: true)
        settings = files.loadSettings()
        let process = ProcessFile.load(files.process)?.identity
        isRebooted = process.map { $0.bootID != ProcessIdentity.currentBootID } ?? false
    }

    package func want(
        _ wanted: Haptera_V1_DesiredEngine, recordService: String, isConfirmed: Bool
    ) {
        self.wanted = wanted
        self.recordService = recordService
        self.isConfirmed = isConfirmed
    }

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
        do {
            switch wanted.phase {
            case .attach, .maintain: try await serve(now: now)
            case .detach: try await detach(now: now)
            case .unspecified, .UNRECOGNIZED: return
            }
            failure = ""
        } catch {
            failure = "\(error)"
        }
    }

    static let maintenanceFlag = "--maintenance"
    /// No client is let in, only readers of snapshots.
    private var isMaintenance: Bool { wanted.phase == .maintain }

    private var isOfThisAttachment: Bool {
        settings.clientGeneration == wanted.clientGeneration
    }

    private func serve(now: Int64) async throws {
        if !isOfThisAttachment {
            // An engine of an earlier attachment must be gone before this one's is started.
            guard !supervision.isRunning else { return try await leave(now: now) }
            // As `forget`, which an attachment that follows at once does not leave the time for. A
            // kernel may keep the sockets of a process for long that has ended.
            if settings.isDetached {
                supervision.files.removeSockets()
                supervision.beginAnew()
            }
            settings.port = try port
            settings.isMaintenance = isMaintenance
            askedToLeave = nil
            settings.clientGeneration = wanted.clientGeneration
            settings.isDetached = false
            try supervision.files.save(settings)
        }
        guard !settings.isDetached else { return }
        // After a reboot the controller first says which client this is: see `clientGeneration`.
        guard supervision.isRunning || isConfirmed || !isRebooted else { return }
        if !supervision.isRunning { try start(now: now) }
        guard supervision.isRunning else { return }
        if supervision.isPollDue(now: now, isSettling: supervision.status["state"] != "serving") {
            let values = try? await context.host.request(
                supervision.files.control, "status", timeoutSeconds: 2)
            supervision.polled(values, now: now)
            try rememberInstance()
        }
        try await tellReplicas()
        try await tellLimits()
        try await tellDecision()
        try await tellScrub()
    }

    /// For clients. The address stays as long as the attachment, which a reboot does not end. That
    /// of a maintenance is the attachment's that follows: its readers find their snapshots again.
    private var port: Int {
        get throws {
            let isContinued =
                settings.port != 0 && (!settings.isDetached || settings.isMaintenance == true)
            if isContinued, context.host.isPortFree(settings.port, at: context.address) {
                return settings.port
            }
            return try context.host.findPort(at: context.address, in: context.ports)
        }
    }

    /// So that the next engine can be told that this one has ended, if it has.
    private func rememberInstance() throws {
        guard let process = supervision.process, let instance = supervision.status["instance"],
            let pid = supervision.status["pid"], Int32(pid) == process.pid
        else { return }
        let known = KnownEngine(identity: process, instance: instance)
        guard settings.engine != known else { return }
        settings.engine = known
        try supervision.files.save(settings)
    }

    private var wantedLimits: EngineLimitsTold {
        EngineLimitsTold(
            lease: wanted.leaseMilliseconds, ioTimeout: wanted.ioTimeoutMilliseconds,
            removalDeadline: wanted.removalDeadlineMilliseconds,
            detectsZeroes: wanted.detectZeroes ? true : nil)
    }

    /// 0 is what an older controller does not say: the engine's default then.
    private var limitArguments: [String] {
        let values: [(String, UInt64)] = [
            ("--lease", wanted.leaseMilliseconds), ("--renew", wanted.renewMilliseconds),
            ("--removal-deadline", wanted.removalDeadlineMilliseconds),
            ("--io-timeout", wanted.ioTimeoutMilliseconds),
            ("--min-in-sync", UInt64(wanted.minInSync)),
        ]
        return values.filter { $0.1 != 0 }.flatMap { [$0.0, "\($0.1)"] }
            + (wanted.detectZeroes ? ["--detect-zeroes", "on"] : [])
    }

    private func start(now: Int64) throws {
        guard supervision.backoff.mayStart(now: now) else { return }
        var arguments = [
            "--volume", wanted.volume, "--volume-id", wanted.volumeID, "--store", recordService,
            "--control", supervision.files.control,
            "--client-generation", "\(wanted.clientGeneration)",
            "--nbd", Names.endpoint(host: context.address, port: settings.port),
            "--nbd-unix", supervision.files.nbdSocket,
        ]
        if isMaintenance { arguments.append(Self.maintenanceFlag) }
        let replicas = wanted.replicas.filter { !$0.address.isEmpty }
        for replica in replicas {
            arguments += ["--replica", "\(replica.replicaID)=\(replica.address)"]
        }
        arguments += limitArguments
        // Only what is certain: that very process is gone, so nobody needs to wait for its leases.
        if let engine = settings.engine, context.host.ending(of: engine.identity) != nil {
            arguments += ["--ended-instance", engine.instance]
        }
        settings.limits = wantedLimits
        try supervision.files.save(settings)
        supervision.start(context.host, context.engineProgram, arguments, now: now)
        if supervision.isRunning { told = replicas }
    }

    private func tellReplicas() async throws {
        guard !supervision.status.isEmpty, let replicas = tellable, told != replicas else { return }
        let list = replicas.map { "\($0.replicaID)=\($0.address)" }.joined(separator: ",")
        _ = try await context.host.request(
            supervision.files.control, "replicas list=\(list)", timeoutSeconds: 5)
        told = replicas
    }

    /// Remembers how far a scrub is, and has the engine begin one that is wanted, or go on with one
    /// that did not end.
    private func tellScrub() async throws {
        let status = supervision.status
        let told = ScrubWords(status)
        if let told { scrubWords = told }
        guard status["state"] == "serving", let process = supervision.process,
            let progress = scrubToDo(told),
            begunScrub?.process != process || begunScrub?.id != progress.id
        else { return }
        _ = try await context.host.request(
            supervision.files.control, "scrub from=\(progress.text)", timeoutSeconds: 5)
        begunScrub = (process, progress.id)
    }
    /// `told`: the one that the engine is about, or was last.
    private func scrubToDo(_ told: ScrubWords?) -> ScrubProgress? {
        // One at a time.
        if let told, !told.isFinished { return nil }
        guard let wanted = ScrubProgress(text: wanted.scrub) else {
            guard told == nil, let words = scrubWords, !words.isFinished else { return nil }
            return words.progress
        }
        guard let words = scrubWords, words.progress.id == wanted.id else { return wanted }
        if words.isFinished { return nil }
        // The last word of an engine here may be newer than what the controller has noted.
        return words.progress.region >= wanted.region ? words.progress : wanted
    }
    /// What the engine may be told. A replica it has and is not told of would leave the volume, so
    /// one whose address was forgotten (with the metadata store) keeps the one told before; nil if
    /// that is not known here either: then the engine knows best.
    private var tellable: [Haptera_V1_ReplicaEndpoint]? {
        var replicas: [Haptera_V1_ReplicaEndpoint] = []
        for replica in wanted.replicas {
            if !replica.address.isEmpty {
                replicas.append(replica)
            } else if let before = told?.first(where: { $0.replicaID == replica.replicaID }) {
                replicas.append(before)
            } else if supervision.status["replica.\(replica.replicaID)"] != nil {
                return nil
            }
        }
        return replicas
    }

    /// The limits that can change while it runs; the others wait for the next attach.
    private func tellLimits() async throws {
        guard !supervision.status.isEmpty, let told = settings.limits,
            wanted.removalDeadlineMilliseconds != 0
        else { return }
        var now = wantedLimits
        now.lease = told.lease
        now.removalDeadline = max(now.removalDeadline, told.lease)
        guard now != told else { return }
        _ = try await context.host.request(
            supervision.files.control,
            "settings io-timeout=\(now.ioTimeout) removal-deadline=\(now.removalDeadline)"
                + " detect-zeroes=\(now.detectsZeroes == true ? "on" : "off")",
            timeoutSeconds: 5)
        settings.limits = now
        try supervision.files.save(settings)
    }

    private var needsDecision: Bool { supervision.status["needsDecision"] == "true" }

    /// Holds for the process that asked, and no other.
    private func tellDecision() async throws {
        guard wanted.acceptLossInstance != 0, needsDecision,
            supervision.status["instance"] == "\(wanted.acceptLossInstance)"
        else { return }
        _ = try await context.host.request(
            supervision.files.control, "accept-loss", timeoutSeconds: 5)
    }

    /// Answers when the snapshot is taken.
    func takeSnapshot(_ request: Haptera_V1_TakeSnapshot) async throws {
        try requireServing(request.clientGeneration)
        try Self.requireWord(request.name)
        let answer = try await context.host.request(
            supervision.files.control,
            "snapshot name=\(request.name) created=\(request.createdUnixMilliseconds)"
                + (request.hold == 0
                    ? "" : " hold=\(request.hold) for=\(request.holdMilliseconds)"),
            timeoutSeconds: Self.seconds(request.timeoutMilliseconds))
        // It was frozen at another time than with this hold.
        guard request.hold == 0 || answer["existed"] != "1" else {
            throw HostError("a snapshot '\(request.name)' was there before")
        }
    }

    func release(_ request: Haptera_V1_ReleaseChanges) async throws {
        try requireServing(request.clientGeneration)
        let answer = try await context.host.request(
            supervision.files.control, "release token=\(request.token)", timeoutSeconds: 5)
        guard answer["held"] == "1" else {
            throw HostError("its clients went on before every volume was frozen; try again")
        }
    }

    /// Answers when the volume holds what the snapshot does.
    func revert(_ request: Haptera_V1_RevertToSnapshot) async throws {
        try requireServing(request.clientGeneration)
        try Self.requireWord(request.snapshot)
        try Self.requireWord(request.keep)
        _ = try await context.host.request(
            supervision.files.control,
            "revert snapshot=\(request.snapshot) keep=\(request.keep) "
                + "created=\(request.createdUnixMilliseconds)",
            timeoutSeconds: Self.seconds(request.timeoutMilliseconds))
    }

    /// Answers when the record does not name the snapshot any more, or never did.
    func deleteSnapshot(_ request: Haptera_V1_DeleteSnapshot) async throws {
        try requireServing(request.clientGeneration)
        try Self.requireWord(request.name)
        _ = try await context.host.request(
            supervision.files.control, "delete-snapshot name=\(request.name)",
            timeoutSeconds: Self.seconds(request.timeoutMilliseconds))
    }

    /// Answers when every member is as large.
    func grow(_ request: Haptera_V1_GrowVolume) async throws {
        try requireServing(request.clientGeneration)
        _ = try await context.host.request(
            supervision.files.control, "resize size=\(request.sizeBytes)",
            timeoutSeconds: Self.seconds(request.timeoutMilliseconds))
    }

    /// Whoever asks has named the attachment it saw: the engine of another may serve clients who
    /// did not ask for this.
    private func requireServing(_ clientGeneration: UInt64) throws {
        guard supervision.isRunning, isOfThisAttachment, !settings.isDetached,
            wanted.phase == .attach || isMaintenance,
            settings.clientGeneration == clientGeneration
        else {
            throw HostError(
                "no engine serves volume '\(wanted.volume)' there; see 'storagectl volume show "
                    + "\(wanted.volume)'")
        }
    }
    /// A name becomes a word of a line.
    private static func requireWord(_ snapshot: String) throws {
        guard VolumeRecord.isValidSnapshotName(snapshot) else {
            throw HostError("'\(snapshot.prefix(100))' is no snapshot name")
        }
    }

    private static func seconds(_ milliseconds: UInt64) -> Int {
        Int(clamping: max((milliseconds + 999) / 1000, 1))
    }

    private func detach(now: Int64) async throws {
        if settings.isDetached, isOfThisAttachment, !supervision.isRunning { return }
        guard !supervision.isRunning else { return try await leave(now: now) }
        settings.clientGeneration = wanted.clientGeneration
        settings.isDetached = true
        try supervision.files.save(settings)
    }

    /// Asks the engine to leave in order; the next rounds see it gone. Never killed: it may hold
    /// acknowledged writes that wait for a flush. But one that lets no client in holds none, and
    /// must not keep anybody from attaching because it hangs.
    private func leave(now: Int64) async throws {
        guard settings.isMaintenance == true else {
            _ = try await context.host.request(
                supervision.files.control, "detach", timeoutSeconds: Self.detachTimeoutSeconds)
            return
        }
        let since = askedToLeave ?? now
        askedToLeave = since
        do {
            _ = try await context.host.request(
                supervision.files.control, "detach",
                timeoutSeconds: Self.maintenanceTimeoutSeconds)
        } catch {
            if now - since >= Self.hangingMilliseconds, let process = supervision.process {
                context.host.kill(process)
            }
            throw error
        }
    }

    var process: ProcessIdentity? { supervision.process }

    /// True once the controller may forget the attachment and we the unit.
    package var isDetached: Bool {
        settings.isDetached && isOfThisAttachment && !supervision.isRunning
    }

    /// Nobody asks for it any more: only its log stays.
    package func forget() { supervision.files.removeAllButLog() }

    package var report: Haptera_V1_EngineReport {
        let status = supervision.status
        var report = Haptera_V1_EngineReport()
        report.volumeID = wanted.volumeID
        report.clientGeneration = wanted.clientGeneration
        report.pid = supervision.process?.pid ?? 0
        report.restarts = supervision.backoff.restarts
        report.uri = status["uri"] ?? ""
        report.unixUri = status["unixURI"] ?? ""
        report.epoch = status["epoch"].flatMap { UInt64($0) } ?? 0
        report.connections = status["connections"].flatMap { UInt32($0) } ?? 0
        report.rebuildDone = status["rebuildDone"].flatMap { UInt64($0) } ?? 0
        report.rebuildTotal = status["rebuildTotal"].flatMap { UInt64($0) } ?? 0
        report.reason = status["reason"] ?? (failure.isEmpty ? supervision.reason : failure)
        report.replicas = status.filter { $0.key.hasPrefix("replica.") }
            .sorted { $0.key < $1.key }
            .map { key, value in
                var replica = Haptera_V1_EngineReplicaReport()
                replica.replicaID = String(key.dropFirst("replica.".count))
                replica.state = value
                return replica
            }
        report.instance = status["instance"].flatMap { UInt64($0) } ?? 0
        report.needsDecision = needsDecision
        report.hadRemoteClient = status["remoteClients"].map { $0 != "0" } ?? false
        report.lastEnding = supervision.lastEnding
        report.rebuilds = Self.rebuilds(status)
        if let scrubWords { report.scrub = scrubWords.report }
        if let damage = DamageWords.report(status) { report.damage = damage }
        report.state = state
        return report
    }

    /// From the keys `rebuild.*` and `resolve.*`, which are there while there is something to tell.
    static func rebuilds(_ status: [String: String]) -> [Haptera_V1_RebuildReport] {
        func number(_ key: String) -> UInt64 { status[key].flatMap { UInt64($0) } ?? 0 }
        var reports: [Haptera_V1_RebuildReport] = []
        if let replica = status["rebuild.replica"], !replica.isEmpty {
            var report = Haptera_V1_RebuildReport()
            report.replicaID = replica
            report.kind = status["rebuild.kind"] ?? ""
            report.phase = status["rebuild.phase"] ?? ""
            report.regionsDone = number("rebuild.regionsDone")
            report.regionsTotal = number("rebuild.regionsTotal")
            report.bytesCopied = number("rebuild.bytesCopied")
            report.bytesPerSecond = number("rebuild.bytesPerSecond")
            report.elapsedMilliseconds = number("rebuild.elapsedMilliseconds")
            reports.append(report)
        }
        if number("resolve.regionsTotal") > number("resolve.regionsDone") {
            var report = Haptera_V1_RebuildReport()
            report.kind = "resolve"
            report.regionsDone = number("resolve.regionsDone")
            report.regionsTotal = number("resolve.regionsTotal")
            report.bytesCopied = number("resolve.bytesCopied")
            report.elapsedMilliseconds = number("resolve.elapsedMilliseconds")
            reports.append(report)
        }
        return reports
    }

    private var state: Haptera_V1_EngineReport.State {
        if isDetached { return .detached }
        guard isOfThisAttachment, supervision.isRunning else {
            return supervision.reason.isEmpty ? .starting : .waiting
        }
        switch supervision.status["state"] {
        case "serving": return .serving
        case "stalled": return .stalled
        default: return .starting
        }
    }
}
