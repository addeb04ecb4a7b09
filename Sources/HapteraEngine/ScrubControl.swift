import HapteraCore
import HapteraIO

// The control verb `scrub from=PROGRESS`, and what the engine says of a scrub. PROGRESS is seven
// numbers with colons between them (`ScrubProgress.text`), as the status line `scrub` gives them:
// whoever keeps that line has another engine go on from there.

extension EngineProcess {
    /// Begins a scrub, or goes on with one; what runs already under the same id is left alone.
    func scrub(_ request: ControlRequest, _ shell: EngineShell) {
        guard let progress = ScrubProgress(arguments: request.arguments) else {
            return request.fail(
                "scrub needs from=ID:REGION:CHECKED:BAD:REPAIRED:LOST:SKIPPED, numbers, the first "
                    + "not zero, the others at most \(ScrubProgress.countMax)")
        }
        if shell.core.isScrubbing, let running = shell.core.scrubReport?.progress.id,
            running != progress.id
        {
            return request.fail("scrub \(running) is under way; one at a time")
        }
        shell.run(.scrub(progress))
        request.reply()
    }
}

extension ScrubProgress {
    /// More than any scrub finds: 16 PiB of blocks. The core goes on counting from what it is
    /// given, and makes a speed of it, bytes a thousand times over: from more that would overflow.
    static let countMax: UInt64 = 1 << 42

    /// Of the control verb; nil if it is anything else than one may be given.
    init?(arguments: [String: String]) {
        guard arguments.count == 1, let progress = arguments["from"].flatMap(Self.init(text:))
        else { return nil }
        let counts = [
            progress.region, progress.checked, progress.bad, progress.repaired, progress.lost,
            progress.skipped,
        ]
        guard counts.allSatisfy({ $0 <= Self.countMax }) else { return nil }
        self = progress
    }
}

extension EngineShell {
    func scrubLines() -> [(key: String, value: String)] {
        guard let report = core.scrubReport else { return [] }
        return [
            ("scrub", report.progress.text), ("scrub.state", report.state.rawValue),
            ("scrub.regionsTotal", String(report.regionsTotal)),
            ("scrub.bytesPerSecond", String(report.bytesPerSecond)),
        ]
    }

    func logScrub(_ note: EngineNote) {
        let volume = ("volume", name)
        func id(_ slot: ReplicaSlot) -> (String, String) { ("replica", core.replicaID(slot).text) }
        switch note {
        case .scrubBegun(let region):
            Log.info("scrub begins", volume, ("region", String(region)))
        case .scrubFound(let slot, let offset, let blocks):
            counters.checksumMismatches &+= blocks
            damage.found(
                core.replicaID(slot), offset: offset, blocks: blocks, now: reactor.now)
            Log.error(
                "scrub found damaged blocks", volume, id(slot), ("offset", String(offset)),
                ("blocks", String(blocks)))
        case .scrubLost(let offset, let blocks):
            damage.lost(offset: offset, blocks: blocks)
            Log.error(
                "no replica has a good copy of these blocks: restore them from a backup", volume,
                ("offset", String(offset)), ("blocks", String(blocks)))
        case .scrubSkipped(let slot, let region):
            Log.error(
                "scrub skipped a region: the replica cannot say what it holds there", volume,
                id(slot), ("region", String(region)))
        case .scrubFinished:
            let progress = core.scrubReport?.progress ?? ScrubProgress()
            if progress.lost == 0, progress.skipped == 0 { damage.nothingIsLost() }
            Log.info(
                "scrub finished", volume, ("blocksChecked", String(progress.checked)),
                ("blocksBad", String(progress.bad)), ("blocksRepaired", String(progress.repaired)),
                ("blocksLost", String(progress.lost)), ("regionsSkipped", String(progress.skipped)))
        default: break
        }
    }
}
