extension StopReason {
    /// What an operator does about it; beside the reason in the engine's last words, and in the
    /// volume's.
    package func advice(volume: String) -> String {
        switch self {
        case .detached, .left: "none is needed"
        case .fenced: "none is needed: the other engine serves the volume"
        case .recordOlderThanReplica:
            "bring the newest metadata store back, or see 'storagectl store reconstruct --volume "
                + "\(volume)'"
        case .volumeNotFound:
            "is it the right --store? If the volume was not deleted, see 'storagectl store "
                + "reconstruct --volume \(volume)'"
        case .sizeMismatch:
            "a replica is larger than the volume's record says: 'storagectl replica list "
                + "\(volume)' and 'haptera-replica inspect --dir' tell which; see 'storagectl "
                + "volume why \(volume)'"
        case .refused: "the next engine takes over by what the record says then"
        }
    }
}
