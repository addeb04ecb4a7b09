#ifndef HAPTERA_CHAPTERA_H
#define HAPTERA_CHAPTERA_H
#include <stddef.h>
#include <stdint.h>

// CRC32C (Castagnoli, reflected polynomial 0x82F63B78, RFC 3720 section 12.1) of `length` bytes,
// continuing from `crc` (0 to start). Chosen when the program starts: SSE4.2, ARMv8 or a table.
uint32_t haptera_crc32c(uint32_t crc, const void *data, size_t length);

// The variants by themselves, for tests. The hardware one falls back to the table where the
// processor has no such instruction; `haptera_crc32c_has_hardware` tells.
uint32_t haptera_crc32c_table(uint32_t crc, const void *data, size_t length);
uint32_t haptera_crc32c_hardware(uint32_t crc, const void *data, size_t length);
int haptera_crc32c_has_hardware(void);

// One operation for the kernel, the same for both back ends (CUring, CAio).
enum haptera_operation_kind {
    HAPTERA_READ,
    HAPTERA_WRITE,
    HAPTERA_SYNC,           // fdatasync
    HAPTERA_FALLOCATE,      // `mode` as in fallocate(2)
    HAPTERA_RECEIVE,        // `mode` 1: wait for all of `length`
    HAPTERA_RECEIVE_VECTOR, // `address` is a struct msghdr that lives until completion
    HAPTERA_SEND,
    HAPTERA_SEND_VECTOR,    // `address` is a struct msghdr that lives until completion
    HAPTERA_POLL,           // `mode`: POLLIN or POLLOUT; completes once
    HAPTERA_CANCEL          // `offset`: user_data of the operation on `fd` to cancel
};

struct haptera_operation {
    uintptr_t address; // of memory that stays untouched until completion
    uint64_t offset;
    uint64_t length;
    uint64_t user_data;
    int32_t fd;
    int32_t file_index;   // registered file, or -1
    int32_t buffer_index; // registered buffer that holds `address`, or -1
    uint32_t mode;
    uint32_t kind;
};

struct haptera_completion {
    uint64_t user_data;
    int64_t result; // bytes, poll events, or a negative errno
};

// Completions of cancel requests carry this and mean nothing.
#define HAPTERA_USER_DATA_NONE UINT64_MAX

// Closes the descriptor on a thread of its own.
void haptera_close_in_background(int fd);

// System calls and constants that Swift's C library module does not show. Descriptors are
// close-on-exec and non-blocking; results are a value or a negative errno.
int haptera_eventfd(void);
void haptera_eventfd_signal(int fd);
int haptera_timerfd(void);                        // CLOCK_BOOTTIME
void haptera_timerfd_set(int fd, uint64_t nanoseconds); // absolute; 0 disarms
int haptera_signalfd(const int *signals, int count); // blocks the signals in this thread
int haptera_signalfd_read(int fd);                // a signal's number, or -EAGAIN
void haptera_ignore_signals(void);
// Whatever ends the process with SIGBUS leaves the bytes (at most 64) in the file first. 0: the path
// is too long.
int haptera_note_bus_errors(const char *path, const uint8_t *bytes, size_t count);
void haptera_drain(int fd);                       // of an eventfd or timerfd
int haptera_accept(int fd);                       // close-on-exec, blocking
// Runs a function on a thread of its own; 0, or a negative errno if there is no thread to be had.
int haptera_in_background(void (*run)(void *context), void *context);
int haptera_host_is_numeric(const char *host);
// The first address of a host as text; 0 or getaddrinfo's error. Blocks as long as name servers do.
int haptera_resolve(const char *host, char *text, size_t size);
// A stream socket that listens, or begins to connect; to connect takes an address, not a name.
// `*resolution` is then getaddrinfo's error, or 0.
int haptera_socket_tcp(const char *host, const char *port, int listening, int *resolution);
int haptera_socket_unix(const char *path, int listening);
int haptera_socket_error(int fd);                 // the outcome of a connect: 0 or negative errno
int haptera_local_port(int fd);
// Whether the connected socket's peer is on this host: a Unix socket, a loopback address, or the
// address it was reached at. 0 if it is not, or cannot be told.
int haptera_peer_is_local(int fd);
uint64_t haptera_random(void);
int haptera_open(const char *path, int flags, int direct);
int haptera_fallocate(int fd, int mode, int64_t offset, int64_t length);
// The next data (`data` 1) or hole (0) at or after `offset`; -ENXIO past the last.
int64_t haptera_seek(int fd, int64_t offset, int data);

#endif
