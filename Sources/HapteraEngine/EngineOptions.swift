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
    var removalDeadlineMilliseconds: UInt64
    var endpoint: String { nbd?.text ?? nbdUnixPath ?? "" }

    static let usage = """
        usage: haptera-engine --volume NAME --volume-id HEX32 --store HOST:PORT...
                   --replica HEX16=HOST:PORT... --client-generation N
                   [--nbd HOST:PORT] [--nbd-unix PATH] [--control PATH] [--read-only]
                   [--removal-deadline MILLISECONDS]

          --store               the record service; may be repeated, tried in turn
          --replica             a replica and where it listens; repeated, 1 to 8 times
          --client-generation   raised by the controller for every new attachment
          --removal-deadline    a replica that owes an answer this long is removed (3000)
        """

    init(_ words: [String]) throws(UsageError) {
        let arguments = try Arguments(
            words,
            options: [
                "volume", "volume-id", "store", "replica", "nbd", "nbd-unix", "control",
                "client-generation", "removal-deadline",
            ], flags: ["read-only"])
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
        guard nbd != nil || nbdUnixPath != nil else {
            throw UsageError("--nbd or --nbd-unix is needed")
        }
        controlPath = try arguments.value("control")
        isReadOnly = arguments.has("read-only")
        removalDeadlineMilliseconds =
            try arguments.parse("removal-deadline", "100 to 600000 milliseconds") {
                UInt64($0).flatMap { (100...600_000).contains($0) ? $0 : nil }
            } ?? 3000
        store = []
        for text in arguments.all("store") {
            store.append(
                try Arguments.parsed("store", text, "HOST:PORT") { SocketAddress(tcp: $0) })
        }
        guard !store.isEmpty else { throw UsageError("--store is missing") }
        replicas = []
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
