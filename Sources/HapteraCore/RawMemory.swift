#if canImport(Glibc)
    import Glibc
#else
    import Musl
#endif

/// A bounds-checked view of memory owned by somebody else: the one type through which the data
/// plane touches raw bytes. All integers are little-endian unless the name says otherwise.
///
/// Ownership: a view is valid as long as what it was made from (a pool buffer, a mapping, a
/// `MemoryBlock`); it never frees. Every access traps outside `0..<count`.
@safe @frozen package struct RawMemory: @unchecked Sendable {
    // SAFETY: `base` points to at least `count` bytes for as long as the owner lives; each
    // accessor checks its range against `count` before it touches memory.
    @usableFromInline package let base: UnsafeMutableRawPointer
    package let count: Int

    @inlinable package init(base: UnsafeMutableRawPointer, count: Int) {
        precondition(count >= 0)
        unsafe self.base = base
        self.count = count
    }

    @inlinable package func check(_ offset: Int, _ length: Int) {
        precondition(offset >= 0 && length >= 0 && offset <= count && length <= count - offset)
    }
    @inlinable package func slice(_ offset: Int, _ length: Int) -> RawMemory {
        check(offset, length)
        return unsafe RawMemory(base: base + offset, count: length)
    }
    @inlinable package func load<T: FixedWidthInteger & BitwiseCopyable>(
        _ type: T.Type, _ offset: Int
    ) -> T {
        check(offset, MemoryLayout<T>.size)
        return unsafe T(littleEndian: base.loadUnaligned(fromByteOffset: offset, as: T.self))
    }
    @inlinable package func store<T: FixedWidthInteger & BitwiseCopyable>(_ value: T, _ offset: Int)
    {
        check(offset, MemoryLayout<T>.size)
        unsafe base.storeBytes(of: value.littleEndian, toByteOffset: offset, as: T.self)
    }
    /// Network byte order, for NBD.
    @inlinable package func loadBigEndian<T: FixedWidthInteger & BitwiseCopyable>(
        _ type: T.Type, _ offset: Int
    ) -> T {
        check(offset, MemoryLayout<T>.size)
        return unsafe T(bigEndian: base.loadUnaligned(fromByteOffset: offset, as: T.self))
    }
    @inlinable package func storeBigEndian<T: FixedWidthInteger & BitwiseCopyable>(
        _ value: T, _ offset: Int
    ) {
        check(offset, MemoryLayout<T>.size)
        unsafe base.storeBytes(of: value.bigEndian, toByteOffset: offset, as: T.self)
    }
    @inlinable package subscript(_ offset: Int) -> UInt8 {
        get { load(UInt8.self, offset) }
        nonmutating set { store(newValue, offset) }
    }
    /// Copies `source` to `offset`; the two may overlap.
    @inlinable package func copy(from source: RawMemory, at offset: Int = 0) {
        check(offset, source.count)
        unsafe (base + offset).copyMemory(from: source.base, byteCount: source.count)
    }
    @inlinable package func copy(from bytes: [UInt8], at offset: Int = 0) {
        check(offset, bytes.count)
        unsafe bytes.withUnsafeBytes {
            guard let start = $0.baseAddress else { return }
            unsafe (base + offset).copyMemory(from: start, byteCount: $0.count)
        }
    }
    @inlinable package func fill(_ byte: UInt8 = 0) {
        unsafe base.initializeMemory(as: UInt8.self, repeating: byte, count: count)
    }
    package func bytes() -> [UInt8] {
        unsafe [UInt8](UnsafeRawBufferPointer(start: base, count: count))
    }
    package func equals(_ other: RawMemory) -> Bool {
        guard count == other.count else { return false }
        return unsafe UnsafeRawBufferPointer(start: base, count: count)
            .elementsEqual(UnsafeRawBufferPointer(start: other.base, count: count))
    }
    /// True if every byte is zero.
    package var isZero: Bool {
        var offset = 0
        while offset + 8 <= count {
            if load(UInt64.self, offset) != 0 { return false }
            offset += 8
        }
        while offset < count {
            if self[offset] != 0 { return false }
            offset += 1
        }
        return true
    }
}

/// Zero-filled memory of a fixed size, freed with its owner. 4 KiB aligned, so that O_DIRECT may
/// use it; large blocks cost physical memory only where they are touched.
@safe package final class MemoryBlock: @unchecked Sendable {
    package let memory: RawMemory

    package init(count: Int) {
        precondition(count > 0)
        let rounded = (count + 4095) & ~4095
        // SAFETY: mmap's result is checked; the mapping is private to this object and unmapped in
        // deinit only.
        let mapping = unsafe mmap(
            nil, rounded, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        guard let mapping = unsafe mapping, unsafe mapping != MAP_FAILED else {
            preconditionFailure("out of memory: cannot map \(rounded) bytes")
        }
        unsafe memory = RawMemory(base: mapping, count: count)
    }

    deinit {
        // SAFETY: same address and (rounded) length as mapped in init.
        unsafe munmap(memory.base, (memory.count + 4095) & ~4095)
    }
}

/// Fixed-size storage of plain values, indexed with bounds checks: what `[T]` would be without the
/// uniqueness and exclusivity checks an array property pays on every access.
@safe package final class FixedArray<Element: BitwiseCopyable>: @unchecked Sendable {
    // SAFETY: `base` holds `count` initialised elements from init to deinit; the subscript checks
    // the index.
    @usableFromInline package let base: UnsafeMutablePointer<Element>
    package let count: Int

    @inlinable package init(repeating value: Element, count: Int) {
        self.count = count
        unsafe base = UnsafeMutablePointer<Element>.allocate(capacity: max(count, 1))
        unsafe base.initialize(repeating: value, count: count)
    }
    deinit { unsafe base.deallocate() }

    /// A longer copy, `value` behind its end.
    package func extended(to count: Int, with value: Element) -> FixedArray<Element> {
        precondition(count >= self.count)
        let longer = FixedArray(repeating: value, count: count)
        for index in 0..<self.count { longer[index] = self[index] }
        return longer
    }

    @inlinable package subscript(_ index: Int) -> Element {
        @inlinable @inline(__always) unsafeAddress {
            precondition(index >= 0 && index < count)
            return unsafe UnsafePointer(base + index)
        }
        @inlinable @inline(__always) unsafeMutableAddress {
            precondition(index >= 0 && index < count)
            return unsafe base + index
        }
    }
}

/// A queue of plain values that grows (never shrinks): actions waiting to be performed.
@safe package final class ValueQueue<Element: BitwiseCopyable>: @unchecked Sendable {
    // SAFETY: elements head..<tail are initialised; `base` has room for `capacity`.
    @usableFromInline package var base: UnsafeMutablePointer<Element>
    @usableFromInline package var capacity: Int
    @usableFromInline package var head = 0
    @usableFromInline package var tail = 0

    @inlinable package init(capacity: Int = 256) {
        self.capacity = max(capacity, 1)
        unsafe base = UnsafeMutablePointer<Element>.allocate(capacity: self.capacity)
    }
    deinit { unsafe base.deallocate() }

    @inlinable package var isEmpty: Bool { head == tail }
    @inlinable package var count: Int { tail - head }

    @inlinable package func append(_ element: Element) {
        if tail == capacity { makeRoom() }
        unsafe (base + tail).initialize(to: element)
        tail += 1
    }
    @inlinable package var first: Element? { head == tail ? nil : unsafe base[head] }

    @inlinable package func popFirst() -> Element? {
        if head == tail { return nil }
        let element = unsafe base[head]
        head += 1
        if head == tail {
            head = 0
            tail = 0
        }
        return element
    }
    @usableFromInline package func makeRoom() {
        let live = tail - head
        if head >= capacity / 2 {
            unsafe base.update(from: base + head, count: live)
        } else {
            let larger = UnsafeMutablePointer<Element>.allocate(capacity: capacity * 2)
            unsafe larger.initialize(from: base + head, count: live)
            unsafe base.deallocate()
            unsafe base = larger
            capacity *= 2
        }
        head = 0
        tail = live
    }
}
