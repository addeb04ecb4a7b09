import HapteraAPI
import HapteraCore

/// Scrubs: begun by the volume's engine, followed in its node's reports.
extension Controller {
    package func scrubVolume(
        _ request: Haptera_V1_ScrubVolumeRequest
    ) async throws -> Haptera_V1_Volume {
        let (stored, node) = try await knowingNodes {
            let stored = try await store.volume(named: request.name)
            guard let node = try servingNode(stored) else {
                throw Self.refused(
                    "volume '\(request.name)' is not attached, and only its engine can scrub it: "
                        + "attach it first: storagectl volume attach \(request.name)")
            }
            return (stored, node)
        }
        try await tasks.requireConnected(node)
        try await store.addEvent(
            "ScrubRequested", "volume/\(request.name)", "all replicas, with snapshots",
            by: Caller.current)
        changes.notify()
        _ = try await tasks.ask(node, timeout: .seconds(12), doubt: .inDoubt) {
            $0.scrubVolume.volumeID = stored.volume.id
            $0.scrubVolume.clientGeneration = UInt64(stored.volume.clientGeneration)
        }
        changes.notify()
        return view(try await store.volume(named: request.name))
    }

    /// What a scrub found, once: when a report is the first that calls it finished.
    func noteScrubs(
        from old: Haptera_V1_NodeReport, to new: Haptera_V1_NodeReport, by caller: Caller
    ) async throws {
        for engine in new.engines where engine.scrub.state == "finished" {
            let before = old.engines.first { $0.volumeID == engine.volumeID }?.scrub
            guard before?.id != engine.scrub.id || before?.state != "finished" else { continue }
            let scrub = engine.scrub
            try await store.addEvent(
                "ScrubFinished", "engine/\(engine.volumeID)",
                "\(scrub.blocksChecked) blocks checked, \(scrub.blocksBad) bad, "
                    + "\(scrub.blocksRepaired) repaired, \(scrub.blocksLost) lost, "
                    + "\(scrub.regionsSkipped) regions skipped", by: caller)
        }
    }
}
