#define _GNU_SOURCE
#include "CUring.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/socket.h>

#define ADDRESS(operation) ((void *)(operation)->address)

struct haptera_ring {
    struct io_uring ring;
};

static int open_ring(struct io_uring *ring, unsigned entries, unsigned flags) {
    struct io_uring_params parameters = {0};
    parameters.flags = IORING_SETUP_CLAMP | flags;
    return io_uring_queue_init_params(entries, ring, &parameters);
}

static int has_operations(struct io_uring *ring) {
    static const int needed[] = {
        IORING_OP_READ,    IORING_OP_WRITE,   IORING_OP_READ_FIXED, IORING_OP_WRITE_FIXED,
        IORING_OP_FSYNC,   IORING_OP_RECV,    IORING_OP_SEND,       IORING_OP_FALLOCATE,
        IORING_OP_RECVMSG, IORING_OP_SENDMSG, IORING_OP_POLL_ADD,   IORING_OP_ASYNC_CANCEL,
    };
    struct io_uring_probe *probe = io_uring_get_probe_ring(ring);
    if (!probe) return 0;
    int all = 1;
    for (size_t i = 0; i < sizeof needed / sizeof *needed; i++) {
        all &= io_uring_opcode_supported(probe, needed[i]);
    }
    io_uring_free_probe(probe);
    return all;
}

// A seccomp filter may allow the setup and refuse the use.
static int prove(struct io_uring *ring) {
    struct io_uring_sqe *sqe = io_uring_get_sqe(ring);
    io_uring_prep_nop(sqe);
    io_uring_sqe_set_data64(sqe, HAPTERA_USER_DATA_NONE);
    int result;
    do {
        result = io_uring_submit_and_wait(ring, 1);
    } while (result == -EINTR);
    if (result < 0) return result;
    struct io_uring_cqe *cqe;
    result = io_uring_peek_cqe(ring, &cqe);
    if (result < 0) return result;
    result = cqe->res;
    io_uring_cqe_seen(ring, cqe);
    return result;
}

int haptera_ring_create(struct haptera_ring **out, unsigned entries) {
    struct haptera_ring *ring = calloc(1, sizeof *ring);
    if (!ring) return -ENOMEM;
    int result = open_ring(
        &ring->ring, entries, IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN);
    if (result == -EINVAL) result = open_ring(&ring->ring, entries, 0); // before Linux 6.1
    if (result < 0) {
        free(ring);
        return result;
    }
    result = has_operations(&ring->ring) ? prove(&ring->ring) : -EOPNOTSUPP;
    if (result < 0) {
        haptera_ring_destroy(ring);
        return result;
    }
    *out = ring;
    return 0;
}

void haptera_ring_destroy(struct haptera_ring *ring) {
    io_uring_queue_exit(&ring->ring);
    free(ring);
}

int haptera_ring_register_buffer(struct haptera_ring *ring, void *address, size_t length) {
    struct iovec vector = {address, length};
    return io_uring_register_buffers(&ring->ring, &vector, 1);
}

int haptera_ring_register_files(struct haptera_ring *ring, unsigned count) {
    return io_uring_register_files_sparse(&ring->ring, count);
}

int haptera_ring_set_file(struct haptera_ring *ring, unsigned slot, int fd) {
    return io_uring_register_files_update(&ring->ring, slot, &fd, 1);
}

void haptera_ring_prepare(struct haptera_ring *ring, const struct haptera_operation *op) {
    struct io_uring_sqe *sqe = io_uring_get_sqe(&ring->ring);
    while (!sqe) {
        // More was queued in one turn than the ring has entries: make room.
        int result = io_uring_submit(&ring->ring);
        if (result < 0 && result != -EINTR && result != -EAGAIN && result != -EBUSY) abort();
        sqe = io_uring_get_sqe(&ring->ring);
    }
    int fd = op->file_index >= 0 ? op->file_index : op->fd;
    unsigned length = (unsigned)op->length;
    switch ((enum haptera_operation_kind)op->kind) {
    case HAPTERA_READ:
        if (op->buffer_index >= 0) {
            io_uring_prep_read_fixed(sqe, fd, ADDRESS(op), length, op->offset, op->buffer_index);
        } else {
            io_uring_prep_read(sqe, fd, ADDRESS(op), length, op->offset);
        }
        break;
    case HAPTERA_WRITE:
        if (op->buffer_index >= 0) {
            io_uring_prep_write_fixed(sqe, fd, ADDRESS(op), length, op->offset, op->buffer_index);
        } else {
            io_uring_prep_write(sqe, fd, ADDRESS(op), length, op->offset);
        }
        break;
    case HAPTERA_SYNC:
        io_uring_prep_fsync(sqe, fd, IORING_FSYNC_DATASYNC);
        break;
    case HAPTERA_FALLOCATE:
        io_uring_prep_fallocate(sqe, fd, (int)op->mode, (off_t)op->offset, (off_t)op->length);
        break;
    case HAPTERA_RECEIVE:
        io_uring_prep_recv(sqe, fd, ADDRESS(op), length, op->mode ? MSG_WAITALL : 0);
        break;
    case HAPTERA_RECEIVE_VECTOR:
        io_uring_prep_recvmsg(sqe, fd, ADDRESS(op), 0);
        break;
    case HAPTERA_SEND:
        io_uring_prep_send(sqe, fd, ADDRESS(op), length, MSG_NOSIGNAL | MSG_WAITALL);
        break;
    case HAPTERA_SEND_VECTOR:
        io_uring_prep_sendmsg(sqe, fd, ADDRESS(op), MSG_NOSIGNAL | MSG_WAITALL);
        break;
    case HAPTERA_POLL:
        io_uring_prep_poll_add(sqe, fd, op->mode);
        break;
    case HAPTERA_CANCEL:
        io_uring_prep_cancel64(sqe, op->offset, 0);
        break;
    }
    if (op->file_index >= 0) io_uring_sqe_set_flags(sqe, IOSQE_FIXED_FILE);
    io_uring_sqe_set_data64(sqe, op->user_data);
}

int haptera_ring_wait(
    struct haptera_ring *ring, unsigned minimum, struct haptera_completion *out, unsigned max) {
    int result = minimum ? io_uring_submit_and_wait(&ring->ring, minimum)
                         : io_uring_submit_and_get_events(&ring->ring);
    // EBUSY and EAGAIN: completions must be taken first, or memory is short; both pass.
    if (result < 0 && result != -EINTR && result != -EAGAIN && result != -EBUSY) return result;
    struct io_uring_cqe *cqe;
    unsigned head, seen = 0, count = 0;
    io_uring_for_each_cqe(&ring->ring, head, cqe) {
        if (count == max) break;
        seen++;
        if (cqe->user_data == HAPTERA_USER_DATA_NONE) continue;
        out[count].user_data = cqe->user_data;
        out[count].result = cqe->res;
        count++;
    }
    io_uring_cq_advance(&ring->ring, seen);
    return (int)count;
}
