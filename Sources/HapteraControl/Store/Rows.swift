import Foundation
import GRDB
import HapteraCore

/// How far a volume is in its life. The volume record exists from `ready` on.
package enum VolumePhase: String, Codable, Sendable {
    case creating
    case ready
    case deleting
}

/// What is wanted of a volume. The record engines swap is in a table of its own.
package struct VolumeRow: Codable, Equatable, Sendable, FetchableRecord, PersistableRecord {
    package static let databaseTableName = "volumes"
    /// 32 hexadecimal digits.
    package var id: String
    package var name: String
    package var sizeBytes: Int64
    package var replicaCount: Int
    package var phase: VolumePhase
    /// Where its engine shall be, from attach until detached.
    package var attachedNode: String?
    package var isDetaching: Bool
    /// Raised by each attach; the engine passes it into the volume record.
    package var clientGeneration: Int64
    /// The highest client generation whose engine has served.
    package var servedGeneration: Int64
    package var createdMilliseconds: Int64
    package var minInSync: Int
    package var ioTimeoutMilliseconds: Int64
    package var leaseMilliseconds: Int64
    package var removalDeadlineMilliseconds: Int64
    package var staleReplicaTimeoutMilliseconds: Int64
    /// The boot of the attached node in which its client began; empty if not known.
    package var attachedBootID: String
    /// A client has connected from another host since the attach: it outlives the node.
    package var hadRemoteClient: Bool
    /// Decimal number of the engine process that may go on from rebooted replicas; empty: none.
    package var acceptLossInstance: String
    /// For tests: faults may be injected.
    package var isScratch = false
    package var detectsZeroes = false
    /// The snapshot that it began as, by the names of then; all three or none.
    package var originVolumeID: String?
    package var originVolume: String?
    package var originSnapshot: String?
    /// Of a clone, until every replica runs and it is the volume's.
    package var firstRecord: Data?
    /// What is being done to the volume while it is not attached, in words; nil: nothing, and if
    /// it has an engine, that is for clients.
    package var maintenance: String?
    /// Where it is attached as soon as that is done.
    package var nextNode: String?
    /// Snapshots of this layer and later ones hold what the volume does; 0: not known.
    package var unchangedSince: Int64 = 0
    /// It began as a snapshot, and has not had as many replicas in sync yet as it is meant to have,
    /// without the temporary ones.
    package var isFilling = false

    package init(id: VolumeID, name: String, sizeBytes: Int64, replicaCount: Int, created: Int64) {
        self.id = id.text
        self.name = name
        self.sizeBytes = sizeBytes
        self.replicaCount = replicaCount
        phase = .creating
        attachedNode = nil
        isDetaching = false
        clientGeneration = 0
        servedGeneration = 0
        createdMilliseconds = created
        let settings = VolumeSettings()
        minInSync = settings.minInSync
        ioTimeoutMilliseconds = settings.ioTimeout
        leaseMilliseconds = settings.lease
        removalDeadlineMilliseconds = settings.removalDeadline
        staleReplicaTimeoutMilliseconds = settings.staleReplicaTimeout
        attachedBootID = ""
        hadRemoteClient = false
        acceptLossInstance = ""
    }
}

package enum ReplicaPhase: String, Codable, Sendable {
    case create
    case run
    /// Runs, but the engine is told to do without it; then its data is removed.
    case leave
    case remove
}

package struct ReplicaRow: Codable, Equatable, Sendable, FetchableRecord, PersistableRecord {
    package static let databaseTableName = "replicas"
    /// 16 hexadecimal digits, as the incarnation.
    package var id: String
    package var volumeID: String
    /// Its place among the volume's replicas: for a stable order.
    package var ordinal: Int
    package var node: String
    package var incarnation: String
    package var phase: ReplicaPhase
    /// HOST:PORT and directory as its node reported last; empty before that.
    package var address: String
    package var directory: String
    /// The replica whose place it takes once it is in sync.
    package var replaces: String?
    /// Nobody asked for the replacement: it is given up if the other one comes back first.
    package var isAutomatic = false
    /// The replica on its node whose layers it begins with; nil: made empty.
    package var source: String?
    /// What it was to be filled with when it was asked for.
    package var expectedBytes: Int64 = 0
    /// Shares the snapshot that its volume began as until the others are filled.
    package var isTemporary = false

    package init(
        id: String, volumeID: String, ordinal: Int, node: String, incarnation: String,
        phase: ReplicaPhase, address: String = "", directory: String = "",
        replaces: String? = nil, isAutomatic: Bool = false, source: String? = nil
    ) {
        self.id = id
        self.volumeID = volumeID
        self.ordinal = ordinal
        self.node = node
        self.incarnation = incarnation
        self.phase = phase
        self.address = address
        self.directory = directory
        self.replaces = replaces
        self.isAutomatic = isAutomatic
        self.source = source
    }

    var member: VolumeRecord.Member? {
        guard let id = ReplicaID(id), let number = parseHexadecimal(incarnation.utf8) else {
            return nil
        }
        return VolumeRecord.Member(replica: id, incarnation: Incarnation(rawValue: number))
    }
}

package struct NodeRow: Codable, Equatable, Sendable, FetchableRecord, PersistableRecord {
    package static let databaseTableName = "nodes"
    package var name: String
    /// Random, kept in the node's directory: tells two nodes of one name apart.
    package var nodeID: String
    package var address: String
    package var directory: String
    package var version: String
    package var pid: Int32
    /// Of the host's kernel; empty if the agent did not say.
    package var bootID = ""

    package init(
        name: String, nodeID: String, address: String, directory: String, version: String,
        pid: Int32, bootID: String = ""
    ) {
        self.name = name
        self.nodeID = nodeID
        self.address = address
        self.directory = directory
        self.version = version
        self.pid = pid
        self.bootID = bootID
    }
}

/// A replica that belongs to no volume any more, and whose data its node still has.
package struct DiscardedReplicaRow: Codable, Equatable, Sendable, FetchableRecord,
    PersistableRecord
{
    package static let databaseTableName = "discardedReplicas"
    package var id: String
    package var volumeID: String
    package var volume: String
    package var node: String
    package var incarnation: String
    package var sizeBytes: Int64
    package var timeMilliseconds: Int64
}

/// An attachment that was given up while its node was not heard of: the node is told to end the
/// engine when it is back.
package struct AbandonedEngineRow: Codable, Equatable, Sendable, FetchableRecord,
    PersistableRecord
{
    package static let databaseTableName = "abandonedEngines"
    package var volumeID: String
    package var volume: String
    package var node: String
    package var clientGeneration: Int64
}

package struct EventRow: Codable, Equatable, Sendable, FetchableRecord, MutablePersistableRecord {
    package static let databaseTableName = "events"
    package var id: Int64?
    package var timeMilliseconds: Int64
    package var kind: String
    package var subject: String
    package var message: String
    package var actor: String
    package var peer: String

    package mutating func didInsert(_ inserted: InsertionSuccess) { id = inserted.rowID }
}

/// Who asked for a change, for the audit fields of events.
package struct Caller: Equatable, Sendable {
    package var actor: String
    /// Network address; empty for the system itself.
    package var peer: String
    package init(actor: String, peer: String = "") {
        self.actor = actor
        self.peer = peer
    }
    package static let controller = Caller(actor: "controller")
    /// The caller of the request that the current task serves.
    @TaskLocal package static var current = Caller.controller
}
