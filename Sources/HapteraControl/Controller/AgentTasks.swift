import HapteraAPI

/// Questions to node agents and what they answered. An agent watches for its tasks, and answers
/// each with a request of its own: nothing ever connects to a node.
package actor AgentTasks {
    /// Tasks of one node that wait for an answer.
    package static let pendingMax = 64

    private struct Pending {
        var node: String
        var nodeID: String
        /// Of the error if no answer comes.
        var doubt: ControlError.Code
        var continuation: CheckedContinuation<Haptera_V1_AgentAnswer, any Error>
    }
    private struct Watch {
        var id: UInt64
        var nodeID: String
        var stream: AsyncStream<Haptera_V1_AgentTask>.Continuation
    }
    private var watches: [String: Watch] = [:]
    private var pending: [UInt64: Pending] = [:]
    private var nextID: UInt64 = 1

    package init() {}

    /// The tasks of a node from now on. A later watch of the same node ends this one: its agent
    /// has started anew, and what was asked of the old one will not be answered.
    package func watch(_ node: String, nodeID: String) -> AsyncStream<Haptera_V1_AgentTask> {
        watches[node]?.stream.finish()
        fail(node, "its agent has started anew")
        let (stream, continuation) = AsyncStream.makeStream(
            of: Haptera_V1_AgentTask.self, bufferingPolicy: .bufferingNewest(Self.pendingMax))
        let id = nextID
        nextID += 1
        watches[node] = Watch(id: id, nodeID: nodeID, stream: continuation)
        continuation.onTermination = { [weak self] _ in
            Task { await self?.ended(node, id) }
        }
        return stream
    }

    private func ended(_ node: String, _ id: UInt64) {
        guard watches[node]?.id == id else { return }
        watches[node] = nil
        fail(node, "its agent is not connected any more")
    }

    private func fail(_ node: String, _ reason: String) {
        for (id, task) in pending where task.node == node {
            pending[id] = nil
            task.continuation.resume(throwing: Self.unanswered(node, reason, task.doubt))
        }
    }

    /// Throws if a task would not reach the node now.
    package func requireConnected(_ node: String) throws {
        _ = try connected(node)
    }

    private func connected(_ node: String) throws -> Watch {
        guard let watch = watches[node] else {
            throw Self.unanswered(node, "its agent is not connected")
        }
        return watch
    }

    /// Asks a node and waits for its answer. Throws if it gives none in time, or says that it
    /// failed. `doubt`: the code if the task was sent and may have been done.
    package func ask(
        _ node: String, timeout: Duration = .seconds(20),
        doubt: ControlError.Code = .unavailable,
        _ fill: (inout Haptera_V1_AgentTask) -> Void
    ) async throws -> Haptera_V1_AgentAnswer {
        let watch = try connected(node)
        guard pending.count(where: { $0.value.node == node }) < Self.pendingMax else {
            throw Self.unanswered(node, "its agent has too much to do")
        }
        var task = Haptera_V1_AgentTask()
        task.id = nextID
        nextID += 1
        fill(&task)
        let id = task.id
        let limit = Task {
            try await Task.sleep(for: timeout)
            expire(id)
        }
        defer { limit.cancel() }
        let request = task
        let answer = try await withCheckedThrowingContinuation { continuation in
            pending[id] = Pending(
                node: node, nodeID: watch.nodeID, doubt: doubt, continuation: continuation)
            watch.stream.yield(request)
        }
        guard answer.error.isEmpty else {
            throw ControlError(
                answer.inDoubt ? doubt : .precondition, "node \(node): \(answer.error)")
        }
        return answer
    }

    private func expire(_ id: UInt64) {
        guard let task = pending.removeValue(forKey: id) else { return }
        task.continuation.resume(
            throwing: Self.unanswered(task.node, "it did not answer in time", task.doubt))
    }

    /// An answer nobody waits for any more is dropped, and so is that of another node.
    package func answered(_ answer: Haptera_V1_AgentAnswer) {
        guard let task = pending[answer.taskID], task.node == answer.name,
            task.nodeID == answer.nodeID
        else { return }
        pending[answer.taskID] = nil
        task.continuation.resume(returning: answer)
    }

    /// Ends every watch: the server stops.
    package func finish() {
        for (node, watch) in watches {
            watch.stream.finish()
            fail(node, "the controller stops")
        }
        watches = [:]
    }

    private static func unanswered(
        _ node: String, _ reason: String, _ code: ControlError.Code = .unavailable
    ) -> ControlError {
        ControlError(code, "node \(node) cannot be asked: \(reason)")
    }
}
