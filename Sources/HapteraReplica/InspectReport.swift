import HapteraCore

/// What `inspect` shows: the manifest, and the log and files if nobody serves the directory.
package struct InspectReport {
    private var fields: [(key: String, value: JSONValue)] = []

    package init(directory: String) throws(StorageError) {
        do throws(StorageError) {
            let storage = DirectoryStorage(
                directory: directory, mode: .inspect(waitMilliseconds: 200))
            let reader = try ReplicaReader(opening: storage)
            take(reader.manifest)
            fields.append(("inUse", .flag(false)))
            take(reader)
            fields.append(("allocatedBytes", .number(storage.allocatedBytes())))
        } catch {
            guard error.code == .inUse else { throw error }
            let storage = DirectoryStorage(directory: directory, mode: .peek)
            guard case .manifest(let manifest) = try ReplicaCore.loadManifest(storage) else {
                throw StorageError(.damaged, "\(directory)/manifest: neither slot is valid")
            }
            take(manifest)
            fields.append(("inUse", .flag(true)))
        }
    }

    private mutating func take(_ manifest: Manifest) {
        fields += [
            ("format", .number(UInt64(Manifest.formatVersion))),
            ("volume", .text(manifest.identity.volume.text)),
            ("name", .text(manifest.identity.name)),
            ("replica", .text(manifest.identity.replica.text)),
            ("incarnation", .text(hexadecimal(manifest.identity.incarnation.rawValue))),
            ("sizeBytes", .number(manifest.identity.size)),
            ("promise", .number(manifest.promise.rawValue)),
            ("promisedEngine", .text(hexadecimal(manifest.promisedEngine.rawValue))),
            ("clean", .flag(manifest.isClean)),
            ("layers", .list(manifest.layers.map { .number(UInt64($0.rawValue)) })),
            ("manifestVersion", .number(manifest.counter)),
        ]
        guard let record = manifest.installed else { return }
        fields += [
            ("recordEpoch", .number(record.epoch.rawValue)),
            ("recordInSync", .list(record.inSync.map { .text($0.replica.text) })),
        ]
    }

    private mutating func take(_ reader: ReplicaReader) {
        let log = reader.log
        let allocated = (0..<reader.regionCount).count { reader.mayHold($0) }
        fields += [
            ("regions", .number(reader.regionCount)),
            ("regionsWritten", .number(UInt64(allocated))),
            ("activeRegions", .list(reader.activeRegions.map { .number($0) })),
            ("logCapacity", .number(log.capacity)),
            ("logTail", .number(log.durableTail)),
            ("logNext", .number(log.nextIndex)),
            ("flushedEpoch", .number(log.flushed.epoch.rawValue)),
            ("flushedSequence", .number(log.flushed.sequence.rawValue)),
        ]
    }

    /// One line per field.
    package var text: String {
        fields.map { "\($0.key): \($0.value.plain)\n" }.joined()
    }
    package var json: String { JSONValue.object(fields).encoded + "\n" }
}

/// As much JSON as the tools write.
package enum JSONValue {
    case number(UInt64)
    case flag(Bool)
    case text(String)
    case list([JSONValue])
    case object([(key: String, value: JSONValue)])

    package var encoded: String {
        switch self {
        case .number(let value): String(value)
        case .flag(let value): value ? "true" : "false"
        case .text(let value): Self.quoted(value)
        case .list(let values): "[" + values.map(\.encoded).joined(separator: ",") + "]"
        case .object(let fields):
            "{"
                + fields.map { Self.quoted($0.key) + ":" + $0.value.encoded }
                .joined(separator: ",") + "}"
        }
    }
    package var plain: String {
        switch self {
        case .text(let value): value
        case .list(let values): values.map(\.plain).joined(separator: " ")
        default: encoded
        }
    }
    private static func quoted(_ text: String) -> String {
        var result = "\""
        for scalar in text.unicodeScalars {
            switch scalar {
            case "\"": result += "\\\""
            case "\\": result += "\\\\"
            case _ where scalar.value < 0x20:
                let digits = String(scalar.value, radix: 16)
                result += "\\u" + String(repeating: "0", count: 4 - digits.count) + digits
            default: result.unicodeScalars.append(scalar)
            }
        }
        return result + "\""
    }
}
