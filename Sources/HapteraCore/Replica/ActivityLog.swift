/// One record of the activity log: 32 bytes, so that none straddles a sector and a torn write keeps
/// the sector's other records.
///
///     offset  size  field
///          0     4  checksum  CRC32C of bytes 4..<32
///          4     1  kind      raw value of `Kind`
///          5     1  state     entry: raw value of `BlockState`; otherwise zero
///          6     2  count     entry: blocks it is about (1 for data); otherwise zero
///          8     8  index     counts records for ever; its slot is index % capacity
///         16     4  layer     activate, entry, drained
///         20     4  crc       entry in state data: CRC32C of the block; otherwise zero
///         24     8  position  activate, drained: region; entry: first block; covered: an index
///     flushed and stable have the epoch in 16..<24 and the sequence number in 24..<32.
package struct LogRecord: Equatable, BitwiseCopyable, Sendable {
    package static let size = 32

    package enum Kind: UInt8, BitwiseCopyable, Sendable {
        /// The region may differ from what is durable from here on. Durable before data changes.
        case activate = 1
        case entry = 2
        /// Everything up to the point was durable here.
        case flushed = 3
        /// The region's page was durable when this was written.
        case drained = 4
        /// Every member has flushed up to the point and holds a durable mark of it.
        case stable = 5
        /// Records with an index below `position` are durable, and so is their data.
        case covered = 6
    }
    package var kind: Kind
    package var state: BlockState = .absent
    package var count: UInt16 = 0
    package var index: UInt64 = 0
    package var layer = LayerID(rawValue: 0)
    package var checksum: UInt32 = 0
    package var position: UInt64 = 0
    package var epoch: Epoch = .zero

    package static func activate(layer: LayerID, region: UInt64) -> LogRecord {
        LogRecord(kind: .activate, layer: layer, position: region)
    }
    package static func drained(layer: LayerID, region: UInt64) -> LogRecord {
        LogRecord(kind: .drained, layer: layer, position: region)
    }
    package static func entry(layer: LayerID, block: UInt64, count: Int, _ entry: BlockEntry)
        -> LogRecord
    {
        LogRecord(
            kind: .entry, state: entry.state, count: UInt16(count), layer: layer,
            checksum: entry.checksum, position: block)
    }
    package static func flushed(_ point: StablePoint) -> LogRecord {
        LogRecord(kind: .flushed, position: point.sequence.rawValue, epoch: point.epoch)
    }
    package static func stable(_ point: StablePoint) -> LogRecord {
        LogRecord(kind: .stable, position: point.sequence.rawValue, epoch: point.epoch)
    }
    package static func covered(_ index: UInt64) -> LogRecord {
        LogRecord(kind: .covered, position: index)
    }
    /// What a flushed or stable record says.
    private var isMark: Bool { kind == .flushed || kind == .stable }
    package var point: StablePoint {
        StablePoint(epoch: epoch, sequence: SequenceNumber(position))
    }

    package func encode(to memory: RawMemory, at offset: Int) {
        let target = memory.slice(offset, Self.size)
        target.store(
            UInt32(kind.rawValue) | UInt32(state.rawValue) << 8 | UInt32(count) << 16, 4)
        target.store(index, 8)
        if isMark {
            target.store(epoch.rawValue, 16)
        } else {
            target.store(UInt64(layer.rawValue) | UInt64(checksum) << 32, 16)
        }
        target.store(position, 24)
        target.store(CRC32C.checksum(target.slice(4, Self.size - 4)), 0)
    }

    /// Nil if this is not a whole record this version could have written.
    package init?(decoding memory: RawMemory, at offset: Int) {
        let source = memory.slice(offset, Self.size)
        guard let kind = Kind(rawValue: source[4]), let state = BlockState(rawValue: source[5]),
            source.load(UInt32.self, 0) == CRC32C.checksum(source.slice(4, Self.size - 4))
        else { return nil }
        self.init(kind: kind, state: state, count: source.load(UInt16.self, 6))
        index = source.load(UInt64.self, 8)
        position = source.load(UInt64.self, 24)
        if isMark {
            epoch = Epoch(source.load(UInt64.self, 16))
        } else {
            layer = LayerID(rawValue: source.load(UInt32.self, 16))
            checksum = source.load(UInt32.self, 20)
        }
        guard isWellFormed else { return nil }
    }

    private init(
        kind: Kind, state: BlockState = .absent, count: UInt16 = 0,
        layer: LayerID = LayerID(rawValue: 0), checksum: UInt32 = 0, position: UInt64 = 0,
        epoch: Epoch = .zero
    ) {
        self.kind = kind
        self.state = state
        self.count = count
        self.layer = layer
        self.checksum = checksum
        self.position = position
        self.epoch = epoch
    }

    private var isWellFormed: Bool {
        guard kind == .entry else { return state == .absent && count == 0 && checksum == 0 }
        guard count >= 1, Int(count) <= Geometry.blocksPerRegion else { return false }
        guard state != .data || count == 1, state == .data || checksum == 0 else { return false }
        let within = position % UInt64(Geometry.blocksPerRegion)
        return Int(within) + Int(count) <= Geometry.blocksPerRegion
    }
}

/// A replica's activity log: a ring of records in a mapped file. What is stored survives the
/// process; what was stored before a sync of the file began survives the machine.
///
///     offset  size  header slot (at 0 and, alternating, at 4096; counter % 2 picks the slot)
///          0     4  magic      "HPAL"
///          4     4  format     5; 3 until a flush has covered what format 3 did not
///          8     8  counter    the higher valid one wins
///         16     8  tail       records with a smaller index are no longer needed
///         24     8  capacity   records in the ring
///         32     8  flushed    epoch of the last flushed point
///         40     8             its sequence number
///         48     8  stable     epoch of the last stable point
///         56     8             its sequence number
///         64     4  checksum   CRC32C of bytes 0..<64
///
/// In format 4 gaps that power cuts had left were not filled. In format 3 flushes of the lowest
/// layer's blocks were not covered. Format 2 knew no covered records. Format 1 had no stable point
/// and its checksum, of bytes 0..<48, at 48. All are still read.
///
/// The ring begins at 8192. A slot is reused only when its old index is below the *durable* tail,
/// so a replay that begins at whichever header survived finds every record it needs.
package final class ActivityLog {
    package static let magic: UInt32 = 0x4c41_5048
    package static let formatVersion: UInt32 = 5
    private static let formatPartlyCovered: UInt32 = 3
    private static let formatCovered: UInt32 = 4
    package static let ringOffset = 8192
    /// 16 MiB of records.
    package static let capacityDefault: UInt64 = 524_288
    package static let capacityMin: UInt64 = 1024
    package static let capacityMax: UInt64 = 1 << 24

    package let capacity: UInt64
    private let memory: RawMemory
    private var counter: UInt64
    private var format: UInt32
    /// Whether every flush of data over a trimmed block of the lowest layer has been covered.
    package var coversLowest: Bool { format >= Self.formatCovered }
    /// Whether every opening after a power cut has filled what the cut left out (`fillGaps`): no
    /// record is missing that was stored since the host started.
    package var isGapless: Bool { format >= Self.formatVersion }
    /// Index of the next record.
    package private(set) var nextIndex: UInt64
    /// The tail of the last header known to be durable.
    package private(set) var durableTail: UInt64
    /// Highest flushed point found in header and records.
    package private(set) var flushed: StablePoint
    /// Highest stable point found in header and records, or stored since. As
    /// `ReplicaCore.knownStable`.
    package private(set) var stable: StablePoint
    /// Records promised to writes whose data is on its way to the disk.
    package private(set) var reserved: UInt64 = 0
    /// Rises with every store: what a sync has to cover.
    package private(set) var storeCount: UInt64 = 1

    package static func fileSize(capacity: UInt64) -> UInt64 {
        UInt64(ringOffset) + capacity * UInt64(LogRecord.size)
    }

    /// Writes the first header of a new log into its (zeroed) first 8 KiB. `first`: the index of
    /// its first record.
    package static func format(_ memory: RawMemory, capacity: UInt64, first: UInt64 = 0) {
        storeHeader(
            to: memory,
            Header(
                format: formatVersion, counter: 0, tail: first, capacity: capacity, flushed: .zero,
                stable: .zero))
    }

    /// Reads the header; call `replay` before appending.
    package init(opening memory: RawMemory) throws(StorageError) {
        self.memory = memory
        guard memory.count >= Self.ringOffset else {
            throw StorageError(.damaged, "activity.log: too short for its header")
        }
        let slots = [Self.loadHeader(memory, slot: 0), Self.loadHeader(memory, slot: 1)]
        guard let header = slots.compactMap({ $0 }).max(by: { $0.counter < $1.counter }) else {
            throw StorageError(.damaged, "activity.log: neither header slot is valid")
        }
        guard (Self.capacityMin...Self.capacityMax).contains(header.capacity),
            UInt64(memory.count) == Self.fileSize(capacity: header.capacity),
            header.tail < 1 << 62
        else {
            throw StorageError(
                .damaged, "activity.log: header gives \(header.capacity) records, file has not")
        }
        capacity = header.capacity
        counter = header.counter
        format = max(header.format, Self.formatPartlyCovered)
        durableTail = header.tail
        nextIndex = header.tail
        flushed = header.flushed
        stable = header.stable
    }

    /// Nil: it never became durable, is damaged, or its place is another's.
    private func record(_ index: UInt64) -> LogRecord? {
        LogRecord(decoding: memory, at: offset(index)).flatMap { $0.index == index ? $0 : nil }
    }
    /// Hands every record about a region that may still matter to `body`, in index order. A gap is
    /// a record that was never made durable, or is damaged: see `damagedRecords`.
    package func replay(_ body: (LogRecord) throws(StorageError) -> Void) throws(StorageError) {
        for index in durableTail..<durableTail + capacity {
            guard let record = record(index) else { continue }
            nextIndex = index + 1
            switch record.kind {
            case .flushed: flushed = max(flushed, record.point)
            case .stable: stable = max(stable, record.point)
            case .covered: break
            case .activate, .entry, .drained: try body(record)
            }
        }
    }
    /// Up to which index, not included, records are known to be durable with their data.
    package func findCovered() -> UInt64 {
        var covered: UInt64 = 0
        for index in durableTail..<durableTail + capacity {
            guard let record = record(index), record.kind == .covered else { continue }
            covered = max(covered, record.position)
        }
        return covered
    }

    /// Replaces entries that are in the ring by what `body` makes of them, each in its place and
    /// under its index: a crash meanwhile leaves some of them as they were.
    package func replaceEntries(_ body: (LogRecord) -> BlockEntry?) {
        for index in durableTail..<nextIndex {
            guard var record = record(index), record.kind == .entry, let entry = body(record)
            else { continue }
            record.state = entry.state
            record.checksum = entry.checksum
            record.encode(to: memory, at: offset(index))
            storeCount += 1
        }
    }

    /// Records in use or promised.
    package var used: UInt64 { nextIndex - durableTail + reserved }

    /// Kept back from writes, so that draining and renewing activations always goes on.
    package var margin: UInt64 { min(capacity / 4, 16_384) }

    package func hasRoom(_ count: Int) -> Bool { used + UInt64(count) + margin <= capacity }
    /// Room in the margin: for the records that make room. They leave a part of it to covered
    /// records, without which no flush ends and so no region drains.
    package var hasRoomForUpkeep: Bool { used + margin / 4 < capacity }
    package var hasRoomForCovered: Bool { used < capacity }

    package func reserve(_ count: Int) { reserved += UInt64(count) }
    package func unreserve(_ count: Int) {
        precondition(reserved >= UInt64(count))
        reserved -= UInt64(count)
    }

    /// Stores the record and returns its index. The caller has made sure of the room.
    @discardableResult
    package func append(_ record: LogRecord) -> UInt64 {
        precondition(nextIndex - durableTail < capacity)
        var numbered = record
        numbered.index = nextIndex
        numbered.encode(to: memory, at: offset(nextIndex))
        nextIndex += 1
        storeCount += 1
        return numbered.index
    }
    /// As `append`, using up one reserved record.
    package func appendReserved(_ record: LogRecord) {
        unreserve(1)
        append(record)
    }

    /// Stores a header with this tail in the slot not in use. The space is free only when a sync
    /// begun later has ended and `tailBecameDurable` was called; one header at a time.
    package func storeHeader(tail: UInt64, flushed: StablePoint, stable: StablePoint) {
        precondition(tail >= durableTail && tail <= nextIndex)
        counter += 1
        self.flushed = max(self.flushed, flushed)
        self.stable = max(self.stable, stable)
        Self.storeHeader(
            to: memory,
            Header(
                format: format, counter: counter, tail: tail, capacity: capacity,
                flushed: self.flushed, stable: self.stable))
        storeCount += 1
    }
    /// A covered record of all that was found when the log was opened is durable.
    package func foundIsCovered() { format = Self.formatVersion }

    /// Records that are missing though later ones are there, and were durable: all that are, or
    /// after a restart of the host those that a covered record speaks of. None in a log whose older
    /// gaps nobody filled.
    package func damagedRecords(isRebooted: Bool) -> [UInt64] {
        guard isGapless else { return [] }
        let missing = (durableTail..<nextIndex).filter { record($0) == nil }
        guard isRebooted, !missing.isEmpty else { return missing }
        let covered = findCovered()
        return missing.filter { $0 < covered }
    }
    /// Whether every record that was ever stored is there: none is missing, and none was when a
    /// process before filled what was (`fillGaps`).
    package var isComplete: Bool {
        (durableTail..<nextIndex).allSatisfy { index in
            guard let record = record(index) else { return false }
            return record.kind != .covered || record.position > 0
        }
    }
    /// Puts records that say nothing where a power cut left none, so that a damaged one is noticed
    /// from here on. Durable with the next sync, and done again if the power fails before.
    package func fillGaps() {
        for index in durableTail..<nextIndex where record(index) == nil {
            var record = LogRecord.covered(0)
            record.index = index
            record.encode(to: memory, at: offset(index))
            storeCount += 1
        }
        if coversLowest { format = Self.formatVersion }
    }
    package func tailBecameDurable(_ tail: UInt64) {
        precondition(tail >= durableTail && tail <= nextIndex)
        durableTail = tail
    }

    private func offset(_ index: UInt64) -> Int {
        Self.ringOffset + Int(index % capacity) * LogRecord.size
    }

    private struct Header {
        var format: UInt32
        var counter: UInt64
        var tail: UInt64
        var capacity: UInt64
        var flushed: StablePoint
        var stable: StablePoint
    }

    private static func storeHeader(to memory: RawMemory, _ header: Header) {
        let slot = memory.slice(Int(header.counter % 2) * 4096, 512)
        slot.fill()
        slot.store(magic, 0)
        slot.store(header.format, 4)
        slot.store(header.counter, 8)
        slot.store(header.tail, 16)
        slot.store(header.capacity, 24)
        slot.store(header.flushed.epoch.rawValue, 32)
        slot.store(header.flushed.sequence.rawValue, 40)
        slot.store(header.stable.epoch.rawValue, 48)
        slot.store(header.stable.sequence.rawValue, 56)
        slot.store(CRC32C.checksum(slot.slice(0, 64)), 64)
    }
    private static func loadHeader(_ memory: RawMemory, slot: Int) -> Header? {
        let slot = memory.slice(slot * 4096, 512)
        let format = slot.load(UInt32.self, 4)
        guard slot.load(UInt32.self, 0) == magic, (1...formatVersion).contains(format) else {
            return nil
        }
        let length = format == 1 ? 48 : 64
        guard slot.load(UInt32.self, length) == CRC32C.checksum(slot.slice(0, length)) else {
            return nil
        }
        return Header(
            format: format, counter: slot.load(UInt64.self, 8), tail: slot.load(UInt64.self, 16),
            capacity: slot.load(UInt64.self, 24), flushed: point(slot, 32),
            stable: format == 1 ? .zero : point(slot, 48))
    }
    private static func point(_ memory: RawMemory, _ offset: Int) -> StablePoint {
        StablePoint(
            epoch: Epoch(memory.load(UInt64.self, offset)),
            sequence: SequenceNumber(memory.load(UInt64.self, offset + 8)))
    }
}
