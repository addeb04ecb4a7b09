/// What every program answers to `--version`, and what nodes report.
package enum HapteraVersion {
    package static let text = "0.1.0"
    /// The gRPC API's version, `haptera.v1`.
    package static let api: UInt32 = 1
}

/// A failure to be shown to a person: what happened where, and what to do next.
package struct HostError: Error, CustomStringConvertible, Equatable, Sendable {
    package var description: String
    package init(_ description: String) { self.description = description }
}
