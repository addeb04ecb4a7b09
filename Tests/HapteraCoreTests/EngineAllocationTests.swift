import CAllocations
import Testing

@testable import HapteraCore

/// Steady state: an engine's step allocates nothing, whatever it is asked.
@Suite struct EngineAllocationTests {
    private let replicas = 3
    private let pool = BufferPool(limits: .init(small: 128, medium: 4, large: 20))

    /// Answers every frame the core sends, as a healthy replica would, until nothing is left to do.
    private func settle(_ core: EngineCore, _ entries: RawMemory, _ completed: inout Int) {
        while let action = core.actions.popFirst() {
            switch action {
            case .send(let slot, let header, _, _, _):
                guard header.kind != .stable else { continue }
                var reply = header.reply(.ok, epoch: header.epoch)
                var table = entries.slice(0, 0)
                if header.kind == .read {
                    // Nothing was ever written: every block is absent, there is no data.
                    table = entries.slice(0, Int(header.length) / 4096 * BlockEntry.size)
                    reply.tableLength = UInt32(table.count)
                }
                core.step(
                    .frame(slot, reply, table: table, data: entries.slice(0, 0)), now: .zero)
            case .complete(_, let result, let buffer, _, _):
                precondition(result == .ok)
                completed += 1
                if buffer != .none { pool.release(buffer) }
            default: break
            }
        }
    }

    private func start(_ entries: RawMemory) -> EngineCore {
        let members = (1...replicas).map {
            VolumeRecord.Member(
                replica: ReplicaID(rawValue: UInt64($0)), incarnation: Incarnation(rawValue: 1))
        }
        let volume = VolumeID(high: 1, low: 1)
        let core = EngineCore(
            configuration: EngineConfiguration(
                volume: volume, instance: InstanceID(rawValue: 1), endpoint: "",
                clientGeneration: 1, nonceSeed: 1), pool: pool)
        let record = VolumeRecord(
            volume: volume, name: "v", epoch: Epoch(1), nonce: 1, size: 4 << 20, inSync: members)
        core.step(.configure(members.map(\.replica)), now: .zero)
        core.step(.start, now: .zero)
        core.step(.store(.record(record)), now: .zero)
        for (slot, member) in members.enumerated() {
            core.step(.connected(slot), now: .zero)
            let hello = HelloReply(
                member: member, instance: InstanceID(rawValue: 2), promise: .zero, size: 4 << 20,
                installed: nil)
            answer(core, slot, .hello, .zero, hello.encoded())
        }
        core.step(.store(.record(core.proposedRecord)), now: .zero)
        for slot in members.indices {
            let install = InstallReply(
                instance: InstanceID(rawValue: 2), isRebooted: false, flushed: .zero,
                leaseRemainingMilliseconds: 0, activeRegions: [])
            answer(core, slot, .install, Epoch(2), install.encoded())
        }
        return core
    }

    private func answer(
        _ core: EngineCore, _ slot: Int, _ kind: FrameKind, _ epoch: Epoch, _ payload: [UInt8]
    ) {
        var reply = FrameHeader(kind: kind)
        reply.flags = FrameFlags.reply
        reply.epoch = epoch
        let block = MemoryBlock(count: payload.count)
        block.memory.copy(from: payload)
        core.step(
            .frame(slot, reply, table: block.memory, data: block.memory.slice(0, 0)), now: .zero)
    }

    @Test func aStepAllocatesNothing() {
        guard haptera_counts_allocations() != 0 else { return }
        let entries = MemoryBlock(count: 4096)
        let core = start(entries.memory)
        #expect(core.phase == .serving)
        var completed = 0
        settle(core, entries.memory, &completed)
        let kinds = FixedArray(repeating: OperationKind.write, count: 6)
        kinds[0] = .read
        kinds[3] = .trim
        kinds[4] = .flush
        kinds[5] = .writeZeroes
        func round() {
            for index in 0..<32 {
                let kind = kinds[index % 6]
                let hasBuffer = kind == .read || kind == .write
                // Every other write covers part of a block: read, merge, write.
                let length = index % 4 == 1 ? 512 : 4096
                let operation = Operation(
                    kind: kind, flags: index % 8 == 1 ? OperationFlags.fua : OperationFlags(),
                    offset: UInt64(index * 8192), length: kind == .write ? length : 4096,
                    buffer: hasBuffer ? pool.allocate(4096) ?? .none : .none, userData: 1)
                core.step(.submit(operation), now: .zero)
            }
            settle(core, entries.memory, &completed)
        }
        for _ in 0..<10 { round() }
        completed = 0
        let before = haptera_thread_allocations()
        for _ in 0..<200 { round() }
        let after = haptera_thread_allocations()
        #expect(completed == 200 * 32)
        #expect(after == before, "\(after - before) allocations in \(completed) operations")
        withExtendedLifetime(entries) {}
    }
}
