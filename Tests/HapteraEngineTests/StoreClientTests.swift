import Testing

@testable import HapteraCore
@testable import HapteraEngine
@testable import HapteraIO

@Suite struct StoreClientTests {
    /// Answers what it is asked as it is told to.
    private final class Service: FrameDelegate {
        var answer = (status: FrameStatus.ok, table: [UInt8]())
        func received(
            _ connection: FrameConnection, _ header: FrameHeader, table: RawMemory,
            buffer: BufferID, offset: Int
        ) {
            let block = MemoryBlock(count: max(answer.table.count, 1))
            block.memory.copy(from: answer.table)
            var reply = header.reply(answer.status, epoch: header.epoch)
            reply.tableLength = UInt32(answer.table.count)
            connection.send(reply, table: block.memory.slice(0, answer.table.count))
        }
        func frameConnectionClosed(_ connection: FrameConnection, reason: CloseReason) {}
    }

    /// "Invalid" was taken for no answer at all, and the change for one in doubt, for ever.
    @Test func aRefusalIsAnAnswer() throws {
        let reactor = try Reactor()
        let service = Service()
        let listener = try Listener(
            reactor: reactor, address: .tcp(host: "127.0.0.1", port: 0)
        ) { _ = FrameConnection(reactor: reactor, fd: $0, delegate: service) }
        let volume = VolumeID(high: 1, low: 2)
        let client = StoreClient(
            reactor: reactor, addresses: [listener.address], volume: volume)
        var outcomes: [StoreOutcome] = []
        client.onAnswer = { outcomes.append($0) }
        let record = VolumeRecord(
            volume: volume, name: "vol", epoch: Epoch(2), nonce: 1, size: 1 << 30, inSync: [])
        func outcome(_ status: FrameStatus, _ table: [UInt8] = []) -> StoreOutcome? {
            service.answer = (status, table)
            client.compareAndSwap(expected: Epoch(1), record)
            let before = outcomes.count
            reactor.run { outcomes.count > before }
            return outcomes.last
        }
        func refusal(_ outcome: StoreOutcome?) -> String? {
            if case .refused(let reason) = outcome { reason } else { nil }
        }
        let text = "the record names an unknown replica"
        #expect(refusal(outcome(.invalid, Array(text.utf8))) == text)
        #expect(refusal(outcome(.invalid)) == "no reason given")
        guard case .unavailable = outcome(.unavailable) else {
            Issue.record("a store that cannot tell leaves it in doubt")
            return
        }
        guard case .record(record) = outcome(.ok) else {
            Issue.record("what was swapped in stands")
            return
        }
        listener.close()
    }
}
