// libaio and epoll for Swift: the fallback where the kernel refuses io_uring.
#ifndef HAPTERA_CAIO_H
#define HAPTERA_CAIO_H
#include <sys/select.h>
#include <libaio.h>
#include <CHaptera.h>

struct haptera_aio;

// At most `operations` may be outstanding at once. Returns 0 or a negative errno (EAGAIN: the
// system's fs.aio-max-nr is used up).
int haptera_aio_create(struct haptera_aio **aio, unsigned operations);
// Waits for disk operations still in flight: their memory may be freed afterwards.
void haptera_aio_destroy(struct haptera_aio *aio);

// Starts an operation or queues it until the next wait. One receive (or poll for input) and one send
// (or poll for output) at a time per socket.
void haptera_aio_prepare(struct haptera_aio *aio, const struct haptera_operation *operation);
// To be called before a socket used here is closed: its number may come back as another one.
void haptera_aio_forget(struct haptera_aio *aio, int fd);

// As `haptera_ring_wait`.
int haptera_aio_wait(
    struct haptera_aio *aio, unsigned minimum, struct haptera_completion *out, unsigned max);
#endif
