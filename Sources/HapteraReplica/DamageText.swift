import HapteraCore
import HapteraIO

/// `haptera-replica accept-damage`: says what is damaged and what going on without it means, and
/// with `--accept` lets the copy go on.
package enum AcceptDamage {
    private static let waitMilliseconds = 3000

    /// Returns what to print. Without `isAccepted` no byte is changed.
    /// `othersAreGone`: the administrator says that no other copy will ever be back. Two that
    /// both went on as what is left of them says would differ, and nobody would compare them.
    package static func run(
        directory: String, isAccepted: Bool, othersAreGone: Bool = false
    ) throws -> String {
        let storage = DirectoryStorage(
            directory: directory,
            mode: isAccepted
                ? .change(waitMilliseconds: waitMilliseconds)
                : .inspect(waitMilliseconds: waitMilliseconds))
        // Before anything is believed: the locks of all that may be changed.
        for file in [ReplicaFile.manifest, .log] { _ = try storage.descriptor(file) }
        let host = try HostBoot.read()
        var boot = storage.bootOfNext()
        if isAccepted { boot = try storage.bootAfterFailedSyncs(host) }
        let survey = try DamageSurvey(storage, boot: boot)
        let mark = storage.damageMark(of: survey.manifest.identity.member)
        guard survey.isDamaged || mark != nil else { return "nothing is damaged\n" }
        var text = survey.text
        if !survey.isDamaged, let mark {
            text += "nothing is damaged now; a process has said: \(mark.reason)\n"
        }
        guard isAccepted else {
            return text + "nothing was changed; --accept lets the copy go on like this\n"
        }
        guard survey.manifest.isAlone || othersAreGone || !survey.isDamaged else {
            throw StorageError(
                .inUse,
                "\(survey.text)nothing was changed: the copy's record names other copies that are "
                    + "in sync. Have this one made anew; or if none of them will ever be back, "
                    + "repeat with --others-are-gone")
        }
        try DamageAcceptance.accept(survey, boot: host)
        return text + survey.acceptedText
    }
}

extension DamageSurvey {
    private static let rangesMax = 16

    /// By its number, and what the volume knows it as.
    func describe(_ layer: LayerID) -> String {
        let name = manifest.name(of: layer)
        let use =
            if layer == manifest.head {
                "the head"
            } else if let found = manifest.installed?.snapshots.first(where: { $0.layer == name }) {
                "snapshot \(found.name)"
            } else {
                "of a deleted snapshot"
            }
        return "layer \(layer.rawValue) (\(use))"
    }

    /// What is damaged, and what becomes of it.
    var text: String {
        let identity = manifest.identity
        var text = "replica \(identity.replica.text) of volume \(identity.name), "
        text += "in \(storage.directory)\n"
        if !manifest.isAlone {
            text +=
                "its record names other copies that are in sync: if one of them is left, have "
                + "this one made anew instead\n"
        }
        if let first = damagedRecords.first {
            text +=
                "activity.log: \(damagedRecords.count) damaged, from record \(first) on: as "
                + "many writes or trims, perhaps flushed, may be undone, and nothing tells which; "
                + "the copy will count as one whose host's power failed\n"
        }
        for page in pages { text += describe(page) }
        for layer in sharedLayers {
            text += "\(describe(layer)) is shared with a clone's copy: it cannot be accepted\n"
        }
        return text
    }

    private func describe(_ page: Page) -> String {
        let start = page.region * UInt64(Geometry.regionSize)
        let end = start + UInt64(page.fates.count * Geometry.blockSize)
        func count(_ fate: Fate) -> Int { page.fates.count { $0 == fate } }
        var text = "\(describe(page.layer)), table page of region \(page.region), "
        text += "bytes \(start)..<\(end): \(page.damage); of \(page.fates.count) blocks\n"
        let meanings: [(Fate, String)] = [
            (.known, "are as the log or the page says"),
            (.older, "are as an older page says: a trim or zeroing since is undone"),
            (.zeroes, "hold nothing, and read as zeroes"),
            (.damaged, "become damaged: reads of them fail until they are written"),
        ]
        for (fate, meaning) in meanings where count(fate) > 0 {
            text += "  \(count(fate)) \(meaning)\n"
        }
        let ranges = Self.ranges(page).map {
            "\(start + UInt64($0.lowerBound * Geometry.blockSize))..<"
                + "\(start + UInt64($0.upperBound * Geometry.blockSize))"
        }
        if !ranges.isEmpty {
            let more = ranges.count - Self.rangesMax
            text += "  damaged bytes: " + ranges.prefix(Self.rangesMax).joined(separator: " ")
            text += (more > 0 ? " and \(more) more ranges" : "") + "\n"
        }
        return text
    }
    /// Runs of blocks that become damaged.
    private static func ranges(_ page: Page) -> [Range<Int>] {
        var ranges: [Range<Int>] = []
        for (block, fate) in page.fates.enumerated() where fate == .damaged {
            if let last = ranges.last, last.upperBound == block {
                ranges[ranges.count - 1] = last.lowerBound..<block + 1
            } else {
                ranges.append(block..<block + 1)
            }
        }
        return ranges
    }

    var acceptedText: String {
        isDamaged
            ? "accepted; the damaged bytes are kept in \(storage.directory)/"
                + "\(DamageAcceptance.directoryName)\n"
            : "accepted; the copy is served again\n"
    }
}
