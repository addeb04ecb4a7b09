import CHost
import Foundation
import Glibc

/// Starting programs that must outlive whoever starts them.
package enum ChildProcess {
    /// Starts a program in a session of its own, so that signals to our terminal or process group
    /// and our death do not reach it. It gets no file descriptor of ours, default signal handling,
    /// nothing to read, and `log` (appended) as output. Its parent must reap it with `reap`.
    package static func startDetached(
        _ executable: String, _ arguments: [String], log: String
    ) throws -> ProcessIdentity {
        let pid = try spawn(executable, arguments, log: log)
        // It may have ended already; then an identity that no running process has is right.
        return ProcessIdentity(running: pid)
            ?? ProcessIdentity(pid: pid, startTime: 0, bootID: ProcessIdentity.currentBootID)
    }

    /// Runs a program to its end, appending its output to `log`; returns its exit status (128 and
    /// the signal's number if a signal ended it). Blocks: not for the cooperative thread pool.
    package static func runToEnd(
        _ executable: String, _ arguments: [String], log: String
    ) throws -> Int32 {
        let pid = try spawn(executable, arguments, log: log)
        var status: Int32 = 0
        // SAFETY: `status` is a local that outlives each call.
        while unsafe waitpid(pid, &status, 0) < 0 {
            guard errno == EINTR else { throw HostFiles.failure("wait for", executable) }
        }
        return exitStatus(status)
    }

    /// Exit status of a child that has ended; nil if it runs, or is not our child.
    @discardableResult
    package static func reap(_ pid: Int32) -> Int32? {
        guard pid > 0 else { return nil }
        var status: Int32 = 0
        // SAFETY: `status` is a local that outlives the call.
        guard unsafe waitpid(pid, &status, WNOHANG) == pid else { return nil }
        return exitStatus(status)
    }

    private static func exitStatus(_ status: Int32) -> Int32 {
        status & 0x7f == 0 ? (status >> 8) & 0xff : 128 + (status & 0x7f)
    }

    private static func spawn(
        _ executable: String, _ arguments: [String], log: String
    ) throws -> Int32 {
        // SAFETY: attributes and actions are initialised first, used by this call only and
        // destroyed at its end; the argument strings are copies freed at its end, and the array
        // that points to them ends with nil, as posix_spawn requires.
        var attributes = posix_spawnattr_t()
        unsafe posix_spawnattr_init(&attributes)
        defer { unsafe posix_spawnattr_destroy(&attributes) }
        var every = sigset_t()
        var none = sigset_t()
        unsafe sigfillset(&every)
        unsafe sigemptyset(&none)
        unsafe posix_spawnattr_setsigdefault(&attributes, &every)
        unsafe posix_spawnattr_setsigmask(&attributes, &none)
        let flags =
            Int16(POSIX_SPAWN_SETSIGDEF) | Int16(POSIX_SPAWN_SETSIGMASK) | host_spawn_new_session()
        unsafe posix_spawnattr_setflags(&attributes, flags)

        var actions = unsafe posix_spawn_file_actions_t()
        unsafe posix_spawn_file_actions_init(&actions)
        defer { unsafe posix_spawn_file_actions_destroy(&actions) }
        unsafe posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0)
        unsafe posix_spawn_file_actions_addopen(
            &actions, 1, log, O_WRONLY | O_CREAT | O_APPEND, 0o600)
        unsafe posix_spawn_file_actions_adddup2(&actions, 1, 2)
        unsafe host_spawn_close_from(&actions, 3)

        let copies = unsafe ([executable] + arguments).map { unsafe strdup($0) }
        defer { unsafe copies.forEach { unsafe free($0) } }
        let vector = unsafe copies + [nil]
        var pid: pid_t = 0
        let code = unsafe posix_spawn(&pid, executable, &actions, &attributes, vector, environ)
        guard code == 0 else {
            errno = code
            throw HostFiles.failure("start", executable)
        }
        return pid
    }
}
