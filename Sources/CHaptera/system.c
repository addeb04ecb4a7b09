#define _GNU_SOURCE
#include "CHaptera.h"

#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <unistd.h>

static int checked(int result) { return result < 0 ? -errno : result; }

static void *close_one(void *fd) {
    close((int)(intptr_t)fd);
    return NULL;
}

void haptera_close_in_background(int fd) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, close_one, (void *)(intptr_t)fd) == 0) {
        pthread_detach(thread);
    } else {
        close(fd);
    }
}

struct background {
    void (*run)(void *);
    void *context;
};

static void *run_background(void *argument) {
    struct background work = *(struct background *)argument;
    free(argument);
    work.run(work.context);
    return NULL;
}

int haptera_in_background(void (*run)(void *), void *context) {
    struct background *work = malloc(sizeof *work);
    if (!work) return -ENOMEM;
    *work = (struct background){run, context};
    pthread_t thread;
    int result = pthread_create(&thread, NULL, run_background, work);
    if (result == 0) pthread_detach(thread); else free(work);
    return -result;
}

int haptera_eventfd(void) { return checked(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)); }

void haptera_eventfd_signal(int fd) { eventfd_write(fd, 1); }

int haptera_timerfd(void) {
    return checked(timerfd_create(CLOCK_BOOTTIME, TFD_CLOEXEC | TFD_NONBLOCK));
}

void haptera_timerfd_set(int fd, uint64_t nanoseconds) {
    struct itimerspec setting = {0};
    setting.it_value.tv_sec = (time_t)(nanoseconds / 1000000000);
    setting.it_value.tv_nsec = (long)(nanoseconds % 1000000000);
    timerfd_settime(fd, TFD_TIMER_ABSTIME, &setting, NULL);
}

int haptera_signalfd(const int *signals, int count) {
    sigset_t set;
    sigemptyset(&set);
    for (int i = 0; i < count; i++) sigaddset(&set, signals[i]);
    int result = pthread_sigmask(SIG_BLOCK, &set, NULL);
    return result ? -result : checked(signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK));
}

int haptera_signalfd_read(int fd) {
    struct signalfd_siginfo info;
    ssize_t count = read(fd, &info, sizeof info);
    return count == sizeof info ? (int)info.ssi_signo : -EAGAIN;
}

void haptera_ignore_signals(void) {
  signal(SIGPIPE, SIG_IGN);
  signal(SIGXFSZ, SIG_IGN);
}

static struct {
    char path[512];
    uint8_t bytes[64];
    size_t count;
} bus_note;

// A signal's handler: nothing but system calls.
static void note_bus_error(int number) {
    int fd = open(bus_note.path, O_WRONLY | O_CREAT | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC, 0600);
    // Nothing can be done about an error here: the process ends in any case.
    if (fd >= 0 && write(fd, bus_note.bytes, bus_note.count) >= 0) close(fd);
    // SA_RESETHAND has put the default back.
    raise(number);
}

int haptera_note_bus_errors(const char *path, const uint8_t *bytes, size_t count) {
    if (strlen(path) >= sizeof bus_note.path || count > sizeof bus_note.bytes) return 0;
    strcpy(bus_note.path, path);
    memcpy(bus_note.bytes, bytes, count);
    bus_note.count = count;
    struct sigaction action = {0};
    action.sa_handler = note_bus_error;
    action.sa_flags = (int)SA_RESETHAND;
    sigaction(SIGBUS, &action, NULL);
    return 1;
}

void haptera_drain(int fd) {
    uint64_t count;
    if (read(fd, &count, sizeof count) < 0) return; // nothing to drain
}

int haptera_accept(int fd) { return checked(accept4(fd, NULL, NULL, SOCK_CLOEXEC)); }

static int open_socket(const struct sockaddr *address, socklen_t size, int listening) {
    int fd = socket(address->sa_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0) return -errno;
    int on = 1, result;
    if (listening) {
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
        result = bind(fd, address, size);
        if (result == 0) result = listen(fd, 256);
    } else {
        result = connect(fd, address, size);
        if (result < 0 && errno == EINPROGRESS) result = 0;
    }
    if (result == 0) return fd;
    result = -errno;
    close(fd);
    return result;
}

int haptera_host_is_numeric(const char *host) {
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_NUMERICHOST}, *list;
    if (getaddrinfo(host, NULL, &hints, &list)) return 0;
    freeaddrinfo(list);
    return 1;
}

int haptera_resolve(const char *host, char *text, size_t size) {
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *list;
    int result = getaddrinfo(host, NULL, &hints, &list);
    if (result) return result;
    result = getnameinfo(
        list->ai_addr, list->ai_addrlen, text, (socklen_t)size, NULL, 0, NI_NUMERICHOST);
    freeaddrinfo(list);
    return result;
}

int haptera_socket_tcp(const char *host, const char *port, int listening, int *resolution) {
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_NUMERICSERV}, *list;
    // Connections are made by event loops, which a silent name server must not stop.
    if (!listening) hints.ai_flags |= AI_NUMERICHOST;
    *resolution = getaddrinfo(host, port, &hints, &list);
    if (*resolution) return -EHOSTUNREACH;
    int result = open_socket(list->ai_addr, list->ai_addrlen, listening);
    freeaddrinfo(list);
    return result;
}

int haptera_socket_unix(const char *path, int listening) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    size_t length = strlen(path);
    if (length == 0 || length >= sizeof address.sun_path) return -ENAMETOOLONG;
    memcpy(address.sun_path, path, length);
    return open_socket((struct sockaddr *)&address, sizeof address, listening);
}

int haptera_socket_error(int fd) {
    int number = 0;
    socklen_t size = sizeof number;
    if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &number, &size) < 0) return -errno;
    return -number;
}

int haptera_local_port(int fd) {
    union {
        struct sockaddr_storage any;
        struct sockaddr_in v4;
        struct sockaddr_in6 v6;
    } address = {0};
    socklen_t size = sizeof address;
    if (getsockname(fd, (struct sockaddr *)&address, &size) < 0) return -errno;
    return ntohs(address.any.ss_family == AF_INET6 ? address.v6.sin6_port : address.v4.sin_port);
}

int haptera_peer_is_local(int fd) {
    union endpoint {
        struct sockaddr_storage any;
        struct sockaddr_in v4;
        struct sockaddr_in6 v6;
    } peer = {0}, self = {0};
    socklen_t peerSize = sizeof peer, selfSize = sizeof self;
    if (getpeername(fd, (struct sockaddr *)&peer, &peerSize) < 0) return 0;
    if (getsockname(fd, (struct sockaddr *)&self, &selfSize) < 0) return 0;
    if (peer.any.ss_family != self.any.ss_family) return 0;
    switch (peer.any.ss_family) {
    case AF_UNIX:
        return 1;
    case AF_INET:
        return ntohl(peer.v4.sin_addr.s_addr) >> 24 == 127 ||
            peer.v4.sin_addr.s_addr == self.v4.sin_addr.s_addr;
    case AF_INET6:
        return IN6_IS_ADDR_LOOPBACK(&peer.v6.sin6_addr) ||
            memcmp(&peer.v6.sin6_addr, &self.v6.sin6_addr, sizeof peer.v6.sin6_addr) == 0;
    default:
        return 0;
    }
}

uint64_t haptera_random(void) {
    uint64_t value;
    while (getrandom(&value, sizeof value, 0) != sizeof value) {
        if (errno != EINTR) abort();
    }
    return value;
}

int haptera_open(const char *path, int flags, int direct) {
    int fd;
    do {
        fd = open(path, flags | O_CLOEXEC | (direct ? O_DIRECT : 0), 0600);
    } while (fd < 0 && errno == EINTR);
    return checked(fd);
}

int haptera_fallocate(int fd, int mode, int64_t offset, int64_t length) {
    int result;
    do {
        result = fallocate(fd, mode, offset, length);
    } while (result < 0 && errno == EINTR);
    return checked(result);
}

int64_t haptera_seek(int fd, int64_t offset, int data) {
    off_t result = lseek(fd, offset, data ? SEEK_DATA : SEEK_HOLE);
    return result < 0 ? -errno : result;
}
