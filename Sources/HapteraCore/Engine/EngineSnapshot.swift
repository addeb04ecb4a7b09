// Snapshots: the head is frozen by a change of the record and the Install that follows it.

extension EngineCore {
    func takeSnapshot(_ token: UInt64, name: String, created: UInt64) {
        actions.append(.snapshotTaken(token: token, .head, .notServing))
    }
}
