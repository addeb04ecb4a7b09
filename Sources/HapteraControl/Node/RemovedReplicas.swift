import Foundation
import HapteraCore
import HapteraHost
import Logging

/// What is left of removed replicas: their directories, renamed so that nothing takes them for a
/// replica, until their files are deleted. If the host loses its power or the agent ends in
/// between, and nobody asks for the removal again, they stay, hold space, and keep layers of other
/// volumes counted as shared.
enum RemovedReplicas {
    static let suffix = ".removed"

    /// Below `directory`, those of replicas not among `known`: units see to theirs by themselves.
    /// Only what a removal can have left: the name is a replica's with the suffix, and it is a
    /// directory, not a link to one.
    static func left(in directory: String, besides known: Set<String>) -> [String] {
        let names = (try? FileManager.default.contentsOfDirectory(atPath: directory)) ?? []
        return names.sorted().filter { name in
            let id = String(name.dropLast(suffix.count))
            guard name.hasSuffix(suffix), ReplicaID(id)?.text == id, !known.contains(id) else {
                return false
            }
            // Of the link itself, were it one.
            let found = try? FileManager.default.attributesOfItem(atPath: "\(directory)/\(name)")
            return found?[.type] as? FileAttributeType == .typeDirectory
        }
    }

    /// On a thread of its own: the kernel may take long to free what large files hold.
    static func delete(_ path: String) async throws {
        try await withCheckedThrowingContinuation { continuation in
            DispatchQueue.global(qos: .utility).async {
                continuation.resume(
                    with: Result { try FileManager.default.removeItem(atPath: path) })
            }
        }
    }
}

extension NodeAgent {
    /// Deletes what is left of removed replicas, one after the other; what cannot be deleted is
    /// tried again the next time.
    package func sweepRemoved() async {
        let directory = context.directory + "/replicas"
        for name in RemovedReplicas.left(in: directory, besides: knownReplicas) {
            let path = "\(directory)/\(name)"
            do {
                try await RemovedReplicas.delete(path)
                logger.info(
                    "deleted what was left of a removed replica", metadata: ["directory": "\(path)"]
                )
            } catch {
                logger.warning(
                    "cannot delete what is left of a removed replica",
                    metadata: ["directory": "\(path)", "reason": "\(error)"])
            }
        }
    }
}
