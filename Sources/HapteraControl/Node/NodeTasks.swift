import Foundation
import Glibc
import HapteraAPI
import HapteraCore
import HapteraHost

/// What the controller asks of an agent between two desired states.
extension NodeAgent {
    package func perform(_ task: Haptera_V1_AgentTask) async -> Haptera_V1_AgentAnswer {
        var answer = Haptera_V1_AgentAnswer()
        answer.taskID = task.id
        do {
            switch task.task {
            case .inspect(let request):
                if request.replicaIds.isEmpty {
                    answer.replicas = directories
                    answer.engines = runningEngines
                } else {
                    for id in request.replicaIds { answer.replicas.append(await inspect(id)) }
                }
            case .endEngine(let request):
                try await end(await engineProcess(request.volumeID))
            case .fault(let fault): try await inject(fault)
            case .takeSnapshot(let request): try await takeSnapshot(request)
            case .deleteSnapshot(let request): try await deleteSnapshot(request)
            case .growVolume(let request): try await growVolume(request)
            case .revertToSnapshot(let request): try await revert(request)
            case .releaseChanges(let request): try await releaseChanges(request)
            case nil: throw HostError("this agent does not know the task; it is too old")
            }
        } catch let error as ControlSocket.NoAnswer {
            answer.error = "\(error)"
            answer.inDoubt = true
        } catch {
            answer.error = "\(error)"
        }
        return answer
    }

    private func takeSnapshot(_ request: Haptera_V1_TakeSnapshot) async throws {
        try await askEngine(of: request.volumeID, doubt: SnapshotResult.doubtText) {
            try await $0.takeSnapshot(request)
        }
    }

    private func deleteSnapshot(_ request: Haptera_V1_DeleteSnapshot) async throws {
        try await askEngine(of: request.volumeID, doubt: SnapshotResult.deletionDoubtText) {
            try await $0.deleteSnapshot(request)
        }
    }

    private func revert(_ request: Haptera_V1_RevertToSnapshot) async throws {
        try await askEngine(of: request.volumeID, doubt: SnapshotResult.revertDoubtText) {
            try await $0.revert(request)
        }
    }

    private func releaseChanges(_ request: Haptera_V1_ReleaseChanges) async throws {
        try await existingUnit(request.volumeID).release(request)
    }

    private func existingUnit(_ volumeID: String) throws -> EngineUnit {
        guard let unit = engineUnit(volumeID) else {
            throw HostError("it runs no engine of volume \(volumeID)")
        }
        return unit
    }

    private func growVolume(_ request: Haptera_V1_GrowVolume) async throws {
        try await askEngine(of: request.volumeID, doubt: SnapshotResult.resizeDoubtText) {
            try await $0.grow(request)
        }
    }

    /// Beside the rounds of the engine's unit: a snapshot may take long, and the unit goes on
    /// looking after the process meanwhile. `doubt`: in the engine's error if it does not know.
    private func askEngine(
        of volumeID: String, doubt: String, _ ask: (EngineUnit) async throws -> Void
    ) async throws {
        let unit = try existingUnit(volumeID)
        do {
            try await ask(unit)
        } catch let error as HostError where error.description.contains(doubt) {
            // An engine that ends in the middle knows no more than one that does not answer.
            throw ControlSocket.NoAnswer(description: error.description)
        }
    }

    // MARK: Inspection

    private var replicasDirectory: String { context.directory + "/replicas" }

    /// Every replica directory, whether this agent runs it or was never told of it.
    private var directories: [Haptera_V1_InspectedReplica] {
        let names = try? FileManager.default.contentsOfDirectory(atPath: replicasDirectory)
        return (names ?? []).sorted().filter { ReplicaID($0) != nil }.map { name in
            var replica = Haptera_V1_InspectedReplica()
            replica.replicaID = name
            replica.directory = "\(replicasDirectory)/\(name)"
            return replica
        }
    }

    private func inspect(_ id: String) async -> Haptera_V1_InspectedReplica {
        var replica = Haptera_V1_InspectedReplica()
        replica.replicaID = id
        replica.directory = "\(replicasDirectory)/\(id)"
        let output = "\(context.run)/inspect-\(id)"
        defer { try? FileManager.default.removeItem(atPath: output) }
        do {
            // An id that is none must not become a path.
            guard ReplicaID(id) != nil else {
                throw HostError("'\(id.prefix(100))' is no replica's id")
            }
            guard context.host.directoryExists(replica.directory) else {
                throw HostError("its directory \(replica.directory) is gone: is its disk mounted?")
            }
            try? FileManager.default.removeItem(atPath: output)
            let status = try await context.host.run(
                context.replicaProgram, ["inspect", "--dir", replica.directory, "--json"],
                log: output)
            guard status == 0 else { throw HostError(context.host.lastLine(of: output)) }
            replica.json = try String(contentsOfFile: output, encoding: .utf8)
        } catch {
            replica.error = "\(error)"
        }
        return replica
    }

    /// By the files their starter left, so also engines of a predecessor nobody asks for any more.
    private var runningEngines: [Haptera_V1_RunningEngine] {
        let names = try? FileManager.default.contentsOfDirectory(atPath: context.run)
        return (names ?? []).sorted().filter { $0.hasPrefix("e-") && $0.hasSuffix(".pid") }
            .compactMap { name in
                guard let file = ProcessFile.load("\(context.run)/\(name)"),
                    file.identity.isRunning, let volume = file.value(of: "--volume-id")
                else { return nil }
                var engine = Haptera_V1_RunningEngine()
                engine.volumeID = volume
                engine.clientGeneration =
                    file.value(of: "--client-generation").flatMap { UInt64($0) } ?? 0
                engine.pid = file.identity.pid
                engine.maintenance = file.arguments.contains(EngineUnit.maintenanceFlag)
                return engine
            }
    }

    // MARK: Processes

    /// Killed, and gone when this returns.
    private func end(_ process: ProcessIdentity?) async throws {
        guard let process else { return }
        context.host.kill(process)
        let deadline = ContinuousClock.now + .seconds(10)
        while process.isRunning {
            guard ContinuousClock.now < deadline else {
                throw HostError("process \(process.pid) does not end")
            }
            try await Task.sleep(for: .milliseconds(20))
        }
    }

    private func inject(_ fault: Haptera_V1_InjectFault) async throws {
        let replica = fault.replicaID
        guard replica.isEmpty || ReplicaID(replica) != nil else {
            throw HostError("'\(replica.prefix(100))' is no replica's id")
        }
        if fault.kind == .flip {
            return try DataFault.flip("\(replicasDirectory)/\(replica)", fault.random)
        }
        let process =
            replica.isEmpty ? await engineProcess(fault.volumeID) : await replicaProcess(replica)
        guard let process else {
            let whose = replica.isEmpty ? "the engine" : "replica \(replica)"
            throw HostError("the process of \(whose) does not run")
        }
        switch fault.kind {
        case .kill: process.signal(SIGKILL)
        case .pause:
            process.signal(SIGSTOP)
            // A process of its own: the pause ends though we may be killed meanwhile.
            let words = "sleep \(Double(fault.milliseconds) / 1000); kill -CONT \(process.pid)"
            let (host, log) = (context.host, "\(context.run)/faults.log")
            Task { _ = try? await host.run("/bin/sh", ["-c", words], log: log) }
        case .partition:
            let way = ["in", "out", "both"][Int(fault.random % 3)]
            try await cause("link=\(way)", fault)
        case .full: try await cause("files=write:data:ENOSPC", fault)
        case .flip, .unspecified, .UNRECOGNIZED:
            throw HostError("the fault \(fault.kind) is not known here")
        }
    }

    /// Replicas of scratch volumes take such requests, no other does.
    private func cause(_ words: String, _ fault: Haptera_V1_InjectFault) async throws {
        let control = UnitFiles(run: context.run, prefix: "r", id: fault.replicaID).control
        _ = try await context.host.request(
            control, "fault \(words) milliseconds=\(fault.milliseconds)", timeoutSeconds: 5)
    }
}

extension ProcessFile {
    /// What follows the option in its arguments.
    fileprivate func value(of option: String) -> String? {
        guard let index = arguments.firstIndex(of: option), index + 1 < arguments.count else {
            return nil
        }
        return arguments[index + 1]
    }
}

/// Bit rot on demand.
enum DataFault {
    private static let blockSize: off_t = 4096
    /// Linux's SEEK_DATA, which the C library declares for GNU sources only.
    private static let seekData: Int32 = 3

    /// Flips one bit of a block that has been written, in one of the replica's data files.
    static func flip(_ directory: String, _ random: UInt64) throws {
        let layers = directory + "/layers"
        let names = try FileManager.default.contentsOfDirectory(atPath: layers).sorted()
        guard let name = names.last(where: { $0.hasSuffix(".data") }) else {
            throw HostError("\(layers) holds no data")
        }
        let path = "\(layers)/\(name)"
        // SAFETY: a Swift string passed as a C string is valid during the call.
        let descriptor = unsafe open(path, O_RDWR | O_CLOEXEC)
        guard descriptor >= 0 else { throw HostFiles.failure("open", path) }
        defer { close(descriptor) }
        let size = lseek(descriptor, 0, SEEK_END)
        guard size >= blockSize else { throw HostError("\(path) is empty") }
        let start = off_t(random % UInt64(size / blockSize)) * blockSize
        var offset = lseek(descriptor, start, seekData)
        if offset < 0 { offset = lseek(descriptor, 0, seekData) }
        guard offset >= 0 else { throw HostError("\(path) holds no data") }
        let position = offset + off_t(random >> 32) % blockSize
        var byte: UInt8 = 0
        // SAFETY: one byte of a local, for the time of each call.
        guard unsafe pread(descriptor, &byte, 1, position) == 1 else {
            throw HostFiles.failure("read", path)
        }
        byte ^= 1 << UInt8(random & 7)
        guard unsafe pwrite(descriptor, &byte, 1, position) == 1 else {
            throw HostFiles.failure("write", path)
        }
    }
}
