import Glibc
import HapteraCore
import HapteraIO

/// Lets a damaged copy go on as what is left of it says (`accept-damage`).
///
/// Order, and what a crash leaves. All of it can be done again:
/// 1. the damaged bytes go to `damaged-pages`, synced with their names -> the copy as it was
/// 2. if a record of the log is damaged: the manifest says that the copy was not left in order
///    (synced), so that the mark counts                               -> the copy as it was
/// 3. then the mark of a failed sync, and in the log, synced, records that say nothing in the place
///    of damaged ones: it opens as after a power cut                  -> opens; pages are damaged
/// 4. the log is synced: no later record gets an index below a page's -> as before
/// 5. the layer's data is synced: a page is taken for durable with it -> as before
/// 6. a damaged page's slot that is not valid is written, the table synced. If neither is valid:
///    slot 0, synced, then slot 1, synced                -> one valid slot that says the same; or a
///                                                          page that is whole
/// 7. the mark `damaged` is removed                      -> served beside others, too
enum DamageAcceptance {
    /// Later than any epoch a copy can have left in: deltas and comparisons never leave out a
    /// region of which it is not known when it was written.
    static let birth = Epoch(1 << 61)
    static let directoryName = "damaged-pages"

    static func accept(_ survey: DamageSurvey, boot: BootID) throws(StorageError) {
        let storage = survey.storage
        try refuseShared(survey)
        do throws(StorageError) {
            try Evidence(storage.directory).keep(survey)
            if !survey.damagedRecords.isEmpty { try openAsAfterPowerCut(survey, boot) }
            if !survey.pages.isEmpty { try storage.sync(.log) }
            for page in survey.pages { try write(page, survey) }
        } catch {
            // What is durable is unknown; the next sync would say nothing of it.
            if storage.hasFailedSync { storage.noteFailedSync(boot) }
            throw error
        }
        try storage.forgetDamage()
    }

    private static func refuseShared(_ survey: DamageSurvey) throws(StorageError) {
        guard let layer = survey.sharedLayers.first else { return }
        throw StorageError(
            .inUse,
            "\(survey.describe(layer)) is shared with a clone's copy and cannot be changed: delete "
                + "the clone or move its data first, or make this copy anew")
    }

    private static func openAsAfterPowerCut(_ survey: DamageSurvey, _ boot: BootID)
        throws(StorageError)
    {
        let storage = survey.storage
        if survey.manifest.isClean {
            var manifest = survey.manifest
            manifest.counter += 1
            manifest.isClean = false
            try write(manifest, storage)
        }
        storage.noteFailedSync(boot)
        guard try storage.bootByMarks(boot) != boot else {
            throw StorageError(
                .io(errno: EIO), "cannot leave the mark of a failed sync in \(storage.directory)")
        }
        survey.activityLog.fillGaps()
        try storage.sync(.log)
    }
    /// To its own slot, then to the other one, as every change of it.
    private static func write(_ manifest: Manifest, _ storage: DirectoryStorage)
        throws(StorageError)
    {
        let slotSize = Manifest.slotSize(ofFile: try storage.size(.manifest))
        let bytes = manifest.encoded()
        let memory = MemoryBlock(count: bytes.count)
        memory.memory.copy(from: bytes)
        for slot in [manifest.slot, 1 - manifest.slot] {
            try storage.write(.manifest, offset: UInt64(slot * slotSize), from: memory.memory)
            try storage.sync(.manifest)
        }
    }

    private static func write(_ page: DamageSurvey.Page, _ survey: DamageSurvey)
        throws(StorageError)
    {
        let storage = survey.storage
        try storage.sync(.data(page.layer))
        let entries = MemoryBlock(count: TablePage.entriesSize)
        for (block, entry) in page.entries.enumerated() {
            entry.encode(to: entries.memory, at: block * BlockEntry.size)
        }
        let memory = MemoryBlock(count: TablePage.size)
        // Beside a valid slot the next version goes to the other one, and the two are whole.
        let versions: [UInt64] = page.valid.map { [$0.version + 1] } ?? [2, 3]
        for version in versions {
            let written = TablePage(
                layer: page.layer, region: page.region, version: version, birth: birth,
                logIndex: survey.nextIndex)
            written.encode(entries: entries.memory, to: memory.memory)
            let offset = TablePage.offset(region: page.region, version: version)
            try storage.write(.table(page.layer), offset: offset, from: memory.memory)
            try storage.sync(.table(page.layer))
        }
    }
}

/// The damaged bytes as they were found, in a directory of the copy's.
private struct Evidence {
    private let directory: String
    private let parent: String

    init(_ copy: String) {
        parent = copy
        directory = "\(copy)/\(DamageAcceptance.directoryName)"
    }

    func keep(_ survey: DamageSurvey) throws(StorageError) {
        guard survey.isDamaged else { return }
        try DirectFile.makeDirectory(directory)
        for page in survey.pages {
            try keep("\(page.layer.rawValue)-\(page.region)", page.slots, survey.storage)
        }
        let size = 4096
        let offsets = survey.damagedRecords.map { index in
            (ActivityLog.ringOffset + Int(index % survey.capacity) * LogRecord.size) / size * size
        }
        for offset in Set(offsets).sorted() {
            let bytes = survey.log.slice(offset, size).bytes()
            try keep("log-\(offset)", bytes, survey.storage)
        }
        try DirectFile.syncDirectory(directory)
        try DirectFile.syncDirectory(parent)
    }

    /// Never over another: what is found there later is kept beside it.
    private func keep(_ name: String, _ bytes: [UInt8], _ storage: DirectoryStorage)
        throws(StorageError)
    {
        for number in 1... {
            let path = "\(directory)/\(name)" + (number > 1 ? ".\(number)" : "")
            if let found = contents(path, bytes.count) {
                if found == bytes { return }
                continue
            }
            let temporary = "\(directory)/new"
            try storage.writeWhole(bytes, to: temporary)
            // SAFETY: the strings outlive the call.
            guard unsafe rename(temporary, path) == 0 else {
                throw DirectoryStorage.error(errno, "cannot make \(path): \(errorText(errno))")
            }
            return
        }
    }
    /// Nil: there is no such file.
    private func contents(_ path: String, _ size: Int) -> [UInt8]? {
        guard let fd = try? FileDescriptors.open(path, flags: O_RDONLY) else { return nil }
        defer { close(fd) }
        var bytes = [UInt8](repeating: 0, count: size)
        // SAFETY: the array has the bytes given.
        let count = unsafe Glibc.read(fd, &bytes, size)
        return [UInt8](bytes.prefix(max(count, 0)))
    }
}
