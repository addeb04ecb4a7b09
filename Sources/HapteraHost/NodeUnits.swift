import Foundation
import Glibc

/// The engines and replicas that a node agent has left running below its directory.
///
/// They are ended in the order of the cases: engines flush to replicas, and note their leaving in
/// the store.
package enum NodeUnits: String, CaseIterable, Sendable {
    case engines
    case replicas

    private var prefix: String { self == .engines ? "e-" : "r-" }
    private var verb: String { self == .engines ? "detach" : "shutdown" }

    package func running(_ directory: String) -> [ProcessFile] {
        let run = directory + "/run"
        let names = (try? FileManager.default.contentsOfDirectory(atPath: run)) ?? []
        return names.filter { $0.hasPrefix(prefix) && $0.hasSuffix(".pid") }.sorted()
            .compactMap { ProcessFile.load("\(run)/\($0)") }
            .filter(\.identity.isRunning)
    }

    /// Tells them all to end in order. Returns those that have not.
    package func end(_ units: [ProcessFile]) async -> [ProcessFile] {
        await withTaskGroup(of: ProcessFile?.self) { group in
            for unit in units { group.addTask { await hasEnded(unit) ? nil : unit } }
            return await group.reduce(into: []) { left, unit in
                if let unit { left.append(unit) }
            }
        }
    }
    private func hasEnded(_ unit: ProcessFile) async -> Bool {
        do {
            _ = try await ControlSocket.request(unit.control, verb, timeoutSeconds: 20)
        } catch {
            // It is on its way already, or does not answer there.
            unit.identity.signal(SIGTERM)
        }
        return await unit.identity.isGone(within: .seconds(10))
    }
}

extension ProcessIdentity {
    package func isGone(within patience: Duration) async -> Bool {
        let deadline = ContinuousClock.now + patience
        while isRunning {
            if ContinuousClock.now > deadline { return false }
            try? await Task.sleep(for: .milliseconds(20))
        }
        return true
    }
}
