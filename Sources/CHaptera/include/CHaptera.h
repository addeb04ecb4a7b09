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
    void *address;
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

#endif
