import HapteraCore
import HapteraIO

/// The command line of an engine that serves a replicated volume.
struct EngineOptions {
    var volumeName: String
    var volume: VolumeID
    var store: [SocketAddress]
    var replicas: [ReplicaEndpoint]
    var nbd: SocketAddress?
    var nbdUnixPath: String?
    var controlPath: String?
    var clientGeneration: UInt64
    var isReadOnly: Bool
    /// Without clients: for what is done to a volume that is not attached. Only its snapshots are
    /// served.
    var isMaintenance: Bool
    var listens: Bool { nbd != nil || nbdUnixPath != nil }
    var removalDeadlineMilliseconds: UInt64
    var leaseMilliseconds: UInt32
    var renewMilliseconds: UInt64
    var ioTimeoutMilliseconds: UInt64
    var detectsZeroes: Bool
    /// Nil: what the record says.
    var minInSync: UInt8?
    var endedInstance: InstanceID
    /// Where the volume's clients find it, as its record tells.
    var endpoint: String { isMaintenance ? "" : nbd?.text ?? nbdUnixPath ?? "" }

    static let usage = """
        usage: haptera-engine --volume NAME --volume-id HEX32 --store HOST:PORT...
                   --replica HEX16=HOST:PORT... --client-generation N
                   [--nbd HOST:PORT] [--nbd-unix PATH] [--control PATH] [--read-only]
                   [--maintenance]
                   [--lease MILLISECONDS] [--renew MILLISECONDS]
                   [--removal-deadline MILLISECONDS] [--io-timeout MILLISECONDS]
                   [--detect-zeroes on|off] [--min-in-sync N]
                   [--ended-instance DECIMAL]

          --store               the record service; may be repeated, tried in turn
          --replica             a replica and where it listens; repeated, 1 to 8 times
          --client-generation   raised by the controller for every new attachment
          --maintenance         lets no client of the volume in: with --nbd or --nbd-unix its
                                snapshots can be read, and nothing else
          --lease               how long an answer of a replica lets the engine serve (500)
          --renew               a replica asked nothing for so long is asked for a sign of
                                life (150); less than the lease
          --removal-deadline    a replica that owes an answer this long is removed (3000);
                                at least the lease
          --io-timeout          a request held this long is answered with an error;
                                0, the default: it is held until it can be done
          --detect-zeroes       on: writes of nothing but zeroes take no space (off)
          --min-in-sync         acknowledge only while so many replicas are in sync
          --ended-instance      the instance of an engine known to have ended: its leases
                                are not waited for
        """

    init(_ words: [String]) throws(UsageError) {
        let arguments = try Arguments(
            words,
            options: [
                "volume", "volume-id", "store", "replica", "nbd", "nbd-unix", "control",
                "client-generation", "lease", "renew", "removal-deadline", "io-timeout",
                "detect-zeroes", "min-in-sync", "ended-instance",
            ], flags: ["read-only", "maintenance"])
        guard arguments.positional.isEmpty else {
            throw UsageError("'\(arguments.positional[0])' is not an option")
        }
        volumeName = try arguments.parseRequired("volume", "a name of 1 to 63 bytes") {
            $0.isEmpty || $0.utf8.count > VolumeRecord.nameLengthMax ? nil : $0
        }
        volume = try arguments.parseRequired("volume-id", "32 hexadecimal digits") { VolumeID($0) }
        clientGeneration = try arguments.parseRequired("client-generation", "a number") {
            UInt64($0)
        }
        nbd = try arguments.parse("nbd", "HOST:PORT") { SocketAddress(tcp: $0) }
        nbdUnixPath = try arguments.value("nbd-unix")
        isMaintenance = arguments.has("maintenance")
        guard isMaintenance || nbd != nil || nbdUnixPath != nil else {
            throw UsageError("--nbd or --nbd-unix is needed")
        }
        controlPath = try arguments.value("control")
        isReadOnly = arguments.has("read-only")
        removalDeadlineMilliseconds =
            try arguments.parse("removal-deadline", EngineSettings.removalDeadlineText) {
                EngineSettings.removalDeadline($0)
            } ?? 3000
        // A short deadline alone shortens the lease with it.
        leaseMilliseconds =
            try arguments.parse("lease", "10 to 600000 milliseconds") {
                UInt32($0).flatMap { (10...600_000).contains($0) ? $0 : nil }
            }
            ?? UInt32(
                min(
                    UInt64(VolumeRecord.leaseMillisecondsDefault), removalDeadlineMilliseconds))
        renewMilliseconds =
            try arguments.parse("renew", "1 to 600000 milliseconds") {
                UInt64($0).flatMap { (1...600_000).contains($0) ? $0 : nil }
            } ?? min(150, UInt64(leaseMilliseconds) / 3)
        guard renewMilliseconds < leaseMilliseconds else {
            throw UsageError("--renew must be less than --lease (\(leaseMilliseconds))")
        }
        guard leaseMilliseconds <= removalDeadlineMilliseconds else {
            throw UsageError(
                "--lease must not exceed --removal-deadline (\(removalDeadlineMilliseconds))")
        }
        ioTimeoutMilliseconds =
            try arguments.parse("io-timeout", EngineSettings.ioTimeoutText) {
                EngineSettings.ioTimeout($0)
            } ?? 0
        detectsZeroes =
            try arguments.parse("detect-zeroes", EngineSettings.switchText) {
                EngineSettings.flag($0)
            } ?? false
        minInSync = try arguments.parse("min-in-sync", "1 to \(Geometry.replicasMax)") {
            UInt8($0).flatMap { (1...UInt8(Geometry.replicasMax)).contains($0) ? $0 : nil }
        }
        endedInstance =
            try arguments.parse("ended-instance", "a number") {
                UInt64($0).map { InstanceID(rawValue: $0) }
            } ?? .none
        store = try Self.store(arguments)
        replicas = try Self.replicas(arguments)
    }

    private static func store(_ arguments: Arguments) throws(UsageError) -> [SocketAddress] {
        var store: [SocketAddress] = []
        for text in arguments.all("store") {
            store.append(
                try Arguments.parsed("store", text, "HOST:PORT") { SocketAddress(tcp: $0) })
        }
        guard !store.isEmpty else { throw UsageError("--store is missing") }
        return store
    }
    private static func replicas(_ arguments: Arguments) throws(UsageError) -> [ReplicaEndpoint] {
        var replicas: [ReplicaEndpoint] = []
        for text in arguments.all("replica") {
            replicas.append(
                try Arguments.parsed("replica", text, "HEX16=HOST:PORT") { ReplicaEndpoint($0) })
        }
        guard (1...Geometry.replicaSlotsMax).contains(replicas.count) else {
            throw UsageError("--replica is needed, 1 to \(Geometry.replicaSlotsMax) times")
        }
        guard Set(replicas.map(\.id.rawValue)).count == replicas.count else {
            throw UsageError("--replica names a replica twice")
        }
        return replicas
    }
}

/// What of an engine can be set while it runs, and by its options.
enum EngineSettings {
    static let removalDeadlineText = "100 to 600000 milliseconds"
    static let ioTimeoutText = "0 (hold) or 100 to 86400000 milliseconds"
    static let switchText = "on or off"
    static func flag(_ text: String) -> Bool? { text == "on" ? true : text == "off" ? false : nil }
    static func text(_ flag: Bool) -> String { flag ? "on" : "off" }
    static func removalDeadline(_ text: String) -> UInt64? {
        UInt64(text).flatMap { (100...600_000).contains($0) ? $0 : nil }
    }
    static func ioTimeout(_ text: String) -> UInt64? {
        UInt64(text).flatMap { $0 == 0 || (100...86_400_000).contains($0) ? $0 : nil }
    }
}

extension ReplicaEndpoint {
    /// `HEX16=HOST:PORT`.
    init?(_ text: some StringProtocol) {
        guard let equals = text.firstIndex(of: "="), let id = ReplicaID(text[..<equals]),
            let address = SocketAddress(tcp: String(text[text.index(after: equals)...]))
        else { return nil }
        self.id = id
        self.address = address
    }

    /// `ID=HOST:PORT,ID=HOST:PORT`, as the control socket's `replicas` verb takes it.
    static func list(_ text: String) -> [ReplicaEndpoint]? {
        var list: [ReplicaEndpoint] = []
        for part in text.split(separator: ",", omittingEmptySubsequences: false) {
            guard let endpoint = ReplicaEndpoint(part),
                !list.contains(where: { $0.id == endpoint.id })
            else { return nil }
            list.append(endpoint)
        }
        return (1...Geometry.replicaSlotsMax).contains(list.count) ? list : nil
    }
}
