import HapteraAPI
import HapteraHost

/// What has changed, and how to read a snapshot, as the CLI shows them.
extension Presentation {
    package static func value(
        _ changed: ChangedRanges, of volume: String, from: String, to: String?
    ) -> OutputValue {
        let ranges = changed.ranges.map { range in
            OutputValue.object([
                ("offset", .number(range.offset)), ("length", .number(range.length)),
            ])
        }
        return .object([
            ("volume", .text(volume)), ("from", .text(from)), ("to", .optional(to ?? "")),
            ("sizeBytes", .number(changed.size)), ("changedBytes", .number(changed.bytes)),
            ("rangeCount", .number(UInt64(changed.count))),
            ("ranges", changed.lists ? .list(ranges) : .null),
        ])
    }

    package static func text(
        _ changed: ChangedRanges, of volume: String, from: String, to: String?
    ) -> String {
        let total =
            "\(changed.bytes) bytes in \(changed.count) "
            + "\(changed.count == 1 ? "range" : "ranges") of volume \(volume) changed from "
            + "\(from) to \(to ?? "now")"
        guard !changed.ranges.isEmpty else { return total }
        let rows = changed.ranges.map { ["\($0.offset)", "\($0.length)"] }
        return TextTable(["OFFSET", "LENGTH"], rows).text + "\n" + total
    }

    package static func exported(
        _ snapshot: Haptera_V1_Snapshot, file: String, format: String
    ) -> OutputValue {
        .object([
            ("name", .text(snapshot.name)), ("volume", .text(snapshot.volume)),
            ("file", .text(file)), ("format", .text(format)),
        ])
    }

    /// The one that works from here: the socket, if it is on this host.
    package static func bestURI(_ snapshot: Haptera_V1_Snapshot) -> String {
        let place = NBDPlace.reachable(uri: snapshot.uri, unixURI: snapshot.unixUri)
        if case .tcp? = place?.address { return snapshot.uri }
        return snapshot.unixUri.isEmpty ? snapshot.uri : snapshot.unixUri
    }

    /// What to do, and the command that does it.
    private static func commands(
        _ uri: String
    ) -> [(key: String, words: String, line: String)] {
        let uri = "'\(uri)'"
        return [
            ("copy", "copy it to a file", "qemu-img convert -f raw -O raw \(uri) copy.raw"),
            ("fuse", "see it as a file, without root", "nbdfuse DIR \(uri)"),
            // Mounted without a replay of its journal, a file system shows less than was synced.
            (
                "attach",
                "attach it as a block device; what is written, such as the replay of a journal, "
                    + "goes to a temporary file here",
                "qemu-nbd --snapshot --format=raw --connect=/dev/nbd0 \(uri)"
            ),
            ("mountExt4", "then, ext4", "mount -o ro /dev/nbd0 DIR"),
            ("mountXFS", "then, XFS", "mount -o ro,nouuid /dev/nbd0 DIR"),
            ("detach", "and in the end", "umount DIR && qemu-nbd --disconnect /dev/nbd0"),
        ]
    }

    /// `local`: where a command serves it.
    package static func access(
        _ snapshot: Haptera_V1_Snapshot, local: String? = nil
    ) -> OutputValue {
        let places: [(String, OutputValue)] = [
            ("name", .text(snapshot.name)), ("volume", .text(snapshot.volume)),
            ("uri", .optional(snapshot.uri)), ("unixURI", .optional(snapshot.unixUri)),
        ]
        let lines = commands(local ?? bestURI(snapshot)).map { ($0.key, OutputValue.text($0.line)) }
        return .object(
            places + (local.map { [("localURI", .text($0))] } ?? [])
                + [("commands", .object(lines))])
    }

    package static func accessText(
        _ snapshot: Haptera_V1_Snapshot, local: String? = nil
    ) -> String {
        var lines: [String] = []
        if let local { lines.append("local uri: \(local)") }
        if !snapshot.uri.isEmpty { lines.append("uri:       \(snapshot.uri)") }
        if local == nil, !snapshot.unixUri.isEmpty {
            lines.append("unix uri:  \(snapshot.unixUri)")
        }
        for command in commands(local ?? bestURI(snapshot)) {
            lines.append("\(command.words):\n    \(command.line)")
        }
        return lines.joined(separator: "\n")
    }
}
