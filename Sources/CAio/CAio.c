#define _GNU_SOURCE
#include "CAio.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#define ADDRESS(operation) ((void *)(operation)->address)

enum { DISK_DEPTH = 512, EVENTS = 128 };

// A socket's two directions. Epoll is edge-triggered: `ready` says that the next try may succeed, and
// is cleared when a try finds nothing more, so that no idle try and no epoll_ctl is made per I/O.
struct direction {
    struct haptera_operation operation;
    uint8_t pending, ready;
};
struct descriptor {
    struct direction in, out;
    uint8_t registered, hung_up;
};

// Operations the kernel has no asynchronous form of (hole punching; fdatasync on some file systems)
// are made by one thread, in order.
struct worker {
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    int started, stopping, event;
    struct haptera_operation *jobs; // ring of `operations`
    unsigned head, count;
    struct haptera_completion *done;
    unsigned done_count;
};

struct haptera_aio {
    io_context_t context;
    unsigned operations;
    int epoll, disk_event, has_fdsync;
    struct iocb *blocks;
    unsigned *next_free; // of blocks; free list
    unsigned free, in_flight;
    struct iocb **queue; // ring of blocks waiting for io_submit
    unsigned queue_head, queue_count;
    struct descriptor *descriptors; // indexed by fd
    int descriptor_count;
    struct haptera_completion *ready; // ring
    unsigned ready_head, ready_count;
    struct worker worker;
};

static void complete(struct haptera_aio *aio, uint64_t user_data, int64_t result) {
    if (user_data == HAPTERA_USER_DATA_NONE) return;
    if (aio->ready_count == aio->operations) abort(); // more completions than operations
    unsigned at = (aio->ready_head + aio->ready_count++) % aio->operations;
    aio->ready[at] = (struct haptera_completion){user_data, result};
}

static int watch(struct haptera_aio *aio, int fd, uint32_t events) {
    struct epoll_event event = {.events = events, .data.fd = fd};
    return epoll_ctl(aio->epoll, EPOLL_CTL_ADD, fd, &event) < 0 ? -errno : 0;
}

int haptera_aio_create(struct haptera_aio **out, unsigned operations) {
    struct haptera_aio *aio = calloc(1, sizeof *aio);
    if (!aio) return -ENOMEM;
    int result = io_setup(DISK_DEPTH, &aio->context);
    if (result < 0) {
        free(aio);
        return result;
    }
    aio->operations = operations;
    aio->has_fdsync = 1; // until the kernel says otherwise
    aio->epoll = epoll_create1(EPOLL_CLOEXEC);
    aio->disk_event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    aio->worker.event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    aio->blocks = calloc(operations, sizeof *aio->blocks);
    aio->next_free = calloc(operations, sizeof *aio->next_free);
    aio->queue = calloc(operations, sizeof *aio->queue);
    aio->ready = calloc(operations, sizeof *aio->ready);
    aio->worker.jobs = calloc(operations, sizeof *aio->worker.jobs);
    aio->worker.done = calloc(operations, sizeof *aio->worker.done);
    pthread_mutex_init(&aio->worker.lock, NULL);
    pthread_cond_init(&aio->worker.wake, NULL);
    if (!aio->blocks || !aio->next_free || !aio->queue || !aio->ready || !aio->worker.jobs ||
        !aio->worker.done) {
        result = -ENOMEM;
    } else if (aio->epoll < 0 || aio->disk_event < 0 || aio->worker.event < 0) {
        result = -EMFILE;
    } else {
        result = watch(aio, aio->disk_event, EPOLLIN | EPOLLET);
        if (result == 0) result = watch(aio, aio->worker.event, EPOLLIN | EPOLLET);
    }
    if (result < 0) {
        haptera_aio_destroy(aio);
        return result;
    }
    for (unsigned i = 0; i < operations; i++) aio->next_free[i] = i + 1;
    *out = aio;
    return 0;
}

static void *work(void *argument) {
    struct haptera_aio *aio = argument;
    struct worker *worker = &aio->worker;
    pthread_mutex_lock(&worker->lock);
    for (;;) {
        while (worker->count == 0 && !worker->stopping) {
            pthread_cond_wait(&worker->wake, &worker->lock);
        }
        if (worker->count == 0) break;
        struct haptera_operation job = worker->jobs[worker->head];
        worker->head = (worker->head + 1) % aio->operations;
        worker->count--;
        pthread_mutex_unlock(&worker->lock);
        int result;
        do {
            result = job.kind == HAPTERA_SYNC
                         ? fdatasync(job.fd)
                         : fallocate(job.fd, (int)job.mode, (off_t)job.offset, (off_t)job.length);
        } while (result < 0 && errno == EINTR);
        result = result < 0 ? -errno : 0;
        pthread_mutex_lock(&worker->lock);
        worker->done[worker->done_count++] = (struct haptera_completion){job.user_data, result};
        eventfd_write(worker->event, 1);
    }
    pthread_mutex_unlock(&worker->lock);
    return NULL;
}

static void give_to_worker(struct haptera_aio *aio, const struct haptera_operation *operation) {
    struct worker *worker = &aio->worker;
    pthread_mutex_lock(&worker->lock);
    if (!worker->started) {
        // Signals are the reactor's: the thread takes none.
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        worker->started = pthread_create(&worker->thread, NULL, work, aio) == 0;
        pthread_sigmask(SIG_SETMASK, &before, NULL);
    }
    if (worker->started) {
        worker->jobs[(worker->head + worker->count++) % aio->operations] = *operation;
        pthread_cond_signal(&worker->wake);
    } else {
        complete(aio, operation->user_data, -EAGAIN);
    }
    pthread_mutex_unlock(&worker->lock);
}

static void collect_worker(struct haptera_aio *aio) {
    struct worker *worker = &aio->worker;
    pthread_mutex_lock(&worker->lock);
    for (unsigned i = 0; i < worker->done_count; i++) {
        complete(aio, worker->done[i].user_data, worker->done[i].result);
    }
    worker->done_count = 0;
    pthread_mutex_unlock(&worker->lock);
}

static void free_block(struct haptera_aio *aio, struct iocb *block) {
    unsigned index = (unsigned)(block - aio->blocks);
    aio->next_free[index] = aio->free;
    aio->free = index;
}

static void queue_disk(struct haptera_aio *aio, const struct haptera_operation *op) {
    unsigned index = aio->free;
    if (index >= aio->operations) abort(); // more operations than promised
    aio->free = aio->next_free[index];
    struct iocb *block = &aio->blocks[index];
    if (op->kind == HAPTERA_READ) {
        io_prep_pread(block, op->fd, ADDRESS(op), op->length, (long long)op->offset);
    } else if (op->kind == HAPTERA_WRITE) {
        io_prep_pwrite(block, op->fd, ADDRESS(op), op->length, (long long)op->offset);
    } else {
        io_prep_fdsync(block, op->fd);
    }
    io_set_eventfd(block, aio->disk_event);
    block->data = (void *)(uintptr_t)op->user_data;
    aio->queue[(aio->queue_head + aio->queue_count++) % aio->operations] = block;
}

// The first queued block was refused: only that one fails.
static void refuse_first(struct haptera_aio *aio, int result) {
    struct iocb *block = aio->queue[aio->queue_head];
    aio->queue_head = (aio->queue_head + 1) % aio->operations;
    aio->queue_count--;
    uint64_t user_data = (uint64_t)(uintptr_t)block->data;
    if (block->aio_lio_opcode == IO_CMD_FDSYNC && result == -EINVAL) {
        aio->has_fdsync = 0;
        struct haptera_operation sync = {
            .kind = HAPTERA_SYNC, .fd = block->aio_fildes, .user_data = user_data};
        give_to_worker(aio, &sync);
    } else {
        complete(aio, user_data, result);
    }
    free_block(aio, block);
}

static void submit_disk(struct haptera_aio *aio) {
    while (aio->queue_count > 0 && aio->in_flight < DISK_DEPTH) {
        unsigned count = aio->queue_count;
        if (count > DISK_DEPTH - aio->in_flight) count = DISK_DEPTH - aio->in_flight;
        if (count > aio->operations - aio->queue_head) count = aio->operations - aio->queue_head;
        int result = io_submit(aio->context, count, aio->queue + aio->queue_head);
        if (result > 0) {
            aio->queue_head = (aio->queue_head + result) % aio->operations;
            aio->queue_count -= result;
            aio->in_flight += result;
        } else if (result == -EINTR) {
            continue;
        } else if (result == 0 || (result == -EAGAIN && aio->in_flight > 0)) {
            break; // goes on when something has completed
        } else {
            refuse_first(aio, result);
        }
    }
}

static void collect_disk(struct haptera_aio *aio) {
    struct io_event events[EVENTS];
    int count;
    do {
        struct timespec none = {0, 0};
        count = io_getevents(aio->context, 0, EVENTS, events, &none);
        for (int i = 0; i < count; i++) {
            complete(aio, (uint64_t)(uintptr_t)events[i].data, (long)events[i].res);
            free_block(aio, events[i].obj);
            aio->in_flight--;
        }
    } while (count == EVENTS || count == -EINTR);
}

static struct descriptor *descriptor(struct haptera_aio *aio, int fd) {
    if (fd >= aio->descriptor_count) {
        int count = fd + 64;
        struct descriptor *larger = realloc(aio->descriptors, (size_t)count * sizeof *larger);
        if (!larger) abort();
        memset(larger + aio->descriptor_count, 0,
               (size_t)(count - aio->descriptor_count) * sizeof *larger);
        aio->descriptors = larger;
        aio->descriptor_count = count;
    }
    return &aio->descriptors[fd];
}

static void attempt(struct haptera_aio *aio, struct descriptor *state, struct direction *way) {
    if (!way->pending || !way->ready) return;
    const struct haptera_operation *op = &way->operation;
    struct pollfd poller = {.fd = op->fd, .events = (short)op->mode};
    ssize_t result = 0;
    do {
        switch ((enum haptera_operation_kind)op->kind) {
        case HAPTERA_RECEIVE:
            result = recv(op->fd, ADDRESS(op), op->length, MSG_DONTWAIT);
            break;
        case HAPTERA_RECEIVE_VECTOR:
            result = recvmsg(op->fd, ADDRESS(op), MSG_DONTWAIT);
            break;
        case HAPTERA_SEND:
            result = send(op->fd, ADDRESS(op), op->length, MSG_DONTWAIT | MSG_NOSIGNAL);
            break;
        case HAPTERA_SEND_VECTOR:
            result = sendmsg(op->fd, ADDRESS(op), MSG_DONTWAIT | MSG_NOSIGNAL);
            break;
        default: // HAPTERA_POLL
            result = poll(&poller, 1, 0);
            if (result > 0) result = poller.revents;
            else if (result == 0) result = -1, errno = EAGAIN;
            break;
        }
    } while (result < 0 && errno == EINTR);
    if (result < 0 && errno == EAGAIN) {
        way->ready = 0;
        return;
    }
    // A short receive emptied the socket; after a hang-up no edge would come, so go on trying.
    if (op->kind == HAPTERA_RECEIVE && result > 0 && (uint64_t)result < op->length) {
        way->ready = state->hung_up;
    }
    way->pending = 0;
    complete(aio, op->user_data, result < 0 ? -errno : result);
}

static void start_socket(struct haptera_aio *aio, const struct haptera_operation *op) {
    struct descriptor *state = descriptor(aio, op->fd);
    if (!state->registered) {
        int result = watch(aio, op->fd, EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET);
        if (result < 0 && result != -EEXIST) {
            complete(aio, op->user_data, result);
            return;
        }
        *state = (struct descriptor){.registered = 1, .in.ready = 1, .out.ready = 1};
    }
    int output = op->kind == HAPTERA_SEND || op->kind == HAPTERA_SEND_VECTOR ||
                 (op->kind == HAPTERA_POLL && !(op->mode & POLLIN));
    struct direction *way = output ? &state->out : &state->in;
    if (way->pending) abort(); // two at once would mix their bytes
    way->operation = *op;
    way->pending = 1;
    if (op->kind == HAPTERA_POLL) way->ready = 1; // the caller read it, we can't know
    attempt(aio, state, way);
}

static void cancel(struct haptera_aio *aio, const struct haptera_operation *op) {
    struct descriptor *state = descriptor(aio, op->fd);
    struct direction *ways[] = {&state->in, &state->out};
    for (int i = 0; i < 2; i++) {
        if (ways[i]->pending && ways[i]->operation.user_data == op->offset) {
            ways[i]->pending = 0;
            complete(aio, op->offset, -ECANCELED);
        }
    }
}

void haptera_aio_prepare(struct haptera_aio *aio, const struct haptera_operation *op) {
    switch ((enum haptera_operation_kind)op->kind) {
    case HAPTERA_READ:
    case HAPTERA_WRITE:
        queue_disk(aio, op);
        break;
    case HAPTERA_SYNC:
        if (aio->has_fdsync) queue_disk(aio, op);
        else give_to_worker(aio, op);
        break;
    case HAPTERA_FALLOCATE:
        give_to_worker(aio, op);
        break;
    case HAPTERA_CANCEL:
        cancel(aio, op);
        break;
    default:
        start_socket(aio, op);
        break;
    }
}

void haptera_aio_forget(struct haptera_aio *aio, int fd) {
    struct descriptor *state = descriptor(aio, fd);
    if (state->registered) epoll_ctl(aio->epoll, EPOLL_CTL_DEL, fd, NULL);
    *state = (struct descriptor){0};
}

static void handle(struct haptera_aio *aio, const struct epoll_event *event) {
    int fd = event->data.fd;
    if (fd == aio->disk_event) {
        collect_disk(aio);
    } else if (fd == aio->worker.event) {
        collect_worker(aio);
    } else if (aio->descriptors[fd].registered) {
        struct descriptor *state = &aio->descriptors[fd];
        if (event->events & (EPOLLHUP | EPOLLERR | EPOLLRDHUP)) state->hung_up = 1;
        if (event->events & (EPOLLIN | EPOLLHUP | EPOLLERR | EPOLLRDHUP)) state->in.ready = 1;
        if (event->events & (EPOLLOUT | EPOLLHUP | EPOLLERR)) state->out.ready = 1;
        attempt(aio, state, &state->in);
        attempt(aio, state, &state->out);
    }
}

int haptera_aio_wait(
    struct haptera_aio *aio, unsigned minimum, struct haptera_completion *out, unsigned max) {
    submit_disk(aio);
    struct epoll_event events[EVENTS];
    int block = minimum > 0 && aio->ready_count == 0;
    int count = epoll_wait(aio->epoll, events, EVENTS, block ? -1 : 0);
    if (count < 0 && errno != EINTR) return -errno;
    for (int i = 0; i < count; i++) handle(aio, &events[i]);
    unsigned taken = 0;
    while (taken < max && aio->ready_count > 0) {
        out[taken++] = aio->ready[aio->ready_head];
        aio->ready_head = (aio->ready_head + 1) % aio->operations;
        aio->ready_count--;
    }
    return (int)taken;
}

void haptera_aio_destroy(struct haptera_aio *aio) {
    if (aio->worker.started) {
        pthread_mutex_lock(&aio->worker.lock);
        aio->worker.stopping = 1;
        pthread_cond_signal(&aio->worker.wake);
        pthread_mutex_unlock(&aio->worker.lock);
        pthread_join(aio->worker.thread, NULL);
    }
    io_destroy(aio->context); // waits for what is in flight
    if (aio->epoll >= 0) close(aio->epoll);
    if (aio->disk_event >= 0) close(aio->disk_event);
    if (aio->worker.event >= 0) close(aio->worker.event);
    pthread_cond_destroy(&aio->worker.wake);
    pthread_mutex_destroy(&aio->worker.lock);
    free(aio->blocks);
    free(aio->next_free);
    free(aio->queue);
    free(aio->descriptors);
    free(aio->ready);
    free(aio->worker.jobs);
    free(aio->worker.done);
    free(aio);
}
