import HapteraAPI
import HapteraCore

/// What an engine's status says of damaged blocks: `damage` (how many findings since it started),
/// `damage.OUTCOME` (blocks of each), `damage.NUMBER` (the newest findings, one by one).
enum DamageWords {
    /// Nil: it says nothing of any.
    static func report(_ status: [String: String]) -> Haptera_V1_DamageReport? {
        func number(_ key: String) -> UInt64 { status[key].flatMap { UInt64($0) } ?? 0 }
        var report = Haptera_V1_DamageReport()
        report.count = number("damage")
        guard report.count > 0 else { return nil }
        report.blocksRepaired = number("damage.repaired")
        report.blocksLost = number("damage.lost")
        report.blocksDamaged = number("damage.damaged")
        report.findings =
            status.compactMap { key, value in
                guard key.hasPrefix("damage."), let number = UInt64(key.dropFirst("damage.".count))
                else { return nil }
                return finding(number, value)
            }
            .sorted { $0.number < $1.number }
        return report
    }

    /// OUTCOME:OFFSET:BLOCKS:REPLICA,...
    private static func finding(_ number: UInt64, _ text: String) -> Haptera_V1_DamageFinding? {
        let parts = text.split(separator: ":", omittingEmptySubsequences: false)
        guard parts.count == 4, let offset = UInt64(parts[1]), let blocks = UInt64(parts[2])
        else { return nil }
        var finding = Haptera_V1_DamageFinding()
        finding.number = number
        finding.outcome = String(parts[0])
        finding.offset = offset
        finding.blocks = blocks
        finding.replicaIds = parts[3].split(separator: ",").map(String.init)
        return finding
    }
}
