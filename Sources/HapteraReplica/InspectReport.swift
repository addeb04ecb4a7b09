import HapteraCore

/// What `inspect` shows of a copy, beside the process that serves it too. Then it is a view of the
/// last moments: what was active or stable may be a little behind.
package struct InspectReport {
    private var fields: [(key: String, value: JSONValue)] = []
    /// Epochs told apart in `births`; what is older is counted together.
    package static let epochsMax = 256

    package init(directory: String) throws(StorageError) {
        do throws(StorageError) {
            try take(
                DirectoryStorage(directory: directory, mode: .inspect(waitMilliseconds: 200)),
                isInUse: false)
        } catch {
            guard error.code == .inUse else { throw error }
            try takeLive(directory)
        }
    }

    /// A page that is being drained while the log is read looks damaged: then it looks again.
    private mutating func takeLive(_ directory: String) throws(StorageError) {
        for attempt in 1... {
            do throws(StorageError) {
                return try take(
                    DirectoryStorage(directory: directory, mode: .peek), isInUse: true)
            } catch {
                guard error.code == .damaged, attempt < 10 else { throw error }
                fields = []
            }
        }
    }

    private mutating func take(_ storage: DirectoryStorage, isInUse: Bool) throws(StorageError) {
        let boot = storage.bootOfNext()
        // Of a log that is written to meanwhile a record may be seen before the one ahead of it.
        let reader = try ReplicaReader(opening: storage, boot: isInUse ? .none : boot)
        take(reader.manifest, boot)
        // A process that met damage has left it; others may refuse to serve the copy.
        if let mark = storage.damageMark(of: reader.manifest.identity.member) {
            fields.append(("damaged", .text(mark.reason)))
        }
        fields.append(("inUse", .flag(isInUse)))
        take(reader)
        try takeBirths(reader)
        fields.append(("allocatedBytes", .number(storage.allocatedBytes().values.reduce(0, +))))
    }

    private mutating func take(_ manifest: Manifest, _ boot: BootID) {
        fields += [
            ("format", .number(UInt64(Manifest.formatVersion))),
            ("volume", .text(manifest.identity.volume.text)),
            ("name", .text(manifest.identity.name)),
            ("replica", .text(manifest.identity.replica.text)),
            ("incarnation", .text(hexadecimal(manifest.identity.incarnation.rawValue))),
            ("sizeBytes", .number(manifest.size)),
            ("promise", .number(manifest.promise.rawValue)),
            ("promisedEngine", .text(hexadecimal(manifest.promisedEngine.rawValue))),
            ("clean", .flag(manifest.isClean)),
            (
                "settledBoot",
                .text(
                    hexadecimal(manifest.settledBoot.high) + hexadecimal(manifest.settledBoot.low))
            ),
            ("isRebooted", .flag(!manifest.isClean && manifest.settledBoot != boot)),
            (
                "layers",
                .list(manifest.layers.map { .number(UInt64(manifest.name(of: $0).rawValue)) })
            ),
            ("manifestVersion", .number(manifest.counter)),
            ("record", .text(hexadecimal(manifest.installed?.encoded() ?? []))),
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
            ("activeRegions", .number(UInt64(reader.activeRegions.count))),
            ("logCapacity", .number(log.capacity)),
            ("logTail", .number(log.durableTail)),
            ("logNext", .number(log.nextIndex)),
            ("flushedEpoch", .number(log.flushed.epoch.rawValue)),
            ("flushedSequence", .number(log.flushed.sequence.rawValue)),
            ("stableEpoch", .number(log.stable.epoch.rawValue)),
            ("stableSequence", .number(log.stable.sequence.rawValue)),
        ]
    }

    /// Regions by the epoch of their last write, newest first.
    private mutating func takeBirths(_ reader: ReplicaReader) throws(StorageError) {
        let births = try reader.births().sorted { $0.key > $1.key }
        let newest = births.prefix(Self.epochsMax).map { epoch, regions in
            JSONValue.object([("epoch", .number(epoch.rawValue)), ("regions", .number(regions))])
        }
        let older = births.dropFirst(Self.epochsMax).reduce(0) { $0 + $1.value }
        fields += [("births", .list(newest)), ("olderRegions", .number(older))]
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
