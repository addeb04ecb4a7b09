import HapteraCore

extension World {
    /// An engine answers a request for a snapshot.
    func snapshotTaken(
        _ engine: SimulatedEngine, _ token: UInt64, _ layer: LayerID, _ result: SnapshotResult
    ) {
        note("\(engine.name): snapshot \(token) of layer \(layer.rawValue): \(result)")
    }
}
