import HapteraCore

/// What the reactor remembers of an operation until it completes.
struct OperationSlot: BitwiseCopyable {
    enum State: UInt8, BitwiseCopyable { case free, socket, file }
    var state = State.free
    /// File operations: the kind, for the fault seam.
    var kind = FileOperation.Kind.read
    /// Counts the slot's uses: a stale name is noticed.
    var generation: UInt32 = 0
    var nextFree: Int32 = -1
    var handler = HandlerID.none
    var token: UInt64 = 0
    /// What a test decided about this operation.
    var fault = FaultEffect.none
}

/// Names an operation in flight: index (32 bits), generation (31 bits). It is the kernel's
/// `user_data`; all ones is never one of ours.
struct OperationID: BitwiseCopyable, Equatable {
    var rawValue: UInt64
    static let none = OperationID(rawValue: .max)
    var index: Int { Int(rawValue & 0xffff_ffff) }
}

/// The operations in flight, in one fixed array with a free list threaded through it.
final class OperationSlab {
    private let slots: FixedArray<OperationSlot>
    private var firstFree: Int32 = 0
    private(set) var inUse = 0

    init(capacity: Int) {
        slots = FixedArray(repeating: OperationSlot(), count: capacity)
        for index in 0..<capacity {
            slots[index].nextFree = index + 1 < capacity ? Int32(index + 1) : -1
        }
    }

    func allocate(_ slot: OperationSlot) -> OperationID {
        // Every user of the reactor has its own limit; together they fit.
        precondition(firstFree >= 0, "more operations in flight than the reactor was made for")
        let index = Int(firstFree)
        firstFree = slots[index].nextFree
        let generation = (slots[index].generation &+ 1) & 0x7fff_ffff
        slots[index] = slot
        slots[index].generation = generation
        inUse += 1
        return OperationID(rawValue: UInt64(generation) << 32 | UInt64(index))
    }

    /// The slot of an operation in flight.
    func slot(_ id: OperationID) -> OperationSlot {
        let slot = slots[id.index]
        precondition(
            slot.state != .free && UInt64(slot.generation) == id.rawValue >> 32,
            "completion of an operation that is not in flight")
        return slot
    }

    func setFault(_ id: OperationID, _ fault: FaultEffect) { slots[id.index].fault = fault }

    func free(_ id: OperationID) {
        slots[id.index].state = .free
        slots[id.index].nextFree = firstFree
        firstFree = Int32(id.index)
        inUse -= 1
    }
}
