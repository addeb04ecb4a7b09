import HapteraCore

/// What goes out in one send: headers and small payloads copied side by side, large payloads by
/// reference.
final class SendBatch {
    static let areaSize = 128 << 10
    /// Bytes of one send, unless a single piece is longer. The buffers of a batch come back when
    /// all of it was sent, and only then is it known that the peer reads.
    static let bytesMax = (1 << 20) + areaSize
    let vector = IOVector()
    private let area = MemoryBlock(count: areaSize)
    private var used = 0
    private let retained = FixedArray(repeating: BufferID.none, count: IOVector.entriesMax)
    private var retainedCount = 0

    /// `count` bytes to fill in at once, or nil if they do not fit any more.
    func space(_ count: Int) -> RawMemory? {
        guard used + count <= Self.areaSize, !vector.isFull else { return nil }
        let memory = area.memory.slice(used, count)
        used += count
        vector.append(memory)
        return memory
    }

    /// Takes over one reference to `buffer`. False if there is no room.
    func append(_ buffer: BufferID, _ memory: RawMemory) -> Bool {
        guard !vector.isFull, retainedCount < retained.count,
            vector.length == 0 || vector.length + memory.count <= Self.bytesMax
        else { return false }
        vector.append(memory)
        retained[retainedCount] = buffer
        retainedCount += 1
        return true
    }

    /// Everything was sent, or never will be.
    func reset(_ pool: BufferPool) {
        for index in 0..<retainedCount { pool.release(retained[index]) }
        retainedCount = 0
        used = 0
        vector.removeAll()
    }
}

/// Batches not in use, shared by a reactor's connections: an idle connection holds none.
final class SendBatchPool {
    private var free: [SendBatch] = []
    private let keptMax = 32
    /// Swallows what is sent on a connection that is closing.
    let scratch = MemoryBlock(count: Connection.sendSpaceMax)

    init() { free.reserveCapacity(keptMax) }
    func take() -> SendBatch { free.popLast() ?? SendBatch() }
    func give(_ batch: SendBatch, pool: BufferPool) {
        batch.reset(pool)
        if free.count < keptMax { free.append(batch) }
    }
}
