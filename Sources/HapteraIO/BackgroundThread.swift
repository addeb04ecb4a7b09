import CHaptera

private final class Work: Sendable {
    let run: @Sendable () -> Void
    init(_ run: @escaping @Sendable () -> Void) { self.run = run }
}

/// Runs what may block for long beside a loop that must not. The thread ends with it.
func onThreadOfItsOwn(_ run: @escaping @Sendable () -> Void) throws(IOError) {
    let work = unsafe Unmanaged.passRetained(Work(run))
    // SAFETY: the reference that was retained is the thread's, or ours if there is none.
    let result = unsafe haptera_in_background(
        { context in
            guard let context = unsafe context else { return }
            unsafe Unmanaged<Work>.fromOpaque(context).takeRetainedValue().run()
        }, work.toOpaque())
    guard result != 0 else { return }
    unsafe work.release()
    throw IOError(errno: -result, "cannot start a thread")
}
