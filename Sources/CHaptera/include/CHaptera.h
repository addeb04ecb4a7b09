#ifndef HAPTERA_CHAPTERA_H
#define HAPTERA_CHAPTERA_H
#include <stddef.h>
#include <stdint.h>

// CRC32C (Castagnoli, reflected polynomial 0x82F63B78, RFC 3720 section 12.1) of `length` bytes,
// continuing from `crc` (0 to start). Chosen at the first call: SSE4.2, ARMv8 or a table.
uint32_t haptera_crc32c(uint32_t crc, const void *data, size_t length);

#endif
