// Rules of a single copy's files.

extension MutationSet {
    /// On disk: let the log's tail pass a page before the table is synced.
    package static let tailMovedBeforeTableSync = MutationSet(rawValue: 1 << 56)
    /// I: answer an Install when the manifest is written, not when it is synced.
    package static let manifestNotSynced = MutationSet(rawValue: 1 << 57)
    /// On disk: give a trimmed block's space back before its entry is durable.
    package static let punchBeforeDrain = MutationSet(rawValue: 1 << 58)
    /// I: name a layer in the manifest before its files' names and its table are synced. (Judged
    /// by `ReplicaChainTests`, too.)
    package static let layerNamesNotSynced = MutationSet(rawValue: 1 << 59)
    /// F: answer a flush without saying in the log what it has made durable. (Caught by simulated
    /// worlds with snapshots.)
    package static let freshNotCovered = MutationSet(rawValue: 1 << 62)
    /// On disk: leave what a crash has written without its record where it is. (Judged by
    /// `ReplicaStaleTests`.)
    package static let staleIsKept = MutationSet(rawValue: 1 << 75)
    /// On disk: take a damaged record of the log for one that was never durable. (Judged by
    /// `ReplicaLogDamageTests`.)
    package static let damagedRecordIsGap = MutationSet(rawValue: 1 << 79)
    /// On disk: do so after a restart of the host, though a covered record speaks of it. (Judged by
    /// `ReplicaLogDamageTests`.)
    package static let coveredRecordIsGap = MutationSet(rawValue: 1 << 81)
    /// I: raise the birth of a region whose page is on its way and says another. (Judged by
    /// `ReplicaBirthTests`.)
    package static let leavingIsRestamped = MutationSet(rawValue: 1 << 82)
    /// Merges: give what is read of a deleted layer up without having it durable in its heir.
    package static let mergeNotDurable = MutationSet(rawValue: 1 << 60)
    /// Merges: leave the heir's birth as it is.
    package static let mergeLosesBirth = MutationSet(rawValue: 1 << 61)
    /// Merges: answer for a layer while a deleted one below it still holds some of it.
    package static let unmergedIsAnswered = MutationSet(rawValue: 1 << 63)

    /// Merges: give what the head hides of the layer below it up before the head's is durable.
    package static let hiddenNotDurable = MutationSet(rawValue: 1 << 80)

    /// Reads: go on showing what a frozen layer held before an entry of it changed.
    package static let viewOutlivesChange = MutationSet(rawValue: 1 << 76)

    /// Sizes: leave what was counted as it is when blocks change.
    package static let spaceNotRecounted = MutationSet(rawValue: 1 << 68)

    /// Clones: answer for a layer without what is stuck under it.
    package static let foldIgnored = MutationSet(rawValue: 1 << 64)
    /// Clones: merge layers whose files another copy has as well.
    package static let sharedIsMerged = MutationSet(rawValue: 1 << 65)
    /// Clones: link files before what is in memory is in them.
    package static let sharedBeforeDrained = MutationSet(rawValue: 1 << 66)
    /// Clones: take layers for the copy's own when it is opened, whatever names their files have.
    package static let sharedIsForgotten = MutationSet(rawValue: 1 << 69)
    /// Clones: change a shared layer's blocks as any other's.
    package static let sharedIsChanged = MutationSet(rawValue: 1 << 70)
    /// Clones: give the space of stuck layers' hidden blocks back.
    package static let stuckIsPunched = MutationSet(rawValue: 1 << 71)
    /// Clones: begin a clone's log at zero, below what shared pages name.
    package static let cloneLogAtZero = MutationSet(rawValue: 1 << 72)
    /// Clones: never notice that a layer is not shared any more.
    package static let sharedForEver = MutationSet(rawValue: 1 << 73)

    /// G: answer for room in the head's files that no sync has made durable.
    package static let growthNotSynced = MutationSet(rawValue: 1 << 53)
    /// G: record a size that no replica was asked about. (Judged by `EngineResizeTests`.)
    package static let growthUnprepared = MutationSet(rawValue: 1 << 54)

    /// Of a single copy: caught by replaying crashes, not all of them by simulated worlds, where
    /// other copies help out.
    package static let crashReplay: [(name: String, mutation: MutationSet)] = [
        ("dataBeforeActivate", .dataBeforeActivate), ("drainBeforeLogSync", .drainBeforeLogSync),
        ("flushWithoutLog", .flushWithoutLog), ("drainWithoutFlush", .drainWithoutFlush),
        ("flushWithoutSync", .flushWithoutSync), ("noRestamp", .noRestamp),
        ("tailMovedBeforeTableSync", .tailMovedBeforeTableSync),
        ("manifestNotSynced", .manifestNotSynced), ("punchBeforeDrain", .punchBeforeDrain),
        ("layerNamesNotSynced", .layerNamesNotSynced), ("freshNotCovered", .freshNotCovered),
        ("mergeNotDurable", .mergeNotDurable), ("mergeLosesBirth", .mergeLosesBirth),
        ("unmergedIsAnswered", .unmergedIsAnswered), ("hiddenNotDurable", .hiddenNotDurable),
    ]
}
