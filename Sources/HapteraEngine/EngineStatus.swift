import HapteraCore
import HapteraIO

/// What an engine has done, since it started.
struct EngineCounters {
    var completed: UInt64 = 0
    var reads: UInt64 = 0
    var writes: UInt64 = 0
    var trims: UInt64 = 0
    var flushes: UInt64 = 0
    var readBytes: UInt64 = 0
    var writtenBytes: UInt64 = 0
    var errors: UInt64 = 0
    var checksumMismatches: UInt64 = 0
    var removals: UInt64 = 0

    mutating func count(_ operation: Operation) {
        switch operation.kind {
        case .read:
            reads &+= 1
            readBytes &+= UInt64(operation.length)
        case .write:
            writes &+= 1
            writtenBytes &+= UInt64(operation.length)
        case .trim, .writeZeroes: trims &+= 1
        case .flush: flushes &+= 1
        case .status: break
        }
    }
}

extension EngineShell {
    /// One word for where the volume stands, as the control socket reports it.
    var stateWord: String {
        switch core.phase {
        case .installing where core.isRefusing: "stalled"
        case .idle, .fetching, .hearing, .claiming, .installing: "starting"
        case .serving: "serving"
        case .stalled: "stalled"
        case .stopped: "stopped"
        }
    }

    /// Why it is not being served, for people; empty if it is.
    var reason: String {
        switch core.phase {
        case .serving where core.isFullEverywhere:
            return "every replica's disk is full; writes wait for space: free some on any node"
        case .serving: return isStoreAvailable ? "" : "the metadata store does not answer"
        case .stopped: return core.stopText
        case .installing where core.isRefusing:
            return "only replicas whose hosts restarted are there: acknowledged writes that were "
                + "never flushed may be missing; waits for a better one, or for accept-loss"
        case .stalled: return "waits for a replica of the in-sync set to return: " + memberNames
        case .idle, .fetching, .claiming: return "waits for the metadata store"
        case .hearing, .installing:
            return "waits for the replicas of the in-sync set: " + memberNames
        }
    }

    /// As the record has them: those that count, whether they answer or not.
    private var memberNames: String {
        let names = core.record?.inSync.map(\.replica.text) ?? []
        return names.isEmpty ? "none is known yet" : names.joined(separator: ", ")
    }

    /// Why a change of the record is not made now, in an answer to who asked for it.
    var notServingText: String {
        let state = reason.isEmpty ? stateWord : "\(stateWord) (\(reason))"
        return isServing
            ? "it is being detached, or too many requests for changes wait; try again"
            : "volume '\(name)' is not served at present, it is \(state); try again when it is"
    }

    func statusLines() -> [(key: String, value: String)] {
        var lines: [(key: String, value: String)] = [
            ("state", stateWord), ("reason", reason), ("name", name),
            ("volume", core.configuration.volume.text),
            ("epoch", String(core.record?.epoch.rawValue ?? 0)), ("size", String(size)),
            ("instance", String(core.configuration.instance.rawValue)),
            ("leaseValid", core.isLeased(at: reactor.now) ? "true" : "false"),
            ("removalDeadline", String(core.configuration.removalDeadlineMilliseconds)),
            ("ioTimeout", String(core.configuration.ioTimeoutMilliseconds)),
            ("detectZeroes", EngineSettings.text(core.configuration.detectsZeroes)),
            ("needsDecision", core.isRefusing ? "true" : "false"),
            ("storeAvailable", isStoreAvailable ? "true" : "false"),
            ("unresolvedRegions", String(core.unresolvedCount)),
            ("rebuildDone", String(core.rebuildProgress.done)),
            ("rebuildTotal", String(core.rebuildProgress.total)),
            ("resolve.regionsDone", String(core.resolveProgress.done)),
            ("resolve.regionsTotal", String(core.resolveProgress.total)),
            ("lastTakeover.regions", String(core.lastTakeover.regions)),
            ("lastTakeover.blocks", String(core.lastTakeover.blocks)),
            ("lastTakeover.milliseconds", String(core.lastTakeover.milliseconds)),
        ]
        if let report = core.rebuildReport {
            lines += [
                ("rebuild.replica", report.replica.text), ("rebuild.kind", report.kind.rawValue),
                ("rebuild.phase", report.phase),
                ("rebuild.regionsDone", String(report.regionsDone)),
                ("rebuild.regionsTotal", String(report.regionsTotal)),
                ("rebuild.bytesCopied", String(report.bytesCopied)),
                ("rebuild.bytesPerSecond", String(report.bytesPerSecond)),
                ("rebuild.elapsedMilliseconds", String(report.elapsedMilliseconds)),
            ]
        }
        lines += scrubLines()
        lines += damage.statusLines
        for snapshot in core.record?.snapshots ?? [] {
            lines.append(
                ("snapshot." + snapshot.name, "\(snapshot.layer.rawValue) \(snapshot.created)"))
        }
        for slot in core.configuredSlots {
            let latency = core.writeLatency(slot)
            lines.append(("latency." + core.replicaID(slot).text, String(latency.average)))
            lines.append(("latencyWorst." + core.replicaID(slot).text, String(latency.worst)))
            lines.append(
                ("replica." + core.replicaID(slot).text, core.standing(slot).rawValue))
        }
        return lines
    }

    func metricLines() -> [(key: String, value: String)] {
        [
            ("haptera_engine_reads_total", String(counters.reads)),
            ("haptera_engine_writes_total", String(counters.writes)),
            ("haptera_engine_trims_total", String(counters.trims)),
            ("haptera_engine_flushes_total", String(counters.flushes)),
            ("haptera_engine_read_bytes_total", String(counters.readBytes)),
            ("haptera_engine_written_bytes_total", String(counters.writtenBytes)),
            ("haptera_engine_errors_total", String(counters.errors)),
            ("haptera_engine_checksum_mismatches_total", String(counters.checksumMismatches)),
            ("haptera_engine_replica_removals_total", String(counters.removals)),
            ("haptera_engine_rebuilt_blocks_total", String(core.blocksRebuilt)),
            ("haptera_engine_rebuilt_bytes_total", String(core.bytesRebuilt)),
            ("haptera_engine_compared_regions_total", String(core.regionsCompared)),
            ("haptera_engine_repaired_blocks_total", String(core.blocksRepaired)),
            ("haptera_engine_lost_blocks_total", String(damage.sums[.lost] ?? 0)),
            ("haptera_engine_hedged_reads_total", String(core.hedgedReads)),
            ("haptera_engine_in_sync_replicas", String(core.memberSlots.count)),
            ("haptera_engine_epoch", String(core.record?.epoch.rawValue ?? 0)),
        ]
    }

    private func report(_ what: String, _ layer: LayerID, _ epoch: Epoch) {
        Log.info(
            what, ("volume", name), ("layer", String(layer.rawValue)),
            ("epoch", String(epoch.rawValue)))
    }
    /// Before the core decides what to do without the change.
    func logRefusal(_ reason: String) {
        Log.error(
            "the metadata store refuses a change of the record", ("volume", name),
            ("change", "\(core.proposedRecord.change)"), ("reason", reason))
    }
    /// One log line per event an operator may want to know of.
    func log(_ note: EngineNote) {
        func id(_ slot: ReplicaSlot) -> (String, String) { ("replica", core.replicaID(slot).text) }
        func at(_ epoch: Epoch) -> (String, String) { ("epoch", String(epoch.rawValue)) }
        let volume = ("volume", name)
        switch note {
        case .tookOver(let epoch): Log.info("volume taken over", volume, at(epoch))
        case .replicaLost(let slot): Log.warn("replica lost", volume, id(slot))
        case .replicaRemoved(let slot, let epoch, let reason):
            counters.removals &+= 1
            Log.warn(
                "replica removed from the in-sync set", volume, id(slot), at(epoch),
                ("reason", "\(reason)"))
        case .replicaReinstated(let slot, let epoch):
            let text = "replica back in sync: nothing was acknowledged without it"
            Log.info(text, volume, id(slot), at(epoch))
        case .replicaRolledBack(let slot):
            let text = "replica's files are older than they were: it is compared in full"
            Log.error(text, volume, id(slot))
        case .lossAccepted:
            Log.warn("an administrator accepted the loss of unflushed writes", volume)
        case .replicaJoining(let slot, let epoch):
            Log.info("replica joins: comparing and filling it", volume, id(slot), at(epoch))
        case .replicaPromoted(let slot, let epoch):
            let copied = ("blocksCopied", String(core.blocksRebuilt))
            Log.info("replica in sync again", volume, id(slot), at(epoch), copied)
        case .joinFailed(let slot):
            Log.warn("replica dropped out while being filled; trying again", volume, id(slot))
        case .joinMapped(let slot, let since, let regions):
            let since = ("sinceEpoch", String(since.rawValue))
            Log.info("filling replica", volume, id(slot), since, ("regions", String(regions)))
        case .joinerRolledBack(let slot):
            Log.warn("replica is an older copy of itself; comparing all of it", volume, id(slot))
        case .onlyRebootedMembers:
            Log.error(
                "volume not served: every replica that answers lost its host; bring back one "
                    + "whose host stayed up, or see 'storagectl volume accept-loss'", volume)
        case .resolved(let regions, let blocks, let milliseconds):
            let what = "resolved \(regions) regions, \(blocks) blocks differed"
            Log.info("\(what), \(milliseconds) ms", volume)
        case .stalled:
            Log.error(
                "every replica is gone; requests wait for one to return", volume,
                ("replicas", memberNames))
        case .fullEverywhere:
            Log.error("every replica's disk is full; writes wait for space on any node", volume)
        case .storeUnavailable: Log.debug("the metadata store does not answer", volume)
        case .checksumMismatch, .doubtfulBytesKept, .repaired: logDamage(note)
        case .replicaSlow(let slot):
            let latency = ("latencyMicroseconds", String(core.writeLatency(slot).average))
            Log.warn("replica much slower than the others", volume, id(slot), latency)
        case .protocolError(let slot):
            Log.error(
                "replica broke the protocol; disconnected (is it of another version?)", volume,
                id(slot))
        case .snapshotTaken(let layer, let epoch): report("snapshot taken", layer, epoch)
        case .reverted(let target, let epoch): report("volume reverted", target, epoch)
        case .snapshotDeleted(let layer, let epoch): report("snapshot deleted", layer, epoch)
        case .resized(let size, let epoch):
            Log.info("volume resized", volume, ("size", String(size)), at(epoch))
        case .rebuildProgress(let slot, let done, let total):
            Log.debug(
                "filling replica", volume, id(slot), ("regionsDone", String(done)),
                ("regionsTotal", String(total)))
        case .scrubBegun, .scrubFound, .scrubLost, .scrubSkipped, .scrubFinished: logScrub(note)
        }
    }
}
