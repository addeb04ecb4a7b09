import CHost
import Foundation
import Glibc

/// Programs of others that do a part of a command: on the terminal's own streams.
package enum ForegroundProcess {
    /// The program's path; nil: no directory of PATH has it. Relative ones are left out: whatever
    /// lies in the current directory must not run.
    package static func find(
        _ name: String, environment: [String: String] = ProcessInfo.processInfo.environment
    ) -> String? {
        (environment["PATH"] ?? "/usr/local/bin:/usr/bin:/bin").split(separator: ":")
            .filter { $0.hasPrefix("/") }.map { "\($0)/\(name)" }
            .first { FileManager.default.isExecutableFile(atPath: $0) }
    }

    /// Runs it to its end; its exit status, 128 and more for a signal. What interrupts the terminal
    /// reaches the program, and us only when it has ended: so that there is time to clean up.
    /// Blocks: not for the cooperative thread pool.
    package static func run(_ executable: String, _ arguments: [String]) throws -> Int32 {
        let before = (signal(SIGINT, SIG_IGN), signal(SIGQUIT, SIG_IGN))
        defer {
            signal(SIGINT, before.0)
            signal(SIGQUIT, before.1)
        }
        // SAFETY: attributes are initialised first and destroyed at the end; the argument strings
        // are copies freed at the end, and the array that points to them ends with nil.
        var attributes = posix_spawnattr_t()
        unsafe posix_spawnattr_init(&attributes)
        defer { unsafe posix_spawnattr_destroy(&attributes) }
        var signals = sigset_t()
        unsafe sigemptyset(&signals)
        unsafe sigaddset(&signals, SIGINT)
        unsafe sigaddset(&signals, SIGQUIT)
        unsafe posix_spawnattr_setsigdefault(&attributes, &signals)
        unsafe posix_spawnattr_setflags(&attributes, Int16(POSIX_SPAWN_SETSIGDEF))
        let copies = unsafe ([executable] + arguments).map { unsafe strdup($0) }
        defer { unsafe copies.forEach { unsafe free($0) } }
        var pid: pid_t = 0
        let code = unsafe posix_spawn(&pid, executable, nil, &attributes, copies + [nil], environ)
        guard code == 0 else {
            errno = code
            throw HostFiles.failure("start", executable)
        }
        var status: Int32 = 0
        // SAFETY: `status` is a local that outlives each call.
        while unsafe waitpid(pid, &status, 0) < 0 {
            guard errno == EINTR else { throw HostFiles.failure("wait for", executable) }
        }
        return status & 0x7f == 0 ? (status >> 8) & 0xff : 128 + (status & 0x7f)
    }
}
