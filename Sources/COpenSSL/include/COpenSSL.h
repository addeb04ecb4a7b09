// OpenSSL's libcrypto for Swift: the hash that compares whole blocks between replicas.
#ifndef HAPTERA_COPENSSL_H
#define HAPTERA_COPENSSL_H
#include <sys/select.h>
#include <openssl/evp.h>
#endif
