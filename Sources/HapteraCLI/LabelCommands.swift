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

extension VolumeCommand {
    package struct SetLabels: AsyncParsableCommand {
        package static let configuration = CommandConfiguration(
            commandName: "label", abstract: "Set and remove labels of a volume; others stay.",
            discussion: "KEY is \(Labels.keyRule). VALUE is \(Labels.valueRule).")

        @Argument(help: "The volume's name.", transform: Label.init(typed:))
        package var name: Label

        @Argument(
            help: "KEY=VALUE sets a label, KEY- removes it.",
            transform: LabelChangeArgument.init(typed:))
        package var changes: [LabelChangeArgument]

        @OptionGroup package var options: GlobalOptions
        package init() {}

        package func validate() throws { _ = try request }

        package var request: Haptera_V1_LabelVolumeRequest {
            get throws {
                var request = Haptera_V1_LabelVolumeRequest()
                request.name = name.text
                var keys: Set<String> = []
                for change in changes.map(\.change) {
                    let key: String
                    switch change {
                    case .set(let name, let value):
                        key = name
                        request.set[key] = value
                    case .remove(let name):
                        key = name
                        request.remove.append(key)
                    }
                    guard keys.insert(key).inserted else {
                        throw ValidationError("label '\(key)' is named twice")
                    }
                }
                return request
            }
        }

        package func run() async throws {
            let wanted = try request
            try await Session.run(options) { session in
                let volume = try await session.change {
                    try await session.volumes.labelVolume(wanted, options: session.callOptions)
                }
                session.say(Presentation.value(volume), quiet: volume.name) { _ in
                    let words = volume.labels.isEmpty ? "none" : Labels.text(volume.labels)
                    return "labels of volume \(volume.name): \(words)"
                }
            }
        }
    }
}

extension Presentation {
    static func value(_ labels: [String: String]) -> OutputValue {
        .object(labels.sorted { $0.key < $1.key }.map { ($0.key, .text($0.value)) })
    }
}
