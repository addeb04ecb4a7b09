import HapteraAPI
import HapteraCore
import HapteraHost

/// Growing a volume. Only an engine does it: its change of the record is the moment the volume has
/// the new size, and the store's row follows in the same transaction.
extension Controller {
    package func resizeVolume(
        _ request: Haptera_V1_ResizeVolumeRequest
    ) async throws -> Haptera_V1_Volume {
        guard VolumeSize.isValid(request.sizeBytes) else {
            throw ControlError(
                .invalid, "a volume's size is \(VolumeSize.rule), not \(request.sizeBytes)")
        }
        // Also before an engine is begun, which would be in vain.
        try await requireKnownSpaces(request.name)
        try await store.requireRoomToGrow(request.name, to: request.sizeBytes, spaces: spaces)
        try await withEngine(
            of: request.name, for: "it is growing", timeout: request.timeoutMilliseconds,
            isNeeded: { try Self.isToGrow($0, to: request.sizeBytes) }
        ) { use in
            if let node = use.node { try await grow(request, use, on: node) }
        }
        return view(try await store.volume(named: request.name))
    }

    /// False: it is that large, and nobody needs to be asked.
    private static func isToGrow(_ stored: StoredVolume, to size: UInt64) throws -> Bool {
        let (name, now) = (stored.volume.name, UInt64(stored.volume.sizeBytes))
        guard size >= now else {
            throw Self.refused(
                "volume '\(name)' has \(VolumeSize.text(now)) and never shrinks: what is beyond "
                    + "\(VolumeSize.text(size)) would be lost; copy what you need to a smaller one")
        }
        return size > now || !stored.wasLeftInOrder
    }

    private func grow(
        _ request: Haptera_V1_ResizeVolumeRequest, _ use: EngineUse, on node: String
    ) async throws {
        let (stored, timeout) = (use.stored, use.timeout)
        try await tasks.requireConnected(node)
        try await store.addEvent(
            "ResizeRequested", "volume/\(request.name)",
            "\(VolumeSize.text(UInt64(stored.volume.sizeBytes))) to "
                + VolumeSize.text(request.sizeBytes), by: Caller.current)
        // Promised before the engine may do it. If we end in between, it counts until that engine
        // has left, or the same is asked for again.
        try await store.beginGrowth(request.name, to: request.sizeBytes, spaces: spaces)
        changes.notify()
        do {
            _ = try await tasks.ask(node, timeout: Self.patience(timeout), doubt: .inDoubt) {
                $0.growVolume.volumeID = stored.volume.id
                $0.growVolume.clientGeneration = UInt64(stored.volume.clientGeneration)
                $0.growVolume.sizeBytes = request.sizeBytes
                $0.growVolume.timeoutMilliseconds = timeout
            }
        } catch let error as ControlError where error.code == .inDoubt {
            throw await doubtIfGrown(request, error.message)
        } catch let error as ControlError {
            try await store.endGrowth(stored.volume.id, to: request.sizeBytes)
            changes.notify()
            throw error
        }
        try await store.endGrowth(stored.volume.id, to: request.sizeBytes)
        changes.notify()
    }

    private func doubtIfGrown(
        _ request: Haptera_V1_ResizeVolumeRequest, _ reason: String
    ) async -> ControlError {
        var words = "it is not known whether volume '\(request.name)' has grown: \(reason)"
        if let stored = try? await store.volume(named: request.name) {
            let trouble = self.trouble(stored)
            if !trouble.isEmpty { words += " (\(trouble))" }
            let size = VolumeSize.text(UInt64(stored.volume.sizeBytes))
            words += "; by its record it has \(size)"
        }
        return ControlError(.inDoubt, words)
    }
}
