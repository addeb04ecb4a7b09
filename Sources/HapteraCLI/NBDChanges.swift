import Foundation
import HapteraCore
import HapteraHost

/// An export and where it is, out of the URI that the controller gives for it.
package struct NBDPlace: Equatable, Sendable {
    package var address: NBDAddress
    package var export: String

    package init(address: NBDAddress, export: String) {
        self.address = address
        self.export = export
    }
    /// Nil: neither `nbd://HOST:PORT/EXPORT` nor `nbd+unix:///EXPORT?socket=PATH`.
    package init?(uri: String) {
        guard let parts = URLComponents(string: uri), parts.path.hasPrefix("/") else { return nil }
        export = String(parts.path.dropFirst())
        if parts.scheme == "nbd", let host = parts.host, let port = parts.port {
            let bare = host.hasPrefix("[") ? String(host.dropFirst().dropLast()) : host
            address = .tcp(host: bare, port: port)
        } else if parts.scheme == "nbd+unix",
            let path = parts.queryItems?.first(where: { $0.name == "socket" })?.value
        {
            address = .unix(path)
        } else {
            return nil
        }
    }

    /// The engine's socket if it is on this host, or its port.
    package static func reachable(uri: String, unixURI: String) -> NBDPlace? {
        if let local = NBDPlace(uri: unixURI), case .unix(let path) = local.address,
            FileManager.default.isWritableFile(atPath: path)
        {
            return local
        }
        return NBDPlace(uri: uri) ?? NBDPlace(uri: unixURI)
    }
}

/// What has changed, in order: neighbours are one range.
package struct ChangedRanges: Equatable, Sendable {
    package struct Range: Equatable, Sendable {
        package var offset: UInt64
        package var length: UInt64
    }
    package var ranges: [Range] = []
    package var bytes: UInt64 = 0
    package var count = 0
    /// Of the export.
    package var size: UInt64 = 0
    /// Whether the ranges themselves are kept.
    package let lists: Bool

    /// What one command keeps in memory and prints.
    package static let listedMax = 1 << 20
    private var end: UInt64?

    package init(lists: Bool) { self.lists = lists }

    package mutating func add(offset: UInt64, length: UInt64) throws {
        bytes += length
        defer { end = offset + length }
        if end == offset {
            if lists { ranges[ranges.count - 1].length += length }
            return
        }
        count += 1
        guard lists else { return }
        guard count <= Self.listedMax else {
            throw CommandFailure(
                .failed,
                "more than \(Self.listedMax) ranges have changed: --summary counts them, and "
                    + "'nbdinfo --map' lists them")
        }
        ranges.append(Range(offset: offset, length: length))
    }
}

/// A client that asks an export what has changed since a snapshot (docs/nbd.md).
final class NBDChanges {
    /// Asked for at once; the server may answer for less.
    private static let stepMax: UInt64 = 1 << 30
    private let socket: NBDSocket
    private let size: UInt64
    private var cookie: UInt64 = 0

    /// Blocks, as the whole of this does.
    static func since(
        _ snapshot: String, in place: NBDPlace, lists: Bool
    ) throws -> ChangedRanges {
        let client = try NBDChanges(place, context: "haptera:changed:\(snapshot)")
        return try client.read(lists: lists)
    }

    private init(_ place: NBDPlace, context: String) throws {
        socket = try NBDSocket(place.address)
        let greeting = try socket.receive(18)
        guard greeting.prefix(16).elementsEqual("NBDMAGICIHAVEOPT".utf8) else {
            throw HostError("what answers at \(place.address.text) is no NBD server")
        }
        try socket.send(NBDSocket.bytes(UInt32(3)))
        let (socket, export) = (socket, Array(place.export.utf8))
        let name = NBDSocket.bytes(UInt32(export.count)) + export
        _ = try Self.ask(.structuredReply, [], on: socket)
        let query = Array(context.utf8)
        let selected = try Self.ask(
            .setMetaContext,
            name + NBDSocket.bytes(UInt32(1)) + NBDSocket.bytes(UInt32(query.count)) + query,
            on: socket)
        guard selected.contains(where: { $0.type == .metaContext }) else {
            throw CommandFailure(
                .conflict,
                "the engine has no context '\(context)' for export '\(place.export)': the snapshot "
                    + "is gone, or the engine is older than this command")
        }
        let told = try Self.ask(.go, name + NBDSocket.bytes(UInt16(0)), on: socket)
        guard let info = told.first(where: { $0.type == .info })?.data, info.count == 12 else {
            throw HostError("the NBD server does not say how large '\(place.export)' is")
        }
        size = NBDSocket.number(info[2..<10])
    }

    private static func ask(
        _ option: NBDOption, _ data: [UInt8], on socket: NBDSocket
    ) throws -> [(type: NBDOptionReply, data: [UInt8])] {
        try socket.send(
            NBDSocket.bytes(NBDMagic.option) + NBDSocket.bytes(option.rawValue)
                + NBDSocket.bytes(UInt32(data.count)) + data)
        var replies: [(type: NBDOptionReply, data: [UInt8])] = []
        while true {
            let header = try socket.receive(20)
            let length = NBDSocket.number(header[16..<20])
            guard NBDSocket.number(header[0..<8]) == NBDMagic.optionReply, length <= 65536,
                let type = NBDOptionReply(rawValue: UInt32(NBDSocket.number(header[12..<16])))
            else { throw HostError("the NBD server's answer makes no sense") }
            let data = try socket.receive(Int(length))
            if type == .ack { return replies }
            guard type.rawValue < 0x8000_0000 else {
                throw CommandFailure(
                    .conflict, "the engine refuses: \(String(decoding: data, as: UTF8.self))")
            }
            replies.append((type, data))
        }
    }

    private func read(lists: Bool) throws -> ChangedRanges {
        var changed = ChangedRanges(lists: lists)
        changed.size = size
        var position: UInt64 = 0
        while position < size {
            let before = position
            for (length, flags) in try status(position, min(size - position, Self.stepMax)) {
                let part = min(length, size - position)
                if flags & NBDContext.dirty != 0 {
                    try changed.add(offset: position, length: part)
                }
                position += part
            }
            guard position > before else { throw HostError("the NBD server does not get on") }
        }
        return changed
    }

    private func status(
        _ offset: UInt64, _ length: UInt64
    ) throws -> [(length: UInt64, flags: UInt32)] {
        cookie += 1
        try socket.send(
            NBDSocket.bytes(NBDMagic.request) + NBDSocket.bytes(UInt16(0))
                + NBDSocket.bytes(NBDCommand.blockStatus.rawValue) + NBDSocket.bytes(cookie)
                + NBDSocket.bytes(offset) + NBDSocket.bytes(UInt32(length)))
        let header = try socket.receive(20)
        let payload = NBDSocket.number(header[16..<20])
        guard NBDSocket.number(header[0..<4]) == UInt64(NBDMagic.structuredReply), payload <= 65536,
            NBDSocket.number(header[8..<16]) == cookie
        else { throw HostError("the NBD server's reply is out of step") }
        let body = try socket.receive(Int(payload))
        guard NBDSocket.number(header[6..<8]) == UInt64(NBDChunk.blockStatus), body.count >= 12,
            body.count % 8 == 4
        else {
            throw HostError(
                "the engine could not tell what has changed at offset \(offset): try again; if the "
                    + "snapshot was deleted meanwhile, there is nothing to compare with")
        }
        return stride(from: 4, to: body.count, by: 8).map {
            (NBDSocket.number(body[$0..<$0 + 4]), UInt32(NBDSocket.number(body[$0 + 4..<$0 + 8])))
        }
    }
}
