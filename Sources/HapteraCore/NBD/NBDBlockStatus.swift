/// Turns the extents a device reports (`FrameKind.status`: 16 bytes each, little-endian) into the
/// reply to BLOCK_STATUS.
///
///     chunk 5     4 context 4 | per extent: length 4, flags 4
///     chunk 6     4 context 4 | count 4 | per extent: length 8, flags 8
package struct NBDBlockStatus {
    package static let extentSize = 16
    /// Extents in one table of 4 KiB.
    package static let extentsMax = 4096 / extentSize
    /// A header, and the longest list.
    package static let replySizeMax = NBDReply.headerSizeMax + 8 + extentsMax * 16

    /// The client's range, bytes. The first extent starts at `tableOffset`, at or before `offset`.
    package let offset: UInt64
    package let length: UInt64
    package let tableOffset: UInt64
    package let isOne: Bool
    package let context: NBDContext
    /// Of the context, in this session.
    package let contextID: UInt32

    package init(
        offset: UInt64, length: UInt64, tableOffset: UInt64, isOne: Bool,
        context: NBDContext = .allocation, contextID: UInt32 = 1
    ) {
        precondition(length > 0 && tableOffset <= offset)
        self.offset = offset
        self.length = length
        self.tableOffset = tableOffset
        self.isOne = isOne
        self.context = context
        self.contextID = contextID
    }

    /// Writes the context's chunk of the reply; `memory` holds at least `replySizeMax` bytes.
    /// Extents are clipped to the client's range, equal neighbours joined. If the table says
    /// nothing of the range, or nonsense, the range is reported as data, or as changed, which is
    /// always true.
    package func encode(
        table: RawMemory, reply: NBDReply, isLast: Bool = true, to memory: RawMemory
    ) -> Int {
        let isExtended = reply.format == .extended
        // The header has a fixed size: the list is written behind it first.
        let listStart = isExtended ? 32 + 8 : 20 + 4
        let width = isExtended ? 16 : 8
        var count = 0
        func put(_ length: UInt64, _ flags: UInt32) {
            let at = listStart + count * width
            if isExtended {
                memory.storeBigEndian(length, at)
                memory.storeBigEndian(UInt64(flags), at + 8)
            } else {
                memory.storeBigEndian(UInt32(clamping: length), at)
                memory.storeBigEndian(flags, at + 4)
            }
            count += 1
        }

        var open: (length: UInt64, flags: UInt32)?
        visit(table) { length, flags in
            if let current = open, current.flags == flags {
                open = (current.length + length, flags)
                return true
            }
            if let current = open {
                if isOne { return false }
                put(current.length, current.flags)
            }
            open = (length, flags)
            return true
        }
        if let current = open { put(current.length, current.flags) }
        if count == 0 { put(length, context.safeFlags) }
        let payload = listStart - (isExtended ? 32 : 20) + count * width
        let type = isExtended ? NBDChunk.blockStatusExtended : NBDChunk.blockStatus
        let start = reply.chunk(type, isLast, payload: payload, to: memory)
        memory.storeBigEndian(contextID, start)
        if isExtended { memory.storeBigEndian(UInt32(count), start + 4) }
        return start + payload
    }

    /// Calls `body` with the part of each extent that lies in the client's range, in order, until
    /// it returns false.
    private func visit(_ table: RawMemory, _ body: (UInt64, UInt32) -> Bool) {
        var position = tableOffset
        let end = offset + length
        for index in 0..<min(table.count / Self.extentSize, Self.extentsMax) {
            let extentLength = table.load(UInt64.self, index * Self.extentSize)
            let raw = table.load(UInt32.self, index * Self.extentSize + 8)
            let (extentEnd, overflow) = position.addingReportingOverflow(extentLength)
            guard let state = BlockState(rawValue: UInt8(clamping: raw)), !overflow,
                extentLength > 0
            else { return }
            let from = max(position, offset)
            let to = min(extentEnd, end)
            if from < to, !body(to - from, context.flags(state)) { return }
            position = extentEnd
            if position >= end { return }
        }
    }
}
