// liburing for Swift. <sys/select.h> comes first: without it liburing's headers and the Swift
// importer's glibc module can define fd_set twice.
#ifndef HAPTERA_CURING_H
#define HAPTERA_CURING_H
#include <sys/select.h>
#include <liburing.h>
#include <CHaptera.h>

struct haptera_ring;

// Makes a ring with `entries` submission slots on the calling thread, which must be the one that
// uses it, and proves with a no-op that the kernel really serves it. Returns 0 or a negative errno
// (ENOSYS: no io_uring; EPERM: refused by sysctl or seccomp; EOPNOTSUPP: too old).
int haptera_ring_create(struct haptera_ring **ring, unsigned entries);
void haptera_ring_destroy(struct haptera_ring *ring);

// Best effort: 0 or a negative errno. `file_index` of an operation is a slot set here.
int haptera_ring_register_buffer(struct haptera_ring *ring, void *address, size_t length);
int haptera_ring_register_files(struct haptera_ring *ring, unsigned count);
int haptera_ring_set_file(struct haptera_ring *ring, unsigned slot, int fd);

// Queues an operation; it goes to the kernel with the next wait.
void haptera_ring_prepare(struct haptera_ring *ring, const struct haptera_operation *operation);

// Submits what is queued, waits for `minimum` (0 or 1) completions, and moves up to `max`
// completions to `out`. Returns their number or a negative errno.
int haptera_ring_wait(
    struct haptera_ring *ring, unsigned minimum, struct haptera_completion *out, unsigned max);
#endif
