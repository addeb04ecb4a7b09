import Glibc
import HapteraCore
import HapteraIO

/// `haptera-replica VERB --option value ...`
package enum ReplicaCommand {
    package static let usage = """
        usage: haptera-replica create --dir DIR --volume-id HEX32 --volume NAME --replica-id HEX16
                                      --incarnation HEX16 --size BYTES
               haptera-replica clone --dir DIR --record HEX --replica-id HEX16 --incarnation HEX16
                                     --layers N,... --size BYTES --log-index N
               haptera-replica serve --dir DIR --listen HOST:PORT --control PATH [--allow-faults]
               haptera-replica inspect --dir DIR [--json]
               haptera-replica verify --dir DIR [--json]
               haptera-replica export --dir DIR [--snapshot NAME] --output FILE|-
               haptera-replica accept-damage --dir DIR [--accept [--others-are-gone]]

        """

    /// Exit status: 0 done, 1 failed, 2 usage.
    package static func run(_ words: [String]) -> Int32 {
        if words.contains("--help") || words.contains("-h") {
            write(usage)
            return 0
        }
        do {
            let arguments = try ReplicaArguments(words)
            raiseFileLimit()
            switch arguments.verb {
            case "create": try create(arguments)
            case "clone": try clone(arguments)
            case "serve": return try serve(arguments)
            case "inspect":
                let report = try InspectReport(directory: try arguments.required("--dir"))
                write(arguments.isJSON ? report.json : report.text)
            case "verify": return try verify(arguments)
            case "export":
                try OfflineTools.export(
                    directory: try arguments.required("--dir"),
                    snapshot: arguments.optional("--snapshot"),
                    output: try arguments.required("--output"))
            case "accept-damage":
                write(
                    try AcceptDamage.run(
                        directory: try arguments.required("--dir"),
                        isAccepted: arguments.isAccepted,
                        othersAreGone: arguments.othersAreGone))
            default: throw UsageError("unknown command '\(arguments.verb)'")
            }
            return 0
        } catch let error as UsageError {
            complain(error.message + "\n" + usage)
            return 2
        } catch let error as StorageError {
            complain(error.message)
        } catch let error as IOError {
            complain(error.message)
        } catch {
            complain("\(error)")
        }
        return 1
    }

    private static func create(_ arguments: ReplicaArguments) throws {
        let directory = try arguments.required("--dir")
        let identity = try arguments.identity()
        // A replica that is being served holds its lock: there is nothing to do for it.
        let peek = DirectoryStorage(directory: directory, mode: .peek)
        if case .manifest(let found)? = try? ReplicaCore.loadManifest(peek),
            found.identity.isEarlier(of: identity)
        {
            // Whoever made it may have been killed before that.
            return try peek.sync(.manifest)
        }
        try ReplicaCore.create(
            storage: DirectoryStorage(directory: directory, mode: .serve), identity: identity)
    }

    /// The layers were linked into the directory by the replica they are from, on its control
    /// socket (`share`), whose answer the last three options are.
    private static func clone(_ arguments: ReplicaArguments) throws {
        let (member, record, source) = try arguments.clone()
        let directory = try arguments.required("--dir")
        // As in `create`.
        let peek = DirectoryStorage(directory: directory, mode: .peek)
        if case .manifest(let found)? = try? ReplicaCore.loadManifest(peek),
            found.identity.member == member, found.identity.volume == record.volume
        {
            return try peek.sync(.manifest)
        }
        try ReplicaCore.createClone(
            storage: DirectoryStorage(directory: directory, mode: .serve), member: member,
            record: record, source: source)
    }

    /// Two files per layer: as many as the system lets this process have.
    private static func raiseFileLimit() {
        var limit = rlimit()
        let resource = __rlimit_resource_t(UInt32(RLIMIT_NOFILE.rawValue))
        // SAFETY: `limit` is a local that outlives the calls.
        guard unsafe getrlimit(resource, &limit) == 0 else { return }
        limit.rlim_cur = limit.rlim_max
        unsafe setrlimit(resource, &limit)
    }

    private static func serve(_ arguments: ReplicaArguments) throws -> Int32 {
        let directory = try arguments.required("--dir")
        let control = try arguments.required("--control")
        let listen = try arguments.required("--listen")
        guard let address = SocketAddress(tcp: listen) else {
            throw UsageError("--listen: '\(listen)' is not HOST:PORT")
        }
        let reactor = try Reactor(backend: try .fromEnvironment())
        try FaultRules.installFromEnvironment(reactor)
        // Blocked from here on, so that a signal during opening is not lost.
        var stop: (() -> Void)?
        var isSignalled = false
        _ = try SignalWatcher(reactor: reactor, signals: [SIGTERM, SIGINT]) { _ in
            isSignalled = true
            stop?()
        }
        let server: ReplicaServer
        do {
            server = try ReplicaServer(
                reactor: reactor, directory: directory, listen: address, control: control,
                allowsFaults: arguments.allowsFaults)
        } catch let error as StorageError where error.code == .damaged {
            throw StorageError(.damaged, damage(error.message, in: directory))
        }
        stop = { server.shutdown("signal") }
        if isSignalled { stop?() }
        reactor.run()
        return server.failure == nil ? 0 : 1
    }

    /// What is wrong with a copy, whose it is, and what to do about it. `isAlone`: its own record
    /// names no other copy that is in sync.
    static func damage(
        _ text: String, of identity: ReplicaIdentity, in directory: String, isAlone: Bool
    ) -> String {
        let (id, volume) = (identity.replica.text, identity.name)
        let damage = "replica \(id) of volume \(volume): \(text); "
        let replace =
            "have it made anew with: storagectl replica replace \(volume) \(id) "
            + "--node NODE"
        guard isAlone else {
            return damage + replace + "; if no other copy is left: \(accept) --dir \(directory)"
        }
        return damage + "if other copies are in sync, " + replace + "; if none is, as its record "
            + "says: \(accept) --dir \(directory)"
    }
    /// Says first what is lost.
    private static let accept = "haptera-replica accept-damage"

    private static func damage(_ text: String, in directory: String) -> String {
        let peek = DirectoryStorage(directory: directory, mode: .peek)
        guard case .manifest(let found)? = try? ReplicaCore.loadManifest(peek) else {
            return "the copy in \(directory): \(text); if other copies of its volume are in sync, "
                + "have it made anew with: storagectl replica replace"
        }
        return damage(text, of: found.identity, in: directory, isAlone: found.isAlone)
    }

    private static func verify(_ arguments: ReplicaArguments) throws -> Int32 {
        let report = try OfflineTools.verify(directory: try arguments.required("--dir"))
        if arguments.isJSON {
            let details = report.details.map {
                JSONValue.object([
                    ("offset", .number($0.offset)), ("problem", .text($0.text)),
                ])
            }
            write(
                JSONValue.object([
                    ("regions", .number(report.regionsRead)),
                    ("dataBlocks", .number(report.dataBlocks)),
                    ("mismatches", .number(report.mismatches)),
                    ("damagedPages", .number(report.damagedPages)),
                    ("doubtful", .number(report.doubtful)), ("problems", .list(details)),
                ]).encoded + "\n")
        } else {
            for detail in report.details { write("offset \(detail.offset): \(detail.text)\n") }
            write(
                "\(report.dataBlocks) blocks of data in \(report.regionsRead) regions: "
                    + "\(report.mismatches) damaged, \(report.damagedPages) damaged pages, "
                    + "\(report.doubtful) doubtful\n")
        }
        return report.isDamaged ? 1 : 0
    }

    private static func write(_ text: String) { put(text, to: 1) }
    private static func complain(_ text: String) { put("haptera-replica: \(text)\n", to: 2) }
    private static func put(_ text: String, to fd: Int32) {
        let bytes = [UInt8](text.utf8)
        var done = 0
        while done < bytes.count {
            // SAFETY: the slice's bytes are valid during the call.
            let count = unsafe bytes[done...].withUnsafeBytes {
                unsafe Glibc.write(fd, $0.baseAddress, $0.count)
            }
            guard count > 0 || errno == EINTR else { return }
            done += max(count, 0)
        }
    }
}

/// A verb and its options, checked against what the verb knows.
package struct ReplicaArguments {
    private static let known: [String: Set<String>] = [
        "create": [
            "--dir", "--volume-id", "--volume", "--replica-id", "--incarnation", "--size",
        ],
        "clone": [
            "--dir", "--record", "--replica-id", "--incarnation", "--layers", "--size",
            "--log-index",
        ],
        "serve": ["--dir", "--listen", "--control", "--allow-faults"],
        "inspect": ["--dir", "--json"],
        "verify": ["--dir", "--json"],
        "export": ["--dir", "--snapshot", "--output"],
        "accept-damage": ["--dir", "--accept", "--others-are-gone"],
    ]
    private static let flags: Set = ["--json", "--allow-faults", "--accept", "--others-are-gone"]
    package let verb: String
    private var options: [String: String] = [:]

    package init(_ words: [String]) throws(UsageError) {
        guard let verb = words.first else { throw UsageError("a command is missing") }
        guard let known = Self.known[verb] else { throw UsageError("unknown command '\(verb)'") }
        self.verb = verb
        var rest = words.dropFirst()
        while let word = rest.popFirst() {
            guard known.contains(word) else {
                throw UsageError("\(verb) knows no option '\(word)'")
            }
            guard options[word] == nil else { throw UsageError("\(word) is given twice") }
            if Self.flags.contains(word) {
                options[word] = ""
                continue
            }
            guard let value = rest.popFirst(), !value.isEmpty else {
                throw UsageError("\(word) needs a value")
            }
            options[word] = value
        }
    }

    package var isJSON: Bool { options["--json"] != nil }
    package var isAccepted: Bool { options["--accept"] != nil }
    package var othersAreGone: Bool { options["--others-are-gone"] != nil }
    package var allowsFaults: Bool { options["--allow-faults"] != nil }
    package func required(_ name: String) throws(UsageError) -> String {
        guard let value = options[name] else { throw UsageError("\(verb) needs \(name)") }
        return value
    }

    package func optional(_ name: String) -> String? { options[name] }

    private func member() throws(UsageError) -> VolumeRecord.Member {
        let replicaText = try required("--replica-id")
        guard let replica = ReplicaID(replicaText) else {
            throw UsageError("--replica-id: '\(replicaText)' is not 16 hexadecimal digits, not 0")
        }
        let incarnationText = try required("--incarnation")
        guard let incarnation = ReplicaID(incarnationText) else {
            throw UsageError(
                "--incarnation: '\(incarnationText)' is not 16 hexadecimal digits, not 0")
        }
        return VolumeRecord.Member(
            replica: replica, incarnation: Incarnation(rawValue: incarnation.rawValue))
    }
    private func size() throws(UsageError) -> UInt64 {
        let sizeText = try required("--size")
        guard let size = UInt64(sizeText), size > 0, size <= Geometry.volumeSizeMax,
            size % UInt64(Geometry.blockSize) == 0
        else {
            throw UsageError(
                "--size: '\(sizeText)' is not a number of bytes, a multiple of 4096 up to 2^50")
        }
        return size
    }
    private func number(_ name: String) throws(UsageError) -> UInt64 {
        let text = try required(name)
        guard let number = UInt64(text) else {
            throw UsageError("\(name): '\(text)' is not a number")
        }
        return number
    }

    func clone() throws(UsageError) -> (
        VolumeRecord.Member, VolumeRecord, ReplicaCore.CloneSource
    ) {
        guard let bytes = parseHexadecimalBytes(try required("--record")),
            let record = VolumeRecord(decoding: bytes)
        else { throw UsageError("--record is not a volume's record in hexadecimal digits") }
        let layersText = try required("--layers")
        let words = layersText.split(separator: ",", omittingEmptySubsequences: false)
        let layers = words.compactMap { UInt32($0).map(LayerID.init) }
        guard layers.count == words.count else {
            throw UsageError("--layers: '\(layersText)' is not a list of numbers")
        }
        return (
            try member(), record,
            .init(layers: layers, size: try size(), logIndex: try number("--log-index"))
        )
    }

    package func identity() throws(UsageError) -> ReplicaIdentity {
        let volumeText = try required("--volume-id")
        guard let volume = VolumeID(volumeText) else {
            throw UsageError("--volume-id: '\(volumeText)' is not 32 hexadecimal digits")
        }
        let member = try member()
        let identity = ReplicaIdentity(
            volume: volume, name: try required("--volume"), replica: member.replica,
            incarnation: member.incarnation, size: try size())
        guard identity.isValid else {
            throw UsageError(
                "--volume: a name has 1 to \(VolumeRecord.nameLengthMax) bytes")
        }
        return identity
    }
}
