/// Who uses the engines of volumes that are not attached, by volume id. In memory: what a
/// controller that starts anew finds in the store is used by nobody, and is ended.
///
/// Commands use one for as long as they run, and an attachment waits for them. What holds one
/// beyond a command, because it is read from, scrubs or fills replicas, gives way to an attachment
/// at once: each goes on with whichever engine the volume has next.
struct Maintenances {
    enum Hold: Hashable {
        case readers
        case scrub
        case filling
    }
    private struct Use {
        var ticket: UInt64
        /// What commands do, by their words.
        var commands: [String: Int] = [:]
        /// Those that give way.
        var yieldingCount = 0
        var holds: Set<Hold> = []
        /// Of the attachment; nil: the store does not have it yet.
        var generation: Int64?

        var commandCount: Int { commands.values.reduce(0, +) }
        var isEmpty: Bool { commands.isEmpty && yieldingCount == 0 && holds.isEmpty }

        mutating func add(_ words: String?) {
            if let words { commands[words, default: 0] += 1 } else { yieldingCount += 1 }
        }
        mutating func remove(_ words: String?) {
            guard let words else { return yieldingCount -= 1 }
            let count = commands[words] ?? 0
            commands[words] = count > 1 ? count - 1 : nil
        }
    }
    private var uses: [String: Use] = [:]
    private var nextTicket: UInt64 = 1
    /// Volumes that somebody waits for to be without an engine: no other is begun.
    private var closed: [String: Int] = [:]
    private var waitingSince: [String: Int64] = [:]

    /// Those that run, apart from what holds it.
    func userCount(_ id: String) -> Int {
        uses[id].map { $0.commandCount + $0.yieldingCount } ?? 0
    }
    var isEmpty: Bool { uses.isEmpty }
    func isUsed(_ id: String) -> Bool { uses[id] != nil }
    func isUsed(_ id: String, by ticket: UInt64) -> Bool { uses[id]?.ticket == ticket }
    func isClosed(_ id: String) -> Bool { closed[id] != nil }
    /// An attachment does not wait for what it is used for.
    func yields(_ id: String) -> Bool { uses[id]?.commands.isEmpty ?? true }
    func isHeld(_ id: String, by hold: Hold) -> Bool { uses[id]?.holds.contains(hold) ?? false }
    /// What commands do with it.
    func words(_ id: String) -> [String] { uses[id]?.commands.keys.sorted() ?? [] }

    /// Noted before the store knows of it, so that what is in the store and not noted is nobody's.
    /// `words`: what a command does; nil: it gives way.
    mutating func begin(_ id: String, for words: String?) -> UInt64 {
        precondition(uses[id] == nil)
        defer { nextTicket += 1 }
        var use = Use(ticket: nextTicket)
        use.add(words)
        uses[id] = use
        return nextTicket
    }

    mutating func begun(_ id: String, _ ticket: UInt64, generation: Int64) {
        if uses[id]?.ticket == ticket { uses[id]?.generation = generation }
    }

    mutating func join(_ id: String, for words: String?) -> UInt64? {
        uses[id]?.add(words)
        return uses[id]?.ticket
    }

    /// The attachment that nobody uses any more, if that was the last one to leave.
    mutating func leave(_ id: String, _ ticket: UInt64, for words: String?) -> Int64? {
        guard uses[id]?.ticket == ticket else { return nil }
        uses[id]?.remove(words)
        return dropIfUnused(id)
    }

    /// Precondition: whoever says so has not left.
    mutating func hold(_ id: String, _ ticket: UInt64, _ hold: Hold) {
        if uses[id]?.ticket == ticket { uses[id]?.holds.insert(hold) }
    }
    /// As `leave`.
    mutating func release(_ id: String, _ hold: Hold) -> Int64? {
        guard uses[id]?.holds.remove(hold) != nil else { return nil }
        return dropIfUnused(id)
    }
    private mutating func dropIfUnused(_ id: String) -> Int64? {
        guard let use = uses[id], use.isEmpty else { return nil }
        uses[id] = nil
        return use.generation
    }

    /// Forgets one that has ended, whoever uses it: a salvage may end it, or a reconstruction.
    mutating func look(at volume: VolumeRow) {
        guard let begun = uses[volume.id]?.generation, !volume.isMaintained,
            volume.clientGeneration >= begun
        else { return }
        drop(volume.id)
    }

    /// How long somebody waits for its end to attach the volume, milliseconds.
    mutating func waiting(_ volume: VolumeRow, now: Int64) -> Int64 {
        guard volume.nextNode != nil else {
            waitingSince[volume.id] = nil
            return 0
        }
        let since = waitingSince[volume.id] ?? now
        waitingSince[volume.id] = since
        return now - since
    }
    mutating func keepOnly(_ maintained: Set<String>) {
        waitingSince = waitingSince.filter { maintained.contains($0.key) }
    }

    /// It has ended, whoever uses it.
    mutating func drop(_ id: String) { uses[id] = nil }

    mutating func close(_ id: String) { closed[id, default: 0] += 1 }
    mutating func open(_ id: String) {
        let count = closed[id] ?? 0
        closed[id] = count > 1 ? count - 1 : nil
    }
}
