#include "CHaptera.h"

#include <string.h>

#if defined(__x86_64__)
#include <nmmintrin.h>
#define HARDWARE __attribute__((target("sse4.2")))
#define STEP8(crc, word) _mm_crc32_u64(crc, word)
#define STEP1(crc, byte) _mm_crc32_u8((uint32_t)(crc), byte)
static int detect(void) { return __builtin_cpu_supports("sse4.2"); }
#elif defined(__aarch64__)
#include <arm_acle.h>
#include <sys/auxv.h>
#define HARDWARE __attribute__((target("crc")))
#define STEP8(crc, word) __crc32cd((uint32_t)(crc), word)
#define STEP1(crc, byte) __crc32cb((uint32_t)(crc), byte)
static int detect(void) { return (getauxval(AT_HWCAP) & (1 << 7)) != 0; } // HWCAP_CRC32
#endif

// The instruction has a latency of three cycles and a throughput of one: three streams keep it busy.
// A stream's checksum is carried over the next stream's bytes by a table of "append this many zero
// bytes", which is linear in the checksum. The long stream fits three times into a 4 KiB block.
enum { LONG = 1360, SHORT = 168 };

static uint32_t bytes[8][256];
static uint32_t skipLong[4][256];
static uint32_t skipShort[4][256];
static uint32_t (*chosen)(uint32_t, const void *, size_t);

static void fillSkip(uint32_t skip[4][256], size_t length) {
    uint32_t basis[32];
    for (int bit = 0; bit < 32; bit++) {
        uint32_t crc = 1u << bit;
        for (size_t i = 0; i < length; i++) crc = bytes[0][crc & 0xff] ^ (crc >> 8);
        basis[bit] = crc;
    }
    for (int k = 0; k < 4; k++) {
        for (int value = 0; value < 256; value++) {
            uint32_t crc = 0;
            for (int bit = 0; bit < 8; bit++) {
                if (value >> bit & 1) crc ^= basis[8 * k + bit];
            }
            skip[k][value] = crc;
        }
    }
}

// Before main and before any thread: nothing to synchronise afterwards.
__attribute__((constructor)) static void choose(void) {
    for (uint32_t value = 0; value < 256; value++) {
        uint32_t crc = value;
        for (int bit = 0; bit < 8; bit++) crc = (crc >> 1) ^ ((crc & 1) ? 0x82F63B78u : 0);
        bytes[0][value] = crc;
    }
    for (int k = 1; k < 8; k++) {
        for (int value = 0; value < 256; value++) {
            uint32_t crc = bytes[k - 1][value];
            bytes[k][value] = bytes[0][crc & 0xff] ^ (crc >> 8);
        }
    }
    fillSkip(skipLong, LONG);
    fillSkip(skipShort, SHORT);
    chosen = haptera_crc32c_has_hardware() ? haptera_crc32c_hardware : haptera_crc32c_table;
}

static inline uint64_t load(const uint8_t *at) {
    uint64_t word;
    memcpy(&word, at, sizeof word);
    return word;
}

// Eight bytes a round; both processors we build for are little-endian.
uint32_t haptera_crc32c_table(uint32_t crc, const void *data, size_t length) {
    const uint8_t *at = data;
    crc = ~crc;
    for (; length >= 8; at += 8, length -= 8) {
        uint64_t word = load(at) ^ crc;
        crc = bytes[7][word & 0xff] ^ bytes[6][word >> 8 & 0xff] ^ bytes[5][word >> 16 & 0xff] ^
              bytes[4][word >> 24 & 0xff] ^ bytes[3][word >> 32 & 0xff] ^
              bytes[2][word >> 40 & 0xff] ^ bytes[1][word >> 48 & 0xff] ^ bytes[0][word >> 56];
    }
    for (; length > 0; at++, length--) crc = bytes[0][(crc ^ *at) & 0xff] ^ (crc >> 8);
    return ~crc;
}

#ifdef HARDWARE
int haptera_crc32c_has_hardware(void) {
    static int answer = -1;
    int known = __atomic_load_n(&answer, __ATOMIC_RELAXED);
    if (known < 0) {
        known = detect();
        __atomic_store_n(&answer, known, __ATOMIC_RELAXED);
    }
    return known;
}

static inline uint32_t skip(uint32_t table[4][256], uint64_t crc) {
    return table[0][crc & 0xff] ^ table[1][crc >> 8 & 0xff] ^ table[2][crc >> 16 & 0xff] ^
           table[3][crc >> 24 & 0xff];
}

HARDWARE static inline uint64_t streams(
    uint64_t crc, const uint8_t *at, size_t stride, uint32_t table[4][256]) {
    uint64_t second = 0, third = 0;
    for (size_t i = 0; i < stride; i += 8) {
        crc = STEP8(crc, load(at + i));
        second = STEP8(second, load(at + stride + i));
        third = STEP8(third, load(at + 2 * stride + i));
    }
    return skip(table, skip(table, crc) ^ second) ^ third;
}

HARDWARE static uint32_t hardware(uint32_t start, const uint8_t *at, size_t length) {
    uint64_t crc = ~start;
    for (; length >= 3 * LONG; at += 3 * LONG, length -= 3 * LONG) {
        crc = streams(crc, at, LONG, skipLong);
    }
    for (; length >= 3 * SHORT; at += 3 * SHORT, length -= 3 * SHORT) {
        crc = streams(crc, at, SHORT, skipShort);
    }
    for (; length >= 8; at += 8, length -= 8) crc = STEP8(crc, load(at));
    for (; length > 0; at++, length--) crc = STEP1(crc, *at);
    return ~(uint32_t)crc;
}

uint32_t haptera_crc32c_hardware(uint32_t crc, const void *data, size_t length) {
    return haptera_crc32c_has_hardware() ? hardware(crc, data, length)
                                         : haptera_crc32c_table(crc, data, length);
}
#else
int haptera_crc32c_has_hardware(void) { return 0; }
uint32_t haptera_crc32c_hardware(uint32_t crc, const void *data, size_t length) {
    return haptera_crc32c_table(crc, data, length);
}
#endif

uint32_t haptera_crc32c(uint32_t crc, const void *data, size_t length) {
    return chosen(crc, data, length);
}
