import Glibc
import HapteraCore
import HapteraIO
import Testing

@testable import HapteraReplica

/// The last copy, with damage that it can go on with.
@Suite struct AcceptDamageTests {
    private static let regions = 4
    private static let blocks = Geometry.blocksPerRegion
    /// Marks of failed syncs bear its number, in a place that all tests share.
    private let member = VolumeRecord.Member(
        replica: ReplicaID(rawValue: randomUInt64() | 1), incarnation: Incarnation(rawValue: 4))
    private let layer = LayerID(rawValue: 1)
    private static let zeroes = [UInt8](repeating: 0, count: Geometry.blockSize)

    /// Blocks 0, 1 and 5 of regions 1 and 2, drained, and the log's tail behind it.
    private func make(_ directory: String) throws {
        try ServedCopy.create(directory, member, regions: Self.regions)
        let copy = try ServedCopy(directory)
        for region in 1...2 {
            for block in [0, 1, 5] { try copy.write(Self.blocks * region + block, block) }
        }
        try copy.close()
    }
    private func rot(
        _ directory: String, _ layer: UInt32 = 1, region: UInt64, slots: [Int] = [0, 1]
    )
        throws
    {
        let storage = DirectoryStorage(directory: directory, mode: .serve)
        let page = MemoryBlock(count: TablePage.size)
        for slot in slots {
            let offset = TablePage.pairOffset(region: region) + UInt64(slot * TablePage.size)
            let file = ReplicaFile.table(LayerID(rawValue: layer))
            _ = try storage.read(file, offset: offset, into: page.memory)
            page.memory[100] ^= 0x40
            try storage.write(file, offset: offset, from: page.memory)
        }
    }
    @discardableResult
    private func accept(_ directory: String) throws -> String {
        try AcceptDamage.run(directory: directory, isAccepted: true)
    }
    private func isThere(_ path: String) -> Bool {
        // SAFETY: the string outlives the call.
        unsafe access(path, F_OK) == 0
    }

    /// Names, sizes and bytes of all files.
    private func contents(_ path: String) throws -> [String: [UInt8]] {
        var found: [String: [UInt8]] = [:]
        for name in DirectoryStorage.names(in: path) ?? [] where name != "." && name != ".." {
            let file = "\(path)/\(name)"
            if DirectoryStorage.names(in: file) != nil {
                found.merge(try contents(file)) { first, _ in first }
                continue
            }
            let opened = try DirectFile(path: file, access: .readOnly, direct: false)
            let memory = MemoryBlock(count: Int(try opened.size()) + 1)
            let count = try opened.read(into: memory.memory, offset: 0)
            found[file] = memory.memory.slice(0, count).bytes()
        }
        return found
    }

    // MARK: a page

    /// Two copies that both went on as what is left says would differ, and nobody compares them.
    @Test func besideOthersItMustBeSaidThatTheyAreGone() throws {
        let directory = try TestDirectory()
        try make(directory.path)
        try rot(directory.path, region: 1)
        do {
            let storage = DirectoryStorage(directory: directory.path, mode: .serve)
            guard case .manifest(var manifest) = try ReplicaCore.loadManifest(storage) else {
                throw StorageError(.damaged, "no manifest")
            }
            manifest.counter += 1
            let other = VolumeRecord.Member(
                replica: ReplicaID(rawValue: 5), incarnation: Incarnation(rawValue: 6))
            manifest.installed?.inSync.append(other)
            let bytes = manifest.encoded()
            let memory = MemoryBlock(count: bytes.count)
            memory.memory.copy(from: bytes)
            try storage.write(.manifest, offset: manifest.slotOffset(), from: memory.memory)
        }
        let before = try contents("\(directory.path)/layers")
        let error = #expect(throws: StorageError.self) { try accept(directory.path) }
        #expect(error?.message.contains("--others-are-gone") == true)
        #expect(try contents("\(directory.path)/layers") == before)
        _ = try AcceptDamage.run(
            directory: directory.path, isAccepted: true, othersAreGone: true)
        #expect(try OfflineTools.verify(directory: directory.path).damagedPages == 0)
    }

    @Test func aPageWithoutAValidSlotCostsWhatItKnew() throws {
        let directory = try TestDirectory()
        try make(directory.path)
        try rot(directory.path, region: 1)
        do {
            let copy = try ServedCopy(directory.path)
            #expect(try copy.read(Self.blocks) == nil)
            guard case .tableUnreadable(region: 1)? = copy.failure else {
                Issue.record("\(String(describing: copy.failure))")
                return
            }
        }
        let before = try contents(directory.path)
        let text = try AcceptDamage.run(directory: directory.path, isAccepted: false)
        #expect(try contents(directory.path) == before)
        for part in [
            "layer 1 (the head), table page of region 1, bytes 1048576..<2097152: both slots",
            "3 become damaged", "253 hold nothing",
            "damaged bytes: 1048576..<1056768 1069056..<1073152\n", "nothing was changed",
        ] { #expect(text.contains(part), "\(part) in \(text)") }

        try accept(directory.path)
        let kept = try contents("\(directory.path)/damaged-pages").values
        #expect(kept.map(\.count) == [TablePage.pairSize])
        let table = before["\(directory.path)/layers/1.table"]
        #expect(kept.first == table.map { [UInt8]($0[8192..<16384]) })
        #expect(try OfflineTools.verify(directory: directory.path).mismatches == 3)
        #expect(try OfflineTools.verify(directory: directory.path).damagedPages == 0)
        do {
            let copy = try ServedCopy(directory.path)
            for block in [0, 1, 5] {
                #expect(try copy.read(Self.blocks + block) == nil)
                #expect(try copy.read(2 * Self.blocks + block) == ServedCopy.pattern(block))
            }
            #expect(try copy.read(Self.blocks + 2) == Self.zeroes && copy.failure == nil)
            // Until they are written.
            try copy.write(Self.blocks, 9)
            #expect(try copy.read(Self.blocks) == ServedCopy.pattern(9))
            try copy.close()
        }
        #expect(try OfflineTools.verify(directory: directory.path).mismatches == 2)
        #expect(try accept(directory.path) == "nothing is damaged\n")
    }

    /// It does not even start: a page that the log names is needed at once.
    @Test func whatTheLogSaysIsKnown() throws {
        let directory = try TestDirectory()
        try make(directory.path)
        do {
            let copy = try ServedCopy(directory.path)
            try copy.write(Self.blocks + 1, 20)
            try copy.write(Self.blocks + 7, 21)
            try copy.zero(Self.blocks + 5)
            try copy.flush()
        }
        try rot(directory.path, region: 1)
        #expect(throws: StorageError.self) { try ServedCopy(directory.path) }
        let text = try accept(directory.path)
        #expect(text.contains("1 become damaged") && text.contains("3 are as the log"))
        do {
            let copy = try ServedCopy(directory.path)
            // What is not known would be doubtful, and taken for good when it is resolved.
            #expect(copy.core.activeRegionCount == 0)
            #expect(try copy.read(Self.blocks) == nil)
            #expect(try copy.read(Self.blocks + 1) == ServedCopy.pattern(20))
            #expect(try copy.read(Self.blocks + 5) == Self.zeroes)
            #expect(try copy.read(Self.blocks + 7) == ServedCopy.pattern(21))
            // Its records are in the page now, and those that follow count.
            try copy.write(Self.blocks + 1, 22)
            try copy.flush()
        }
        let next = try ServedCopy(directory.path)
        #expect(try next.read(Self.blocks + 1) == ServedCopy.pattern(22))
        #expect(try next.read(Self.blocks + 5) == Self.zeroes)
    }
    /// One slot is valid: the newer page or the older one, and nothing tells which.
    @Test(arguments: [0, 1]) func anOlderPageCountsWhereTheDataAgrees(slot: Int) throws {
        let directory = try TestDirectory()
        try make(directory.path)
        do {
            let copy = try ServedCopy(directory.path)
            try copy.write(Self.blocks, 30)
            try copy.write(Self.blocks + 9, 31)
            try copy.close()
        }
        let newer = try newest(directory.path, region: 1)
        try rot(directory.path, region: 1, slots: [slot])
        #expect(try ServedCopy(directory.path).read(Self.blocks) == nil)
        let text = try accept(directory.path)
        #expect(text.contains("one slot is damaged"))
        let copy = try ServedCopy(directory.path)
        let isOlder = slot == newer
        #expect(try copy.read(Self.blocks) == (isOlder ? nil : ServedCopy.pattern(30)))
        #expect(try copy.read(Self.blocks + 1) == ServedCopy.pattern(1))
        #expect(try copy.read(Self.blocks + 5) == ServedCopy.pattern(5))
        #expect(try copy.read(Self.blocks + 9) == (isOlder ? nil : ServedCopy.pattern(31)))
        #expect(try copy.read(Self.blocks + 2) == Self.zeroes && copy.failure == nil)
    }
    private func newest(_ directory: String, region: UInt64) throws -> Int? {
        let storage = DirectoryStorage(directory: directory, mode: .serve)
        let pair = MemoryBlock(count: TablePage.pairSize)
        _ = try storage.read(
            .table(layer), offset: TablePage.pairOffset(region: region), into: pair.memory)
        guard
            case .page(let page, _) = TablePage.loadPair(pair.memory, layer: layer, region: region)
        else { return nil }
        return Int(page.version % 2)
    }

    /// Sectors that cannot be read are as damaged as any: they are written anew.
    @Test(arguments: [[0, 1], [0], [1]] as [[Int]], [false, true])
    func whatCannotBeReadIsWrittenAnew(slots: [Int], isActive: Bool) throws {
        let directory = try TestDirectory()
        try make(directory.path)
        if isActive {
            let copy = try ServedCopy(directory.path)
            try copy.write(Self.blocks + 1, 20)
            try copy.flush()
        }
        let newer = try newest(directory.path, region: 1)
        let file = ReplicaFile.table(layer)
        let bad = slots.map { TablePage.pairOffset(region: 1) + UInt64($0 * TablePage.size) }
        let fault: (ReplicaFile, Range<UInt64>) -> Int32? = { name, range in
            name == file && bad.contains(where: range.contains) ? EIO : nil
        }
        do {
            let storage = DirectoryStorage(
                directory: directory.path, mode: .inspect(waitMilliseconds: 0))
            storage.readFault = fault
            #expect(try DamageSurvey(storage, boot: HostBoot.read()).pages.map(\.region) == [1])
        }
        do {
            let storage = DirectoryStorage(
                directory: directory.path, mode: .change(waitMilliseconds: 0))
            storage.readFault = fault
            let survey = try DamageSurvey(storage, boot: HostBoot.read())
            try DamageAcceptance.accept(survey, boot: HostBoot.read())
        }
        let copy = try ServedCopy(directory.path)
        let isLost = slots.contains(newer ?? 0)
        if isActive { #expect(try copy.read(Self.blocks + 1) == ServedCopy.pattern(20)) }
        for block in [0, 5] {
            let isKnown = !isLost
            let found = try copy.read(Self.blocks + block)
            #expect(found == (isKnown ? ServedCopy.pattern(block) : nil), "\(block)")
            #expect(try copy.read(2 * Self.blocks + block) == ServedCopy.pattern(block))
        }
        #expect(try copy.read(Self.blocks + 2) == Self.zeroes && copy.failure == nil)
    }

    /// Whoever compares births never leaves the region out.
    @Test func theRegionIsNeverLeftOut() throws {
        let directory = try TestDirectory()
        try make(directory.path)
        try rot(directory.path, region: 1)
        try accept(directory.path)
        let births = try ReplicaReader(
            opening: DirectoryStorage(directory: directory.path, mode: .peek)
        ).births()
        #expect(births == [DamageAcceptance.birth: 1, Epoch(1): 1])
    }

    // MARK: layers

    /// Snapshot `kept`, and patterns that are written to blocks of region 1 after it.
    private func freeze(_ directory: String, _ patterns: [Int: Int]) throws {
        let copy = try ServedCopy(directory)
        try copy.takeSnapshot("kept")
        for (block, pattern) in patterns { try copy.write(Self.blocks + block, pattern) }
        try copy.close()
    }

    @Test func underASnapshotNothingIsGuessed() throws {
        let directory = try TestDirectory()
        try make(directory.path)
        try freeze(directory.path, [1: 40, 8: 41])
        try rot(directory.path, 2, region: 1)
        let text = try accept(directory.path)
        #expect(text.contains("layer 2 (the head)") && text.contains("4 become damaged"))
        let copy = try ServedCopy(directory.path)
        for block in [0, 1, 5] {
            #expect(try copy.read(Self.blocks + block, layer: 1) == ServedCopy.pattern(block))
        }
        // Written or not, and seen through or not: 8 in the head alone, 0 and 5 below it alone.
        for block in [0, 1, 5, 8] { #expect(try copy.read(Self.blocks + block) == nil) }
        #expect(try copy.read(Self.blocks + 2) == Self.zeroes)
        #expect(try copy.read(2 * Self.blocks + 1) == ServedCopy.pattern(1))
        try copy.write(Self.blocks + 5, 42)
        #expect(try copy.read(Self.blocks + 5) == ServedCopy.pattern(42))
        #expect(try copy.read(Self.blocks + 5, layer: 1) == ServedCopy.pattern(5))
    }

    @Test func aSnapshotsPageIsNamedByIt() throws {
        let directory = try TestDirectory()
        try make(directory.path)
        try freeze(directory.path, [1: 40])
        try rot(directory.path, region: 1)
        #expect(try accept(directory.path).contains("layer 1 (snapshot kept)"))
        let copy = try ServedCopy(directory.path)
        #expect(try copy.read(Self.blocks + 1) == ServedCopy.pattern(40))
        #expect(try copy.read(Self.blocks + 1, layer: 1) == nil)
        #expect(try copy.read(Self.blocks + 5) == nil)
    }

    @Test func sharedLayersStayAsTheyAre() throws {
        let directory = try TestDirectory()
        try make(directory.path)
        try rot(directory.path, region: 1)
        for file in ["1.data", "1.table"] {
            // SAFETY: the strings outlive the call.
            try #require(
                unsafe link("\(directory.path)/layers/\(file)", "\(directory.path)/\(file)") == 0)
        }
        let before = try contents(directory.path)
        let text = try AcceptDamage.run(directory: directory.path, isAccepted: false)
        #expect(text.contains("layer 1 (the head) is shared with a clone's copy"))
        let error = #expect(throws: StorageError.self) { try accept(directory.path) }
        #expect(error?.message.contains("is shared with a clone's copy") == true)
        #expect(try contents(directory.path) == before)
    }

    // MARK: the log

    /// Also if the copy was left in order, with records of what no stable point covers.
    @Test(arguments: [false, true]) func aDamagedRecordCountsAsAPowerCut(isClean: Bool) throws {
        let directory = try TestDirectory()
        try make(directory.path)
        do {
            let copy = try ServedCopy(directory.path)
            try copy.write(Self.blocks + 6, 50)
            try copy.write(Self.blocks + 7, 51)
            if isClean { try copy.close(isStable: false) } else { try copy.flush() }
        }
        try rotRecord(directory.path)
        defer { forgetMark() }
        #expect(throws: StorageError.self) { try ServedCopy(directory.path) }
        let before = try contents(directory.path)
        let text = try AcceptDamage.run(directory: directory.path, isAccepted: false)
        #expect(text.contains("activity.log: 1 damaged"))
        #expect(try contents(directory.path) == before)
        try accept(directory.path)
        #expect(isThere("\(directory.path)/damaged-pages/log-8192"))
        let copy = try ServedCopy(directory.path)
        #expect(copy.isRebooted)
        #expect(try copy.read(Self.blocks + 1) == ServedCopy.pattern(1))
        #expect(try copy.read(Self.blocks + 7) == ServedCopy.pattern(51))
        // As if it had never been written: that is what was accepted.
        #expect(try copy.read(Self.blocks + 6) == Self.zeroes)
        try copy.close()
    }
    /// A record was missing when the log was opened, and its place has been filled since: that it
    /// says nothing of a block does not mean that nothing was written.
    @Test func aRecordThatWasMissingIsNotForgotten() throws {
        let directory = try TestDirectory()
        try ServedCopy.create(directory.path, member, regions: Self.regions)
        do {
            let copy = try ServedCopy(directory.path)
            try copy.write(Self.blocks + 6, 50)
            try copy.write(Self.blocks + 7, 51)
            try copy.flush()
        }
        try rotRecord(directory.path)
        defer { forgetMark() }
        try accept(directory.path)
        do { _ = try ServedCopy(directory.path) }
        try rot(directory.path, region: 1)
        let text = try accept(directory.path)
        #expect(text.contains("damaged bytes: 1073152..<1077248\n"), "\(text)")
        let copy = try ServedCopy(directory.path)
        #expect(try copy.read(Self.blocks + 6) == nil)
        #expect(try copy.read(Self.blocks + 7) == ServedCopy.pattern(51))
    }
    private func forgetMark() {
        // SAFETY: the string outlives the call.
        _ = unsafe unlink(
            "\(DirectoryStorage.markMemory)/haptera-failed-sync-\(member.replica.text)-"
                + hexadecimal(4))
    }
    /// The first entry that is not in a page.
    private func rotRecord(_ directory: String) throws {
        let storage = DirectoryStorage(directory: directory, mode: .serve)
        let memory = try storage.mapLog(size: Int(try storage.size(.log)))
        let log = try ActivityLog(opening: memory)
        var first: UInt64?
        try log.replay { record in
            if record.kind == .entry, first == nil { first = record.index }
        }
        let index = try #require(first)
        memory[ActivityLog.ringOffset + Int(index) * LogRecord.size + 9] ^= 1
        try storage.sync(.log)
    }

    // MARK: around it

    @Test func aServedCopyIsRefused() throws {
        let directory = try TestDirectory()
        try make(directory.path)
        try rot(directory.path, region: 1)
        let copy = try ServedCopy(directory.path)
        let storage = DirectoryStorage(
            directory: directory.path, mode: .change(waitMilliseconds: 0))
        let error = #expect(throws: StorageError.self) { try storage.descriptor(.manifest) }
        #expect(error?.code == .inUse)
        #expect(error?.message.contains("stop its replica first") == true)
        withExtendedLifetime(copy) {}
    }

    /// Whatever step a crash leaves undone, the next attempt does.
    @Test func anyStepMayBeTheLast() throws {
        var isDone = false
        for syncs in 0..<20 where !isDone {
            let directory = try TestDirectory()
            try make(directory.path)
            try rot(directory.path, region: 1)
            try rot(directory.path, region: 2, slots: [1])
            DirectoryStorage(directory: directory.path, mode: .peek).noteDamage("a", of: member)
            var left = syncs
            do {
                let storage = DirectoryStorage(
                    directory: directory.path, mode: .change(waitMilliseconds: 0))
                storage.syncFault = { _ in
                    left -= 1
                    return left < 0 ? EIO : nil
                }
                let survey = try DamageSurvey(storage, boot: HostBoot.read())
                try DamageAcceptance.accept(survey, boot: HostBoot.read())
                isDone = true
            } catch {
                #expect(isThere("\(directory.path)/damaged"))
                try accept(directory.path)
            }
            #expect(!isThere("\(directory.path)/damaged"))
            let copy = try ServedCopy(directory.path)
            for block in [0, 1, 5] {
                #expect(try copy.read(Self.blocks + block) == nil)
                #expect(try copy.read(2 * Self.blocks + block) == ServedCopy.pattern(block))
            }
            #expect(try copy.read(Self.blocks + 2) == Self.zeroes && copy.failure == nil)
        }
        #expect(isDone)
    }

    @Test func theCommandTakesItsOptions() throws {
        let directory = try TestDirectory()
        try make(directory.path)
        try rot(directory.path, region: 1)
        #expect(ReplicaCommand.run(["accept-damage", "--dir", directory.path]) == 0)
        #expect(ReplicaCommand.run(["accept-damage", "--dir", directory.path, "--yes"]) == 2)
        #expect(ReplicaCommand.run(["accept-damage", "--dir", directory.path, "--accept"]) == 0)
        #expect(ReplicaCommand.run(["verify", "--dir", directory.path]) == 1)
        #expect(ReplicaCommand.run(["accept-damage", "--dir", "\(directory.path)/none"]) == 1)
    }
}
