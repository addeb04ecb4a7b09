#include "CHaptera.h"

static uint32_t table[256];
static int ready;

static void fill(void) {
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t c = i;
        for (int k = 0; k < 8; k++) c = (c >> 1) ^ ((c & 1) ? 0x82F63B78u : 0);
        table[i] = c;
    }
    ready = 1;
}

uint32_t haptera_crc32c(uint32_t crc, const void *data, size_t length) {
    if (!ready) fill();
    const uint8_t *p = data;
    crc = ~crc;
    while (length--) crc = table[(crc ^ *p++) & 0xff] ^ (crc >> 8);
    return ~crc;
}
