import Glibc

/// What the operating system refused, with a message that names the object and the reason.
package struct IOError: Error, Equatable, Sendable {
    package var errno: Int32
    package var message: String
    package init(errno: Int32, _ message: String) {
        self.errno = errno
        self.message = "\(message): \(errorText(errno))"
    }
    package init(_ message: String) {
        errno = EINVAL
        self.message = message
    }
}

/// "No such file or directory (ENOENT)" and the like.
package func errorText(_ number: Int32) -> String {
    // SAFETY: both functions return static strings of the C library, or null.
    guard let text = unsafe strerror(number) else { return "error \(number)" }
    let message = unsafe String(cString: text)
    guard let name = errorName(number) else { return message }
    return "\(message) (\(name))"
}

private let errorNames: [(name: String, number: Int32)] = [
    ("EIO", EIO), ("ENOSPC", ENOSPC), ("ENOENT", ENOENT), ("EACCES", EACCES), ("EPERM", EPERM),
    ("EEXIST", EEXIST), ("EINVAL", EINVAL), ("EDQUOT", EDQUOT), ("EROFS", EROFS),
    ("ENOSYS", ENOSYS), ("EOPNOTSUPP", EOPNOTSUPP), ("EAGAIN", EAGAIN), ("ENOMEM", ENOMEM),
    ("ECONNREFUSED", ECONNREFUSED), ("ECONNRESET", ECONNRESET), ("ETIMEDOUT", ETIMEDOUT),
    ("EPIPE", EPIPE), ("EADDRINUSE", EADDRINUSE), ("EMFILE", EMFILE), ("EBADF", EBADF),
    ("ECANCELED", ECANCELED), ("EFBIG", EFBIG), ("EHOSTUNREACH", EHOSTUNREACH),
]

func errorName(_ number: Int32) -> String? {
    errorNames.first { $0.number == number }?.name
}

/// The number of an errno by its symbolic name ("EIO"), for fault rules.
func errorNumber(_ name: some StringProtocol) -> Int32? {
    errorNames.first { $0.name == name }?.number
}
