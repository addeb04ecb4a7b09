import HapteraCore

// Scrubs under way with everything else, and one at the end, after which every copy is intact
// (invariant 34). Drawn from a source of their own: the rest of a world does not depend on them.

extension World {
    func scheduleScrub() {
        timeline.schedule(after: milliseconds(scrubRandom.between(50, 3000)), .scrub)
    }

    /// What an engine has not finished the next one goes on with, as the control plane has it.
    func requestScrub() {
        guard isChaos else { return }
        scheduleScrub()
        for engine in engines {
            guard let report = engine.core.scrubReport, report.progress.id == scrub.id else {
                continue
            }
            scrub = report.progress
            isScrubFinished = report.state == .finished
        }
        guard let current = currentEngine, engines[current].isRunning,
            engines[current].pausedUntil <= timeline.now
        else { return }
        if isScrubFinished {
            let id = scrub.id + 1
            scrub = ScrubProgress()
            scrub.id = id
            isScrubFinished = false
        }
        step(engines[current], .scrub(scrub))
        deliverDisconnects()
    }

    /// 34: when a scrub has ended, and nothing else went on, every block of every layer of every
    /// member is intact, but for what it called lost; and nothing is bad that no fault made so.
    func scrubAtEnd(_ engine: SimulatedEngine) {
        guard scrubs else { return }
        var progress = ScrubProgress()
        progress.id = 1 << 32
        step(engine, .scrub(progress))
        deliverDisconnects()
        let isDone = run(seconds: Self.convergenceSeconds) {
            engine.core.scrubReport?.state == .finished
        }
        guard failure == nil else { return }
        guard isDone, let found = engine.core.scrubReport?.progress else {
            return fail("invariant 34: the scrub does not end")
        }
        note("scrub: \(found.text)")
        coverage.took(.scrub)
        if !faults.rot {
            check(
                34, found.bad == 0 && found.skipped == 0,
                "a scrub finds \(found.bad) blocks bad, \(found.skipped) regions unreadable")
        }
        guard found.lost == 0, found.skipped == 0, failure == nil else { return }
        for host in hosts where store.record.contains(host) && host.rot == .none {
            guard
                let image = ReplicaImage(
                    host.disk, isDurable: false, sizeBytes: workload.sizeBytes,
                    record: trueRecord)
            else { return fail("\(host.name): the files do not make sense") }
            for layer in image.layers {
                let bad = layer.entries.indices.first { layer.isDoubtful($0) }
                check(
                    34, bad == nil,
                    "block \(bad ?? 0) of layer \(layer.id.rawValue) of \(host.name) is damaged "
                        + "after a scrub")
            }
        }
    }
}
