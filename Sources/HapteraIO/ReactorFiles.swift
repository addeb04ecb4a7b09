import CHaptera
import Glibc
import HapteraCore

/// A file the reactor does I/O on.
struct FileEntry {
    var descriptor: Int32
    var label: String
    var fixedSlot: Int32
    var isRegistered: Bool
}

/// File I/O. Memory handed in must stay untouched until the completion.
extension Reactor {
    /// Makes a file known. `label` names it to the fault seam ("data", "table", "log", ...). The
    /// descriptor stays the caller's, who keeps it open until `unregister`.
    package func register(file descriptor: Int32, label: String) -> FileID {
        let entry = FileEntry(
            descriptor: descriptor, label: label, fixedSlot: driver.register(file: descriptor),
            isRegistered: true)
        if let free = files.firstIndex(where: { !$0.isRegistered }) {
            files[free] = entry
            return FileID(index: Int32(free))
        }
        files.append(entry)
        return FileID(index: Int32(files.count - 1))
    }
    /// No operation on the file may be in flight.
    package func unregister(_ file: FileID) {
        driver.unregister(fileSlot: files[Int(file.index)].fixedSlot)
        files[Int(file.index)].isRegistered = false
    }

    /// Reads into all of `memory`; short at the end of the file. O_DIRECT files need 512-byte
    /// (here: always 4 KiB) alignment of memory, offset and length.
    package func read(
        _ file: FileID, into memory: RawMemory, offset: UInt64, handler: HandlerID, token: UInt64
    ) {
        submit(.read, file, memory, offset, UInt64(memory.count), 0, handler, token)
    }
    /// Writes all of `memory`; a short write is reported as such.
    package func write(
        _ file: FileID, from memory: RawMemory, offset: UInt64, handler: HandlerID, token: UInt64
    ) {
        submit(.write, file, memory, offset, UInt64(memory.count), 0, handler, token)
    }
    /// fdatasync: covers writes that completed before this call.
    package func sync(_ file: FileID, handler: HandlerID, token: UInt64) {
        submit(.sync, file, nil, 0, 0, 0, handler, token)
    }
    /// Gives the range's space back; it reads zero afterwards. The file's size stays.
    package func punch(
        _ file: FileID, offset: UInt64, length: UInt64, handler: HandlerID, token: UInt64
    ) {
        // FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
        submit(.punch, file, nil, offset, length, 0x01 | 0x02, handler, token)
    }
    /// The range reads zero afterwards and keeps (or gets) its space.
    package func zero(
        _ file: FileID, offset: UInt64, length: UInt64, handler: HandlerID, token: UInt64
    ) {
        // FALLOC_FL_KEEP_SIZE | FALLOC_FL_ZERO_RANGE
        submit(.punch, file, nil, offset, length, 0x01 | 0x10, handler, token)
    }

    /// Completions that `FaultEffect.hold` keeps back now.
    package var heldCount: Int { held.count }
    /// Delivers the completions that `FaultEffect.hold` kept back, in the next turn.
    package func releaseHeld() {
        while let completion = held.popFirst() { ended.append(completion) }
    }

    private func submit(
        _ kind: FileOperation.Kind, _ file: FileID, _ memory: RawMemory?, _ offset: UInt64,
        _ length: UInt64, _ mode: UInt32, _ handler: HandlerID, _ token: UInt64
    ) {
        precondition(files[Int(file.index)].isRegistered)
        let id = slab.allocate(
            OperationSlot(state: .file, kind: kind, handler: handler, token: token))
        var length = length
        if let completionFault {
            let operation = FileOperation(
                kind: kind, file: file, offset: offset, length: Int(length))
            let effect = completionFault.effect(
                of: operation, label: files[Int(file.index)].label)
            switch effect {
            case .none: break
            case .fail(let number):
                ended.append(Completion(userData: id.rawValue, result: -Int(number)))
                return
            case .skip:
                let isTransfer = kind == .read || kind == .write
                let result = isTransfer ? Int(length) : 0
                ended.append(Completion(userData: id.rawValue, result: result))
                return
            case .short(let count):
                precondition(kind == .read || kind == .write, "only transfers can be short")
                length = min(length, UInt64(max(count, 0)) & ~511)
                if length == 0 {
                    ended.append(Completion(userData: id.rawValue, result: 0))
                    return
                }
            case .failAfter, .delay, .hold: slab.setFault(id, effect)
            }
        }
        var operation = haptera_operation()
        switch kind {
        case .read: operation.kind = HAPTERA_READ.rawValue
        case .write: operation.kind = HAPTERA_WRITE.rawValue
        case .sync: operation.kind = HAPTERA_SYNC.rawValue
        case .punch: operation.kind = HAPTERA_FALLOCATE.rawValue
        }
        operation.fd = files[Int(file.index)].descriptor
        operation.file_index = files[Int(file.index)].fixedSlot
        operation.buffer_index = -1
        if let memory {
            // SAFETY: `memory` stays valid until the completion by this extension's contract.
            operation.address = unsafe UInt(bitPattern: memory.base)
            operation.buffer_index = driver.bufferIndex(memory)
        }
        operation.offset = offset
        operation.length = length
        operation.mode = mode
        operation.user_data = id.rawValue
        driver.prepare(&operation)
    }

    /// Carries out what was decided for a completion. False: it is not to be delivered yet.
    func apply(_ effect: FaultEffect, to completion: Completion) -> Bool {
        switch effect {
        case .none, .fail, .skip, .short, .failAfter: return true
        case .hold:
            held.append(completion)
            return false
        case .delay(let milliseconds):
            let late = LateCompletion(self, completion)
            late.id = register(late)
            timer(afterMilliseconds: milliseconds, handler: late.id, token: 0)
            return false
        }
    }
}

/// A completion kept back by a fault until a timer fires.
private final class LateCompletion: CompletionHandler {
    private unowned let reactor: Reactor
    private let completion: Completion
    var id = HandlerID.none
    init(_ reactor: Reactor, _ completion: Completion) {
        self.reactor = reactor
        self.completion = completion
    }
    func completed(token: UInt64, result: Int) {
        reactor.unregister(id)
        reactor.deliver(completion)
    }
}
