import ArgumentParser
import Dispatch
import Foundation
import GRPCCore
import Glibc
import HapteraAPI
import HapteraHost

// The commands that read snapshots: what changed, copies in files, and where to attach.

extension SnapshotCommand {
    package struct Compare: AsyncParsableCommand {
        package static let configuration = CommandConfiguration(
            commandName: "diff",
            abstract: "Show which parts of a volume have changed since a snapshot was taken.",
            discussion: """
                What was written or trimmed after A, up to B or to now: every block that differs \
                is in it, and perhaps some that were written again with what they held.
                """)

        @Argument(help: "The volume's name.", transform: Label.init(typed:))
        package var volume: Label

        @Argument(help: "The earlier snapshot.", transform: SnapshotArgument.init(typed:))
        package var from: SnapshotArgument

        @Argument(
            help: "The later snapshot; the volume as it is now without it.",
            transform: SnapshotArgument.init(typed:))
        package var to: SnapshotArgument?

        @Flag(help: "Only how much has changed, not where.")
        package var summary = false

        @OptionGroup package var options: GlobalOptions
        package init() {}

        package func run() async throws {
            try await Session.run(options) { session in
                let (volume, from, lists) = (volume.text, from.text, !summary)
                let changed: ChangedRanges
                if let to {
                    try await session.checkOrder(volume, from, to.text)
                    changed = try await session.reading(volume, to.text) { source in
                        try await Session.relayed(source) { relay in
                            let place = NBDPlace(address: .unix(relay.path), export: relay.export)
                            return try NBDChanges.since(from, in: place, lists: lists)
                        }
                    }
                } else {
                    let place = try await session.livePlace(volume, from: from)
                    changed = try await Session.blocking {
                        try NBDChanges.since(from, in: place, lists: lists)
                    }
                }
                session.say(
                    Presentation.value(changed, of: volume, from: from, to: to?.text),
                    quiet: "\(changed.bytes)"
                ) { _ in
                    Presentation.text(changed, of: volume, from: from, to: to?.text)
                }
            }
        }
    }

    package enum ImageFormat: String, ExpressibleByArgument, CaseIterable, Sendable {
        case raw
        case qcow2
    }

    package struct Export: AsyncParsableCommand {
        package static let configuration = CommandConfiguration(
            abstract: "Copy a snapshot to a file, or to standard output.",
            discussion: """
                Holes stay holes in a file. The volume need not be attached; it may be attached \
                and detached meanwhile. Needs qemu-img (Debian: qemu-utils) for files and qcow2, \
                nbdcopy (Debian: libnbd-bin) for raw images to standard output. A qcow2 image goes \
                there by way of a temporary file in TMPDIR (/var/tmp without it).
                """)

        @Argument(help: "The volume's name.", transform: Label.init(typed:))
        package var volume: Label

        @Argument(help: "The snapshot's name.", transform: SnapshotArgument.init(typed:))
        package var name: SnapshotArgument

        @Argument(help: "The file to make, or - for standard output.")
        package var file: String

        @Option(help: "raw or qcow2.")
        package var format = ImageFormat.raw

        @Flag(help: "Replace the file if it is there.")
        package var force = false

        @OptionGroup package var options: GlobalOptions
        package init() {}

        package func validate() throws {
            if file.isEmpty || file.hasSuffix("/") {
                throw ValidationError("'\(file)' is no file's name")
            }
        }

        package func run() async throws {
            let copy = try SnapshotCopy(file: file, format: format.rawValue, force: force)
            try await Session.run(options) { session in
                let snapshot = try await session.reading(volume.text, name.text) { source in
                    try await Session.relayed(source) { try copy.run(from: $0.uri) }
                    return source.snapshot
                }
                guard file != "-" else { return }
                session.say(
                    Presentation.exported(snapshot, file: file, format: format.rawValue),
                    quiet: file
                ) { _ in
                    "snapshot \(snapshot.name) of volume \(snapshot.volume) is in \(file)"
                }
            }
        }
    }

    package struct Access: AsyncParsableCommand {
        package static let configuration = CommandConfiguration(
            commandName: "mount-info",
            abstract: "Show where a snapshot is read, and the commands that do it.")

        @Argument(help: "The volume's name.", transform: Label.init(typed:))
        package var volume: Label

        @Argument(help: "The snapshot's name.", transform: SnapshotArgument.init(typed:))
        package var name: SnapshotArgument

        @OptionGroup package var options: GlobalOptions
        package init() {}

        package func run() async throws {
            try await Session.run(options) { session in
                let snapshot = try await session.readable(volume.text, name.text)
                let uri = Presentation.bestURI(snapshot)
                session.say(Presentation.access(snapshot), quiet: uri) { _ in
                    Presentation.accessText(snapshot)
                }
            }
        }
    }
}

extension Session {
    /// For what waits without `await`: not on the threads that everything else needs.
    static func blocking<Result: Sendable>(
        _ body: @escaping @Sendable () throws -> Result
    ) async throws -> Result {
        try await withCheckedThrowingContinuation { continuation in
            DispatchQueue.global().async {
                continuation.resume(with: Swift.Result { try body() })
            }
        }
    }

    func snapshot(_ volume: String, _ name: String) async throws -> Haptera_V1_Snapshot {
        var request = Haptera_V1_GetSnapshotRequest()
        request.volume = volume
        request.name = name
        return try await volumes.getSnapshot(request, options: callOptions)
    }

    /// The snapshot, with the address to read it from.
    func readable(_ volume: String, _ name: String) async throws -> Haptera_V1_Snapshot {
        let snapshot = try await snapshot(volume, name)
        guard !snapshot.uri.isEmpty || !snapshot.unixUri.isEmpty else {
            throw Self.detached(
                volume,
                "'storagectl snapshot serve \(volume) \(name)' lets it be read for as long as that "
                    + "runs, 'snapshot export' copies it")
        }
        return snapshot
    }
    /// `words`: other ways than to attach it.
    private static func detached(_ volume: String, _ words: String) -> CommandFailure {
        CommandFailure(
            .conflict,
            "volume '\(volume)' is not attached: \(words); or attach it: storagectl volume attach "
                + volume)
    }

    /// Where to ask what has changed since a snapshot until now. Nobody enters a volume that is not
    /// attached, not even to ask.
    func livePlace(_ volume: String, from: String) async throws -> NBDPlace {
        _ = try await snapshot(volume, from)
        var request = Haptera_V1_GetVolumeRequest()
        request.name = volume
        let engine = try await volumes.getVolume(request, options: callOptions).engine
        guard let place = NBDPlace.reachable(uri: engine.uri, unixURI: engine.unixUri) else {
            throw Self.detached(
                volume,
                "name a later snapshot to compare with ('storagectl snapshot create \(volume)' "
                    + "takes one of what it holds now)")
        }
        return place
    }

    func checkOrder(_ volume: String, _ from: String, _ to: String) async throws {
        try Self.checkOrder(try await snapshot(volume, from), try await snapshot(volume, to))
    }

    static func checkOrder(
        _ earlier: Haptera_V1_Snapshot, _ later: Haptera_V1_Snapshot
    ) throws {
        guard earlier.layer > later.layer else { return }
        throw CommandFailure(
            .usage,
            "snapshot '\(earlier.name)' was taken after '\(later.name)': name the earlier one "
                + "first")
    }

    /// `body` blocks, and reads from the relay.
    static func relayed<Result: Sendable>(
        _ source: SnapshotSource, _ body: @escaping @Sendable (NBDRelay) throws -> Result
    ) async throws -> Result {
        let relay = try NBDRelay(source)
        relay.start()
        defer { relay.stop() }
        return try await blocking { try body(relay) }
    }
}

/// A copy made by the tools that are there for it.
package struct SnapshotCopy: Equatable, Sendable {
    package var executable: String
    package var file: String
    package var format: String
    package var force: Bool
    /// Where what cannot be made in order goes before standard output.
    package var temporary: String

    package init(
        file: String, format: String, force: Bool,
        environment: [String: String] = ProcessInfo.processInfo.environment
    ) throws {
        let isStreamed = file == "-" && format == "raw"
        let (tool, package) = isStreamed ? ("nbdcopy", "libnbd-bin") : ("qemu-img", "qemu-utils")
        guard let executable = ForegroundProcess.find(tool, environment: environment) else {
            throw CommandFailure(
                .failed, "\(tool) is not installed: on Debian, 'apt install \(package)'")
        }
        self.executable = executable
        self.file = file
        self.format = format
        self.force = force
        temporary = environment["TMPDIR"].flatMap { $0.isEmpty ? nil : $0 } ?? "/var/tmp"
        if file != "-" { try checkTarget() }
    }

    /// Before anything is copied. What comes there meanwhile is found in the end.
    private func checkTarget() throws {
        let directory = (HostFiles.absolute(file) as NSString).deletingLastPathComponent
        let kind =
            try? FileManager.default.attributesOfItem(
                atPath: (directory as NSString).resolvingSymlinksInPath)[.type]
            as? FileAttributeType
        guard let kind else {
            throw CommandFailure(.usage, "there is no directory '\(directory)' for '\(file)'")
        }
        guard kind == .typeDirectory else {
            throw CommandFailure(.usage, "'\(directory)' is no directory")
        }
        guard FileManager.default.isWritableFile(atPath: directory) else {
            throw CommandFailure(.usage, "no file can be made in '\(directory)'")
        }
        guard let there = try? FileManager.default.attributesOfItem(atPath: file) else { return }
        guard there[.type] as? FileAttributeType == .typeRegular else {
            throw CommandFailure(.usage, "'\(file)' is there, and is no ordinary file")
        }
        guard force else {
            throw CommandFailure(
                .conflict, "'\(file)' is there already: --force replaces it")
        }
    }

    /// A whole copy under that name, or nothing.
    func run(from uri: String, standardOutput: Int32 = STDOUT_FILENO) throws {
        guard file != "-" else {
            guard isatty(standardOutput) == 0 else {
                throw CommandFailure(.usage, "standard output is a terminal: name a file")
            }
            guard format != "raw" else { return try run([uri, "-"]) }
            return try stream(from: uri, to: standardOutput)
        }
        let path = HostFiles.absolute(file)
        let partial = path + ".partial-\(getpid())"
        do {
            try run(["convert", "-f", "raw", "-O", format, uri, partial])
            try rename(partial, to: path)
        } catch {
            Self.remove(partial)
            throw error
        }
        Self.remove(partial)
    }
    /// By way of a file without a name, which is gone with the last who has it open, however this
    /// ends. The program that writes it gets it by number.
    private func stream(from uri: String, to output: Int32) throws {
        let place = HostFiles.absolute(temporary)
        var name = Array((place + "/haptera-export-XXXXXX").utf8CString)
        // SAFETY: the array ends with a zero byte, and outlives both calls.
        let file = unsafe mkstemp(&name)
        guard file >= 0 else { throw HostFiles.failure("make a temporary file in", place) }
        _ = unsafe unlink(name)
        defer { close(file) }
        try run(["convert", "-f", "raw", "-O", format, uri, "/proc/self/fd/\(file)"])
        guard lseek(file, 0, SEEK_SET) == 0 else { throw HostFiles.failure("read back", place) }
        try Self.pour(file, into: output)
    }

    private static func pour(_ file: Int32, into output: Int32) throws {
        var buffer = [UInt8](repeating: 0, count: 1 << 20)
        while true {
            // SAFETY: both calls stay within the array, which outlives them.
            let count = unsafe read(file, &buffer, buffer.count)
            if count < 0, errno == EINTR { continue }
            guard count >= 0 else { throw HostFiles.failure("read", "the temporary file") }
            if count == 0 { return }
            var done = 0
            while done < count {
                let written = unsafe buffer.withUnsafeBytes {
                    unsafe write(output, $0.baseAddress?.advanced(by: done), count - done)
                }
                if written < 0, errno == EINTR { continue }
                guard written > 0 else { throw HostFiles.failure("write", "standard output") }
                done += written
            }
        }
    }

    private static func remove(_ path: String) {
        // SAFETY: a Swift string passed as a C string is valid during the call.
        _ = unsafe unlink(path)
    }
    private func run(_ arguments: [String]) throws {
        let status = try ForegroundProcess.run(executable, arguments)
        guard status == 0 else {
            throw CommandFailure(
                .failed, "\(executable) ended with status \(status); nothing was made")
        }
    }
    private func rename(_ partial: String, to path: String) throws {
        // SAFETY: Swift strings passed as C strings are valid during the call. Unlike a renaming, a
        // second link never replaces what is there.
        let result = unsafe force ? Glibc.rename(partial, path) : link(partial, path)
        guard result == 0 else { throw HostFiles.failure("make", path) }
        try HostFiles.syncDirectory(of: path)
    }
}
