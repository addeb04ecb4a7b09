import ArgumentParser
import HapteraAPI
import HapteraHost

/// `--label KEY=VALUE`, checked where it is typed.
package struct LabelArgument: Equatable, Sendable {
    package var key: String
    package var value: String
    package init(typed: String) throws {
        guard case .set(let key, let value) = try LabelChangeArgument(typed: typed).change else {
            throw ValidationError("'\(typed)' is no label: write KEY=VALUE")
        }
        self.key = key
        self.value = value
    }
}

package struct LabelChangeArgument: Equatable, Sendable {
    package var change: LabelChange
    package init(typed: String) throws {
        do {
            change = try LabelChange(typed)
        } catch {
            throw ValidationError(error.message)
        }
    }
}

package struct SelectorArgument: Equatable, Sendable {
    package var text: String
    package init(typed: String) throws {
        do {
            _ = try LabelSelector(typed)
        } catch {
            throw ValidationError(error.message)
        }
        text = typed
    }
}

/// Labels to give what is created.
package struct LabelOptions: ParsableArguments {
    @Option(
        name: .long, parsing: .singleValue, help: "A label, KEY=VALUE; may be repeated.",
        transform: LabelArgument.init(typed:))
    package var label: [LabelArgument] = []

    package init() {}

    package var map: [String: String] {
        Dictionary(label.map { ($0.key, $0.value) }) { $1 }
    }

    package func validate() throws {
        for label in label where map[label.key] != label.value {
            throw ValidationError("label '\(label.key)' is given twice, with different values")
        }
        if let objection = Labels.objection(to: map) { throw ValidationError(objection) }
    }
}

/// What `label` shall do to an object's labels.
package struct LabelChangeArguments: ParsableArguments {
    @Argument(
        help: "KEY=VALUE sets a label, KEY- removes it.",
        transform: LabelChangeArgument.init(typed:))
    package var changes: [LabelChangeArgument]

    package init() {}

    package var set: [String: String] {
        changes.reduce(into: [:]) { set, word in
            if case .set(let key, let value) = word.change { set[key] = value }
        }
    }
    package var remove: [String] {
        changes.compactMap { word in
            if case .remove(let key) = word.change { key } else { nil }
        }
    }

    package func validate() throws {
        var keys: Set<String> = []
        for word in changes {
            let key =
                switch word.change {
                case .set(let key, _), .remove(let key): key
                }
            guard keys.insert(key).inserted else {
                throw ValidationError("label '\(key)' is named twice")
            }
        }
    }
}

extension VolumeCommand {
    package struct SetLabels: AsyncParsableCommand {
        package static let configuration = CommandConfiguration(
            commandName: "label", abstract: "Set and remove labels of a volume; others stay.",
            discussion: "KEY is \(Labels.keyRule). VALUE is \(Labels.valueRule).")

        @Argument(help: "The volume's name.", transform: Label.init(typed:))
        package var name: Label

        @OptionGroup package var changes: LabelChangeArguments
        @OptionGroup package var options: GlobalOptions
        package init() {}

        package var request: Haptera_V1_LabelVolumeRequest {
            var request = Haptera_V1_LabelVolumeRequest()
            request.name = name.text
            request.set = changes.set
            request.remove = changes.remove
            return request
        }

        package func run() async throws {
            let wanted = request
            try await Session.run(options) { session in
                let volume = try await session.change {
                    try await session.volumes.labelVolume(wanted, options: session.callOptions)
                }
                session.say(Presentation.value(volume), quiet: volume.name) { _ in
                    Presentation.labelled(volume.labels, "volume \(volume.name)")
                }
            }
        }
    }
}

extension SnapshotCommand {
    package struct SetLabels: AsyncParsableCommand {
        package static let configuration = CommandConfiguration(
            commandName: "label", abstract: "Set and remove labels of a snapshot; others stay.",
            discussion: "KEY is \(Labels.keyRule). VALUE is \(Labels.valueRule).")

        @Argument(help: "The volume's name.", transform: Label.init(typed:))
        package var volume: Label

        @Argument(help: "The snapshot's name.", transform: SnapshotArgument.init(typed:))
        package var name: SnapshotArgument

        @OptionGroup package var changes: LabelChangeArguments
        @OptionGroup package var options: GlobalOptions
        package init() {}

        package var request: Haptera_V1_LabelSnapshotRequest {
            var request = Haptera_V1_LabelSnapshotRequest()
            request.volume = volume.text
            request.name = name.text
            request.set = changes.set
            request.remove = changes.remove
            return request
        }

        package func run() async throws {
            let wanted = request
            try await Session.run(options) { session in
                let snapshot = try await session.change {
                    try await session.volumes.labelSnapshot(wanted, options: session.callOptions)
                }
                session.say(Presentation.value(snapshot), quiet: snapshot.name) { _ in
                    Presentation.labelled(
                        snapshot.labels, "snapshot \(snapshot.name) of volume \(snapshot.volume)")
                }
            }
        }
    }
}

extension Presentation {
    /// What `label` says.
    package static func labelled(_ labels: [String: String], _ what: String) -> String {
        "labels of \(what): \(labels.isEmpty ? "none" : Labels.text(labels))"
    }

    static func value(_ labels: [String: String]) -> OutputValue {
        .object(labels.sorted { $0.key < $1.key }.map { ($0.key, .text($0.value)) })
    }
}
