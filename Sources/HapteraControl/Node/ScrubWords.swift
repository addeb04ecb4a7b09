import HapteraAPI
import HapteraCore
import HapteraHost

/// What an engine's status says of a scrub.
struct ScrubWords: Equatable {
    let progress: ScrubProgress
    let state: String
    let regionsTotal: UInt64
    let bytesPerSecond: UInt64

    /// Nil: it says nothing of one.
    init?(_ status: [String: String]) {
        guard let progress = status["scrub"].flatMap({ ScrubProgress(text: $0) }),
            let state = status["scrub.state"]
        else { return nil }
        self.progress = progress
        self.state = state
        regionsTotal = status["scrub.regionsTotal"].flatMap { UInt64($0) } ?? 0
        bytesPerSecond = status["scrub.bytesPerSecond"].flatMap { UInt64($0) } ?? 0
    }

    var isFinished: Bool { state == "finished" }

    var report: Haptera_V1_ScrubReport {
        var report = Haptera_V1_ScrubReport()
        report.id = hexadecimal(progress.id)
        report.state = state
        report.regionsDone = progress.region
        report.regionsTotal = regionsTotal
        report.blocksChecked = progress.checked
        report.blocksBad = progress.bad
        report.blocksRepaired = progress.repaired
        report.blocksLost = progress.lost
        report.regionsSkipped = progress.skipped
        report.bytesPerSecond = bytesPerSecond
        report.progress = progress.text
        return report
    }
}
