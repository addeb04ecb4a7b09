// OpenSSL's libcrypto for Swift: the hash that compares whole blocks between replicas.
#ifndef HAPTERA_COPENSSL_H
#define HAPTERA_COPENSSL_H
#include <stddef.h>
#include <stdint.h>

// The first 16 bytes of the SHA-256 of `length` bytes, as two little-endian integers. Keeps one
// context per thread; aborts if libcrypto has no SHA-256.
void haptera_sha256_prefix(const void *data, size_t length, uint64_t prefix[2]);
#endif
