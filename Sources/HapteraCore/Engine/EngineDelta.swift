// Rule J: what a joiner must be given.
//
// A joiner that was a member until epoch B misses only writes above the stable point at its
// departure, which were in active regions and got births of B or more at the Install that followed,
// and writes made later. What it holds in excess is in its own activity log, or has such a birth.
// So delta = {birth at a member >= B} or {birth at the joiner >= B} or its activity log, and the
// regions of writes on the way. It holds for any length of absence and any number of attempts: B
// stays in the record until the promotion.

extension EngineCore {
    /// Regions asked about at once: bounded by the reply's table, and by what a replica reads of
    /// its table for one request.
    private static let mapRegionsMax: UInt64 = 65536

    private enum MapQuestion: UInt64, CaseIterable {
        /// What the member holds, or has written since B.
        case source
        /// The same of the joiner.
        case joiner
        /// Which regions the joiner holds at all: the others are copied without being compared.
        case presence
        var bit: UInt8 { 1 << UInt8(rawValue) }
    }

    func beginMapping() {
        guard let joiner else { return }
        joinStage = .mapping
        mapAttempt &+= 1
        mapRegion = 0
        joinSource = liveMembers.first
        joinBase = deltaBase(joiner)
        held = [UInt64](repeating: 0, count: needed.count)
        requestMap()
    }

    /// The source was lost while it was asked: another is asked from the start. What is already on
    /// the list stays on it.
    func advanceMapping() {
        guard isSettled, joinSource.map({ !isLive($0) || !members.contains($0) }) ?? true,
            !liveMembers.isEmpty
        else { return }
        beginMapping()
    }

    /// B, from which epoch on the joiner's history may differ; zero: everything is compared.
    private func deltaBase(_ joiner: ReplicaSlot) -> Epoch {
        let member = member(joiner)
        guard let departure = record?.out.first(where: { $0.member == member }) else {
            return .zero
        }
        if mutations.contains(.rolledBackJoinerByDelta) { return departure.partedEpoch }
        guard departure.reason != .rolledBack, !isOlderCopy(joiner, departure) else {
            note(.joinerRolledBack(joiner))
            return .zero
        }
        return departure.partedEpoch
    }

    /// Less than it is known to have flushed or promised: an older copy of its directory, which
    /// misses more than its departure explains.
    private func isOlderCopy(_ slot: ReplicaSlot, _ departure: VolumeRecord.Departure) -> Bool {
        replicas[slot].isRolledBack
            || installReplies[slot].map { $0.flushed < departure.stablePoint } ?? false
    }
    /// Has the record say so before the first flush of the joiner takes the evidence away: another
    /// engine may have to go on with it. True if the record is being changed.
    func recordRollBack(_ joiner: ReplicaSlot) -> Bool {
        let member = member(joiner)
        guard let departure = record?.out.first(where: { $0.member == member }),
            departure.reason != .rolledBack, isOlderCopy(joiner, departure),
            !mutations.contains(.rollBackNotRecorded),
            !mutations.contains(.rolledBackJoinerByDelta)
        else { return false }
        if !isStoreBusy { propose(.join) { $0.markRolledBack(member) } }
        return true
    }

    private var mapLength: UInt64 {
        let most = joinBase == .zero ? Self.mapRegionsMax : UInt64(ReplicaCore.birthRegionsMax)
        return min(most, Geometry.regionCount(size: size) - mapRegion)
    }

    private func requestMap() {
        guard let joiner, let source = joinSource else { return }
        mapAwaiting = 0
        for question in MapQuestion.allCases {
            // With nothing to date it by, what the joiner holds is what is asked of it.
            if question == .presence, joinBase == .zero { continue }
            mapAwaiting |= question.bit
            var header = FrameHeader(kind: .regionMap)
            header.tag = tag(question)
            header.offset = mapRegion * UInt64(Geometry.regionSize)
            header.length = UInt32(mapLength)
            if question != .presence { header.auxiliary = joinBase.rawValue }
            send(question == .source ? source : joiner, header)
        }
    }
    private func tag(_ question: MapQuestion) -> UInt64 {
        UInt64(mapAttempt) << 48 | mapRegion << 2 | question.rawValue
    }

    func receivedMap(_ slot: ReplicaSlot, _ header: FrameHeader, _ table: RawMemory) {
        // An answer to an earlier attempt may still come: the tag tells.
        guard joinStage == .mapping,
            let question = MapQuestion.allCases.first(where: { tag($0) == header.tag }),
            mapAwaiting & question.bit != 0,
            slot == (question == .source ? joinSource : joiner)
        else { return }
        guard header.status == .ok, UInt64(header.length) == mapLength,
            table.count == (Int(header.length) + 7) / 8
        else { return protocolError(slot) }
        let isIgnored =
            question == .source && mutations.contains(.deltaIgnoresSourceBirth)
            || question == .joiner && mutations.contains(.deltaIgnoresJoinerBirth)
        let regions = Geometry.regionCount(size: size)
        for byte in 0..<table.count where table[byte] != 0 {
            for bit in 0..<8 where table[byte] & (1 << UInt8(bit)) != 0 {
                let region = mapRegion + UInt64(byte * 8 + bit)
                guard region < regions else { break }
                if question != .presence, joinBase == .zero || !isIgnored { markNeeded(region) }
                if question == .presence || question == .joiner { markHeld(region) }
            }
        }
        mapAwaiting &= ~question.bit
        guard mapAwaiting == 0 else { return }
        mapRegion += mapLength
        if mapRegion < regions { return requestMap() }
        finishMapping()
    }

    private func finishMapping() {
        guard let joiner else { return }
        // Redundant while its Install re-stamps them; the log is what the promise is about.
        let regions = Geometry.regionCount(size: size)
        for region in (installReplies[joiner]?.activeRegions ?? []).map(\.region)
        where region < regions && !mutations.contains(.deltaIgnoresJoinerLog) {
            markNeeded(region)
        }
        neededTotal = neededCount
        joinStage = .copying
        note(.joinMapped(joiner, since: joinBase, regions: UInt64(neededCount)))
    }

    func markHeld(_ region: UInt64) {
        held[Int(region / 64)] |= 1 << (region % 64)
    }
    /// False: the joiner has nothing there, not even what is to be overwritten.
    func isHeldByJoiner(_ region: UInt64) -> Bool {
        held[Int(region / 64)] & (1 << (region % 64)) != 0
    }
}
